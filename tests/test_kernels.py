"""Every kernel against the reference: cell x direction x dtype x isa x structure.

Knows the compiled layer by its stub, and the modules on top of it. All padding holds NaN, all
inputs are read-only, all outputs hold NaN before the call (see `cases.run_kernel`).
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from cases import (
    DIRECTIONS,
    DTYPES,
    FUNCTIONS,
    LENGTHS,
    LOSSES,
    SHAPES,
    WEIGHTS,
    Case,
    Shape,
    as_state,
    as_tuple,
    gradients,
    in_order,
    make_inputs,
    make_lengths,
    make_module,
    make_weights,
    past_lengths,
    poison,
    run_kernel,
    run_reference,
    tape_padding,
)
from tolerances import TIMES_NUMPY, assert_close, assert_same_bits, relative_error

from rnnfast import _kernels, reference
from rnnfast.cells import CELLS

# The structure of a run beyond shape and lengths: bias, initial states, loss, batch_first.
STRUCTURES = tuple(itertools.product((True, False), (True, False), LOSSES, (False, True)))
TIME_AXIS = {"y": 0, "dx": 0, "tape_h": 1, "tape_c": 1, "tape_gates": 1}
# The reference is computed once for all isas, so isa is the index that runs fastest.
KERNELS = list(itertools.product(CELLS, DIRECTIONS, DTYPES, _kernels.ISAS))


def is_gradient(name):
    """Whether an array of a run is judged by the bound for gradients."""
    return name.startswith("d") or "[" in name


def check(case, got, context):
    """All arrays of a run against the reference; zeros past the lengths; tape untouched there."""
    want = run_reference(case)
    lengths = make_inputs(case).lengths
    context = f"{case}; {context}; isa={_kernels.isa()}"
    past = past_lengths(lengths, case.shape.T, case.shape.B)
    for name, array in got.items():
        axis = TIME_AXIS.get(name)
        if name in ("y", "dx"):
            assert not array[past].any(), f"{name} is not zero past a row's length; {context}"
        if name.startswith("tape"):
            padding = tape_padding(name, case, lengths)
            written = ~np.isnan(array[:, padding])
            assert not written.any(), f"{name} was written past a row's length; {context}"
            array = array.copy()
            array[:, padding] = 0
        what = "gradient" if is_gradient(name) else "forward"
        if name == "tape_gates":
            for i, gate in enumerate(CELLS[case.cell].tape_gates):
                label = f"{name}[{gate}]"
                args = array[:, :, :, i], want[name][:, :, :, i], case.dtype, what
                assert_close(label, *args, context=context, time_axis=axis)
        else:
            assert_close(name, array, want[name], case.dtype, what, context=context, time_axis=axis)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_kernel(cell, direction, dtype, isa, lengths, use_isa):
    """Forward with its tape, and backward, on every shape; the structures take turns."""
    use_isa(isa)
    turn = list(CELLS).index(cell) + 7 * DIRECTIONS.index(direction) + 3 * LENGTHS.index(lengths)
    for k, shape in enumerate(SHAPES):
        bias, initial, loss, batch_first = STRUCTURES[(5 * k + turn) % len(STRUCTURES)]
        case = Case(cell, shape, direction, dtype, lengths, bias, initial, loss)
        got, _ = run_kernel(case, batch_first=batch_first)
        check(case, got, f"batch_first={batch_first}")


@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_structure(cell, direction, dtype, isa, use_isa):
    """All structures on one shape."""
    use_isa(isa)
    for bias, initial, loss, batch_first in STRUCTURES:
        case = Case(
            cell, Shape(4, 7, 6, 9), direction, dtype, "with zero", bias, initial, loss, seed=1
        )
        got, _ = run_kernel(case, batch_first=batch_first)
        check(case, got, f"batch_first={batch_first}")


@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_inference(cell, direction, dtype, isa, use_isa):
    """Forward without a tape."""
    use_isa(isa)
    for k, shape in enumerate(SHAPES):
        case = Case(cell, shape, direction, dtype, LENGTHS[k % 3], bias=k % 4 != 1)
        got, _ = run_kernel(case, tape=False)
        assert set(got) == {"y", *(f"{name}_n" for name in case.states)}
        check(case, got, "no tape")


@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_many_steps(cell, direction, dtype, isa, use_isa):
    """More steps than any chunk of steps has, and more rows (t, b) than any panel of a sum."""
    use_isa(isa)
    case = Case(cell, Shape(131, 5, 3, 65), direction, dtype, "uneven")
    got, _ = run_kernel(case)
    check(case, got, "")


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_wanted(cell, isa, use_isa):
    """Every subset of the gradients can be asked for, and is what it is among all of them."""
    use_isa(isa)
    case = Case(cell, Shape(3, 7, 5, 6), "bidirectional", "float32", "uneven")
    everything, _ = run_kernel(case)
    check(case, everything, "all gradients")
    groups = [["dx"], [name for name in gradients(case) if name in ("dh_0", "dc_0")]]
    groups += [[f"{p}[{d}]" for d in range(2)] for p in CELLS[case.cell].parameters()]
    for chosen in itertools.product((False, True), repeat=len(groups)):
        want = [n for yes, group in zip(chosen, groups, strict=True) if yes for n in group]
        got, _ = run_kernel(case, want=want)
        assert {name for name in got if is_gradient(name)} == set(want)
        for name in want:
            assert_same_bits(name, got[name], everything[name], context=f"{case}; want={want}")


@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_no_steps(cell, direction, dtype, isa, use_isa):
    """T = 0: an empty y, the initial states back, gradients of zero."""
    use_isa(isa)
    case = Case(cell, Shape(0, 3, 4, 5), direction, dtype)
    got, _ = run_kernel(case)
    given = make_inputs(case)
    for i, name in enumerate(case.states):
        assert_same_bits(name, got[f"{name}_n"], given.state[i], context=case)
        assert_same_bits(name, got[f"d{name}_0"], given.dstate[i], context=case)
    for name in gradients(case):
        if "[" in name:
            assert not got[name].any(), f"{name}; {case}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_strides(cell, dtype):
    """x and y may have any strides but the last: same bits, and nothing written in between."""
    case = Case(cell, Shape(5, 4, 6, 7), "bidirectional", dtype, "uneven")
    given, D, H = make_inputs(case), 2, 7
    want, _ = run_kernel(case)
    wide = np.full((10, 8, 6 + 3), np.nan, dtype)
    wide[::2, ::2, :6] = given.x
    out = np.full((10, 8, D * H + 2), -7.0, dtype)
    x, y = wide[::2, ::2, :6], out[::2, ::2, 1 : 1 + D * H]
    h_n, c_n = np.empty((2, D, 4, H), dtype)
    weights = tuple(in_order(case, own) for own in given.weights)
    how = _kernels.FORWARD, 1, 0, None, case.functions
    pack = _kernels.pack(CELLS[cell].number, weights, *how)
    has_c = "c" in case.states
    h_0, c_0 = (*given.state, None)[:2]
    _kernels.forward(
        pack, x, y, h_0, c_0, h_n, c_n if has_c else None, given.lengths, None, None, None,
        False, 1, 0,
    )  # fmt: skip
    assert_same_bits("y", y, want["y"], context=case)
    y[...] = -7
    assert (out == -7).all(), f"written between the rows of y; {case}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_inputs_are_not_written_and_backward_runs_twice(cell, dtype):
    case = Case(cell, Shape(6, 8, 5, 9), "bidirectional", dtype, "with zero", seed=2)
    given = make_inputs(case)
    arrays = [given.x, given.lengths, given.dy, *given.state, *given.dstate]
    arrays += [array for one in given.weights for array in one]
    before = [array.tobytes() for array in arrays]
    first, _ = run_kernel(case)
    assert before == [array.tobytes() for array in arrays], f"an input was written; {case}"
    second, _ = run_kernel(case)
    for name in first:
        assert_same_bits(name, first[name], second[name], context=case)


# ---------------------------------------------------------------------------- NaN and infinity


def special_inputs(case, where, value):
    """The case's inputs with `value` at one element of x, h_0, W, R, dy or dh_n."""
    given = make_inputs(case)

    def put(array, *index):
        out = array.copy()
        out[index] = value
        return out

    if where == "x":
        return given._replace(x=put(given.x, 2, 1, 0))
    if where == "h_0":
        return given._replace(state=(put(given.state[0], 0, 1, 2), *given.state[1:]))
    if where == "dy":
        return given._replace(dy=put(given.dy, 2, 1, 3))
    if where == "dh_n":
        return given._replace(dstate=(put(given.dstate[0], 0, 1, 2), *given.dstate[1:]))
    W, R, *biases = given.weights[0]
    if where == "W":
        return given._replace(weights=((put(W, 4, 0), R, *biases),))
    return given._replace(weights=((W, put(R, 4, 0), *biases),))


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["x", "h_0", "W", "R", "dy", "dh_n"])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_propagate(cell, where, value, isa, use_isa):
    """What is not finite stands where the reference has it, and nowhere else."""
    use_isa(isa)
    for dtype in DTYPES:
        case = Case(cell, Shape(5, 4, 3, 6), "forward", dtype, seed=3)
        given = special_inputs(case, where, value)
        got, _ = run_kernel(case, inputs=given)
        with np.errstate(all="ignore"):
            state, dstate = (tuple(a[0] for a in pair) for pair in (given.state, given.dstate))
            weights = given.weights[0]
            how = dict(functions=case.functions)
            y, state_n, tape = reference.forward(cell, given.x, state, weights, **how)
            grads = reference.backward(cell, given.x, tape, weights, given.dy, dstate, **how)
        want = {"y": y, "dx": grads["x"]}
        for i, name in enumerate(case.states):
            want |= {f"{name}_n": state_n[i][None], f"d{name}_0": grads["state"][i][None]}
        want |= {f"{p}[0]": grads[p] for p in CELLS[case.cell].parameters()}
        assert where in ("dy", "dh_n") or not np.isnan(value) or np.isnan(want["y"]).any()
        for name, array in want.items():
            for kind in (np.isnan, np.isposinf, np.isneginf):
                differ = kind(got[name]) != kind(array)
                assert not differ.any(), (
                    f"{kind.__name__}({name}) differs at {np.argwhere(differ)[0].tolist()}: "
                    f"got {got[name][differ][0]!r}, want {array[differ][0]!r}; "
                    f"{value} in {where}; {case}; isa={isa}"
                )


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(cell):
    """A NaN in one row's x leaves every other row's bits alone."""
    case = Case(cell, Shape(5, 9, 3, 6), "bidirectional", "float32", "uneven", seed=4)
    clean, _ = run_kernel(case)
    given = make_inputs(case)
    b = int(np.argmax(given.lengths))
    x = given.x.copy()
    x[2, b, 1] = np.nan
    got, _ = run_kernel(case, inputs=given._replace(x=x))
    others = np.arange(9) != b
    assert np.isnan(got["y"][:, b]).any() and np.isnan(got["h_n"][:, b]).any()
    for name in ("y", "dx", "h_n", "dh_0"):
        assert_same_bits(name, got[name][:, others], clean[name][:, others], context=case)


# ------------------------------------------------------------------- the promise about float32

PROMISE_SHAPES = {
    "default": (Shape(50, 8, 16, 64), Shape(16, 160, 3, 16), Shape(3, 32, 2000, 16)),
    # Where errors grow from step to step, a ratio says little after many: fewer steps.
    "hard": (Shape(8, 32, 16, 64), Shape(8, 160, 3, 16), Shape(3, 32, 500, 16)),
}
DRAWS = 3


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("cell", CELLS)
def test_error_within_twice_numpys(cell, weights, isa, use_isa):
    """float32 errs at most twice as much as plain float32 NumPy, both against float64.

    By the root of the mean square over some draws: of one draw, two errors of a bias of 16 numbers
    may by chance differ by more.
    """
    use_isa(isa)
    for shape in PROMISE_SHAPES[weights]:
        case = Case(cell, shape, "forward", "float32", weights=weights)
        squares = {}
        for seed in range(DRAWS):
            drawn = replace(case, seed=seed)
            got, _ = run_kernel(drawn)
            exact, plain = run_reference(drawn), run_reference(drawn, "float32")
            for name in got:
                errors = [relative_error(a[name], exact[name]) for a in (got, plain)]
                squares[name] = squares.get(name, 0) + np.square(errors)
        for name, (ours, numpys) in squares.items():
            ours, numpys = (ours / DRAWS) ** 0.5, (numpys / DRAWS) ** 0.5
            # Half an ulp is what storing the exact result costs.
            assert ours <= TIMES_NUMPY * max(numpys, 2**-25), (
                f"{name}: error {ours:.3g} is {ours / numpys:.2f} times NumPy's {numpys:.3g}; "
                f"{case}; isa={isa}"
            )


# ------------------------------------------------------------------------------- memory

MEMORY_SCRIPT = """
import sys
import numpy as np
from rnnfast import _kernels
from rnnfast.cells import CELLS

T, threads = int(sys.argv[1]), int(sys.argv[2])
B, I, H, cell = 16, 32, 32, CELLS["lstm"]

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

rng = np.random.default_rng(0)
weights = tuple(
    rng.uniform(-0.1, 0.1, s).astype("f4") for s in cell.weight_shapes(I, H).values()
)
x, y, dy, dx = (np.ones((T, B, n), "f4") for n in (I, H, H, I))
gates = np.ones((1, T, B, 4, H), "f4")
h, c = np.ones((2, 1, T + 1, B, H), "f4")
state = np.ones((2, 1, B, H), "f4")
grads = tuple(np.ones(w.shape, "f4") for w in weights)
forward = _kernels.pack(cell.number, (weights,), _kernels.FORWARD, threads, 0)
backward = _kernels.pack(cell.number, (weights,), _kernels.BACKWARD, threads, 0)

def run(T):
    part = gates[:, :T], h[:, : T + 1], c[:, : T + 1]
    for tape in (None, None, None), part:
        _kernels.forward(
            forward, x[:T], y[:T], None, None, *state, None, *tape, False, threads, 0
        )
    _kernels.backward(
        backward, x[:T], None, *part, dy[:T], *state, dx[:T], None, None, (grads,), False,
        threads, 0,
    )

run(1)
before = peak()
run(T)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_workspace_does_not_grow_with_steps(threads):
    """Peak memory of forward, without and with tape, and backward; all arrays are there before."""
    grown = [
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY_SCRIPT, str(T), str(threads)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for T in (500, 4000)
    ]
    # 3500 steps more: 7 MiB for one number per unit and row, 28 MiB for one per gate.
    assert grown[1] - grown[0] < 1024, f"KiB of peak memory for 500 and 4000 steps: {grown}"


# ------------------------------------------------------------------- stacks, through the modules


def fill(module, cell, rng):
    """Gives every parameter of a module random values, unequal; returns them in float64."""
    for name, array in module.params.items():
        if name.startswith("weight_ih_l"):
            end = name.removeprefix("weight_ih")
            weights = make_weights(cell, array.shape[1], module.hidden_size, rng)
            for p, values in zip(CELLS[cell].parameters(), weights, strict=True):
                if p + end in module.params:
                    module.params[p + end][...] = values
    return {name: array.astype(np.float64) for name, array in module.params.items()}


class Run:
    """A module's run beside the reference's, on the same random inputs."""

    def __init__(self, cell, L, D, *, lengths="none", batch_first=False, bias=True, dtype, seed=0):
        self.cell, self.dtype, self.batch_first = cell, np.dtype(dtype), batch_first
        T, B, I, H = 7, 5, 6, 9
        rng = np.random.default_rng(seed)
        self.module = make_module(
            cell, I, H, L, bias=bias, batch_first=batch_first, bidirectional=D == 2, dtype=dtype
        )
        self.params = fill(self.module, cell, rng)
        self.lengths = make_lengths(lengths, T, B, rng)
        n = len(CELLS[cell].states)
        self.x = poison(rng.standard_normal((T, B, I)).astype(dtype), self.lengths)
        self.dy = poison(rng.standard_normal((T, B, D * H)).astype(dtype), self.lengths)
        self.state, self.dstate = (
            tuple(rng.standard_normal((L * D, B, H)).astype(dtype) for _ in range(n))
            for _ in range(2)
        )
        self.context = f"{cell} L={L} D={D} lengths={lengths} {batch_first=} {bias=} {seed=}"

    def flip(self, sequence):
        """[T, B, N] as the module takes or gives it."""
        return sequence.swapaxes(0, 1) if self.batch_first else sequence

    def close(self, name, got, want, what="forward", time_axis=None):
        assert_close(name, got, want, self.dtype, what, context=self.context, time_axis=time_axis)

    def want(self):
        """The reference's y, states and gradients, in float64."""
        wide = [a.astype(np.float64) for a in (self.x, self.dy)]
        state, dstate = (tuple(a.astype(np.float64) for a in s) for s in (self.state, self.dstate))
        how = dict(lengths=self.lengths, functions=FUNCTIONS[self.cell])
        y, state_n, tapes = reference.stack_forward(self.cell, wide[0], state, self.params, **how)
        grads = reference.stack_backward(self.cell, tapes, self.params, wide[1], dstate, **how)
        return y, state_n, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True], ids=["steps first", "batch first"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("L", "D"), [(1, 1), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_stack(cell, L, D, lengths, batch_first, dtype):
    """Layers x directions through a module: y, states and all gradients, which are added."""
    run = Run(
        cell, L, D, lengths=lengths, batch_first=batch_first, bias=lengths != "none", dtype=dtype
    )
    module, x, state = run.module, run.flip(run.x), as_state(cell, run.state)
    y_want, state_want, grads_want = run.want()
    y, state_n = module(x, state, lengths=run.lengths)
    y_train, state_train, tape = module.forward_train(x, state, lengths=run.lengths)
    for outputs in ((y, state_n), (y_train, state_train)):
        run.close("y", run.flip(outputs[0]), y_want, time_axis=0)
        for i, s in enumerate(as_tuple(outputs[1])):
            run.close(f"state {i}", s, state_want[i])
    module.zero_grad()
    dx, dstate = module.backward(tape, run.flip(run.dy), as_state(cell, run.dstate))
    run.close("dx", run.flip(dx), grads_want["x"], "gradient", time_axis=0)
    for i, s in enumerate(as_tuple(dstate)):
        run.close(f"dstate {i}", s, grads_want["state"][i], "gradient")
    once = {name: grad.copy() for name, grad in module.grads.items()}
    assert set(once) == set(run.params)
    for name, grad in once.items():
        run.close(name, grad, grads_want[name], "gradient")
    dx_again, dstate_again = module.backward(tape, run.flip(run.dy), as_state(cell, run.dstate))
    assert_same_bits("dx", dx_again, dx, context=run.context)
    for i, (a, b) in enumerate(zip(as_tuple(dstate_again), as_tuple(dstate), strict=True)):
        assert_same_bits(f"dstate {i}", a, b, context=run.context)
    for name, grad in module.grads.items():  # doubling is exact
        assert_same_bits(name, grad, 2 * once[name], context=run.context)


@pytest.mark.parametrize("cell", CELLS)
def test_stack_without_states(cell):
    """No initial states are zeros; a gradient that is left out is zeros."""
    run = Run(cell, 2, 2, dtype="float64")
    zeros = tuple(np.zeros_like(s) for s in run.state)
    y, state_n, tape = run.module.forward_train(run.x)
    run.state = zeros
    y_want, state_want, _ = run.want()
    run.close("y", y, y_want, time_axis=0)
    for i, s in enumerate(as_tuple(state_n)):
        run.close(f"state {i}", s, state_want[i])
    losses = [(run.dy, None), (None, run.dstate)]
    for dy, dstate in losses:
        run.dy = np.zeros_like(run.dy) if dy is None else dy
        run.dstate = zeros if dstate is None else dstate
        _, _, want = run.want()
        run.module.zero_grad()
        dx, _ = run.module.backward(tape, dy, as_state(cell, dstate))
        run.close("dx", dx, want["x"], "gradient", time_axis=0)
        for name, grad in run.module.grads.items():
            run.close(name, grad, want[name], "gradient")


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched(cell):
    """x [T, I] is a batch of one: same bits, one axis less."""
    run = Run(cell, 2, 2, dtype="float32")
    x, dy = run.x[:, :1], run.dy[:, :1]
    state, dstate = (tuple(s[:, :1] for s in pair) for pair in (run.state, run.dstate))
    y, state_n, tape = run.module.forward_train(x, as_state(cell, state))
    dx, _ = run.module.backward(tape, dy, as_state(cell, dstate))
    once = {name: grad.copy() for name, grad in run.module.grads.items()}
    run.module.zero_grad()

    def row(pair):
        return as_state(cell, tuple(s[:, 0] for s in pair))

    y_1, state_1, tape = run.module.forward_train(x[:, 0], row(state))
    dx_1, _ = run.module.backward(tape, dy[:, 0], row(dstate))
    assert_same_bits("y", y_1, y[:, 0])
    assert_same_bits("dx", dx_1, dx[:, 0])
    for i, s in enumerate(as_tuple(state_1)):
        assert_same_bits(f"state {i}", s, as_tuple(state_n)[i][:, 0])
    for name, grad in run.module.grads.items():
        assert_same_bits(name, grad, once[name])


@pytest.mark.parametrize("cell", CELLS)
def test_an_edited_weight_changes_the_result(cell):
    """Packs are made per call: editing `params` or `flat` in place takes effect at once."""
    run = Run(cell, 2, 1, dtype="float64")
    state = as_state(cell, run.state)
    before, _ = run.module(run.x, state)
    for name in run.params:
        run.module.params[name][...] *= 1.5
        run.params[name] = run.params[name] * 1.5
        y, _ = run.module(run.x, state)
        run.close(f"y after {name}", y, run.want()[0], time_axis=0)
        assert relative_error(y, before) > 1e-6, name
        before = y
    run.module.flat *= 0.5
    run.params = {name: array * 0.5 for name, array in run.params.items()}
    y, _, tape = run.module.forward_train(run.x, state)
    y_want, _, grads_want = run.want()
    run.close("y after flat", y, y_want, time_axis=0)
    dx, _ = run.module.backward(tape, run.dy, as_state(cell, run.dstate))
    run.close("dx after flat", dx, grads_want["x"], "gradient", time_axis=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_stream(cell, dtype):
    """A stream, step by step and in blocks, is the layer on the whole sequence."""
    run = Run(cell, 2, 1, dtype=dtype)
    stream = run.module.stream(batch_size=5)
    run.state = tuple(np.zeros_like(s) for s in run.state)
    y_want, state_want, _ = run.want()
    y = np.concatenate([
        *(stream.step(run.x[t])[None] for t in range(2)), stream.process(run.x[2:])
    ])  # fmt: skip
    run.close("y", y, y_want, time_axis=0)
    for i, s in enumerate(as_tuple(stream.state)):
        run.close(f"state {i}", s, state_want[i])
    stream.reset()
    assert_same_bits("y", stream.process(run.x[:2]), y[:2], context=run.context)


# -------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _kernels.ISAS)
def test_dropout_kernel(isa, dtype, use_isa):
    """The mask of the kernel is the reference's; what is kept is divided by 1 - p."""
    use_isa(isa)
    rng = np.random.default_rng(0)
    for T, B, N in [(1, 1, 1), (3, 2, 7), (2, 5, 16), (4, 3, 33)]:
        x = rng.standard_normal((T, B, N)).astype(dtype)
        for p, *key in [(0.25, 0, 0, 0), (0.5, 2**63 - 1, 12, 3), (0.0, 1, 1, 1), (1.0, 0, 0, 0)]:
            out = np.full_like(x, np.nan)
            _kernels.dropout(x, out, p, *key, 1 + len(out), 0)
            mask = reference.dropout_mask(*key, T, B, N, p)
            context = f"T={T} B={B} N={N} p={p} (seed, call, layer)={key} isa={isa}"
            np.testing.assert_array_equal(out != 0, mask & (x != 0), context)
            scale = 1 / (1 - p) if p < 1 else 0
            assert_close("dropout", out, x * mask * scale, np.dtype(dtype), context=context)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_between_layers(cell):
    """Only in training, only between layers; its own mask in each call, the same in backward."""
    run = Run(cell, 2, 2, dtype="float64")
    module = make_module(cell, 6, 9, 2, bidirectional=True, dropout=0.5, dtype="float64", seed=5)
    module.load_state_dict(run.module.state_dict())
    state = as_state(cell, run.state)
    assert_same_bits("y", module(run.x, state)[0], run.module(run.x, state)[0])
    for call in range(2):
        mask = reference.dropout_mask(5, call, 0, 7, 5, 18, 0.5)
        how = dict(masks=[mask / 0.5], functions=FUNCTIONS[cell])
        y, _, tape = module.forward_train(run.x, state)
        dx, _ = module.backward(tape, run.dy, as_state(cell, run.dstate))
        y_want, _, tapes = reference.stack_forward(cell, run.x, run.state, run.params, **how)
        grads = reference.stack_backward(cell, tapes, run.params, run.dy, run.dstate, **how)
        run.close(f"y of call {call}", y, y_want, time_axis=0)
        run.close(f"dx of call {call}", dx, grads["x"], "gradient", time_axis=0)

"""A projected h, of each cell that may have one: the same tests as of other layers, in short.

Knows the reference, the compiled layer and the public API. `test_drop_in` has PyTorch's own.
"""

import itertools

import numpy as np
import pytest
from cases import (
    DIRECTIONS,
    DTYPES,
    FUNCTIONS,
    LENGTHS,
    Case,
    Shape,
    make_inputs,
    make_module,
    make_weights,
    options_of,
    own_options,
    pack_of,
    past_lengths,
    poison,
    run_kernel,
)
from test_api import bits, random
from test_kernels import SHAPES, STRUCTURES, check
from test_reference import RUNS, assert_near, complex_step
from tolerances import assert_close, assert_same_bits

import rnnfast
from rnnfast import _kernels, functional, reference
from rnnfast.cells import CELLS

PROJECTED = [name for name, cell in CELLS.items() if cell.kind == "LSTM"]
T, B, I, H, P = 9, 4, 5, 17, 6


# --------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", PROJECTED)
def test_gradients_of_the_reference(cell, reverse, lengths):
    """By the complex step, as in test_reference."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((4, 3, 2)), rng.standard_normal((4, 3, 3))
    state = rng.standard_normal((3, 3)), rng.standard_normal((3, 5))
    dstate = rng.standard_normal((3, 3)), rng.standard_normal((3, 5))
    *weights, projection = make_weights(cell, 2, 5, rng, P=3)
    x, dy, valid = poison(x, lengths), poison(dy, lengths), ~past_lengths(lengths, 4, 3)
    how = dict(lengths=lengths, reverse=reverse, functions=FUNCTIONS[cell])

    def loss(x, h, c, projection, *weights):
        y, last, _ = reference.forward(cell, x, (h, c), weights, projection=projection, **how)
        total = (y * np.where(valid[..., None], dy, 0)).sum()
        return total + sum((s * d).sum() for s, d in zip(last, dstate, strict=True))

    how_projected = dict(how, projection=projection)
    _, _, tape = reference.forward(cell, x, state, weights, **how_projected)
    got = reference.backward(cell, x, tape, weights, dy, dstate, **how_projected)
    want = complex_step(loss, [x, *state, projection, *weights])
    names = ["x", "weight_hr", *CELLS[cell].parameters()]
    for name, need in zip(names, [want[0], *want[3:]], strict=True):
        assert_near(name, got[name], need)
    for have, need in zip(got["state"], want[1:3], strict=True):
        assert_near("state", have, need)


def test_a_projection_by_the_identity_changes_nothing():
    """But for a unit that it leaves out, which then reaches nothing through h."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((5, 2, 3))
    W, R, b_ih, b_hh = make_weights("lstm", 3, 6, rng)
    y, _, _ = reference.forward("lstm", x, None, (W, R * (np.arange(6) < 4), b_ih, b_hh))
    weights = W, R[:, :4], b_ih, b_hh
    got, _, _ = reference.forward("lstm", x, None, weights, projection=np.eye(4, 6))
    np.testing.assert_allclose(got, y[:, :, :4], rtol=1e-13)


# ----------------------------------------------------------------------------------- the kernels


def projections(shape):
    """Sizes to project to: one, one less than H, and one between."""
    return sorted({1, (shape.H + 1) // 2, shape.H - 1} - {0, shape.H})


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kernel(direction, dtype, isa, lengths, use_isa):
    """Every shape; cells, sizes of h and structures take turns."""
    use_isa(isa)
    turns = itertools.count(3 * LENGTHS.index(lengths) + DIRECTIONS.index(direction))
    for shape in SHAPES:
        for size in projections(shape):
            turn = next(turns)
            bias, initial, loss, batch_first = STRUCTURES[5 * turn % len(STRUCTURES)]
            # Of a single number, a result may be the small difference of large ones.
            if size == 1 and dtype == "float32":
                continue
            case = Case(
                PROJECTED[turn % len(PROJECTED)], shape, direction, dtype, lengths, bias, initial,
                loss, projection=size,
            )  # fmt: skip
            got, _ = run_kernel(case, batch_first=batch_first)
            check(case, got, f"{batch_first=}")
            del got
            inference, _ = run_kernel(case, tape=False)
            check(case, inference, "no tape")


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_threads_and_plans(dtype, isa, use_isa):
    """Units of c and of h are shared out apart: few of h leave a worker without any."""
    use_isa(isa)
    shapes = Shape(9, 29, 5, 70), Shape(4, 150, 9, 66), Shape(5, 3, 20, 200), Shape(70, 8, 3, 5)
    turns = itertools.product(shapes, (2, 69, 150), DIRECTIONS, ("none", "with zero"))
    for turn, (shape, size, direction, lengths) in enumerate(turns):
        if size >= shape.H:
            continue
        cell = PROJECTED[turn % len(PROJECTED)]
        case = Case(cell, shape, direction, dtype, lengths, projection=size)
        want, _ = run_kernel(case, plan="serial")
        for threads, plan in itertools.product((2, 3, 7), ("batch", "units", "directions")):
            got, ran = run_kernel(case, threads=threads, plan=plan)
            if plan == "units" and shape.H == 200:
                shared = "batch" if CELLS[cell].norms else "units"
                assert ran[0][0] == ran[1][0] == shared and ran[0][1] > 1
            for name in want:
                assert_same_bits(name, got[name], want[name], context=f"{case} {ran} {isa=}")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_subset_of_the_gradients(direction):
    case = Case("lstm_peephole", Shape(3, 7, 5, 6), direction, "float32", "uneven", projection=4)
    everything, _ = run_kernel(case)
    names = [n for n in everything if n == "dx" or n.startswith("dh") or "weight_h" in n]
    for r in range(len(names) + 1):
        for want in itertools.combinations(names, r):
            got, _ = run_kernel(case, want=want)
            for name in want:
                assert_same_bits(name, got[name], everything[name], context=f"{want}")


# ---------------------------------------------------------------------------- functions and modules


def weights_of(cell, dtype="float32"):
    rng = np.random.default_rng(7)
    return tuple(a.astype(dtype) for a in make_weights(cell, I, H, rng, P=P))


@pytest.mark.parametrize("cell", PROJECTED)
def test_functions_have_the_modules_bits(cell):
    module = make_module(cell, I, H, proj_size=P, seed=1)
    options, weights = options_of(cell)[1], tuple(module.params.values())
    assert module.params["weight_hr_l0"].shape == (P, H)
    assert list(module.params)[-1] == "weight_hr_l0" and module.proj_size == P
    assert f"proj_size={P}" in repr(module)
    x, dy = random(T, B, I), random(T, B, P, seed=2)
    y, state, tape = functional.lstm_forward(x, None, weights, lengths=[9, 1, 0, 3], **options)
    assert y.shape == (T, B, P) and [s.shape for s in state] == [(1, B, P), (1, B, H)]
    want_y, want_state, want_tape = module.forward_train(x, lengths=[9, 1, 0, 3])
    assert bits([y, state]) == bits([want_y, want_state])
    grads = functional.lstm_backward(tape, weights, dy, None, **own_options(cell))
    want = module.backward(want_tape, dy)
    assert bits([grads.x, grads.state]) == bits(want)
    assert bits(grads.weights) == bits(list(module.grads.values()))
    step, ys = None, []
    for x_t in x:
        step = functional.lstm_step(x_t, step, weights, **options)
        ys.append(step[0])
    assert bits(np.stack(ys)) == bits(module(x)[0])
    packs = [pack_of(cell, weights, kind) for kind in ("forward", "backward")]
    y, _, tape = functional.lstm_forward(x, None, packs[0], **options)
    assert bits(y) == bits(module(x)[0])
    again = functional.lstm_backward(tape, packs[1], dy, None, **own_options(cell))
    assert len(again.weights) == len(weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2])
def test_stacks_against_the_reference(D, dtype):
    rng = np.random.default_rng(5)
    module = rnnfast.LSTM(I, H, 3, proj_size=P, bidirectional=D == 2, dtype=dtype, seed=2)
    wide = {name: array.astype(np.float64) for name, array in module.params.items()}
    x, dy = (rng.standard_normal((T, B, n)).astype(dtype) for n in (I, D * P))
    state, dstate = (
        tuple(rng.standard_normal((3 * D, B, n)).astype(dtype) for n in (P, H)) for _ in range(2)
    )
    lengths = np.array([9, 2, 0, 5])
    exact = [tuple(a.astype(np.float64) for a in s) for s in (state, dstate)]
    how = dict(lengths=lengths)
    want, last, tapes = reference.stack_forward("lstm", x.astype("f8"), exact[0], wide, **how)
    grads = reference.stack_backward("lstm", tapes, wide, dy.astype("f8"), exact[1], **how)
    for kind in ("full", "light"):
        y, state_n, tape = module.forward_train(x, state, lengths, tape=kind)
        dx, dstate_0 = module.backward(tape, dy, dstate, accumulate=False)
        assert_close("y", y, want, dtype)
        assert_close("dx", dx, grads["x"], dtype, "gradient")
        for got, need in zip((*state_n, *dstate_0), (*last, *grads["state"]), strict=True):
            assert_close("states", got, need, dtype, "gradient")
        for name, array in module.grads.items():
            assert_close(name, array, grads[name], dtype, "gradient")


@pytest.mark.parametrize("cell", PROJECTED)
def test_light_tapes_wavefronts_and_streams_have_the_same_bits(cell, choose, monkeypatch):
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 0)
    module = make_module(cell, I, H, 3, proj_size=P, seed=3)
    x, dy = random(300, 2, I), random(300, 2, P, seed=1)

    def everything(kind="full"):
        y, state, tape = module.forward_train(x, tape=kind)
        d = module.backward(tape, dy, state, accumulate=False)
        return bits([y, state, d, module.flat_grads.copy()]), tape

    choose(1, "serial")
    want, _ = everything()
    light, tape = everything("light")
    assert tape.layers[0].steps > 0 and light == want
    for threads in (2, 3):
        choose(threads, "wavefront")
        got, tape = everything()
        assert tape.plan == "wavefront" and got == want
    choose(1, "auto")
    y, state = module(x)
    stream = module.stream(2)
    assert bits(np.stack([stream.step(x_t) for x_t in x])) == bits(y)
    assert bits(stream.state) == bits(state)
    stream.reset()
    assert bits(stream.process(x)) == bits(y)
    other = module.stream(2)
    other.state = stream.state
    assert bits(other.step(x[0])) == bits(stream.step(x[0]))
    assert f", proj_size={P})" in repr(stream)


@pytest.mark.parametrize(("steps", "rows"), [(0, 3), (4, 0)])
def test_nothing_to_do(steps, rows):
    module = rnnfast.LSTM(I, H, proj_size=P, seed=1)
    module.flat_grads += 1
    y, _, tape = module.forward_train(np.zeros((steps, rows, I), np.float32))
    assert y.shape == (steps, rows, P)
    h = np.ones((1, rows, P), np.float32), np.ones((1, rows, H), np.float32)
    _, (dh, dc) = module.backward(tape, None, h, accumulate=False)
    assert not module.flat_grads.any()
    assert bits([dh, dc]) == bits(h)


def test_saved_and_loaded(tmp_path):
    module = rnnfast.LSTM(I, H, 2, proj_size=P, peephole=True, seed=1)
    module.save(tmp_path / "projected")
    loaded = rnnfast.load(tmp_path / "projected")
    assert repr(loaded) == repr(module) and bits(loaded.flat) == bits(module.flat)
    assert bits(loaded(random(T, B, I))[0]) == bits(module(random(T, B, I))[0])


def test_what_does_not_fit_is_refused():
    x = random(T, B, I)
    for size in (H, H + 1):
        with pytest.raises(ValueError, match=f"^proj_size: got {size}; needs less than hidden_"):
            rnnfast.LSTM(I, H, proj_size=size)
    module = rnnfast.LSTM(I, H, proj_size=P, seed=1)
    wide = np.zeros((1, B, H), np.float32)
    with pytest.raises(ValueError, match=r"^state \(h_0\): got shape .*L\*D, B, proj_size\]"):
        module(x, (wide, wide))
    with pytest.raises(ValueError, match=r"^dy: got shape"):
        module.backward(module.forward_train(x)[2], random(T, B, H))
    W, R, b_ih, b_hh, W_hr = weights_of("lstm")
    for weights, message in (
        (
            (W, R, b_ih, b_hh, W_hr.T.copy()),
            r"^weights \(W_hr\): got shape \(17, 6\); needs \[P, H",
        ),
        ((W, R.T.copy(), b_ih, b_hh, W_hr), r"^weights \(R\): got shape .* as of W_hr"),
        ((W, R, b_ih, b_hh), r"^weights \(R\): got shape \(68, 6\); needs \[4\*H, H\]"),
        (
            (W, R, b_ih, b_hh, W_hr, W_hr),
            r"^weights: got tuple of 6; needs \(W, R, b_ih, b_hh\) or",
        ),
        (((W, R, b_ih, b_hh, W_hr), (W, R, b_ih, b_hh)), r"^weights: got tuple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.lstm_forward(x, None, weights)
    _, _, tape = functional.lstm_forward(x, None, (W, R, b_ih, b_hh, W_hr))
    plain = tuple(rnnfast.LSTM(I, H).params.values())
    with pytest.raises(ValueError, match=r"^tape: got x .* needs one with I=5, H=17, D=1"):
        functional.lstm_backward(tape, plain, None, None)


def test_altered_tapes_are_refused():
    module = rnnfast.LSTM(I, H, proj_size=P, seed=1)
    for name in ("h", "c"):
        for bad in (P - 1, H + 1):
            tape = module.forward_train(random(T, B, I))[2]
            array = getattr(tape.layers[0], name)
            setattr(tape.layers[0], name, np.zeros((*array.shape[:-1], bad), np.float32))
            with pytest.raises(ValueError, match=r"^tape: got"):
                module.backward(tape, None)


def test_inputs_are_what_the_case_says():
    """That the cases of this file are projected at all."""
    given = make_inputs(Case("lstm", Shape(2, 3, 4, 5), projection=2))
    assert given.state[0].shape == (1, 3, 2) and given.weights[0][-1].shape == (2, 5)

"""What happens between steps: masks with holes, numbers that are set or held, numbers that the
products do not see, clipped gradients, the c of each step. Kernels against the reference, over the
table of cells; the same bits for all plans; and the reference by the complex step.
"""

import itertools
from functools import partial

import numpy as np
import pytest
from cases import (
    DIRECTIONS,
    DTYPES,
    Case,
    Shape,
    all_gradients,
    make_inputs,
    of_direction,
    past_lengths,
    run_kernel,
    run_reference,
)
from tolerances import COMPLEX_STEP, assert_close, assert_same_bits

from rnnfast import _kernels, reference
from rnnfast.cells import CELLS

HAPPENS = (
    ("mask",),
    ("set",),
    ("keep",),
    ("clip",),
    ("c",),
    ("mask", "set", "keep", "clip", "c"),
)
SHAPES = Shape(6, 5, 4, 9), Shape(4, 12, 31, 33), Shape(37, 4, 3, 6), Shape(3, 1, 2, 17)
KERNELS = list(itertools.product(CELLS, DIRECTIONS, DTYPES, _kernels.ISAS))


def projections(cell):
    return (0, 3) if CELLS[cell].kind == "LSTM" else (0,)


def check(case, got, context=""):
    """All arrays of a run but the tape's against the reference, and nothing at missing steps."""
    want = run_reference(case)
    given = make_inputs(case)
    T, B, *_ = case.shape
    missing = past_lengths(given.lengths, T, B) if given.mask is None else ~given.mask
    for name, array in got.items():
        if name.startswith("tape"):
            continue
        if name in ("y", "dx"):
            assert not array[missing].any(), f"{name} is not zero at a missing step; {case}"
        if name == "c_steps" or "_values" in name:  # nothing is written there
            assert np.isnan(array[missing]).all()
            array = np.where(missing[:, :, None], 0, array)
        what = "gradient" if name.startswith("d") or "[" in name else "forward"
        assert_close(name, array, want[name], case.dtype, what, context=f"{case} {context}")


@pytest.mark.parametrize("happens", HAPPENS, ids="-".join)
@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_kernel(cell, direction, dtype, isa, happens, use_isa):
    use_isa(isa)
    for k, shape in enumerate(SHAPES):
        for P in projections(cell):
            lengths = ("none", "uneven", "with zero")[k % 3]
            case = Case(
                cell, shape, direction, dtype, lengths, happens=happens, projection=P, seed=k % 2
            )
            got, _ = run_kernel(case, batch_first=k == 1)
            check(case, got)
            assert set(all_gradients(case)) <= set(got)


@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_inference(cell, direction, dtype, isa, use_isa):
    """Without a tape, where c may not be written over; and with shares of the states before."""
    use_isa(isa)
    for happens in (("mask", "set", "keep", "c"), ("hold",), ("hold", "set", "mask")):
        for shape in SHAPES:
            for P in projections(cell):
                case = Case(cell, shape, direction, dtype, happens=happens, projection=P)
                got, _ = run_kernel(case, tape=False)
                check(case, got, "no tape")


@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_threads_and_plans(cell, direction, dtype, isa, use_isa):
    use_isa(isa)
    for happens in (("mask", "set", "c"), ("mask", "set", "keep", "clip", "c")):
        for shape in (Shape(9, 13, 5, 140), Shape(70, 6, 3, 5)):
            for P in projections(cell):
                case = Case(cell, shape, direction, dtype, "uneven", happens=happens, projection=P)
                want, _ = run_kernel(case, plan="serial")
                for threads, plan in itertools.product((2, 3), ("batch", "units", "directions")):
                    got, ran = run_kernel(case, threads=threads, plan=plan)
                    if plan == "units":  # a mask of h, or a norm, needs whole rows
                        alone = "keep" in happens or shape.H < 64 or CELLS[cell].norms
                        assert ran[0][0] == ("batch" if alone else "units")
                    for name, array in got.items():
                        context = f"{case}; {threads=}, {plan=}"
                        assert_same_bits(name, array, want[name], context=context)


def replaced(values, i, value):
    """A tuple with another i-th value."""
    return (*values[:i], value, *values[i + 1 :])


def run_loss(case, given, d, changed):
    """A loss of a case's direction d by the reference, some of its inputs exchanged."""
    between, dc_steps = of_direction(given.between, given.dc_steps, case, d)
    if "values" in changed:
        i, k, value = changed["values"]
        settings = list(between[i])
        settings[k] = settings[k][0], value
        between = between._replace(**{"hc"[i]: tuple(settings)})
    how = dict(reverse=case.reverse(d), mask=given.mask, between=between, functions=case.functions)
    state = tuple(s[d] for s in given.state)
    x, state = changed.get("x", given.x), changed.get("state", state)
    weights = list(given.weights[d])
    if case.projection:
        how["projection"] = weights.pop()
    weights = changed.get("weights", tuple(weights))
    if given.mask is not None:
        x = np.where(given.mask[:, :, None], x, 0)
    y, last, tape = reference.forward(case.cell, x, state, weights, **how)
    N = case.output
    dy = np.where(given.mask[:, :, None], given.dy, 0) if given.mask is not None else given.dy
    loss = (y * dy[..., d * N : (d + 1) * N]).sum()
    loss += sum((a * b[d]).sum() for a, b in zip(last, given.dstate, strict=True))
    if dc_steps is not None:
        steps = reference.walk(*case.shape[:2], None, case.reverse(d), given.mask)
        loss += sum((tape["c"][s + 1, rows] * dc_steps[t, rows]).sum() for s, t, rows in steps)
    return loss


@pytest.mark.parametrize("happens", [h for h in HAPPENS if "clip" not in h] + [
    ("mask", "set", "keep", "c")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("cell", CELLS)
def test_reference(cell, happens):
    """Each gradient in a direction of random numbers, by the complex step."""
    rng = np.random.default_rng(3)
    for P in projections(cell):
        case = Case(cell, Shape(5, 3, 2, 4), "reverse", "float64", happens=happens, projection=P)
        given = make_inputs(case)
        want = run_reference(case)
        state = tuple(s[0] for s in given.state)
        weights = given.weights[0][:-1] if P else given.weights[0]

        def judge(case, given, at, gradient, name, wrap):
            """The slope of the loss along a random direction, in what `wrap` makes a change of."""
            step, direction = 1e-100, rng.standard_normal(at.shape)
            changed = {name: wrap(at + 1j * step * direction)}
            slope = run_loss(case, given, 0, changed).imag / step
            scale = np.abs(direction * gradient).sum()
            assert abs(slope - (direction * gradient).sum()) <= 10 * COMPLEX_STEP * scale, name

        judge(case, given, np.nan_to_num(given.x), want["dx"], "x", lambda a: a)
        for i, name in enumerate(case.states):
            put = partial(replaced, state, i)
            judge(case, given, state[i], want[f"d{name}_0"], "state", put)
            for k, (_, value) in enumerate(given.between[i] if given.between else ()):
                if value is not None:
                    of_value = partial(lambda i, k, a: (i, k, a), i, k)
                    judge(case, given, value, want[f"d{name}_values{k}"], "values", of_value)
        for i, name in enumerate(case.parameters[: len(weights)]):
            put = partial(replaced, weights, i)
            judge(case, given, weights[i], want[f"{name}[0]"], "weights", put)

"""The promise of same bits, on every isa and in both precisions, where several workers really ran.

All results: for any number of threads and any plan. y, states, dx and dstate: for any split of the
batch into calls. y and states: for any chunking of a stream. Nothing here is compared with the
reference; that is `test_kernels`.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import (
    DIRECTIONS,
    DTYPES,
    Case,
    Shape,
    as_tuple,
    gradients,
    make_inputs,
    make_module,
    past_lengths,
    run_kernel,
)
from tolerances import assert_same_bits

import rnnfast
from rnnfast import _kernels
from rnnfast.cells import CELLS

# Odd batches that no number of threads divides; more rows, and more terms of a sum, than a panel
# of a sum has; few rows and many, which the kernels may treat differently, but not in their bits;
# few rows of many units.
SHAPES = (
    Shape(9, 29, 5, 70),
    Shape(3, 13, 300, 40),
    Shape(4, 150, 9, 6),
    Shape(70, 8, 3, 5),
    Shape(5, 3, 20, 200),
)
THREADS = (1, 2, 3, 7)
LENGTHS = ("none", "with zero")
KERNELS = list(itertools.product(CELLS, DIRECTIONS, DTYPES, _kernels.ISAS))


def take(value, rows):
    """Rows of the batch, which is the axis before the last, of arrays, None or tuples of them."""
    if isinstance(value, tuple):
        return tuple(take(one, rows) for one in value)
    return None if value is None else np.ascontiguousarray(value[..., rows, :])


def batch_part(given, rows):
    """The inputs of some rows of the batch."""
    x, state, dy, dstate = (take(v, rows) for v in (given.x, given.state, given.dy, given.dstate))
    lengths = None if given.lengths is None else np.ascontiguousarray(given.lengths[rows])
    return given._replace(x=x, lengths=lengths, state=state, dy=dy, dstate=dstate)


def split(total, sizes):
    """Slices that cut range(total) into pieces of these sizes, over and over."""
    start, pieces = 0, []
    for size in itertools.cycle(sizes):
        pieces.append(slice(start, min(start + size, total)))
        start += size
        if start >= total:
            return pieces


def per_row(case):
    """Results that belong to single rows of the batch, and so may not depend on the others."""
    states = [f"{name}_n" for name in case.states]
    return ["y", *states, *(name for name in gradients(case) if "[" not in name)]


def unit_groups(case):
    """Into how many parts the units of a layer can be cut: groups of 256 bytes; or none."""
    if CELLS[case.cell].norms:  # needs whole rows
        return 1
    return -(-case.shape.H * np.dtype(case.dtype).itemsize // 256)


def expected_units(workers, case, threads):
    """What runs when units are asked for; where they cannot be cut, rows are."""
    if workers > 1:
        return "units", workers
    return "batch", min(threads, case.shape.B)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_threads_and_plans(cell, direction, dtype, isa, lengths, use_isa):
    """Everything: y, states, tape and all gradients."""
    use_isa(isa)
    for shape in SHAPES:
        case = Case(cell, shape, direction, dtype, lengths)
        want, ran = run_kernel(case, plan="serial")
        assert ran == (("serial", 1), ("serial", 1))
        for threads, plan in itertools.product(THREADS, _kernels.PLANS):
            got, ran = run_kernel(case, threads=threads, plan=plan)
            if plan == "batch" and threads > 1:
                workers = min(threads, case.shape.B)
                assert ran == (("batch", workers), ("batch", workers)), f"{case}; {threads=}"
            if plan == "serial":
                assert ran == (("serial", 1), ("serial", 1))
            if plan == "directions" and threads > 1 and case.directions == 2:
                assert ran == (("directions", 2), ("batch", min(threads, case.shape.B)))
            if plan == "wavefront" and threads > 1:  # of several layers
                assert ran == (("batch", min(threads, case.shape.B)),) * 2
            if plan == "units" and threads > 1:
                workers = min(threads, unit_groups(case))
                assert ran == (expected_units(workers, case, threads),) * 2
            for name in want:
                context = f"{threads=} {plan=} {ran=}; {case}; isa={isa}"
                assert_same_bits(name, got[name], want[name], context=context)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("cell", "direction", "dtype", "isa"), KERNELS)
def test_splits_of_the_batch(cell, direction, dtype, isa, lengths, use_isa):
    """y, states, dx and dstate of a batch, and of its parts in calls of their own."""
    use_isa(isa)
    for shape, sizes in zip(SHAPES, ((1, 5, 11), (6, 1), (130, 20), (3, 1), (2, 1)), strict=True):
        case = Case(cell, shape, direction, dtype, lengths)
        want, ran = run_kernel(case, threads=2, plan="batch")
        assert ran == (("batch", 2), ("batch", 2))
        for rows in split(shape.B, sizes):
            part, _ = run_kernel(case, inputs=batch_part(make_inputs(case), rows))
            for name in per_row(case):
                context = f"rows {rows.start}..{rows.stop} of {case}; isa={isa}"
                assert_same_bits(name, part[name], take(want[name], rows), context=context)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_chunks_of_a_stream(cell, dtype, isa, lengths, use_isa):
    """y and states of a sequence, and of its chunks, each starting from the states of the last."""
    use_isa(isa)
    for shape, sizes in zip(SHAPES, ((1,), (2, 1), (1, 3), (1, 33, 5), (2,)), strict=True):
        case = Case(cell, shape, "forward", dtype, lengths)
        given = make_inputs(case)
        want, ran = run_kernel(case, threads=3, plan="batch", tape=False)
        assert ran[0] == ("batch", 3)
        state, ys = given.state, []
        for steps in split(shape.T, sizes):
            part = given._replace(x=given.x[steps], state=state)
            if given.lengths is not None:
                size = steps.stop - steps.start
                part = part._replace(lengths=np.clip(given.lengths - steps.start, 0, size))
            got, _ = run_kernel(case, inputs=part, tape=False)
            state = tuple(got[f"{name}_n"] for name in case.states)
            ys.append(got["y"])
        context = f"chunks of {sizes} steps; {case}; isa={isa}"
        assert_same_bits("y", np.concatenate(ys), want["y"], context=context)
        for name, last in zip(case.states, state, strict=True):
            assert_same_bits(f"{name}_n", last, want[f"{name}_n"], context=context)


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_training_and_inference(cell, dtype, isa, use_isa):
    """y and states do not depend on whether a tape is kept."""
    use_isa(isa)
    for shape, direction in itertools.product(SHAPES, DIRECTIONS):
        case = Case(cell, shape, direction, dtype, "with zero")
        want, _ = run_kernel(case)
        got, _ = run_kernel(case, tape=False)
        for name in got:
            assert_same_bits(name, got[name], want[name], context=f"{case}; isa={isa}")


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("cell", CELLS)
def test_stream_is_the_layer(cell, batch_size, dtype, isa, use_isa):
    """Two layers: one call over all steps; a stream step by step; a stream by blocks."""
    use_isa(isa)
    module = make_module(cell, 19, 33, 2, dtype=dtype, seed=0)
    x = np.random.default_rng(1).standard_normal((40, batch_size, 19)).astype(dtype)
    y, state = module(x)
    context = f"{cell} {batch_size=} {dtype} isa={isa}"
    stream = module.stream(batch_size)
    steps = np.stack([stream.step(x_t) for x_t in x])
    assert_same_bits("y by steps", steps, y, context=context)
    for i, (a, b) in enumerate(zip(as_tuple(stream.state), as_tuple(state), strict=True)):
        assert_same_bits(f"state {i} by steps", a, b, context=context)
    for sizes in ((1,), (3, 17), (40,)):
        stream.reset()
        blocks = np.concatenate([stream.process(x[part]) for part in split(40, sizes)])
        assert_same_bits(f"y by blocks of {sizes}", blocks, y, context=context)


# ------------------------------------------------------------------------- through the modules


@pytest.fixture
def threads():
    """`rnnfast.set_num_threads`, undone after the test."""
    before = rnnfast.get_num_threads()
    yield rnnfast.set_num_threads
    rnnfast.set_num_threads(before)


def train(module, x, lengths, dy):
    """All results of a training step: a dict of arrays, and the tape."""
    y, state, tape = module.forward_train(x, lengths=lengths)
    module.zero_grad()
    dx, dstate = module.backward(tape, dy, state)
    out = {"y": y, "dx": dx} | {f"d {name}": grad.copy() for name, grad in module.grads.items()}
    for i, (s, d) in enumerate(zip(as_tuple(state), as_tuple(dstate), strict=True)):
        out |= {f"state {i}": s, f"dstate {i}": d}
    return out, tape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_of_modules(cell, dtype, threads):
    """Two bidirectional layers with dropout, large enough that every thread is used."""
    rng = np.random.default_rng(0)
    T, B, I, H = 40, 29, 24, 32
    x, dy = (rng.standard_normal((T, B, n)).astype(dtype) for n in (I, 2 * H))
    lengths = rng.integers(T // 2, T + 1, B)
    x[past_lengths(lengths, T, B)] = np.nan
    want = None
    for n in THREADS:
        threads(n)
        module = make_module(cell, I, H, 2, bidirectional=True, dropout=0.25, dtype=dtype, seed=3)
        got, tape = train(module, x, lengths, dy)
        plan = {1: "serial", 2: "directions"}.get(n, "batch")
        assert (tape.plan, tape.threads) == (plan, n)
        want = got if want is None else want
        for name in want:
            assert_same_bits(name, got[name], want[name], context=f"{cell} {dtype} threads={n}")


@pytest.mark.parametrize("cell", CELLS)
def test_many_callers_at_once(cell, threads):
    """Calls from several Python threads, which find the pool busy, have the bits of a lone one."""
    threads(2)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((30, 17, n)).astype("f4") for n in (24, 32))
    lengths = rng.integers(0, 31, 17)

    def call(_):
        return train(make_module(cell, 24, 32, seed=1), x, lengths, dy)[0]

    want = call(0)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(call, range(24)):
            for name in want:
                assert_same_bits(name, got[name], want[name], context=f"{cell}, four callers")

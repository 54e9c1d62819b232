"""Layers of one direction side by side (csrc/wavefront.c) have the bits of one after the other."""

import itertools

import numpy as np
import pytest
from cases import DTYPES, as_tuple, make_module, past_lengths
from tolerances import assert_same_bits

import rnnfast
from rnnfast import _kernels, functional
from rnnfast.cells import CELLS

T, I, H = 37, 5, 19


@pytest.fixture
def choose():
    """Sets threads and plan; undone after the test."""
    before = rnnfast.get_num_threads(), functional.config.plan

    def choose(threads, plan):
        rnnfast.set_num_threads(threads)
        functional.config.plan = _kernels.PLANS.index(plan)

    yield choose
    choose(before[0], _kernels.PLANS[before[1]])


def inputs(dtype, B, uneven, steps=T):
    rng = np.random.default_rng(B)
    x = rng.standard_normal((steps, B, I)).astype(dtype)
    lengths = np.array([steps, 0, 3, steps - 1][:B]) if uneven else None
    if uneven:
        x[past_lengths(lengths, steps, B)] = np.nan
    return x, lengths


def everything(module, x, lengths):
    """Results of inference and of a training step; and the tape."""
    y, state, tape = module.forward_train(x, lengths=lengths)
    kept = [np.nan_to_num(a) for one in tape.layers for a in (one.x, one.h) if lengths is None]
    dx, dstate = module.backward(tape, y, accumulate=False)
    plain, plain_state = module(x, lengths=lengths)
    arrays = [y, *as_tuple(state), *kept, dx, *as_tuple(dstate), module.flat_grads.copy()]
    return [*arrays, plain, *as_tuple(plain_state)], tape


@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_bits(cell, dtype, isa, use_isa, choose):
    use_isa(isa)
    for L, B, uneven in itertools.product((2, 3, 5), (1, 4), (False, True)):
        x, lengths = inputs(dtype, B, uneven)
        module = make_module(cell, I, H, L, dtype=dtype, seed=L)
        choose(1, "serial")
        want, tape = everything(module, x, lengths)
        assert tape.plan == "serial"
        for threads in (2, 3, 7):
            choose(threads, "wavefront")
            got, tape = everything(module, x, lengths)
            assert (tape.plan, tape.threads) == ("wavefront", min(threads, L))
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_same_bits(f"result {i}", a, b, context=f"{L=} {B=} {uneven=} {threads=}")


def test_layouts_and_frozen_modules(choose):
    choose(1, "serial")
    x, lengths = inputs("f4", 3, True)
    want = rnnfast.GRU(I, H, 3, seed=1)(x, lengths=lengths)
    choose(2, "wavefront")
    module = rnnfast.GRU(I, H, 3, batch_first=True, seed=1)
    module.freeze()
    y, h_n = module(x.transpose(1, 0, 2), lengths=lengths)
    assert_same_bits(
        "y", np.ascontiguousarray(y.transpose(1, 0, 2)), want[0], context="batch first"
    )
    assert_same_bits("h_n", h_n, want[1], context="batch first")
    y, h_n = module(x[:, 0])
    assert_same_bits("y", y, want[0][:, 0], context="unbatched")


@pytest.mark.parametrize(
    ("L", "steps", "B", "hidden", "expected"),
    [
        (2, 400, 1, 32, "wavefront"),  # one row cannot be shared out, nor so few units
        (4, 400, 1, 64, "wavefront"),
        (2, 400, 32, 32, "batch"),  # rows can, and need not wait
        (1, 400, 1, 32, "serial"),
        (2, 1, 1, 32, "serial"),  # nothing to overlap
        (2, 4, 1, 8, "serial"),  # not worth a second core
    ],
)
def test_what_auto_chooses(L, steps, B, hidden, expected, choose):
    choose(2, "auto")
    module = rnnfast.LSTM(I, hidden, L, seed=0)
    tape = module.forward_train(inputs("f4", 1, False, steps)[0].repeat(B, 1))[2]
    assert tape.plan == expected


def test_where_layers_wait_for_each_other(choose):
    choose(2, "wavefront")
    x, _ = inputs("f4", 1, False)
    for module, kind in (
        (rnnfast.LSTM(I, H, 2, bidirectional=True, seed=0), "full"),
        (rnnfast.LSTM(I, H, 2, dropout=0.5, seed=0), "full"),
        (rnnfast.LSTM(I, H, 2, seed=0), "light"),
    ):
        assert module.forward_train(x, tape=kind)[2].plan != "wavefront"

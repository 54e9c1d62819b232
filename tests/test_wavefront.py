"""Layers of one direction side by side (csrc/wavefront.c) have the bits of one after the other."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import DTYPES, as_tuple, make_module, past_lengths
from tolerances import assert_same_bits

import rnnfast
from rnnfast import _kernels, stack
from rnnfast.cells import CELLS

T, I, H = 37, 5, 19


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
    kept = []
    if lengths is None:  # else slots past a row's length mean nothing
        kept = [a for t in tape.layers for a in (t.x, t.h, t.c, t.gates) if a is not None]
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


@pytest.mark.parametrize("steps", [1, 2, 5, 36])
def test_bits_of_any_slices(steps, choose, monkeypatch):
    x, _ = inputs("f4", 2, False)
    module = rnnfast.LSTM(I, H, 4, seed=1)
    choose(1, "serial")
    want, _ = everything(module, x, None)
    choose(3, "wavefront")
    monkeypatch.setattr(_kernels, "wavefront_steps", lambda *_: steps)
    for _ in range(5):
        got, tape = everything(module, x, None)
        assert (tape.plan, tape.threads) == ("wavefront", 3)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(f"result {i}", a, b, context=f"{steps=}")


def test_many_callers_at_once(choose):
    """Who finds the pool busy computes all slices alone."""
    choose(3, "wavefront")
    x, _ = inputs("f4", 1, False, 400)
    module = rnnfast.LSTM(I, H, 3, seed=1)
    want = module(x)[0]
    with ThreadPoolExecutor(4) as pool:
        for y, _ in pool.map(module, [x] * 40):
            assert_same_bits("y", y, want, context="four callers")


def test_inference_of_a_long_sequence_keeps_two_layers_outputs_alone(choose, monkeypatch):
    choose(2, "wavefront")
    seen, original = [], _kernels.wavefront
    monkeypatch.setattr(_kernels, "wavefront", lambda *args: seen.append(1) or original(*args))
    x = np.zeros((stack.WAVEFRONT_NUMBERS // (4 * 8) + 1, 1, I), np.float32)
    module = rnnfast.RNN(I, 8, 4, seed=1)
    module(x[:1000])
    assert len(seen) == 1
    module(x)
    assert len(seen) == 1


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
        (2, 1000, 1, 32, "wavefront"),  # one row cannot be shared out, nor so few units
        (4, 400, 1, 64, "wavefront"),
        (2, 400, 32, 32, "batch"),  # rows can, and need not wait
        (1, 400, 1, 32, "serial"),
        (2, 1, 1, 32, "serial"),  # nothing to overlap
        (2, 4, 1, 8, "serial"),  # not worth a second core
        (2, 100, 1, 32, "serial"),  # nor this: 45 us of one
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

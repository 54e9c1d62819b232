"""A single layer in one direction adds to its module's gradients in the kernel itself, all or none.

What is added must be what the functional call returns, to the bit, and never what the scratch held.
"""

import itertools

import numpy as np
import pytest

import rnnfast
from rnnfast import functional

KINDS = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}
BACKWARD = {
    "lstm": functional.lstm_backward,
    "gru": functional.gru_backward,
    "rnn": functional.rnn_backward,
}
# T, B, I, H, lengths: one panel of a gradient and several, small ones at the end, none at all.
SHAPES = (
    (100, 3, 20, 16, None),
    (100, 3, 20, 16, [100, 5, 3]),
    (9, 40, 2, 24, [7] + [0] * 39),
    (3, 300, 1, 5, None),
    (40, 1, 6, 70, None),
    (2, 2, 3, 4, [0, 0]),
    (0, 2, 3, 4, None),
)


def dirty(module):
    """The module, after a call whose leavings are NaN."""
    scratch, _ = module._scratch[0] if module._scratch else module._new_scratch()
    scratch[...] = np.nan
    return module


def trained(module, x, dy, lengths, tape):
    y, _, kept = module.forward_train(x, lengths=lengths, tape=tape)
    assert y.shape == dy.shape
    module.backward(kept, dy)
    return kept


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("kind", "bias"), list(itertools.product(KINDS, (True, False))))
def test_what_is_added(kind, bias, threads):
    before = rnnfast.get_num_threads()
    rnnfast.set_num_threads(threads)
    try:
        for (T, B, I, H, lengths), tape in itertools.product(SHAPES, ("full", "light")):
            rng = np.random.default_rng(T * B + H)
            x, dy = (rng.standard_normal((T, B, n), dtype=np.float32) for n in (I, H))
            module = KINDS[kind](I, H, bias=bias, seed=1)
            trained(module, x, dy, lengths, tape)  # a scratch is there now
            dirty(module)
            base = rng.standard_normal(module.flat_grads.size, dtype=np.float32)
            module.flat_grads = base
            kept = trained(module, x, dy, lengths, tape)
            weights = tuple(module.params.values()) + (() if bias else (None, None))
            fresh = BACKWARD[kind](kept.layers[0], weights, dy, None).weights
            want = base + np.concatenate([g.ravel() for g in fresh if g is not None])
            np.testing.assert_array_equal(module.flat_grads, want, err_msg=f"{T=} {B=} {tape=}")
    finally:
        rnnfast.set_num_threads(before)


def test_a_panel_too_long_to_go_unpolled_adds_the_same():
    T, B, I, H = 1, 128, 1200, 1200  # 2 B 4H (I + H) operations in one panel
    before = rnnfast.get_num_threads()
    rnnfast.set_num_threads(1)
    try:
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal((T, B, n), dtype=np.float32) for n in (I, H))
        module = rnnfast.LSTM(I, H, seed=1)
        trained(module, x, dy, None, "full")
        dirty(module)
        module.flat_grads = base = np.ones(module.flat_grads.size, np.float32)
        kept = trained(module, x, dy, None, "full")
        fresh = BACKWARD["lstm"](kept.layers[0], tuple(module.params.values()), dy, None).weights
        want = base + np.concatenate([g.ravel() for g in fresh])
        np.testing.assert_array_equal(module.flat_grads, want)
    finally:
        rnnfast.set_num_threads(before)

"""A single layer in one direction takes its gradients to its module's in the kernel itself.

What is added, or replaces them, must be what the functional call returns, to the bit, and never
what the scratch held, nor with accumulate=False what was there before.
"""

import itertools
import signal
import time
from functools import partial

import numpy as np
import pytest

import rnnfast
from rnnfast import functional

KINDS = {
    "lstm": rnnfast.LSTM,
    "gru": rnnfast.GRU,
    "rnn": rnnfast.RNN,
    "lstm, all": partial(rnnfast.LSTM, peephole=True, proj_size=3),
}
BACKWARD = {
    "lstm": functional.lstm_backward,
    "gru": functional.gru_backward,
    "rnn": functional.rnn_backward,
    "lstm, all": partial(functional.lstm_backward, peephole=True),
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


def weights_of(module):
    """A layer's parameters as functions take them."""
    names = module._cell.parameters("weight_hr_l0" in module.params)
    return tuple(module.params.get(f"{name}_l0") for name in names)


def output_of(module):
    """Numbers of y at a step, in one direction."""
    return getattr(module, "proj_size", 0) or module.hidden_size


def dirty(module):
    """The module, after a call whose leavings are NaN."""
    scratch, *_ = module._scratch[0] if module._scratch else module._new_scratch()
    scratch[...] = np.nan
    return module


def trained(module, x, dy, lengths, tape, accumulate=True):
    y, _, kept = module.forward_train(x, lengths=lengths, tape=tape)
    assert y.shape == dy.shape
    module.backward(kept, dy, accumulate=accumulate)
    return kept


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("kind", "bias"), list(itertools.product(KINDS, (True, False))))
def test_what_is_added(kind, bias, threads):
    before = rnnfast.get_num_threads()
    rnnfast.set_num_threads(threads)
    try:
        for (T, B, I, H, lengths), tape in itertools.product(SHAPES, ("full", "light")):
            rng = np.random.default_rng(T * B + H)
            module = KINDS[kind](I, H, bias=bias, seed=1)
            widths = I, output_of(module)
            x, dy = (rng.standard_normal((T, B, n), dtype=np.float32) for n in widths)
            trained(module, x, dy, lengths, tape)  # a scratch is there now
            dirty(module)
            base = rng.standard_normal(module.flat_grads.size, dtype=np.float32)
            module.flat_grads = base
            kept = trained(module, x, dy, lengths, tape)
            fresh = BACKWARD[kind](kept.layers[0], weights_of(module), dy, None).weights
            fresh = np.concatenate([g.ravel() for g in fresh if g is not None])
            case = f"{T=} {B=} {tape=}"
            np.testing.assert_array_equal(module.flat_grads, base + fresh, err_msg=case)
            dirty(module)
            module.flat_grads.fill(np.nan)
            trained(module, x, dy, lengths, tape, accumulate=False)
            np.testing.assert_array_equal(module.flat_grads, fresh, err_msg=case)
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
        fresh = np.concatenate([g.ravel() for g in fresh])
        np.testing.assert_array_equal(module.flat_grads, base + fresh)
        dirty(module)
        module.flat_grads.fill(np.nan)
        trained(module, x, dy, None, "full", accumulate=False)
        np.testing.assert_array_equal(module.flat_grads, fresh)
    finally:
        rnnfast.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_and_two_directions_replace_too(kind):
    rng = np.random.default_rng(3)
    module = KINDS[kind](6, 5, 2, bidirectional=True, seed=1)
    widths = 6, 2 * output_of(module)
    x, dy = (rng.standard_normal((9, 3, n), dtype=np.float32) for n in widths)
    trained(module, x, dy, None, "full")
    once = module.flat_grads.copy()
    dirty(module)
    module.flat_grads.fill(np.nan)
    trained(module, x, dy, None, "full", accumulate=False)
    np.testing.assert_array_equal(module.flat_grads, once)


def test_a_call_that_is_interrupted_changes_all_gradients_or_none():
    """At whatever poll, whether it adds or replaces."""
    T, B, I, H = 40, 160, 300, 300
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal((T, B, n), dtype=np.float32) for n in (I, H))
    module = rnnfast.LSTM(I, H, seed=1)
    kept = trained(module, x, dy, None, "full")
    module.flat_grads = before = rng.standard_normal(module.flat_grads.size, dtype=np.float32)

    class Stop(Exception):
        pass

    def stop(number, frame):
        raise Stop

    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for accumulate in (True, False):
            started = time.perf_counter()
            module.backward(kept, dy, accumulate=accumulate)
            whole = time.perf_counter() - started
            after = module.flat_grads.copy()
            interrupted = 0
            for share in np.linspace(0.05, 0.95, 9):
                module.flat_grads = before
                signal.setitimer(signal.ITIMER_REAL, max(1e-4, share * whole))
                try:
                    module.backward(kept, dy, accumulate=accumulate)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Stop:
                    interrupted += 1
                got = module.flat_grads
                assert (got == before).all() or (got == after).all()
            assert interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)

"""Targets: losses by their definitions, gradients by differences, and a net that learns by them.

Knows the public API.
"""

import math

import numpy as np
import pytest
from test_learn import numerical_gradient

import rnnfast
from rnnfast.learn import IGNORED, target_loss

T, B, H = 6, 4, 5
LENGTHS = [6, 2, 0, 5]
RNG = np.random.default_rng(0)
Y = RNG.standard_normal((T, B, H))


def counted(steps, lengths):
    """(t, b) of what counts, by hand."""
    lengths = [T] * B if lengths is None else lengths
    first = [0 if steps is None else max(0, n - steps) for n in lengths]
    return [(t, b) for b in range(B) for t in range(first[b], lengths[b])]


UNITS = {"all": None, "some": [3, 0], "slice": slice(1, 3), "bool": np.arange(H) > 2, "one": 2}


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("steps", [None, 1, 3, 99])
@pytest.mark.parametrize("units", UNITS)
def test_squared_error(units, steps, lengths):
    """Final activities, attractors, and some units at any step: all of Hinton's list."""
    chosen = np.atleast_1d(np.arange(H)[slice(None) if units == "all" else UNITS[units]])
    targets = RNG.standard_normal((T, B, len(chosen)))
    how = dict(units=UNITS[units], steps=steps, lengths=lengths)
    loss, dy = target_loss(Y, targets, **how)
    places = counted(steps, lengths)
    errors = [Y[t, b, u] - targets[t, b, k] for t, b in places for k, u in enumerate(chosen)]
    assert loss == pytest.approx(np.mean(np.square(errors)))
    y = Y.copy()
    want = numerical_gradient(lambda: target_loss(y, targets, **how)[0], y)
    np.testing.assert_allclose(dy, want, atol=1e-9)
    untaught = np.ones((T, B, H), bool)
    for t, b in places:
        untaught[t, b, chosen] = False
    assert not dy[untaught].any()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("units", ["all", "some", "slice"])
def test_cross_entropy(units, steps, lengths):
    chosen = np.arange(H)[slice(None) if units == "all" else UNITS[units]]
    targets = RNG.integers(0, len(chosen), (T, B))
    targets[1, 0] = IGNORED
    how = dict(kind="cross_entropy", units=UNITS[units], steps=steps, lengths=lengths)
    loss, dy = target_loss(Y, targets, **how)
    losses = []
    for t, b in counted(steps, lengths):
        if targets[t, b] != IGNORED:
            logits = Y[t, b, chosen]
            losses.append(np.log(np.exp(logits).sum()) - logits[targets[t, b]])
    assert loss == pytest.approx(np.mean(losses))
    y = Y.copy()
    want = numerical_gradient(lambda: target_loss(y, targets, **how)[0], y)
    np.testing.assert_allclose(dy, want, atol=1e-9)
    assert dy.shape == Y.shape and dy.any()


def test_targets_that_stay_the_same_are_broadcast():
    rows, units = RNG.standard_normal((B, H)), RNG.standard_normal(H)
    for given in (rows, units, 0.5, units.tolist()):
        loss, dy = target_loss(Y, given, steps=2)
        want, want_dy = target_loss(Y, np.broadcast_to(given, (T, B, H)), steps=2)
        assert loss == want
        np.testing.assert_array_equal(dy, want_dy)
    classes = RNG.integers(0, H, B)
    for given in (classes, 3, classes.astype(np.uint64)):
        loss, dy = target_loss(Y, given, "cross_entropy")
        want, want_dy = target_loss(Y, np.broadcast_to(given, (T, B)).astype(int), "cross_entropy")
        assert loss == want
        np.testing.assert_array_equal(dy, want_dy)


def test_masks():
    """Any subset of units at any step."""
    mask, targets = RNG.random((T, B, H)) < 0.3, RNG.standard_normal((T, B, H))
    loss, dy = target_loss(Y, targets, mask=mask, lengths=LENGTHS)
    valid = mask & (np.arange(T)[:, None] < LENGTHS)[..., None]
    assert loss == pytest.approx(np.square(Y - targets)[valid].mean())
    assert (dy != 0).tolist() == valid.tolist()
    some, some_dy = target_loss(Y, targets, mask=np.arange(H) == 1)
    one, one_dy = target_loss(Y, targets[..., 1:2], units=1)
    assert some == pytest.approx(one)
    np.testing.assert_allclose(some_dy, one_dy)
    steps = RNG.random((T, B)) < 0.5
    classes = RNG.integers(0, H, (T, B))
    loss, dy = target_loss(Y, classes, "cross_entropy", mask=steps)
    want, want_dy = target_loss(Y, np.where(steps, classes, IGNORED), "cross_entropy")
    assert loss == want
    np.testing.assert_array_equal(dy, want_dy)


@pytest.mark.parametrize("kind", ["squared_error", "cross_entropy"])
def test_layouts(kind):
    shape = (T, B, H) if kind == "squared_error" else (T, B)
    targets, mask = RNG.integers(0, H, shape), RNG.random(shape) < 0.6
    how = dict(steps=3, mask=mask, lengths=LENGTHS)
    loss, dy = target_loss(Y, targets, kind, **how)
    how["mask"] = mask.swapaxes(0, 1)
    other, swapped = target_loss(
        Y.swapaxes(0, 1), targets.swapaxes(0, 1), kind, batch_first=True, **how
    )
    assert other == loss
    np.testing.assert_array_equal(swapped.swapaxes(0, 1), dy)
    one, one_dy = target_loss(Y[:, :1], targets[:, :1], kind, steps=2)
    flat, flat_dy = target_loss(Y[:, 0], targets[:, 0], kind, steps=2)
    assert flat == one and flat_dy.shape == (T, H)
    np.testing.assert_array_equal(flat_dy, one_dy[:, 0])


def test_what_does_not_count_may_be_anything():
    y = Y.astype(np.float32)
    y[2:, 1] = np.nan
    targets = np.full((T, B, H), np.inf)
    targets[:2, 1] = 0
    with np.errstate(all="raise"):
        loss, dy = target_loss(y, targets, lengths=[0, 2, 0, 0])
    assert dy.dtype == np.float32 and np.isfinite(dy).all()
    assert loss == pytest.approx((y[:2, 1].astype(float) ** 2).mean(), rel=1e-6)
    assert math.isnan(target_loss(y, 0.0, lengths=[0] * B)[0])
    for kind in ("squared_error", "cross_entropy"):
        loss, dy = target_loss(y[:0], 0, kind)
        assert math.isnan(loss) and dy.shape == (0, B, H)


def test_bad_arguments():
    for given, error, match in (
        ((Y[0, 0], 0.0), ValueError, "y: got float64 array"),
        ((Y.astype(int), 0.0), ValueError, "y: got int64 array"),
        (
            (Y, np.zeros((T, B, H + 1))),
            ValueError,
            r"targets: got shape .*\[T, B, U\] = \(6, 4, 5\)",
        ),
        ((Y, "x"), TypeError, "targets: got"),
        ((Y, 0.5, "cross_entropy"), TypeError, "targets: got .*; needs integers: classes"),
        ((Y, H, "cross_entropy"), ValueError, r"targets: got 5; needs classes in 0\.\.4, or -1"),
        ((Y, -2, "cross_entropy"), ValueError, "targets: got -2"),
        ((Y, 0.0, "mse"), ValueError, "kind: got 'mse'; needs 'squared_error' or"),
    ):
        with pytest.raises(error, match=f"^{match}"):
            target_loss(*given)
    for how, match in (
        ({"units": [H]}, "units: got list of 1; needs indices within 5 units"),
        ({"units": [1, 1]}, "units: got list of 2"),
        ({"units": []}, "units: got list of 0"),
        ({"units": "x"}, "units: got 'x'"),
        ({"units": [0.5]}, "units: got list of 1"),
        ({"steps": 0}, "steps: got 0"),
        ({"mask": np.ones((T, B, H))}, "mask: got float64 array .*; needs bool"),
        ({"mask": np.ones(3, bool)}, r"mask: got shape \(3,\); needs one that fits"),
        ({"lengths": [T + 1] * B}, r"lengths\[0\]: got 7"),
        ({"batch_first": 1}, "batch_first: got 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{match}"):
            target_loss(Y, 0.0, **how)


def test_final_states_as_targets():
    """dh_n of all layers at once: a net learns where to end."""
    rnn = rnnfast.RNN(2, 4, 2, dtype=np.float64, seed=1)
    x = RNG.standard_normal((5, 3, 2))
    wanted = RNG.uniform(-0.5, 0.5, (2, 1, 4))
    losses = []
    for _ in range(400):
        _, h_n, tape = rnn.forward_train(x, lengths=[5, 3, 1])
        loss, dh_n = target_loss(h_n, wanted)
        losses.append(loss)
        rnn.backward(tape, None, dh_n, need_dx=False, accumulate=False)
        rnn.flat -= 0.5 * rnn.flat_grads
    assert losses[-1] < 0.02 * losses[0]


def test_an_attractor_is_learned():
    """Targets for the last steps of a net that is let run: its state stays where it is wanted."""
    gru = rnnfast.GRU(1, 6, dtype=np.float64, seed=2)
    pattern = np.array([0.5, -0.5])
    x = np.zeros((12, 8, 1))
    for round_ in range(500):
        start = np.random.default_rng(round_).uniform(-0.3, 0.3, (1, 8, 6))
        y, _, tape = gru.forward_train(x, start)
        loss, dy = target_loss(y, pattern, steps=4, units=[0, 1])
        gru.backward(tape, dy, need_dx=False, accumulate=False)
        gru.flat -= 0.5 * gru.flat_grads
    assert loss < 1e-3
    y, _ = gru(np.zeros((60, 8, 1)), np.random.default_rng(10**6).uniform(-0.3, 0.3, (1, 8, 6)))
    assert np.abs(y[-1, :, :2] - pattern).max() < 0.1

"""Truncated backpropagation through time: against plain calls, and PyTorch's graph cut by hand.

Knows the public API.
"""

import numpy as np
import pytest
from cases import as_tuple
from test_api import bits, random

import rnnfast
from rnnfast.learn import tbptt

T, B, I, H = 23, 3, 4, 5
CLASSES = rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU


def squares(targets, seen=None):
    """Half the squared distance to targets [T, B, H]; notes which steps it was asked for."""

    def loss(y, steps):
        if seen is not None:
            seen.append((steps.start, steps.stop))
        error = y - targets[steps]
        return 0.5 * float((error**2).sum()), error

    return loss


def first_of(module, seed=5):
    states = 2 if type(module) is rnnfast.LSTM else 1
    shape = module.num_layers, B, module.hidden_size
    return tuple(random(*shape, dtype="float64", seed=seed + i) for i in range(states))


@pytest.mark.parametrize("cls", CLASSES)
def test_one_window_is_plain_backpropagation(cls):
    module = cls(I, H, 2, dtype=np.float64, seed=1)
    x, targets = random(T, B, I, dtype="float64"), random(T, B, H, dtype="float64", seed=1)
    y, state_n, tape = module.forward_train(x)
    dx, _ = module.backward(tape, y - targets)
    want = module.flat_grads.copy()
    for k1, k2 in ((T, None), (T + 9, 10**9)):
        module.zero_grad()
        done = tbptt(module, x, squares(targets), k1, k2, need_dx=True)
        assert bits([module.flat_grads, done.dx]) == bits([want, dx])
        assert bits(as_tuple(done.state)) == bits(as_tuple(state_n))
        assert done.losses == [pytest.approx(0.5 * ((y - targets) ** 2).sum())]


@pytest.mark.parametrize("cls", CLASSES)
def test_chunks_are_calls_with_the_state_handed_on(cls):
    module = cls(I, H, dtype=np.float64, seed=1)
    x, targets = random(T, B, I, dtype="float64"), random(T, B, H, dtype="float64", seed=1)
    first = first_of(module)
    state, dx, seen = first if len(first) == 2 else first[0], [], []
    for start in range(0, T, 5):
        part = slice(start, start + 5)
        y, state, tape = module.forward_train(x[part], state)
        dx.append(module.backward(tape, y - targets[part])[0])
    want = module.flat_grads.copy()
    module.zero_grad()
    given = first if len(first) == 2 else first[0]
    done = tbptt(module, x, squares(targets, seen), 5, state=given, need_dx=True)
    assert bits([module.flat_grads, done.dx]) == bits([want, np.concatenate(dx)])
    assert bits(as_tuple(done.state)) == bits(as_tuple(state))
    assert seen == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)] and len(done.losses) == 5
    module.zero_grad()
    assert tbptt(module, x, squares(targets), 5, 5, given).dx is None
    assert bits(module.flat_grads) == bits(want)


def by_torch(torch, cell, x, targets, state, k1, k2):
    """Gradients by the weights and x: every step's graph of its own, chained by hand for k2 steps.

    As PyTorch's forum has taught it: each step starts from a detached state, all graphs of the last
    k2 steps are retained, and the gradient by a step's first state is handed to the one before.
    """
    steps, losses = [], []
    inputs = [x_t.clone().requires_grad_() for x_t in x]
    for t, x_t in enumerate(inputs):
        first = tuple(s.detach().clone().requires_grad_() for s in state)
        out = cell(x_t, first if len(first) == 2 else first[0])
        out = out if isinstance(out, tuple) else (out,)
        steps.append((first, out))
        losses.append(0.5 * ((out[0] - targets[t]) ** 2).sum())
        state = out
        if (t + 1) % k1 == 0 or t + 1 == len(x):
            since = t // k1 * k1
            later = [torch.zeros_like(s) for s in out]
            for s in range(t, max(0, since - (k2 - k1)) - 1, -1):
                first, out = steps[s]
                for one in first:
                    one.grad = None
                roots, grads = list(out), list(later)
                if s >= since:
                    roots.append(losses[s])
                    grads.append(torch.ones_like(losses[s]))
                torch.autograd.backward(roots, grads, retain_graph=True)
                later = [one.grad for one in first]
    return [p.grad for p in cell.parameters()], torch.stack([x_t.grad for x_t in inputs]), state


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (5, 5), (1, 7), (4, 6), (4, 8), (7, 9), (5, 100)])
@pytest.mark.parametrize("cls", CLASSES)
def test_pytorchs_graph_cut_by_hand(cls, k1, k2):
    torch = pytest.importorskip("torch")
    module = cls(I, H, dtype=np.float64, seed=2)
    cell = getattr(torch.nn, f"{cls.__name__}Cell")(I, H, dtype=torch.float64)
    own = {name.removesuffix("_l0"): torch.from_numpy(a) for name, a in module.params.items()}
    cell.load_state_dict(own)
    x, targets = random(T, B, I, dtype="float64"), random(T, B, H, dtype="float64", seed=1)
    first = first_of(module)
    grads, dx, last = by_torch(
        torch, cell, *map(torch.from_numpy, (x, targets)),
        tuple(torch.from_numpy(s[0]) for s in first), k1, k2,
    )  # fmt: skip
    given = first if len(first) == 2 else first[0]
    done = tbptt(module, x, squares(targets), k1, k2, given, need_dx=True)
    for got, want in zip(module.grads.values(), grads, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(done.dx, dx.numpy(), rtol=1e-9, atol=1e-11)
    for got, want in zip(as_tuple(done.state), last, strict=True):
        np.testing.assert_allclose(got[0], want.detach().numpy(), rtol=1e-10)


@pytest.mark.parametrize("cls", CLASSES)
def test_windows_that_reach_back_to_the_start_miss_nothing(cls):
    """k2 - k1 of T or more: all windows make the whole gradient, layers and lengths included."""
    module = cls(I, H, 3, dtype=np.float64, learn_initial=True, seed=1)
    module.params["h_0"] = random(3, 1, H, dtype="float64")
    x, targets = random(T, B, I, dtype="float64"), random(T, B, H, dtype="float64", seed=1)
    lengths = [T, 0, 9]
    y, state_n, tape = module.forward_train(x, lengths=lengths)
    dx, _ = module.backward(tape, y - targets)
    want = module.flat_grads.copy()
    module.zero_grad()
    done = tbptt(module, x, squares(targets), 4, T + 4, lengths=lengths, need_dx=True)
    np.testing.assert_allclose(module.flat_grads, want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(done.dx, dx, rtol=1e-9, atol=1e-11)
    assert bits(as_tuple(done.state)) == bits(as_tuple(state_n))


@pytest.mark.parametrize(("k1", "k2"), [(4, 4), (4, 7)])
@pytest.mark.parametrize("cls", CLASSES)
def test_layouts_and_lengths(cls, k1, k2):
    lengths = [T, 2, 9]
    x, targets = random(T, B, I, dtype="float64"), random(T, B, H, dtype="float64", seed=1)
    module = cls(I, H, 2, dtype=np.float64, seed=1)
    done = tbptt(module, x, squares(targets), k1, k2, lengths=lengths, need_dx=True)
    want = module.flat_grads.copy()
    assert not done.dx[2:, 1].any() and done.dx[:2, 1].all()

    swapped = cls(I, H, 2, dtype=np.float64, seed=1, batch_first=True)

    def loss(y, steps):
        error = y - targets.swapaxes(0, 1)[:, steps]
        return 0.5 * float((error**2).sum()), error

    other = tbptt(swapped, x.swapaxes(0, 1).copy(), loss, k1, k2, lengths=lengths, need_dx=True)
    assert other.losses == pytest.approx(done.losses)
    assert bits([other.dx.swapaxes(0, 1).copy(), swapped.flat_grads]) == bits([done.dx, want])
    assert bits(as_tuple(other.state)) == bits(as_tuple(done.state))

    # Row by row, cut to its length, and unbatched: the sum.
    module.zero_grad()
    for b, n in enumerate(lengths):
        done_b = tbptt(module, x[:n, b], squares(targets[:n, b]), k1, k2, need_dx=True)
        assert done_b.dx.shape == (n, I)
        np.testing.assert_allclose(done_b.dx, done.dx[:n, b], rtol=1e-9, atol=1e-11)
        for got, whole in zip(as_tuple(done_b.state), as_tuple(done.state), strict=True):
            np.testing.assert_allclose(got, whole[:, b], rtol=1e-10)
    np.testing.assert_allclose(module.flat_grads, want, rtol=1e-9, atol=1e-11)


def test_parameters_may_change_between_windows():
    """Each window's gradient is that of what the new parameters make of its steps."""
    x, targets = random(T, B, I, dtype="float64"), random(T, B, H, dtype="float64", seed=1)
    k1, k2 = 4, 6
    module, plain = (rnnfast.GRU(I, H, dtype=np.float64, seed=1) for _ in range(2))

    def update():
        module.flat -= 0.01 * module.flat_grads
        module.zero_grad()

    done = tbptt(module, x, squares(targets), k1, k2, update=update)
    states, losses = {0: None}, []
    for start in range(0, T, k1):
        stop = min(start + k1, T)
        since = max(0, start - (k2 - k1))
        # The state at each step of the window, from the one where it begins.
        y, _, tape = plain.forward_train(x[since:stop], states[since])
        states |= {since + 1 + k: y_t[None].copy() for k, y_t in enumerate(y)}
        error = y - targets[since:stop]
        error[: start - since] = 0
        losses.append(0.5 * (error**2).sum())
        plain.backward(tape, error, accumulate=False)
        plain.flat -= 0.01 * plain.flat_grads
    np.testing.assert_allclose(done.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(module.flat, plain.flat, rtol=1e-12)


def test_learned_initial_states():
    module = rnnfast.LSTM(I, H, learn_initial=True, seed=1)
    x, targets = random(T, B, I), random(T, B, H, seed=1)
    y, _, tape = module.forward_train(x[:5])
    module.backward(tape, y - targets[:5])
    want = module.grads["h_0"].copy()
    module.zero_grad()
    tbptt(module, x, squares(targets), 5)
    assert want.any() and bits(module.grads["h_0"]) == bits(want)


def test_a_projected_state_is_carried():
    lstm = rnnfast.LSTM(I, H, 2, proj_size=2, dtype=np.float64, seed=1)
    x, targets = random(T, B, I, dtype="float64"), random(T, B, 2, dtype="float64", seed=1)
    y, _, tape = lstm.forward_train(x)
    lstm.backward(tape, y - targets)
    want = lstm.flat_grads.copy()
    lstm.zero_grad()
    tbptt(lstm, x, squares(targets), 1, T)
    np.testing.assert_allclose(lstm.flat_grads, want, rtol=1e-9, atol=1e-11)
    states = tbptt(lstm, x, squares(targets), 3, 4).state
    for got, whole in zip(states, lstm(x)[1], strict=True):
        np.testing.assert_allclose(got, whole, rtol=1e-12)


def test_no_steps():
    module = rnnfast.GRU(I, H)
    done = tbptt(module, np.zeros((0, B, I), np.float32), None, 3, need_dx=True)
    assert done.losses == [] and done.dx.shape == (0, B, I)
    assert done.state.shape == (1, B, H) and not done.state.any()


def test_bad_arguments():
    module, x = rnnfast.GRU(I, H), random(T, B, I)
    loss = squares(random(T, B, H))
    for args, match in (
        ((x, loss, 0), "k1: got 0; needs an integer of at least 1"),
        ((x, loss, 5, 4), "k2: got 4; needs at least k1, 5: the losses of other steps would"),
        ((x, loss, 5, 5.0), "k2: got 5.0"),
        ((x[..., 1:], loss, 5), "x: got shape"),
        ((x, lambda y, steps: y, 5), "loss: got float32 array .*; needs a pair"),
        ((x, lambda y, steps: (0.0, y[1:]), 5), "dy: got shape .*; needs"),
        ((x, lambda y, steps: (0.0, None), 5), "dy: got None"),
        ((x, loss, 5, 7, random(1, B, H + 1)), r"state \(h_0\): got shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{match}"):
            tbptt(module, *args)
    with pytest.raises(ValueError, match=r"^module: got a bidirectional one; needs one direction"):
        tbptt(rnnfast.GRU(I, H, bidirectional=True), x, loss, 5)
    for wrong in (None, rnnfast.GRUCell(I, H)):
        with pytest.raises(TypeError, match=r"^module: got .*; needs an RNN, LSTM or GRU"):
            tbptt(wrong, x, loss, 5)
    with pytest.raises(
        ValueError, match=r"^lengths: got list of 3; needs None with padding='hold'"
    ):
        tbptt(rnnfast.GRU(I, H, padding="hold"), x, loss, 5, lengths=[T, 2, 3])
    with pytest.raises(TypeError, match=r"^need_dx: got 1"):
        tbptt(module, x, loss, 5, need_dx=1)

"""Initial states that are parameters: a plain module's results and gradients, summed over rows.

Knows the public API. What a call from given states computes is judged in test_kernels.
"""

import copy

import numpy as np
import pytest
from cases import as_state, as_tuple, make_module
from test_api import bits, random

import rnnfast
from rnnfast import storage
from rnnfast.cells import CELLS

T, B, I, H = 7, 5, 4, 6
LENGTHS = [7, 0, 3, 1, 7]


def pair_of(cell, L=2, *, dtype="float32", **others):
    """A module that learns its initial states, these set, and a plain one of the same weights."""
    others = dict(others, dtype=dtype, seed=3)
    learning = make_module(cell, I, H, L, learn_initial=True, **others)
    plain = make_module(cell, I, H, L, **others)
    names = ("h_0", "c_0")[: len(CELLS[cell].states)]
    assert list(learning.params) == [*plain.params, *names]
    for name in names:
        assert not learning.params[name].any()
        learning.params[name] = random(*learning.params[name].shape, dtype=dtype, seed=len(name))
    assert bits(learning.flat[: plain.flat.size]) == bits(plain.flat)
    return learning, plain, names


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell, L, bidirectional, dtype):
    learning, plain, names = pair_of(cell, L, dtype=dtype, bidirectional=bidirectional)
    rows = L * (1 + bidirectional)
    assert learning.params["h_0"].shape == (rows, 1, H)
    x, dy = random(T, B, I, dtype=dtype), random(T, B, H * (1 + bidirectional), dtype=dtype, seed=1)
    first = as_state(cell, tuple(np.repeat(learning.params[name], B, axis=1) for name in names))
    for tape in ("full", "light"):
        want, want_n, plain_tape = plain.forward_train(x, first, lengths=LENGTHS, tape=tape)
        y, state_n, own_tape = learning.forward_train(x, lengths=LENGTHS, tape=tape)
        assert bits([y, state_n]) == bits([want, want_n])
        assert bits(learning(x, lengths=LENGTHS)[0]) == bits(want)
        learning.flat_grads.fill(np.nan)
        for times in (1, 2):
            plain.zero_grad()
            dx, d = plain.backward(plain_tape, dy, want_n)
            got = learning.backward(own_tape, dy, want_n, accumulate=times == 2)
            assert bits(got) == bits((dx, d))
            for name, grad in learning.grads.items():
                if name not in names:
                    assert bits(grad) == bits(plain.grads[name] * dtype_of(dtype, times))
            for name, by_row in zip(names, as_tuple(d), strict=True):
                total = by_row.astype(np.float64).sum(axis=1, keepdims=True)
                assert total.any()
                np.testing.assert_allclose(learning.grads[name], times * total, rtol=1e-6)


def dtype_of(dtype, number):
    return np.dtype(dtype).type(number)


@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("L", [1, 2])
def test_a_call_with_a_state_neither_uses_nor_changes_them(cell, L):
    learning, plain, names = pair_of(cell, L)
    x, dy = random(T, B, I), random(T, B, H)
    state = as_state(cell, tuple(random(L, B, H, seed=i) for i in range(len(names))))
    y, _, tape = learning.forward_train(x, state)
    assert bits(y) == bits(plain.forward_train(x, state)[0]) == bits(learning(x, state)[0])
    for accumulate, want in ((True, 2), (False, 0)):
        learning.flat_grads.fill(2)
        learning.backward(tape, dy, accumulate=accumulate)
        for name in names:
            assert (learning.grads[name] == want).all()
        assert (learning.grads["weight_hh_l0"] != want).any()


def test_layouts():
    learning, _, _ = pair_of("lstm")
    x = random(T, 1, I)
    y, (h_n, _), tape = learning.forward_train(x)
    learning.backward(tape, y)
    want = learning.flat_grads.copy()
    flat_y, (flat_h, _), tape = learning.forward_train(x[:, 0])
    dx, (dh_0, _) = learning.backward(tape, flat_y, accumulate=False)
    assert (flat_h.shape, dh_0.shape, dx.shape) == ((2, H), (2, H), (T, I))
    assert bits([flat_y, flat_h, learning.flat_grads]) == bits([y[:, 0], h_n[:, 0], want])
    empty, h_n, tape = learning.forward_train(x[:, :0])
    learning.backward(tape, empty, h_n, accumulate=False)
    assert not learning.flat_grads.any()
    # Of no steps the last states are the first ones, and so are their gradients.
    _, (h_n, c_n), tape = learning.forward_train(x[:0])
    assert bits(h_n) == bits(learning.params["h_0"])
    learning.backward(tape, None, (h_n, c_n), accumulate=False)
    assert bits(learning.grads["c_0"]) == bits(c_n)


def test_a_projected_state():
    lstm = rnnfast.LSTM(I, H, 2, proj_size=2, learn_initial=True, bidirectional=True, merge="sum")
    assert lstm.params["h_0"].shape == (4, 1, 2)
    assert lstm.params["c_0"].shape == (4, 1, H)
    y, state, tape = lstm.forward_train(random(T, B, I))
    _, (dh_0, _) = lstm.backward(tape, y, state)
    np.testing.assert_allclose(lstm.grads["h_0"][:, 0], dh_0.sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_streams_start_from_them(cell):
    learning, _, names = pair_of(cell)
    x = random(T, B, I)
    want = learning(x)[0]
    stream = learning.stream(B)
    for name in names:
        learning.params[name] += 1  # a stream has copies
    for _ in range(2):
        assert bits(np.stack([stream.step(x_t) for x_t in x])) == bits(want)
        stream.reset()
    assert bits(stream.process(x)) == bits(want)
    for name, state in zip(names, as_tuple(learning.stream(B).state), strict=True):
        assert bits(state) == bits(np.repeat(learning.params[name], B, axis=1))


def test_frozen_modules_keep_theirs():
    learning, _, _ = pair_of("lstm")
    x, views = random(T, B, I), learning.flat[...]
    want = bits(learning(x))
    learning.freeze()
    with pytest.raises(ValueError, match="read-only"):
        learning.params["h_0"] += 1
    views += 1  # of before, and still writable
    assert bits(learning(x)) == want
    learning.unfreeze()
    assert bits(learning(x)) != want
    learning.params["h_0"] = np.zeros((2, 1, H), np.float32)
    zeros = bits(learning(x))
    learning.params["h_0"] += 1
    assert bits(learning(x)) != zeros


def test_files_copies_and_words(tmp_path):
    learning, plain, _ = pair_of("gru")
    assert repr(learning) == f"GRU({I}, {H}, num_layers=2, learn_initial=True)"
    assert learning.learn_initial and not plain.learn_initial
    x = random(T, B, I)
    learning.save(tmp_path / "saved")
    for twin in (rnnfast.load(tmp_path / "saved"), copy.deepcopy(learning)):
        assert repr(twin) == repr(learning)
        assert bits(twin(x)) == bits(learning(x))
    other = rnnfast.GRU(I, H, 2, learn_initial=True)
    other.load_state_dict(learning.state_dict())
    assert bits(other.flat) == bits(learning.flat)
    with pytest.raises(ValueError, match=r"^state_dict: .* missing: h_0; needs"):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(TypeError, match=r"^learn_initial: got 1; needs True or False"):
        rnnfast.GRU(I, H, learn_initial=1)
    header, arrays = storage.read(tmp_path / "saved")
    del arrays["h_0"]
    storage.write(tmp_path / "saved", header, arrays)
    with pytest.raises(rnnfast.DamagedFileError, match="needs the 9 of its module"):
        rnnfast.load(tmp_path / "saved")


def test_they_can_be_learned():
    """Descent on the initial states alone: the first output meets its target."""
    gru = rnnfast.GRU(1, 3, learn_initial=True, dtype=np.float64, seed=1)
    x, target = np.zeros((1, 4, 1)), np.array([0.4, -0.3, 0.2])
    for _ in range(900):
        y, _, tape = gru.forward_train(x)
        gru.backward(tape, 2 * (y - target), need_dx=False, accumulate=False)
        gru.params["h_0"] -= 0.2 * gru.grads["h_0"]
    assert np.abs(gru(x)[0] - target).max() < 1e-6


def test_packed_rows_and_zoneout():
    """What they are held at in a step is what a call from given states would hold them at."""
    learning, plain, names = pair_of("lstm", zoneout=(0.4, 0.2), recurrent_dropout=0.3)
    x, dy = random(15, I), random(15, H, seed=1)
    offsets = [0, 7, 7, 10, 11, 15]
    first = tuple(np.repeat(learning.params[name], B, axis=1) for name in names)
    want, state_n, plain_tape = plain.forward_train(x, first, offsets=offsets)
    y, own_n, tape = learning.forward_train(x, offsets=offsets)
    assert bits([y, own_n]) == bits([want, state_n])
    assert bits(learning(x, offsets=offsets)) == bits(plain(x, first, offsets=offsets))
    _, d = plain.backward(plain_tape, dy, state_n)
    learning.backward(tape, dy, state_n)
    for name, by_row in zip(names, d, strict=True):
        total = by_row.astype(np.float64).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(learning.grads[name], total, rtol=1e-6)

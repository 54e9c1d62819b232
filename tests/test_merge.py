"""Both directions of a layer as one y: against the reference and Keras, and with everything else.

Knows the public API and the reference. What each direction computes is judged in test_kernels.
"""

import copy
import pickle

import numpy as np
import pytest
from cases import LENGTHS, as_state, as_tuple, make_lengths, make_module, poison
from test_api import bits, random
from tolerances import assert_close

import rnnfast
from rnnfast import reference, storage
from rnnfast.cells import CELLS
from rnnfast.merges import CONCAT, MERGES

MERGED = tuple(kind for kind in MERGES if kind != CONCAT)
T, B, I, H = 7, 5, 6, 9


def wide(arrays):
    return {name: array.astype(np.float64) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru", "gru_reset_before"])
def test_a_stack_is_the_references(cell, kind, L, lengths, dtype):
    rng = np.random.default_rng(0)
    module = make_module(
        cell, I, H, L, bidirectional=True, merge=kind, dtype=dtype, seed=5, dropout=0.4 * (L > 1)
    )
    assert module.params["weight_ih_l0_reverse"].shape[1] == I
    assert L == 1 or module.params["weight_ih_l1"].shape[1] == H
    lengths = make_lengths(lengths, T, B, rng)
    n = len(CELLS[cell].states)
    x = poison(rng.standard_normal((T, B, I)).astype(dtype), lengths)
    dy = poison(rng.standard_normal((T, B, H)).astype(dtype), lengths)
    state, dstate = (
        tuple(rng.standard_normal((L * 2, B, H)).astype(dtype) for _ in range(n)) for _ in range(2)
    )
    masks = [reference.dropout_mask(5, 0, k, T, B, H, 0.4) / 0.6 for k in range(L - 1)]
    exact = tuple(tuple(a.astype(np.float64) for a in s) for s in (state, dstate))
    for given, label in ((masks, "train"), (None, "plain")):
        how = dict(lengths=lengths, masks=given, merging=kind)
        params = wide(module.params)
        want, last, tapes = reference.stack_forward(cell, x.astype("f8"), exact[0], params, **how)
        if label == "plain":
            y, state_n = module(x, as_state(cell, state), lengths=lengths)
        else:
            y, state_n, tape = module.forward_train(x, as_state(cell, state), lengths=lengths)
            module.zero_grad()
            dx, d = module.backward(tape, dy, as_state(cell, dstate))
            grads = reference.stack_backward(cell, tapes, params, dy.astype("f8"), exact[1], **how)
            context = f"{cell} {kind} L={L}"
            assert_close("dx", dx, grads["x"], np.dtype(dtype), "gradient", context=context)
            for i, s in enumerate(as_tuple(d)):
                assert_close(
                    f"d {i}", s, grads["state"][i], np.dtype(dtype), "gradient", context=context
                )
            for name, grad in module.grads.items():
                assert_close(name, grad, grads[name], np.dtype(dtype), "gradient", context=context)
        assert y.shape == (T, B, H)
        assert_close("y", y, want, np.dtype(dtype), context=f"{cell} {kind} L={L} {label}")
        for i, s in enumerate(as_tuple(state_n)):
            assert_close(f"state {i}", s, last[i], np.dtype(dtype), context=label)


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("L", [1, 2])
def test_layouts_tapes_threads_and_frozen_modules_have_the_same_bits(kind, L, choose, monkeypatch):
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 0)

    def run(module, x, dy, tape="full", lengths=None):
        module.dropout_calls = 3
        y, state, kept = module.forward_train(x, lengths=lengths, tape=tape)
        dx, d = module.backward(kept, dy, state, accumulate=False)
        return y, state, dx, d, module.flat_grads.copy()

    def make(**others):
        return rnnfast.LSTM(
            I, H, L, bidirectional=True, merge=kind, seed=1, dropout=0.3 * (L > 1), **others
        )

    x, dy = random(40, B, I), random(40, B, H)
    lengths = [40, 1, 0, 17, 39]
    module = make()
    choose(1)
    want = run(module, x, dy, lengths=lengths)
    for threads, plan in ((1, "auto"), (3, "batch"), (2, "units")):
        choose(threads, plan)
        for tape in ("full", "light"):
            assert bits(run(module, x, dy, tape, lengths)) == bits(want)
    module.freeze()
    assert bits(run(module, x, dy, "light", lengths)) == bits(want)
    swapped = make(batch_first=True)
    y, state, dx, *rest = run(swapped, *(a.swapaxes(0, 1).copy() for a in (x, dy)), "full", lengths)
    moved = y.swapaxes(0, 1).copy(), state, dx.swapaxes(0, 1).copy(), *rest
    assert bits(moved) == bits(want)
    one = run(module, x[:, :1], dy[:, :1])
    y, _, dx, _, grads = run(make(), x[:, 0], dy[:, 0])
    assert y.shape == (40, H)
    assert bits([y, dx, grads]) == bits([one[0][:, 0], one[2][:, 0], one[4]])


@pytest.mark.parametrize("kind", MERGED)
def test_states_alone_give_gradients(kind):
    """dy None is dy of zeros."""
    module = rnnfast.GRU(I, H, 2, bidirectional=True, merge=kind, seed=1)
    x = random(T, B, I)
    y, state, tape = module.forward_train(x)
    want = bits(module.backward(tape, np.zeros_like(y), state, accumulate=False))
    assert bits(module.backward(tape, None, state, accumulate=False)) == want
    assert module.backward(tape, None, state, need_dx=False)[0] is None


@pytest.mark.parametrize("kind", MERGED)
def test_files_copies_and_words(kind, tmp_path):
    module = rnnfast.GRU(I, H, 2, bidirectional=True, merge=kind, seed=1)
    assert repr(module) == f"GRU({I}, {H}, num_layers=2, bidirectional=True, merge='{kind}')"
    assert module.merge == kind
    x = random(T, B, I)
    module.save(tmp_path / "saved")
    for twin in (rnnfast.load(tmp_path / "saved"), copy.deepcopy(module)):
        assert repr(twin) == repr(module)
        assert bits(twin(x)) == bits(module(x))
    y, _, tape = module.forward_train(x)
    want = bits(module.backward(tape, y))
    for again in (copy.copy(tape), copy.deepcopy(tape), pickle.loads(pickle.dumps(tape))):
        assert bits(module.backward(again, y)) == want
        assert again.nbytes == tape.nbytes
    empty, _, tape = module.forward_train(x[:0])
    assert empty.shape == (0, B, H)
    assert module.backward(tape, empty)[0].shape == (0, B, I)


def test_only_the_product_keeps_more_than_the_layers_tapes():
    x, kept = random(T, B, I), {}
    for kind in MERGES:
        module = rnnfast.RNN(I, H, bidirectional=True, merge=kind)
        kept[kind] = module.forward_train(x)[2].nbytes
    assert kept["sum"] == kept["mean"] == kept[CONCAT]
    assert kept["mul"] == kept[CONCAT] + 4 * T * B * 2 * H


@pytest.mark.parametrize("kind", MERGED)
def test_packed_rows_have_the_padded_ones_bits(kind):
    lengths = np.array([7, 2, 0, 5, 7])
    module = rnnfast.LSTM(I, H, 2, bidirectional=True, merge=kind, seed=1)
    x, dy = random(T, B, I), random(T, B, H)
    y, state, tape = module.forward_train(x, lengths=lengths)
    dx, d = module.backward(tape, dy, state)
    want = module.flat_grads.copy()

    def packed(sequence):
        return np.concatenate([sequence[:n, b] for b, n in enumerate(lengths)])

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    y_p, state_p, tape = module.forward_train(packed(x), offsets=offsets)
    dx_p, d_p = module.backward(tape, packed(dy), state, accumulate=False)
    assert bits([y_p, state_p, dx_p, d_p]) == bits([packed(y), state, packed(dx), d])
    np.testing.assert_allclose(module.flat_grads, want, rtol=1e-4, atol=1e-5)
    assert tape.nbytes > 0


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("L", [1, 2])
def test_all_states_are_of_each_direction(kind, L):
    """And so are gradients by them: those of y come through the merge, theirs do not."""
    module = rnnfast.GRU(I, H, L, bidirectional=True, merge=kind, dtype=np.float64, seed=1)
    x, dh = random(T, B, I, dtype="float64"), random(L, T, B, 2 * H, dtype="float64")
    y, _, tape, states = module.forward_train(x, all_states=True)
    assert states.h.shape == (L, T, B, 2 * H)
    ahead, back = np.split(states.h[-1], 2, axis=2)
    whole = {"sum": ahead + back, "mean": (ahead + back) / 2, "mul": ahead * back}[kind]
    np.testing.assert_allclose(y, whole, rtol=1e-12)
    module.backward(tape, y, dstates=(dh, None))

    def loss():
        y, _, states = module(x, all_states=True)
        return (y**2).sum() / 2 + (states.h * dh).sum()

    along = np.random.default_rng(0).standard_normal(module.flat.size)
    want = (module.flat_grads * along).sum()
    ends = []
    for step in (1e-6, -2e-6):
        module.flat += step * along
        ends.append(loss())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(want, rel=1e-6)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"^padding: got 'hold'; needs 'zeros' with merged"):
        rnnfast.GRU(I, H, bidirectional=True, merge="sum", padding="hold")
    match = r"^merge: got 'sum'; needs bidirectional=True: of one direction there is nothing"
    for cls in (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU):
        with pytest.raises(ValueError, match=match):
            cls(I, H, merge="sum")
        with pytest.raises(ValueError, match=r"^merge: got 'ave'; needs 'concat' or 'sum' or"):
            cls(I, H, bidirectional=True, merge="ave")
        with pytest.raises(TypeError, match=r"^merge: got None; needs 'concat' or 'sum' or"):
            cls(I, H, bidirectional=True, merge=None)
    module = rnnfast.GRU(I, H, 2, bidirectional=True, merge="mean")
    y, _, tape = module.forward_train(random(T, B, I))
    with pytest.raises(ValueError, match=r"^dy: got shape .*; needs .* = \(7, 5, 9\)"):
        module.backward(tape, np.concatenate([y, y], axis=2))
    plain = rnnfast.GRU(I, H, 2, bidirectional=True)
    with pytest.raises(ValueError, match=r"^state_dict: .* mis-shaped: weight_ih_l1 "):
        module.load_state_dict(plain.state_dict())
    plain.save(tmp_path / "old")
    header, arrays = storage.read(tmp_path / "old")
    del header["arguments"]["merge"]  # as in files before there was one
    storage.write(tmp_path / "old", header, arrays)
    assert repr(rnnfast.load(tmp_path / "old")) == repr(plain)


@pytest.mark.parametrize(("kind", "theirs"), [("sum", "sum"), ("mean", "ave"), ("mul", "mul")])
def test_keras_bidirectional(kind, theirs):
    keras = pytest.importorskip("keras")
    ours = rnnfast.LSTM(
        I, H, 2, bidirectional=True, merge=kind, batch_first=True, seed=1, forget_bias=1
    )
    x = random(B, T, I)
    y = keras.ops.convert_to_tensor(x)
    for layer in range(2):
        inner = keras.layers.LSTM(H, return_sequences=True)
        both = keras.layers.Bidirectional(inner, merge_mode=theirs)
        both.build((B, T, I if layer == 0 else H))
        weights = []
        for end in ("", "_reverse"):
            W, R, b_ih, b_hh = (
                ours.params[f"{name}_l{layer}{end}"]
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            weights += [W.T, R.T, b_ih + b_hh]  # gates i f g o, as Keras's i f c o
        both.set_weights(weights)
        y = both(y)
    np.testing.assert_allclose(ours(x)[0], keras.ops.convert_to_numpy(y), atol=2e-6)

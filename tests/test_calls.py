"""What a module's calls do beside the plain one: masks, clamps, zoneout, dropout inside the
recurrence, all states, padding that holds, clipped gradients. Gradients by finite differences.
"""

import copy
import os
import pickle

import numpy as np
import pytest
from cases import FUNCTIONS, make_module
from tolerances import assert_close, assert_same_bits

import rnnfast
from rnnfast import Clamp, _kernels, functional, reference
from rnnfast.calls import RECURRENT, ZONEOUT_C, ZONEOUT_H
from rnnfast.cells import CELLS

T, B, I, H = 7, 5, 3, 6
PAIR = {cell for cell, row in CELLS.items() if "c" in row.states}


def make(cell, **others):
    options = dict(dtype=np.float64, seed=5) | others
    return make_module(cell, I, H, 2, **options)


def draw(rng, *shape):
    return rng.standard_normal(shape)


def as_pair(state):
    return state if isinstance(state, tuple) else (state, None)


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("layout", ["steps", "batch_first", "unbatched"])
@pytest.mark.parametrize("tape", ["full", "light"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_mask_is_the_call_without_its_steps(cell, tape, layout, choose, monkeypatch):
    """To the bit: states and gradients of rows whose missing steps were never there."""
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 1)
    rng = np.random.default_rng(1)
    steps, rows = 150, 1 if layout == "unbatched" else B
    mask = rng.random((steps, rows)) < 0.5
    if rows > 1:
        mask[:, 1], mask[:, 2] = False, True
    valid = [np.flatnonzero(column) for column in mask.T]
    lengths = np.array([len(times) for times in valid])
    x, dy = (draw(rng, steps, rows, n) for n in (I, 2 * H))
    x[~mask] = dy[~mask] = np.nan
    short, dy_short = np.zeros((steps, rows, I)), np.zeros((steps, rows, 2 * H))
    for b, times in enumerate(valid):
        short[: len(times), b], dy_short[: len(times), b] = x[times, b], dy[times, b]

    def to(array):
        if layout == "unbatched":
            return array[:, 0]
        return np.ascontiguousarray(array.swapaxes(0, 1)) if layout == "batch_first" else array

    def back(array):
        if layout == "unbatched":
            return array[:, None]
        return array.swapaxes(0, 1) if layout == "batch_first" else array

    module = make(cell, bidirectional=True, batch_first=layout == "batch_first")
    without = make(cell, bidirectional=True)
    want_y, want_state, kept = without.forward_train(short, None, lengths)
    want_dx, want_d0 = without.backward(kept, dy_short, want_state)
    for threads in (1, 2):
        choose(threads=threads)
        module.zero_grad()
        y, state, kept = module.forward_train(to(x), mask=to(mask), tape=tape)
        dx, d0 = module.backward(kept, to(dy), state)
        for b, times in enumerate(valid):
            n = len(times)
            assert_same_bits("y", back(y)[times, b], want_y[:n, b])
            assert_same_bits("dx", back(dx)[times, b], want_dx[:n, b])
        assert not back(y)[~mask].any() and not back(dx)[~mask].any()
        for name, pair, want in (("n", state, want_state), ("0", d0, want_d0)):
            for one, other in zip(as_pair(pair), as_pair(want), strict=True):
                if one is not None:
                    other = other[:, 0] if layout == "unbatched" else other
                    assert_same_bits(name, one, other)
        assert_same_bits("grads", module.flat_grads, without.flat_grads)
        assert_same_bits("inference", module(to(x), mask=to(mask))[0], y)


def test_a_mask_of_one_layer_in_the_wavefront(choose):
    rng = np.random.default_rng(2)
    lstm = rnnfast.LSTM(8, 16, 3, seed=0)
    x = draw(rng, 200, 2, 8).astype(np.float32)
    mask = rng.random((200, 2)) < 0.7
    want = lstm(x, mask=mask)[0]
    choose(plan="wavefront", threads=2)
    y, _, tape = lstm.forward_train(x, mask=mask)
    assert tape.plan == "wavefront"
    assert_same_bits("y", y, want)


def test_a_mask_that_lacks_nothing_is_none():
    lstm = rnnfast.LSTM(I, H)
    x = np.zeros((T, B, I), np.float32)
    _, _, tape = lstm.forward_train(x, mask=np.ones((T, B), bool))
    assert tape.layers[0].lengths is tape.layers[0].times is None


# ------------------------------------------------------------------------------ padding that holds


def held(y, valid, D):
    """y at missing steps as at the last one before that there is, in the order of processing."""
    out = y.copy()
    N = y.shape[2] // D
    for d in range(D):
        for b in range(valid.shape[1]):
            last = np.zeros(N)
            for t in range(len(y))[:: -1 if d else 1]:
                own = slice(d * N, (d + 1) * N)
                last = y[t, b, own] if valid[t, b] else last
                out[t, b, own] = last
    return out


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("by", ["lengths", "mask"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_padding_that_holds(by, bidirectional, batch_first):
    rng = np.random.default_rng(3)
    lengths = np.array([3, 7, 0, 5, 1])
    valid = np.arange(T)[:, None] < lengths if by == "lengths" else rng.random((T, B)) < 0.5
    how = dict(bidirectional=bidirectional, batch_first=batch_first)
    plain, holding = make("gru", **how), make("gru", padding="hold", **how)

    def turn(array):
        return array.swapaxes(0, 1) if batch_first else array

    x = draw(rng, T, B, I)
    given = {"lengths": lengths} if by == "lengths" else {"mask": turn(valid)}
    want, want_n = plain(turn(x), **given)
    y, h_n, tape = holding.forward_train(turn(x), **given)
    D = 2 if bidirectional else 1
    assert np.array_equal(turn(y), held(turn(want), valid, D))
    assert np.array_equal(h_n, want_n)
    assert np.array_equal(holding(turn(x), **given)[0], y)
    # The loss is linear in y, and y_held in y: so is its gradient, by hand.
    dy = draw(rng, T, B, D * H)
    slope = np.zeros_like(dy)
    for t, b, u in np.ndindex(dy.shape):
        if valid[t, b]:
            one = np.zeros_like(dy)
            one[t, b, u] = 1
            slope[t, b, u] = (held(one, valid, D) * dy).sum()
    _, _, kept = plain.forward_train(turn(x), **given)
    want_dx, _ = plain.backward(kept, turn(slope))
    dx, _ = holding.backward(tape, turn(dy))
    assert_close("dx", dx, want_dx, "float64", "gradient")
    assert_close("grads", holding.flat_grads, plain.flat_grads, "float64", "gradient")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras's own, of NumPy
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRU before", "RNN"])
def test_masks_as_keras_has_them(kind, zeros, bidirectional):
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    keras = pytest.importorskip("keras")
    rng = np.random.default_rng(4)
    mask = rng.random((B, T)) < 0.6
    mask[0] = False
    x = draw(rng, B, T, I).astype(np.float32)
    name, more = {
        "LSTM": ("LSTM", {}),
        "GRU": ("GRU", {"reset_after": True}),
        "GRU before": ("GRU", {"reset_after": False}),
        "RNN": ("SimpleRNN", {}),
    }[kind]
    # Not Keras's Bidirectional, which never holds.
    wants, weights = [], []
    for backwards in (False, True)[: 1 + bidirectional]:
        layer = getattr(keras.layers, name)(
            H, return_sequences=True, zero_output_for_mask=zeros, go_backwards=backwards, **more
        )
        layer.build((B, T, I))
        layer.set_weights([draw(rng, *w.shape).astype(np.float32) / 2 for w in layer.weights])
        want = np.asarray(layer(x, mask=mask))
        wants.append(want[:, ::-1] if backwards else want)
        weights += layer.get_weights()
    want = np.concatenate(wants, axis=2)
    arguments = dict(batch_first=True, padding="zeros" if zeros else "hold")
    if kind == "GRU before":
        arguments["reset_after"] = False
    module = getattr(rnnfast, kind.split()[0])(I, H, bidirectional=bidirectional, **arguments)
    # Keras: gates z r h of a GRU, weights transposed; one bias, or of a GRU with the reset after
    # the product two.
    order = [1, 0, 2] if "GRU" in kind else range(4 if kind == "LSTM" else 1)

    def gates(array):
        parts = np.split(array, len(order), axis=-1)
        return np.concatenate([parts[g] for g in order], axis=-1)

    for d, end in enumerate(("", "_reverse")[: 1 + bidirectional]):
        kernel, recurrent, bias = (gates(w) for w in weights[3 * d : 3 * d + 3])
        module.params[f"weight_ih_l0{end}"][...] = kernel.T
        module.params[f"weight_hh_l0{end}"][...] = recurrent.T
        both = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
        module.params[f"bias_ih_l0{end}"][...] = both[0]
        module.params[f"bias_hh_l0{end}"][...] = both[1]
    y, _ = module(x, mask=mask)
    np.testing.assert_allclose(y, want, rtol=0, atol=5e-6)


# ------------------------------------------------------- gradients of all of it, by differences


def judge_gradients(module, run, changeable, dx, extra, x, clamps, rng):
    """Central differences of the loss along random directions, against what backward gave."""

    def slope(array):
        direction = rng.standard_normal(array.shape)
        step = 1e-6
        array += step * direction
        above = run()
        array -= 2 * step * direction
        below = run()
        array += step * direction
        return (above - below) / (2 * step), direction

    pairs = [(module.flat, module.flat_grads.copy()), (x, dx)]
    pairs += [(clamp.values, gradient) for clamp, gradient in zip(clamps, extra, strict=True)]
    pairs += changeable
    for array, gradient in pairs:
        got, direction = slope(array)
        want = (direction * gradient).sum()
        assert abs(got - want) < 2e-7 * (1 + np.abs(direction * gradient).sum()), array.shape


@pytest.mark.parametrize("layout", ["steps", "batch_first", "unbatched"])
@pytest.mark.parametrize("tape", ["full", "light"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_everything_at_once(cell, tape, layout, monkeypatch):
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 1)
    rng = np.random.default_rng(6)
    pair, rows = cell in PAIR, 1 if layout == "unbatched" else B
    module = make(
        cell, bidirectional=True, dropout=0.2, recurrent_dropout=0.3, padding="hold",
        zoneout=(0.2, 0.3) if pair else 0.2, batch_first=layout == "batch_first",
        **({"proj_size": 4} if cell == "lstm" else {}),
    )  # fmt: skip
    N = 2 * (4 if cell == "lstm" else H)
    lead = {"steps": (T, rows), "batch_first": (rows, T), "unbatched": (T,)}[layout]
    x, mask = draw(rng, *lead, I), rng.random(lead) < 0.7
    state = tuple(draw(rng, 4, *(() if layout == "unbatched" else (rows,)), n) for n in (N // 2, H))
    state = state[: 2 if pair else 1]
    clamps = [
        Clamp(draw(rng, *lead, 2), units=[1, N - 1]),
        Clamp(draw(rng, N), where=rng.random((*lead, N)) < 0.2, layer=-1),
    ]
    if pair:
        clamps.append(Clamp(draw(rng, *lead[:-1], 1, 3), units=[0, 2, 5], state="c", layer=1))
    weights = {}

    def loss(y, last, states):
        total = 0.0
        for k, array in enumerate((y, *last, *(a for a in states if a is not None))):
            if k not in weights:
                weights[k] = draw(rng, *array.shape)
            total += (array * weights[k]).sum()
        return total

    def run():
        module.dropout_calls = 3
        given = state if pair else state[0]
        y, last, kept, states = module.forward_train(
            x, given, tape=tape, mask=mask, clamp=clamps, all_states=True
        )
        run.kept = kept
        return loss(y, last if pair else (last,), states)

    run()
    last = len(state)
    dstates = (weights[1 + last], weights[2 + last] if pair else None)
    dstate = tuple(weights[1 + i] for i in range(last))
    dx, d0, extra = module.backward(
        run.kept, weights[0], dstate if pair else dstate[0], dstates=dstates
    )
    assert extra.norms is None
    changeable = list(zip(state, as_pair(d0), strict=False))
    judge_gradients(module, run, changeable, dx, extra.clamps, x, clamps, rng)
    for clamp, gradient in zip(clamps, extra.clamps, strict=True):
        assert gradient.shape == clamp.values.shape and gradient.any()


def test_the_gradient_by_one_number_is_one_number():
    gru = make_module("gru", I, H)
    clamp = Clamp(np.float32(0.5), units=[1, 4])
    y, _, tape = gru.forward_train(np.ones((T, B, I), np.float32), clamp=clamp)
    gradient = gru.backward(tape, np.ones_like(y))[2].clamps[0]
    assert gradient.shape == () and gradient > 0


def test_a_clamp_shows_what_it_was_given():
    assert repr(Clamp(0.5)) == "Clamp(0.5)"
    shown = "Clamp([1.0, 2.0], units=[1, 4], state='c', layer=-1)"
    assert repr(Clamp([1.0, 2.0], units=[1, 4], state="c", layer=-1)) == shown
    assert repr(Clamp(0, where=np.array([True]))) == "Clamp(0, where=array([ True]))"


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_for_threads_and_tapes(cell, choose, monkeypatch):
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 1)
    rng = np.random.default_rng(7)
    x, mask = draw(rng, 70, 9, I).astype(np.float32), rng.random((70, 9)) < 0.8
    pair = cell in PAIR
    found = []
    for threads in (1, 2, 3):
        for tape in ("full", "light"):
            choose(threads=threads)
            module = make_module(
                cell, I, H, 2, bidirectional=True, seed=1, recurrent_dropout=0.4, zoneout=0.1
            )
            clamp = Clamp(np.float32(0.25), units=[2])
            y, state, kept, states = module.forward_train(
                x, mask=mask, tape=tape, clamp=clamp, all_states=True
            )
            dx, d0, extra = module.backward(
                kept, y, state, norms=True, clip=0.5, clip_norm=0.4, dstates=tuple(states)
            )
            found.append((
                y, *as_pair(state)[: 1 + pair], states.h, dx, *as_pair(d0)[: 1 + pair],
                extra.norms, *extra.clamps, module.flat_grads.copy(),
            ))  # fmt: skip
    for other in found[1:]:
        for k, (one, first) in enumerate(zip(other, found[0], strict=True)):
            assert_same_bits(str(k), one, first)


# ---------------------------------------------------------------------- what is drawn, and expected


@pytest.mark.parametrize("variational", [False, True])
def test_masks_are_the_generators(variational):
    lstm = rnnfast.LSTM(
        I, H, 2, bidirectional=True, recurrent_dropout=0.3, variational=variational,
        zoneout=(0.2, 0.4), seed=9,
    )  # fmt: skip
    lstm.dropout_calls = 4
    _, _, tape = lstm.forward_train(np.zeros((T, B, I), np.float32))
    assert lstm.dropout_calls == 5
    for layer, own in enumerate(tape.layers):
        between, steps = own.between, 1 if variational else T

        def want(purpose, p, steps=T, layer=layer):
            return reference.dropout_mask(9, 4, layer + purpose, steps, B, 2 * H, p)

        assert np.array_equal(
            between.keep, np.broadcast_to(want(RECURRENT, 0.3, steps), (T, B, 2 * H))
        )
        assert between.keep_scale == 1 / 0.7
        assert np.array_equal(between.h[0][0], ~want(ZONEOUT_H, 0.2))
        assert np.array_equal(between.c[0][0], ~want(ZONEOUT_C, 0.4))


@pytest.mark.parametrize("isa", _kernels.ISAS)
def test_masks_of_all_isas_and_sizes(isa, use_isa):
    use_isa(isa)
    for shape in ((1, 1, 1), (3, 2, 67), (40, 30, 65)):
        for p in (0.0, 0.25, 1.0):
            for opposite, threads in ((False, 1), (True, 2)):
                out = np.empty(shape, bool)
                _kernels.dropout_mask(out, opposite, p, 7, 2, 1 << 33, threads, 0)
                want = reference.dropout_mask(7, 2, 1 << 33, *shape, p)
                assert np.array_equal(out, want ^ opposite)


@pytest.mark.parametrize("cell", CELLS)
def test_inference_expects_zoneout_and_streams_agree(cell):
    rng = np.random.default_rng(8)
    pair = cell in PAIR
    module = make_module(cell, I, H, 2, seed=2, recurrent_dropout=0.5, zoneout=0.3)
    plain = make_module(cell, I, H, 2, seed=2)
    x = draw(rng, T, B, I).astype(np.float32)
    y, state = module(x)
    hold = (0.3, 0.3 if pair else 0.0)
    want = x.astype(np.float64)
    params = {name: array.astype(np.float64) for name, array in plain.params.items()}
    for end in ("_l0", "_l1"):
        weights, _ = reference.stack_weights(cell, params, end)
        want, _, _ = reference.forward(
            cell, want, None, weights, between=reference.Between(hold=hold),
            functions=FUNCTIONS[cell],
        )  # fmt: skip
    assert_close("y", y, want, "float32")
    stream = module.stream(B)
    assert_same_bits("stream", np.stack([stream.step(x_t) for x_t in x]), y)
    assert_same_bits("process", module.stream(B).process(x), y)
    for one, own in zip(as_pair(state)[: 1 + pair], as_pair(stream.state)[: 1 + pair], strict=True):
        assert_same_bits("state", own, one)


@pytest.mark.parametrize("cell", CELLS)
def test_a_tape_of_inference(cell):
    """drop=False: the plain call, to the bit, which gradients by differences are those of (see
    test_options), and which does not count.
    """
    x = draw(np.random.default_rng(9), T, B, I)
    module = make(cell, dropout=0.3, recurrent_dropout=0.3, drop_connect=0.3)
    for tape in ("full", "light"):
        y, state, _ = module.forward_train(x, drop=False, tape=tape)
        want, want_state = module(x)
        assert_same_bits("y", y, want)
        for one, other in zip(as_pair(state), as_pair(want_state), strict=True):
            assert (one is None and other is None) or np.array_equal(one, other)
    assert module.dropout_calls == 0
    with pytest.raises(TypeError, match="drop: got 0; needs True or False"):
        module.forward_train(x, drop=0)
    with pytest.raises(ValueError, match="drop: got False; needs True with zoneout: "):
        make(cell, zoneout=0.1).forward_train(x, drop=False)


def test_a_p_of_one():
    x = np.ones((T, B, I), np.float32)
    lstm = rnnfast.LSTM(I, H, seed=0, recurrent_dropout=1.0)
    y, _, tape = lstm.forward_train(x)
    lstm.backward(tape, np.ones_like(y))
    assert np.isfinite(y).all() and not lstm.grads["weight_hh_l0"].any()
    still = rnnfast.GRU(I, H, seed=0, zoneout=1.0)
    y, _, tape = still.forward_train(x)
    assert not y.any() and not still(x)[0].any()
    dx, _ = still.backward(tape, np.ones_like(y))
    assert not dx.any() and not still.flat_grads.any()


# ------------------------------------------------------------------ gradients that are looked after


def test_norms_tell_of_explosion_and_clipping_stops_it():
    rnn = rnnfast.RNN(I, H, nonlinearity="relu", dtype=np.float64, seed=0)
    rnn.flat[...] = 0
    rnn.params["weight_hh_l0"][...] = 2 * np.eye(H)
    rnn.params["weight_ih_l0"][...] = 0.1
    x = np.ones((T, B, I))
    _, h_n, tape = rnn.forward_train(x)
    _, dh_0, extra = rnn.backward(tape, None, np.ones_like(h_n), norms=True)
    want = np.sqrt(H) * 2.0 ** np.arange(T)[::-1]
    np.testing.assert_allclose(extra.norms, np.broadcast_to(want[:, None, None], (1, T, B, 1)))
    np.testing.assert_allclose(dh_0, 2.0**T)
    _, dh_0, extra = rnn.backward(tape, None, np.ones_like(h_n), norms=True, clip=1.5)
    np.testing.assert_allclose(extra.norms[0, :-1], np.sqrt(H) * 1.5)
    np.testing.assert_allclose(dh_0, 3)
    _, dh_0, extra = rnn.backward(tape, None, np.ones_like(h_n), norms=True, clip_norm=2.0)
    np.testing.assert_allclose(extra.norms[0], 2)
    np.testing.assert_allclose(dh_0, 4 / np.sqrt(H))
    assert len(rnn.backward(tape, None, h_n, clip=1.5)) == 2


@pytest.mark.parametrize("layout", ["steps", "batch_first", "unbatched"])
def test_all_states(layout):
    rng = np.random.default_rng(9)
    lstm = rnnfast.LSTM(I, H, 2, bidirectional=True, batch_first=layout == "batch_first", seed=1)
    lead = {"steps": (T, B), "batch_first": (B, T), "unbatched": (T,)}[layout]
    x = draw(rng, *lead, I).astype(np.float32)
    y, (_, c_n), states = lstm(x, all_states=True)
    assert states.h.shape == states.c.shape == (2, *lead, 2 * H)
    assert_same_bits("y", states.h[1], y)
    by_time = np.moveaxis(states.c, 2, 1) if layout == "batch_first" else states.c
    for layer in range(2):
        assert_same_bits("c_n", by_time[layer, -1, ..., :H], c_n[2 * layer])
        assert_same_bits("c_n", by_time[layer, 0, ..., H:], c_n[2 * layer + 1])
    assert rnnfast.GRU(I, H)(x, all_states=True)[2].c is None
    y[...] = 7  # which is not the same memory
    assert not (states.h == 7).any()


# --------------------------------------------------------------------------- files, copies, errors


def test_options_are_kept():
    how = dict(recurrent_dropout=0.25, variational=True, zoneout=(0.1, 0.2), padding="hold")
    lstm = rnnfast.LSTM(I, H, seed=3, **how)
    x = np.ones((T, B, I), np.float32)
    want = lstm.forward_train(x)[0]
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        other.dropout_calls = 0
        assert {name: getattr(other, name) for name in how} == how
        assert_same_bits("y", other.forward_train(x)[0], want)


def test_options_are_saved(tmp_path):
    for module in (
        rnnfast.LSTM(I, H, zoneout=(0.1, 0.2), recurrent_dropout=0.5, padding="hold"),
        rnnfast.GRU(I, H, zoneout=0.25),
    ):
        module.save(tmp_path / "module")
        again = rnnfast.load(tmp_path / "module")
        assert repr(again) == repr(module)
        for name in ("zoneout", "recurrent_dropout", "variational", "padding"):
            assert getattr(again, name) == getattr(module, name)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("LSTM", {"zoneout": 1.5}, r"zoneout: got 1.5; needs a number in \[0, 1\]"),
        ("LSTM", {"zoneout": (0.1, 2)}, r"zoneout\[1\]: got 2; needs a number in \[0, 1\]"),
        ("GRU", {"zoneout": (0.1, 0.1)}, r"zoneout: got .*; needs a number in \[0, 1\]"),
        ("RNN", {"recurrent_dropout": "a"}, "recurrent_dropout: got"),
        ("GRU", {"variational": 1}, "variational: got"),
        ("GRU", {"padding": "last"}, "padding: got 'last'; needs"),
    ],
)
def test_bad_options(kind, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(rnnfast, kind)(I, H, **arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": np.ones((T, B))}, r"mask: got .*; needs bools of shape \(7, 5\)"),
        ({"mask": np.ones((B, T), bool)}, r"mask: got shape \(5, 7\); needs bools of shape"),
        ({"mask": np.ones((T, B), bool), "lengths": [1] * B}, "mask: got one beside lengths"),
        ({"clamp": 3}, "clamp: got .*; needs an rnnfast.Clamp"),
        ({"clamp": Clamp(0.0, [H])}, r"clamp.units: got \[6\]; needs different integers in 0..5"),
        ({"clamp": Clamp(0.0, [1, 1])}, r"clamp.units: got \[1, 1\]; needs different"),
        ({"clamp": Clamp(0.0, [0.5])}, "clamp.units: got .*; needs different integers"),
        ({"clamp": Clamp(0.0, layer=1)}, "clamp.layer: got 1; needs one of 1 layers"),
        ({"clamp": Clamp(0.0, state="c")}, "clamp.state: got 'c'; needs 'h': this module"),
        ({"clamp": Clamp(np.zeros(H))}, "clamp.values: got .*float64.*; needs float32 numbers"),
        ({"clamp": Clamp("a")}, "clamp.values: got"),
        ({"clamp": Clamp(np.zeros(4, "f"))}, r"clamp.values: got shape \(4,\); needs float32"),
        ({"clamp": Clamp(0.0, where=np.ones(H))}, "clamp.where: got .*; needs bool numbers"),
        ({"clamp": [Clamp(0.0, [0]), Clamp(1.0, [1])]}, r"clamp\[1\]: got two for h of layer 0"),
        ({"all_states": 1}, "all_states: got"),
    ],
)
def test_bad_calls(given, message):
    gru = rnnfast.GRU(I, H)
    with pytest.raises((TypeError, ValueError), match=message):
        gru(np.zeros((T, B, I), np.float32), **given)


def test_bad_clamps():
    with pytest.raises(ValueError, match="where: got one beside units; needs one of both"):
        Clamp(0.0, [0], where=np.ones(3, bool))
    with pytest.raises(ValueError, match="state: got 'x'"):
        Clamp(0.0, state="x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip": 0}, "clip: got 0; needs a number above 0 in float32, or None"),
        ({"clip": 1e-50}, "clip: got 1e-50; needs a number above 0 in float32"),
        ({"clip_norm": -1.0}, "clip_norm: got -1.0; needs a number above 0"),
        ({"clip": np.nan}, "clip: got nan"),
        ({"norms": 1}, "norms: got"),
        ({"dstates": 1}, r"dstates: got .*; needs a pair \(by h, by c\)"),
        ({"dstates": (None, np.zeros(3, "f"))}, r"dstates \(by c\): got an array; needs None"),
        ({"dstates": (np.zeros(3, "f"), None)}, r"dstates \(by h\): got shape \(3,\); needs"),
        ({"dstates": (np.zeros((1, T, B, H)), None)}, r"dstates \(by h\): got .*float64"),
    ],
)
def test_bad_backward(given, message):
    gru = rnnfast.GRU(I, H)
    _, h_n, tape = gru.forward_train(np.zeros((T, B, I), np.float32))
    with pytest.raises((TypeError, ValueError), match=message):
        gru.backward(tape, None, h_n, **given)
    assert not gru.flat_grads.any()


def test_functional_between():
    """The functions take what modules make of their options; and refuse what does not fit."""
    rng = np.random.default_rng(11)
    x = draw(rng, T, B, I)
    weights = tuple(draw(rng, *s) / 3 for s in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,)))
    where, value = rng.random(H) < 0.5, draw(rng, B, 1)
    between = functional.Between(h=((where, value),), keep=rng.random((T, B, H)) < 0.5)
    y, _, tape = functional.lstm_forward(x, None, weights, between=between)
    assert (y[:, :, where] == value).all()
    grads = functional.lstm_backward(tape, weights, y, None, norms=True, clip=3.0)
    assert grads.values[0][0].shape == (T, B, H) and grads.values[1] == ()
    assert grads.norms.shape == (T, B, 1)
    bad = [
        (between._replace(h=((where, value),) * 3), "between.h: got .*; needs a tuple of at most"),
        (between._replace(h=(where,)), r"between.h\[0\]: got .*; needs a pair"),
        (between._replace(keep=np.ones((T, B, 2), bool)), "between.keep: got shape"),
        (between._replace(keep=np.ones((T, B, H))), "between.keep: got .*float64"),
        (between._replace(hold=(0.5, 0.0)), "between.hold: got .*; needs .* with a tape"),
        (3, "between: got .*; needs a functional.Between"),
    ]
    for one, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            functional.lstm_forward(x, None, weights, between=one)
    gru = tuple(draw(rng, *s) for s in ((3 * H, I), (3 * H, H), (3 * H,), (3 * H,)))
    with pytest.raises(ValueError, match=r"between\.c: got settings; needs none"):
        functional.gru_forward(x, None, gru, between=functional.Between(c=((where, None),)))
    # A tape that was altered is seen.
    tape.between = between._replace(keep=np.ones((1, 1, 3), bool))
    with pytest.raises(ValueError, match=r"tape\.keep"):
        functional.lstm_backward(tape, weights, y, None)
    y, _, tape = functional.lstm_forward(x, None, weights, mask=rng.random((T, B)) < 0.5)
    tape.times[0, 0] = T
    with pytest.raises(ValueError, match="tape: got an altered one"):
        functional.lstm_backward(tape, weights, y, None)


# ------------------------------------------------------------------ rows that lie one after another


@pytest.mark.parametrize("tape", ["full", "light"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows(cell, tape, choose, monkeypatch):
    """The same bits as of a padded x with lengths, without the padding."""
    monkeypatch.setattr("rnnfast.layer.SLICE_BYTES", 1)
    rng = np.random.default_rng(12)
    lengths = np.array([4, 150, 0, 9, 150, 1, 33])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    steps, rows = 150, len(lengths)
    valid = np.arange(steps) < lengths[:, None]  # [B, T], as packed rows lie
    x, dy = draw(rng, offsets[-1], I), draw(rng, offsets[-1], 2 * H)
    padded, dy_padded = np.zeros((rows, steps, I)), np.zeros((rows, steps, 2 * H))
    padded[valid], dy_padded[valid] = x, dy
    how = dict(bidirectional=True, recurrent_dropout=0.2, zoneout=0.1, batch_first=True)
    module, plain = make(cell, **how), make(cell, **how)
    for threads in (1, 2):
        choose(threads=threads)
        for one in (module, plain):
            one.dropout_calls = 0
            one.zero_grad()
        want_y, want_n, kept = plain.forward_train(padded, None, lengths)
        want_dx, want_0 = plain.backward(kept, dy_padded, want_n)
        y, last, kept = module.forward_train(x, offsets=offsets, tape=tape)
        dx, first = module.backward(kept, dy, last)
        assert_same_bits("y", y, want_y[valid])
        assert_same_bits("dx", dx, want_dx[valid])
        for got, want in ((last, want_n), (first, want_0)):
            for one, other in zip(as_pair(got), as_pair(want), strict=True):
                if one is not None:
                    assert_same_bits("state", one, other)
        assert_same_bits("grads", module.flat_grads, plain.flat_grads)
        want = plain(padded, None, lengths)[0][valid]
        assert_same_bits("inference", module(x, offsets=offsets)[0], want)


def test_packed_rows_of_layers_side_by_side_with_dropout_and_of_none(choose):
    lstm = rnnfast.LSTM(8, 16, 3, seed=0, padding="hold")
    x = np.ones((300, 8), np.float32)
    want = lstm(x, offsets=[0, 200, 300])[0]
    choose(plan="wavefront", threads=2)
    y, _, tape = lstm.forward_train(x, offsets=[0, 200, 300])
    assert tape.plan == "wavefront"
    assert_same_bits("y", y, want)
    drops = rnnfast.LSTM(8, 16, 2, dropout=0.5, dtype=np.float64, seed=0)
    x = np.random.default_rng(0).standard_normal((30, 8))
    total = {}

    def loss(x):
        drops.dropout_calls = 0
        y, _, total["tape"] = drops.forward_train(x, offsets=[0, 7, 30])
        return y.sum()

    loss(x)
    dx, _ = drops.backward(total["tape"], np.ones((30, 16)))
    step = 1e-6 * np.random.default_rng(1).standard_normal(x.shape)
    assert abs((loss(x + step) - loss(x - step)) / 2 - (step * dx).sum()) < 1e-12
    y, (h_n, _), tape = drops.forward_train(np.zeros((0, 8)), offsets=[0])
    assert y.shape == (0, 16) and h_n.shape == (2, 0, 16)
    dx, _ = drops.backward(tape, y)
    assert dx.shape == (0, 8)
    y, (h_n, _) = drops(np.zeros((0, 8)), offsets=[0, 0])
    assert y.shape == (0, 16) and not h_n.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"offsets": [0, 3]},
            r"offsets: got 0, 3; needs B \+ 1 integers that ascend from 0 to 7, .*cumsum",
        ),
        ({"offsets": [0, 5, 4, 7]}, "offsets: got 0, 5, 4, 7; needs"),
        ({"offsets": []}, "offsets: got"),
        ({"offsets": [0.0, 7.0]}, "offsets: got .*float64"),
        ({"offsets": [0, 7], "lengths": [7]}, "lengths: got one beside offsets"),
        ({"offsets": [0, 7], "mask": [True]}, "mask: got one beside offsets"),
        ({"offsets": [0, 7], "all_states": True}, "all_states: got one beside offsets"),
        ({"offsets": [0, 7], "clamp": Clamp(0.0)}, "clamp: got one beside offsets"),
    ],
)
def test_bad_offsets(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rnnfast.GRU(I, H)(np.zeros((T, I), np.float32), **given)
    with pytest.raises(ValueError, match=r"x: got shape \(7, 1, 3\); needs \[all steps, I\]"):
        rnnfast.GRU(I, H)(np.zeros((T, 1, I), np.float32), offsets=[0, 7])


def test_an_altered_tape_of_packed_rows_is_refused():
    gru = rnnfast.GRU(I, H)
    for change in (lambda x: x.starts.__setitem__(1, 5), lambda x: x.starts.__setitem__(0, -1)):
        y, _, tape = gru.forward_train(np.zeros((T, I), np.float32), offsets=[0, 3, 7])
        change(tape.layers[0].x)
        with pytest.raises(ValueError, match="tape: got an altered one"):
            gru.backward(tape, y)


@pytest.mark.parametrize("how", ["as it is", "backwards", "each second", "one for all"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_light_tape_of_rows_with_one_late_step(cell, how):
    """Whose arrays have, up to the longest row's end, one step and so no stride of their own."""
    rng = np.random.default_rng(13)
    big = draw(rng, 2 * T, 1, I)
    x = {
        "as it is": big[:T], "backwards": big[:T][::-1], "each second": big[::2],
        "one for all": np.broadcast_to(big[:1], (T, 1, I)),
    }[how]  # fmt: skip
    mask = np.zeros((T, 1), bool)
    mask[T - 2] = True
    found = []
    for tape in ("full", "light"):
        module = make(cell, recurrent_dropout=0.5, variational=True, zoneout=0.2)
        clamp = Clamp(np.array([0.5]), units=[1])
        y, state, kept = module.forward_train(x, mask=mask, clamp=clamp, tape=tape)
        dx, _, extra = module.backward(kept, y, state, norms=True)
        found.append((y, dx, extra.norms, extra.clamps[0], module.flat_grads))
    for one, other in zip(*found, strict=True):
        assert_same_bits(how, one, other)


def test_a_tape_of_two_packings_is_refused():
    rnn = rnnfast.RNN(2, 3, num_layers=2, seed=0)
    x = np.ones((101, 2), np.float32)
    *_, one = rnn.forward_train(x, offsets=[0, 1, 101])
    *_, other = rnn.forward_train(x, offsets=[0, 100, 101])
    one.layers = (other.layers[0], one.layers[1])
    with pytest.raises(ValueError, match="tape: got an altered one"):
        rnn.backward(one, np.ones((101, 3), np.float32))


def test_packed_rows_of_very_uneven_lengths_fit():
    """A long row and many short ones: padded they would be more than any memory."""
    lengths = np.r_[10**5, np.ones(10**5, int)]
    rnn = rnnfast.RNN(1, 1, seed=0)
    y, _ = rnn(np.zeros((2 * 10**5, 1), np.float32), offsets=np.r_[0, np.cumsum(lengths)])
    assert y.shape == (2 * 10**5, 1)


def test_a_tape_counts_its_masks():
    lstm = rnnfast.LSTM(I, H, zoneout=(0.1, 0.0), recurrent_dropout=0.5, variational=True)
    plain = rnnfast.LSTM(I, H)
    x = np.zeros((T, B, I), np.float32)
    more = lstm.forward_train(x)[2].nbytes - plain.forward_train(x)[2].nbytes
    assert more == T * B * H + B * H
    assert "zoneout=(0.1, 0.0)" in repr(lstm) and "zoneout" not in repr(plain)

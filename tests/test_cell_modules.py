"""RNNCell, LSTMCell and GRUCell: a layer's bits step by step, PyTorch's cells, files and copies.

Knows the public API. What a step computes is judged in test_kernels, of layers.
"""

import copy
import pickle

import numpy as np
import pytest
from cases import as_state, as_tuple, make_module, options_of
from test_api import bits, random

import rnnfast
from rnnfast.cells import CELLS
from rnnfast.single import STRUCTURE

T, B, I, H = 5, 3, 4, 6
KINDS = {"rnn": rnnfast.RNNCell, "lstm": rnnfast.LSTMCell, "gru": rnnfast.GRUCell}


def make_cell(cell, **others):
    kind, options = options_of(cell)
    return KINDS[kind](I, H, **options, **others)


def parts(state):
    return tuple(s[0] for s in as_tuple(state))


def test_arguments_are_torchs_in_its_order():
    cell = rnnfast.RNNCell(I, H, False, "relu", dtype=np.float64, seed=3)
    assert (cell.bias, cell.nonlinearity, cell.dtype, cell.seed) == (False, "relu", np.float64, 3)
    assert repr(cell) == f"RNNCell({I}, {H}, nonlinearity='relu', bias=False, dtype=float64)"
    lstm = rnnfast.LSTMCell(I, H, peephole=True, forget_bias=1)
    assert (lstm.input_size, lstm.hidden_size, lstm.peephole) == (I, H, True)
    assert repr(eval(repr(lstm), vars(rnnfast))) == repr(lstm)
    assert rnnfast.GRUCell(I, H, reset_after=False).params["weight_hh"].shape == (3 * H, H)


@pytest.mark.parametrize("cls", KINDS.values())
def test_arguments_of_stacks_are_refused(cls):
    for name, value in STRUCTURE.items():
        match = rf"^{cls.__name__}: got an argument '{name}'; needs those of one step: input_size, "
        with pytest.raises(TypeError, match=match):
            cls(I, H, **{name: value})
        with pytest.raises(AttributeError):
            getattr(cls(I, H), name)
    with pytest.raises(TypeError, match=r"^hidden_size: got 'x'; needs"):
        cls(I, "x")


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_a_layers(cell, dtype, unbatched):
    """Forward to the bit; gradients of a sequence, summed over its steps, to rounding."""
    layer = make_module(cell, I, H, dtype=dtype, seed=1)
    single = make_cell(cell, dtype=dtype, seed=2)
    single.load_state_dict({name.removesuffix("_l0"): a for name, a in layer.params.items()})
    lead = () if unbatched else (B,)
    x, dy = (random(T, *lead, n, dtype=dtype, seed=n) for n in (I, H))
    first = tuple(
        random(1, *lead, H, dtype=dtype, seed=7 + i) for i in range(len(CELLS[cell].states))
    )
    y, last, tape = layer.forward_train(x, as_state(cell, first))
    dx, dfirst = layer.backward(tape, dy, as_state(cell, first))

    state, tapes = as_state(cell, parts(first)), []
    for x_t, y_t in zip(x, y, strict=True):
        plain = single(x_t, state)
        state, tape = single.forward_train(x_t, state)
        tapes.append(tape)
        assert bits(as_tuple(plain)) == bits(as_tuple(state))
        assert bits(as_tuple(state)[0]) == bits(y_t)
    assert bits(as_tuple(state)) == bits(parts(last))
    assert bits(as_tuple(single(x[0]))[0]) == bits(layer(x)[0][0])  # from zeros

    d = parts(first)
    for x_t, dy_t, dx_t, tape in reversed(list(zip(x, dy, dx, tapes, strict=True))):
        got, d = single.backward(tape, as_state(cell, (d[0] + dy_t, *d[1:])))
        assert got.shape == x_t.shape
        np.testing.assert_allclose(got, dx_t, rtol=1e-4, atol=1e-5)
        d = as_tuple(d)
    for got, want in zip(d, parts(dfirst), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for name, grad in single.grads.items():
        np.testing.assert_allclose(grad, layer.grads[name + "_l0"], rtol=1e-4, atol=1e-5)
        assert grad.any()
    assert single.backward(tapes[0], need_dx=False)[0] is None
    single.backward(tapes[0], as_state(cell, tuple(map(np.zeros_like, d))), accumulate=False)
    assert not single.flat_grads.any()


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_torchs_cells(kind):
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.nn, f"{kind}Cell")(I, H, dtype=torch.float64)
    ours = getattr(rnnfast, f"{kind}Cell")(I, H, dtype=np.float64)
    assert list(ours.params) == list(theirs.state_dict())
    ours.load_state_dict({f"step.{k}": v for k, v in theirs.state_dict().items()}, prefix="step.")
    n = 2 if kind == "LSTM" else 1
    for lead in ((B,), ()):
        x = random(*lead, I, dtype="float64")
        state = tuple(random(*lead, H, dtype="float64", seed=i) for i in range(n))
        given = [torch.from_numpy(a).requires_grad_() for a in (x, *state)]
        want = theirs(given[0], tuple(given[1:]) if n == 2 else given[1])
        want = want if n == 2 else (want,)
        for parameter in theirs.parameters():
            parameter.grad = None
        sum((w * torch.from_numpy(s)).sum() for w, s in zip(want, state, strict=True)).backward()
        own = state if n == 2 else state[0]
        got, tape = ours.forward_train(x, own)
        dx, d = ours.backward(tape, own, accumulate=False)
        for a, b in zip(as_tuple(got), want, strict=True):
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-12)
        for a, b in zip((dx, *as_tuple(d)), given, strict=True):
            np.testing.assert_allclose(a, b.grad.numpy(), rtol=1e-10)
        for name, parameter in theirs.named_parameters():
            np.testing.assert_allclose(ours.grads[name], parameter.grad.numpy(), rtol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_files_and_copies(cell, tmp_path):
    module, x = make_cell(cell, bias=False, seed=3), random(B, I)
    module.forward_train(x)
    module.flat_grads += 2
    module.save(tmp_path / "cell")
    loaded = rnnfast.load(tmp_path / "cell")
    assert not loaded.flat_grads.any()
    for twin in (loaded, *(f(module) for f in (copy.copy, copy.deepcopy, unpickled))):
        assert type(twin) is type(module) and repr(twin) == repr(module)
        assert bits(as_tuple(twin(x))) == bits(as_tuple(module(x)))
        twin.params["weight_ih"] += 1
        assert bits(twin.flat) != bits(module.flat)
        assert twin.seed == module.seed


def unpickled(module):
    twin = pickle.loads(pickle.dumps(module))
    assert bits(twin.flat_grads) == bits(module.flat_grads)
    return twin


def test_a_file_of_a_cell_with_layers_is_damaged(tmp_path):
    from rnnfast import storage

    rnnfast.LSTMCell(I, H).save(tmp_path / "cell")
    header, arrays = storage.read(tmp_path / "cell")
    assert not set(STRUCTURE) & set(header["arguments"])
    for change in ({"num_layers": 1}, {"hidden_size": 2**40}, {"peephole": True}):
        wrong = {**header, "arguments": {**header["arguments"], **change}}
        storage.write(tmp_path / "wrong", wrong, arrays)
        with pytest.raises(rnnfast.DamagedFileError, match="contents that do not fit"):
            rnnfast.load(tmp_path / "wrong")


def test_freezing():
    cell, x = rnnfast.GRUCell(I, H, seed=1), random(B, I)
    want = bits(cell(x))
    cell.freeze()
    assert bits(cell(x)) == want
    with pytest.raises(ValueError, match="read-only"):
        cell.params["weight_ih"] += 1
    with pytest.raises(ValueError, match="load_state_dict: got a frozen module"):
        cell.load_state_dict(cell.state_dict())
    cell.unfreeze()
    cell.flat += 1
    assert bits(cell(x)) != want
    cell.flat_grads = cell.flat
    cell.zero_grad()
    assert not cell.flat_grads.any()


def test_bad_input():
    cell, x = rnnfast.LSTMCell(I, H), random(B, I)
    h = random(B, H)
    for args, match in (
        ((random(T, B, I),), r"^x: got shape .*; needs \[B, I\] or \[I\] with I = 4"),
        ((x.astype(float),), "^x: got float64"),
        ((x, h), r"^state: got float32 array .*; needs a pair of arrays"),
        ((x, (h, h[0])), r"^state \(c\): got shape \(6,\); needs \[B, H\] = \(3, 6\)"),
        ((x[0], (h, h)), r"^state \(h\): got shape \(3, 6\); needs \[H\] = \(6,\)"),
    ):
        for call in (cell, cell.forward_train):
            with pytest.raises((TypeError, ValueError), match=match):
                call(*args)
    _, tape = cell.forward_train(x)
    with pytest.raises(ValueError, match=r"^dstate \(dh\): got shape \(6,\); needs \[B, H\]"):
        cell.backward(tape, (h[0], h))
    with pytest.raises(TypeError, match=r"^tape: got None"):
        cell.backward(None, (h, h))
    with pytest.raises(ValueError, match=r"^tape: got one of another module"):
        rnnfast.LSTMCell(I, H).backward(tape, (h, h))
    missing = {k: v for k, v in cell.params.items() if k != "bias_hh"}
    with pytest.raises(ValueError, match="missing: bias_hh; needs exactly: weight_ih, weight_hh"):
        cell.load_state_dict(missing)


def test_what_was_never_built_says_so():
    never = rnnfast.LSTMCell.__new__(rnnfast.LSTMCell)
    for use in (lambda: never(random(B, I)), lambda: never.params, lambda: never.input_size):
        with pytest.raises(TypeError, match="module: got one that was never built; needs"):
            use()
    for junk in (None, 3, {}, {"arguments": None}, {"arguments": {"input_size": 3}}):
        with pytest.raises((TypeError, ValueError), match="needs"):
            never.__setstate__(junk)
    built = rnnfast.LSTMCell(I, H)
    for again in (lambda: built.__init__(I, H), lambda: built.__setstate__(built.__getstate__())):
        with pytest.raises(ValueError, match="LSTMCell: got a module that is built"):
            again()


def test_no_rows():
    cell = rnnfast.GRUCell(I, H)
    h, tape = cell.forward_train(np.zeros((0, I), np.float32))
    assert h.shape == (0, H)
    assert cell.backward(tape, h)[0].shape == (0, I)


def test_a_projected_cell():
    layer = rnnfast.LSTM(I, H, proj_size=2, seed=1)
    cell = rnnfast.LSTMCell(I, H, proj_size=2, seed=1)
    x = random(2, B, I)
    h, c = cell(x[1], cell(x[0]))
    assert h.shape == (B, 2) and c.shape == (B, H)
    assert bits(h) == bits(layer(x)[0][1])


def test_options_of_training_are_the_layers():
    """What a layer of one step drops and holds, call by call."""
    options = dict(zoneout=(0.5, 0.3), recurrent_dropout=0.4, seed=1)
    cell, layer = rnnfast.LSTMCell(I, H, **options), rnnfast.LSTM(I, H, **options)
    assert (cell.zoneout, cell.recurrent_dropout) == ((0.5, 0.3), 0.4)
    x, first = random(B, I), (random(B, H, seed=1), random(B, H, seed=2))
    seen = []
    for call in (0, 1, 0):
        cell.dropout_calls = layer.dropout_calls = call
        state, tape = cell.forward_train(x, first)
        _, last, layer_tape = layer.forward_train(x[None], tuple(s[None] for s in first))
        assert bits(state) == bits(parts(last))
        dx, d = cell.backward(tape, first)
        want_dx, want = layer.backward(layer_tape, None, tuple(s[None] for s in first))
        assert bits([dx, *d]) == bits([want_dx[0], *parts(want)])
        assert cell.dropout_calls == call + 1
        seen.append(bits(state))
    assert seen[0] == seen[2] != seen[1]
    assert bits(cell(x, first)) == bits(parts(layer(x[None], tuple(s[None] for s in first))[1]))

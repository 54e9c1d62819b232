"""Our modules against torch.nn.RNN, LSTM and GRU with the same weights: values and gradients.

Needs PyTorch, and is skipped without. float32 is judged by PyTorch in float64 on the same float32
numbers, so that PyTorch's own rounding does not count against us.
"""

import itertools

import numpy as np
import pytest
from cases import (
    DTYPES,
    as_state,
    as_tuple,
    make_lengths,
    make_module,
    make_weights,
    past_lengths,
    poison,
)
from tolerances import assert_close, assert_same_bits

import rnnfast
from rnnfast.cells import CELLS

torch = pytest.importorskip("torch")

# Each cell that PyTorch has, and its module there.
MODULES = {
    "rnn_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
}
LAYERS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 2))  # L, D
T, B, I, H = 11, 6, 5, 17


class Pair:
    """A module of ours and PyTorch's, with the same random weights, unequal in every gate."""

    def __init__(self, cell, L, D, *, dtype, bias=True, batch_first=False, seed=0):
        self.cell, self.dtype, self.batch_first = cell, np.dtype(dtype), batch_first
        self.rng = np.random.default_rng(seed)
        options = dict(bias=bias, batch_first=batch_first, bidirectional=D == 2)
        make, more = MODULES[cell]
        self.theirs = make(I, H, L, dtype=torch.float64, **options, **more)
        self.ours = make_module(cell, I, H, L, dtype=dtype, **options)
        for name, parameter in self.theirs.named_parameters():
            if not name.startswith("weight_ih_l"):
                continue
            end = name.removeprefix("weight_ih")
            weights = make_weights(cell, parameter.shape[1], H, self.rng)
            for p, values in zip(CELLS[cell].weight_shapes(I, H), weights, strict=True):
                if p + end in self.ours.params:
                    self.ours.params[p + end][...] = values
        with torch.no_grad():
            for name, parameter in self.theirs.named_parameters():
                parameter.copy_(torch.from_numpy(self.ours.params[name].astype(np.float64)))
        self.context = f"{cell} L={L} D={D} {bias=} {batch_first=} {seed=}, PyTorch"

    def random(self, *shape):
        """Numbers for both, as ours has them."""
        return self.rng.standard_normal(shape).astype(self.dtype)

    def flip(self, sequence):
        """[T, B, N] as the modules take or give it, and back."""
        return sequence.swapaxes(0, 1) if self.batch_first else sequence

    def close(self, name, got, want, what="forward", time_axis=None):
        want = want.detach().numpy()
        assert_close(name, got, want, self.dtype, what, context=self.context, time_axis=time_axis)


def leaf(array):
    """A float64 tensor that collects a gradient."""
    return torch.from_numpy(array.astype(np.float64)).requires_grad_()


def compare(pair, L, D, lengths):
    """Forward and backward of both on the same random numbers; NaN in the padding of ours."""
    cell, rng = pair.cell, pair.rng
    n = len(CELLS[cell].states)
    lengths = make_lengths(lengths, T, B, rng)
    past = past_lengths(lengths, T, B)
    x, dy = pair.random(T, B, I), pair.random(T, B, D * H)
    state, dstate = (tuple(pair.random(L * D, B, H) for _ in range(n)) for _ in range(2))

    zeroed = [np.where(past[..., None], 0, a).astype(np.float64) for a in (x, dy)]
    x_leaf, *state_leaves = (leaf(a) for a in (pair.flip(zeroed[0]), *state))
    given = x_leaf
    if lengths is not None:
        given = torch.nn.utils.rnn.pack_padded_sequence(
            x_leaf, torch.from_numpy(lengths), pair.batch_first, enforce_sorted=False
        )
    y_want, state_want = pair.theirs(given, as_state(cell, tuple(state_leaves)))
    if lengths is not None:
        y_want, _ = torch.nn.utils.rnn.pad_packed_sequence(y_want, pair.batch_first, total_length=T)
    loss = (y_want * torch.from_numpy(pair.flip(zeroed[1]))).sum()
    for s, d in zip(as_tuple(state_want), dstate, strict=True):
        loss = loss + (s * torch.from_numpy(d.astype(np.float64))).sum()
    loss.backward()

    x, dy = pair.flip(poison(x, lengths)), pair.flip(poison(dy, lengths))
    for training in (False, True):
        if training:
            y, state_n, tape = pair.ours.forward_train(x, as_state(cell, state), lengths)
        else:
            y, state_n = pair.ours(x, as_state(cell, state), lengths)
        pair.close("y", pair.flip(y), pair.flip(y_want), time_axis=0)
        for i, s in enumerate(as_tuple(state_n)):
            pair.close(f"state {i}", s, as_tuple(state_want)[i])
    dx, dstate_0 = pair.ours.backward(tape, dy, as_state(cell, dstate))
    pair.close("dx", pair.flip(dx), pair.flip(x_leaf.grad), "gradient", time_axis=0)
    for i, d in enumerate(as_tuple(dstate_0)):
        pair.close(f"dstate {i}", d, state_leaves[i].grad, "gradient")
    for name, parameter in pair.theirs.named_parameters():
        pair.close(name, pair.ours.grads[name], parameter.grad, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", ["none", "uneven"])  # PyTorch packs no row of length 0
@pytest.mark.parametrize(("L", "D"), LAYERS)
@pytest.mark.parametrize("cell", MODULES)
def test_values_and_gradients(cell, L, D, lengths, dtype):
    for bias, batch_first in itertools.product((True, False), (False, True)):
        pair = Pair(cell, L, D, dtype=dtype, bias=bias, batch_first=batch_first)
        compare(pair, L, D, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", MODULES)
def test_unbatched_and_without_states(cell, dtype):
    """x [T, I], states [L*D, H] or none."""
    pair = Pair(cell, 2, 2, dtype=dtype)
    n = len(CELLS[cell].states)
    x, dy = pair.random(T, I), pair.random(T, 2 * H)
    for state in (None, tuple(pair.random(4, H) for _ in range(n))):
        pair.ours.zero_grad()
        pair.theirs.zero_grad()
        x_leaf = leaf(x)
        leaves = None if state is None else tuple(leaf(s) for s in state)
        y_want, state_want = pair.theirs(x_leaf, as_state(cell, leaves))
        (y_want * torch.from_numpy(dy.astype(np.float64))).sum().backward()
        y, state_n, tape = pair.ours.forward_train(x, as_state(cell, state))
        dx, dstate = pair.ours.backward(tape, dy)
        pair.close("y", y, y_want, time_axis=0)
        pair.close("dx", dx, x_leaf.grad, "gradient", time_axis=0)
        for i, s in enumerate(as_tuple(state_n)):
            pair.close(f"state {i}", s, as_tuple(state_want)[i])
        for i, d in enumerate(as_tuple(dstate) if state is not None else ()):
            pair.close(f"dstate {i}", d, leaves[i].grad, "gradient")
        for name, parameter in pair.theirs.named_parameters():
            pair.close(name, pair.ours.grads[name], parameter.grad, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", MODULES)
def test_state_dict_both_ways(cell, dtype):
    """Names, order, shapes and numbers: theirs loads into ours as it is, and ours into theirs."""
    make, more = MODULES[cell]
    for (L, D), bias in itertools.product(LAYERS, (True, False)):
        options = dict(bias=bias, bidirectional=D == 2)
        theirs = make(I, H, L, dtype=getattr(torch, dtype), **options, **more)
        ours = make_module(cell, I, H, L, dtype=dtype, **options)
        tensors = theirs.state_dict()
        assert list(ours.params) == list(tensors)
        ours.load_state_dict(tensors)
        x = np.random.default_rng(0).standard_normal((T, B, I)).astype(dtype)
        with torch.no_grad():
            want, _ = theirs(torch.from_numpy(x))
        context = f"{cell} L={L} D={D} {bias=}"
        y, _ = ours(x)
        assert_close("y", y, want.double().numpy(), dtype, context=context)
        for name, tensor in tensors.items():
            assert_same_bits(name, ours.params[name], tensor.numpy(), context=context)

        fresh = make_module(cell, I, H, L, dtype=dtype, seed=1, **options)
        back = {name: torch.from_numpy(array) for name, array in fresh.state_dict().items()}
        theirs.load_state_dict(back)  # strict: it raises on a missing or unused name
        for name, tensor in theirs.state_dict().items():
            assert_same_bits(name, tensor.numpy(), fresh.params[name], context=context)


@pytest.mark.parametrize("cell", MODULES)
def test_initial_weights_are_distributed_alike(cell):
    """U(±1/sqrt(H)) for every parameter: same bounds, and same spread within 5 %."""
    make, more = MODULES[cell]
    theirs = make(64, 64, **more).state_dict()
    for name, array in make_module(cell, 64, 64, seed=0).params.items():
        for values in (array, theirs[name].numpy()):
            assert np.abs(values).max() <= 1 / 8
        if name.startswith("weight"):
            assert array.std() == pytest.approx(theirs[name].numpy().std(), rel=0.05)
            assert array.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_tensors_are_taken_as_input():
    """A CPU tensor is an array like any other: same bits as its NumPy view."""
    lstm = rnnfast.LSTM(I, H, seed=0)
    x = torch.randn(T, B, I)
    assert_same_bits("y", lstm(x)[0], lstm(x.numpy())[0])

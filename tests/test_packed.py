"""Sequences whose rows lie packed: the bits of padded ones, and no byte beyond their rows.

Knows `stack` and the compiled layer's Packed, which rnnfast.torch hands to them; needs no PyTorch.
"""

import itertools

import numpy as np
import pytest
from cases import DTYPES, FUNCTIONS, make_weights, past_lengths
from tolerances import assert_same_bits

from rnnfast import _kernels, config, stack
from rnnfast.cells import CELLS, PARAMETERS

LENGTHS = np.array([9, 9, 6, 4, 4, 1, 1])
T, B, I, H = 9, len(LENGTHS), 5, 19
EDGE = 64  # numbers before and after the rows, which nobody may touch


class Rows:
    """Packed rows of a padded sequence, or of nothing yet, amid numbers that must stay."""

    def __init__(self, width, dtype, padded=None, apart=0):
        valid = ~past_lengths(LENGTHS, T, B)
        rows, row = int(valid.sum()), width + apart
        self.memory = np.full(rows * row + 2 * EDGE, np.nan, dtype)
        inner = self.memory[EDGE : EDGE + rows * row].reshape(rows, row)
        self.rows, self.between = inner[:, :width], inner[:, width:]
        if padded is not None:
            self.rows[...] = padded[valid]
        sizes = valid.sum(1)
        self.packed = _kernels.Packed(self.rows, np.cumsum(sizes) - sizes, (T, B, width))
        self.valid = valid

    def padded(self):
        """The rows as a padded sequence; all that lies between and around them is untouched."""
        assert np.isnan(self.memory[:EDGE]).all() and np.isnan(self.memory[-EDGE:]).all()
        assert np.isnan(self.between).all()
        result = np.zeros((*self.valid.shape, self.rows.shape[1]), self.rows.dtype)
        result[self.valid] = self.rows
        return result


def run(cell, L, D, dtype, threads, packed, p, P=0):
    """Everything that a stack computes, forward and backward."""
    rng = np.random.default_rng(0)
    N = P or H
    names = cell.parameters(P > 0)

    def weights_of(columns):
        named = dict(zip(names, make_weights(cell.name, columns, H, rng, P=P), strict=True))
        own = (named.get(name) for name in PARAMETERS)
        return tuple(None if a is None else a.astype(dtype) for a in own)

    weights = [tuple(weights_of(n) for _ in range(D)) for n in [I] + [D * N] * (L - 1)]
    x, dy = (rng.standard_normal((T, B, n)).astype(dtype) for n in (I, D * N))
    pair = "c" in cell.states
    states = [rng.standard_normal((L * D, B, (N, H)[i % 2])).astype(dtype) for i in range(4)]
    h_0, c_0, dh_n, dc_n = (s if pair or i % 2 == 0 else None for i, s in enumerate(states))
    h_n, dh_0 = np.empty_like(states[0]), np.empty_like(states[0])
    c_n, dc_0 = (np.empty_like(states[1]) if pair else None for _ in range(2))
    grads = [
        tuple(tuple(None if a is None else np.empty_like(a) for a in w) for w in layer)
        for layer in weights
    ]
    y, dx = np.empty((T, B, D * N), dtype), np.empty_like(x)
    given = x, y, dy, dx
    if packed:
        held = [
            Rows(I, dtype, x, 3),
            Rows(D * N, dtype, None, 2),
            Rows(D * N, dtype, dy),
            Rows(I, dtype),
        ]
        given = [rows.packed for rows in held]

    def pack(kind):
        how = kind, threads, config.plan, None, FUNCTIONS[cell.name]
        return lambda layer: _kernels.pack(cell.number, weights[layer], *how)

    dropout = stack.Dropout(p, 3, 0)
    lengths = LENGTHS.astype(np.intp)
    tapes = stack.new_tapes(cell, given[0], H, P, L, D, lengths)
    stack.forward(
        cell, pack(_kernels.FORWARD), L, D, given[0], h_0, c_0, given[1], h_n, c_n, lengths, tapes,
        dropout, threads,
    )  # fmt: skip
    stack.backward(
        pack(_kernels.BACKWARD), tapes, D, given[2], dh_n, dc_n, given[3], dh_0, dc_0, grads,
        dropout, threads,
    )  # fmt: skip
    if packed:
        y, dx = held[1].padded(), held[3].padded()
    arrays = {"y": y, "dx": dx, "h_n": h_n, "c_n": c_n, "dh_0": dh_0, "dc_0": dc_0}
    flat = [a for layer in grads for w in layer for a in w if a is not None]
    return {**arrays, **{f"gradient {i}": a for i, a in enumerate(flat)}}


@pytest.mark.parametrize("plan", _kernels.PLANS)
@pytest.mark.parametrize("isa", _kernels.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_padded_ones(cell, dtype, isa, plan, use_isa, monkeypatch):
    use_isa(isa)
    projections = (0, H // 2) if CELLS[cell].kind == "LSTM" else (0,)
    options = itertools.product((1, 2), (1, 2), (1, 3), (0.0, 0.3), projections)
    for L, D, threads, p, P in options:
        monkeypatch.setattr(config, "plan", 0)
        want = run(CELLS[cell], L, D, dtype, 1, False, p, P)
        monkeypatch.setattr(config, "plan", _kernels.PLANS.index(plan))
        got = run(CELLS[cell], L, D, dtype, threads, True, p, P)
        for name, array in want.items():
            if array is not None:
                assert_same_bits(name, got[name], array, context=f"{L=} {D=} {threads=} {p=}")


def test_other_steps_or_rows_than_those_of_x_are_refused():
    rows = Rows(I, np.float32, np.ones((T, B, I), np.float32))
    y = np.empty((T, B + 1, H), np.float32)
    weights = tuple(make_weights("gru", I, H, np.random.default_rng(0)))
    weights = tuple(a.astype(np.float32) for a in weights)
    pack = _kernels.pack(CELLS["gru"].number, (weights,), _kernels.FORWARD, 1, 0)
    h_n = np.empty((1, B, H), np.float32)
    with pytest.raises(ValueError, match="reshaped during the call"):
        _kernels.forward(
            pack, rows.packed, y, None, None, h_n, None, LENGTHS, None, None, None, False, 1, 0
        )

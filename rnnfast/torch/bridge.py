"""Tensors in, tensors out: one stack of layers, forward and backward, without autograd.

Knows tensors as memory that arrays can share, and `stack`; nothing of modules, gradients' graphs or
the compiler. Nothing is copied but what the kernels cannot read as it lies. Results lie in memory
of our own, which is kept for the next call.

T steps, B batch, N = D*H, L layers, D directions, as in `stack`. Weights come as one flat list: for
each layer, for each direction, W [G*H, I or N], R [G*H, H], and b_ih, b_hh [G*H] or neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _kernels, checks, config, stack
from ..cells import CELLS, Cell
from ..functional import BACKWARD, FORWARD, Sequence, Tape, as_steps, new_array

LINE = 16  # numbers: each array of a flat tape begins at a cache line, or two


class Call(NamedTuple):
    """What a call is, beside its tensors."""

    cell: str
    L: int
    D: int
    batch_first: bool
    dropout: float  # between layers: 0 where it does not act


def threads() -> int:
    """How many threads a call may use: as many as PyTorch, unless rnnfast was told a number."""
    return config.threads if config.told else min(torch.get_num_threads(), checks.MAX_THREADS)


def packed_rows(batch_sizes: np.ndarray, rows: int) -> tuple[int, int]:
    """T and B of packed rows. Raises ValueError if the sizes are not those of a PackedSequence."""
    if batch_sizes.ndim != 1 or batch_sizes.dtype != np.int64 or batch_sizes.size == 0:
        got = checks.describe(batch_sizes)
        checks.fail(ValueError, "batch_sizes", got, "an int64 tensor [T] of at least one step")
    falling = batch_sizes[-1] >= 1 and (batch_sizes[1:] <= batch_sizes[:-1]).all()
    if not falling or batch_sizes[0] > rows or batch_sizes.sum() != rows:
        got = f"sizes from {batch_sizes[0]} to {batch_sizes[-1]} with the sum {batch_sizes.sum()}"
        needs = f"sizes that never rise, at least 1, with the sum {rows}, the rows of data"
        checks.fail(ValueError, "batch_sizes", got, needs)
    return batch_sizes.size, int(batch_sizes[0])


class _Layout:
    """How the caller's sequences lie, and how the kernels see them."""

    def __init__(self, call: Call, x: Tensor, batch_sizes: Tensor | None) -> None:
        self.lengths = self.starts = self.packed = None
        self.batch_first = call.batch_first
        if batch_sizes is None:
            B, T = x.shape[:2] if call.batch_first else (x.shape[1], x.shape[0])
            self.T, self.B = T, B
            return
        sizes = batch_sizes.numpy()
        rows = x.shape[0]
        self.packed = rows
        self.T, self.B = packed_rows(sizes, rows)
        if sizes[-1] < self.B:
            sizes = sizes.astype(checks.INTP, copy=False)
            self.starts = np.cumsum(sizes) - sizes
            self.lengths = np.searchsorted(-sizes, -np.arange(self.B), side="left")
            self.lengths = self.lengths.astype(checks.INTP, copy=False)

    def new(self, width: int, dtype: np.dtype) -> np.ndarray:
        """A fresh sequence as the caller wants it."""
        if self.packed is not None:
            return new_array((self.packed, width), dtype)
        first, second = (self.B, self.T) if self.batch_first else (self.T, self.B)
        return new_array((first, second, width), dtype)

    def steps(self, array: np.ndarray) -> Sequence:
        """A sequence of the caller's as [T, B, width]."""
        if self.packed is None:
            return as_steps(array, self.batch_first, False)
        shape = self.T, self.B, array.shape[-1]
        if self.starts is None:  # all equally long
            return checks.contiguous(array).reshape(shape)
        return _kernels.Packed(array, self.starts, shape)


def tape_numbers(cell: Cell, T: Any, B: Any, H: int, L: int, D: int) -> Any:
    """Length of the flat tape of a call; T and B may be symbols of the compiler's."""
    states = len(cell.states) * _whole_lines(D * (T + 1) * B * H)
    gates = _whole_lines(D * T * B * len(cell.tape_gates) * H)
    return L * (states + gates) + (L - 1) * _whole_lines(T * B * D * H)


def _whole_lines(numbers: Any) -> Any:
    return (numbers + LINE - 1) // LINE * LINE


def _tapes(
    cell: Cell, flat: np.ndarray, x: Sequence, H: int, L: int, D: int, lengths: np.ndarray | None,
    fresh: bool,
) -> list[Tape]:  # fmt: skip
    """The layers' tapes, in pieces of a flat one; `fresh`: what lies between pieces is cleared."""
    at = 0

    def piece(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal at
        start, numbers = at, math.prod(shape)
        at += _whole_lines(numbers)
        if fresh:  # an operator's results have no random numbers
            flat[start + numbers : at] = 0
        return flat[start : start + numbers].reshape(shape)

    return stack.new_tapes(cell, x, H, L, D, lengths, None, piece)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _rows(tensor: Tensor) -> np.ndarray:
    """A sequence whose last axis is one run of numbers."""
    array = tensor.detach().numpy()
    return array if checks.has_rows(array) else checks.contiguous(array)


def _whole(tensor: Tensor | None) -> np.ndarray | None:
    """A contiguous, aligned array, or None."""
    return None if tensor is None else checks.contiguous(tensor.detach().numpy())


def _pack(
    cell: Cell, weights: Items[Tensor], L: int, D: int, kind: int, workers: int, layer: int
) -> Any:
    each = len(weights) // (L * D)
    start = layer * D * each
    own = [checks.contiguous(_array(w)) for w in weights[start : start + D * each]]
    biases = () if each == 4 else (None, None)
    by_direction = tuple((*own[d * each : (d + 1) * each], *biases) for d in range(D))
    return _kernels.pack(cell.number, by_direction, kind, workers, config.plan)


def _dropout(call: Call, seed: Tensor | None) -> stack.Dropout:
    if not call.dropout or seed is None:
        return stack.NO_DROPOUT
    return stack.Dropout(call.dropout, int(seed), 0)


def forward(
    call: Call, x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
    seed: Tensor | None, weights: Items[Tensor], keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, h_n, c_n (None of a cell without c) and, to `keep`, the flat tape for `backward`.

    x [T, B, I], [B, T, I] of a call with batch_first, or packed [rows, I] with batch_sizes; y in
    the layout of x; states [L*D, B, H], None for zeros. All are on the CPU, of the weights' dtype.
    """
    cell, L, D = CELLS[call.cell], call.L, call.D
    layout, workers = _Layout(call, x, batch_sizes), threads()
    given = _rows(x)
    dtype, H = given.dtype, weights[1].shape[1]
    rows = L * D
    numbers = kept = tape_numbers(cell, layout.T, layout.B, H, L, D) if keep else 0
    numbers += layout.T * layout.B * (given.shape[-1] + 2 * D * H)
    checks.room("input", numbers, given.itemsize)
    y = layout.new(D * H, dtype)
    h_n = np.empty((rows, layout.B, H), dtype)
    c_n = np.empty((rows, layout.B, H), dtype) if "c" in cell.states else None
    flat = tapes = None
    steps = layout.steps(given)
    if keep:
        flat = new_array((kept,), dtype)
        tapes = _tapes(cell, flat, steps, H, L, D, layout.lengths, True)
    pack = partial(_pack, cell, weights, L, D, FORWARD, workers)
    stack.forward(
        cell, pack, L, D, steps, _whole(h_0), _whole(c_0), layout.steps(y), h_n, c_n,
        layout.lengths, tapes, _dropout(call, seed), workers,
    )  # fmt: skip
    tensor = torch.from_numpy
    return (
        tensor(y), tensor(h_n), None if c_n is None else tensor(c_n),
        None if flat is None else tensor(flat),
    )  # fmt: skip


def backward(
    call: Call, needed: Items[bool], dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None,
    x: Tensor, batch_sizes: Tensor | None, seed: Tensor | None, tape: Tensor,
    weights: Items[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients by x, h_0, c_0 and each of the weights, or None where not needed.

    `needed` tells of each whether it is; dy, dh_n and dc_n may be None for zeros.
    """
    cell, L, D = CELLS[call.cell], call.L, call.D
    layout, workers = _Layout(call, x, batch_sizes), threads()
    given = _rows(x)
    dtype, H = given.dtype, weights[1].shape[1]
    need_x, need_h, need_c = needed[:3]
    pair = "c" in cell.states
    states = L * D, layout.B, H
    dx = layout.new(given.shape[-1], dtype) if need_x else None
    dh_0 = np.empty(states, dtype) if need_h else None
    dc_0 = np.empty(states, dtype) if need_c and pair else None
    grads = [
        new_array(tuple(w.shape), dtype) if need else None
        for w, need in zip(weights, needed[3:], strict=True)
    ]
    each = len(weights) // (L * D)
    none = (None,) * (4 - each)
    by_layer: list[tuple | None] = []
    for layer in range(L):
        own = grads[layer * D * each : (layer + 1) * D * each]
        wanted = any(g is not None for g in own)
        of_each = ((*own[d * each : (d + 1) * each], *none) for d in range(D))
        by_layer.append(tuple(of_each) if wanted else None)
    lowest = 0
    if not (need_x or need_h or need_c):
        lowest = next((n for n, own in enumerate(by_layer) if own), L)
    if lowest < L:
        flat, steps = _array(tape), layout.steps(given)
        stack.backward(
            partial(_pack, cell, weights, L, D, BACKWARD, workers),
            _tapes(cell, flat, steps, H, L, D, layout.lengths, False), D,
            None if dy is None else layout.steps(_rows(dy)), _whole(dh_n), _whole(dc_n),
            None if dx is None else layout.steps(dx), dh_0, dc_0, by_layer,
            _dropout(call, seed), workers, lowest,
        )  # fmt: skip
    return [None if a is None else torch.from_numpy(a) for a in (dx, dh_0, dc_0, *grads)]

"""Tensors in, tensors out: one stack of layers, forward and backward, without autograd.

Knows tensors as memory that arrays can share, and `stack`; nothing of modules, gradients' graphs or
the compiler. Nothing is copied but what the kernels cannot read as it lies. Results lie in memory
of our own, which is kept for the next call. Here, and only here, is looked whether tensors fit each
other: operators can be called by anybody.

T steps, B batch, H hidden size, P projection size or 0, N numbers of h (P or H), G gates, L layers,
D directions, as in `stack`. Weights come as one flat list: for each layer, for each direction,
W [G*H, I or D*N], R [G*H, N], b_ih, b_hh [G*H] or neither, and where h is projected W_hr [P, H].
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import _kernels, checks, config, stack
from ..cells import CELLS, PARAMETERS, UNIT_WEIGHTS, Cell
from ..layer import BACKWARD, FORWARD, Sequence, Tape, as_steps, new_array
from ..parameters import ENDS
from .threads import call_threads

DTYPES = torch.float32, torch.float64
NO_UNIT_WEIGHTS = (None,) * len(PARAMETERS[UNIT_WEIGHTS])  # PyTorch's cells have but biases
TORCHS = "rnn_tanh", "rnn_relu", "lstm", "gru"  # cells that PyTorch has: no others come here


class Misfit(ValueError, RuntimeError):
    """Tensors that do not fit each other, or that the kernels cannot read; PyTorch has either."""


class Call(NamedTuple):
    """What a call is, beside its tensors."""

    cell: str
    L: int
    D: int
    batch_first: bool
    dropout: float  # between layers: 0 where it does not act


def weights_of_each(count: int, L: int, D: int, counts: Items[int] = (2, 4, 3, 5)) -> int:
    """Which of these counts of weights each direction has; 0 if none. L may be the compiler's."""
    for each in counts:
        if each * L * D == count:
            return each
    return 0


def sizes_of(weights: Items[Tensor], L: int, D: int) -> tuple[int, int, int, int]:
    """How many weights a direction has, H, P and N; of weights that fit."""
    each = weights_of_each(len(weights), L, D)
    if each % 2 == 0:
        H = weights[1].shape[1]
        return each, H, 0, H
    P, H = weights[each - 1].shape
    return each, H, P, P


# ---------------------------------------------------------------------------------------- checks


def describe(value: Any) -> str:
    """What came, in a few words.

    >>> describe(torch.zeros(2, 3))
    'torch.float32 tensor of shape (2, 3) on cpu'
    """
    if not isinstance(value, Tensor):
        return checks.describe(value)
    layout = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
    shape = "unknown" if value.is_nested else tuple(value.shape)
    return f"{value.dtype}{layout} tensor of shape {shape} on {value.device}"


def misfit(name: str, value: Any, needs: str) -> NoReturn:
    checks.fail(Misfit, name, describe(value), needs)


def _refuse(name: str, tensor: Any, like: Tensor, shape: tuple[int, ...] | str) -> NoReturn:
    """Raises what is wrong with a tensor that is not of this shape, and of the kind of `like`."""
    if not isinstance(tensor, Tensor):
        misfit(name, tensor, "a tensor")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        misfit(name, tensor, "a dense tensor: .to_dense() makes one")
    if tensor.dtype not in DTYPES:
        misfit(name, tensor, "torch.float32 or torch.float64")
    if tensor.device.type not in ("cpu", "meta"):
        misfit(name, tensor, "a tensor on the CPU: .cpu() makes one")
    if tensor.device != like.device or tensor.dtype != like.dtype:
        misfit(name, tensor, f"{like.dtype} on {like.device}, as of the input")
    misfit(name, tensor, f"shape [{shape}]" if type(shape) is str else f"shape {tuple(shape)}")


def _is(tensor: Tensor, dtype: torch.dtype, device: torch.device, shape: tuple) -> bool:
    return (
        tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.device == device
        and tensor.layout is torch.strided
    )


def fit(
    call: Call, x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
    weights: Items[Tensor],
) -> tuple[int, int]:  # fmt: skip
    """T and B (-1 of packed rows without h_0) of tensors that fit; raises Misfit for others.

    >>> W, R = torch.zeros(5, 3), torch.zeros(5, 5)
    >>> fit(Call("rnn_tanh", 1, 1, False, 0.0), torch.zeros(7, 2, 3), None, None, None, [W, R])
    (7, 2)
    >>> fit(Call("rnn_tanh", 1, 1, False, 0.0), torch.zeros(7, 2, 4), None, None, None, [W, R])
    Traceback (most recent call last):
    rnnfast.torch.bridge.Misfit: weight_ih_l0: got torch.float32 tensor of shape (5, 3) on cpu; ...
    """
    if call.cell not in TORCHS:
        checks.fail(Misfit, "cell", checks.describe(call.cell), f"one of {', '.join(TORCHS)}")
    cell, L, D = CELLS[call.cell], call.L, call.D
    dimensions = "T, B, I" if batch_sizes is None else "rows, I"
    if x.layout is not torch.strided or x.is_nested:  # which may have no shape
        _refuse("input", x, x, dimensions)
    shape, dtype, device = x.shape, x.dtype, x.device
    if not 0 <= call.dropout <= 1:  # a NaN is not
        checks.fail(Misfit, "dropout", str(call.dropout), "a probability, in [0, 1]")
    if len(shape) != (3 if batch_sizes is None else 2) or dtype not in DTYPES:
        _refuse("input", x, x, dimensions)
    if device.type not in ("cpu", "meta"):
        _refuse("input", x, x, dimensions)
    counts = (2, 4, 3, 5) if call.cell == "lstm" else (2, 4)
    each = weights_of_each(len(weights), L, D, counts) if L >= 1 and D in (1, 2) else 0
    if not each:
        got = f"{len(weights)} of {L} layers in {D} directions"
        needs = f"{' or '.join(map(str, sorted(counts)))} for each layer, in 1 or 2 directions"
        checks.fail(Misfit, "weights", got, needs)
    last = weights[each - 1 if each % 2 else 1]
    if last.dim() != 2 or min(last.shape) < 1 or shape[-1] < 1:
        name, sizes = ("weight_hr_l0", "P, H") if each % 2 else ("weight_hh_l0", "G*H, H")
        _refuse(name, last, x, f"{sizes}, both at least 1")
    _, H, P, N = sizes_of(weights, L, D)
    if P >= H:
        _refuse("weight_hr_l0", last, x, "P, H, P less than H")
    rows, I = len(cell.gates) * H, shape[-1]
    # Of a direction's own, in their order.
    shapes: list[tuple] = [(rows, I), (rows, N)]
    if each > 3:
        shapes += (rows,), (rows,)
    if P:
        shapes.append((P, H))
    for i, weight in enumerate(weights):
        if i == each * D:
            shapes[0] = rows, D * N
        needed = shapes[i % each]
        # Not by _is: of small calls this is the longest part.
        if (
            weight.dtype is not dtype
            or weight.device != device
            or weight.shape != needed
            or weight.layout is not torch.strided
        ):
            layer, d = divmod(i // each, D)
            names = (*PARAMETERS[: each // 2 * 2], "weight_hr")
            _refuse(f"{names[i % each]}_l{layer}{ENDS[d]}", weight, x, needed)
    if batch_sizes is not None:
        T, state = batch_sizes.shape[0], c_0 if h_0 is None else h_0
        B = state.shape[1] if state is not None and state.dim() == 3 else -1
    else:
        B, T = (shape[0], shape[1]) if call.batch_first else (shape[1], shape[0])
    for name, state, size in (("h_0", h_0, N), ("c_0", c_0, H)):
        if state is not None and not _is(state, dtype, device, (L * D, B, size)):
            _refuse(name, state, x, (L * D, B, size))
    return T, B


def packed_rows(batch_sizes: np.ndarray, rows: int, B: int) -> int:
    """B of packed rows; raises Misfit for sizes that no PackedSequence has, or of another B."""
    if batch_sizes.ndim != 1 or batch_sizes.dtype != np.int64 or batch_sizes.size == 0:
        got = checks.describe(batch_sizes)
        checks.fail(Misfit, "batch_sizes", got, "an int64 tensor [T] of at least one step")
    falling = batch_sizes[-1] >= 1 and (batch_sizes[1:] <= batch_sizes[:-1]).all()
    if not falling or batch_sizes[0] > rows or batch_sizes.sum() != rows:
        got = f"sizes from {batch_sizes[0]} to {batch_sizes[-1]} with the sum {batch_sizes.sum()}"
        needs = f"sizes that never rise, at least 1, with the sum {rows}, the rows of data"
        checks.fail(Misfit, "batch_sizes", got, needs)
    if B not in (-1, batch_sizes[0]):
        checks.fail(Misfit, "h_0", f"states of {B} rows", f"of {batch_sizes[0]}, as the input")
    return int(batch_sizes[0])


# ---------------------------------------------------------------------------------- as arrays


class _Layout:
    """How the caller's sequences lie, and how the kernels see them."""

    def __init__(self, call: Call, x: Tensor, batch_sizes: Tensor | None, T: int, B: int) -> None:
        self.lengths = self.starts = self.packed = None
        self.batch_first = call.batch_first
        self.T, self.B = T, B
        if batch_sizes is None:
            return
        sizes = batch_sizes.numpy().copy()  # before it is judged
        self.packed = x.shape[0]
        self.B = B = packed_rows(sizes, self.packed, B)
        if sizes[-1] < B:
            sizes = sizes.astype(checks.INTP, copy=False)
            self.starts = np.cumsum(sizes) - sizes
            self.lengths = np.searchsorted(-sizes, -np.arange(B), side="left")
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


def held(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same memory, sizes and dtypes, whatever becomes of the caller's tensors.

    Another thread, or a signal's handler, may give a parameter other memory while we compute.
    """
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).numpy()


def _rows(tensor: Tensor) -> np.ndarray:
    """A sequence whose last axis is one run of numbers."""
    array = _array(tensor)
    return array if checks.has_rows(array) else checks.contiguous(array)


def _whole(tensor: Tensor | None) -> np.ndarray | None:
    """A contiguous, aligned array, or None."""
    return None if tensor is None else checks.contiguous(_array(tensor))


def _pack(
    cell: Cell, weights: Items[Tensor], L: int, D: int, kind: int, workers: int, layer: int
) -> Any:
    """The pack of a layer's weights. They are known to fit, so their addresses tell all of them."""
    each, H, P, _ = sizes_of(weights, L, D)
    own = weights[layer * D * each : (layer + 1) * D * each]
    itemsize = own[0].itemsize
    at, copies = [], []  # these are kept until all is packed
    for weight in own:
        address = weight.data_ptr()
        if address % itemsize or not weight.is_contiguous() or weight.is_neg():
            copies.append(weight.clone(memory_format=torch.contiguous_format))
            address = copies[-1].data_ptr()
        at.append(address)
    if each == 4:
        by_direction = (tuple(at),) if D == 1 else (tuple(at[:4]), tuple(at[4:]))
    else:
        by_direction = tuple(_in_order(at[d * each : (d + 1) * each]) for d in range(D))
    sizes = own[0].shape[1], H, P, itemsize
    return _kernels.pack(cell.number, by_direction, kind, workers, config.plan, sizes)


def _in_order(own: Items[Any]) -> tuple:
    """A direction's weights, or what belongs to them, as kernels take them: see PARAMETERS."""
    biases = own[2:4] if len(own) > 3 else (None, None)
    projection = (*NO_UNIT_WEIGHTS, own[-1]) if len(own) % 2 else ()
    return (*own[:2], *biases, *projection)


# ------------------------------------------------------------------------------------- the tape


def tape_numbers(cell: Cell, T: Any, B: Any, H: int, P: int, L: int, D: int) -> Any:
    """Length of the flat tape of a call; T and B may be symbols of the compiler's."""
    N = P or H
    states = D * (T + 1) * B * (N + H * (len(cell.states) - 1))
    gates = D * T * B * len(cell.tape_gates) * H
    return L * (states + gates) + (L - 1) * T * B * D * N


def _tapes(
    cell: Cell,
    flat: np.ndarray,
    x: Sequence,
    H: int,
    P: int,
    L: int,
    D: int,
    lengths: np.ndarray | None,
) -> list[Tape]:
    """The layers' tapes, in pieces of a flat one."""
    end = 0

    def piece(shape: tuple[int, ...], _: np.dtype) -> np.ndarray:
        nonlocal end
        start, end = end, end + math.prod(shape)
        return flat[start:end].reshape(shape)

    return stack.new_tapes(cell, x, H, P, L, D, lengths, None, piece)


def _dropout(call: Call, seed: Tensor | None) -> stack.Dropout:
    if not call.dropout or seed is None:
        return stack.NO_DROPOUT
    return stack.Dropout(call.dropout, int(seed), 0)


# ------------------------------------------------------------------------------------- the calls


def forward(
    call: Call, x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
    seed: Tensor | None, weights: Items[Tensor], keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, h_n, c_n (None of a cell without c) and, to `keep`, the flat tape for `backward`.

    x [T, B, I], [B, T, I] of a call with batch_first, or packed [rows, I] with batch_sizes; y in
    the layout of x; states [L*D, B, N], [L*D, B, H], None for zeros. All are on the CPU, of the
    weights' dtype. Raises Misfit if tensors do not fit.
    """
    x, h_0, c_0, *weights = held(x, h_0, c_0, *weights)
    layout = _Layout(call, x, batch_sizes, *fit(call, x, batch_sizes, h_0, c_0, weights))
    cell, L, D = CELLS[call.cell], call.L, call.D
    workers, given = call_threads(), _rows(x)
    T, B = layout.T, layout.B
    dtype, (_, H, P, N) = given.dtype, sizes_of(weights, L, D)
    kept = tape_numbers(cell, T, B, H, P, L, D) if keep else 0
    checks.room("input", kept + T * B * (given.shape[-1] + 2 * D * H), given.itemsize)
    y = layout.new(D * N, dtype)
    h_n = np.empty((L * D, B, N), dtype)
    c_n = np.empty((L * D, B, H), dtype) if "c" in cell.states else None
    flat = tapes = None
    steps = layout.steps(given)
    if keep:
        flat = new_array((kept,), dtype)
        tapes = _tapes(cell, flat, steps, H, P, L, D, layout.lengths)
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

    `needed` tells of each whether it is; dy, dh_n and dc_n may be None for zeros. Raises Misfit if
    tensors do not fit.
    """
    x, dy, dh_n, dc_n, tape, *weights = held(x, dy, dh_n, dc_n, tape, *weights)
    layout = _Layout(call, x, batch_sizes, *fit(call, x, batch_sizes, dh_n, dc_n, weights))
    cell, L, D = CELLS[call.cell], call.L, call.D
    workers, given = call_threads(), _rows(x)
    dtype, I, (each, H, P, N) = given.dtype, given.shape[-1], sizes_of(weights, L, D)
    T, B = layout.T, layout.B
    shape = (*x.shape[:-1], D * N)
    if dy is not None and not _is(dy, x.dtype, x.device, shape):
        _refuse("dy", dy, x, shape)
    numbers = (tape_numbers(cell, T, B, H, P, L, D),)
    if not _is(tape, x.dtype, x.device, numbers):
        _refuse("tape", tape, x, numbers)
    if len(needed) != 3 + len(weights):
        checks.fail(Misfit, "needed", f"{len(needed)}", f"{3 + len(weights)}")
    need_x, need_h, need_c = needed[:3]
    dx = layout.new(I, dtype) if need_x else None
    dh_0 = np.empty((L * D, B, N), dtype) if need_h else None
    dc_0 = np.empty((L * D, B, H), dtype) if need_c and "c" in cell.states else None
    grads = [
        new_array(tuple(w.shape), dtype) if need else None
        for w, need in zip(weights, needed[3:], strict=True)
    ]
    by_layer: list[tuple | None] = []
    for layer in range(L):
        own = grads[layer * D * each : (layer + 1) * D * each]
        wanted = any(g is not None for g in own)
        of_each = (_in_order(own[d * each : (d + 1) * each]) for d in range(D))
        by_layer.append(tuple(of_each) if wanted else None)
    lowest = 0
    if not (need_x or need_h or need_c):
        lowest = next((n for n, own in enumerate(by_layer) if own), L)
    if lowest < L:
        flat, steps = checks.contiguous(_array(tape)), layout.steps(given)
        stack.backward(
            partial(_pack, cell, weights, L, D, BACKWARD, workers),
            _tapes(cell, flat, steps, H, P, L, D, layout.lengths), D,
            None if dy is None else layout.steps(_rows(dy)), _whole(dh_n), _whole(dc_n),
            None if dx is None else layout.steps(dx), dh_0, dc_0, by_layer,
            _dropout(call, seed), workers, lowest,
        )  # fmt: skip
    return [None if a is None else torch.from_numpy(a) for a in (dx, dh_0, dc_0, *grads)]

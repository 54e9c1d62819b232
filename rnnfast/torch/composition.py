"""The same layers once more, as a composition of PyTorch's own operations, step by step.

Knows equations and autograd; nothing of kernels, but for the dropout masks, which must be the same.
Slow, and there for what kernels cannot do: it can be differentiated as often as one likes, forward
and backward, and be transformed by torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from .. import stack
from ..cells import CELLS
from .bridge import Call, packed_rows, sizes_of
from .threads import call_threads


def _cell_step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Items[Tensor]) -> tuple:
    """One step: x [b, I], h [b, N], c [b, H] -> the next h and c; equations as in
    `rnnfast.reference`."""
    W, R, *biases = weights
    projection = biases.pop() if len(weights) % 2 else None
    b_ih, b_hh = biases or (None, None)
    a, b = torch.nn.functional.linear(x, W, b_ih), torch.nn.functional.linear(h, R, b_hh)
    if cell == "lstm":
        i, f, g, o = (a + b).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h if projection is None else torch.nn.functional.linear(h, projection), c
    if cell == "gru":
        (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
        r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
        n = torch.tanh(an + r * bn)
        return (1 - z) * n + z * h, None
    return {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu}[cell](a + b), None


def _direction(
    cell: str, x: list[Tensor], h: Tensor, c: Tensor | None, weights: Items[Tensor], reverse: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """One layer in one direction; x has the rows that run at each step, longest rows first."""
    y = list(x)  # of each step to be replaced
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        n = x[t].shape[0]
        c_run = None if c is None else c[:n]
        h_run, c_run = _cell_step(cell, x[t], h[:n], c_run, weights)
        y[t] = h_run
        h = torch.cat((h_run, h[n:]))
        if c is not None:
            c = torch.cat((c_run, c[n:]))
    return y, h, c


def forward(
    call: Call, x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
    seed: Tensor | None, weights: Items[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, h_n and c_n (None of a cell without c) of `bridge.forward`, to differentiate."""
    L, D = call.L, call.D
    each, H, _, N = sizes_of(weights, L, D)
    B = int(batch_sizes[0]) if batch_sizes is not None else x.shape[0 if call.batch_first else 1]
    if batch_sizes is not None:
        packed_rows(batch_sizes.numpy(), x.shape[0], B)
    if h_0 is None:
        h_0 = x.new_zeros((L * D, B, N))
    if c_0 is None and "c" in CELLS[call.cell].states:
        c_0 = x.new_zeros((L * D, B, H))
    if batch_sizes is not None:
        steps = list(x.split(batch_sizes.tolist()))
    else:
        steps = list(x.unbind(1 if call.batch_first else 0))
    last_h, last_c = [], []
    for layer in range(L):
        outputs = []
        for d in range(D):
            row = layer * D + d
            own = weights[row * each : (row + 1) * each]
            c = None if c_0 is None else c_0[row]
            y, h, c = _direction(call.cell, steps, h_0[row], c, own, d == 1)
            outputs.append(y)
            last_h.append(h)
            last_c.append(c)
        steps = [torch.cat(parts, 1) for parts in zip(*outputs, strict=True)]
        if call.dropout and seed is not None and layer < L - 1:
            steps = _dropped(call, seed, layer, steps)
    if not steps:
        y = x.new_zeros((*x.shape[:2], D * N))
    elif batch_sizes is not None:
        y = torch.cat(steps)
    else:
        y = torch.stack(steps, 1 if call.batch_first else 0)
    return y, torch.stack(last_h), None if c_0 is None else torch.stack(last_c)


def _dropped(call: Call, seed: Tensor, layer: int, steps: list[Tensor]) -> list[Tensor]:
    """Dropout with the kernels' own mask, which is made by dropping ones."""
    T, (B, N) = len(steps), steps[0].shape
    dtype = np.float64 if steps[0].dtype == torch.float64 else np.float32
    mask = np.empty((T, B, N), dtype)
    dropout = stack.Dropout(call.dropout, int(seed), 0)
    dropout.apply(layer, np.ones((T, B, N), dtype), mask, call_threads())
    masks = torch.from_numpy(mask)
    return [y * masks[t, : y.shape[0]] for t, y in enumerate(steps)]


def backward(
    call: Call, needed: Items[bool], dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None,
    x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
    seed: Tensor | None, weights: Items[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of `bridge.backward`, where a transform wants to see how they come about."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        primal = [_leaf(t) for t in (x, h_0, c_0, *weights)]
        return _gradients(call, needed, (dy, dh_n, dc_n), primal, batch_sizes, seed, again)


def backward_of_backward(
    call: Call, needed: Items[bool], cotangents: Items[Tensor | None], dy: Tensor | None,
    dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor, batch_sizes: Tensor | None,
    h_0: Tensor | None, c_0: Tensor | None, seed: Tensor | None, weights: Items[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients by (dy, dh_n, dc_n, x, h_0, c_0, *weights) through what `bridge.backward` returns.

    `cotangents`: the loss's gradient by each of these results, None for zeros. With grad mode on,
    the results can be differentiated again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: of a tensor that is given twice, each place must have a gradient of its own.
        primal = [_leaf(t) for t in (x, h_0, c_0, *weights)]
        upper = [_leaf(t) for t in (dy, dh_n, dc_n)]
        first = _gradients(call, needed, upper, primal, batch_sizes, seed, True)
        first = [g for g, need in zip(first, needed, strict=True) if need]
        seen = [(g, v) for g, v in zip(first, cotangents, strict=True) if _counts(g, v)]
        inputs = [t for t in (*upper, *primal) if t is not None]
        second: Items[Tensor | None] = [None] * len(inputs)
        if seen:
            gradients, given = zip(*seen, strict=True)
            second = torch.autograd.grad(
                gradients, inputs, given, create_graph=again, allow_unused=True
            )
    found = iter(second)
    return [None if t is None else next(found) for t in (*upper, *primal)]


def _gradients(
    call: Call, needed: Items[bool], upper: Items[Tensor | None], primal: Items[Tensor | None],
    batch_sizes: Tensor | None, seed: Tensor | None, again: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients by x, h_0, c_0 and the weights, which `primal` are, or None where not needed."""
    x, h_0, c_0, *weights = primal
    results = forward(call, x, batch_sizes, h_0, c_0, seed, weights)
    pairs = [(r, u) for r, u in zip(results, upper, strict=True) if u is not None]
    wanted = [p for p, need in zip(primal, needed, strict=True) if need]
    given, seeds = [r for r, _ in pairs], [u for _, u in pairs]
    found = iter(torch.autograd.grad(given, wanted, seeds, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _leaf(tensor: Tensor | None) -> Tensor | None:
    """A view that can be differentiated by, and that leads on to the tensor if that can be, too."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _counts(gradient: Tensor | None, cotangent: Tensor | None) -> bool:
    return gradient is not None and cotangent is not None and gradient.requires_grad

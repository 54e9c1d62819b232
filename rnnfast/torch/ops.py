"""The two operators that PyTorch knows us by, and the short way that eager calls take.

`rnnfast::forward` and `rnnfast::backward` are custom operators with fake kernels and gradients:
what torch.compile, torch.export and fake tensors see. An operator costs more than 100 us on its way
through Python, so a plain call in eager mode runs the same bridge from an `autograd.Function`
instead. Gradients of gradients, and torch.func's transforms, go through `composition`.

Knows autograd and the dispatcher; nothing of modules. Arguments as in `bridge`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from . import bridge, composition
from .bridge import Call

# ------------------------------------------------------------------------------- the operators
# Their annotations are read as the schema, so they are of the types that a schema knows: a call's
# words one by one, and an empty tensor for what is not there.


def _own(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("rnnfast::forward", mutates_args=())
def forward_op(
    x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
    seed: Tensor | None, weights: list[Tensor], cell: str, layers: int, directions: int,
    batch_first: bool, dropout: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = Call(cell, layers, directions, batch_first, dropout)
    results = bridge.forward(call, x, batch_sizes, h_0, c_0, seed, weights, keep)
    y, h_n, c_n, tape = results
    return y, h_n, _own(c_n, x), _own(tape, x)


@forward_op.register_fake
def _(
    x, batch_sizes, h_0, c_0, seed, weights, cell, layers, directions, batch_first, dropout, keep
):  # fmt: skip
    call = Call(cell, layers, directions, batch_first, dropout)
    T, B = bridge.fit(call, x, batch_sizes, h_0, c_0, weights)
    row, (_, H, P, N) = CELLS[cell], bridge.sizes_of(weights, layers, directions)
    width = directions * N
    if batch_sizes is not None and h_0 is None:  # how many rows, their sizes know alone
        B = torch.library.get_ctx().new_dynamic_size()
    y = x.new_empty((*x.shape[:-1], width))
    rows = layers * directions
    numbers = bridge.tape_numbers(row, T, B, H, P, layers, directions) if keep else 0
    c_n = x.new_empty((rows, B, H) if "c" in row.states else 0)
    return y, x.new_empty((rows, B, N)), c_n, x.new_empty(numbers)


@torch.library.custom_op("rnnfast::backward", mutates_args=())
def backward_op(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor,
    batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None, seed: Tensor | None,
    tape: Tensor, weights: list[Tensor], cell: str, layers: int, directions: int,
    batch_first: bool, dropout: float, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    call = Call(cell, layers, directions, batch_first, dropout)
    grads = bridge.backward(call, needed, dy, dh_n, dc_n, x, batch_sizes, seed, tape, weights)
    return [grad for grad in grads if grad is not None]


@backward_op.register_fake
def _(
    dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, tape, weights, cell, layers, directions,
    batch_first, dropout, needed,
):  # fmt: skip
    primal = x, h_0, c_0, *weights
    return [t.new_empty(t.shape) for t, need in zip(primal, needed, strict=True) if need]


def _forward_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, batch_sizes, h_0, c_0, seed, weights, *words, keep = inputs
    _, _, c_n, tape = output
    ctx.words = words
    ctx.kept = keep
    ctx.save_for_backward(x, batch_sizes, h_0, c_0, seed, tape, *weights)
    ctx.mark_non_differentiable(*([tape] if "c" in CELLS[words[0]].states else [c_n, tape]))
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, _: Any) -> tuple:
    if not ctx.kept:
        raise RuntimeError("rnnfast::forward: got keep=False; needs True for a backward pass")
    x, batch_sizes, h_0, c_0, seed, tape, *weights = ctx.saved_tensors
    by_x, _, by_h, by_c, _, by_weights = ctx.needs_input_grad[:6]
    by_c = by_c and c_0 is not None
    if "c" not in CELLS[ctx.words[0]].states:
        dc_n = None
    needed = [by_x, by_h and h_0 is not None, by_c, *by_weights]
    grads = iter(
        backward_op(
            dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, tape, weights, *ctx.words, needed
        )
    )
    dx, dh_0, dc_0, *dweights = [next(grads) if need else None for need in needed]
    return dx, None, dh_0, dc_0, None, dweights, *[None] * 6


def _backward_context(ctx: Any, inputs: tuple, output: list) -> None:
    dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, _, weights, *words, needed = inputs
    ctx.words, ctx.needed = words, needed
    ctx.save_for_backward(dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, *weights)


def _backward_backward(ctx: Any, cotangents: Any) -> tuple:
    dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, *weights = ctx.saved_tensors
    grads = composition.backward_of_backward(
        Call(*ctx.words), ctx.needed, cotangents, dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed,
        weights,
    )  # fmt: skip
    dy, dh_n, dc_n, x, h_0, c_0, *weights = grads
    return dy, dh_n, dc_n, x, None, h_0, c_0, None, None, weights, *[None] * 6


forward_op.register_autograd(_forward_backward, setup_context=_forward_context)
backward_op.register_autograd(_backward_backward, setup_context=_backward_context)


# ---------------------------------------------------------------------------------- in eager mode


class _Forward(torch.autograd.Function):
    """`bridge.forward` with a tape, and its gradients."""

    @staticmethod
    def forward(ctx, call, x, batch_sizes, h_0, c_0, seed, *weights):
        y, h_n, c_n, tape = bridge.forward(call, x, batch_sizes, h_0, c_0, seed, weights, True)
        ctx.save_for_backward(x, batch_sizes, h_0, c_0, seed, tape, *weights)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        x, batch_sizes, h_0, c_0, seed, tape, *weights = ctx.saved_tensors
        _, by_x, _, by_h, by_c, _, *by_weights = ctx.needs_input_grad
        needed = [by_x, by_h, by_c, *by_weights]
        if _transformed():
            grads = composition.backward(
                ctx.call, needed, dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, weights
            )
        elif torch.is_grad_enabled():  # create_graph
            grads = _Backward.apply(
                ctx.call, needed, dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, tape, *weights
            )
        else:
            grads = bridge.backward(
                ctx.call, needed, dy, dh_n, dc_n, x, batch_sizes, seed, tape, weights
            )
        dx, dh_0, dc_0, *dweights = grads
        return None, dx, None, dh_0, dc_0, None, *dweights


class _Backward(torch.autograd.Function):
    """`bridge.backward`, and its gradients."""

    @staticmethod
    def forward(ctx, call, needed, dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, tape, *weights):
        ctx.save_for_backward(dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, *weights)
        ctx.call, ctx.needed = call, needed
        ctx.set_materialize_grads(False)
        return tuple(
            bridge.backward(call, needed, dy, dh_n, dc_n, x, batch_sizes, seed, tape, weights)
        )

    @staticmethod
    def backward(ctx, *cotangents):
        dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, *weights = ctx.saved_tensors
        given = [v for v, need in zip(cotangents, ctx.needed, strict=True) if need]
        grads = composition.backward_of_backward(
            ctx.call, ctx.needed, given, dy, dh_n, dc_n, x, batch_sizes, h_0, c_0, seed, weights
        )
        dy, dh_n, dc_n, x, h_0, c_0, *weights = grads
        return None, None, dy, dh_n, dc_n, x, None, h_0, c_0, None, None, *weights


# Private to PyTorch, and without a public counterpart. Where one is missing, calls go by the
# operators, which are never wrong: they take longer, and refuse transforms.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
_forward_ad = torch.autograd.forward_ad
_KNOWN = None not in (_dispatch_modes, _transforms) and hasattr(_forward_ad, "_current_level")
PLAIN = torch.Tensor, torch.nn.Parameter


def _transformed() -> bool:
    """Whether vmap, grad, jvp or another of torch.func's is at work, or a forward derivative."""
    return _KNOWN and (_transforms() or _forward_ad._current_level >= 0)


def _plain(x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: list[Tensor]) -> bool:
    """Whether tensors are what they seem, and nobody else is to see what is done with them."""
    return (
        _KNOWN
        and not _dispatch_modes()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and type(x) in PLAIN
        and (h_0 is None or type(h_0) in PLAIN)
        and (c_0 is None or type(c_0) in PLAIN)
        and all(type(w) in PLAIN for w in weights)
    )


def run(
    call: Call, x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
    seed: Tensor | None, weights: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, h_n and c_n (None of a cell without c), differentiable; of tensors that fit each other."""
    grad = torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        if _transformed():
            bridge.fit(call, x, batch_sizes, h_0, c_0, weights)
            return composition.forward(call, x, batch_sizes, h_0, c_0, seed, weights)
        if _plain(x, h_0, c_0, weights):
            if grad and any(t is not None and t.requires_grad for t in (x, h_0, c_0, *weights)):
                return _Forward.apply(call, x, batch_sizes, h_0, c_0, seed, *weights)
            return bridge.forward(call, x, batch_sizes, h_0, c_0, seed, weights, False)[:3]
    for weight in weights:
        if not isinstance(weight, Tensor):  # a parameter set to None, or a mistake of a caller's
            bridge.misfit("a weight", weight, "a tensor")
    y, h_n, c_n, _ = forward_op(x, batch_sizes, h_0, c_0, seed, weights, *call, grad)
    return y, h_n, c_n if "c" in CELLS[call.cell].states else None

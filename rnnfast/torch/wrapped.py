"""A module of rnnfast, with all of its options, as one of torch.nn: parameters, autograd, copies.

Knows the modules of `recurrent` by their calls and by the buffer that holds their parameters, and
tensors as memory that arrays share; nothing of kernels, nor of the drop-in beside it.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks
from ..calls import Clamp, States
from ..layer import TAPES
from ..recurrent import Recurrent
from .bridge import describe
from .likeness import in_dtype
from .ops import _transformed

# Private to PyTorch: whether the graph may be walked again. Without it, tapes live as long as what
# was computed with them.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
# Likewise: which backward pass is under way, or -1. Without it, a call that checkpointing repeats
# is not told from others.
_backward_pass = getattr(torch._C, "_current_graph_task_id", lambda: -1)

_NUMPY = {torch.float32: "numpy.float32", torch.float64: "numpy.float64"}

# Of each module that is wrapped. A second wrapping has the same ones: PyTorch's watch for changes
# is the Parameter's, not the memory's.
_parameters_of: WeakKeyDictionary[Recurrent, dict[str, nn.Parameter]] = WeakKeyDictionary()


class Wrapped(nn.Module):
    """An `rnnfast.RNN`, `LSTM` or `GRU` in a PyTorch model, whatever its options.

    layers: the module, not frozen, now and later. Its parameters are this one's, by their names and
    in the same memory: a step of an optimiser is seen by both, and so is `layers.flat -= ...`,
    though not by PyTorch's watch for what changes between forward and backward. Parameters that are
    given other memory (by `.data =`, `.double().float()`, `share_memory`, `functional_call`, a
    parametrisation, `assign=True`) are right as well, at the price of a copy of the module in each
    call, but not seen by `layers`, which has its old ones then; in a deepcopy or what was pickled
    they lie together again. Copies and files of this module are as of any other, but `state_dict`
    has neither `layers.seed` nor `layers.dropout_calls`. A single step is a call with T = 1.

    tape: "full" or "light", as of `forward_train`. grad_clip, grad_clip_norm: `clip` and
    `clip_norm` of `backward`: what later steps send to the h of a step is held within -grad_clip
    and grad_clip, and then its norm over a row's numbers within grad_clip_norm; None: is not.

    In training mode all drops that `forward_train` drops, with gradients or without. The masks are
    those of `layers.seed` and `layers.dropout_calls`: PyTorch's seed has no part in them, and a
    call that checkpointing computes again would drop others: it is refused. In eval mode nothing is
    dropped, and gradients are those of that; but with zoneout, which is expected then, backward is
    refused.

    `layers.grads` are scratch: gradients are the parameters' own `.grad`. Second derivatives are
    not there, nor torch.func's transforms and forward derivatives; torch.compile runs a call
    outside of its graphs. Everything is computed on the CPU, in the module's own dtype, on as many
    threads as `rnnfast.get_num_threads()` says.

    Raises TypeError or ValueError for arguments that are not such.

    >>> import rnnfast
    >>> lstm = Wrapped(rnnfast.LSTM(3, 5, layer_norm="gates", zoneout=0.1), grad_clip=1.0)
    >>> lstm
    Wrapped(LSTM(3, 5, layer_norm='gates', zoneout=(0.1, 0.1)), grad_clip=1.0)
    >>> y, (h_n, c_n) = lstm(torch.zeros(7, 2, 3), lengths=[7, 4])
    >>> y.sum().backward()
    >>> y.shape, lstm.weight_norm_hh_l0.grad.shape
    (torch.Size([7, 2, 5]), torch.Size([20]))
    """

    def __init__(
        self, layers: Recurrent, *, tape: str = "full", grad_clip: float | None = None,
        grad_clip_norm: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(layers, Recurrent):
            checks.fail(TypeError, "layers", describe(layers), "an rnnfast.RNN, LSTM or GRU")
        self._layers = layers
        self._refuse_frozen()
        self._tape = checks.choice("tape", tape, TAPES)
        limits = {"grad_clip": grad_clip, "grad_clip_norm": grad_clip_norm}
        checks.limits(*limits.values(), layers.dtype, tuple(limits))
        self._limits = limits
        own = _parameters_of.get(layers, {})
        for name, view in layers.params.items():
            home, old = torch.from_numpy(view), own.get(name)
            kept = old is not None and _place(old) == _place(home)
            self.register_parameter(name, old if kept else nn.Parameter(home))
        self._note()

    def _refuse_frozen(self) -> None:
        """What is frozen computes with the parameters that it had, whatever becomes of them."""
        if not self._layers.flat.flags.writeable:
            checks.fail(ValueError, "layers", "a frozen module", "unfreeze() first")

    def _note(self) -> None:
        """Notes what every call needs to know of the module."""
        layers = self._layers
        _parameters_of[layers] = {n: p for n, p in self._parameters.items() if p is not None}
        homes = {name: torch.from_numpy(view) for name, view in layers.params.items()}
        self._homes = {name: _place(tensor) for name, tensor in homes.items()}
        self._dtype = next(iter(homes.values())).dtype
        self._expects = bool(np.any(layers.zoneout))
        between_layers = layers.dropout and layers.num_layers > 1
        drops = between_layers or layers.recurrent_dropout or layers.drop_connect
        self._drops = bool(drops) or self._expects

    @property
    def layers(self) -> Recurrent:
        """The module that is wrapped."""
        return self._layers

    def extra_repr(self) -> str:
        """The module that is wrapped, and what is not as usual."""
        more = {"tape": self._tape, **self._limits}
        usual = "full", None, None
        shown = [f"{k}={v!r}" for (k, v), u in zip(more.items(), usual, strict=True) if v != u]
        return ", ".join([repr(self._layers), *shown])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Parameters of copies and of what was in a file lie in the module's own memory again, but
        for those that are shared with another process.
        """
        super().__setstate__(state)
        self._layers.unfreeze()
        self._note()
        for name, view in self._layers.params.items():
            own = self._parameters.get(name)
            if own is not None and _lies(own, self._dtype) and not own.is_shared():
                if _place(own) != self._homes[name]:
                    own.data = torch.from_numpy(view).copy_(own.detach())

    # ------------------------------------------------------------------------------------ calls

    @torch.compiler.disable
    def forward(
        self, x: Tensor, state: Any = None, lengths: Any = None, *, mask: Any = None,
        clamp: Any = None, all_states: bool = False, offsets: Any = None,
    ) -> Any:  # fmt: skip
        """As a call of the module that is wrapped, whose docstring has all shapes.

        x, state (or each of the pair) and values of clamps are tensors, of which gradients are
        taken where they are asked for: `rnnfast.Clamp(values, ...)` takes a tensor. Returns y, the
        last state, in the form of `state`, and with all_states third `rnnfast.States`, all tensors.
        Raises as the module does, and TypeError for tensors of another dtype or device.

        >>> import rnnfast
        >>> gru = Wrapped(rnnfast.GRU(3, 5))
        >>> values = torch.zeros(7, 1, 2, requires_grad=True)
        >>> clamp = rnnfast.Clamp(values, units=[0, 4])
        >>> y, h_n, states = gru(torch.ones(7, 2, 3), clamp=clamp, all_states=True)
        >>> states.h.sum().backward()
        >>> values.grad.shape
        torch.Size([7, 1, 2])
        """
        if _transformed() or torch.jit.is_tracing():
            got = "a call under torch.func, forward derivatives or torch.jit.trace"
            checks.fail(ValueError, "Wrapped", got, "plain autograd: the drop-in has more")
        self._refuse_frozen()
        pair = type(state) in (tuple, list)
        given = state if pair else [] if state is None else [state]
        if torch.is_autocast_enabled("cpu"):
            x, *given = in_dtype(self._dtype, x, *given)
        several = type(clamp) in (tuple, list)
        clamps = [] if clamp is None else clamp if several else [clamp]

        x = self._checked("x", x)
        states = [self._checked(checks.STATE[i > 0], one) for i, one in enumerate(given)]
        values, own = [], []
        for i, one in enumerate(clamps):
            value = one.values if type(one) is Clamp and isinstance(one.values, Tensor) else None
            if value is not None:
                if torch.is_autocast_enabled("cpu"):
                    (value,) = in_dtype(self._dtype, value)
                name = f"clamp[{i}].values" if several else "clamp.values"
                array = _array(self._checked(name, value))
                one = Clamp(array, one.units, where=one.where, state=one.state, layer=one.layer)
            values.append(value)
            own.append(one)
        weights = [self._checked(name, getattr(self, name, None)) for name in self._homes]

        layers = self._with(weights)
        tensors = [x, *states, *values, *weights]
        keep = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        )
        # A plain call is what eval mode computes, and training mode of what drops nothing; a tape
        # of what zoneout is expected to do is not there.
        drops = self.training and self._drops
        if drops and _backward_pass() >= 0:
            got = "a call that drops, made again within a backward pass"
            needs = "no checkpointing of what drops: each call has masks of its own"
            checks.fail(RuntimeError, "Wrapped", got, needs)
        train = drops or (keep and not self._expects)
        arrays = [_array(one) for one in states]
        asked: dict[str, Any] = dict(
            x=_array(x), lengths=lengths, mask=mask, all_states=all_states, offsets=offsets,
            state=tuple(arrays) if pair else arrays[0] if arrays else None,
            clamp=None if clamp is None else own if several else own[0],
        )  # fmt: skip
        if train:
            kind = self._tape if keep else "light"  # which nobody will ask for
            made = layers.forward_train(tape=kind, drop=self.training, **asked)
            y, last, tape, *steps = made
            if layers is not self._layers:
                self._layers.dropout_calls = layers.dropout_calls
        else:
            (y, last, *steps), tape = layers(**asked), None
        has_c = type(last) is tuple
        found = [y, *(last if has_c else (last,)), *(a for one in steps for a in one)]
        results = [torch.from_numpy(array) for array in found if array is not None]
        if keep:
            call = _Call(layers, tape, 1 + has_c, len(states), len(values), self._limits)
            results = _Graph.apply(call, results, *tensors)
        y, h, *rest = results
        last = (h, rest.pop(0)) if has_c else h
        return (y, last, States(*rest, *[None] * (2 - len(rest)))) if steps else (y, last)

    def _checked(self, name: str, tensor: Any) -> Tensor:
        """A tensor that the module can read."""
        if not _lies(tensor, self._dtype):
            needs = f"a dense {self._dtype} tensor on the CPU, as of the module that is wrapped"
            dtype = getattr(tensor, "dtype", self._dtype)
            if name in self._homes and dtype is not self._dtype and dtype in _NUMPY:
                needs += f", or a module made with dtype={_NUMPY[dtype]} and wrapped anew"
            if type(tensor).__name__ == "PackedSequence":
                needs = "the padded tensor, with its lengths as lengths="
            checks.fail(TypeError, name, describe(tensor), needs)
        return tensor

    def _with(self, weights: list[Tensor]) -> Recurrent:
        """The module that computes with these: the own one, if they lie in its memory.

        Else a copy, for this call and its gradients alone: that memory may still be somebody's.
        """
        if all(map(lambda w, home: _place(w) == home, weights, self._homes.values())):
            return self._layers
        layers = copy.copy(self._layers)
        layers.unfreeze()
        for name, weight in zip(self._homes, weights, strict=True):
            layers.params[name] = _array(weight)
        return layers


class _Call(NamedTuple):
    """What gradients need to know of a call."""

    layers: Recurrent
    tape: Any  # None of a call without
    last: int  # how many last states came out
    states: int  # how many initial ones came in
    clamps: int
    limits: dict[str, float | None]


class _Graph(torch.autograd.Function):
    """Ties the results of a call, which was made already, to what they were made of."""

    @staticmethod
    def forward(ctx, call, results, x, *tensors):
        ctx.call = call
        ctx.shapes = [one.shape for one in results[1 : 1 + call.last]]
        # Not read, but watched: of the others, the tape has copies.
        ctx.save_for_backward(x, *tensors[call.states + call.clamps :])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, dy, *others):
        if torch.is_grad_enabled():  # or what comes would be taken for constants, in silence
            got = "a backward pass with create_graph=True"
            checks.fail(RuntimeError, "Wrapped", got, "one without: it has no second derivatives")
        _ = ctx.saved_tensors  # raises if one was changed, or if all of this is gone
        call = ctx.call
        layers = call.layers
        if call.tape is None:
            needs = "training mode, or no zoneout: what is expected of it has no backward pass"
            checks.fail(ValueError, "zoneout", "a backward pass in eval mode", needs)
        dy, *others = (None if one is None else _array(one) for one in (dy, *others))
        dlast, dsteps = others[: call.last], others[call.last :]
        dstate: Any = None
        if any(one is not None for one in dlast):
            dstate = tuple(
                np.zeros(shape, layers.dtype) if one is None else one
                for one, shape in zip(dlast, ctx.shapes, strict=True)
            )
            dstate = dstate if call.last == 2 else dstate[0]
        dstates = (*dsteps, None)[:2] if any(one is not None for one in dsteps) else None
        _, _, by_x, *needed = ctx.needs_input_grad
        clip, clip_norm = call.limits.values()
        with layers._adding_lock():  # nobody else's gradients come in before they are copied
            dx, first, *extra = layers.backward(
                call.tape, dy, dstate, need_dx=by_x, accumulate=False, dstates=dstates,
                clip=clip, clip_norm=clip_norm,
            )  # fmt: skip
            by_weights = needed[call.states + call.clamps :]
            weights = [
                gradient.copy() if need else None
                for gradient, need in zip(layers.grads.values(), by_weights, strict=True)
            ]
        if not _keeps_graph():
            ctx.call = None
        found = list(first if type(first) is tuple else (first,))[: call.states]
        found += extra[0].clamps if extra else ()
        found += weights
        return None, None, *(
            torch.from_numpy(gradient) if need else None
            for gradient, need in zip((dx, *found), (by_x, *needed), strict=True)
        )  # fmt: skip


def _lies(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether it is a tensor whose numbers arrays can share, of this dtype."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype is dtype
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _place(tensor: Tensor) -> tuple:
    """Where a tensor's numbers lie, and how: of equal places, all numbers are the same."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.is_neg()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_neg().numpy()

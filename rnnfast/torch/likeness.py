"""What a module of ours shares with one of torch.nn: arguments, parameters, repr and errors.

Knows torch.nn, and nothing of what is computed. What PyTorch decides, PyTorch is asked: a module of
torch.nn of the same arguments, without memory (on the meta device), says which parameters there are
and what is wrong with a call.
"""

from __future__ import annotations

import contextlib
import statistics
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from .bridge import Misfit, describe


class Like(nn.Module):
    """A module with the arguments, the parameters and the errors of one of torch.nn."""

    _theirs: type[nn.Module]
    _attributes: tuple[str, ...]

    def _build(self, arguments: dict[str, Any], device: Any, dtype: Any) -> None:
        """Takes arguments as torch.nn judges them, and makes the parameters."""
        super().__init__()
        template = self._theirs(**arguments, device="meta", dtype=dtype)
        for name in self._attributes:
            if hasattr(template, name):
                setattr(self, name, getattr(template, name))
        for name, parameter in template._parameters.items():
            if parameter is not None:
                shape = parameter.shape
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self._prepare()
        self.reset_parameters()

    def _prepare(self) -> None:
        """Notes what every call needs, once attributes and parameters are there."""
        self._names = [name for name, p in self._parameters.items() if p is not None]

    @property
    def _cell(self) -> str:
        """The name of the cell in `rnnfast.cells`; attributes that decide it can be assigned to."""
        raise NotImplementedError

    def _weights(self) -> list[Tensor]:
        if not torch.compiler.is_compiling():
            try:  # nn.Module's own way to an attribute takes a microsecond
                own = self._parameters
                return [own[name] for name in self._names]
            except KeyError:  # a parametrisation computes it
                pass
        return [getattr(self, name) for name in self._names]

    def _complain(self, misfit: Misfit, input: Any, hx: Any) -> NoReturn:
        """Raises what torch.nn raises for the same call; for one that it takes, the misfit."""
        held = [w for w in self._weights() if isinstance(w, Tensor)]
        dtype = statistics.mode(w.dtype for w in held) if held else None
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dropout, once more
            template = self._theirs(**self._arguments(), device="meta", dtype=dtype)
            with contextlib.suppress(NotImplementedError):  # of what has no twin without memory
                if isinstance(input, PackedSequence):  # which torch.nn does not look at
                    template.check_input(_as_meta(input.data), input.batch_sizes)
                template(_as_meta(input), _as_meta(hx))
            # Not the input, then: a parameter, or attributes that were assigned and want others.
            for name, parameter in template.named_parameters():
                own = getattr(self, name, None)
                fits = isinstance(own, Tensor) and own.shape == parameter.shape
                if not fits or own.dtype != parameter.dtype:
                    needs = f"a {parameter.dtype} tensor of shape {tuple(parameter.shape)}"
                    checks.fail(Misfit, name, describe(own), needs)
        raise misfit from None

    def _arguments(self) -> dict[str, Any]:
        """What the constructor took."""
        raise NotImplementedError


def _as_meta(value: Any) -> Any:
    """The same without memory."""
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.to("meta"), *value[1:])
    if isinstance(value, (tuple, list)):
        return type(value)(map(_as_meta, value))
    if not isinstance(value, Tensor):
        return value
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        raise NotImplementedError
    return value.to("meta")


def in_dtype(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    """Tensors of real numbers in a dtype: what autocast is answered with."""
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]

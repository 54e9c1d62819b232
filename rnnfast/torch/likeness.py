"""What a module of ours shares with one of torch.nn: arguments, parameters, repr and errors.

Knows torch.nn. What PyTorch decides, PyTorch is asked: a module of torch.nn of the same arguments,
without memory (on the meta device), says which parameters there are and what is wrong with a call.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import checks

DTYPES = torch.float32, torch.float64


def describe(value: Any) -> str:
    """What came, in a few words.

    >>> describe(torch.zeros(2, 3))
    'torch.float32 tensor of shape (2, 3) on cpu'
    """
    if not isinstance(value, Tensor):
        return checks.describe(value)
    layout = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
    return f"{value.dtype}{layout} tensor of shape {tuple(value.shape)} on {value.device}"


def taken(name: str, tensor: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses what the kernels cannot read, though it may have the right shape."""
    if not isinstance(tensor, Tensor):
        checks.fail(TypeError, name, describe(tensor), "a tensor")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        checks.fail(TypeError, name, describe(tensor), "a dense tensor: .to_dense() makes one")
    if tensor.dtype not in DTYPES:
        checks.fail(TypeError, name, describe(tensor), "torch.float32 or torch.float64")
    if tensor.device.type not in ("cpu", "meta"):
        checks.fail(ValueError, name, describe(tensor), "a tensor on the CPU: .cpu() makes one")
    if tensor.device != device or tensor.dtype != dtype:
        checks.fail(ValueError, name, describe(tensor), f"{dtype} on {device}, as the weights")


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
        if getattr(template, "proj_size", 0):
            needs = "0: projections are not built yet"
            checks.fail(ValueError, "proj_size", str(template.proj_size), needs)
        for name, parameter in template._parameters.items():
            if parameter is not None:
                shape = parameter.shape
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self._cell = self._cell_of()
        self._names = [name for name, p in self._parameters.items() if p is not None]
        self.reset_parameters()

    def _cell_of(self) -> str:
        """The name of the cell in `rnnfast.cells`."""
        raise NotImplementedError

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    def _complain(self, input: Any, hx: Any) -> None:
        """Raises what torch.nn raises in the same place; a call that it takes is refused by us."""
        weights = self._weights()
        device, dtype = weights[0].device, weights[0].dtype
        for name, weight in zip(self._names, weights, strict=True):
            taken(name, weight, device, dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dropout, once more
            template = self._theirs(**self._arguments(), device="meta", dtype=dtype)
            try:
                _as_meta(input), _as_meta(hx)
            except (NotImplementedError, RuntimeError):  # sparse and nested ones have no such twin
                pass
            else:
                template(_as_meta(input), _as_meta(hx))
        if isinstance(input, PackedSequence):
            input = input.data
        taken("input", input, device, dtype)
        several = isinstance(hx, (tuple, list))
        named = {f"hx[{i}]": state for i, state in enumerate(hx)} if several else {"hx": hx}
        for name, state in named.items():
            if state is not None:
                taken(name, state, device, dtype)
        needs = f"what torch.nn.{self._theirs.__name__} takes"
        got = f"input {describe(input)} and hx {describe(hx)}"
        checks.fail(ValueError, "input, hx", got, needs)

    def _arguments(self) -> dict[str, Any]:
        """What the constructor took."""
        raise NotImplementedError


def _as_meta(value: Any) -> Any:
    """The same without memory."""
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.to("meta"), *value[1:])
    if isinstance(value, (tuple, list)):
        return type(value)(map(_as_meta, value))
    return value.to("meta") if isinstance(value, Tensor) else value


def autocast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast everything is computed in the weights' dtype; elsewhere a dtype must fit."""
    return [
        t if t is None or t.dtype == dtype or not t.is_floating_point() else t.to(dtype)
        for t in tensors
    ]


def dense(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.device == device and tensor.layout is torch.strided

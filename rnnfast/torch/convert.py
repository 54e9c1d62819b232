"""`convert`: the recurrent modules inside a model, swapped for ours.

Knows torch.nn's modules from outside; ours by their classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from .bridge import DTYPES
from .likeness import Like
from .modules import GRU, LSTM, RNN

OURS: dict[type[nn.Module], type[Like]] = {cls._theirs: cls for cls in (RNN, LSTM, GRU)}
ONE_STEP = "a cell: of a single step, PyTorch's own is as fast"


@dataclass
class Conversion:
    """What `convert` did.

    - `model`: the model; it is the one that was given, unless that was a recurrent module itself
    - `swapped`: names of the modules that are ours now, with what they are
    - `left`: names of the recurrent modules that are still PyTorch's, with the reason
    """

    model: nn.Module
    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {_shown(name)}: {what}" for name, what in self.swapped.items()]
        if "" in self.swapped:
            lines[0] += "; the new one is .model of this result"
        lines += [f"left {_shown(name)}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "no recurrent module found"

    __repr__ = __str__


def _shown(name: str) -> str:
    return name or "the model itself"


def convert(model: nn.Module) -> Conversion:
    """Swaps each torch.nn.RNN, LSTM and GRU inside a model, in place, for one of ours.

    The new modules have the very parameters of the old ones, their training mode and their hooks,
    so optimisers, state_dicts and ties go on. A module that appears twice is swapped for one. What
    cannot be swapped (subclasses and parametrised modules, other dtypes and devices)
    is left as it is and still right; a warning names it. Cells are left, too, and without a
    warning: a single step has nothing to gain.

    Returns a `Conversion`, which tells what was swapped, what was left, and why. Raises TypeError
    for what is no nn.Module.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.GRU(4, 8, batch_first=True))
    >>> convert(model)
    swapped 1: GRU(4, 8, batch_first=True)
    >>> type(model[1])
    <class 'rnnfast.torch.modules.GRU'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; needs a torch.nn.Module")
    done = Conversion(model)
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.RNNCellBase):
            done.left[name] = ONE_STEP
            continue
        if not isinstance(module, nn.RNNBase):
            continue
        reason = _reason(module)
        if reason:
            done.left[name] = reason
            continue
        if module not in twins:
            twins[module] = _twin(module)
        done.swapped[name] = repr(twins[module])
        if name:
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent)._modules[attribute] = twins[module]
        else:
            done.model = twins[module]
    slow = {name: reason for name, reason in done.left.items() if reason is not ONE_STEP}
    if slow:
        left = "; ".join(f"{_shown(name)} ({reason})" for name, reason in slow.items())
        warnings.warn(f"rnnfast.torch.convert left as they are: {left}", UserWarning, stacklevel=2)
    return done


def _reason(module: nn.Module) -> str:
    """Why a recurrent module is left; nothing if it can be swapped."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if type(module) not in OURS:
        return f"a subclass, {type(module).__name__}, which may compute something else"
    if getattr(module, "nonlinearity", "tanh") not in ("tanh", "relu"):
        return f"nonlinearity={module.nonlinearity!r}"
    if "forward" in vars(module):
        return "its forward was replaced"
    own = module._parameters
    names = module._flat_weights_names
    missing = [name for name in names if own.get(name) is None]
    if missing:
        return f"{missing[0]} is no parameter of its own: parametrised, or pruned"
    for name in names:
        if own[name].dtype not in DTYPES:
            return f"{name} is of {own[name].dtype}, not float32 or float64"
        if own[name].device.type not in ("cpu", "meta"):
            return f"{name} is on {own[name].device}, not on the CPU"
    return ""


def _twin(module: nn.Module) -> nn.Module:
    """A module of ours with all that one of torch.nn has, parameters and hooks themselves."""
    cls = OURS[type(module)]
    twin = cls.__new__(cls)
    nn.Module.__init__(twin)
    inner = "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"
    for name, value in vars(module).items():
        if name not in inner:  # PyTorch's own lists of parameters, which would keep old ones
            vars(twin)[name] = value
    twin._prepare()
    return twin

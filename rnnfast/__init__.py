"""Recurrent networks through time on CPUs, forward and backward, from NumPy arrays.

- `RNN`, `LSTM`, `GRU`: layers over whole sequences; a call is inference, `forward_train` and
  `backward` are training, `stream` takes a step at a time
- `RNNCell`, `LSTMCell`, `GRUCell`: one step
- `functional`: the same from arrays of weights, without modules
- `learn`: losses, optimisers, batches, text and a trainer
- `torch`: the same as PyTorch's modules; needs PyTorch
- `load` and the modules' `save`; `load_torch`: weights that PyTorch saved
- `reference`: every equation in plain NumPy
- `set_num_threads`, `show_config`

Knows the public names, nothing else. `learn`, `torch` and `reference` are imported when used.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

try:
    from ._kernels import Pack as _Pack  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != f"{__name__}._kernels":
        raise
    raise ImportError(
        f"rnnfast's compiled module is missing in {__path__[0]}: run `pip install -e .` in the "
        "folder above, or start Python elsewhere if an installed rnnfast is meant"
    ) from None

from . import functional
from .calls import Clamp, Extra, States
from .checkpoints import load_torch
from .config import get_num_threads, isa, set_num_threads, show_config
from .files import load
from .modules import GRU, LSTM, RNN
from .single import GRUCell, LSTMCell, RNNCell
from .storage import DamagedFileError
from .streams import Stream

__version__ = "0.1.0"

_SUBMODULES = "learn", "reference", "torch"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Clamp",
    "DamagedFileError",
    "Extra",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "States",
    "Stream",
    "__version__",
    "functional",
    "get_num_threads",
    "isa",
    "load",
    "load_torch",
    "set_num_threads",
    "show_config",
]


if _TYPE_CHECKING:  # which else would take any name for one of ours
    from . import learn as learn
    from . import reference as reference
    from . import torch as torch
else:

    def __getattr__(name: str) -> _Any:
        """Asked where a name is not there (yet): imports a submodule when it is first used."""
        if name in _SUBMODULES:
            from importlib import import_module

            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Without `torch`, so that help() asks for no PyTorch."""
    return sorted({*globals(), "learn", "reference"})

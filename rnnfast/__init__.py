"""Recurrent networks through time on CPUs, forward and backward, from NumPy arrays.

Knows the public names, nothing else.
"""

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

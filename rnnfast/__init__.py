"""Recurrent networks through time on CPUs, forward and backward, from NumPy arrays.

Knows the public names, nothing else.
"""

from . import functional
from .config import get_num_threads, isa, set_num_threads, show_config
from .modules import GRU, LSTM, RNN, Stream, load
from .storage import DamagedFileError

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "DamagedFileError",
    "Stream",
    "__version__",
    "functional",
    "get_num_threads",
    "isa",
    "load",
    "set_num_threads",
    "show_config",
]

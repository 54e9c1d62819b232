"""`load`: the module that a file of `save` holds.

Knows the classes that can be saved; leaves the file to `storage`, and what is in it to its class.
"""

from __future__ import annotations

from typing import Any

from . import checks, storage
from .modules import GRU, LSTM, RNN
from .single import GRUCell, LSTMCell, RNNCell

CLASSES = {cls._file_name: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}


def load(path: Any) -> Any:
    """The module that a file written by `save` holds: a layer, or a cell.

    Runs no code of the file's and reads at most its size. Raises OSError if it cannot be read, and
    `DamagedFileError`, a ValueError that names path and damage, if it is not such a file.
    """
    path = checks.path("path", path)
    header, arrays = storage.read(path)
    try:
        cls = CLASSES[checks.choice("class", header["class"], CLASSES)]
        return cls._from_file(header, arrays)
    except (KeyError, TypeError, ValueError) as error:
        storage.damaged(path, f"contents that do not fit ({type(error).__name__}: {error})")

"""A drop-in for torch.nn's recurrent modules: `import rnnfast.torch`, then change one word; and
`Wrapped`, for what torch.nn's modules do not have.

The cells are torch.nn's own: one step is a product and little more, and seldom gains what a call of
ours costs.

Knows the public names, nothing else. Needs PyTorch, which nothing else of rnnfast does.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("rnnfast.torch: needs PyTorch: `pip install torch`") from None

from torch.nn import GRUCell, LSTMCell, RNNCell

from .convert import Conversion, convert
from .modules import GRU, LSTM, RNN
from .threads import share_threads as _share_threads
from .wrapped import Wrapped

_share_threads()

__all__ = [
    "GRU", "LSTM", "RNN", "Conversion", "GRUCell", "LSTMCell", "RNNCell", "Wrapped", "convert",
]  # fmt: skip

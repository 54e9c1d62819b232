"""RNN, LSTM and GRU as torch.nn has them.

Knows `likeness` and `ops`. These classes are none of torch.nn's: the compiler gives up on its
recurrent layers.

T steps, B batch, I input size, H hidden size, L layers, D directions, as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .bridge import Call
from .likeness import DTYPES, Like, autocast, dense

CELL_OF_MODE = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


class Recurrent(Like):
    """What RNN, LSTM and GRU have in common; as `torch.nn.RNNBase`."""

    _attributes = (
        "mode", "nonlinearity", "input_size", "hidden_size", "num_layers", "bias", "batch_first",
        "dropout", "bidirectional", "proj_size",
    )  # fmt: skip

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    reset_parameters = nn.RNNBase.reset_parameters
    extra_repr = nn.RNNBase.extra_repr

    def _cell_of(self) -> str:
        return CELL_OF_MODE[self.mode]

    def _arguments(self) -> dict[str, Any]:
        names = self._attributes[2:-1]
        arguments = {name: getattr(self, name) for name in names}
        if self._theirs is nn.RNN:
            arguments["nonlinearity"] = self.nonlinearity
        return arguments

    def flatten_parameters(self) -> None:
        """Nothing: parameters are read where they lie."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction."""
        each = 4 if self.bias else 2
        weights = self._weights()
        return [weights[i : i + each] for i in range(0, len(weights), each)]

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple:
        """As torch.nn's: input [T, B, I], [B, T, I] with batch_first, unbatched [T, I], or packed.

        hx: the initial state [L*D, B, H], for the LSTM a pair (h_0, c_0) of them ([L*D, H]
        unbatched), or None for zeros. Returns the output, [T, B, D*H] in the layout of the input,
        and the last state, like hx. Computed in the weights' dtype, float32 or float64; under
        autocast, other inputs are converted to it.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        pair = self._cell == "lstm"
        h_0, c_0 = (None, None) if hx is None else self._states(input, hx, pair)
        weights = self._weights()
        first = weights[0]
        if torch.is_autocast_enabled("cpu"):
            input, h_0, c_0 = autocast(first.dtype, input, h_0, c_0)
        unbatched = input.dim() == 2
        if unbatched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            h_0 = None if h_0 is None else h_0.unsqueeze(1)
            c_0 = None if c_0 is None else c_0.unsqueeze(1)
        B = input.shape[0 if self.batch_first else 1] if input.dim() == 3 else -1
        if not self._fits(input, h_0, c_0, B, first):
            self._complain(*self._given(input, h_0, c_0, unbatched))
        y, h_n, c_n = self._run(input, None, h_0, c_0, weights)
        if unbatched:
            y = y.squeeze(0 if self.batch_first else 1)
            h_n, c_n = h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
        return y, (h_n, c_n) if pair else h_n

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        pair = self._cell == "lstm"
        h_0, c_0 = (None, None) if hx is None else self._states(data, hx, pair)
        weights = self._weights()
        first = weights[0]
        if torch.is_autocast_enabled("cpu"):
            data, h_0, c_0 = autocast(first.dtype, data, h_0, c_0)
        B = int(batch_sizes[0])
        if data.dim() != 2 or not self._fits(data.unsqueeze(0), h_0, c_0, B, first):
            given = PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)
            self._complain(given, self._given(data, h_0, c_0, False)[1])
        if sorted_indices is not None:
            h_0 = None if h_0 is None else h_0.index_select(1, sorted_indices)
            c_0 = None if c_0 is None else c_0.index_select(1, sorted_indices)
        y, h_n, c_n = self._run(data, batch_sizes, h_0, c_0, weights)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return output, (h_n, c_n) if pair else h_n

    def _run(
        self, x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
        weights: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        p, seed = 0.0, None
        if self.training and self.dropout and self.num_layers > 1:
            # From PyTorch's generator, so that its seed decides the masks.
            p, seed = self.dropout, torch.randint(2**63 - 1, ())
        D = 2 if self.bidirectional else 1
        call = Call(self._cell, self.num_layers, D, self.batch_first, p)
        return ops.run(call, x, batch_sizes, h_0, c_0, seed, weights)

    def _states(self, input: Any, hx: Any, pair: bool) -> tuple[Any, Any]:
        """(h, c) or (h, None), each a tensor."""
        if not pair:
            if not isinstance(hx, Tensor):
                self._complain(input, hx)
            return hx, None
        good = isinstance(hx, (tuple, list)) and len(hx) == 2
        if not good or not all(isinstance(state, Tensor) for state in hx):
            self._complain(input, hx)
        return hx[0], hx[1]

    def _given(self, input: Tensor, h: Any, c: Any, unbatched: bool) -> tuple[Tensor, Any]:
        """A call's arguments again, from the parts that were made of them."""
        if unbatched:
            input = input.squeeze(0 if self.batch_first else 1)
            h, c = (None if s is None else s.squeeze(1) for s in (h, c))
        return input, None if h is None else (h, c) if self._cell == "lstm" else h

    def _fits(self, x: Tensor, h: Tensor | None, c: Tensor | None, B: int, weight: Tensor) -> bool:
        """Whether the kernels can take a call, judged by what costs little."""
        device, dtype = weight.device, weight.dtype
        if dtype not in DTYPES or device.type not in ("cpu", "meta"):
            return False
        if x.dim() != 3 or x.shape[2] != self.input_size or not dense(x, device, dtype):
            return False
        rows = self.num_layers * (2 if self.bidirectional else 1)
        states = rows, B, self.hidden_size
        if h is not None and (tuple(h.shape) != states or not dense(h, device, dtype)):
            return False
        return c is None or (tuple(c.shape) == states and dense(c, device, dtype))


class RNN(Recurrent):
    """`torch.nn.RNN`, with the same arguments, parameters, results and errors, but for its speed.

    >>> rnn = RNN(3, 5, nonlinearity="relu")
    >>> y, h_n = rnn(torch.zeros(7, 2, 3))
    >>> y.shape, h_n.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """

    _theirs = nn.RNN
    nonlinearity: str

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0,
        bidirectional: bool = False, device: Any = None, dtype: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        own = dict(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers,
            nonlinearity=nonlinearity, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, **others,
        )  # fmt: skip
        self._build(own, device, dtype)


class LSTM(Recurrent):
    """`torch.nn.LSTM`, with the same arguments, parameters, results and errors, but for its speed.

    proj_size is not built yet, so 0.

    >>> lstm = LSTM(3, 5, num_layers=2, bidirectional=True)
    >>> y, (h_n, c_n) = lstm(torch.zeros(7, 2, 3))
    >>> y.shape, h_n.shape, c_n.shape
    (torch.Size([7, 2, 10]), torch.Size([4, 2, 5]), torch.Size([4, 2, 5]))
    """

    _theirs = nn.LSTM

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        proj_size: int = 0, device: Any = None, dtype: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        own = dict(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional,
            proj_size=proj_size, **others,
        )  # fmt: skip
        self._build(own, device, dtype)


class GRU(Recurrent):
    """`torch.nn.GRU`, with the same arguments, parameters, results and errors, but for its speed.

    >>> gru = GRU(3, 5, batch_first=True)
    >>> y, h_n = gru(torch.zeros(2, 7, 3))
    >>> y.shape, h_n.shape
    (torch.Size([2, 7, 5]), torch.Size([1, 2, 5]))
    """

    _theirs = nn.GRU

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: Any = None, dtype: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        own = dict(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, **others,
        )  # fmt: skip
        self._build(own, device, dtype)

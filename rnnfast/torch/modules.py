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

from ..cells import CELLS
from . import ops
from .bridge import Call, Misfit, describe
from .likeness import Like, in_dtype

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

    @property
    def _cell(self) -> str:
        return CELL_OF_MODE[self.mode]

    def _arguments(self) -> dict[str, Any]:
        names = self._attributes[2 : None if self._theirs is nn.LSTM else -1]  # without proj_size
        arguments = {name: getattr(self, name) for name in names}
        if self._theirs is nn.RNN:
            arguments["nonlinearity"] = self.nonlinearity
        return arguments

    def flatten_parameters(self) -> None:
        """Nothing: parameters are read where they lie."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction."""
        each = sum(name.endswith("_l0") for name in self._names)
        weights = self._weights()
        return [weights[i : i + each] for i in range(0, len(weights), each)]

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple:
        """As torch.nn's: input [T, B, I], [B, T, I] with batch_first, unbatched [T, I], or packed.

        hx: the initial state [L*D, B, H], for the LSTM a pair (h_0, c_0) of them ([L*D, H]
        unbatched), or None for zeros. Returns the output, [T, B, D*H] in the layout of the input,
        and the last state, like hx. With proj_size, h has as many numbers instead of H. Computed in
        the weights' dtype, float32 or float64; under autocast, other inputs are converted to it.
        """
        weights = self._weights()
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        pair = self._cell == "lstm"
        h, c = self._states(input, hx) if hx is not None else (None, None)
        if torch.is_autocast_enabled("cpu"):
            x, h, c = in_dtype(weights[0].dtype, x, h, c)
        try:
            if packed:
                x, h, c = self._packed(x, input, h, c, weights)
            elif x.dim() == 2:
                x, h, c = self._unbatched(x, h, c, weights)
            else:
                x, h, c = self._run(x, None, h, c, weights)
        except Misfit as misfit:
            self._complain(misfit, input, hx)
        return x, (h, c) if pair else h

    def _unbatched(
        self, x: Tensor, h: Tensor | None, c: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch = 0 if self.batch_first else 1
        states = (None if s is None else s.unsqueeze(1) for s in (h, c))
        y, h, c = self._run(x.unsqueeze(batch), None, *states, weights)
        return y.squeeze(batch), h.squeeze(1), None if c is None else c.squeeze(1)

    def _packed(
        self, x: Tensor, input: PackedSequence, h: Tensor | None, c: Tensor | None,
        weights: list[Tensor],
    ) -> tuple[PackedSequence, Tensor, Tensor | None]:  # fmt: skip
        _, batch_sizes, order, back = input
        if order is not None:
            h, c = (s if s is None or s.dim() != 3 else s.index_select(1, order) for s in (h, c))
        y, h, c = self._run(x, batch_sizes, h, c, weights)
        if back is not None:
            h, c = h.index_select(1, back), None if c is None else c.index_select(1, back)
        return PackedSequence(y, batch_sizes, order, back), h, c

    def _run(
        self, x: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None,
        weights: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        p, seed = 0.0, None
        if self.training and self.dropout and self.num_layers > 1:
            # From PyTorch's generator, so that its seed decides the masks.
            device = "meta" if x.is_meta else "cpu"  # not the default one
            p, seed = self.dropout, torch.randint(2**63 - 1, (), device=device)
        D = 2 if self.bidirectional else 1
        call = Call(self._cell, self.num_layers, D, self.batch_first, p)
        return ops.run(call, x, batch_sizes, h_0, c_0, seed, weights)

    def _states(self, input: Any, hx: Any) -> tuple[Any, Any]:
        """(h, c), or (h, None) of a cell without c."""
        given = hx if self._cell == "lstm" else (hx,)
        needed = len(CELLS[self._cell].states)
        good = isinstance(given, (tuple, list)) and len(given) == needed
        if not good or not all(isinstance(state, Tensor) for state in given):
            needs = "a pair of tensors, (h_0, c_0)" if needed == 2 else "a tensor"
            self._complain(Misfit(f"hx: got {describe(hx)}; needs {needs}"), input, hx)
        return given[0], given[1] if needed == 2 else None


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

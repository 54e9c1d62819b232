"""RNNCell, LSTMCell and GRUCell as torch.nn has them: one step of one layer.

Knows `likeness` and `ops`. A cell is a layer whose sequence has one step.

B batch, I input size, H hidden size, as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .bridge import Call, Misfit, describe
from .likeness import Like, in_dtype


class Cell(Like):
    """What the three cells have in common; as `torch.nn.RNNCellBase`."""

    _attributes = "input_size", "hidden_size", "bias", "nonlinearity"

    input_size: int
    hidden_size: int
    bias: bool

    reset_parameters = nn.RNNCellBase.reset_parameters
    extra_repr = nn.RNNCellBase.extra_repr

    @property
    def _cell(self) -> str:
        if self._theirs is nn.RNNCell:
            return f"rnn_{self.nonlinearity}"
        return {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}[self._theirs]

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._attributes if hasattr(self, name)}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As torch.nn's: input [B, I] or [I] and the state h [B, H] or [H] -> the next state.

        For the LSTM a state is a pair (h, c); None stands for zeros. dtypes as of `LSTM`.
        """
        weights = self._weights()
        pair = self._cell == "lstm"
        if pair and hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            self._complain(Misfit(f"hx: got {describe(hx)}; needs a pair (h, c)"), input, hx)
        h, c = (None, None) if hx is None else hx if pair else (hx, None)
        if torch.is_autocast_enabled("cpu"):
            input, h, c = in_dtype(weights[0].dtype, input, h, c)
        unbatched = input.dim() == 1
        at = (None, None) if unbatched else (None,)
        call = Call(self._cell, 1, 1, False, 0.0)
        try:
            states = (None if s is None else s[at] for s in (h, c))
            _, h, c = ops.run(call, input[at], None, *states, None, weights)
        except Misfit as misfit:
            self._complain(misfit, input, hx)
        at = (0, 0) if unbatched else (0,)
        return (h[at], c[at]) if pair else h[at]


class RNNCell(Cell):
    """`torch.nn.RNNCell`, with the same arguments, parameters, results and errors.

    >>> RNNCell(3, 5)(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    _theirs = nn.RNNCell
    nonlinearity: str

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        own = dict(
            input_size=input_size, hidden_size=hidden_size, bias=bias, nonlinearity=nonlinearity
        )
        self._build(own, device, dtype)


class LSTMCell(Cell):
    """`torch.nn.LSTMCell`, with the same arguments, parameters, results and errors.

    >>> h, c = LSTMCell(3, 5)(torch.zeros(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    _theirs = nn.LSTMCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        self._build(dict(input_size=input_size, hidden_size=hidden_size, bias=bias), device, dtype)


class GRUCell(Cell):
    """`torch.nn.GRUCell`, with the same arguments, parameters, results and errors.

    >>> GRUCell(3, 5)(torch.zeros(3)).shape
    torch.Size([5])
    """

    _theirs = nn.GRUCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        self._build(dict(input_size=input_size, hidden_size=hidden_size, bias=bias), device, dtype)

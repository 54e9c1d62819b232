"""RNNCell, LSTMCell and GRUCell as torch.nn has them: one step of one layer.

Knows `likeness` and `ops`. A cell is a layer whose sequence has one step.

B batch, I input size, H hidden size, as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .bridge import Call
from .likeness import DTYPES, Like, autocast, dense


class Cell(Like):
    """What the three cells have in common; as `torch.nn.RNNCellBase`."""

    _attributes = "input_size", "hidden_size", "bias", "nonlinearity"

    input_size: int
    hidden_size: int
    bias: bool

    reset_parameters = nn.RNNCellBase.reset_parameters
    extra_repr = nn.RNNCellBase.extra_repr

    def _cell_of(self) -> str:
        if self._theirs is nn.RNNCell:
            return f"rnn_{self.nonlinearity}"
        return {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}[self._theirs]

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._attributes if hasattr(self, name)}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As torch.nn's: input [B, I] or [I] and the state h [B, H] or [H] -> the next state.

        For the LSTM a state is a pair (h, c); None stands for zeros. dtypes as of `LSTM`.
        """
        pair = self._cell == "lstm"
        h = c = None
        if hx is not None:
            if pair and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
                self._complain(input, hx)
            h, c = hx if pair else (hx, None)
            if not isinstance(h, Tensor) or (pair and not isinstance(c, Tensor)):
                self._complain(input, hx)
        weights = self._weights()
        first = weights[0]
        if torch.is_autocast_enabled("cpu"):
            input, h, c = autocast(first.dtype, input, h, c)
        if not self._fits(input, h, c, first):
            self._complain(input, None if h is None else (h, c) if pair else h)
        unbatched = input.dim() == 1

        def as_step(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor[None, None] if unbatched else tensor.unsqueeze(0)

        call = Call(self._cell, 1, 1, False, 0.0)
        states = as_step(h), as_step(c)
        _, h, c = ops.run(call, as_step(input), None, *states, None, weights)
        h, c = (None if s is None else s[0, 0] if unbatched else s.squeeze(0) for s in (h, c))
        return (h, c) if pair else h

    def _fits(self, x: Tensor, h: Tensor | None, c: Tensor | None, weight: Tensor) -> bool:
        """Whether the kernels can take a call."""
        device, dtype = weight.device, weight.dtype
        if dtype not in DTYPES or device.type not in ("cpu", "meta"):
            return False
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size or not dense(x, device, dtype):
            return False
        shape = (*x.shape[:-1], self.hidden_size)
        if h is not None and (tuple(h.shape) != shape or not dense(h, device, dtype)):
            return False
        return c is None or (tuple(c.shape) == shape and dense(c, device, dtype))


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

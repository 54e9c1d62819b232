"""The table of cells: gates, states, parameters and their shapes; everybody loops over it.

Knows: names and sizes. Knows nothing of arithmetic (see `reference`), of kernels or of arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class Cell:
    """One row of the table: a recurrent cell as its parameters and its tape see it.

    `gates` is the order of the blocks of H rows in `weight_ih`, `weight_hh` and both biases
    (PyTorch's order). `tape_gates` is what the tape keeps per (step, row), in this order; `states`
    are the sequences carried through time.
    """

    name: str
    number: int  # the same as `rf_cell_id` in csrc/kernels.h
    gates: tuple[str, ...]
    states: tuple[str, ...]
    tape_gates: tuple[str, ...]

    def weight_shapes(self, input_size: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's parameters in one direction, in PyTorch's order."""
        rows = len(self.gates) * hidden_size
        return {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, hidden_size),
            "bias_ih": (rows,),
            "bias_hh": (rows,),
        }


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 0, ("h",), ("h",), ()),
        Cell("rnn_relu", 1, ("h",), ("h",), ()),
        Cell("lstm", 2, ("i", "f", "g", "o"), ("h", "c"), ("i", "f", "g", "o")),
        # "hn" is R_n h + b_hn: what the reset gate multiplies, needed for its gradient.
        Cell("gru", 3, ("r", "z", "n"), ("h",), ("r", "z", "n", "hn")),
        Cell("gru_reset_before", 4, ("r", "z", "n"), ("h",), ("r", "z", "n")),
    )
}

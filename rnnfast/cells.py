"""The table of cells: gates, states, parameters and their shapes; everybody loops over it.

Knows: names and sizes. Knows nothing of arithmetic (see `reference`), of kernels or of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

# Of gains and biases of a layer normalisation: those of the products, those of c.
NORM_GATES = "weight_norm_ih", "weight_norm_hh"
NORM_C = "weight_norm_c", "bias_norm_c"

PARAMETERS = (
    "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_peephole", *NORM_GATES, *NORM_C,
    "weight_hr",
)  # fmt: skip
# Those of single units, besides the biases: PARAMETERS[UNIT_WEIGHTS].
UNIT_WEIGHTS = slice(4, 9)

# By whether there are peepholes, what is normalised, and whether there is a projection: small calls
# feel it if they are put together.
_NAMES = {
    (peepholes, norms, projected): tuple(
        name
        for name in PARAMETERS
        if (peepholes or name != "weight_peephole")
        and (name in norms or name not in NORM_GATES + NORM_C)
        and (projected or name != "weight_hr")
    )
    for peepholes in (False, True)
    for norms in ((), NORM_GATES, NORM_GATES + NORM_C)
    for projected in (False, True)
}


@dataclass(frozen=True)
class Cell:
    """One row of the table: a recurrent cell as its parameters and its tape see it.

    `kind` is the module that has it, with these options; all others of its kind are at the values
    of DEFAULTS. `gates` is the order of the blocks of H rows in `weight_ih`, `weight_hh` and both
    biases (PyTorch's order). `tape_gates` is what the tape keeps per (step, row), in this order;
    `states` are the sequences carried through time. `peepholes` are the gates that see c, each
    through one weight for each unit, in the order of `weight_peephole`; `norms` the parameters of a
    layer normalisation. A `general` cell has any activations and clips, its `Functions`, and on its
    tape, in place of gates, what these are taken of, before it is clipped.
    """

    name: str
    number: int  # the same as `rf_cell_id` in csrc/kernels.h
    kind: str
    own_options: Mapping[str, Any] = field(hash=False)
    gates: tuple[str, ...]
    states: tuple[str, ...]
    tape_gates: tuple[str, ...]
    peepholes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    general: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """All options of its kind that choose between cells, as this one has them.

        Of a general cell without its functions, one of which is a general RNN's nonlinearity.
        """
        if self.general and self.kind == "RNN":
            return {}
        return {**DEFAULTS[self.kind], **self.own_options}

    def parameters(self, projected: bool = False) -> tuple[str, ...]:
        """Names of one layer's parameters in one direction, the biases among them."""
        return _NAMES[bool(self.peepholes), self.norms, projected]

    @cached_property
    def unit_weights(self) -> tuple[int, ...]:
        """How many numbers of a unit those of PARAMETERS[UNIT_WEIGHTS] have; 0: there is none."""
        blocks = dict.fromkeys(NORM_GATES, len(self.gates)) | dict.fromkeys(NORM_C, 1)
        of_norms = (blocks[name] if name in self.norms else 0 for name in NORM_GATES + NORM_C)
        return len(self.peepholes), *of_norms

    def weight_shapes(
        self, input_size: int, hidden_size: int, proj_size: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's parameters in one direction, PyTorch's in its order."""
        rows = len(self.gates) * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, proj_size or hidden_size),
            "bias_ih": (rows,),
            "bias_hh": (rows,),
            "weight_peephole": (len(self.peepholes) * hidden_size,),
            "weight_hr": (proj_size, hidden_size),
        }
        if self.norms:
            shapes |= dict.fromkeys(NORM_GATES, (rows,)) | dict.fromkeys(NORM_C, (hidden_size,))
        return {name: shapes[name] for name in self.parameters(proj_size > 0)}


# ONNX's activations, and what their parameters, alpha and beta, are where they are not given: what
# they are in ONNX's operators of the same name, but for the last two of which it has none.
ACTIVATIONS: dict[str, tuple[float, ...]] = {
    "sigmoid": (),
    "tanh": (),
    "relu": (),
    "softsign": (),
    "softplus": (),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "elu": (1.0,),
    "hardsigmoid": (0.2, 0.5),
    "affine": (1.0, 0.0),
    "scaledtanh": (1.0, 1.0),
}


class Functions(NamedTuple):
    """What a general cell computes with.

    activations: f of an RNN; f of a GRU's r and z, g of its n; f of an LSTM's i, f and o, g of its
    g, h of c. Each a name in ACTIVATIONS, or a tuple of it and of all its parameters. clip: what f
    and g are taken of is held within -clip and clip; cell_clip: so is the new c of an LSTM; None:
    no limit.
    """

    activations: tuple[Any, ...]
    clip: float | None = None
    cell_clip: float | None = None


# The activations of cells that are not general; an RNN's is its nonlinearity.
PLAIN = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}

# Of each kind of layer, the options that choose between cells.
DEFAULTS: dict[str, dict[str, Any]] = {
    "RNN": {"nonlinearity": "tanh", "layer_norm": None},
    "LSTM": {"peephole": False, "coupled": False, "layer_norm": None},
    "GRU": {"reset_after": True, "layer_norm": None},
}

# Of a GRU, "hn" is R_n h + b_hn: what the reset gate multiplies, needed for its gradient. A coupled
# LSTM's forget gate is 1 - i. Of a normalised cell the tape has W x and R h as they are, "x" and
# "h" and the gate's name: their statistics, and the gates, are sooner computed again than read.
_RAW_LSTM = "xi", "xf", "xg", "xo", "hi", "hf", "hg", "ho"

CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 0, "RNN", {}, ("h",), ("h",), ()),
        Cell("rnn_relu", 1, "RNN", {"nonlinearity": "relu"}, ("h",), ("h",), ()),
        Cell(
            "lstm", 2, "LSTM", {},
            ("i", "f", "g", "o"), ("h", "c"), ("i", "f", "g", "o"),
        ),
        Cell(
            "gru", 3, "GRU", {},
            ("r", "z", "n"), ("h",), ("r", "z", "n", "hn"),
        ),
        Cell(
            "gru_reset_before", 4, "GRU", {"reset_after": False},
            ("r", "z", "n"), ("h",), ("r", "z", "n"),
        ),
        Cell(
            "lstm_peephole", 5, "LSTM", {"peephole": True},
            ("i", "f", "g", "o"), ("h", "c"), ("i", "f", "g", "o"), ("i", "f", "o"),
        ),
        Cell(
            "lstm_coupled", 6, "LSTM", {"coupled": True},
            ("i", "g", "o"), ("h", "c"), ("i", "g", "o"),
        ),
        Cell(
            "lstm_coupled_peephole", 7, "LSTM", {"peephole": True, "coupled": True},
            ("i", "g", "o"), ("h", "c"), ("i", "g", "o"), ("i", "o"),
        ),
        Cell(
            "rnn_tanh_norm", 8, "RNN", {"layer_norm": "gates"},
            ("h",), ("h",), ("xh", "hh"), (), NORM_GATES,
        ),
        Cell(
            "rnn_relu_norm", 9, "RNN", {"nonlinearity": "relu", "layer_norm": "gates"},
            ("h",), ("h",), ("xh", "hh"), (), NORM_GATES,
        ),
        Cell(
            "lstm_norm", 10, "LSTM", {"layer_norm": "gates"},
            ("i", "f", "g", "o"), ("h", "c"), _RAW_LSTM, (), NORM_GATES + NORM_C,
        ),
        Cell(
            "lstm_norm_cell", 11, "LSTM", {"layer_norm": "gates+cell"},
            ("i", "f", "g", "o"), ("h", "c"), _RAW_LSTM, (), NORM_GATES + NORM_C,
        ),
        Cell(
            "gru_norm", 12, "GRU", {"layer_norm": "gates"},
            ("r", "z", "n"), ("h",), ("xr", "xz", "xn", "hr", "hz", "hn"), (), NORM_GATES,
        ),
    )
}  # fmt: skip

# The general cells are the others with more: an RNN's z is on the tape, which needs no gate if it
# is tanh or relu.
for _number, _name in enumerate(
    (
        "rnn", "lstm", "lstm_peephole", "lstm_coupled", "lstm_coupled_peephole", "gru",
        "gru_reset_before",
    ),
    len(CELLS),
):  # fmt: skip
    _plain = CELLS["rnn_tanh" if _name == "rnn" else _name]
    CELLS[f"{_name}_general"] = replace(
        _plain,
        name=f"{_name}_general",
        number=_number,
        tape_gates=_plain.tape_gates or _plain.gates,
        general=True,
    )

_ROWS = {
    (cell.kind, cell.general, frozenset(cell.options.items())): cell for cell in CELLS.values()
}


def cell_of(kind: str, general: bool = False, **options: Any) -> Cell:
    """The row that a kind of layer and all of its options ask for.

    >>> cell_of("GRU", reset_after=False, layer_norm=None).name
    'gru_reset_before'
    """
    return _ROWS[kind, general, frozenset(options.items())]

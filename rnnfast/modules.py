"""RNN, LSTM and GRU: the modules, by the arguments that their constructors take.

Knows which options a class has and what they ask for; what all of them do is `recurrent`'s.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from . import checks, functional
from .cells import Functions
from .functional import GRU_PLAIN, LSTM_PLAIN
from .layer import Row
from .merges import CONCAT
from .recurrent import LATER, Recurrent, argument


class RNN(Recurrent):
    """A stack of simple recurrent layers, h' = tanh (or relu) of W x + b_ih + R h + b_hh.

    Arguments as of torch.nn.RNN: input_size and hidden_size, at least 1; num_layers; nonlinearity,
    "tanh" or "relu"; bias; batch_first: x and y are [B, T, ...]; dropout: the probability, in
    [0, 1], with which `forward_train` drops a number between two layers; bidirectional.

    layer_norm: "gates" normalises W x and R h, each over its whole row, and gives each gains
    (`weight_norm_ih`, `weight_norm_hh`; one at first, and the biases, which are added after it,
    zero; equations: `rnnfast.reference`); None: nothing is. W x is seen by its direction then, not
    by its size: of a single input (input_size=1) little but the sign is left. Not beside other
    activations or a clip.

    Then merge: how both directions become one y, and so the x of the layer above: side by side
    ("concat"), or as their "sum", "mean" or product ("mul"), which have H numbers instead of 2 H
    (Keras's merge_mode, where "mean" is "ave"); states stay apart. learn_initial: what a call
    without a state starts from is parameters, too, `h_0` (and `c_0`) [L*D, 1, H], the same for
    every row, and zero at first; a call with a state neither uses nor changes them. drop_connect:
    the probability with which `forward_train` drops a number of `weight_hh`, for all steps and rows
    of a call (Merity, Keskar and Socher, arXiv 1708.02182).

    recurrent_dropout: the probability with which the product with R does not see a number of h, in
    `forward_train`, drawn for each step, or with variational once for all of a call (Gal and
    Ghahramani, arXiv 1512.05287). zoneout: that with which a number of h keeps its value in a step,
    for the LSTM also a pair, for h and c (Krueger et al., arXiv 1606.01305); elsewhere it is
    expected, and each step has this share of the states before. padding: what y is at steps that
    are missing, "zeros" or "hold", the last one before them in the order of processing (as in
    Keras), zero if there is none; with merged directions "zeros" alone.

    dtype: np.float32 or np.float64; seed: an integer for the initial parameters (uniform within
    1/sqrt(H) of zero) and for all that is dropped, or None for one from the system.

    activations: a tuple of one, in the place of nonlinearity, which is to be left out then: one of
    ONNX's names in lower case (`rnnfast.cells.ACTIVATIONS`), or a tuple of it and its alpha, or
    alpha and beta. clip: what it is taken of is held within -clip and clip; None: no limit.

    The states are one array. Raises TypeError or ValueError for an argument that is not such.

    >>> rnn = RNN(3, 5, nonlinearity="relu")
    >>> y, h_n = rnn(np.zeros((7, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    """

    _file_name = "RNN"
    _later: ClassVar[dict[str, Any]] = {**LATER, "activations": None, "clip": None}

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0,
        bidirectional: bool = False, *, layer_norm: str | None = None,
        activations: Any = None, clip: float | None = None, merge: str = CONCAT,
        learn_initial: bool = False, drop_connect: float = 0.0,
        recurrent_dropout: float = 0.0, variational: bool = False, zoneout: Any = 0.0,
        padding: str = "zeros", dtype: Any = np.float32, seed: int | None = None,
    ) -> None:  # fmt: skip
        self._build(
            dict(
                input_size=input_size, hidden_size=hidden_size, num_layers=num_layers,
                nonlinearity=nonlinearity, bias=bias, batch_first=batch_first, dropout=dropout,
                bidirectional=bidirectional, layer_norm=layer_norm,
                activations=activations, clip=clip, merge=merge,
                learn_initial=learn_initial, drop_connect=drop_connect,
                recurrent_dropout=recurrent_dropout, variational=variational, zoneout=zoneout,
                padding=padding, dtype=dtype, seed=seed,
            )
        )  # fmt: skip

    @staticmethod
    def _row_of(arguments: dict[str, Any]) -> Row:
        names = "nonlinearity", "layer_norm", "activations", "clip"
        cell, functions = row = functional.rnn_cell(*map(arguments.__getitem__, names))
        if arguments["activations"] is not None:
            own = functions.activations if functions else (cell.options["nonlinearity"],)
            arguments["activations"] = own
        arguments["clip"] = functions and functions.clip
        return row

    nonlinearity = argument("nonlinearity", "tanh or relu; of no meaning beside activations.")
    activations = argument("activations", "What stands in the place of nonlinearity, or None.")
    clip = argument("clip", "Limit of what activations are taken of, or None.")


class LSTM(Recurrent):
    """A stack of layers of long short-term memory, gates i f g o as in torch.nn.LSTM.

    Arguments as of `RNN`, without nonlinearity. proj_size: h, and so y and the input of the layers
    above, is a projection to so many numbers, fewer than H (`weight_hr`); 0: none. peephole: the
    gates i and f see the c before the step and o the one after it, each unit through a weight of
    its own (`weight_peephole`, in this order). coupled: the forget gate is 1 - i, and has no
    parameters (CIFG); gates i g o. forget_bias: what the biases of the forget gate sum up to at
    first, 1 to remember from the start, or None for random ones. layer_norm: "gates" normalises
    c, too, on its way into h, with gain and bias (`weight_norm_c`, `bias_norm_c`), and "gates+cell"
    the c that goes on to the next step; neither beside peephole, coupled, other activations or
    clips. The states are a pair, (h, c).

    activations: f of i, f and o, g of g, h of c, each as of `RNN`; clip: what f and g are taken of
    is held within -clip and clip; cell_clip: so is c, before o and h see it. They are as in ONNX,
    and cell_clip as in TensorFlow.

    >>> lstm = LSTM(3, 5, num_layers=2, bidirectional=True)
    >>> y, (h_n, c_n) = lstm(np.zeros((7, 2, 3), np.float32), lengths=[7, 4])
    >>> y.shape, h_n.shape, c_n.shape
    ((7, 2, 10), (4, 2, 5), (4, 2, 5))
    """

    _file_name = "LSTM"
    _later: ClassVar[dict[str, Any]] = {
        **LATER, "peephole": False, "coupled": False, "forget_bias": None,
        "activations": LSTM_PLAIN, "clip": None, "cell_clip": None,
    }  # fmt: skip

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        proj_size: int = 0, *, peephole: bool = False, coupled: bool = False,
        forget_bias: float | None = None, layer_norm: str | None = None,
        activations: Any = LSTM_PLAIN,
        clip: float | None = None, cell_clip: float | None = None, merge: str = CONCAT,
        learn_initial: bool = False, drop_connect: float = 0.0, recurrent_dropout: float = 0.0,
        variational: bool = False, zoneout: Any = 0.0, padding: str = "zeros",
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self._build(
            dict(
                input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
                batch_first=batch_first, dropout=dropout, bidirectional=bidirectional,
                proj_size=proj_size, peephole=peephole, coupled=coupled, forget_bias=forget_bias,
                layer_norm=layer_norm, activations=activations, clip=clip, cell_clip=cell_clip,
                merge=merge,
                learn_initial=learn_initial, drop_connect=drop_connect,
                recurrent_dropout=recurrent_dropout, variational=variational, zoneout=zoneout,
                padding=padding, dtype=dtype, seed=seed,
            )
        )  # fmt: skip

    @staticmethod
    def _row_of(arguments: dict[str, Any]) -> Row:
        size = arguments["proj_size"] = checks.integer("proj_size", arguments["proj_size"], 0)
        if size >= arguments["hidden_size"]:
            checks.fail(ValueError, "proj_size", str(size), "less than hidden_size, or 0 for none")
        names = "peephole", "coupled", "layer_norm", "activations", "clip", "cell_clip"
        cell, functions = row = functional.lstm_cell(*map(arguments.__getitem__, names))
        arguments.update((functions or Functions(LSTM_PLAIN))._asdict())  # as they were checked
        if arguments["forget_bias"] is not None:
            value = checks.finite("forget_bias", arguments["forget_bias"], arguments["dtype"])
            arguments["forget_bias"] = value
            if "f" not in cell.gates:
                needs = "None: a coupled LSTM's forget gate has no bias"
                checks.fail(ValueError, "forget_bias", str(value), needs)
            if not arguments["bias"]:
                checks.fail(ValueError, "forget_bias", str(value), "None where bias is False")
        return row

    def _fill_more(self) -> None:
        value = self._arguments["forget_bias"]
        if value is None:
            return
        at = self._cell.gates.index("f") * self.hidden_size
        for name, bias in self._params.items():
            if name.startswith(("bias_ih", "bias_hh")):
                bias[at : at + self.hidden_size] = value if name.startswith("bias_ih") else 0

    proj_size = argument("proj_size", "P: numbers that h is projected to, or 0.")
    peephole = argument("peephole", "Whether gates see c.")
    coupled = argument("coupled", "Whether the forget gate is 1 - i.")
    forget_bias = argument("forget_bias", "What the forget gate's biases summed up to at first.")
    activations = argument("activations", "f, g and h.")
    clip = argument("clip", "Limit of what f and g are taken of, or None.")
    cell_clip = argument("cell_clip", "Limit of c, or None.")


class GRU(Recurrent):
    """A stack of layers of gated recurrent units, gates r z n as in torch.nn.GRU.

    Arguments as of `RNN`, without nonlinearity; reset_after: the reset gate scales R h + b_hn
    (PyTorch's form), or, if False, h before the product (ONNX's default), then without layer_norm.
    layer_norm: "gates" or None; zoneout: one number, of h. activations: f of r and z, g of n; clip:
    what they are taken of is held within -clip and clip; as of `LSTM`. The states are one array.

    >>> gru = GRU(3, 5, batch_first=True)
    >>> y, h_n = gru(np.zeros((2, 7, 3), np.float32))
    >>> y.shape, h_n.shape
    ((2, 7, 5), (1, 2, 5))
    """

    _file_name = "GRU"
    _later: ClassVar[dict[str, Any]] = {**LATER, "activations": GRU_PLAIN, "clip": None}

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
        reset_after: bool = True, layer_norm: str | None = None,
        activations: Any = GRU_PLAIN, clip: float | None = None,
        merge: str = CONCAT, learn_initial: bool = False, drop_connect: float = 0.0,
        recurrent_dropout: float = 0.0, variational: bool = False, zoneout: Any = 0.0,
        padding: str = "zeros", dtype: Any = np.float32, seed: int | None = None,
    ) -> None:  # fmt: skip
        self._build(
            dict(
                input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
                batch_first=batch_first, dropout=dropout, bidirectional=bidirectional,
                reset_after=reset_after, layer_norm=layer_norm,
                activations=activations, clip=clip, merge=merge,
                learn_initial=learn_initial, drop_connect=drop_connect,
                recurrent_dropout=recurrent_dropout, variational=variational, zoneout=zoneout,
                padding=padding, dtype=dtype, seed=seed,
            )
        )  # fmt: skip

    @staticmethod
    def _row_of(arguments: dict[str, Any]) -> Row:
        names = "reset_after", "layer_norm", "activations", "clip"
        _, functions = row = functional.gru_cell(*map(arguments.__getitem__, names))
        own = functions or Functions(GRU_PLAIN)
        arguments.update(activations=own.activations, clip=own.clip)  # as they were checked
        return row

    reset_after = argument("reset_after", "Whether the reset gate scales R h + b_hn.")
    activations = argument("activations", "f and g.")
    clip = argument("clip", "Limit of what f and g are taken of, or None.")

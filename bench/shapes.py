"""The table of shapes that the benchmarks measure, and the weights and data that go with a shape.

Knows names, sizes and NumPy's random numbers. Knows neither the libraries (see `libraries`) nor
time. T steps, B batch, I input size, H hidden size, G gates, L layers, D directions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .. import cells
from ..parameters import parameter_shapes, size
from .happenings import HAPPENINGS

# One call is: a pass over the sequence; that and all gradients; T calls, one for each step.
MODES = ("inference", "training", "stream")
# A general cell is not one layer to measure, but as many as there are activations and clips.
CELLS = {name: row for name, row in cells.CELLS.items() if not row.general}
# Of a model of PyTorch's around the layer (see `models`) one call is: a step of training, optimiser
# and all; the same of the compiled model; a pass from tokens to scores.
MODEL_MODES = ("step", "step-compiled", "predict")
TRAINING = ("training", "step", "step-compiled")
VOCABULARY = 96  # of the models: the printable characters of ASCII, and a line's end
NAME = re.compile(
    r"([a-z_]+)-i(\d+)-h(\d+)(?:-p(\d+))?-b(\d+)-t(\d+)(?:-l(\d+))?(-bi)?(-uneven)?(-float64)?"
    rf"(?:-({'|'.join(HAPPENINGS)}))?"
)


@dataclass(frozen=True)
class Shape:
    """Layers of one cell of the table in `rnnfast.cells`, their sizes and dtype.

    uneven: the rows' lengths go from T down to T/4, in random order; projection: what h is
    projected to, or 0; happens: between the steps of one layer in one direction, see
    `happenings`, or "".

    >>> Shape("lstm", T=64, B=32, I=256, H=256).name
    'lstm-i256-h256-b32-t64'
    >>> Shape("gru", T=9, B=4, I=2, H=3, layers=2, directions=2, uneven=True).name
    'gru-i2-h3-b4-t9-l2-bi-uneven'
    """

    cell: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    directions: int = 1
    uneven: bool = False
    dtype: str = "float32"
    projection: int = 0
    happens: str = ""
    stands_for: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """By which `--shapes` takes it; what is usual is not named."""
        return (
            f"{self.cell}-i{self.I}-h{self.H}"
            + f"-p{self.projection}" * (self.projection > 0)
            + f"-b{self.B}-t{self.T}"
            + f"-l{self.layers}" * (self.layers > 1)
            + "-bi" * (self.directions == 2)
            + "-uneven" * self.uneven
            + f"-{self.dtype}" * (self.dtype != "float32")
            + f"-{self.happens}" * bool(self.happens)
        )

    @property
    def lengths(self) -> np.ndarray | None:
        """Valid steps of each row [B], or None if all have T.

        >>> sorted(Shape("lstm", T=8, B=4, I=1, H=1, uneven=True).lengths.tolist())
        [2, 4, 6, 8]
        """
        if not self.uneven:
            return None
        lengths = np.linspace(self.T, -(-self.T // 4), self.B).round().astype(np.int64)
        return np.random.default_rng(0).permutation(lengths)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by PyTorch's names."""
        return parameter_shapes(
            CELLS[self.cell], self.I, self.H, self.layers, self.directions, True, self.projection
        )

    @property
    def output(self) -> int:
        """Numbers of h, and of y in one direction."""
        return self.projection or self.H

    def numbers(self, kind: str) -> int:
        """How many numbers all matrices of a kind have together, "weight_ih" or "weight_hh".

        >>> Shape("gru", T=1, B=1, I=2, H=3).numbers("weight_ih")
        18
        """
        return sum(size(shape) for name, shape in self.parameters.items() if name.startswith(kind))

    def operations(self, mode: str) -> int:
        """Multiplications and additions of the products over the rows' valid steps.

        2·T·B·G·H·(I+H) for one layer in one direction; three times that for training. Of a model,
        the linear layer's as well.

        >>> Shape("gru", T=1, B=1, I=2, H=3).operations("training")
        270
        """
        steps = self.T * self.B if self.lengths is None else int(self.lengths.sum())
        numbers = sum(map(self.numbers, ("weight_ih", "weight_hh", "weight_hr")))
        if mode in MODEL_MODES:
            numbers += self.directions * self.output * VOCABULARY
        return 2 * steps * numbers * (3 if mode in TRAINING else 1)

    def bytes_read(self, mode: str) -> int:
        """Bytes of the matrices that a serial walk has to read again at every step.

        That is R, once more for the way back in training; in a stream W as well, because its
        inputs come one by one. Other products can be made for many steps at once.

        >>> Shape("rnn_tanh", T=10, B=1, I=2, H=3).bytes_read("training")
        720
        """
        numbers = self.numbers("weight_hh") + self.numbers("weight_hr")
        if mode in TRAINING:
            numbers *= 2
        elif mode == "stream":
            numbers += self.numbers("weight_ih")
        return self.T * numbers * np.dtype(self.dtype).itemsize

    def slice_bytes(self, threads: int) -> int:
        """Bytes of one layer's R in one direction that each of the threads reads, evenly shared."""
        rows, columns = self.parameters["weight_hh_l0"]
        return -(-rows * columns * np.dtype(self.dtype).itemsize // threads)


def _deepbench() -> list[Shape]:
    """DeepBench's recurrent shapes (Baidu Research) up to H = 2048 that take some minute each.

    There I = H. Of each size the batches 16 and 32, those of training, and 1, that of serving; of
    the GRUs, which run for up to 1500 steps, the shortest, and with many steps for one row alone.
    """
    sizes = [
        ("rnn_tanh", 1760, 50, (16, 32)), ("rnn_tanh", 2048, 50, (16, 32)),
        ("lstm", 256, 150, (1, 16, 32)), ("lstm", 512, 25, (1, 16, 32)),
        ("lstm", 1024, 25, (1, 16, 32)), ("lstm", 1536, 50, (1, 8, 16)),
        ("lstm", 2048, 25, (1, 16, 32)),
        ("gru", 512, 1, (1, 32)), ("gru", 1536, 187, (1,)), ("gru", 2048, 187, (1,)),
    ]  # fmt: skip
    return [Shape(cell, T, B, H, H) for cell, H, T, batches in sizes for B in batches]


@dataclass(frozen=True)
class Suite:
    """Shapes that are measured together, and the modes they are measured in.

    all_threads: with 1, 2, 4, ... up to all cores, not only with 1 and 2.
    """

    shapes: tuple[Shape, ...]
    modes: tuple[str, ...] = ("inference", "training")
    all_threads: bool = False


def _options(row: cells.Cell) -> str:
    """A cell's options, in words."""
    return f" ({', '.join(f'{name}={value}' for name, value in row.options.items())})"


SUITES: dict[str, Suite] = {
    "layers": Suite(
        (
            Shape("lstm", 100, 1, 8, 16, stands_for="control, audio effect: bound by latency"),
            Shape("lstm", 50, 64, 1, 32, stands_for="one signal, few units"),
            Shape("lstm", 32, 1024, 28, 32, stands_for="many short sequences: rows of an image"),
            Shape("rnn_tanh", 32, 1024, 28, 32, stands_for="rows of an image, plain cell"),
            Shape("lstm", 100, 64, 64, 64, stands_for="time series of sensors"),
            Shape("lstm", 100, 32, 128, 128, stands_for="character model of middle size"),
            Shape("lstm", 64, 32, 256, 256, stands_for="language model, speech"),
            Shape("lstm", 25, 32, 512, 512, stands_for="language model: bound by products"),
            Shape("lstm", 25, 128, 512, 512, stands_for="the same with a large batch"),
            Shape("lstm", 25, 16, 1024, 1024, stands_for="few rows, large layer"),
            Shape("lstm", 25, 64, 1024, 1024, stands_for="large layer: bound by products"),
            Shape("lstm", 150, 1, 256, 256, stands_for="one user's request: bound by L2"),
            Shape("lstm", 25, 1, 512, 512, stands_for="one user's request, larger"),
            Shape("lstm", 25, 1, 1024, 1024, stands_for="one user's request: bound by L3"),
            Shape("lstm", 50, 1, 1536, 1536, stands_for="one user's request: bound by memory"),
            Shape("rnn_tanh", 50, 16, 1760, 1760, stands_for="speech, plain cell (DeepBench)"),
            Shape("gru", 64, 32, 256, 256, stands_for="language model, speech"),
            Shape("gru", 25, 32, 1024, 1024, stands_for="large layer"),
        )
    ),
    "deepbench": Suite(tuple(_deepbench())),
    "structure": Suite(
        (
            Shape("lstm", 100, 32, 128, 128, uneven=True, stands_for="sentences in a batch"),
            Shape("lstm", 100, 32, 128, 128, directions=2, stands_for="both directions"),
            Shape("lstm", 100, 32, 128, 128, layers=2, stands_for="two layers"),
            Shape(
                "lstm",
                100,
                32,
                128,
                128,
                layers=2,
                directions=2,
                uneven=True,
                stands_for="tagging of sentences",
            ),
            Shape("lstm", 100, 32, 128, 128, dtype="float64", stands_for="double precision"),
            Shape("lstm", 2000, 8, 64, 64, stands_for="a long sequence"),
        )
    ),
    "stream": Suite(
        (
            Shape("lstm", 100, 1, 8, 16, stands_for="audio effect, control"),
            Shape("lstm", 100, 1, 64, 64, stands_for="sensors as they come"),
            Shape("gru", 100, 1, 64, 64, stands_for="the same, another cell"),
            Shape("lstm", 100, 1, 256, 256, stands_for="speech as it comes"),
        ),
        modes=("stream",),
    ),
    "threads": Suite(
        (
            Shape("lstm", 64, 32, 256, 256, stands_for="bound by products"),
            Shape("lstm", 25, 128, 512, 512, stands_for="the same with a large batch"),
            Shape("lstm", 25, 1, 1024, 1024, stands_for="one row: bound by L3"),
            Shape("lstm", 100, 1, 8, 16, stands_for="too small to share"),
        ),
        all_threads=True,
    ),
    "family": Suite(
        (
            *(
                Shape(cell, 100, 32, 128, 128, stands_for=row.kind + _options(row))
                for cell, row in CELLS.items()
            ),
            Shape("lstm", 100, 32, 128, 128, projection=64, stands_for="LSTM (proj_size=64)"),
            *(
                Shape("lstm", 100, 32, 128, 128, happens=happens, stands_for=f"LSTM ({happens})")
                for happens in HAPPENINGS
            ),
        )
    ),
    "torch": Suite(
        (
            Shape("lstm", 100, 32, 128, 128, layers=2, stands_for="character model"),
            Shape("lstm", 100, 32, 128, 128, layers=2, uneven=True, stands_for="sentences"),
            Shape("gru", 100, 32, 128, 128, layers=2, stands_for="character model, another cell"),
            Shape("rnn_tanh", 100, 32, 128, 128, layers=2, stands_for="the same, plain cell"),
        ),
        modes=MODEL_MODES,
    ),
}


def shape_of(name: str) -> Shape:
    """The shape that a name describes; what it stands for, if a suite has it.

    Raises ValueError for a name that describes none.

    >>> shape_of("gru-i3-h5-b2-t7-l2-bi-float64").directions
    2
    """
    match = NAME.fullmatch(name)
    sizes = [int(match[i] or 1) for i in (2, 3, 5, 6, 7)] if match else []
    P = int(match[4] or 0) if match else 0
    fits = match and match[1] in CELLS and min(sizes) >= 1
    alone = fits and not (match[11] and (sizes[-1] > 1 or match[8] or match[9]))
    if not alone or (match[4] and not (0 < P < sizes[1] and CELLS[match[1]].kind == "LSTM")):
        raise ValueError(
            f"shape: got {name!r}; needs CELL-iI-hH-bB-tT, of an LSTM with -pP after H if it is to "
            "be projected to P below H, and after it, in this order and where wanted, "
            f"-lL -bi -uneven -float64, or, without the first three, -{' -'.join(HAPPENINGS)}; "
            "sizes of at least 1 and a cell of "
            f"{', '.join(CELLS)}; such as {SUITES['layers'].shapes[0].name}"
        )
    I, H, B, T, L = sizes
    dtype = "float64" if match[10] else "float32"
    shape = Shape(
        match[1], T, B, I, H, L, 2 if match[8] else 1, bool(match[9]), dtype, P, match[11] or ""
    )
    known = (one for suite in SUITES.values() for one in suite.shapes if one == shape)
    return next(known, shape)


@dataclass(frozen=True)
class Problem:
    """What every library is given for a shape: the same arrays, of the shape's dtype.

    - `x` [T, B, I], and `dy` [T, B, D*H], the gradient of the loss by y; both are zero past a
      row's length
    - `state`: the initial states, each [L*D, B, H]
    - `lengths` [B], or None
    - `weights`: by PyTorch's names, weight_ih_l0 and so on
    """

    x: np.ndarray
    dy: np.ndarray
    state: tuple[np.ndarray, ...]
    lengths: np.ndarray | None
    weights: dict[str, np.ndarray]


def problem(shape: Shape, seed: int) -> Problem:
    """Random weights and data; every process that asks with the same seed gets the same bits.

    >>> problem(shape_of("lstm-i3-h5-b2-t7"), 0).x.shape
    (7, 2, 3)
    """
    random = np.random.default_rng(seed)
    T, B, I, H, D = shape.T, shape.B, shape.I, shape.H, shape.directions

    def normal(*sizes: int) -> np.ndarray:
        return random.standard_normal(sizes).astype(shape.dtype)

    x, dy = normal(T, B, I), normal(T, B, D * shape.output)
    sizes = (shape.output, H)[: len(CELLS[shape.cell].states)]
    state = tuple(0.5 * normal(shape.layers * D, B, size) for size in sizes)
    weights = layer_weights(shape, random)
    lengths = shape.lengths
    if lengths is not None:
        padding = np.arange(T)[:, None] >= lengths
        x[padding] = dy[padding] = 0
    return Problem(x, dy, state, lengths, weights)


def layer_weights(shape: Shape, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights of the layers, by PyTorch's names, as large as PyTorch's are at first."""
    dtype = shape.dtype
    return {
        name: random.uniform(-1, 1, sizes).astype(dtype) / np.sqrt(shape.H, dtype=dtype)
        for name, sizes in shape.parameters.items()
    }

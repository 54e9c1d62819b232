"""The table of shapes that the benchmarks measure, and the weights and data that go with a shape.

Knows names, sizes and NumPy's random numbers. Knows neither the libraries (see `worker`) nor time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..cells import CELLS

MODES = ("inference", "training")
NAME = re.compile(r"([a-z_]+)-i(\d+)-h(\d+)-b(\d+)-t(\d+)(-float64)?")


@dataclass(frozen=True)
class Shape:
    """One layer, in one direction: a cell of the table in `rnnfast.cells`, its sizes and dtype.

    >>> Shape("lstm", T=64, B=32, I=256, H=256).name
    'lstm-i256-h256-b32-t64'
    """

    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: str = "float32"
    stands_for: str = ""

    @property
    def name(self) -> str:
        """By which `--shapes` takes it; the dtype is named where it is not float32."""
        end = "" if self.dtype == "float32" else f"-{self.dtype}"
        return f"{self.cell}-i{self.I}-h{self.H}-b{self.B}-t{self.T}{end}"

    def operations(self, mode: str) -> int:
        """Multiplications and additions of the products: 2·T·B·G·H·(I+H), three times for training.

        >>> Shape("gru", T=1, B=1, I=2, H=3).operations("training")
        270
        """
        forward = 2 * self.T * self.B * len(CELLS[self.cell].gates) * self.H * (self.I + self.H)
        return 3 * forward if mode == "training" else forward


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("lstm", 64, 32, 256, 256, stands_for="language model, speech: bound by products"),
        Shape("lstm", 32, 1024, 28, 32, stands_for="many short sequences: rows of an image"),
        Shape("lstm", 100, 64, 64, 64, stands_for="time series of sensors"),
        Shape("lstm", 100, 32, 128, 128, stands_for="character model of middle size"),
        Shape("lstm", 100, 1, 8, 16, stands_for="control, audio effect: bound by latency"),
        Shape("lstm", 150, 1, 256, 256, stands_for="one user's request: bound by bandwidth"),
        Shape("gru", 64, 32, 256, 256, stands_for="language model, speech"),
        Shape("rnn_tanh", 32, 1024, 28, 32, stands_for="rows of an image, plain cell"),
    )
}


def shape_of(name: str) -> Shape:
    """The shape of this name: one of the table, or any other that such a name describes.

    Raises ValueError for a name that describes none.

    >>> shape_of("gru-i3-h5-b2-t7-float64").B
    2
    """
    if name in SHAPES:
        return SHAPES[name]
    match = NAME.fullmatch(name)
    sizes = [int(size) for size in match.groups()[1:5]] if match else []
    if not sizes or match[1] not in CELLS or min(sizes) < 1:
        raise ValueError(
            f"shape: got {name!r}; needs CELL-iI-hH-bB-tT or CELL-iI-hH-bB-tT-float64 with sizes "
            f"of at least 1 and a cell of {', '.join(CELLS)}, such as {next(iter(SHAPES))}"
        )
    I, H, B, T = sizes
    return Shape(match[1], T, B, I, H, "float64" if match[6] else "float32")


@dataclass(frozen=True)
class Problem:
    """What every library is given for a shape: the same arrays, of the shape's dtype.

    - `x` [T, B, I], and `dy` [T, B, H], the gradient of the loss by y
    - `state`: the initial states, each [1, B, H]
    - `weights`: by PyTorch's names, weight_ih_l0 and so on
    """

    x: np.ndarray
    dy: np.ndarray
    state: tuple[np.ndarray, ...]
    weights: dict[str, np.ndarray]


def problem(shape: Shape, seed: int) -> Problem:
    """Random weights and data; every process that asks with the same seed gets the same bits.

    >>> problem(shape_of("lstm-i3-h5-b2-t7"), 0).x.shape
    (7, 2, 3)
    """
    random = np.random.default_rng(seed)
    cell, H = CELLS[shape.cell], shape.H

    def normal(*sizes: int) -> np.ndarray:
        return random.standard_normal(sizes).astype(shape.dtype)

    x, dy = normal(shape.T, shape.B, shape.I), normal(shape.T, shape.B, H)
    state = tuple(0.5 * normal(1, shape.B, H) for _ in cell.states)
    weights = {
        f"{name}_l0": random.uniform(-1, 1, sizes).astype(shape.dtype)
        / np.sqrt(H, dtype=shape.dtype)
        for name, sizes in cell.weight_shapes(shape.I, H).items()
    }
    return Problem(x, dy, state, weights)

"""A module's parameters: their names and shapes, and the one flat buffer that all of them view.

Knows the table of cells and arrays; no layer's work and no kernel.

I input size, H hidden size, P projection size or 0, L layers, D directions, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import checks
from .cells import Cell

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
ENDS = ("", "_reverse")  # of the parameters' names, by direction
INITIAL = ("h_0", "c_0")  # names of initial states that are parameters


class Arrays(Mapping):
    """Named views of one flat buffer. Assigning to a name writes into the view.

    >>> flat = np.zeros(3)
    >>> params = Arrays(views_of(flat, {"weight": (2, 1), "bias": (1,)}))
    >>> params["bias"] = np.ones(1)
    >>> params["weight"] += 2
    >>> flat.tolist()
    [2.0, 2.0, 1.0]
    """

    __slots__ = ("_views",)

    def __init__(self, views: dict[str, np.ndarray]) -> None:
        self._views = views

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __setitem__(self, name: str, value: Any) -> None:
        view = self._views[name]
        if value is view:  # the end of an in-place operation
            return
        view[...] = checks.exact(name, value, view.dtype, view.shape, "as the parameter")

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return repr({name: view.shape for name, view in self._views.items()})


def aligned(numbers: int, dtype: np.dtype) -> np.ndarray:
    """A zeroed flat buffer that starts at a cache line."""
    raw = np.zeros(numbers * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + numbers * dtype.itemsize].view(dtype)


def assign(name: str, flat: np.ndarray, value: Any) -> None:
    if value is not flat:  # else it is the end of an in-place operation
        flat[...] = checks.exact(name, value, flat.dtype, flat.shape, "all parameters")


def names_of(cell: Cell, P: int, bias: bool) -> tuple[str, ...]:
    """Names of one layer's parameters in one direction, without biases if there are none."""
    names = cell.parameters(P > 0)
    return tuple(name for name in names if bias or not name.startswith("bias"))


def parameter_shapes(
    cell: Cell, I: int, H: int, L: int, D: int, bias: bool, P: int = 0, merged: bool = False,
    learned: bool = False,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Shapes of a stack's parameters; those that PyTorch has, by its names and in its order.

    merged: what a layer of two directions hands to the one above is as wide as one of them;
    learned: initial states are parameters, the last ones.

    >>> from rnnfast.cells import CELLS
    >>> parameter_shapes(CELLS["lstm"], 3, 5, 1, 1, False)
    {'weight_ih_l0': (20, 3), 'weight_hh_l0': (20, 5)}
    """
    shapes = {}
    above = (1 if merged else D) * (P or H)
    for layer in range(L):
        own = cell.weight_shapes(above if layer else I, H, P)
        for end in ENDS[:D]:
            for name in names_of(cell, P, bias):
                shapes[f"{name}_l{layer}{end}"] = own[name]
    if learned:
        for name, numbers in zip(INITIAL[: len(cell.states)], (P or H, H), strict=False):
            shapes[name] = L * D, 1, numbers
    return shapes


def size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def module_bytes(
    cell: Cell, I: int, H: int, L: int, D: int, bias: bool, P: int, merged: bool = False,
    learned: bool = False,
) -> int:  # fmt: skip
    """Bytes, at least, that a module will take; by formula, as L may be anything yet."""
    rows = len(cell.gates) * H
    per_direction = rows * ((P or H) + 2 * bias) + (sum(cell.unit_weights) + P) * H
    above = (1 if merged else D) * (P or H)
    numbers = D * (L * per_direction + rows * I + (L - 1) * rows * above)
    numbers += learned * L * D * ((P or H) + (len(cell.states) - 1) * H)
    views = 6 * 100 * L * D * len(names_of(cell, P, bias))  # three of each parameter and gradient
    return 2 * 8 * numbers + views


def views_of(flat: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Views of a flat buffer, one after the other."""
    views, start = {}, 0
    for name, shape in shapes.items():
        end = start + size(shape)
        views[name] = flat[start:end].reshape(shape)
        start = end
    return views

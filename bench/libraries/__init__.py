"""The libraries that the suite measures, each in a module of its own, and what they have in common.

Knows names and modules, and imports no library before it is asked for. Leaves processes, checks
and times to `measure` and `worker`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..models import Text
from ..shapes import MODES, Problem, Shape

OURS, PEAK, BANDWIDTH = "rnnfast", "peak", "bandwidth"
DROP_IN = "rnnfast.torch"  # this library within PyTorch's models; its results go by OURS

Results = dict[str, np.ndarray]
Prepared = tuple[Callable[[], Any], Callable[[Any], Results]]


class Library:
    """A library at its best setting, in a process of its own.

    `environment` is asked before the process starts, and so of the class; an ImportError of the
    constructor says that the library is missing. `about` has versions. `modes`: what it is asked
    for. `holds_isa`: whether `environment` can keep it from instructions beyond AVX2.
    """

    about: dict[str, str]
    modes: tuple[str, ...] = MODES
    holds_isa = True

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        """What its process needs to be told; isa: "avx2" at most, or None for the CPU's best."""
        return {}

    def __init__(self, threads: int) -> None:
        raise NotImplementedError

    def prepare(self, shape: Shape, mode: str, given: Problem | Text) -> Prepared:
        """One call, to be timed, and what makes arrays of its value.

        The arrays are y, h_n and c_n, shaped as PyTorch's; for training also dx, dh_0, dc_0, and
        d + each parameter's name; of a model, for which a Text is given, those of
        `models.expected`. They may be read until the next call. A stream goes on where its
        last call ended. Raises NotImplementedError, with the reason, for what the library has not.
        """
        raise NotImplementedError


# In the order in which they are shown. A name with a dash is another way to use the library before.
_PLACES = {
    OURS: "ours:Ours",
    "torch": "pytorch:PyTorch",
    "torch-compile": "pytorch:Compiled",
    "onnxruntime": "onnx_runtime:OnnxRuntime",
    "openvino": "open_vino:OpenVino",
    "jax": "jax_scan:Jax",
    "tensorflow": "keras_layer:TensorFlow",
    "numpy": "plain_numpy:PlainNumPy",
    DROP_IN: "pytorch:DropIn",
    PEAK: "machine:Peak",
    BANDWIDTH: "machine:Bandwidth",
}
PEERS = tuple(name for name in _PLACES if name not in (OURS, DROP_IN, PEAK, BANDWIDTH))


def library(name: str) -> type[Library]:
    """The class of a library by its name.

    >>> library("numpy").holds_isa
    True
    """
    module, _, cls = _PLACES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)


def named(
    y: Any, states: Iterable[Any], dx: Any = None, dstates: Iterable[Any] = (),
    grads: Mapping[str, Any] | None = None,
) -> Results:  # fmt: skip
    """Arrays by the names that `prepare` promises.

    >>> sorted(named(np.zeros(3), [np.ones(1)], grads={"weight_hh_l0": np.zeros(2)}))
    ['dweight_hh_l0', 'h_n', 'y']
    """
    found = {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}
    if dx is not None:
        found["dx"] = dx
    found.update(zip(("dh_0", "dc_0"), dstates, strict=False))
    found.update((f"d{name}", grad) for name, grad in (grads or {}).items())
    return {name: np.asarray(array) for name, array in found.items()}


def ends(shape: Shape) -> list[list[str]]:
    """How the names of the parameters end, by layer and direction.

    >>> ends(Shape("gru", T=1, B=1, I=1, H=1, layers=2))
    [['_l0'], ['_l1']]
    """
    directions = ("", "_reverse")[: shape.directions]
    return [[f"_l{layer}{end}" for end in directions] for layer in range(shape.layers)]


def reordered(weights: np.ndarray, order: Iterable[int | None], gates: int) -> np.ndarray:
    """Weights or a bias [G*H, ...] with their gates in another order; None stands for zeros.

    >>> reordered(np.array([1, 2, 3, 4]), (1, 0), 2).tolist()
    [3, 4, 1, 2]
    """
    blocks = np.split(weights, gates)
    zeros = np.zeros_like(blocks[0])
    return np.concatenate([zeros if gate is None else blocks[gate] for gate in order])


def keep_cores(threads: int) -> None:
    """Leaves this process so many cores: some libraries take as many threads as there are."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

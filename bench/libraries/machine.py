"""No library but the machine: what its registers and caches can do at best.

Knows the compiled layer's two measures of it. Their calls' values count what they did.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ..shapes import MODEL_MODES, MODES, Problem, Shape
from . import Library, Prepared
from .ours import Ours

SECONDS = 0.005  # of one call: long beside the start of threads, short beside a disturbance
TRIES = 3  # the least counts: a disturbance must not pass for many rounds


class Peak(Library):
    """As many multiply-adds as the registers take; its value is operations."""

    environment = Ours.environment
    modes = MODES + MODEL_MODES

    def __init__(self, threads: int) -> None:
        from rnnfast import _kernels, isa

        self.measure, self.threads = _kernels.multiply_add, threads
        self.about = {"isa": isa()}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        dtype = np.dtype(shape.dtype).char
        return _long_enough(lambda rounds: self.measure(dtype, rounds, self.threads))


class Bandwidth(Library):
    """Reading a thread's slice of R again and again; its value is bytes."""

    environment = Ours.environment
    modes = MODES + MODEL_MODES

    def __init__(self, threads: int) -> None:
        from rnnfast import _kernels, isa

        self.measure, self.threads = _kernels.read, threads
        self.about = {"isa": isa()}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        slice_bytes = shape.slice_bytes(self.threads)
        return _long_enough(lambda rounds: self.measure(slice_bytes, rounds, self.threads))


def _long_enough(measure: Callable[[int], float]) -> Prepared:
    """A call with as many rounds as take the time."""

    def seconds(rounds: int) -> float:
        began = time.perf_counter()
        measure(rounds)
        return time.perf_counter() - began

    rounds = 1
    while min(seconds(rounds) for _ in range(TRIES)) < SECONDS:
        rounds *= 2
    return lambda: measure(rounds), lambda value: {}

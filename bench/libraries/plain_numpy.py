"""Plain NumPy: the equations as they stand in `rnnfast.reference`, in the shape's dtype.

Knows the reference.
"""

from __future__ import annotations

import numpy as np

from rnnfast import reference

from ..shapes import Problem, Shape
from . import Library, Prepared, named


class PlainNumPy(Library):
    """What there is without any library: one product after the other, from Python."""

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        held = {"OPENBLAS_CORETYPE": "Haswell", "NPY_DISABLE_CPU_FEATURES": _beyond_avx2()}
        return {
            "OPENBLAS_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            **(held if isa else {}),
        }

    def __init__(self, threads: int) -> None:
        self.about = {"numpy": np.__version__}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        cell, x, weights, lengths = shape.cell, given.x, given.weights, given.lengths
        if mode == "training":

            def train() -> tuple:
                y, state_n, tapes = reference.stack_forward(
                    cell, x, given.state, weights, lengths=lengths
                )
                grads = reference.stack_backward(
                    cell, tapes, weights, given.dy, None, lengths=lengths
                )
                return y, state_n, grads.pop("x"), grads.pop("state"), grads

            return train, lambda value: named(*value)

        def infer() -> tuple:
            return reference.stack_forward(cell, x, given.state, weights, lengths=lengths)

        if mode == "inference":
            return infer, lambda value: named(value[0], value[1])

        steps, state = [x_t[None] for x_t in x], given.state

        def stream() -> list:
            nonlocal state
            ys = []
            for x_t in steps:
                y, state, _ = reference.stack_forward(cell, x_t, state, weights)
                ys.append(y)
            return ys

        return stream, lambda ys: named(np.concatenate(ys), state)


def _beyond_avx2() -> str:
    """What NumPy of this machine's has to leave out: a list of its own names."""
    try:
        from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    except ImportError:  # NumPy 1
        from numpy.core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    wide = ("AVX512", "X86_V4")
    return " ".join(n for n in __cpu_dispatch__ if n.startswith(wide) and __cpu_features__[n])

"""What happens to a layer's states between two steps, beside the cell's equations.

Knows arrays and their shapes; nothing of layers, cells or kernels. `_kernels` reads these classes'
attributes, `checks.between` judges arrays, and `calls` makes masks for modules.

T steps, B batch, D directions, H hidden size, N numbers of h, as everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MOST_SETTINGS = 2  # of a state, RF_MAX_SETTINGS in csrc/kernels.h


class Between(NamedTuple):
    """Of one layer's call. Arrays are [T, B, D*N] of h and [T, B, D*H] of c, by time, bool or
    numbers of the layer's dtype; with strides of 0 where they are the same for all steps or rows.

    - `h`, `c`: of each state at most two settings, (where, value): where `where` is true, the state
      after the step is the value, or, if that is None, the state before; the first is made first
    - `hold`: before that, without a tape, the shares of the states before in h and c after a step
    - `keep`: where it is false, the products with R do not see h; `keep_scale` multiplies the rest
    """

    h: tuple[tuple[np.ndarray, np.ndarray | None], ...] = ()
    c: tuple[tuple[np.ndarray, np.ndarray | None], ...] = ()
    hold: tuple[float, float] = (0.0, 0.0)
    keep: np.ndarray | None = None
    keep_scale: float = 1.0

    def __bool__(self) -> bool:
        """Whether anything happens."""
        return bool(self.h or self.c or any(self.hold)) or self.keep is not None

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays, of those with strides of 0 what there is of them."""
        arrays = [a for one in (*self.h, *self.c, (self.keep,)) for a in one if a is not None]
        return sum(
            array.itemsize * math.prod(
                size for size, stride in zip(array.shape, array.strides, strict=True) if stride
            )
            for array in arrays
        )  # fmt: skip


class Received(NamedTuple):
    """What a backward call takes and gives beside its other gradients.

    - `h`, `c`: for each setting of `Between` an array for the gradient by its values, or None
    - `dc_steps` [T, B, D*H]: gradient by c after each step, or None
    - `clip`, `clip_norm`: what h's gradient of later steps is clipped to, or 0
    - `norms` [T, B, D]: for the norm of the gradient by h, or None
    """

    h: tuple[np.ndarray | None, ...]
    c: tuple[np.ndarray | None, ...]
    dc_steps: np.ndarray | None = None
    clip: float = 0.0
    clip_norm: float = 0.0
    norms: np.ndarray | None = None


def spread(array: np.ndarray, T: int, B: int, N: int) -> np.ndarray:
    """An array that broadcasts to [T, B, N], as one whose last stride is that of its numbers."""
    rows = np.broadcast_to(array, (*array.shape[:-1], N))
    if N > 1 and rows.strides[-1] != rows.itemsize:
        rows = np.ascontiguousarray(rows)
    return np.broadcast_to(rows, (T, B, N))

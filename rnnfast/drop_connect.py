"""DropConnect on R: numbers of `weight_hh` that a whole training call does without.

Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models", arXiv 1708.02182. One
mask of each layer and direction for all steps and rows of a call, from the generator that dropout
between layers takes, under keys of its own.

Knows weights and gradients as `recurrent` keeps them, by the names of PARAMETERS, and that
generator; nothing of when they are packed.

G gates, H hidden size, N numbers of h, as everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import _kernels, config
from .cells import PARAMETERS

# Where dropout between layers counts them, from zero: no stack has as many.
KEYS = 2**63
R = PARAMETERS.index("weight_hh")

Directions = tuple[tuple[np.ndarray | None, ...], ...]  # of one layer


class DropConnect(NamedTuple):
    """The masks of one call: which numbers of R are dropped, each with probability p.

    Those that are not are divided by 1 - p.
    """

    p: float
    seed: int
    call: int

    def weights(self, layer: int, weights: Directions) -> Directions:
        """A layer's weights, with R as the call has it."""
        dropped = []
        for d, own in enumerate(weights):
            fresh = np.empty_like(own[R])
            self._apply(layer, len(weights), d, own[R], fresh)
            dropped.append((*own[:R], fresh, *own[R + 1 :]))
        return tuple(dropped)

    def gradients(self, layer: int, grads: Directions) -> None:
        """Makes gradients by R of those by what R was in the call, in place."""
        for d, own in enumerate(grads):
            self._apply(layer, len(grads), d, own[R], own[R])

    def mask(self, layer: int, directions: int, direction: int, shape: tuple) -> np.ndarray:
        """Which numbers of one R are kept: bool of its shape."""
        kept, key = np.empty(shape, bool), KEYS + layer * directions + direction
        _kernels.dropout_mask(
            kept[None], False, self.p, self.seed, self.call, key, config.threads, config.plan
        )
        return kept

    def _apply(
        self, layer: int, directions: int, direction: int, values: np.ndarray, out: np.ndarray
    ) -> None:
        """R, or its gradient, [G*H, N] as one step of so many rows."""
        key = KEYS + layer * directions + direction
        _kernels.dropout(
            values[None], out[None], self.p, self.seed, self.call, key, config.threads, config.plan
        )

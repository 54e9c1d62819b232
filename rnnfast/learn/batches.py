"""Batches: a long row of tokens cut into mini-batches of equal length, in two ways.

Knows token numbers as NumPy arrays. Leaves what they stand for to `vocabulary`, and what is learned
from them to `trainer`. The two ways are those of Dive into Deep Learning, chapter 9.

Both ways begin an epoch by dropping a random number of tokens, so that the cuts differ from epoch
to epoch. All randomness is a function of (seed, epoch): the pair (epoch, index) is the whole
position in the data, and any batch can be had without going through those before it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .corpus import DataError


class Batch(NamedTuple):
    """One mini-batch: T steps of B rows, each row a piece of the text.

    `targets[t, b]` is the token that follows `inputs[t, b]`; both are int32 [T, B]. `fresh` says
    that rows do not go on where those of the batch before ended: the state starts at zero.
    """

    inputs: np.ndarray
    targets: np.ndarray
    fresh: bool


class _Batches:
    """What both ways share: a text [N], B rows of T steps, a seed; and the random offset."""

    def __init__(self, tokens: np.ndarray, batch_size: int, steps: int, seed: int = 0) -> None:
        self.tokens = np.ascontiguousarray(tokens, np.int32)
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self._epoch = -1
        if len(self) < 1:
            raise DataError(
                f"the part of the text for training has {len(self.tokens)} tokens: too short for "
                f"one chunk of {batch_size} x {steps}, which needs {self._needed()}"
            )

    def _needed(self) -> int:
        """Tokens of one batch, at the largest offset there is (so all epochs are equally long)."""
        return self.batch_size * self.steps + self.steps

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        raise NotImplementedError

    def get(self, epoch: int, index: int) -> Batch:
        """Batch number `index` (from 0 to len - 1) of epoch number `epoch`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        if epoch != self._epoch:
            self._epoch = epoch
            self._shuffle(np.random.default_rng([self.seed, epoch]))
        return self._cut(index)

    def _shuffle(self, rng: np.random.Generator) -> None:
        raise NotImplementedError

    def _cut(self, index: int) -> Batch:
        raise NotImplementedError


class RandomBatches(_Batches):
    """Random sampling: pieces of T tokens in random order; every batch starts from a zero state.

    >>> batches = RandomBatches(np.arange(100), batch_size=2, steps=5)
    >>> batch = batches.get(epoch=0, index=0)
    >>> batch.inputs.shape, bool((batch.targets - batch.inputs == 1).all()), batch.fresh
    ((5, 2), True, True)
    """

    def __len__(self) -> int:
        pieces = max(0, len(self.tokens) - self.steps) // self.steps
        return pieces // self.batch_size

    def _shuffle(self, rng: np.random.Generator) -> None:
        offset = rng.integers(self.steps)
        pieces = (len(self.tokens) - self.steps) // self.steps
        self._starts = offset + self.steps * rng.permutation(pieces)

    def _cut(self, index: int) -> Batch:
        starts = self._starts[index * self.batch_size : (index + 1) * self.batch_size]
        window = self.tokens[starts + np.arange(self.steps + 1)[:, None]]
        return Batch(window[:-1], window[1:], True)


class SequentialBatches(_Batches):
    """Sequential partitioning: the text is cut into B long rows, read side by side, T at a time.

    A row goes on where it ended in the batch before, so the state can be carried over (and the
    gradient is cut there: truncated backpropagation through time).

    >>> batches = SequentialBatches(np.arange(100), batch_size=2, steps=5)
    >>> first, second = batches.get(epoch=0, index=0), batches.get(epoch=0, index=1)
    >>> (second.inputs[0] == first.targets[-1]).tolist(), first.fresh, second.fresh
    ([True, True], True, False)
    """

    def __len__(self) -> int:
        columns = max(0, len(self.tokens) - self.steps) // self.batch_size
        return columns // self.steps

    def _shuffle(self, rng: np.random.Generator) -> None:
        offset = rng.integers(self.steps)
        columns = (len(self.tokens) - self.steps) // self.batch_size
        self._starts = offset + columns * np.arange(self.batch_size)

    def _cut(self, index: int) -> Batch:
        starts = self._starts + index * self.steps
        window = self.tokens[starts + np.arange(self.steps + 1)[:, None]]
        return Batch(window[:-1], window[1:], index == 0)


SAMPLINGS = {"random": RandomBatches, "sequential": SequentialBatches}

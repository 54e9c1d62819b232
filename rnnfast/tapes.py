"""Tapes of modules: what `forward_train` saves of a whole stack for `backward`.

Knows the layers' tapes and what a call drew and was given; nothing of parameters.
"""

from __future__ import annotations

import numpy as np

from . import checks, stack
from .calls import Clamped
from .cells import CELLS
from .drop_connect import DropConnect
from .layer import Sequence, Tape


class StackTape:
    """What a module's `forward_train` saves for `backward`.

    - `layers`: one `functional.Tape` per layer
    - `plan`, `threads`, `isa`: what ran; of layers that differ, the one with most threads
    - `nbytes`: of all that it keeps but the module's input

    It belongs to the module that made it, as do its copies; no other module takes it.
    """

    __slots__ = (
        "_both", "_clamps", "_dropout", "_drops", "_held", "_learned", "_owner", "isa", "layers",
        "plan", "threads",
    )  # fmt: skip

    def __init__(
        self, layers: tuple[Tape, ...], owner: bytes, dropout: stack.Dropout = stack.NO_DROPOUT,
        drops: DropConnect | None = None, clamps: tuple[Clamped, ...] = (), held: bool = False,
        both: list[Sequence] | None = None, learned: bool = False,
    ) -> None:  # fmt: skip
        most = layers[0] if len(layers) == 1 else max(layers, key=lambda layer: layer.threads)
        self.layers = layers
        self.plan, self.threads, self.isa = most.plan, most.threads, most.isa
        self._dropout = dropout
        self._owner = owner  # the module's token
        self._drops = drops
        self._clamps, self._held = clamps, held
        self._both = both  # each layer's y of both directions, where their product was taken
        self._learned = learned  # whether the module's own initial states were those of the call

    @property
    def nbytes(self) -> int:
        """Bytes of what the tape keeps: the layers' tapes, and the input of all but the first."""
        handed = [layer.x for layer in self.layers[1:]] + (self._both or [])
        between = sum(stack.numbers(sequence).nbytes for sequence in handed)
        return between + sum(layer.nbytes for layer in self.layers)

    def drop_connect_mask(self, layer: int, direction: int = 0) -> np.ndarray:
        """Which numbers of a layer's `weight_hh` the call had, by drop_connect: bool of its shape.

        direction: 1 for the reverse one. Raises TypeError or ValueError for what is not there.

        >>> from rnnfast import GRU
        >>> _, _, tape = GRU(3, 5, drop_connect=0.5).forward_train(np.zeros((7, 2, 3), np.float32))
        >>> tape.drop_connect_mask(0).shape
        (15, 5)
        """
        layer = checks.integer("layer", layer, 0, len(self.layers) - 1)
        own = self.layers[layer]
        D, N = own.h.shape[1 if own.steps else 0], own.h.shape[-1]
        direction = checks.integer("direction", direction, 0, D - 1)
        H = N if own.c is None else own.c.shape[-1]
        shape = len(CELLS[own.cell].gates) * H, N
        return self._drops.mask(layer, D, direction, shape) if self._drops else np.ones(shape, bool)

    def __repr__(self) -> str:
        return f"StackTape({', '.join(map(repr, getattr(self, 'layers', ())))})"

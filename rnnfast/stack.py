"""A stack of layers through time: what one layer hands to the next, and dropout in between.

Knows the work of one layer (`layer`'s pair that does it all), the wavefront, and how two
directions are merged; no parameters, no module and no checks: it trusts its arguments. Whose
weights are packed, and when, its callers know: `pack(layer)` gives one layer's pack.

T steps, B batch, H hidden size, P projection size or 0, N numbers of h (P or H), L layers, D
directions, Y numbers of a layer's y: D*N, or N of merged directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _kernels, config
from .between import Received
from .cells import Cell
from .layer import (
    More,
    New,
    Sequence,
    Tape,
    new_array,
    new_like,
    new_tape,
    run_backward,
    run_forward,
    run_wavefront,
)
from .merges import CONCAT, merge_backward
from .merges import merge as merge_directions

Packing = Callable[[int], Any]

WAVEFRONT_NUMBERS = 4 * 1024 * 1024  # of all layers' y, at most, in inference side by side


class Dropout(NamedTuple):
    """What is dropped between two layers: with which probability, and what the masks are made of.

    The mask of a call, a layer and a place is `reference.dropout_mask`'s.
    """

    p: float
    seed: int
    call: int

    def apply(self, layer: int, x: Sequence, out: Sequence, threads: int) -> None:
        """Drops what lies between a layer and the one above; in backward, of its gradient.

        Of packed rows, as if they were steps of one row.
        """
        if type(x) is _kernels.Packed:
            x, out = x.data[:, None], out.data[:, None]
        _kernels.dropout(x, out, self.p, self.seed, self.call, layer, threads, config.plan)


NO_DROPOUT = Dropout(0.0, 0, 0)


def new_tapes(
    cell: Cell, x: Sequence, H: int, P: int, L: int, D: int, lengths: np.ndarray | None,
    packs: list[Any] | None = None, new: New | None = None, merge: str = CONCAT,
) -> list[Tape]:  # fmt: skip
    """Tapes for a call with x, one for each layer; light ones if the call's packs are given.

    `new` makes their arrays, and what layers hand to those above, in an order that depends on their
    shapes alone.
    """
    new = new or new_array
    tapes = []
    for layer in range(L):
        packed = packs[layer] if packs else None
        tapes.append(new_tape(cell, x, D, H, P, lengths, False, packed, new))
        if layer < L - 1:
            x = new_like(x, (P or H) * (D if merge == CONCAT else 1), new)
    return tapes


def new_both(tapes: list[Tape]) -> list[Sequence]:
    """Where forward leaves each layer's y of both directions, for a merge that backward asks."""
    return [new_like(tape.x, 2 * tape.h.shape[3]) for tape in tapes]


def numbers(sequence: Sequence) -> np.ndarray:
    """The array [..., N] that a sequence's numbers lie in."""
    return sequence.data if type(sequence) is _kernels.Packed else sequence


def own(layer: int, D: int, *states: np.ndarray | None) -> list[np.ndarray | None]:
    """One layer's part [D, B, ...] of each of a stack's states [L*D, B, ...]."""
    part = slice(layer * D, layer * D + D)
    return [None if state is None else state[part] for state in states]


def forward(
    cell: Cell, pack: Packing, L: int, D: int, x: Sequence, h_0: np.ndarray | None,
    c_0: np.ndarray | None, y: Sequence, h_n: np.ndarray, c_n: np.ndarray | None,
    lengths: np.ndarray | None, tapes: list[Tape] | None, dropout: Dropout, threads: int,
    mores: list[More] | None = None, hs: np.ndarray | None = None, merge: str = CONCAT,
    both: list[Sequence] | None = None,
) -> None:  # fmt: skip
    """Layer upon layer, or side by side, from x [T, B, I] to y [T, B, Y] and the states h_n, c_n.

    Tapes are those that `new_tapes` made for this call, both what `new_both` made. Without, what
    layers hand on is scratch, and so is what is merged. `mores`: of each layer, what most calls do
    without; hs [L, T, B, D*N]: for all layers' h.
    """
    # Where nothing is handed on; small calls feel each line of the rest.
    if L == 1 and merge == CONCAT:
        tape, more = tapes[0] if tapes else None, mores[0] if mores else None
        run_forward(pack(0), x, h_0, c_0, y, h_n, c_n, lengths, False, tape, threads, more)
        if hs is not None:
            hs[0] = y
        return
    T, B, I = x.shape
    N = h_n.shape[2]  # of one direction's h
    H = N if c_n is None else c_n.shape[2]
    Y = D * N if merge == CONCAT else N
    light = tapes is not None and tapes[0].steps > 0
    alone = hs is None and (not mores or all(one.between is one.c_steps is None for one in mores))
    if D == 1 and alone and not light and not dropout.p:  # else layers wait for each other
        steps = _kernels.wavefront_steps(
            cell.number, x.dtype.char, T, B, I, H, N if N < H else 0, L, threads, config.plan
        )
        # All layers' y live at once then; in training they do anyway, for the tapes.
        if steps and (tapes or L * T * B * N <= WAVEFRONT_NUMBERS):
            if tapes:
                ys = [tape.x for tape in tapes[1:]]
            else:
                ys = [new_like(x, N) for _ in range(L - 1)]
            states = [own(layer, D, h_0, c_0, h_n, c_n) for layer in range(L)]
            packs = [pack(layer) for layer in range(L)]
            times = mores[0].times if mores else None
            run_wavefront(packs, x, [*ys, y], states, lengths, tapes, threads, steps, times)
            return
    for layer in range(L):
        tape = tapes[layer] if tapes else None
        last = layer == L - 1
        handed = y if last else tapes[layer + 1].x if tapes else None
        if handed is None:
            handed = new_like(x, Y)
        out = handed if last or not dropout.p else new_like(x, Y)
        made = out
        if merge != CONCAT:
            made = both[layer] if both else new_like(x, D * N)
        h_in, c_in, h_out, c_out = own(layer, D, h_0, c_0, h_n, c_n)
        packed, more = pack(layer), mores[layer] if mores else None
        run_forward(packed, x, h_in, c_in, made, h_out, c_out, lengths, False, tape, threads, more)
        if hs is not None:
            hs[layer] = made
        if made is not out:
            merge_directions(merge, numbers(made), numbers(out))
        if out is not handed:
            dropout.apply(layer, out, handed, threads)
        x = handed


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of gradients, past whose rows' ends anything may stand."""
    with np.errstate(all="ignore"):
        return a + b


def backward(
    pack: Packing, tapes: list[Tape], D: int, dy: Sequence | None, dh_n: np.ndarray | None,
    dc_n: np.ndarray | None, dx: Sequence | None, dh_0: np.ndarray | None,
    dc_0: np.ndarray | None, grads: list[tuple | None], dropout: Dropout, threads: int,
    lowest: int = 0, add_to: tuple | None = None, replace: bool = False,
    receiveds: list[Received] | None = None, dhs: np.ndarray | None = None, merge: str = CONCAT,
    both: list[Sequence] | None = None,
) -> None:  # fmt: skip
    """From dy down to dx, dh_0, dc_0 and each layer's grads, all as of `run_backward`.

    Layers below the lowest, of which nothing is wanted, are not run. `add_to` and `replace` are for
    a single layer in one direction. `receiveds`: of each layer, what is beside the other gradients;
    dhs [L, T, B, D*N]: gradients by all layers' h; both: what forward has left there.
    """
    if len(tapes) == 1 and merge == CONCAT:  # as in forward
        if dhs is not None:
            dy = dhs[0] if dy is None else _sum(dy, dhs[0])
        run_backward(
            pack(0), tapes[0], dy, dh_n, dc_n, dx, dh_0, dc_0, grads[0], threads, add_to, replace,
            receiveds and receiveds[0],
        )  # fmt: skip
        return
    x, N = tapes[-1].x, tapes[-1].h.shape[-1]
    Y = D * N if merge == CONCAT else N
    for layer in reversed(range(lowest, len(tapes))):
        below = dx if layer == 0 else None
        if layer > lowest:
            below = new_like(x, Y)
        if merge != CONCAT and dy is not None:
            d_both = new_like(x, D * N)
            was = numbers(both[layer]) if both else None
            merge_backward(merge, numbers(dy), was, numbers(d_both))
            dy = d_both
        if dhs is not None:
            dy = dhs[layer] if dy is None else _sum(dy, dhs[layer])
        dh_last, dc_last, dh_first, dc_first = own(layer, D, dh_n, dc_n, dh_0, dc_0)
        run_backward(
            pack(layer), tapes[layer], dy, dh_last, dc_last, below, dh_first, dc_first,
            grads[layer], threads, add_to, replace, receiveds and receiveds[layer],
        )  # fmt: skip
        dy = below
        if dropout.p and layer > lowest:  # the mask between this layer and the one below
            dy = new_like(below, Y)
            dropout.apply(layer - 1, below, dy, threads)

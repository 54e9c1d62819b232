"""What happens between the steps of a shape's layer, as rnnfast's modules and as the reference take
it, so that its cost can be timed beside the plain layer's.

Knows names and numbers; of the library, where its masks come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import reference
from ..calls import RECURRENT, ZONEOUT_C, ZONEOUT_H, Clamp

if TYPE_CHECKING:
    from .shapes import Shape

P = 0.1  # of what is drawn, for each number or step
SEED = 0


@dataclass(frozen=True)
class Happening:
    """Arguments of the module, of its calls and of backward; and the same for the reference, in
    training and, where it is something else, in inference.
    """

    module: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)
    between: reference.Between | None = None
    expected: reference.Between | None = None
    mask: np.ndarray | None = None


def _kept(shape: Shape, purpose: int, numbers: int, steps: int | None = None) -> np.ndarray:
    steps = shape.T if steps is None else steps
    mask = reference.dropout_mask(SEED, 0, purpose, steps, shape.B, numbers, P)
    return np.broadcast_to(mask, (shape.T, shape.B, numbers))


def _zoneout(shape: Shape) -> Happening:
    h = ((~_kept(shape, ZONEOUT_H, shape.output), None),)
    c = ((~_kept(shape, ZONEOUT_C, shape.H), None),)
    between, expected = reference.Between(h=h, c=c), reference.Between(hold=(P, P))
    return Happening({"zoneout": P, "seed": SEED}, between=between, expected=expected)


def _recurrent_dropout(shape: Shape) -> Happening:
    keep = _kept(shape, RECURRENT, shape.output) / (1 - P)
    module = {"recurrent_dropout": P, "seed": SEED}
    return Happening(module, between=reference.Between(keep=keep), expected=reference.Between())


def _variational(shape: Shape) -> Happening:
    keep = _kept(shape, RECURRENT, shape.output, 1) / (1 - P)
    module = {"recurrent_dropout": P, "variational": True, "seed": SEED}
    return Happening(module, between=reference.Between(keep=keep), expected=reference.Between())


def _clamp(shape: Shape) -> Happening:
    """An eighth of the units, each step and row to numbers of its own."""
    units = np.arange(0, shape.output, 8)
    values = np.random.default_rng(SEED).standard_normal((shape.T, shape.B, len(units)))
    values = values.astype(shape.dtype)
    full = np.zeros((shape.T, shape.B, shape.output))
    full[:, :, units] = values
    where = np.broadcast_to(np.arange(shape.output) % 8 == 0, full.shape)
    call = {"clamp": Clamp(values, units)}
    return Happening(call=call, between=reference.Between(h=((where, full),)))


def _mask(shape: Shape) -> Happening:
    mask = np.random.default_rng(SEED).random((shape.T, shape.B)) >= P
    return Happening(call={"mask": mask}, mask=mask)


def _all_states(shape: Shape) -> Happening:
    return Happening(call={"all_states": True})


def _clip(shape: Shape) -> Happening:
    limit = 0.1
    return Happening(backward={"clip": limit}, between=reference.Between(clip=limit))


HAPPENINGS = {
    "zoneout": _zoneout,
    "recurrentdropout": _recurrent_dropout,
    "variational": _variational,
    "clamp": _clamp,
    "mask": _mask,
    "allstates": _all_states,
    "clip": _clip,
}


def happening(shape: Shape) -> Happening:
    """Of a shape of one layer and one direction."""
    return HAPPENINGS[shape.happens](shape) if shape.happens else Happening()

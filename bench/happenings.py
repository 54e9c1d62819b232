"""What a shape's layer does beside the plain one, as rnnfast's modules and the reference take it.

So its cost can be timed beside the plain layer's. Knows names and numbers; of the library, where
its masks come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import reference
from ..calls import RECURRENT, ZONEOUT_C, ZONEOUT_H, Clamp
from ..cells import CELLS
from ..drop_connect import KEYS

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
    functions: reference.Functions | None = None  # of the cell's general one
    keep_R: np.ndarray | None = None  # in training: R is multiplied by it, and so is its gradient


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


def _drop_connect(shape: Shape) -> Happening:
    rows = len(CELLS[shape.cell].gates) * shape.H
    keep = reference.dropout_mask(SEED, 0, KEYS, 1, rows, shape.output, P)[0] / (1 - P)
    return Happening({"drop_connect": P, "seed": SEED}, keep_R=keep)


def _activations(shape: Shape) -> Happening:
    """For an LSTM: cheap ones, and one that is not."""
    own = "hardsigmoid", "softsign", "softplus"
    functions = reference.Functions((("hardsigmoid", 0.2, 0.5), "softsign", "softplus"))
    return Happening({"activations": own}, functions=functions)


def _gate_clip(shape: Shape) -> Happening:
    """For an LSTM: what its gates are made of is clipped, and c."""
    functions = reference.Functions(("sigmoid", "tanh", "tanh"), 0.5, 0.5)
    return Happening({"clip": 0.5, "cell_clip": 0.5}, functions=functions)


HAPPENINGS = {
    "zoneout": _zoneout,
    "recurrentdropout": _recurrent_dropout,
    "variational": _variational,
    "clamp": _clamp,
    "mask": _mask,
    "allstates": _all_states,
    "clip": _clip,
    "dropconnect": _drop_connect,
    "activations": _activations,
    "gateclip": _gate_clip,
}


def happening(shape: Shape) -> Happening:
    """Of a shape of one layer and one direction."""
    return HAPPENINGS[shape.happens](shape) if shape.happens else Happening()

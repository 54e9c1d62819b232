"""Targets: what is wanted of a recurrent layer's units, and the gradient that teaches it.

Knows NumPy arrays, and the losses of `layers`. Hinton, "Neural networks for machine learning",
lecture 7, lists how targets of recurrent networks are given: final activities of all units;
activities of all units for the last few steps, which makes attractors; activities of some units at
any step, the others being input or hidden.

T steps, B batch, H units, U of them with targets.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import checks
from .layers import IGNORED, cross_entropy

KINDS = ("squared_error", "cross_entropy")


def target_loss(
    y: np.ndarray, targets: Any, kind: str = "squared_error", *, units: Any = None,
    steps: int | None = None, mask: Any = None, lengths: Any = None, batch_first: bool = False,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """The mean loss of activities y for their targets, and its gradient dy, zero where none count.

    y [T, B, H], [B, T, H] with batch_first, or [T, H]: what a layer returned. For last states
    h_n [L*D, B, H] stands as well: each of the L*D is a step then, and dy is dh_n.

    - units: which ones have targets, by index, slice or bool [H]; None for all
    - steps: how many of each row's last valid steps count, 1 for final activities; None for all
    - mask: what counts of the rest, bool, as broadcast as targets are
    - lengths [B]: the valid steps of each row; None for T

    "squared_error": targets are activities, laid out as y with U units, or [B, U], [U] or a number,
    the same at every step; the mean is that of (y - target)² over all numbers that count.
    "cross_entropy": the units are logits of U classes, targets and mask are as above without U,
    targets integers, or IGNORED; the mean is that of -log softmax(y)[target] over steps and rows
    that count.

    Returns the mean, nan if nothing counts, and dy, shaped as y. Raises TypeError or ValueError.

    >>> y = np.array([[[0.0, 1.0]], [[2.0, 3.0]]])  # 2 steps, 1 row, 2 units
    >>> target_loss(y, 0.0, steps=1, units=[1])
    (9.0, array([[[0., 0.]],
    <BLANKLINE>
           [[0., 6.]]]))
    >>> loss, dy = target_loss(np.zeros((3, 1, 4)), [2], "cross_entropy", steps=2)
    >>> loss == math.log(4), dy[:, 0, 2].tolist()
    (True, [0.0, -0.375, -0.375])
    """
    kind = checks.choice("kind", kind, KINDS)
    batch_first = checks.boolean("batch_first", batch_first)
    y = np.asarray(y)
    if y.ndim not in (2, 3) or y.dtype.kind != "f":
        checks.fail(ValueError, "y", checks.describe(y), "floats [T, B, H], or [T, H]")
    unbatched = y.ndim == 2
    layout = (lambda a: a[:, None]) if unbatched else lambda a: a.swapaxes(0, 1 * batch_first)
    seen = layout(y)
    T, B, H = seen.shape
    chosen = _units(units, H)
    counts = _counted_steps(T, B, steps, lengths, unbatched)  # [T, B]
    classes = kind == "cross_entropy"
    shape = (T, B) if classes else (T, B, len(chosen))

    def spread(name: str, value: Any) -> np.ndarray:
        """Targets or a mask as [T, B] or [T, B, U]."""
        value = np.asarray(value)
        if value.ndim == y.ndim - classes:
            value = layout(value)
        try:
            return np.broadcast_to(value, shape)
        except ValueError:
            letters = "[T, B]" if classes else "[T, B, U]"
            needs = f"one that fits {letters} = {shape}"
            checks.fail(ValueError, name, f"shape {value.shape}", needs)

    wanted = spread("targets", targets)
    counts = counts if classes else np.broadcast_to(counts[:, :, None], shape)
    if mask is not None:
        given = spread("mask", mask)
        if given.dtype != bool:
            checks.fail(TypeError, "mask", checks.describe(given), "bool")
        counts = counts & given
    dy = np.zeros_like(y)
    into = layout(dy)
    if classes:
        if wanted.dtype.kind not in "iu":
            checks.fail(TypeError, "targets", checks.describe(wanted), "integers: classes")
        wanted = wanted.astype(np.intp)
        wrong = counts & (wanted != IGNORED) & ((wanted < 0) | (wanted >= len(chosen)))
        if wrong.any():
            needs = f"classes in 0..{len(chosen) - 1}, or {IGNORED}"
            checks.fail(ValueError, "targets", str(wanted[wrong][0]), needs)
        logits = seen[:, :, chosen].reshape(T * B, len(chosen))
        loss, _ = cross_entropy(logits, np.where(counts, wanted, IGNORED).ravel())
        into[:, :, chosen] = logits.reshape(T, B, len(chosen))
        return loss, dy
    if wanted.dtype.kind not in "iuf":
        checks.fail(TypeError, "targets", checks.describe(wanted), "real numbers")
    count = int(counts.sum())
    with np.errstate(all="ignore"):  # NaN and inf are results, and what does not count is anything
        error = np.where(counts, seen[:, :, chosen] - wanted, 0)
    into[:, :, chosen] = error * (2 / max(count, 1))
    total = float(np.square(error, dtype=np.float64).sum())
    return total / count if count else math.nan, dy


def _units(units: Any, H: int) -> np.ndarray:
    """Indices of the units that have targets."""
    every = np.arange(H)
    try:
        chosen = every if units is None else np.atleast_1d(every[units])
    except (IndexError, TypeError, ValueError):
        chosen = None
    distinct = 0 if chosen is None or chosen.ndim != 1 else len(np.unique(chosen))
    if not distinct or distinct < len(chosen):
        needs = f"indices within {H} units, each once, a slice, or bool [{H}]"
        checks.fail(ValueError, "units", checks.describe(units), needs)
    return chosen


def _counted_steps(T: int, B: int, steps: int | None, lengths: Any, unbatched: bool) -> np.ndarray:
    """bool [T, B]: which are among a row's last valid steps."""
    if lengths is None:
        lengths = np.full(B, T)
    else:
        lengths = checks.lengths("lengths", lengths, T, B, unbatched)
    t = np.arange(T)[:, None]
    counts = t < lengths
    if steps is not None:
        counts &= t >= lengths - checks.integer("steps", steps, 1)
    return counts

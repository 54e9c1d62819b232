"""What a module's call does beside the plain one, layer by layer, and what comes of it in backward.

Masks of steps, units that are clamped, zoneout, dropout inside the recurrence, all states, padding
that holds. Makes of them what `functional` takes (`More`, `Received`); knows no parameters, and
passes questions about arguments to `checks`.

T steps, B batch, H hidden size, N numbers of h, L layers, D directions, as everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _kernels, checks, config
from .between import Between, Received
from .layer import Tape, new_array, receive

# What a mask is for, beside the layer, in the generator's key: see `reference.dropout_mask`.
RECURRENT, ZONEOUT_H, ZONEOUT_C = (number << 32 for number in (2, 3, 4))


class Regular(NamedTuple):
    """Regularisation inside the recurrence: probabilities, and the seed of the masks."""

    recurrent_dropout: float
    variational: bool
    zoneout: tuple[float, float]
    seed: int

    def training(self, layer: int, call: int, T: int, B: int, N: int, H: int) -> Between:
        """What happens between a layer's steps in a call; N, H: numbers of h and c, or 0."""

        def mask(purpose: int, steps: int, numbers: int, opposite: bool, p: float) -> np.ndarray:
            out = np.empty((steps, B, numbers), bool)
            _kernels.dropout_mask(
                out, opposite, p, self.seed, call, layer + purpose, config.threads, config.plan
            )
            return np.broadcast_to(out, (T, B, numbers))

        keep, p = None, self.recurrent_dropout
        if p:
            keep = mask(RECURRENT, min(T, 1) if self.variational else T, N, False, p)
        p_h, p_c = self.zoneout
        h = ((mask(ZONEOUT_H, T, N, True, p_h), None),) if p_h else ()
        c = ((mask(ZONEOUT_C, T, H, True, p_c), None),) if p_c else ()
        return Between(h, c, (0.0, 0.0), keep, 1 / (1 - p) if p < 1 else 0.0)

    def inference(self) -> Between:
        """The same where nothing is drawn: what is expected of zoneout."""
        return Between(hold=self.zoneout)


class Clamp:
    """States of some units that a call is given at every step, instead of what the cell makes.

    Hinton's lecture on recurrent networks lists it among the ways to give them inputs. After each
    step, h (or c) of the units is the value; the next step, and y, see that. In an LSTM the h of a
    step is made of the c that the cell made, whatever that is set to. Gradients do not pass from a
    clamped number to the past: they reach its value, and `backward` returns them.

    values: numbers of the module's dtype, that broadcast to [T, B, n] for the n units, in the
    layout of x ([B, T, n] with batch_first, [T, n] unbatched); units: indices, or None for all;
    where: instead of units, bools that broadcast to [T, B, N], at which numbers the values stand,
    which then broadcast to the same. state: "h" or "c"; layer: which, from the lowest, 0, or from
    the top, -1. N is D*H, with h of the second direction behind that of the first (with a
    projection, D*P for h).

    >>> from rnnfast import RNN
    >>> rnn = RNN(2, 3)
    >>> y, _ = rnn(np.zeros((4, 1, 2), np.float32), clamp=Clamp(np.float32(0.5), units=[0, 2]))
    >>> y[:, 0, ::2].tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """

    __slots__ = ("layer", "state", "units", "values", "where")

    def __init__(
        self, values: Any, units: Any = None, *, where: Any = None, state: str = "h",
        layer: int = 0,
    ) -> None:  # fmt: skip
        if units is not None and where is not None:
            checks.fail(ValueError, "where", "one beside units", "one of both")
        self.values, self.units, self.where = values, units, where
        self.state = checks.choice("state", state, ("h", "c"))
        self.layer = checks.integer("layer", layer, -(2**31), 2**31)

    def __repr__(self) -> str:
        more = {
            "units": self.units,
            "where": self.where,
            "state": None if self.state == "h" else self.state,
            "layer": self.layer or None,
        }
        shown = (f"{name}={value!r}" for name, value in more.items() if value is not None)
        return f"Clamp({', '.join([repr(self.values), *shown])})"


class States(NamedTuple):
    """States of all layers after each step: h [L, T, B, D*N], and c [L, T, B, D*H] or None.

    With batch_first [L, B, T, ...], unbatched [L, T, ...]; zero at steps that there are not.
    """

    h: np.ndarray
    c: np.ndarray | None


class Extra(NamedTuple):
    """What `backward` found beside dx and dstate.

    - `clamps`: for each clamp of the call, in order, the gradient by its values, shaped as these
    - `norms`: if asked for, the norm of the loss's gradient by h after each step, over the numbers
      of a row: [L, T, B, D] in x's layout, zero at steps that there are not
    """

    clamps: tuple[np.ndarray, ...]
    norms: np.ndarray | None


class Layout(NamedTuple):
    """How the caller's sequences are laid out."""

    T: int
    B: int
    batch_first: bool
    unbatched: bool

    def shape(self, n: int) -> tuple[int, ...]:
        """Of a sequence of n numbers a step."""
        if self.unbatched:
            return self.T, n
        return (self.B, self.T, n) if self.batch_first else (self.T, self.B, n)

    def by_time(self, array: np.ndarray) -> np.ndarray:
        """The caller's [..., n] as [T, B, n], with more axes before them or none."""
        if self.unbatched:
            return array[..., None, :]
        return array.swapaxes(-3, -2) if self.batch_first else array

    def of_caller(self, array: np.ndarray) -> np.ndarray:
        """The opposite."""
        if self.unbatched:
            return array[..., 0, :]
        return array.swapaxes(-3, -2) if self.batch_first else array


class Clamped(NamedTuple):
    """One clamp of a call, as backward finds it again."""

    layer: int
    state: int  # 0: h, 1: c
    setting: int
    units: np.ndarray | None
    shape: tuple[int, ...]  # of the values
    layout: Layout

    def gradient(self, received: Received) -> np.ndarray:
        """By the values, shaped as these."""
        array = (received.h, received.c)[self.state][self.setting]
        array = self.layout.of_caller(array if self.units is None else array[..., self.units])
        more = array.ndim - len(self.shape)
        if more:
            array = array.sum(axis=tuple(range(more)))
        once = tuple(i for i, size in enumerate(self.shape) if size == 1 < array.shape[i])
        return np.asarray(array.sum(axis=once, keepdims=True) if once else array, order="C")


def add_clamp(
    name: str, clamp: Any, betweens: list[Between], columns: tuple[int, int], layout: Layout,
    dtype: np.dtype,
) -> Clamped:  # fmt: skip
    """Puts a clamp among what happens between the steps of its layer.

    `columns`: D times the numbers of h, and of c or 0.
    """
    if type(clamp) is not Clamp:
        checks.fail(TypeError, name, checks.describe(clamp), "an rnnfast.Clamp, or a list of such")
    L, which = len(betweens), "hc".index(checks.choice(f"{name}.state", clamp.state, ("h", "c")))
    layer, N = clamp.layer + (L if clamp.layer < 0 else 0), columns[which]
    if not 0 <= layer < L:
        checks.fail(ValueError, f"{name}.layer", str(clamp.layer), f"one of {L} layers")
    if not N:
        checks.fail(ValueError, f"{name}.state", "'c'", "'h': this module has no c")
    own = betweens[layer]
    settings = (own.h, own.c)[which]
    if any(value is not None for _, value in settings):
        got = f"two for {clamp.state} of layer {layer}"
        checks.fail(ValueError, name, got, "one of each: with `where` it can set any numbers")
    units = clamp.units
    if units is not None:
        units = checks.indices(f"{name}.units", units, N)
    shape = layout.shape(N if units is None else len(units))
    values = checks.broadcasts(f"{name}.values", clamp.values, dtype, shape)
    # Where they are the same for all steps or rows, so is what is made of them.
    rows = layout.by_time(np.broadcast_to(values, shape))
    rows = rows[tuple(slice(1) if stride == 0 else slice(None) for stride in rows.strides[:2])]
    if units is not None:
        some, rows = rows, new_array((*rows.shape[:2], N), dtype)  # read at the units alone
        rows[..., units] = some
    if clamp.where is not None:
        shape = layout.shape(N)
        where = checks.broadcasts(f"{name}.where", clamp.where, np.dtype(bool), shape)
        where = layout.by_time(np.broadcast_to(where, shape))
    else:
        where = np.zeros(N, bool)
        where[... if units is None else units] = True
    changed = own._replace(**{clamp.state: (*settings, (where, rows))})
    betweens[layer] = checks.between(name, changed, layout.T, layout.B, columns, dtype)
    return Clamped(layer, which, len(settings), units, values.shape, layout)


# Padding that holds (Keras's rule for steps that are masked): y of a step that is missing is that
# of the step before it, in the order of processing, and zero if there is none.


def _source(valid: np.ndarray, backwards: bool) -> np.ndarray:
    """Of each time and row [T, B] the time whose y stands there, -1 if it is a zero."""
    times = np.where(valid, np.arange(len(valid))[:, None], -1)
    if not backwards:
        return np.maximum.accumulate(times, axis=0)
    times = np.where(valid, times, len(valid))
    times = np.minimum.accumulate(times[::-1], axis=0)[::-1]
    return np.where(times == len(valid), -1, times)


def _held(valid: np.ndarray, d: int) -> tuple[np.ndarray, ...]:
    """Where a direction's y is held, as times and rows, and the times that it is held from."""
    source = _source(valid, d == 1)
    t, b = np.nonzero(~valid & (source >= 0))
    return t, b, source[t, b]


def hold(y: np.ndarray, valid: np.ndarray, D: int) -> None:
    """Fills y [T, B, D*N] where steps are missing, valid [T, B] being false."""
    N = y.shape[2] // D
    for d in range(D):
        own = y[:, :, d * N : (d + 1) * N]
        t, b, source = _held(valid, d)
        own[t, b] = own[source, b]


def unhold(dy: np.ndarray, valid: np.ndarray, D: int) -> np.ndarray:
    """A copy of the gradient by such a y in which each held step's has gone where it was from."""
    dy, N = dy.copy(), dy.shape[2] // D
    for d in range(D):
        t, b, source = _held(valid, d)
        own = dy[:, :, d * N : (d + 1) * N]
        np.add.at(own, (source, b), own[t, b])
    return dy


def valid_steps(
    T: int, B: int, lengths: np.ndarray | None, times: np.ndarray | None
) -> np.ndarray | None:
    """bool [T, B]: which steps there are; None where all are."""
    if lengths is None:
        return None
    first = np.arange(T) < lengths[:, None]
    if times is None:
        return first.T
    valid = np.empty((B, T), bool)
    np.put_along_axis(valid, times, first, axis=1)
    return valid.T


def receive_all(
    tapes: list[Tape], D: int, limits: tuple[float, float], norms: np.ndarray | None,
    dcs: np.ndarray | None,
) -> list[Received]:  # fmt: skip
    """What each layer's backward takes and gives; norms [L, T, B, D], dcs [L, T, B, D*H]."""
    return [
        receive(
            tape, D, *limits, None if norms is None else norms[layer],
            None if dcs is None else dcs[layer],
        )
        for layer, tape in enumerate(tapes)
    ]  # fmt: skip

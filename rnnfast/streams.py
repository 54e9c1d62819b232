"""Streams: a module run one step, or one block of steps, at a time.

Knows a module's packs and sizes; passes its steps to the compiled layer and each question about an
argument to `checks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _kernels, checks, config
from .closed_loop import Loop
from .layer import FORWARD

if TYPE_CHECKING:
    from .recurrent import Recurrent


class Stream:
    """A module run one step, or one block of steps, at a time; it owns its weights and states.

    Results have the same bits as one call over the whole sequence. Made by a module's `stream`.

    To be used by one thread at a time: while a call runs, every other one, of another thread or of
    a signal handler, to any method or to `state`, is refused with a ValueError and changes nothing.
    It cannot be copied or pickled.

    >>> from rnnfast import LSTM
    >>> lstm = LSTM(3, 5, seed=0)
    >>> x = np.ones((4, 2, 3), np.float32)
    >>> s = lstm.stream(batch_size=2)
    >>> y = np.stack([s.step(x_t) for x_t in x])
    >>> bool((y == lstm(x)[0]).all())
    True
    """

    __slots__ = (
        "_cell", "_dtype", "_first", "_hold", "_packs", "_row", "_rows", "_sizes", "_states",
        "_step", "_stepper",
    )  # fmt: skip

    def __init__(self, module: Recurrent, batch_size: int) -> None:
        B = checks.integer("batch_size", batch_size, 1)
        I, H, P, L, D = module._sizes
        if D == 2:
            needs = "one direction: the other one starts at the sequence's end"
            checks.fail(ValueError, "stream", "a bidirectional module", needs)
        self._cell, self._dtype = module._cell, module._dtype
        N = P or H  # of h, and so of y
        self._sizes = B, I, N
        checks.room("batch_size", len(self._cell.states) * L * B * H, self._dtype.itemsize)
        self._rows, self._row = (B, N), (N,)
        h, c = np.zeros((L, B, N), self._dtype), np.zeros((L, B, H), self._dtype)
        self._states = (h, c)[: len(self._cell.states)]
        self._first = [one.copy() for one in module._initial or ()] or (0, 0)
        self._set_all(self._first)
        self._packs = packs = tuple(module._kept(FORWARD) or module._pack_all(FORWARD))
        h, c = self._states if "c" in self._cell.states else (self._states[0], None)
        self._hold = hold = module._regular.zoneout if module._regular else (0.0, 0.0)
        self._stepper = stepper = _kernels.Stepper(
            packs, h, c, B, config.threads, config.plan, *hold
        )
        self._step = stepper.step

    def step(self, x_t: Any, out: np.ndarray | None = None) -> np.ndarray:
        """One step: x_t [B, I] -> y_t [B, H], the last layer's h; [I] -> [H] if batch_size is 1; a
        projected h has proj_size numbers.


        A fresh array, which may be kept, or `out`, which must not overlap x_t. Raises TypeError or
        ValueError; the states are then as they were.
        """
        # The stepper looks at arrays itself, and does nothing if one is not just as it wants it.
        if type(x_t) is np.ndarray:
            if out is None:
                y_t = np.empty(self._row if x_t.ndim == 1 else self._rows, self._dtype)
                if self._step(x_t, y_t):
                    return y_t
            elif type(out) is np.ndarray and self._step(x_t, out):
                return out
        x_t, shape = self._checked("x_t", x_t, False)
        if out is None:
            y_t = np.empty(shape, self._dtype)
        else:
            y_t = checks.output("out", out, self._dtype, shape, "x_t", x_t)
        target = y_t if checks.contiguous(y_t) is y_t else np.empty(shape, self._dtype)
        self._step(checks.contiguous(x_t), target)
        if target is not y_t:
            y_t[...] = target
        return y_t if out is None else out

    def process(self, block: Any, out: np.ndarray | None = None) -> np.ndarray:
        """A block of steps: [T, B, I] -> [T, B, H]; [T, I] -> [T, H] if batch_size is 1.

        As many calls of `step`, with the same bits, and faster.

        >>> from rnnfast import LSTM
        >>> lstm = LSTM(3, 5)
        >>> lstm.stream().process(np.zeros((7, 3), np.float32)).shape
        (7, 5)
        """
        block, shape = self._checked("block", block, True)
        B, I, N = self._sizes
        T = shape[0]
        checks.room("block", T * B * max(I, N), self._dtype.itemsize)
        if out is None:
            y = np.empty(shape, self._dtype)
        else:
            y = checks.output("out", out, self._dtype, shape, "block", block)
        target = y if checks.contiguous(y) is y else np.empty(shape, self._dtype)
        x = checks.contiguous(block)
        self._stepper.process(x.reshape(T, B, I), target.reshape(T, B, N))
        if target is not y:
            y[...] = target
        return y if out is None else out

    def generate(
        self, first: Any, steps: int, head: Any, choice: str = "value", *, table: Any = None,
        covariates: Any = None, temperature: float | None = None, seed: int | None = None,
        logits: bool = False, step0: int = 0, row0: int = 0,
    ) -> Any:  # fmt: skip
        """Steps whose input is what a head made of the step before: see a module's `generate`.

        Goes on from the stream's own states and leaves those after the last step, or, if it fails,
        as they were. `first` without the axis of the batch only if batch_size is 1. Returns the
        values or tokens, with `logits` a pair of tokens and these.

        >>> from rnnfast import GRU
        >>> s = GRU(3, 8, seed=0).stream()
        >>> y = s.process(np.ones((5, 3), np.float32))  # a warm-up
        >>> head = np.ones((3, 8), np.float32), None
        >>> ahead = s.generate(head[0] @ y[-1], 4, head)
        >>> more = s.generate(ahead[-1], 4, head)
        >>> more.shape
        (4, 3)
        """
        B, I, N = self._sizes
        loop = Loop(
            (I, N), self._dtype, B, False, first, steps, head, choice, table, covariates, None,
            temperature, seed, logits, step0, row0,
        )  # fmt: skip
        h, c = (*self._states, None)[:2]
        with self._stepper:
            loop.run(self._packs, h, c, self._hold)
        return loop.result

    def _checked(self, name: str, value: Any, steps: bool) -> tuple[np.ndarray, tuple[int, ...]]:
        """An input of one step, or of a block of steps, and the shape of its output."""
        array = checks.as_array(name, value, self._dtype)
        rows = array.shape[1:] if steps else array.shape
        lead = array.shape[: array.ndim - len(rows)]
        B, I, _ = self._sizes
        if array.ndim > steps:
            if rows == (B, I):
                return array, (*lead, *self._rows)
            if rows == (I,) and B == 1:
                return array, (*lead, *self._row)
        letters = "T, B, I" if steps else "B, I"
        sizes = f"T, {B}, {I}" if steps else f"{B}, {I}"
        also = f", or without the {B}" if B == 1 else ""
        checks.fail(ValueError, name, f"shape {array.shape}", f"[{letters}] = [{sizes}]{also}")

    @property
    def state(self) -> Any:
        """Copies of the states, shaped as the module's: (h, c) for the LSTM, h for others.

        Each [L, B, H]. Assigning takes the values of such arrays.
        """
        with self._stepper:
            copies = tuple([array.copy() for array in self._states])
        return copies if len(copies) == 2 else copies[0]

    @state.setter
    def state(self, value: Any) -> None:
        pair, sizes, N = len(self._states) == 2, self._states[-1].shape, self._sizes[2]
        P = N if N < sizes[2] else 0
        checked = checks.states(checks.STEP_STATE, value, pair, self._dtype, sizes, False, P)
        self._set(checked)

    def reset(self) -> None:
        """Sets the states as at the start: to zero, or to those that the module has learned."""
        self._set(self._first)

    def _set(self, values: Iterable) -> None:
        with self._stepper:
            self._set_all(values)

    def _set_all(self, values: Iterable) -> None:
        for own, value in zip(self._states, values, strict=False):
            own[...] = value

    def __reduce__(self) -> NoReturn:
        # Of a copy of any kind: two streams would share one place for their states.
        needs = "another one: module.stream(...), its .state assigned"
        checks.fail(TypeError, "stream", "a request for a copy or a pickle", needs)

    def __repr__(self) -> str:
        (B, I, N), (L, _, H) = self._sizes, self._states[-1].shape
        projected = f", proj_size={N}" * (N < H)
        return f"Stream({self._cell.name!r}, {I}, {H}, num_layers={L}, batch_size={B}{projected})"

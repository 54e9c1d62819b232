"""Truncated backpropagation through time: a long sequence's gradients, a window of steps at a time.

Knows the recurrent modules. Leaves the loss, and what is done with the gradients, to its caller.

T steps, B batch, I input size, N numbers of y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..layer import as_steps
from ..recurrent import Recurrent
from ..tapes import StackTape


class Truncated(NamedTuple):
    """What `tbptt` returns; the gradients are in the module's `grads`.

    - `losses`: what the loss gave, one number of each window
    - `state`: after the last step, to go on from
    - `dx`: shaped as x, the sum of what the windows gave; None if it was not asked for
    """

    losses: list[float]
    state: Any
    dx: np.ndarray | None


Loss = Callable[[np.ndarray, slice], tuple[float, Any]]


def tbptt(
    module: Recurrent, x: Any, loss: Loss, k1: int, k2: int | None = None, state: Any = None, *,
    lengths: Any = None, update: Callable[[], Any] | None = None, need_dx: bool = False,
) -> Truncated:  # fmt: skip
    """Every k1 steps, back over the last k2: adds to `grads` what so much of the past tells.

    BPTT(k2; k1) of Williams and Peng, "An efficient gradient-based algorithm for on-line training
    of recurrent network trajectories", 1990. Each step's loss counts once, when the k1 steps around
    it are done, and its gradient reaches back to the step that is k2 - k1 before the first of
    these. k2 None is k1: the sequence is cut in chunks, and the state between two is a constant, as
    in most of today's libraries. Of k2 > k1 the steps that a window shares with the one before are
    run again, from the state that this had there.

    module: of one direction; x, state and lengths as a call of it takes them. loss(y, steps) is
    given y of k1 steps (fewer at the end), laid out as x, and which ones, a slice; it returns a
    number and its gradient by this y. Past a row's length y is zero, and its gradient is not read.
    update, if there is one, is called after each window, with no argument: the place of an
    optimiser, and of `zero_grad`. Parameters that it changes are those of all windows to come, also
    of steps that are run again. need_dx: whether dx is wanted; by
    default it is not.

    Each window is one call of `forward_train`, with masks of its own where something is dropped.
    Learned initial states get gradients of the windows that begin with the sequence.

    Raises as the module's calls do, and ValueError for two directions, for k2 below k1, and for
    lengths where y past them would be held.

    >>> import rnnfast
    >>> gru = rnnfast.GRU(3, 5)
    >>> x, targets = np.ones((100, 2, 3), np.float32), np.zeros((100, 2, 5), np.float32)
    >>> def squares(y, steps):
    ...     error = y - targets[steps]
    ...     return float((error**2).sum()), 2 * error
    >>> done = tbptt(gru, x, squares, k1=20, k2=40)
    >>> len(done.losses), done.state.shape, bool(gru.grads["weight_hh_l0"].any())
    (5, (1, 2, 5), True)
    """
    if not isinstance(module, Recurrent):
        checks.fail(TypeError, "module", checks.describe(module), "an RNN, LSTM or GRU of rnnfast")
    if module.bidirectional:
        needs = "one direction: the other one starts at the sequence's end"
        checks.fail(ValueError, "module", "a bidirectional one", needs)
    k1 = checks.integer("k1", k1, 1)
    k2 = k1 if k2 is None else checks.integer("k2", k2, 1)
    if k2 < k1:
        needs = f"at least k1, {k1}: the losses of other steps would have no gradient"
        checks.fail(ValueError, "k2", str(k2), needs)
    need_dx = checks.boolean("need_dx", need_dx)
    first, batch_first, dtype = state, module.batch_first, module.dtype
    x, unbatched = checks.sequence("x", x, dtype, module.input_size, batch_first)
    T, B, _ = x.shape
    if lengths is not None:
        if module.padding == "hold":
            needs = "None with padding='hold': a window knows nothing of the y before it"
            checks.fail(ValueError, "lengths", checks.describe(lengths), needs)
        lengths = checks.lengths("lengths", lengths, T, B, unbatched)

    def laid_out(sequence: np.ndarray) -> np.ndarray:
        if unbatched:
            return sequence[:, 0]
        return sequence.transpose(1, 0, 2) if batch_first else sequence

    dx = np.zeros_like(x) if need_dx else None
    losses: list[float] = []
    tape: StackTape | None = None
    at = 0  # where the tape begins
    for done in range(0, T, k1):
        stop = min(done + k1, T)
        start = max(0, done - (k2 - k1))
        if start == 0:
            begin = first
        elif start == done:
            begin = state
        else:
            assert tape is not None
            begin = _state_at(tape, start - at, unbatched)
        own = None if lengths is None else np.clip(lengths - start, 0, stop - start)
        y, state, tape = module.forward_train(laid_out(x[start:stop]), begin, own)
        at, y = start, as_steps(y, batch_first, unbatched)
        new = y[done - start :]
        given = loss(laid_out(new), slice(done, stop))
        if not isinstance(given, tuple) or len(given) != 2:
            checks.fail(TypeError, "loss", checks.describe(given), "a pair: a number, and dy")
        losses.append(given[0])
        dy = checks.gradient("dy", given[1], dtype, new.shape, batch_first, unbatched)
        if done > start:
            whole = np.zeros(y.shape, dtype)
            whole[done - start :] = dy
            dy = whole
        part, _ = module.backward(tape, laid_out(dy), need_dx=need_dx)
        if dx is not None:
            with np.errstate(all="ignore"):  # NaN and inf are results
                dx[start:stop] += as_steps(part, batch_first, unbatched)
        if update is not None:
            update()
    if T == 0:
        _, state = module(laid_out(x), first, lengths)
    return Truncated(losses, state, None if dx is None else laid_out(dx))


def _state_at(tape: StackTape, step: int, unbatched: bool) -> Any:
    """The states of all layers before a step of a full tape, of rows that ended the last ones."""
    lengths = tape.layers[0].lengths
    rows = np.arange(tape.layers[0].x.shape[1])
    slots = np.full(len(rows), step) if lengths is None else np.minimum(step, lengths)
    states = []
    for name in ("h", "c"):
        kept = [getattr(layer, name) for layer in tape.layers]
        if kept[0] is not None:
            state = np.stack([sequence[0][slots, rows] for sequence in kept])
            states.append(state[:, 0] if unbatched else state)
    return tuple(states) if len(states) == 2 else states[0]

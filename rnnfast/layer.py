"""One layer, in one or two directions, forward and backward through the compiled layer.

Knows arrays, the table of cells and what a tape holds; no module and no stack. Every layer but a
stream's passes through one pair, `run_forward` and `run_backward`, or forward together with those
above and below it through `run_wavefront`; all of them trust their arguments, but `own_tape`, which
judges what a caller held in hand meanwhile.

T steps, B batch, I input size, H hidden size, P projection size or 0, N numbers of h (P or H),
D directions, G parameter gates, Gt tape gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _kernels, checks, config
from .between import Between, Received
from .cells import CELLS, Cell, Functions

FORWARD, BACKWARD = _kernels.FORWARD, _kernels.BACKWARD
Sequence = np.ndarray | _kernels.Packed  # [T, B, N]
New = Callable[[tuple[int, ...], np.dtype], np.ndarray]
Row = tuple[Cell, Functions | None]  # a general cell has functions
TAPES = "full", "light"
SLICE_BYTES = 1 << 20  # of a light tape's slice at least, once it is computed again
KEPT_FROM = 16 * 1024  # numbers; below, NumPy's own memory is as fast


class More(NamedTuple):
    """What most forward calls do without: see `Tape`, and c after each step [T, B, D*H]."""

    times: np.ndarray | None = None
    between: Between | None = None
    c_steps: np.ndarray | None = None


class Tape:
    """What one layer's forward saves for its backward: plain arrays in processing order.

    Slot s of a reversed direction is its s-th processed step. Slots past a row's length mean
    nothing. A light tape keeps the states before each of K slices of the steps alone; its slices
    have `steps` steps each, but for the first, which has what is left of the longest row.

    - `cell`: name in CELLS
    - `functions`: `cells.Functions` of a general cell, else None
    - `x` [T, B, I], any strides: a view of the input, or of the copy that was made of it. To change
      its numbers before backward is an error of the caller's, and makes wrong gradients
    - `lengths` [B] intp, or None; `times` [B, T] intp, of rows with holes the times of their steps,
      then those of the holes, or None
    - `between`: what happened to states between steps, a `between.Between`, or None
    - `gates` [D, T, B, Gt, H], or None if Gt = 0
    - `h` [D, T+1, B, N], slot 0 the initial state; of a light tape [K, D, B, N], and no gates
    - `c` likewise, or None if the cell has no c
    - `steps`, `pack`: of a light tape; 0 and None of a full one. The pack is a copy of the weights,
      with which backward computes a slice again
    - `reverse`: one direction, from each row's last valid step to its first
    - `batch_first`, `unbatched`: how the caller's arrays are laid out
    - `plan`, `threads`, `isa`: what ran
    - `nbytes`: of all that it keeps but x
    """

    __slots__ = (
        "batch_first", "between", "c", "cell", "functions", "gates", "h", "isa", "lengths", "pack",
        "plan", "reverse", "steps", "threads", "times", "unbatched", "x",
    )  # fmt: skip

    cell: str
    functions: Functions | None
    x: np.ndarray
    lengths: np.ndarray | None
    times: np.ndarray | None
    between: Between | None
    gates: np.ndarray | None
    h: np.ndarray
    c: np.ndarray | None
    steps: int
    pack: Any
    reverse: bool
    batch_first: bool
    unbatched: bool
    plan: str
    threads: int
    isa: str

    def __repr__(self) -> str:
        if not hasattr(self, "threads"):  # what a forward sets last
            return "Tape()"
        T, B, I = self.x.shape
        D, N = self.h.shape[1 if self.steps else 0], self.h.shape[-1]
        H = N if self.c is None else self.c.shape[-1]
        sizes = f"T={T}, B={B}, I={I}, H={H}, D={D}" + f", P={N}" * (N < H)
        sizes += f", steps={self.steps}" * bool(self.steps)
        return f"Tape({self.cell!r}, {sizes}, plan={self.plan!r}, threads={self.threads})"

    @property
    def nbytes(self) -> int:
        """Bytes of what the tape keeps, but for x: the arrays, and a light one's pack."""
        kept = self.gates, self.h, self.c, self.pack, self.times
        masks = self.between.nbytes if self.between else 0
        return sum(part.nbytes for part in kept if part is not None) + masks


# ------------------------------------------------------------------------------------- arrays


def new_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array with any contents; a large one lies in memory that is kept when the array goes.

    Fresh pages are cleared by the system as they are touched, which would cost small layers as
    much time as all of their computation.
    """
    numbers = math.prod(shape)
    if numbers < KEPT_FROM:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _kernels.Memory(numbers * dtype.itemsize))


def new_sequence(
    T: int, B: int, N: int, dtype: np.dtype, batch_first: bool, unbatched: bool
) -> np.ndarray:
    """A fresh sequence in the caller's layout: [T, B, N], [B, T, N], or [T, N]."""
    if unbatched:
        return new_array((T, N), dtype)
    return new_array((B, T, N) if batch_first else (T, B, N), dtype)


def new_like(x: Sequence, N: int, new: New = new_array) -> Sequence:
    """A fresh sequence of N numbers a step, laid out as x is."""
    T, B, _ = x.shape
    if type(x) is _kernels.Packed and x.by_rows:
        return _kernels.Packed(new((len(x.data), N), x.dtype), x.starts, (T, B, N), True)
    return new((T, B, N), x.dtype)


def as_steps(array: np.ndarray, batch_first: bool, unbatched: bool) -> np.ndarray:
    """A sequence in the caller's layout, seen as [T, B, N]."""
    if unbatched:
        return array[:, None]
    return array.transpose(1, 0, 2) if batch_first else array


# ----------------------------------------------------------------------- the pair that does it all


def run_forward(
    packed: Any, x: Sequence, h_0: np.ndarray | None, c_0: np.ndarray | None, y: Sequence,
    h_n: np.ndarray, c_n: np.ndarray | None, lengths: np.ndarray | None, reverse: bool,
    tape: Tape | None, threads: int, more: More | None = None,
) -> tuple[str, int]:  # fmt: skip
    """One layer forward into y, h_n, c_n, and into the tape, if there is one. Returns what ran.

    x [T, B, I], y [T, B, D*N]: any strides but the last, or packed; states [D, B, N], c [D, B, H];
    lengths [B] intp; more: what most calls do without. A tape is one that `new_tape` has made for
    this call.
    """
    times, between, c_steps = more or (None, None, None)
    if tape is None:
        return _kernels.forward(
            packed, x, y, h_0, c_0, h_n, c_n, lengths, None, None, None,
            reverse, threads, config.plan, 0, times, between, c_steps,
        )  # fmt: skip
    tape.times, tape.between = times, between
    longest = -1
    if tape.steps:
        longest = _longest(lengths, *x.shape[:2])
        _clear_rest(y, longest, times)
        times = _first_times(times, longest)
    tape.isa, tape.functions = packed.isa, packed.functions
    tape.plan, tape.threads = ran = _kernels.forward(
        packed, x, y, h_0, c_0, h_n, c_n, lengths, tape.gates, tape.h, tape.c,
        reverse, threads, config.plan, tape.steps, times, between, c_steps, longest,
    )  # fmt: skip
    return ran


# Slices of light tapes are cut from the end of the longest row: kernels know of no step past it.


def _clear_rest(sequence: Sequence | None, longest: int, times: np.ndarray | None) -> None:
    """Zeros where kernels that know of so many steps of each row put none.

    With holes, a row's steps may lie anywhere; packed rows have nothing past their ends.
    """
    if sequence is not None and type(sequence) is not _kernels.Packed:
        sequence[longest if times is None else 0 :] = 0


def _first_times(times: np.ndarray | None, longest: int) -> np.ndarray | None:
    """The times of so many steps of each row."""
    return None if times is None else np.ascontiguousarray(times[:, :longest])


def run_wavefront(
    packs: list[Any], x: Sequence, ys: list[Sequence], states: list[list],
    lengths: np.ndarray | None, tapes: list[Tape] | None, threads: int, steps: int,
    times: np.ndarray | None = None,
) -> tuple[str, int]:  # fmt: skip
    """A stack of layers forward, side by side in slices of so many steps: see `run_forward`.

    `states` has h_0, c_0, h_n, c_n of each layer; tapes are full ones. Returns what ran.
    """
    calls = []
    for layer, (y, (h_0, c_0, h_n, c_n)) in enumerate(zip(ys, states, strict=True)):
        kept = (tapes[layer].gates, tapes[layer].h, tapes[layer].c) if tapes else (None, None, None)
        calls.append((x, y, h_0, c_0, h_n, c_n, *kept))
        x = y
    ran = _kernels.wavefront(
        tuple(packs), tuple(calls), lengths, threads, config.plan, steps, times
    )
    for tape, packed in zip(tapes or (), packs, strict=bool(tapes)):
        tape.plan, tape.threads = ran
        tape.isa, tape.functions = packed.isa, packed.functions
        tape.times, tape.between = times, None
    return ran


def new_tape(
    cell: Cell, x: Sequence, D: int, H: int, P: int, lengths: np.ndarray | None, reverse: bool,
    packed: Any = None, new: New | None = None,
) -> Tape:  # fmt: skip
    """A tape for a call with x, with room for what forward writes; a light one if given its pack.

    `new` makes its arrays, of any contents: `new_array`, if it is None.
    """
    T, B, _ = x.shape
    new, dtype = new or new_array, x.dtype
    tape = Tape()
    tape.cell, tape.x, tape.lengths, tape.reverse = cell.name, x, lengths, reverse
    tape.batch_first = tape.unbatched = False
    tape.steps, tape.pack, tape.gates, tape.c = 0, packed, None, None
    tape.times = tape.between = None
    if packed is None:
        states: tuple[int, ...] = (D, T + 1, B)
        if cell.tape_gates:
            tape.gates = new((D, T, B, len(cell.tape_gates), H), dtype)
    else:
        tape.steps, slices = _slices(cell, packed, _longest(lengths, T, B), B)
        states = slices, D, B
    tape.h = new((*states, P or H), dtype)
    if "c" in cell.states:
        tape.c = new((*states, H), dtype)
    return tape


def run_backward(
    packed: Any, tape: Tape, dy: Sequence | None, dh_n: np.ndarray | None,
    dc_n: np.ndarray | None, dx: Sequence | None, dh_0: np.ndarray | None,
    dc_0: np.ndarray | None, grads: tuple | None, threads: int, add_to: tuple | None = None,
    replace: bool = False, received: Received | None = None,
) -> tuple[str, int]:  # fmt: skip
    """One layer backward into dx, dh_0, dc_0 and grads (each None where not wanted).

    `grads` has one for each of PARAMETERS per direction. With `add_to`, the same of one direction,
    gradients are added to that, or replace it, all or none, and grads is scratch. Returns what ran.
    """
    x, gates, h, c, light = tape.x, tape.gates, tape.h, tape.c, None
    times, longest = tape.times, -1
    if tape.steps:
        T, B, _ = x.shape
        _, D, _, N = h.shape
        H = N if c is None else c.shape[3]
        longest = _longest(tape.lengths, T, B)
        _clear_rest(dx, longest, times)
        times = _first_times(times, longest)
        # Scratch: the tape of one slice, its last states, and what slices carry to those before.
        steps, tape_gates = min(tape.steps, longest), len(CELLS[tape.cell].tape_gates)
        new = partial(new_array, dtype=x.dtype)
        gates = new((steps, B, tape_gates, H)) if tape_gates else None
        h, h_n, c_n = new((steps + 1, B, N)), new((B, N)), None
        dh_0 = new((D, B, N)) if dh_0 is None else dh_0
        if c is not None:
            c, c_n = new((steps + 1, B, H)), new((B, H))
            dc_0 = new((D, B, H)) if dc_0 is None else dc_0
        light = tape.pack, tape.steps, tape.h, tape.c, h_n, c_n
    return _kernels.backward(
        packed, x, tape.lengths, gates, h, c, dy, dh_n, dc_n, dx, dh_0, dc_0,
        grads, tape.reverse, threads, config.plan, light, add_to, replace, times, tape.between,
        received, longest,
    )  # fmt: skip


def receive(
    tape: Tape, D: int, clip: float = 0.0, clip_norm: float = 0.0,
    norms: np.ndarray | None = None, dc_steps: np.ndarray | None = None,
) -> Received:  # fmt: skip
    """What a backward call through a tape takes and gives beside its other gradients, with room for
    the gradients by what was set between steps: zeros at steps that there are not.
    """
    T, B, _ = tape.x.shape
    dtype, between = tape.x.dtype, tape.between or Between()
    new = new_array if tape.lengths is None else np.zeros

    def room(settings: tuple, numbers: int) -> tuple:
        shape = T, B, D * numbers
        return tuple(None if value is None else new(shape, dtype) for _, value in settings)

    h = room(between.h, tape.h.shape[-1])
    c = () if tape.c is None else room(between.c, tape.c.shape[-1])
    return Received(h, c, dc_steps, clip, clip_norm, norms)


def _longest(lengths: np.ndarray | None, T: int, B: int) -> int:
    """Steps of the longest row."""
    return T if lengths is None or B == 0 else int(lengths.max())


def _slices(cell: Cell, packed: Any, longest: int, B: int) -> tuple[int, int]:
    """Steps of a light tape's slices, and how many slices: about as many as they have steps.

    So the states before all slices, which the tape keeps, and the tape of one slice, which backward
    makes, both grow with the root of T; unless a slice would be too small for several threads.
    """
    panel = _kernels.panel_steps(packed, B)
    numbers = B * packed.hidden_size * (len(cell.tape_gates) + len(cell.states))
    least = SLICE_BYTES // max(1, numbers * dtype_of(packed).itemsize)
    steps = panel * -(-max(1, math.isqrt(longest), least) // panel)
    return steps, max(1, -(-longest // steps))


def dtype_of(packed: Any) -> np.dtype:
    return checks.FLOAT32 if packed.dtype == "f" else checks.FLOAT64


def tape_numbers(cell: Cell, T: int, B: int, H: int, directions: int, kind: str) -> int:
    """How many numbers a layer's tape holds, x aside; of a light one, no more than a guess."""
    if kind == "light":
        T = math.isqrt(T)
    return directions * B * H * (T * len(cell.tape_gates) + (T + 1) * len(cell.states))


# ---------------------------------------------------------------- a tape that comes back


def own_tape(tape: Tape, row: Row, sizes: tuple[int, int, int, int], dtype: np.dtype) -> Tape:
    """A tape of the library's own over the same arrays, for backward to read and nothing else.

    Nobody else can change what was checked of it: the arrays are fresh views, the lengths a copy.
    Refuses a tape of another cell, other I, H, P, D = `sizes` or dtype, or one that was altered.
    """
    cell, functions = row
    if type(tape) is not Tape:
        checks.fail(TypeError, "tape", checks.describe(tape), "what forward returned as its tape")
    altered = "an altered one", "one as forward returned it"
    try:
        x, h, c, gates, lengths = _views(tape.x, tape.h, tape.c, tape.gates, tape.lengths)
        if packed := type(x) is _kernels.Packed and x.by_rows:
            rows, starts = _views(x.data, x.starts)
        steps, pack, reverse = tape.steps, tape.pack, tape.reverse
        batch_first, unbatched = tape.batch_first, tape.unbatched
        name, plan, threads, isa = tape.cell, tape.plan, tape.threads, tape.isa
        times, between = tape.times, tape.between
        others = tape.functions
    except AttributeError:  # a tape that was never filled
        checks.fail(ValueError, "tape", *altered)
    if not (type(h) is np.ndarray and h.ndim == 4):
        checks.fail(ValueError, "tape", *altered)
    if not (packed or (type(x) is np.ndarray and x.ndim == 3)):
        checks.fail(ValueError, "tape", *altered)
    if type(name) is not str or name != cell.name:
        got = f"one of cell {checks.describe(name)}"
        checks.fail(ValueError, "tape", got, f"one of {cell.name!r}")
    if others is not functions and (type(others) is not Functions or others != functions):
        checks.fail(ValueError, "tape", f"one of {others!r}", f"one of {functions!r}")
    light = type(steps) is int and steps > 0
    I, H, P, D = sizes
    N = P or H
    if (x.shape[2], h.shape[3], h.shape[1 if light else 0]) != (I, N, D) or h.dtype != dtype:
        needs = f"one with I={I}, H={H}, D={D} in {dtype}" + f", proj_size={P}" * bool(P)
        checks.fail(ValueError, "tape", f"x {x.shape} and h {h.shape} in {h.dtype}", needs)
    T, B, _ = x.shape
    states, n_gates = (D, T + 1, B), 0 if light else len(cell.tape_gates)
    right = True
    if lengths is not None:
        right = is_whole(lengths, (B,), checks.INTP)
        if right:
            lengths = lengths.copy()
            right = B == 0 or 0 <= lengths.min() <= lengths.max() <= T
    if packed:
        right = right and times is None and lengths is not None
        right = right and is_whole(starts, (B,), checks.INTP) and type(rows) is np.ndarray
        right = right and rows.ndim == 2 and rows.shape[1] == x.shape[2]
        if right:
            starts = starts.copy()
            ends = starts + lengths
            right = B == 0 or (starts.min() >= 0 and ends.max() <= len(rows))
            x = _kernels.Packed(rows, starts, (T, B, rows.shape[1]), True)
    if times is not None:
        right = right and lengths is not None and is_whole(times, (B, T), checks.INTP)
        if right:
            times = times.copy()
            right = times.size == 0 or 0 <= times.min() <= times.max() < T
    if between is not None:
        right = right and type(between) is Between
        if right:
            columns = D * N, D * H if c is not None else 0
            between = checks.between("tape", between, T, B, columns, dtype)
    if not light:
        right = right and pack is None and type(steps) is int and steps == 0
    elif right := right and _is_pack_of(pack, row, sizes, dtype):
        these, slices = _slices(cell, pack, _longest(lengths, T, B), B)
        right, states = these == steps, (slices, D, B)
    if not (
        right
        and is_whole(h, (*states, N), dtype)
        and is_whole(c, (*states, H) if "c" in cell.states else None, dtype)
        and is_whole(gates, (D, T, B, n_gates, H) if n_gates else None, dtype)
        and x.dtype == dtype
        and checks.has_rows(rows if packed else x)
        and type(reverse) is type(batch_first) is type(unbatched) is bool
        and (B == 1 or not unbatched)
    ):
        checks.fail(ValueError, "tape", *altered)
    own = Tape()
    own.x, own.h, own.c, own.gates, own.lengths = x, h, c, gates, lengths
    own.steps, own.pack, own.reverse = steps, pack, reverse
    own.times, own.between = times, between
    own.batch_first, own.unbatched = batch_first, unbatched
    own.cell, own.plan, own.threads, own.isa = cell.name, plan, threads, isa
    own.functions = functions
    return own


def _views(*values: Any) -> list[Any]:
    """Fresh views of those that are arrays."""
    return [value[...] if type(value) is np.ndarray else value for value in values]


def _is_pack_of(pack: Any, row: Row, sizes: tuple[int, int, int, int], dtype: np.dtype) -> bool:
    cell, functions = row
    return (
        type(pack) is _kernels.Pack
        and pack.nbytes > 0
        and (pack.kind, pack.cell, pack.functions) == (FORWARD, cell.number, functions)
        and (pack.input_size, pack.hidden_size, pack.proj_size, pack.directions) == sizes
        and dtype_of(pack) == dtype
    )


def is_whole(array: Any, shape: tuple[int, ...] | None, dtype: np.dtype) -> bool:
    if shape is None:
        return array is None
    return (
        type(array) is np.ndarray
        and array.shape == shape
        and array.dtype == dtype
        and array.flags.c_contiguous
        and array.flags.aligned
    )

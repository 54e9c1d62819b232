"""One recurrent layer, in one or two directions, as functions: check, allocate, call, return.

Knows arrays, the table of cells and the compiled layer; no stack of layers and no module. Every
layer but a stream's passes through one pair, `run_forward` and `run_backward`, or forward together
with those above and below it through `run_wavefront`; all of them trust their arguments. The public
functions below them are the same for each cell, with checks in front.

T steps, B batch, I input size, H hidden size, P projection size or 0, N numbers of h (P or H),
D directions, G parameter gates, Gt tape gates.
`weights` is (W [G*H, I], R [G*H, H], b_ih [G*H], b_hh [G*H]) for one direction, a bias may be None;
a pair of such tuples for two; or what `pack` made of either. Gates are in PyTorch's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from . import _kernels, checks, config
from .between import Between, Received
from .cells import ACTIVATIONS, CELLS, PARAMETERS, PLAIN, Cell, Functions, cell_of

__all__ = [
    "Between", "Gradients", "Tape", "gru_backward", "gru_forward", "gru_step", "lstm_backward",
    "lstm_forward", "lstm_step", "pack", "rnn_backward", "rnn_forward", "rnn_step",
]  # fmt: skip

FORWARD, BACKWARD = _kernels.FORWARD, _kernels.BACKWARD
Sequence = np.ndarray | _kernels.Packed  # [T, B, N]


class More(NamedTuple):
    """What most forward calls do without: see `Tape`, and c after each step [T, B, D*H]."""

    times: np.ndarray | None = None
    between: Between | None = None
    c_steps: np.ndarray | None = None


New = Callable[[tuple[int, ...], np.dtype], np.ndarray]
Row = tuple[Cell, Functions | None]  # a general cell has functions
TAPES = "full", "light"
SLICE_BYTES = 1 << 20  # of a light tape's slice at least, once it is computed again
KEPT_FROM = 16 * 1024  # numbers; below, NumPy's own memory is as fast
NEEDS = ("x", "state", *PARAMETERS)
_ALL = frozenset(NEEDS)


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


class Gradients(NamedTuple):
    """Gradients of the loss by what a forward call took; None for what was not asked for.

    - `x`: shaped as the input
    - `state`: shaped as the initial state: (dh_0, dc_0) for the LSTM, dh_0 for others
    - `weights`: one for each of the layer's for one direction, a pair of these for two
    - `plan`, `threads`: what ran
    - `values`: of a call with `between`, for h and for c, by the values of each setting: [T, B,
      D*N] or [T, B, D*H], zero where nothing was set, or None for a setting without values
    - `norms` [T, B, D], if asked for: of the gradient by h after each step
    """

    x: np.ndarray | None
    state: Any
    weights: tuple
    plan: str
    threads: int
    values: tuple | None = None
    norms: np.ndarray | None = None


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
    least = SLICE_BYTES // max(1, numbers * _dtype(packed).itemsize)
    steps = panel * -(-max(1, math.isqrt(longest), least) // panel)
    return steps, max(1, -(-longest // steps))


def tape_numbers(cell: Cell, T: int, B: int, H: int, directions: int, kind: str) -> int:
    """How many numbers a layer's tape holds, x aside; of a light one, no more than a guess."""
    if kind == "light":
        T = math.isqrt(T)
    return directions * B * H * (T * len(cell.tape_gates) + (T + 1) * len(cell.states))


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
        right = _is(lengths, (B,), checks.INTP)
        if right:
            lengths = lengths.copy()
            right = B == 0 or 0 <= lengths.min() <= lengths.max() <= T
    if packed:
        right = right and times is None and lengths is not None and _is(starts, (B,), checks.INTP)
        right = (
            right and type(rows) is np.ndarray and rows.ndim == 2 and rows.shape[1] == x.shape[2]
        )
        if right:
            starts = starts.copy()
            ends = starts + lengths
            right = B == 0 or (starts.min() >= 0 and ends.max() <= len(rows))
            x = _kernels.Packed(rows, starts, (T, B, rows.shape[1]), True)
    if times is not None:
        right = right and lengths is not None and _is(times, (B, T), checks.INTP)
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
        and _is(h, (*states, N), dtype)
        and _is(c, (*states, H) if "c" in cell.states else None, dtype)
        and _is(gates, (D, T, B, n_gates, H) if n_gates else None, dtype)
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
        and _dtype(pack) == dtype
    )


def _is(array: Any, shape: tuple[int, ...] | None, dtype: np.dtype) -> bool:
    if shape is None:
        return array is None
    return (
        type(array) is np.ndarray
        and array.shape == shape
        and array.dtype == dtype
        and array.flags.c_contiguous
        and array.flags.aligned
    )


# ---------------------------------------------------------------------------- weights, checked


def pack(
    cell: str, weights: Any, kind: str = "forward", *, activations: Any = None, clip: Any = None,
    cell_clip: Any = None,
) -> Any:  # fmt: skip
    """Lays a layer's weights out for the kernels, once for many calls; a copy, deaf to later edits.

    cell: a name in CELLS; kind: "forward" (also for the steps) or "backward"; activations, clip,
    cell_clip: those of the calls, None for the plain cell's and for no limits. The result stands
    for `weights` in the functions of that kind.

    >>> import numpy as np
    >>> W, R = np.ones((4, 1), np.float32), np.ones((4, 1), np.float32)
    >>> packed = pack("lstm", (W, R, None, None))
    >>> packed.hidden_size, packed.directions
    (1, 1)
    """
    named = CELLS[checks.choice("cell", cell, CELLS)]
    checks.choice("kind", kind, ("forward", "backward"))
    if "c" not in named.states and cell_clip is not None:
        checks.fail(ValueError, "cell_clip", checks.describe(cell_clip), f"None: {cell!r} has no c")
    own = PLAIN.get(named.kind) if activations is None else activations
    if named.kind == "LSTM":
        row = lstm_cell(**named.options, activations=own, clip=clip, cell_clip=cell_clip)
    elif named.kind == "GRU":
        row = gru_cell(**named.options, activations=own, clip=clip)
    else:
        row = rnn_cell(**{"nonlinearity": "tanh", **named.options}, activations=own, clip=clip)
    if named.general and row[1] is None:
        needs = f"activations or clips, or {row[0].name!r}"
        checks.fail(ValueError, "cell", f"{cell!r} without what sets it apart", needs)
    return _pack(row, weights, FORWARD if kind == "forward" else BACKWARD)[0]


def _pack(row: Row, weights: Any, kind: int) -> tuple[Any, tuple | None]:
    """The pack of this kind, and the checked raw weights, or None if they came packed."""
    cell, functions = row
    if type(weights) is not _kernels.Pack:
        projected = cell.kind == "LSTM"
        raw = checks.weights("weights", weights, len(cell.gates), cell.unit_weights, projected)
        how = kind, config.threads, config.plan, None, functions
        return _kernels.pack(cell.number, raw, *how), raw
    if not weights.nbytes:  # none that `pack` has made
        checks.fail(ValueError, "weights", "an empty pack", "one that `pack` has made")
    if weights.cell != cell.number:
        name = next(c.name for c in CELLS.values() if c.number == weights.cell)
        checks.fail(ValueError, "weights", f"a pack for {name!r}", f"one for {cell.name!r}")
    if weights.functions != functions:
        got, needs = f"a pack for {weights.functions!r}", f"one for {functions!r}"
        checks.fail(ValueError, "weights", got, needs)
    if weights.kind != kind:
        words = {FORWARD: "forward", BACKWARD: "backward"}
        got = f"a pack of kind {words[weights.kind]!r}"
        checks.fail(ValueError, "weights", got, f"one of kind {words[kind]!r}")
    return weights, None


def _dtype(packed: Any) -> np.dtype:
    return checks.FLOAT32 if packed.dtype == "f" else checks.FLOAT64


# ---------------------------------------------------------------------------- the same for all


def _forward(
    row: Row, x: Any, state: Any, weights: Any, lengths: Any, batch_first: bool, reverse: bool,
    train: bool, tape: str, mask: Any = None, between: Any = None,
) -> tuple[np.ndarray, Any, Tape | None]:  # fmt: skip
    batch_first = checks.boolean("batch_first", batch_first)
    reverse = checks.boolean("reverse", reverse)
    kind = checks.choice("tape", tape, TAPES)
    if not checks.boolean("train", train):
        if kind != "full":
            checks.fail(ValueError, "tape", f"{kind!r} with train=False", "train=True")
        kind = None
    cell = row[0]
    packed, _ = _pack(row, weights, FORWARD)
    H, P, D, dtype = packed.hidden_size, packed.proj_size, packed.directions, _dtype(packed)
    N = P or H
    if reverse and D == 2:
        needs = "False: of two directions the second is the reversed one"
        checks.fail(ValueError, "reverse", "True", needs)
    x, unbatched = checks.sequence("x", x, dtype, packed.input_size, batch_first)
    T, B, _ = x.shape
    numbers = (T + 2) * B * D * H + (tape_numbers(cell, T, B, H, D, kind) if kind else 0)
    checks.room("x", max(numbers, x.size), dtype.itemsize)
    pair = "c" in cell.states
    h_0 = c_0 = None
    if state is not None:
        h_0, c_0 = checks.states(checks.STATE, state, pair, dtype, (D, B, H), unbatched, P)
    if lengths is not None:
        lengths = checks.lengths("lengths", lengths, T, B, unbatched)
    more = None
    if mask is not None or between is not None:
        times = None
        if mask is not None:
            lengths, times = checks.mask("mask", mask, lengths, T, B, batch_first, unbatched)
        if between is not None:
            columns = D * N, D * H if pair else 0
            between = checks.between("between", between, T, B, columns, dtype)
            if kind and any(between.hold):
                needs = "(0, 0) with a tape: settings say where states are held in training"
                checks.fail(ValueError, "between.hold", str(between.hold), needs)
        more = More(times, between)

    y = result = new_sequence(T, B, D * N, dtype, batch_first, unbatched)
    h_n = np.empty((D, B, N), dtype)
    c_n = np.empty((D, B, H), dtype) if pair else None
    y = as_steps(result, batch_first, unbatched)
    kept = None
    if kind:
        kept = new_tape(cell, x, D, H, P, lengths, reverse, packed if kind == "light" else None)
        kept.batch_first, kept.unbatched = batch_first, unbatched
    run_forward(packed, x, h_0, c_0, y, h_n, c_n, lengths, reverse, kept, config.threads, more)
    if unbatched:
        h_n, c_n = h_n[:, 0], None if c_n is None else c_n[:, 0]
    return result, (h_n, c_n) if pair else h_n, kept


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


def _backward(
    row: Row, tape: Tape, weights: Any, dy: Any, dstate: Any, need: Iterable[str],
    clip: float | None = None, clip_norm: float | None = None, norms: bool = False,
) -> Gradients:  # fmt: skip
    cell = row[0]
    packed, raw = _pack(row, weights, BACKWARD)
    own = "x", "state", *cell.parameters(packed.proj_size > 0)
    needed = _ALL if need is NEEDS else checks.choices("need", need, NEEDS)
    if needed != _ALL and not needed.issubset(own):  # all asks for what there is
        checks.choices("need", needed, own)
    I, H, P, D = packed.input_size, packed.hidden_size, packed.proj_size, packed.directions
    N, dtype = P or H, _dtype(packed)
    tape = own_tape(tape, row, (I, H, P, D), dtype)
    T, B, _ = tape.x.shape
    pair = "c" in cell.states
    batch_first, unbatched = tape.batch_first, tape.unbatched
    if dy is not None:
        dy = checks.gradient("dy", dy, dtype, (T, B, D * N), batch_first, unbatched)
    dh_n = dc_n = None
    if dstate is not None:
        dh_n, dc_n = checks.states(checks.DSTATE, dstate, pair, dtype, (D, B, H), unbatched, P)
    checks.room("tape", T * B * I, dtype.itemsize)

    dx = dx_steps = dh_0 = dc_0 = None
    if "x" in needed:
        dx = new_sequence(T, B, I, dtype, batch_first, unbatched)
        dx_steps = as_steps(dx, batch_first, unbatched)
    if "state" in needed:
        dh_0 = np.empty((D, B, N), dtype)
        dc_0 = np.empty((D, B, H), dtype) if pair else None
    shapes = cell.weight_shapes(I, H, P)
    grads = tuple(
        tuple(
            np.empty(shapes[name], dtype)
            if name in needed and name in shapes and (raw is None or raw[d][p] is not None)
            else None
            for p, name in enumerate(PARAMETERS)
        )
        for d in range(D)
    )
    wanted = grads if needed.intersection(PARAMETERS) else None
    norms = checks.boolean("norms", norms)
    received = None
    if clip is not None or clip_norm is not None or norms or tape.between is not None:
        limits = checks.limits(clip, clip_norm, dtype)
        received = receive(tape, D, *limits, np.zeros((T, B, D), dtype) if norms else None)
    plan, threads = run_backward(
        packed, tape, dy, dh_n, dc_n, dx_steps, dh_0, dc_0, wanted, config.threads,
        received=received,
    )  # fmt: skip
    dstate_0 = None
    if dh_0 is not None:
        if unbatched:
            dh_0, dc_0 = dh_0[:, 0], None if dc_0 is None else dc_0[:, 0]
        dstate_0 = (dh_0, dc_0) if pair else dh_0
    there = [name in shapes for name in PARAMETERS]
    given = tuple(tuple(compress(own, there)) for own in grads)
    values = None if tape.between is None else (received.h, received.c)
    found = received.norms if norms else None
    return Gradients(dx, dstate_0, given if D == 2 else given[0], plan, threads, values, found)


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


def _step(row: Row, x: Any, state: Any, weights: Any) -> Any:
    cell = row[0]
    packed, _ = _pack(row, weights, FORWARD)
    I, H, P, dtype = packed.input_size, packed.hidden_size, packed.proj_size, _dtype(packed)
    if packed.directions != 1:
        checks.fail(ValueError, "weights", "two directions", "one: a step cannot run backwards")
    x, unbatched = checks.step_input("x", x, dtype, I)
    B = x.shape[1]
    checks.room("x", B * (I + H), dtype.itemsize)
    pair = "c" in cell.states
    h_0 = c_0 = None
    if state is not None:
        names = checks.STEP_STATE
        h_0, c_0 = checks.step_states(names, state, pair, dtype, (B, H), unbatched, P)
    y, h_n = (np.empty((1, B, P or H), dtype) for _ in range(2))
    c_n = np.empty((1, B, H), dtype) if pair else None
    run_forward(packed, x, h_0, c_0, y, h_n, c_n, None, False, None, config.threads)
    h, c = (None if s is None else s[0, 0] if unbatched else s[0] for s in (h_n, c_n))
    return (h, c) if pair else h


# ---------------------------------------------------------------------------------- by cell


LSTM_PLAIN, GRU_PLAIN = PLAIN["LSTM"], PLAIN["GRU"]


def _functions(
    plain: tuple[str, ...], letters: str, activations: Any, clip: Any, cell_clip: Any = None
) -> Functions | None:
    """What a cell computes with, checked; None if that is what the plain one does."""
    if activations is plain and clip is None and cell_clip is None:
        return None
    own = checks.activations("activations", activations, letters, ACTIVATIONS)
    limits = checks.limit("clip", clip), checks.limit("cell_clip", cell_clip)
    return None if (own, *limits) == (plain, None, None) else Functions(own, *limits)


def lstm_cell(
    peephole: bool, coupled: bool, layer_norm: str | None = None, activations: Any = LSTM_PLAIN,
    clip: Any = None, cell_clip: Any = None,
) -> Row:  # fmt: skip
    """The row of the table that an LSTM's options ask for, and its functions, if it is general; so
    of the others. Checks the options."""
    peephole = checks.boolean("peephole", peephole)
    coupled = checks.boolean("coupled", coupled)
    functions = _functions(LSTM_PLAIN, "fgh", activations, clip, cell_clip)
    if layer_norm is not None:
        others = dict(peephole=peephole, coupled=coupled)
        layer_norm = checks.layer_norm(layer_norm, ("gates", "gates+cell"), functions, **others)
    options = dict(peephole=peephole, coupled=coupled, layer_norm=layer_norm)
    return cell_of("LSTM", functions is not None, **options), functions


def rnn_cell(
    nonlinearity: str, layer_norm: str | None = None, activations: Any = None, clip: Any = None
) -> Row:
    word = checks.choice("nonlinearity", nonlinearity, ("tanh", "relu"))
    if activations is not None:
        (own,) = checks.activations("activations", activations, "f", ACTIVATIONS)
        if word not in ("tanh", own):
            got = f"{word!r} beside activations=({own!r},)"
            checks.fail(ValueError, "nonlinearity", got, "to be left out, or the same")
        word = own
    clip = checks.limit("clip", clip)
    plain = clip is None and word in ("tanh", "relu")
    functions = None if plain else Functions((word,), clip)
    if layer_norm is not None:
        layer_norm = checks.layer_norm(layer_norm, ("gates",), functions)
    if plain:
        return cell_of("RNN", nonlinearity=word, layer_norm=layer_norm), None
    return cell_of("RNN", True), functions


def gru_cell(
    reset_after: bool, layer_norm: str | None = None, activations: Any = GRU_PLAIN,
    clip: Any = None,
) -> Row:  # fmt: skip
    reset_after = checks.boolean("reset_after", reset_after)
    functions = _functions(GRU_PLAIN, "fg", activations, clip)
    if layer_norm is not None:
        others = dict(reset_after=reset_after)
        layer_norm = checks.layer_norm(layer_norm, ("gates",), functions, **others)
    options = dict(reset_after=reset_after, layer_norm=layer_norm)
    return cell_of("GRU", functions is not None, **options), functions


def _row_of_tape(kind: str, tape: Any, *options: Any) -> Row:
    """A backward call's row: by its options, and by the activations and clips of its tape."""
    row_of = {"RNN": rnn_cell, "LSTM": lstm_cell, "GRU": gru_cell}[kind]
    functions = getattr(tape, "functions", None) if type(tape) is Tape else None
    row = row_of(*options)
    if functions is None or getattr(CELLS.get(tape.cell), "kind", None) != kind:
        return row  # `own_tape` has the last word
    altered = "an altered one", "one as forward returned it"
    if type(functions) is not Functions or len(functions) != 3:
        checks.fail(ValueError, "tape", *altered)
    try:
        row = row_of(*options, *(functions if kind == "LSTM" else functions[:2]))
    except (TypeError, ValueError):
        checks.fail(ValueError, "tape", f"one of {functions!r}", "one that the options made")
    return row


def lstm_forward(
    x: Any, state: Any, weights: Any, *, lengths: Any = None, batch_first: bool = False,
    reverse: bool = False, train: bool = True, tape: str = "full", mask: Any = None,
    between: Between | None = None, peephole: bool = False, coupled: bool = False,
    layer_norm: str | None = None, activations: Any = LSTM_PLAIN, clip: float | None = None,
    cell_clip: float | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], Tape | None]:  # fmt: skip
    """A layer of LSTM cells through time (equations: `rnnfast.reference.lstm_step` and its
    variants).

    x [T, B, I], [B, T, I] with `batch_first`, or [T, I]; state: (h_0, c_0), each [D, B, H]
    ([D, H] for an x of two dimensions), or None for zeros; lengths [B], the valid steps of each
    row; reverse: one direction, from each row's last valid step to its first; tape: "light" keeps
    states at some sqrt(T) steps alone, and backward computes all others again, to the same bits.
    peephole: gates see c, through a fifth weight P [3*H], of i, f and o; coupled: the forget gate
    is 1 - i, so that G is 3 (i g o), and P, of i and o, [2*H]. layer_norm: "gates" normalises W x,
    R h, and c on its way into h, "gates+cell" also the c that is carried on; gains g_ih and g_hh
    [4*H], g_c and its bias b_c [H] (or None) follow the biases, which are added after it. A
    projection W_hr [P, H], if it is the last of the weights, makes h and y of P numbers instead of
    H; R is [G*H, P] then.
    mask, instead of lengths: bool in x's layout [T, B], the steps that there are of each row, with
    holes in the middle too; the states pass over what is missing, and y is zero there. between:
    what happens to states between steps, see `Between`.
    activations: f of the gates i, f and o, g of the gate g, h of c, each one of ONNX's names in
    lower case (`rnnfast.cells.ACTIVATIONS`), or a tuple of it and its alpha, or alpha and beta;
    clip: what f and g are taken of is held within -clip and clip; cell_clip: so is the new c,
    before the output gate and h see it. Where a clip has changed a number, no gradient passes.

    Returns y [T, B, D*H] in the layout of x, zero past a row's length; (h_n, c_n), the states
    after each row's last valid step; and the tape, None without `train`. Raises TypeError,
    ValueError, MemoryError, and KeyboardInterrupt when interrupted.

    >>> import numpy as np
    >>> weights = np.ones((4, 1)), np.ones((4, 1)), None, None
    >>> y, (h_n, c_n), tape = lstm_forward(np.zeros((3, 2, 1)), None, weights)
    >>> y.shape, h_n.shape, tape.gates.shape
    ((3, 2, 1), (1, 2, 1), (1, 3, 2, 4, 1))
    """
    row = lstm_cell(peephole, coupled, layer_norm, activations, clip, cell_clip)
    return _forward(
        row, x, state, weights, lengths, batch_first, reverse, train, tape, mask, between
    )


def lstm_backward(
    tape: Tape, weights: Any, dy: Any, dstate: Any, *, need: Iterable[str] = NEEDS,
    clip: float | None = None, clip_norm: float | None = None, norms: bool = False,
    peephole: bool = False, coupled: bool = False, layer_norm: str | None = None,
) -> Gradients:  # fmt: skip
    """Gradients through the call of `lstm_forward` that made `tape`, which may be used again.

    weights: those of the forward call; dy: shaped as y, dstate: (dh_n, dc_n) shaped as the states,
    each may be None for zeros; need: which of "x", "state", "weight_ih", "weight_hh", "bias_ih",
    "bias_hh", "weight_peephole", "weight_norm_ih", "weight_norm_hh", "weight_norm_c",
    "bias_norm_c" and "weight_hr" to compute, by default all that there are; peephole, coupled,
    layer_norm: those of the forward call, whose activations and clips the tape knows. clip (of
    gradients, and no option of the cell), clip_norm: the gradient by h that later steps send to a
    step is clipped to [-clip, clip], and then, if its norm over the row's numbers is greater,
    scaled to clip_norm, before that of y comes in; norms: whether the norms of all of it, step by
    step, are wanted, to see it explode or vanish. Returns `Gradients`. Raises as `lstm_forward`.

    >>> import numpy as np
    >>> weights = np.ones((4, 1)), np.ones((4, 1)), None, None
    >>> y, _, tape = lstm_forward(np.zeros((3, 2, 1)), None, weights)
    >>> grads = lstm_backward(tape, weights, np.ones_like(y), None, need=("x", "weight_ih"))
    >>> grads.x.shape, grads.weights[0].shape, grads.state
    ((3, 2, 1), (4, 1), None)
    """
    row = _row_of_tape("LSTM", tape, peephole, coupled, layer_norm)
    return _backward(row, tape, weights, dy, dstate, need, clip, clip_norm, norms)


def lstm_step(
    x: Any, state: Any, weights: Any, *, peephole: bool = False, coupled: bool = False,
    layer_norm: str | None = None, activations: Any = LSTM_PLAIN, clip: float | None = None,
    cell_clip: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One step of an LSTM layer: x [B, I], state (h, c) each [B, H] or None -> the next (h, c).

    [I] and [H] without a batch. Raises as `lstm_forward`.

    >>> import numpy as np
    >>> h, c = lstm_step(np.zeros(1), None, (np.ones((4, 1)), np.ones((4, 1)), None, None))
    >>> h, c
    (array([0.]), array([0.]))
    """
    row = lstm_cell(peephole, coupled, layer_norm, activations, clip, cell_clip)
    return _step(row, x, state, weights)


def rnn_forward(
    x: Any, state: Any, weights: Any, *, nonlinearity: str = "tanh", lengths: Any = None,
    batch_first: bool = False, reverse: bool = False, train: bool = True, tape: str = "full",
    mask: Any = None, between: Between | None = None, layer_norm: str | None = None,
    activations: Any = None, clip: float | None = None,
) -> tuple[np.ndarray, np.ndarray, Tape | None]:  # fmt: skip
    """A layer of simple recurrent cells, "tanh" or "relu", through time.

    As `lstm_forward`, but for the state, which is h_0 alone, and the one kind of layer_norm,
    "gates", with gains g_ih and g_hh [H] (equations: `rnnfast.reference.rnn_tanh_step`,
    `rnn_relu_step` and theirs with `norm`). activations: a tuple of one, which stands in the place
    of nonlinearity; that is to be left out then.

    >>> import numpy as np
    >>> weights = np.ones((1, 1)), np.full((1, 1), 2.0), None, None
    >>> y, h_n, _ = rnn_forward(np.ones((3, 1)), None, weights, nonlinearity="relu")
    >>> y.tolist(), h_n.tolist()
    ([[1.0], [3.0], [7.0]], [[7.0]])
    """
    row = rnn_cell(nonlinearity, layer_norm, activations, clip)
    return _forward(
        row, x, state, weights, lengths, batch_first, reverse, train, tape, mask, between
    )


def rnn_backward(
    tape: Tape, weights: Any, dy: Any, dstate: Any, *, nonlinearity: str = "tanh",
    need: Iterable[str] = NEEDS, clip: float | None = None, clip_norm: float | None = None,
    norms: bool = False, layer_norm: str | None = None,
) -> Gradients:  # fmt: skip
    """Gradients through the call of `rnn_forward` that made `tape`; see `lstm_backward`. One whose
    activation was relu alone, without a clip, is of nonlinearity "relu" here, however it was asked
    for.

    >>> import numpy as np
    >>> weights = np.ones((1, 1)), np.full((1, 1), 2.0), None, None
    >>> _, _, tape = rnn_forward(np.ones((3, 1)), None, weights, nonlinearity="relu")
    >>> grads = rnn_backward(tape, weights, None, np.ones((1, 1)), nonlinearity="relu")
    >>> grads.x.tolist(), grads.state.tolist()
    ([[4.0], [2.0], [1.0]], [[8.0]])
    """
    row = _row_of_tape("RNN", tape, nonlinearity, layer_norm)
    return _backward(row, tape, weights, dy, dstate, need, clip, clip_norm, norms)


def rnn_step(
    x: Any, state: Any, weights: Any, *, nonlinearity: str = "tanh",
    layer_norm: str | None = None, activations: Any = None, clip: float | None = None,
) -> np.ndarray:  # fmt: skip
    """One step of a simple recurrent layer: x [B, I], h [B, H] or None -> the next h.

    >>> import numpy as np
    >>> weights = np.ones((1, 1)), np.full((1, 1), 2.0), None, None
    >>> rnn_step(np.ones(1), np.ones(1), weights, nonlinearity="relu")
    array([3.])
    """
    return _step(rnn_cell(nonlinearity, layer_norm, activations, clip), x, state, weights)


def gru_forward(
    x: Any, state: Any, weights: Any, *, reset_after: bool = True, lengths: Any = None,
    batch_first: bool = False, reverse: bool = False, train: bool = True, tape: str = "full",
    mask: Any = None, between: Between | None = None, layer_norm: str | None = None,
    activations: Any = GRU_PLAIN, clip: float | None = None,
) -> tuple[np.ndarray, np.ndarray, Tape | None]:  # fmt: skip
    """A layer of gated recurrent units through time; the reset gate after the product, or before.

    As `lstm_forward`, but for the state, which is h_0 alone, and the one kind of layer_norm,
    "gates", with gains g_ih and g_hh [3*H], where the reset gate is after the product (equations:
    `rnnfast.reference.gru_step`, `gru_reset_before_step`, `gru_norm_step`). activations: f of the
    gates r and z, g of n.

    >>> import numpy as np
    >>> weights = np.ones((3, 1)), np.ones((3, 1)), None, None
    >>> y, h_n, tape = gru_forward(np.zeros((2, 4, 1)), None, weights)
    >>> y.shape, h_n.shape, tape.gates.shape
    ((2, 4, 1), (1, 4, 1), (1, 2, 4, 4, 1))
    """
    row = gru_cell(reset_after, layer_norm, activations, clip)
    return _forward(
        row, x, state, weights, lengths, batch_first, reverse, train, tape, mask, between
    )


def gru_backward(
    tape: Tape, weights: Any, dy: Any, dstate: Any, *, reset_after: bool = True,
    need: Iterable[str] = NEEDS, clip: float | None = None, clip_norm: float | None = None,
    norms: bool = False, layer_norm: str | None = None,
) -> Gradients:  # fmt: skip
    """Gradients through the call of `gru_forward` that made `tape`; see `lstm_backward`.

    >>> import numpy as np
    >>> weights = np.ones((3, 1)), np.ones((3, 1)), None, None
    >>> y, _, tape = gru_forward(np.zeros((2, 4, 1)), None, weights)
    >>> gru_backward(tape, weights, np.ones_like(y), None, need="state").state.shape
    (1, 4, 1)
    """
    row = _row_of_tape("GRU", tape, reset_after, layer_norm)
    return _backward(row, tape, weights, dy, dstate, need, clip, clip_norm, norms)


def gru_step(
    x: Any, state: Any, weights: Any, *, reset_after: bool = True,
    layer_norm: str | None = None, activations: Any = GRU_PLAIN, clip: float | None = None,
) -> np.ndarray:  # fmt: skip
    """One step of a GRU layer: x [B, I], h [B, H] or None -> the next h.

    >>> import numpy as np
    >>> gru_step(np.zeros((2, 1)), None, (np.ones((3, 1)), np.ones((3, 1)), None, None)).shape
    (2, 1)
    """
    return _step(gru_cell(reset_after, layer_norm, activations, clip), x, state, weights)

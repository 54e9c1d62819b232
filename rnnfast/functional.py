"""One recurrent layer, in one or two directions, as functions: check, allocate, call, return.

Knows `layer`, which does the work, the table of cells and packs; no stack of layers and no module.
The public functions are the same for each cell, with checks in front.

T steps, B batch, I input size, H hidden size, P projection size or 0, N numbers of h (P or H),
D directions, G parameter gates.
`weights` is (W [G*H, I], R [G*H, H], b_ih [G*H], b_hh [G*H]) for one direction, a bias may be None;
a pair of such tuples for two; or what `pack` made of either. Gates are in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from . import _kernels, checks, config
from .between import Between
from .cells import ACTIVATIONS, CELLS, PARAMETERS, PLAIN, Functions, cell_of
from .layer import (
    BACKWARD,
    FORWARD,
    TAPES,
    More,
    Row,
    Tape,
    as_steps,
    dtype_of,
    new_sequence,
    new_tape,
    own_tape,
    receive,
    run_backward,
    run_forward,
    tape_numbers,
)

__all__ = [
    "Between", "Gradients", "Tape", "gru_backward", "gru_forward", "gru_step", "lstm_backward",
    "lstm_forward", "lstm_step", "pack", "rnn_backward", "rnn_forward", "rnn_step",
]  # fmt: skip


NEEDS = ("x", "state", *PARAMETERS)
_ALL = frozenset(NEEDS)


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
    H, P, D, dtype = packed.hidden_size, packed.proj_size, packed.directions, dtype_of(packed)
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
    N, dtype = P or H, dtype_of(packed)
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


def _step(row: Row, x: Any, state: Any, weights: Any) -> Any:
    cell = row[0]
    packed, _ = _pack(row, weights, FORWARD)
    I, H, P, dtype = packed.input_size, packed.hidden_size, packed.proj_size, dtype_of(packed)
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

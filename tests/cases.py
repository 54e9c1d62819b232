"""The tables all tests loop over: shapes, lengths, weights; a case, its reference, its kernel run.

Knows the reference and the compiled layer. Leaves judging to the tests and to `tolerances`.
"""

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tolerances import assert_close

import rnnfast
from rnnfast import _kernels, functional, reference
from rnnfast.between import Between, Received
from rnnfast.cells import CELLS, PARAMETERS, Functions

DTYPES = ("float32", "float64")
DIRECTIONS = ("forward", "reverse", "bidirectional")
# Runs remembered: the shapes times the kinds of lengths, with which tests walk through the isas.
CACHED = 128


class Shape(NamedTuple):
    """T steps, B batch, I input size, H hidden size."""

    T: int
    B: int
    I: int
    H: int


# Vectors hold 2, 4, 8 or 16 numbers, register tiles up to 8 rows and 4 vectors, groups of units 32
# or 64, panels of sums 64 or 128 terms or that many rows of (t, b): sizes lie at these, one below,
# one above; single rows, which take several panels at once, have sizes of their own; the rest are
# ones and primes.
SHAPES = tuple(
    Shape(*shape)
    for shape in (
        (1, 1, 1, 1),
        (3, 2, 1, 2),
        (2, 1, 5, 3),
        (4, 5, 3, 4),
        (7, 3, 2, 5),
        (5, 1, 7, 7),
        (3, 6, 8, 8),
        (4, 7, 4, 9),
        (2, 13, 16, 15),
        (3, 4, 17, 16),
        (6, 3, 1, 17),
        (2, 12, 31, 31),
        (3, 11, 9, 32),
        (5, 5, 13, 33),
        (2, 3, 63, 64),
        (2, 7, 129, 65),
        (2, 2, 257, 6),
        (1, 19, 6, 128),
        (67, 4, 3, 5),
        (3, 1, 70, 63),
        (2, 1, 3, 200),
        (2, 10, 65, 72),
    )
)
# Draws whose dx, of one number, cancels to a 230th of its terms by chance: it says nothing of them.
# Inputs or units of a normalised cell that are few, see `_says_something`.
FEW = 18
CANCELLING = {("lstm_coupled", "reverse", SHAPES[0], "uneven", "default", 0)}
LENGTHS = ("none", "uneven", "with zero", "all zero")
WEIGHTS = ("default", "hard")
HAPPENS = ("mask", "set", "hold", "keep", "clip", "c")  # "c": a gradient by the c of each step
LOSSES = ("both", "y", "state")  # by what the loss depends on: dy and dstate, or one of them


# Of general cells. The first ones hold a gate, and so the states, within bounds; the others do so
# where what they are taken of is clipped.
BOUNDED = (
    "sigmoid", "tanh", "softsign", ("hardsigmoid", 0.3125, 0.4375), ("scaledtanh", 0.875, 0.75),
)  # fmt: skip
UNBOUNDED = (
    "relu", "softplus", ("leakyrelu", 0.125), ("thresholdedrelu", 0.25), ("elu", 0.75),
    ("affine", 0.5, 0.25),
)  # fmt: skip
SMOOTH = "sigmoid", "tanh", "softsign", ("scaledtanh", 0.875, 0.75), "softplus"
# Gates that damp what a state passes on, as those of the plain cells do.
DAMPING = "sigmoid", ("hardsigmoid", 0.3125, 0.4375)
CLIPS, CELL_CLIPS = (0.75, 1.5, None), (0.5, 1.25, None)
LETTERS = {"RNN": "f", "GRU": "fg", "LSTM": "fgh"}
TURNS = 99  # of `draw_functions`, after which they come again


def draw_functions(cell, *key, damping=False, smooth=False):
    """Activations and clips for a general cell, by a turn or any other key; None for other cells.

    In eleven turns each activation is in each place. damping: of many steps, the gates do not let
    errors grow. smooth: no kinks, on whose two sides errors would put a number; no clips then.
    """
    row = CELLS[cell]
    if not row.general:
        return None
    turn = key[0] if len(key) == 1 else zlib.crc32(repr(("functions", cell, *key)).encode())
    every = SMOOTH if smooth else BOUNDED + UNBOUNDED
    places = range(len(LETTERS[row.kind]))
    own = tuple(every[((i + 1) * turn + 3 * i) % len(every)] for i in places)
    if (damping or smooth) and row.kind != "RNN":
        own = "sigmoid" if smooth else DAMPING[turn % 2], *own[1:]
    if smooth:
        return Functions(own)
    clip, cell_clip = CLIPS[turn // 11 % 3], CELL_CLIPS[turn // 33 % 3]
    if own[0] in UNBOUNDED:
        clip = clip or 0.75
        cell_clip = cell_clip or 1.25
    return Functions(own, clip, cell_clip if row.kind == "LSTM" else None)


# Of tests that are not about them; None for cells that are not general.
FUNCTIONS = dict.fromkeys(CELLS) | {
    "rnn_general": Functions((("elu", 0.75),), 1.5),
    "lstm_general": Functions((DAMPING[1], "softsign", "softplus"), 1.5, 1.25),
    "lstm_peephole_general": Functions(("sigmoid", ("leakyrelu", 0.125), "tanh"), None, 0.5),
    "lstm_coupled_general": Functions(("softplus", "relu", ("scaledtanh", 0.875, 0.75)), 0.75),
    "lstm_coupled_peephole_general": Functions(("sigmoid", "tanh", "tanh"), 0.75),
    "gru_general": Functions(("softsign", ("affine", 0.5, 0.25)), 1.5),
    "gru_reset_before_general": Functions(("sigmoid", ("thresholdedrelu", 0.25))),
}


def make_lengths(kind, T, B, rng):
    """Lengths [B] of a kind in LENGTHS, in no order, or None; some row has length T if it may."""
    if kind == "none":
        return None
    lengths = np.zeros(B, np.intp)
    if kind != "all zero":
        lengths[:] = rng.integers(min(1, T), T + 1, B)
        lengths[rng.integers(B)] = T
    if kind == "with zero":
        lengths[rng.permutation(B)[: (B + 2) // 3]] = 0
    return lengths


BIASES = "bias_ih", "bias_hh"
# The root of a normalisation's EPSILON: it takes half of the spread of numbers that are spread so.
SPREAD = 3e-3
# About so much, in default draws: what passes from step to step is damped, and errors with it.
GAINS = {"weight_norm_ih": 1, "weight_norm_hh": 1 / 4, "weight_norm_c": 1 / 8}


def small_c(cell, H):
    """Whether a normalised c has two numbers alone: see `make_weights`."""
    return "weight_norm_c" in CELLS[cell].norms and H == 2


def make_weights(cell, I, H, rng, *, bias=True, kind="default", P=0):
    """(W, R, b_ih, b_hh), weights of single units and a projection, as far as there are such, in
    float64, unequal in every gate.

    Equal ones would hide a wrong order.

    "default" is the initialisation of the modules, U(±1/sqrt(H)). "hard" is 4 times that, with
    biases in ±3: gates saturate, cells add up, gradients grow or vanish.

    Of a normalised row v, the gradient along v itself is but EPSILON / (var + EPSILON) of its
    terms. Where v has few dimensions, as W x of few x, R h of few units or a c of two, most of the
    gradient lies along v, and float32, NumPy's as well, has lost it for a large var. So default
    weights are so small that W x and R h have some SPREAD, and such a c likewise; "hard" ones are
    not. Gains lie about 1/2, of "hard" about 1, where an RNN passes on errors undamped.
    """
    shapes = CELLS[cell].weight_shapes(I, H, P)
    limit = H**-0.5
    arrays = {name: rng.uniform(-limit, limit, shape) for name, shape in shapes.items()}
    if kind == "hard":
        for name in arrays:
            arrays[name] *= 3 / limit if name in BIASES else 4
    if CELLS[cell].norms:
        for name in arrays:
            if name.startswith("weight_norm"):
                gain = GAINS[name] if kind == "default" else 1
                arrays[name] = gain * rng.uniform(0.5, 1.5, shapes[name])
        if kind == "default":
            arrays["weight_ih"] *= SPREAD * (3 * H / I) ** 0.5  # x has a spread of 1
            arrays["weight_hh"] *= SPREAD * (10 * H / (P or H)) ** 0.5  # h one of some 1/2
            if small_c(cell, H):
                for name in arrays.keys() - {"weight_ih", "weight_hh", "weight_hr"}:
                    arrays[name] *= SPREAD
    if not bias:
        arrays |= {name: None for name in arrays if name.startswith("bias")}
    return tuple(arrays[name] for name in PARAMETERS if name in arrays)


def past_lengths(lengths, T, B):
    """bool [T, B]: true past a row's length."""
    if lengths is None:
        return np.zeros((T, B), bool)
    return np.arange(T)[:, None] >= lengths


def poison(sequence, lengths, mask=None):
    """A copy of sequence [T, B, N] with NaN past each row's length, or where mask is false."""
    out = sequence.copy()
    out[past_lengths(lengths, *sequence.shape[:2]) if mask is None else ~mask] = np.nan
    return out


@dataclass(frozen=True)
class Case:
    """One layer's run, completely determined by these fields; prints as what a failure needs."""

    cell: str
    shape: Shape
    direction: str = "forward"
    dtype: str = "float32"
    lengths: str = "none"
    bias: bool = True
    initial: bool = True  # initial states given
    loss: str = "both"
    weights: str = "default"
    seed: int = 0
    projection: int = 0  # P
    happens: tuple = ()  # of HAPPENS, between steps

    @property
    def output(self):
        """Numbers of h, and of y in one direction."""
        return self.projection or self.shape.H

    @property
    def parameters(self):
        """Names of the parameters of a direction."""
        return CELLS[self.cell].parameters(self.projection > 0)

    @property
    def functions(self):
        """What a general cell computes with, or None."""
        shape = tuple(self.shape)
        key = self.direction, shape, self.lengths, self.weights, self.seed, self.projection
        how = dict(damping=self.shape.T > 20, smooth=self.weights == "hard")
        return draw_functions(self.cell, *key, **how)

    @property
    def sizes(self):
        """Numbers of each state."""
        return (self.output, self.shape.H)[: len(self.states)]

    @property
    def directions(self):
        """D."""
        return 2 if self.direction == "bidirectional" else 1

    @property
    def states(self):
        """Names of the states: ("h",) or ("h", "c")."""
        return CELLS[self.cell].states

    def reverse(self, d):
        """Whether direction d runs from the last valid step to the first."""
        return self.direction == "reverse" or d == 1


class Inputs(NamedTuple):
    """Everything a run reads, in its dtype; read-only, with NaN past the lengths."""

    x: np.ndarray  # [T, B, I]
    lengths: np.ndarray | None  # [B]
    state: tuple | None  # of [D, B, H]
    weights: tuple  # of (W, R, b_ih, b_hh), one for each direction
    dy: np.ndarray | None  # [T, B, D*H]
    dstate: tuple | None  # of [D, B, H]
    mask: np.ndarray | None = None  # bool [T, B], beside lengths that count its steps
    between: reference.Between | None = None
    dc_steps: np.ndarray | None = None  # [T, B, D*H]


@lru_cache(maxsize=CACHED)
def make_inputs(case):
    """The `Inputs` of a case; of a normalised cell, of a draw of which float32 tells something."""
    draw, inputs = 0, _draw(case, 0)
    while not _says_something(case, draw):
        draw += 1
        inputs = _draw(case, draw)
    return inputs


def _says_something(case, draw):
    """Whether float32 NumPy is within a third of the bounds, as all but some draws of a normalised
    cell are: with few inputs or units, steps cancel by chance, see `make_weights`.
    """
    if not CELLS[case.cell].norms or case.weights == "hard" or min(case.shape[2:]) >= FEW:
        return True
    case = replace(case, dtype="float32")
    inputs = _draw(case, draw)
    exact, plain = (_run_reference(case, inputs, dtype) for dtype in ("float64", "float32"))
    gradients = "d", "weight", "bias"
    try:
        for name, want in exact.items():
            what = "gradient" if name.startswith(gradients) else "forward"
            axis = 0 if name in ("y", "dx") else None
            assert_close(name, plain[name], want, case.dtype, what, time_axis=axis, share=1 / 3)
    except AssertionError:
        return False
    return True


def _draw(case, draw):
    """Random `Inputs`."""
    T, B, I, H = case.shape
    D, N = case.directions, case.output
    # By what the numbers depend on, so that neither dtype nor isa changes them.
    key = (case.cell, case.direction, case.shape, case.lengths, case.weights, case.seed)
    if case.projection:
        key = (*key, case.projection)
    if case.happens:
        key = (*key, case.happens)
    if key in CANCELLING:
        key = (*key, "again")
    if draw:
        key = (*key, draw)
    rng = np.random.default_rng(zlib.crc32(repr(key).encode()))

    def cast(array):
        if array is None:
            return None
        array = array.astype(case.dtype)
        array.flags.writeable = False
        return array

    lengths, mask = make_lengths(case.lengths, T, B, rng), None
    if "mask" in case.happens:
        mask = rng.random((T, B)) < 0.6
        mask &= ~past_lengths(lengths, T, B)
        lengths = mask.sum(axis=0)
    weights = tuple(
        make_weights(case.cell, I, H, rng, bias=case.bias, kind=case.weights, P=case.projection)
        for _ in range(D)
    )
    state = tuple(rng.standard_normal((D, B, size)) / 2 for size in case.sizes)
    if small_c(case.cell, H):
        state = state[0], state[1] * SPREAD
    dstate = tuple(rng.standard_normal((D, B, size)) for size in case.sizes)
    x = poison(rng.standard_normal((T, B, I)), lengths, mask)
    dy = poison(rng.standard_normal((T, B, D * N)), lengths, mask)
    between, dc_steps = make_between(case, rng)
    between = between._replace(
        h=tuple((where, cast(value)) for where, value in between.h),
        c=tuple((where, cast(value)) for where, value in between.c),
        keep=cast(between.keep),
    )
    if lengths is not None:
        lengths.flags.writeable = False
    return Inputs(
        x=cast(x),
        lengths=lengths,
        state=tuple(map(cast, state)) if case.initial else None,
        weights=tuple(tuple(map(cast, one)) for one in weights),
        dy=None if case.loss == "state" else cast(dy),
        dstate=None if case.loss == "y" else tuple(map(cast, dstate)),
        mask=mask,
        between=between if set(case.happens) - {"mask"} else None,
        dc_steps=cast(dc_steps),
    )


def make_between(case, rng):
    """What happens between the steps of a case, and dc_steps [T, B, D*H] or None."""
    T, B, _, H = case.shape
    D, N = case.directions, case.output
    between, dc_steps = reference.Between(), None
    if "set" in case.happens:  # of h all steps and rows alike where numbers are given
        values = rng.standard_normal((T, B, D * N)), rng.standard_normal((T, B, D * H))
        where = np.broadcast_to(np.arange(D * N) % 3 == 1, (T, B, D * N))
        h = (rng.random((T, B, D * N)) < 0.3, None), (where, values[0])
        c = (rng.random((T, B, D * H)) < 0.2, values[1]), (rng.random((T, B, D * H)) < 0.3, None)
        if case.seed == 1:  # one held number on the other
            c = (rng.random((T, B, D * H)) < 0.5, None), c[1]
            h = h[0], (rng.random((T, B, D * N)) < 0.5, None)
        between = between._replace(h=h, c=c if "c" in case.states else ())
    if "hold" in case.happens:
        between = between._replace(hold=(0.3, 0.2))
    if "keep" in case.happens:
        between = between._replace(keep=(rng.random((T, B, D * N)) < 0.7) / 0.7)
    if "clip" in case.happens:  # neither all of them nor none
        between = between._replace(clip=0.5, clip_norm=0.7)
    if "c" in case.happens and "c" in case.states:
        dc_steps = rng.standard_normal((T, B, D * H))
    return between, dc_steps


def of_direction(between, dc_steps, case, d):
    """Direction d's part of what happens between steps."""
    if between is None:
        return None, None

    def part(array, size):
        return None if array is None else array[..., d * size : (d + 1) * size]

    N, H = case.output, case.shape.H
    own = between._replace(
        h=tuple((part(where, N), part(value, N)) for where, value in between.h),
        c=tuple((part(where, H), part(value, H)) for where, value in between.c),
        keep=part(between.keep, N),
    )
    return own, part(dc_steps, H)


def _promote(value, dtype):
    """An array, None, or a tuple of such, in another dtype."""
    if isinstance(value, tuple):
        return tuple(_promote(one, dtype) for one in value)
    return None if value is None else value.astype(dtype)


@lru_cache(maxsize=CACHED)
def run_reference(case, dtype="float64"):
    """A case by the reference, computed in `dtype` from the inputs as rounded to the case's own.

    Returns a dict of read-only arrays: y, h_n, c_n, tape_gates [D, T, B, Gt, H], tape_h and tape_c
    [D, T+1, B, H] (zeros where they mean nothing), dx, dh_0, dc_0, and for direction d the
    gradients weight_ih[d] and so on; no entry for what the cell or the case does not have.
    """
    return _run_reference(case, make_inputs(case), dtype)


def _run_reference(case, given, dtype):
    x, state, weights, dy, dstate = (
        _promote(v, dtype) for v in (given.x, given.state, given.weights, given.dy, given.dstate)
    )
    lengths, D = given.lengths, case.directions
    between, dc_steps = given.between, _promote(given.dc_steps, dtype)
    if between is not None:
        between = between._replace(
            h=tuple((where, _promote(value, dtype)) for where, value in between.h),
            c=tuple((where, _promote(value, dtype)) for where, value in between.c),
            keep=_promote(between.keep, dtype),
        )
    ys, runs, tapes = [], [], []
    dys = [None] * D if dy is None else np.split(dy, D, axis=2)
    for d in range(D):
        own_between, own_dc_steps = of_direction(between, dc_steps, case, d)
        how = dict(lengths=lengths, reverse=case.reverse(d), mask=given.mask, between=own_between)
        how["functions"] = case.functions
        own = weights[d]
        if case.projection:
            *own, how["projection"] = own
        first = None if state is None else tuple(s[d] for s in state)
        last = None if dstate is None else tuple(s[d] for s in dstate)
        y, state_n, tape = reference.forward(case.cell, x, first, own, **how)
        how["dc_steps"] = own_dc_steps
        grads = reference.backward(case.cell, x, tape, own, dys[d], last, **how)
        ys.append(y)
        tapes.append(tape)
        runs.append((state_n, grads))

    out = {"y": np.concatenate(ys, axis=2), "dx": sum(grads["x"] for _, grads in runs)}
    for i, name in enumerate(case.states):
        out[f"{name}_n"] = np.stack([state_n[i] for state_n, _ in runs])
        out[f"d{name}_0"] = np.stack([grads["state"][i] for _, grads in runs])
        out[f"tape_{name}"] = np.nan_to_num(np.stack([tape[name] for tape in tapes]))
    if CELLS[case.cell].tape_gates:
        out["tape_gates"] = np.nan_to_num(np.stack([tape["gates"] for tape in tapes]))
    if "c" in case.happens and "c" in case.states:
        T, B, _, H = case.shape
        out["c_steps"] = np.zeros((T, B, D * H), dtype)
        for d, tape in enumerate(tapes):
            own = out["c_steps"][:, :, d * H : (d + 1) * H]
            for s, t, rows in reference.walk(T, B, lengths, case.reverse(d), given.mask):
                own[t, rows] = tape["c"][s + 1, rows]
    if between is not None:
        out["dnorms"] = np.stack([grads["norms"] for _, grads in runs], axis=2)
        for i, name in enumerate(case.states):
            for k in range(len(between[i])):
                values = [grads["values"][i][k] for _, grads in runs]
                out[f"d{name}_values{k}"] = np.concatenate(values, axis=2)
    for d, (_, grads) in enumerate(runs):
        out |= {f"{p}[{d}]": grads[p] for p in PARAMETERS if grads.get(p) is not None}
    for array in out.values():
        array.flags.writeable = False
    return out


def gradients(case):
    """Names of all gradients of a case, as in `run_reference`."""
    parameters = [p for p in case.parameters if case.bias or not p.startswith("bias")]
    return (
        "dx",
        *(f"d{name}_0" for name in case.states),
        *(f"{p}[{d}]" for d in range(case.directions) for p in parameters),
    )


def in_order(case, own):
    """A direction's weights as kernels take them: all of PARAMETERS, None for what is not there."""
    named = dict(zip(case.parameters, own, strict=True))
    return tuple(named.get(name) for name in PARAMETERS)


def flip(sequence, batch_first):
    """[T, B, N] as it is, or with batch_first laid out as [B, T, N] in memory; None stays."""
    if sequence is None or not batch_first:
        return sequence
    out = np.ascontiguousarray(sequence.swapaxes(0, 1)).swapaxes(0, 1)
    out.flags.writeable = sequence.flags.writeable
    return out


def times_of(mask):
    """Times of each row's steps, then those of the others [B, T], as kernels take them."""
    return None if mask is None else np.argsort(~mask.T, axis=1, kind="stable")


def as_kernels(between):
    """What happens between steps, of a forward call."""
    if between is None:
        return None
    keep, scale = between.keep, 1.0
    if keep is not None:
        keep, scale = keep > 0, float(np.max(keep, initial=0))
    return Between(between.h, between.c, between.hold, keep, scale)


def run_kernel(
    case, *, inputs=None, threads=1, plan="auto", batch_first=False, want=None, tape=True
):
    """A case by the kernels of the current isa, forward and (with a tape) backward.

    inputs: others than the case's own (the sizes of x count, not those of the case); want: names
    of the gradients asked for, or None for all. Every output is allocated here and filled with
    NaN before, so that what the kernels leave out is seen.

    Returns a dict of arrays named as in `run_reference`, and what ran: a pair of (plan, threads),
    of forward and of backward.
    """
    given = make_inputs(case) if inputs is None else inputs
    cell, D, H, N = CELLS[case.cell], case.directions, case.shape.H, case.output
    T, B, I = given.x.shape
    want = gradients(case) if want is None else want
    number = _kernels.PLANS.index(plan)

    def new(*shape):
        return np.full(shape, np.nan, case.dtype)

    def sequence(N):
        return new(B, T, N).swapaxes(0, 1) if batch_first else new(T, B, N)

    def states_of(pair):
        return (*(pair or ()), None, None)[:2]

    x, dy = flip(given.x, batch_first), flip(given.dy, batch_first)
    y, h_n = sequence(D * N), new(D, B, N)
    c_n = new(D, B, H) if "c" in cell.states else None
    gates = h_tape = c_tape = None
    if tape:
        gates = new(D, T, B, len(cell.tape_gates), H) if cell.tape_gates else None
        h_tape = new(D, T + 1, B, N)
        c_tape = new(D, T + 1, B, H) if "c" in cell.states else None
    h_0, c_0 = states_of(given.state)
    weights = tuple(in_order(case, own) for own in given.weights)
    functions = case.functions
    pack = _kernels.pack(cell.number, weights, _kernels.FORWARD, threads, 0, None, functions)
    times, between = times_of(given.mask), as_kernels(given.between)
    c_steps = received = None
    if "c" in case.happens and "c" in case.states:
        c_steps = new(T, B, D * H)
    ran = _kernels.forward(
        pack, x, y, h_0, c_0, h_n, c_n, given.lengths, gates, h_tape, c_tape,
        case.direction == "reverse", threads, number, times=times, between=between,
        c_steps=c_steps,
    )  # fmt: skip
    out = {"y": y, "h_n": h_n, "c_n": c_n, "c_steps": c_steps}
    if not tape:
        return {name: a for name, a in out.items() if a is not None}, (ran, None)

    before = [None if a is None else a.tobytes() for a in (gates, h_tape, c_tape)]
    for a in (gates, h_tape, c_tape):
        if a is not None:
            a.flags.writeable = False
    dh_n, dc_n = states_of(given.dstate)
    grads = dict.fromkeys(gradients(case))
    shapes = CELLS[case.cell].weight_shapes(I, H, case.projection)
    for name in want:
        grads[name] = sequence(I) if name == "dx" else new(D, B, N if name == "dh_0" else H)
        if "[" in name:
            grads[name] = new(*shapes[name.partition("[")[0]])
    wanted = tuple(tuple(grads.get(f"{p}[{d}]") for p in PARAMETERS) for d in range(D))
    if all(array is None for one in wanted for array in one):
        wanted = None
    if given.between is not None:
        happens = given.between
        received = Received(
            tuple(None if value is None else new(*value.shape) for _, value in happens.h),
            tuple(None if value is None else new(*value.shape) for _, value in happens.c),
            given.dc_steps, happens.clip, happens.clip_norm, np.zeros((T, B, D), case.dtype),
        )  # fmt: skip
        grads["dnorms"] = received.norms
        for name, arrays in zip("hc", (received.h, received.c), strict=True):
            for k, array in enumerate(arrays):
                grads[f"d{name}_values{k}"] = array
    pack = _kernels.pack(cell.number, weights, _kernels.BACKWARD, threads, 0, None, functions)
    ran_back = _kernels.backward(
        pack, x, given.lengths, gates, h_tape, c_tape, dy, dh_n, dc_n,
        grads["dx"], grads["dh_0"], grads.get("dc_0"), wanted,
        case.direction == "reverse", threads, number, times=times, between=between,
        received=received,
    )  # fmt: skip
    after = [None if a is None else a.tobytes() for a in (gates, h_tape, c_tape)]
    assert before == after, f"backward wrote the tape: {case}"
    out |= grads | {"tape_gates": gates, "tape_h": h_tape, "tape_c": c_tape}
    return {name: a for name, a in out.items() if a is not None}, (ran, ran_back)


def all_gradients(case):
    """The same, and those by what was set between steps."""
    given = make_inputs(case)
    names = gradients(case)
    if given.between is None:
        return names
    for name, settings in zip("hc", given.between[:2], strict=True):
        names += tuple(f"d{name}_values{k}" for k, (_, v) in enumerate(settings) if v is not None)
    return (*names, "dnorms")


def tape_padding(name, case, lengths):
    """bool, true in the slots of a tape array that mean nothing and must stay as they were."""
    T, B = case.shape.T, case.shape.B
    if name == "tape_gates":
        return past_lengths(lengths, T, B)
    first = np.zeros((1, B), bool)
    return np.concatenate([first, past_lengths(lengths, T, B)])


def options_of(cell):
    """The kind of a cell, as functions and modules are named, and its options there.

    >>> options_of("gru_reset_before")
    ('gru', {'reset_after': False, 'layer_norm': None})
    """
    row, options = CELLS[cell], dict(CELLS[cell].options)
    if row.general:
        options |= FUNCTIONS[cell]._asdict()
        if row.kind != "LSTM":
            del options["cell_clip"]
    return row.kind.lower(), options


def own_options(cell):
    """Its options without activations and clips: those of backward, whose tape knows the others."""
    return dict(CELLS[cell].options)


def pack_of(cell, weights, kind="forward"):
    """A public pack for a cell with these options."""
    functions = FUNCTIONS[cell]
    return functional.pack(cell, weights, kind, **functions._asdict() if functions else {})


def make_module(cell, input_size, hidden_size, num_layers=1, **others):
    """The module of a cell: rnnfast.RNN, LSTM or GRU."""
    kind, options = options_of(cell)
    return getattr(rnnfast, kind.upper())(input_size, hidden_size, num_layers, **options, **others)


def as_tuple(state):
    """A module's state as the reference wants it: a tuple of arrays."""
    return state if isinstance(state, tuple) else (state,)


def as_state(cell, state):
    """The opposite: (h, c), or the one array of a cell that has no c; None stays."""
    return state if state is None or len(CELLS[cell].states) == 2 else state[0]

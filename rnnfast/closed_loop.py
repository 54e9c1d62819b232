"""The closed loop: what a stack's head makes of its last h is the stack's own next input.

Knows heads, tokens and the compiled layer's loop; each question about an argument it passes to
`checks`. Whose weights and states they are, modules and streams know. The equations stand in
`reference.closed_loop`.

T steps, B batch, I input size, N numbers of h, O numbers of a head's output, V = O tokens.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _kernels, checks, config
from .functional import _is, as_steps, new_array, new_sequence

if TYPE_CHECKING:
    from .functional import Tape
    from .modules import StackTape

CHOICES = _kernels.CHOICES  # "value", "argmax", "sample"


class Loop:
    """One call of the loop: arguments checked, and room for its results.

    `first` [B, O], or B tokens; without the axis of the batch for a single row, if `rows` (of a
    stream; None: any number) allows that.
    """

    def __init__(
        self, sizes: tuple[int, int], dtype: np.dtype, rows: int | None, batch_first: bool,
        first: Any, steps: Any, head: Any, choice: Any, table: Any = None, covariates: Any = None,
        teacher: Any = None, temperature: Any = None, seed: Any = None, logits: Any = False,
        step0: Any = 0, row0: Any = 0,
    ) -> None:  # fmt: skip
        I, N = sizes
        self.steps = checks.integer("steps", steps, 0)
        choice = checks.choice("choice", choice, CHOICES)
        self.choice, self.batch_first, self.dtype = CHOICES.index(choice), batch_first, dtype
        self.weight, self.bias = checks.head("head", head, dtype, N)
        self.width = self.weight.shape[0]
        logits = checks.boolean("logits", logits)
        self.step0 = checks.integer("step0", step0, 0, checks.MAX_SEED)
        self.row0 = checks.integer("row0", row0, 0, checks.MAX_ROWS)
        self.temperature, self.seed = _randomness(choice, dtype, temperature, seed)
        if choice != "sample" and (step0 or row0):
            needs = '0: of choice="sample" alone, whose draws they number'
            checks.fail(ValueError, "step0" if step0 else "row0", str(step0 or row0), needs)
        self.own = self.tokens = self.table = None
        if choice == "value":
            for name, given in (("table", table is not None), ("logits", logits)):
                if given:
                    needs = f'it left out: with choice="value" there are no {name}'.replace(
                        "tables", "tokens"
                    )
                    checks.fail(ValueError, name, "one" if name == "table" else "True", needs)
            self._values(first, covariates, teacher, I, rows)
        else:
            for name, given in (("covariates", covariates), ("teacher", teacher)):
                if given is not None:
                    needs = 'None: the inputs of choice="value" alone are numbers'
                    checks.fail(ValueError, name, checks.describe(given), needs)
            self._tokens(first, table, I, rows, logits)

    def _values(self, first: Any, covariates: Any, teacher: Any, I: int, rows: int | None) -> None:
        T, O, dtype = self.steps, self.width, self.dtype
        K = I - O
        if K < 0:
            needs = f"an output of at most input_size, {I} numbers, which is the next input"
            checks.fail(ValueError, "head (weight)", f"one of {O} numbers", needs)
        array = checks.as_array("first", first, dtype)
        B = self._batch("first", array.shape[:-1] if array.ndim else None, rows, f"B, {O}")
        if array.shape[-1] != O:
            checks.fail(ValueError, "first", f"shape {array.shape}", f"a last size of {O}, as o")
        checks.room("steps", max(T, 1) * B * (I + O), dtype.itemsize)
        self.x = new_array((max(T, 1), B, I), dtype)
        if K == 0:
            if covariates is not None:
                needs = f"None: the head's output is all of the {I} inputs"
                checks.fail(ValueError, "covariates", checks.describe(covariates), needs)
        else:
            if covariates is None:
                needs = f"the other {K} of the {I} inputs at each step; the head makes {O}"
                checks.fail(ValueError, "covariates", "None", needs)
            known = self._sequence("covariates", covariates, K, dtype, "I - O")
            self.x[:T, :, O:] = known
        self.x[0, :, :O] = array.reshape(B, O)
        if teacher is not None:
            inputs, mask = checks.pair("teacher", teacher, "inputs and mask")
            inputs = self._sequence("teacher (inputs)", inputs, O, dtype, "O")
            mask = checks.as_array("teacher (mask)", mask, checks.BOOL)
            shape = (T,) if self.unbatched else (B, T) if self.batch_first else (T, B)
            if mask.shape != shape:
                letters = "T" if self.unbatched else "B, T" if self.batch_first else "T, B"
                checks.fail(
                    ValueError, "teacher (mask)", f"shape {mask.shape}", f"[{letters}] = {shape}"
                )
            mask = mask.reshape(T, B) if self.unbatched else mask.T if self.batch_first else mask
            self.own = np.array(~mask, order="C")  # read once: its owner may change it
            np.copyto(self.x[:T, :, :O], inputs, where=~self.own[:, :, None])
        self.result = new_sequence(T, B, O, dtype, self.batch_first, self.unbatched)
        self.outputs = as_steps(self.result, self.batch_first, self.unbatched)
        self.one_hot = False

    def _tokens(self, first: Any, table: Any, I: int, rows: int | None, logits: bool) -> None:
        T, V, dtype = self.steps, self.width, self.dtype
        if table is not None:
            self.table = checks.parameter("table", table, dtype, (V, I), "V, I")
        elif I != V:
            needs = f"a table [V, I] = ({V}, {I}) of the inputs by token: one-hot ones have V = I"
            checks.fail(ValueError, "table", "None", needs)
        elif V > checks.MOST_ONE_HOT:
            needs = f"a table: one-hot inputs have at most {checks.MOST_ONE_HOT} numbers"
            checks.fail(ValueError, "table", "None", needs)
        tokens, shape = checks.tokens("first", first, V)
        B = self._batch("first", shape, rows, "B")
        self.one_hot = self.table is None
        checks.room("steps", T * B * (1 + V * logits) + B * max(I, V), 8)
        self.x = new_array((1, B, 1 if self.one_hot else I), dtype)
        self.x[0] = tokens[:, None] if self.one_hot else self.table[tokens]
        turned = self.batch_first and not self.unbatched
        result = np.empty((B, T) if turned else (T, B), checks.INTP)
        self.tokens = result.T if turned else result
        self.result = result[:, 0] if self.unbatched else result
        self.logits = self.outputs = None
        if logits:
            self.logits = new_sequence(T, B, V, dtype, self.batch_first, self.unbatched)
            self.outputs = as_steps(self.logits, self.batch_first, self.unbatched)
            self.result = self.result, self.logits

    def _batch(self, name: str, shape: tuple | None, rows: int | None, letters: str) -> int:
        """Rows of the batch, by the first axes of `first`; () is a single row without its axis."""
        self.unbatched = shape == ()
        right = shape is not None and len(shape) <= 1 and rows in (None, *(shape or (1,)))
        if not right:
            needs = f"[{letters}]" if rows is None else f"[{letters}] with B = {rows}"
            also = f" or without the B{' of 1' * (rows is None)}" if rows in (None, 1) else ""
            got = "a single number" if shape is None else f"{len(shape)} axes of rows: {shape}"
            checks.fail(ValueError, name, got, needs + also)
        self.rows = 1 if self.unbatched else shape[0]
        return self.rows

    def _sequence(
        self, name: str, value: Any, width: int, dtype: np.dtype, letter: str
    ) -> np.ndarray:
        """A given sequence in the layout of the results, as [T, B, width]."""
        array = checks.as_array(name, value, dtype)
        shape, letters = (self.steps, self.rows, width), f"T, B, {letter}"
        if self.unbatched:
            shape, letters = (self.steps, width), f"T, {letter}"
        elif self.batch_first:
            shape, letters = (self.rows, self.steps, width), f"B, T, {letter}"
        if array.shape != shape:
            checks.fail(ValueError, name, f"shape {array.shape}", f"[{letters}] = {shape}")
        return as_steps(array, self.batch_first, self.unbatched)

    def run(
        self, packs: tuple, h: np.ndarray, c: np.ndarray | None,
        hold: tuple[float, float] = (0.0, 0.0), tapes: list[Tape] | None = None,
    ) -> tuple[str, int]:  # fmt: skip
        """From the states h [L, B, N] and c to those after, which replace them if all goes well.

        hold: the shares of h and c before each step in those after, of zoneout.
        """
        kept = None
        if tapes:
            handed = [*(tape.x for tape in tapes[1:]), None]
            kept = tuple(
                (tape.gates, tape.h, tape.c, y) for tape, y in zip(tapes, handed, strict=True)
            )
        ran = _kernels.closed_loop(
            packs, h, c, self.weight, self.bias, self.x, self.own, self.outputs, self.tokens,
            self.table, self.one_hot, self.choice, self.steps, self.rows, self.width,
            self.temperature, self.seed, self.step0, self.row0, *hold, kept, config.threads,
            config.plan,
        )  # fmt: skip
        if type(ran[0]) is int:
            step, row = ran
            got = f"logits of which no token can be chosen, in step {step} of row {row}"
            needs = "numbers" if CHOICES[self.choice] == "argmax" else "finite numbers, or -inf"
            checks.fail(ValueError, "head", got, f"{needs} (there is a NaN, or an infinity)")
        return ran


def _randomness(choice: str, dtype: np.dtype, temperature: Any, seed: Any) -> tuple[float, int]:
    """Temperature and seed of a loop; of one that draws nothing, neither may be given."""
    if choice == "sample":
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little") >> 1
        seed = checks.integer("seed", seed, 0, checks.MAX_SEED)
        temperature = (
            1.0 if temperature is None else checks.finite("temperature", temperature, dtype)
        )
        if temperature < float(np.finfo(dtype).tiny):
            needs = 'a number greater than 0; choice="argmax" takes the likeliest'
            checks.fail(ValueError, "temperature", str(temperature), needs)
        return temperature, seed
    for name, value in (("temperature", temperature), ("seed", seed)):
        if value is not None:
            needs = f'it left out: choice="{choice}" draws nothing'
            checks.fail(ValueError, name, checks.describe(value), needs)
    return 1.0, 0


class ForecastTape:
    """What a module's `forecast_train` saves for `backward_forecast`.

    - `stack`: the tape of its layers, as of `forward_train`
    - `plan`, `threads`, `isa`: what ran
    - `nbytes`: of all that it keeps

    It belongs to the module that made it. It holds the head's weight itself, not a copy.
    """

    __slots__ = ("_layout", "_own", "_weight", "stack")

    def __init__(self, stack: StackTape, loop: Loop) -> None:
        self.stack = stack
        self._weight, self._own = loop.weight, loop.own
        self._layout = loop.batch_first, loop.unbatched

    plan = property(lambda tape: tape.stack.plan, doc="The plan that ran.")
    threads = property(lambda tape: tape.stack.threads, doc="On how many threads.")
    isa = property(lambda tape: tape.stack.isa, doc="Of the kernels that ran.")

    @property
    def nbytes(self) -> int:
        """Bytes of what the tape keeps, the inputs of the first layer among them."""
        own = 0 if self._own is None else self._own.nbytes
        return self.stack.nbytes + self.stack.layers[0].x.nbytes + own

    def checked(self, dtype: np.dtype, x: np.ndarray, N: int) -> tuple:
        """(weight, own, batch_first, unbatched), as backward may read them."""
        weight, own, layout = (getattr(self, f"_{n}", None) for n in ("weight", "own", "layout"))
        T, B, I = x.shape
        if not (
            type(weight) is np.ndarray
            and weight.ndim == 2
            and weight.shape[0] <= I
            and _is(weight, (weight.shape[0], N), dtype)
            and (own is None or _is(own, (T, B), checks.BOOL))
            and type(layout) is tuple
            and [type(one) for one in layout] == [bool, bool]
            and (B == 1 or not layout[1])
        ):
            needs = "one as forecast_train returned it"
            checks.fail(ValueError, "tape", "an altered one", needs)
        return weight, own, *layout

    def __repr__(self) -> str:
        return f"ForecastTape({getattr(self, 'stack', '')!r})"


class ForecastGradients(NamedTuple):
    """Gradients of the loss by what `forecast_train` was given; those of the parameters are added
    to the module's own.

    - `first`, `covariates`: shaped as they came; `covariates` is None if there were none
    - `state`: shaped as the initial state
    - `weight` [O, N], `bias` [O]: of the head
    """

    first: np.ndarray
    covariates: np.ndarray | None
    state: Any
    weight: np.ndarray
    bias: np.ndarray


def walk_back(
    packs: list, tapes: list[Tape], weight: np.ndarray, own: np.ndarray | None,
    dvalues: np.ndarray | None, dh: np.ndarray, dc: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The loop backward, without gradients of the layers' weights.

    dvalues [T, B, O]; dh [L, B, N], dc: by the last states; they become those by the first ones.
    Returns dx [T, B, I], the last layer's dy [T, B, N] and the whole gradient by o [T, B, O].
    """
    (T, B, I), (O, N) = tapes[0].x.shape, weight.shape
    dtype = weight.dtype
    d_outputs = new_array((T, B, O), dtype)
    d_outputs[...] = 0 if dvalues is None else dvalues
    dx, dy = new_array((T, B, I), dtype), new_array((T, B, N), dtype)
    kept = tuple((tape.gates, tape.h, tape.c) for tape in tapes)
    _kernels.closed_loop_backward(
        tuple(packs), kept, weight, d_outputs, dx, own, dy, dh, dc, config.threads, config.plan
    )
    return dx, dy, d_outputs


def input_gradients(
    dx: np.ndarray, own: np.ndarray | None, O: int, batch_first: bool, unbatched: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Those by `first` and `covariates`, of dx [T, B, I]."""
    T, B, I = dx.shape
    first = np.zeros((B, O), dx.dtype)
    if T:
        first[...] = dx[0, :, :O]
        if own is not None:
            first[~own[0]] = 0
    covariates = None
    if I > O:
        covariates = new_sequence(T, B, I - O, dx.dtype, batch_first, unbatched)
        as_steps(covariates, batch_first, unbatched)[...] = dx[:, :, O:]
    return first[0] if unbatched else first, covariates


def head_gradients(d_outputs: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those by weight and bias, of the gradient by o [T, B, O] and h [T, B, N]."""
    rows = math.prod(h.shape[:2])
    d_outputs, h = (a.reshape(rows, a.shape[2]) for a in (d_outputs, h))
    with np.errstate(all="ignore"):  # NaN and inf are results
        return d_outputs.T @ h, d_outputs.sum(axis=0)

"""The closed loop: what a stack's head makes of its last h is the stack's own next input.

Knows heads, tokens and the compiled layer's loop; each question about an argument it passes to
`checks`. Whose weights and states they are, `recurrent`, which has `ClosedLoop`'s methods, and
streams know. The equations stand in `reference.closed_loop`.

T steps, B batch, I input size, N numbers of h, O numbers of a head's output, V = O tokens.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _kernels, checks, config, stack
from .layer import (
    BACKWARD,
    FORWARD,
    as_steps,
    is_whole,
    new_array,
    new_sequence,
    tape_numbers,
)
from .tapes import StackTape

if TYPE_CHECKING:
    from .layer import Tape

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
        self.step0 = checks.integer("step0", step0, 0, checks.MAX_STEPS)
        self.row0 = checks.integer("row0", row0, 0, checks.MAX_ROWS)
        self.temperature, self.seed = _randomness(choice, dtype, temperature, seed)
        if choice != "sample" and (step0 or row0):
            needs = '0: of choice="sample" alone, whose draws they number'
            checks.fail(ValueError, "step0" if step0 else "row0", str(step0 or row0), needs)
        if choice == "sample" and self.step0 + self.steps > checks.MAX_STEPS:
            got, needs = f"{self.steps} from step {self.step0} on", f"at most {checks.MAX_STEPS}"
            checks.fail(ValueError, "steps", got, f"{needs} in all, whose draws are numbered")
        self.own = self.tokens = self.table = None
        if choice == "value":
            for name, given in (("table", table is not None), ("logits", logits)):
                if given:
                    needs = 'it left out: with choice="value" there are no tokens'
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
        B = self._batch(array.shape, array.shape[:-1] if array.ndim else None, rows, f"B, {O}")
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
        B = self._batch(shape, shape, rows, "B")
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

    def _batch(self, shape: tuple, axes: tuple | None, rows: int | None, letters: str) -> int:
        """Rows of the batch, by those axes of `first` that number rows; () is a single row without
        its axis."""
        self.unbatched = axes == ()
        right = axes is not None and len(axes) <= 1 and rows in (None, *(axes or (1,)))
        if not right:
            needs = f"[{letters}]" if rows is None else f"[{letters}] with B = {rows}"
            also = ", or without the B for a single row" if rows in (None, 1) else ""
            needs += f"{also}: one step's input, and the state of those before as state="
            checks.fail(ValueError, "first", f"shape {shape}", needs)
        self.rows = 1 if self.unbatched else axes[0]
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
        ran, failed = _kernels.closed_loop(
            packs, h, c, self.weight, self.bias, self.x, self.own, self.outputs, self.tokens,
            self.table, self.one_hot, self.choice, self.steps, self.rows, self.width,
            self.temperature, self.seed, self.step0, self.row0, *hold, kept, config.threads,
            config.plan,
        )  # fmt: skip
        if failed:
            step, row = failed
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
        least = float(np.finfo(dtype).tiny)
        if temperature < least:
            needs = f'at least {least:.3g} in {dtype}; choice="argmax" takes the likeliest'
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
            and is_whole(weight, (weight.shape[0], N), dtype)
            and (own is None or is_whole(own, (T, B), checks.BOOL))
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
        # NumPy adds row to row: in float32 many would not come to more than 2**24 times the first.
        bias = d_outputs.sum(axis=0, dtype=np.float64)
        return d_outputs.T @ h, bias.astype(d_outputs.dtype)


class ClosedLoop:
    """The methods of a stack that runs on its own output; `Recurrent` has them."""

    def generate(
        self, first: Any, steps: int, head: Any, choice: str = "value", state: Any = None, *,
        table: Any = None, covariates: Any = None, temperature: float | None = None,
        seed: int | None = None, logits: bool = False, step0: int = 0, row0: int = 0,
    ) -> tuple:  # fmt: skip
        """Runs on its own output: at each step a head makes o of the last layer's h, and o, or a
        token chosen by it, is the next input.

        head: (weight [O, N], bias [O] or None), as of torch.nn.Linear; o = weight h + bias, N
        numbers of h. state: as of a call, the one after a warm-up or a prompt. `choice`:

        - "value", a forecast: the next input is o. first [B, O] stands for the o before. Where an
          input has more than O numbers, the others are `covariates` [T, B, I - O], of each step.
          Returns values [T, B, O]
        - "argmax": o are logits of V = O tokens, and the next input is that of the greatest, the
          first of equals: its row of `table` [V, I], or one-hot without a table, if I = V.
          first: B tokens. Returns tokens [T, B], intp
        - "sample": likewise, of a token drawn from softmax(o / temperature), 1 if not given. What
          is drawn is a function of seed, step and row: the same for any number of threads. step0,
          row0: numbers of the first ones, so that later calls draw as one call would

        Sequences have the module's layout; with `first` [O], or one integer, all come without B.
        A bias of -inf keeps a token from being chosen. Returns (values or tokens, state), with
        `logits` (tokens, state, logits [T, B, V]). Raises as a call does, and ValueError where
        logits are NaN, or, drawn from, +inf.

        >>> from rnnfast import GRU
        >>> gru = GRU(3, 8, seed=0)
        >>> head = np.ones((3, 8), np.float32), np.zeros(3, np.float32)
        >>> values, h_n = gru.generate(np.ones((2, 3), np.float32), 10, head)
        >>> tokens, _ = gru.generate([0, 2], 10, head, "sample", h_n, seed=1)
        >>> values.shape, tokens.shape
        ((10, 2, 3), (10, 2))
        """
        loop = self._loop(
            first, steps, head, choice, table, covariates, None, temperature, seed, logits, step0,
            row0,
        )  # fmt: skip
        h, c = self._loop_states(checks.STATE, state, loop)
        packs = tuple(self._kept(FORWARD) or self._pack_all(FORWARD))
        loop.run(packs, h, c, self._regular.zoneout if self._regular else (0.0, 0.0))
        state_n = self._loop_state(h, c, loop.unbatched)
        if logits:
            tokens, numbers = loop.result
            return tokens, state_n, numbers
        return loop.result, state_n

    def forecast_train(
        self, first: Any, steps: int, head: Any, state: Any = None, *, covariates: Any = None,
        teacher: Any = None,
    ) -> tuple[np.ndarray, Any, ForecastTape]:  # fmt: skip
        """A forecast, `generate` with choice "value", with a tape for `backward_forecast`.

        For training on own predictions. teacher, for scheduled sampling: (inputs [T, B, O], mask
        [T, B] bool); where the mask is true the input is the given one instead of o. Tokens have no
        gradient, and so no such call. The module must not drop anything, nor have zoneout. Change
        neither head nor parameters before `backward_forecast`.

        >>> from rnnfast import GRU
        >>> gru = GRU(1, 8, seed=0)
        >>> head = np.ones((1, 8), np.float32), None
        >>> values, h_n, tape = gru.forecast_train(np.ones((2, 1), np.float32), 10, head)
        >>> gradients = gru.backward_forecast(tape, np.ones_like(values))
        >>> gradients.first.shape, gradients.weight.shape, bool(gru.flat_grads.any())
        ((2, 1), (1, 8), True)
        """
        cell, (_, H, P, L, _) = self._cell, self._sizes
        for name in ("dropout", "recurrent_dropout", "zoneout", "drop_connect"):
            p = self._arguments[name]
            if np.any(p) and (name != "dropout" or L > 1):
                needs = f"a module without {name}: each of its steps would need its own masks"
                checks.fail(ValueError, "forecast_train", f"{name}={p}", needs)
        loop = self._loop(first, steps, head, "value", None, covariates, teacher)
        T, B = loop.steps, loop.rows
        numbers = L * (tape_numbers(cell, T, B, H, 1, "full") + T * B * (P or H))
        checks.room("steps", numbers, self._dtype.itemsize)
        h, c = self._loop_states(checks.STATE, state, loop)
        tapes = stack.new_tapes(cell, loop.x[:T], H, P, L, 1, None)
        packs = tuple(self._kept(FORWARD) or self._pack_all(FORWARD))
        if T == 0:  # no step writes the states before it
            for layer, tape in enumerate(tapes):
                tape.h[0, 0] = h[layer]
                if c is not None:
                    tape.c[0, 0] = c[layer]
        ran = loop.run(packs, h, c, tapes=tapes)
        for tape, packed in zip(tapes, packs, strict=True):
            tape.plan, tape.threads = ran
            tape.isa, tape.functions = packed.isa, packed.functions
        learned = state is None and self._initial is not None
        kept = StackTape(tuple(tapes), self._token, learned=learned)
        return loop.result, self._loop_state(h, c, loop.unbatched), ForecastTape(kept, loop)

    def backward_forecast(
        self, tape: ForecastTape, dvalues: Any = None, dstate: Any = None, *,
        accumulate: bool = True,
    ) -> ForecastGradients:  # fmt: skip
        """Backward through a forecast: each o acts on the loss as a value, and as the next input.

        dvalues: gradient of the loss by the values, shaped as they were; dstate: by the last
        states; each may be None for zeros. Adds the parameters' gradients to `grads`, or replaces
        them, as `backward` does; returns the others, see `ForecastGradients`. The head's are the
        caller's to add.
        """
        if type(tape) is not ForecastTape:
            needs = "what forecast_train returned as its tape"
            checks.fail(TypeError, "tape", checks.describe(tape), needs)
        accumulate = checks.boolean("accumulate", accumulate)
        stacked = getattr(tape, "stack", None)
        layers, _ = self._own_tapes(stacked)
        dtype, (I, H, P, L, _) = self._dtype, self._sizes
        N = P or H
        x = layers[0].x
        T, B, _ = x.shape
        weight, own, batch_first, unbatched = tape.checked(dtype, x, N)
        O = weight.shape[0]
        if dvalues is not None:
            sizes = (T, B, O)
            dvalues = checks.gradient("dvalues", dvalues, dtype, sizes, batch_first, unbatched, "O")
        dh_n = dc_n = None
        if dstate is not None:
            sizes = (L, B, H)
            dh_n, dc_n = checks.states(
                checks.DSTATE, dstate, self._pair, dtype, sizes, unbatched, P
            )
        checks.room("tape", T * B * (I + N + 2 * O), dtype.itemsize)
        dh = np.zeros((L, B, N), dtype) if dh_n is None else dh_n.copy()
        dc = None
        if self._pair:
            dc = np.zeros((L, B, H), dtype) if dc_n is None else dc_n.copy()
        packs = self._kept(BACKWARD) or self._pack_all(BACKWARD)
        dx, dy, d_outputs = walk_back(packs, layers, weight, own, dvalues, dh, dc)
        # What reaches each h is known now, so that the rest is an ordinary backward's.
        last = dh_n if dc_n is None else (dh_n, dc_n)
        self.backward(stacked, dy, last, need_dx=False, accumulate=accumulate)
        first, covariates = input_gradients(dx, own, O, batch_first, unbatched)
        of_head = head_gradients(d_outputs, layers[-1].h[0, 1:])
        state = self._loop_state(dh, dc, unbatched)
        return ForecastGradients(first, covariates, state, *of_head)

    def _loop(self, *arguments: Any) -> Loop:
        """A closed loop over this module, its arguments checked."""
        I, H, P, _, D = self._sizes
        if D == 2:
            needs = "one direction: the other one starts at the sequence's end"
            checks.fail(ValueError, "closed loop", "a bidirectional module", needs)
        return Loop((I, P or H), self._dtype, None, self._batch_first, *arguments)

    def _loop_states(self, names: tuple[str, str], state: Any, loop: Loop) -> tuple:
        """States of the library's own, which the loop may write: h [L, B, N], and c or None."""
        _, H, P, L, _ = self._sizes
        B, pair, dtype = loop.rows, self._pair, self._dtype
        checks.room("first", 2 * L * B * H, dtype.itemsize)
        if state is None and self._initial is not None:
            return (*(np.repeat(one, B, axis=1) for one in self._initial), None)[:2]
        if state is None:
            h = np.zeros((L, B, P or H), dtype)
            return h, np.zeros((L, B, H), dtype) if pair else None
        h, c = checks.states(names, state, pair, dtype, (L, B, H), loop.unbatched, P)
        return h.copy(), None if c is None else c.copy()

    @staticmethod
    def _loop_state(h: np.ndarray, c: np.ndarray | None, unbatched: bool) -> Any:
        """States as a caller sees them."""
        if unbatched:
            h, c = h[:, 0], None if c is None else c[:, 0]
        return h if c is None else (h, c)

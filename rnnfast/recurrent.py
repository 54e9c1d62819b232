"""A stack of layers that owns its parameters: all that RNN, LSTM and GRU have in common.

Knows parameters, packs and who owns what; passes the layers' work to `stack`, the output that is
the next input to `closed_loop`, and each question about an argument to `checks`.

T steps, B batch, I input size, H hidden size, L layers, D directions, as everywhere.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from . import _kernels, calls, checks, config, stack, storage
from .between import Between
from .calls import Clamped, Extra, Layout, Regular, States
from .cells import PARAMETERS
from .closed_loop import ClosedLoop
from .drop_connect import DropConnect
from .layer import (
    BACKWARD,
    FORWARD,
    TAPES,
    More,
    Row,
    Tape,
    as_steps,
    new_array,
    new_like,
    new_sequence,
    new_tape,
    own_tape,
    run_forward,
    tape_numbers,
)
from .merges import CONCAT, MERGES
from .parameters import (
    ENDS,
    INITIAL,
    Arrays,
    aligned,
    assign,
    module_bytes,
    names_of,
    parameter_shapes,
    size,
    views_of,
)
from .streams import Stream
from .tapes import StackTape

LATER: dict[str, Any] = {
    "layer_norm": None,
    "recurrent_dropout": 0.0, "variational": False, "zoneout": 0.0, "padding": "zeros",
    "merge": CONCAT, "learn_initial": False, "drop_connect": 0.0,
}  # fmt: skip


def argument(name: str, doc: str) -> Any:
    """A constructor's argument as an attribute that can be read only."""
    return property(lambda module: module._arguments[name], doc=doc)


class Recurrent(ClosedLoop):
    """What RNN, LSTM and GRU have in common: all but the constructor's arguments.

    `params` and `grads` map PyTorch's names to views of `flat` and `flat_grads`, one buffer each.
    """

    _file_name: str
    # Arguments that files of older versions lack, and what they mean then.
    _later: ClassVar[dict[str, Any]] = LATER

    @staticmethod
    def _row_of(arguments: dict[str, Any]) -> Row:
        """The cell that a class's own arguments ask for, and its functions; checks these."""
        raise NotImplementedError

    def _build(self, arguments: dict[str, Any], fill: bool = True) -> None:
        """Checks the constructor's arguments and makes the parameters, random ones with `fill`."""
        if self._built:  # a call may be under way, and kernels trust that sizes never change
            checks.fail(ValueError, type(self).__name__, "a module that is built", "a new one")
        self._arguments = arguments = _checked(arguments)
        self._row = cell, functions = type(self)._row_of(arguments)
        self._cell, self._functions = cell, functions
        arguments.update(cell.options)  # as they were checked
        if fill:  # called by __init__: the warning points at the line that called that
            checks.dropout_acts(arguments["dropout"], arguments["num_layers"], 3)
        I, H, L = arguments["input_size"], arguments["hidden_size"], arguments["num_layers"]
        D, bias = 2 if arguments["bidirectional"] else 1, arguments["bias"]
        P, merged = arguments.get("proj_size", 0), arguments["merge"] != CONCAT
        learned = arguments["learn_initial"]
        if arguments["seed"] is None:
            arguments["seed"] = int.from_bytes(os.urandom(8), "little") >> 1
        sizes = "input_size, hidden_size, num_layers"
        checks.room(sizes, module_bytes(cell, I, H, L, D, bias, P, merged, learned), 1)
        # What every call reads. The public attributes are read-only: the kernels trust sizes.
        self._sizes = I, H, P, L, D
        self._dtype = dtype = arguments["dtype"]
        self._batch_first = arguments["batch_first"]
        self._dropout = arguments["dropout"], arguments["seed"]
        self._dropout_calls = 0
        self._pair = "c" in cell.states
        self._merge, self._drop_connect = arguments["merge"], arguments["drop_connect"]
        self._width = (1 if merged else D) * (P or H)  # of y
        self._read_regular()
        if fill:  # as above
            drops = arguments["recurrent_dropout"]
            checks.variational_acts(arguments["variational"], drops, 3)
        # Together, because each attribute costs a small call a hundredth of its time. The last says
        # that a call is one layer's and nothing else.
        fixed = cell, self._pair, dtype, self._batch_first, I, H, P, L, D, self._width, learned
        self._fixed = *fixed, L == 1 and not merged and not self._drop_connect

        self._shapes = parameter_shapes(cell, I, H, L, D, bias, P, merged, learned)
        numbers = sum(size(shape) for shape in self._shapes.values())
        self._flat, self._flat_grads = (aligned(numbers, dtype) for _ in range(2))
        self._params = Arrays(views_of(self._flat, self._shapes))
        self._grads = Arrays(views_of(self._flat_grads, self._shapes))
        # Views of the library's own: what a caller does to the shape of a public one is not seen.
        own = views_of(self._flat, self._shapes)
        self._weights = self._by_layer(own)
        self._initial = self._own_initial = self._initial_of(own)
        self._packs: dict[int, list[Any]] | None = None  # by kind, kept while frozen
        self._own_grads = self._by_layer(views_of(self._flat_grads, self._shapes))
        self._own_flat_grads = self._flat_grads[...]
        # Whether the kernel may add to all gradients there are, as they come.
        self._in_place = L == D == 1 and not learned and not self._drop_connect
        self._scratch: list[tuple] = []
        self._adding: dict[int, Any] = {}
        self._token = os.urandom(16)  # a copy gets its own: its parameters soon differ
        if fill:
            bound = 1 / np.sqrt(H)
            random = np.random.default_rng(arguments["seed"])
            self._flat[...] = random.uniform(-bound, bound, numbers)
            for state in self._initial or ():
                state[...] = 0
            if cell.norms:
                self._fill_normalised()
            self._fill_more()
        self._built = True

    _built = False

    def _read_regular(self) -> None:
        """What all calls do between steps, and with y of steps that there are not."""
        given = self._arguments
        p = checks.fraction("recurrent_dropout", given["recurrent_dropout"])
        variational = checks.boolean("variational", given["variational"])
        zoneout = checks.pair_of_fractions("zoneout", given["zoneout"], self._pair)
        padding = checks.choice("padding", given["padding"], ("zeros", "hold"))
        given["recurrent_dropout"], given["padding"] = p, padding
        given["zoneout"] = zoneout if self._pair else zoneout[0]
        self._holds = padding == "hold"
        if self._holds and self._merge != CONCAT:
            needs = "'zeros' with merged directions: each holds another step's, and y has only both"
            checks.fail(ValueError, "padding", "'hold'", needs)
        self._regular = None
        if p or any(zoneout):
            self._regular = Regular(p, variational, zoneout, given["seed"])
        self._usual = not self._holds and self._regular is None

    def _fill_normalised(self) -> None:
        """Gains of a normalisation begin at one, and all biases, which come after it, at zero."""
        for name, param in self._params.items():
            if name.startswith(("bias", "weight_norm")):
                param[...] = 0 if name.startswith("bias") else 1

    def _fill_more(self) -> None:
        """Initial values of a class's own, after the random ones."""

    def __getattr__(self, name: str) -> Any:
        """Asked last: of a method's own attributes, only where `_build` did not run to its end; of
        others, where there is none, as of some that PyTorch's modules have.
        """
        if not self._built and name.startswith("_") and not name.endswith("_"):
            checks.fail(TypeError, "module", "one that was never built", "its class called")
        what = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name == "forward":
            what += ": call the object itself, or its forward_train"
        elif name in self.__dict__.get("_params", ()):
            what += f": that parameter is params[{name!r}]"
        raise AttributeError(what)

    def _by_layer(self, views: dict[str, np.ndarray]) -> tuple:
        """For each layer, for each direction, all of PARAMETERS, None for what is not there."""
        *_, L, D = self._sizes
        return tuple(
            tuple(
                tuple(views.get(f"{name}_l{layer}{end}") for name in PARAMETERS) for end in ENDS[:D]
            )
            for layer in range(L)
        )

    def _initial_of(self, views: dict[str, np.ndarray]) -> list[np.ndarray] | None:
        """Of named views those of the initial states, each [L*D, 1, N]; None if there are none."""
        return [views[name] for name in INITIAL if name in views] or None

    # ------------------------------------------------------------------------------- arguments

    input_size = argument("input_size", "I")
    hidden_size = argument("hidden_size", "H")
    num_layers = argument("num_layers", "L")
    bias = argument("bias", "Whether there are bias_ih and bias_hh, and a bias_norm_c.")
    batch_first = argument("batch_first", "Whether x and y are [B, T, ...].")
    dropout = argument("dropout", "Probability of a drop between layers, in `forward_train`.")
    bidirectional = argument("bidirectional", "Whether D is 2.")
    merge = argument("merge", 'How both directions become y: "concat", "sum", "mean" or "mul".')
    learn_initial = argument("learn_initial", "Whether initial states are parameters.")
    drop_connect = argument("drop_connect", "Probability of a drop in R, in `forward_train`.")
    recurrent_dropout = argument(
        "recurrent_dropout", "Probability with which R does not see a number of h, in training."
    )
    variational = argument("variational", "Whether it is the same for all steps of a call.")
    zoneout = argument("zoneout", "Probability that h (and c) stay as they were in a step.")
    padding = argument("padding", 'What y is at missing steps: "zeros", or "hold" the last one.')
    dtype = argument("dtype", "float32 or float64: of parameters, inputs and results.")
    layer_norm = argument("layer_norm", "What is normalised, or None.")
    seed = argument("seed", "Of the initial parameters and of dropout; drawn if none was given.")

    @property
    def dropout_calls(self) -> int:
        """Completed calls of `forward_train`, but for those with drop=False.

        With `seed` their number decides what the next one drops.
        """
        return self._dropout_calls

    @dropout_calls.setter
    def dropout_calls(self, value: int) -> None:
        self._dropout_calls = checks.integer("dropout_calls", value, 0)

    # ------------------------------------------------------------------------------ parameters

    @property
    def params(self) -> Arrays:
        """Parameters by PyTorch's names, in PyTorch's order: views of `flat`."""
        return self._params

    @property
    def grads(self) -> Arrays:
        """Gradients by the names of the parameters: views of `flat_grads`."""
        return self._grads

    @property
    def flat(self) -> np.ndarray:
        """All parameters in one buffer. Assigning writes into it: `lstm.flat -= lr * g` works."""
        return self._flat

    @flat.setter
    def flat(self, value: Any) -> None:
        assign("flat", self._flat, value)

    @property
    def flat_grads(self) -> np.ndarray:
        """All gradients in one buffer, in the order of `flat`."""
        return self._flat_grads

    @flat_grads.setter
    def flat_grads(self, value: Any) -> None:
        assign("flat_grads", self._flat_grads, value)

    def zero_grad(self) -> None:
        """Sets all gradients to zero.

        >>> from rnnfast import LSTM
        >>> lstm = LSTM(2, 3)
        >>> lstm.flat_grads += 1
        >>> lstm.zero_grad()
        >>> float(lstm.flat_grads.max())
        0.0
        """
        self._flat_grads[...] = 0

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters, by PyTorch's names.

        >>> from rnnfast import LSTM
        >>> list(LSTM(2, 3, bias=False).state_dict())
        ['weight_ih_l0', 'weight_hh_l0']
        """
        return {name: view.copy() for name, view in self._params.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Takes all parameters from a dict of arrays or tensors, such as PyTorch's `state_dict()`.

        prefix: of a whole model's dict, what this layer's names start with, as in "encoder.rnn.";
        entries that start with something else are another layer's. Raises ValueError if an entry is
        missing, unused or mis-shaped, TypeError for another dtype; nothing is changed then.

        >>> from rnnfast import GRU
        >>> a, b = GRU(2, 3, seed=1), GRU(2, 3, seed=2)
        >>> b.load_state_dict(a.state_dict())
        >>> bool((a.flat == b.flat).all())
        True
        >>> b.load_state_dict({f"rnn.{name}": a for name, a in a.params.items()}, prefix="rnn.")
        """
        self._load_state_dict(state_dict, prefix, self._shapes)

    def _load_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """`load_state_dict`, with names of parameters, in their order, as `shapes` has them."""
        if self._packs is not None:
            checks.fail(ValueError, "load_state_dict", "a frozen module", "unfreeze() first")
        if type(prefix) is not str:
            checks.fail(TypeError, "prefix", checks.describe(prefix), "a str")
        if prefix:
            state_dict = checks.named("state_dict", state_dict, prefix)
        # Into a buffer first, in case reading an entry fails or an entry is a view of this module.
        fresh = np.empty_like(self._flat)
        views = views_of(fresh, shapes)
        arrays = checks.entries("state_dict", state_dict, shapes, self.dtype)
        for name, array in arrays.items():
            views[name][...] = array
        self._flat[...] = fresh

    def freeze(self) -> None:
        """Makes the parameters read-only and keeps the kernels' packs of them, until `unfreeze`.

        Calls are then spared the packing (but `forward_train` with drop_connect, where each call's
        weights are others). Views of `flat` that were made elsewhere may stay
        writable; writing to them has no effect on the results until `unfreeze`.

        >>> from rnnfast import LSTM
        >>> lstm = LSTM(2, 3)
        >>> lstm.freeze()
        >>> lstm.flat[0] = 1
        Traceback (most recent call last):
        ValueError: assignment destination is read-only
        >>> lstm.unfreeze()
        """
        if self._packs is None:
            self._packs = {FORWARD: self._pack_all(FORWARD)}
            self._initial = self._initial and [state.copy() for state in self._initial]
            self._set_writeable(False)

    def unfreeze(self) -> None:
        """Makes the parameters writable again and drops the packs."""
        self._packs = None
        self._initial = self._own_initial
        self._set_writeable(True)

    def _set_writeable(self, writeable: bool) -> None:
        for array in (self._flat, *self._params.values()):
            array.flags.writeable = writeable

    def _pack(self, layer: int, kind: int, drops: DropConnect | None = None) -> Any:
        weights = self._weights[layer]
        if drops is not None:
            weights = drops.weights(layer, weights)
        number, functions = self._cell.number, self._functions
        return _kernels.pack(number, weights, kind, config.threads, config.plan, None, functions)

    def _pack_all(self, kind: int, drops: DropConnect | None = None) -> list[Any]:
        return [self._pack(layer, kind, drops) for layer in range(len(self._weights))]

    def _kept(self, kind: int) -> list[Any] | None:
        """The packs of a frozen module, those of a kind made when first asked for; else None."""
        packs = self._packs  # read once: another thread may unfreeze
        if packs is not None and kind not in packs:
            packs[kind] = self._pack_all(kind)
        return packs and packs[kind]

    # ------------------------------------------------------------------------------------ calls

    def __call__(
        self, x: Any, state: Any = None, lengths: Any = None, *, mask: Any = None,
        clamp: Any = None, all_states: bool = False, offsets: Any = None,
    ) -> Any:  # fmt: skip
        """Inference: no tape, and nothing is dropped.


        x [T, B, I], [B, T, I] with batch_first, or unbatched [T, I]; state: (h_0, c_0) for the
        LSTM, h_0 for others, each [L*D, B, H] ([L*D, H] unbatched), or None for zeros; lengths
        [B]: the valid steps of each row, in any order, or None; mask, instead of lengths: bool [T,
        B] in x's layout, the steps that there are, with holes in the middle too; clamp: a `Clamp`,
        or a list of such, of units whose states are given; offsets [B + 1], instead of lengths, for
        an x [all steps, I] in which the rows of the batch lie one after the other: row b is
        x[offsets[b] : offsets[b + 1]], and y likewise (a tape has room for T steps of each row,
        all the same, as it has with lengths); not beside lengths, mask, clamp or all_states.

        Returns y [T, B, D*H] ([T, B, H] of merged directions) in the layout of x, zero past a row's
        length and at missing steps (see padding), and the states after each row's last valid step,
        shaped as `state`; with all_states, third, the `States` of all layers after each step.
        Raises TypeError, ValueError or MemoryError, and KeyboardInterrupt when interrupted.

        >>> from rnnfast import LSTM
        >>> lstm = LSTM(3, 5)
        >>> y, (h_n, c_n) = lstm(np.zeros((7, 2, 3), np.float32))
        >>> y.shape, h_n.shape, c_n.shape
        ((7, 2, 5), (1, 2, 5), (1, 2, 5))
        """
        y, state_n, _, states = self._forward(
            x, state, lengths, None, mask, clamp, all_states, offsets
        )
        return (y, state_n) if states is None else (y, state_n, states)

    def forward_train(
        self, x: Any, state: Any = None, lengths: Any = None, *, tape: str = "full",
        mask: Any = None, clamp: Any = None, all_states: bool = False, offsets: Any = None,
        drop: bool = True,
    ) -> Any:  # fmt: skip
        """As a plain call, with all that drops and holds, and with a tape for `backward`, third;
        all states, if asked for, are fourth.

        The tape holds a view of x, not a copy, unless one had to be made; neither x nor the
        parameters may be changed before `backward`.

        tape: "full" keeps gates and states of all steps; "light" keeps states at some sqrt(T) steps
        of each layer, and `backward` computes the others again: far less memory for some third more
        time, and the same bits. What one layer hands to the next is kept by both, and what is
        multiplied where directions are. drop: False computes what a plain call does, for the
        gradients of inference, and does not count as one of `dropout_calls`; refused with zoneout,
        of which a plain call has what is expected.

        >>> from rnnfast import LSTM
        >>> lstm = LSTM(3, 5)
        >>> x = np.zeros((10000, 2, 3), np.float32)
        >>> y, state, tape = lstm.forward_train(x)
        >>> y.shape, len(tape.layers)
        ((10000, 2, 5), 1)
        >>> _, _, light = lstm.forward_train(x, tape="light")
        >>> tape.nbytes // 10**5, light.nbytes // 10**5
        (24, 0)
        """
        kind = checks.choice("tape", tape, TAPES)
        if not checks.boolean("drop", drop) and np.any(self.zoneout):
            needs = "True with zoneout: what is expected of it has no backward pass"
            checks.fail(ValueError, "drop", "False", needs)
        made = self._forward(x, state, lengths, kind, mask, clamp, all_states, offsets, drop)
        return made[:3] if made[3] is None else made

    def _forward(
        self, x: Any, state: Any, lengths: Any, kind: str | None, mask: Any, clamp: Any,
        all_states: bool, offsets: Any, drop: bool = True,
    ) -> tuple[np.ndarray, Any, StackTape | None, States | None]:  # fmt: skip
        cell, pair, dtype, batch_first, I, H, P, L, D, width, learned, single = self._fixed
        if offsets is None:
            x, unbatched = checks.sequence("x", x, dtype, I, batch_first)
        else:
            others = {"lengths": lengths, "mask": mask, "clamp": clamp}
            checks.alone("offsets", {**others, "all_states": all_states or None})
            x, starts, lengths = checks.packed_rows("x", x, offsets, dtype, I)
            sizes = (int(lengths.max(initial=0)), len(lengths), I)
            x, batch_first, unbatched = _kernels.Packed(x, starts, sizes, True), False, False
        T, B, _ = x.shape
        rows, h_size = L * D, P or H
        # At most 16 numbers a layer: y, its dropped copy, states and gates of the tape, or less.
        if (T + 1) * B * (I + 16 * L * D * H) > checks.SURELY_SMALL:
            N = D * h_size
            steps = T * B if offsets is None else len(x.data)
            numbers = steps * (I + 2 * N) + 2 * rows * B * H
            if kind:
                numbers += L * (tape_numbers(cell, T, B, H, D, kind) + 2 * steps * N)
            checks.room("x", numbers, dtype.itemsize)
        h_0 = c_0 = None
        if state is not None:
            sizes = (rows, B, H)
            h_0, c_0 = checks.states(checks.STATE, state, pair, dtype, sizes, unbatched, P)
        elif learned:  # copies: what is checked and what is on the tape stay as they are
            h_0, c_0 = [*(np.repeat(one, B, axis=1) for one in self._initial), None][:2]
        if lengths is not None and offsets is None:
            lengths = checks.lengths("lengths", lengths, T, B, unbatched)
        mores = hs = states = None
        clamps: tuple[Clamped, ...] = ()
        if not (self._usual and mask is None and clamp is None and all_states is False):
            layout = Layout(T, B, batch_first, unbatched)
            lengths, mores, clamps, states, hs = self._beside(
                layout, lengths, mask, clamp, all_states,
                self._dropout_calls if kind and drop else None,
            )  # fmt: skip

        h_n = np.empty((rows, B, h_size), dtype)
        c_n = np.empty((rows, B, H), dtype) if pair else None
        if offsets is not None:
            y = new_like(x, width)
            result = y.data
        elif batch_first or unbatched:
            result = new_sequence(T, B, width, dtype, batch_first, unbatched)
            y = as_steps(result, batch_first, unbatched)
        else:
            y = result = new_array((T, B, width), dtype)
        call = self._dropout_calls if kind else 0
        threads = config.threads
        packs = self._packs and self._kept(FORWARD)
        tapes, dropout, both, drops = None, stack.NO_DROPOUT, None, None
        if single:  # as `stack` does; the detour is a tenth of a small call
            packed = packs[0] if packs else self._pack(0, FORWARD)
            tape = None
            if kind:
                light = packed if kind == "light" else None
                tape = new_tape(cell, x, D, H, P, lengths, False, light)
                tapes = (tape,)
            more = mores and mores[0]
            run_forward(packed, x, h_0, c_0, y, h_n, c_n, lengths, False, tape, threads, more)
            if hs is not None:
                hs[0] = y
        else:
            if kind:
                if self._drop_connect and drop:
                    drops = DropConnect(self._drop_connect, self._dropout[1], call)
                    packs = None
                if kind == "light" and not packs:  # a light tape keeps them
                    packs = self._pack_all(FORWARD, drops)
                kept = packs if kind == "light" else None
                merge = self._merge
                tapes = stack.new_tapes(cell, x, H, P, L, D, lengths, kept, merge=merge)
                both = stack.new_both(tapes) if merge == "mul" else None
                if drop:
                    dropout = stack.Dropout(*self._dropout, call)
            pack = packs.__getitem__ if packs else partial(self._pack, kind=FORWARD, drops=drops)
            stack.forward(
                cell, pack, L, D, x, h_0, c_0, y, h_n, c_n, lengths, tapes, dropout, threads,
                mores, hs, self._merge, both,
            )  # fmt: skip
        held = self._holds and lengths is not None and offsets is None
        if held:
            times = mores[0].times if mores else None
            calls.hold(y, calls.valid_steps(T, B, lengths, times), D)
        if unbatched:
            h_n, c_n = h_n[:, 0], None if c_n is None else c_n[:, 0]
        state_n = h_n if c_n is None else (h_n, c_n)
        if tapes is None:
            return result, state_n, None, states
        for tape in (tapes[0], tapes[-1]):  # those whose arrays the caller sees
            tape.batch_first, tape.unbatched = batch_first, unbatched
        if drop:
            self._dropout_calls = call + 1
        learned = learned and state is None
        kept = StackTape(tuple(tapes), self._token, dropout, drops, clamps, held, both, learned)
        return result, state_n, kept, states

    def _beside(
        self,
        layout: Layout,
        lengths: Any,
        mask: Any,
        clamp: Any,
        all_states: bool,
        call: int | None,
    ) -> tuple[Any, list[More], tuple[Clamped, ...], States | None, np.ndarray | None]:
        """What a call does beside the plain one: its lengths; of each layer what most do without;
        the clamps; and room for all states, as the caller sees it and as layers fill it.
        """
        T, B, batch_first, unbatched = layout
        _, H, P, L, D = self._sizes
        dtype, N = self._dtype, P or H
        times = None
        if mask is not None:
            lengths, times = checks.mask("mask", mask, lengths, T, B, batch_first, unbatched)
        betweens, regular = [Between()] * L, self._regular
        columns = D * N, D * H if self._pair else 0
        if regular is not None and call is not None:  # in training
            betweens = [regular.training(layer, call, T, B, *columns) for layer in range(L)]
        elif regular is not None:
            betweens = [regular.inference()] * L
        clamps = []
        if clamp is not None:
            several = type(clamp) in (list, tuple)
            for i, one in enumerate(clamp if several else (clamp,)):
                name = f"clamp[{i}]" if several else "clamp"
                clamps.append(calls.add_clamp(name, one, betweens, columns, layout, dtype))
        states = hs = cs = None
        if checks.boolean("all_states", all_states):
            checks.room("x", L * T * B * sum(columns), dtype.itemsize)
            # What is not written at missing steps is zero.
            arrays = [np.zeros((L, *layout.shape(n)), dtype) if n else None for n in columns]
            states = States(*arrays)
            hs, cs = (None if a is None else layout.by_time(a) for a in arrays)
        mores = [
            More(times, between or None, None if cs is None else cs[layer])
            for layer, between in enumerate(betweens)
        ]
        return lengths, mores, tuple(clamps), states, hs

    def backward(
        self, tape: StackTape, dy: Any = None, dstate: Any = None, *, need_dx: bool = True,
        accumulate: bool = True, dstates: Any = None, clip: float | None = None,
        clip_norm: float | None = None, norms: bool = False,
    ) -> Any:  # fmt: skip
        """Backpropagation through time along `tape`; adds to `grads`, or replaces them.

        dy: gradient of the loss by y, shaped as y; dstate: by the last states, shaped as they
        were; each may be None for zeros. A tape may be used again. accumulate: False gives
        what `zero_grad` and then True would, without clearing and reading all gradients; it is much
        faster where they are large and T B is small. dstates: gradients by all states, a pair (by
        h, by c) shaped as `States`, either may be None. clip, clip_norm: what later steps send to
        the h of a step is clipped to [-clip, clip], and then, where its norm over a row's numbers
        is greater, scaled to clip_norm; gradients of that step's own y come in afterwards.

        Returns dx, shaped as x (None without `need_dx`, which spares a product), and the gradient
        by the initial states; with clamps in the call, or norms, third an `Extra`. Raises as a call
        does; `grads` are then as they were, or, interrupted at the very end, all of them are new.

        >>> from rnnfast import LSTM
        >>> lstm = LSTM(3, 5)
        >>> y, _, tape = lstm.forward_train(np.zeros((7, 2, 3), np.float32))
        >>> dx, (dh_0, dc_0) = lstm.backward(tape, np.ones_like(y))
        >>> dx.shape, dh_0.shape, bool(lstm.grads["weight_hh_l0"].any())
        ((7, 2, 3), (1, 2, 5), True)
        """
        need_dx = checks.boolean("need_dx", need_dx)
        accumulate = checks.boolean("accumulate", accumulate)
        layers, dropout = self._own_tapes(tape)
        dtype, pair = self._dtype, self._pair
        I, H, P, L, D = self._sizes
        batch_first, unbatched = layers[0].batch_first, layers[0].unbatched
        x = layers[0].x
        packed = type(x) is _kernels.Packed
        T, B, _ = x.shape
        rows, h_size = L * D, P or H
        width = self._width
        if dy is not None and packed:
            dy = checks.exact("dy", dy, dtype, (len(x.data), width), "all steps, D*H")
            dy = _kernels.Packed(dy, x.starts, (T, B, width), True)
        elif dy is not None:
            dy = checks.gradient("dy", dy, dtype, (T, B, width), batch_first, unbatched)
        dh_n = dc_n = None
        if dstate is not None:
            sizes = (rows, B, H)
            dh_n, dc_n = checks.states(checks.DSTATE, dstate, pair, dtype, sizes, unbatched, P)
        steps = len(x.data) if packed else T * B
        checks.room("tape", steps * (I + 4 * D * h_size), dtype.itemsize)
        if tape._held and dy is not None:
            valid = calls.valid_steps(T, B, layers[0].lengths, layers[0].times)
            dy = calls.unhold(dy, valid, D)
        receiveds = dhs = found = None
        norms = checks.boolean("norms", norms)
        happens = norms or dstates is not None or clip is not None or clip_norm is not None
        for layer in layers:
            happens = happens or layer.between is not None
        if happens:
            layout = Layout(T, B, batch_first, unbatched)
            limits, dcs = checks.limits(clip, clip_norm, dtype), None
            if dstates is not None:
                if packed:
                    checks.alone("offsets", {"dstates": dstates})
                columns = D * h_size, D * H if pair else 0
                dhs, dcs = (
                    None if a is None else layout.by_time(a)
                    for a in checks.all_states("dstates", dstates, L, layout.shape, columns, dtype)
                )
            if norms:
                found = np.zeros((L, T, B, D), dtype)
            receiveds = calls.receive_all(layers, D, limits, found, dcs)

        # Into a buffer first: an interrupted call leaves the gradients as they are. The kernel of a
        # single layer in one direction takes it there, unless another thread is about to add. The
        # buffer is kept for the next call, and off the list meanwhile: threads may call at once.
        adding = self._adding_lock()
        scratch = self._scratch.pop() if self._scratch else self._new_scratch()
        fresh, grads, initial = scratch
        dx_result = dx = None
        if need_dx and packed:
            dx = new_like(x, I)
            dx_result = dx.data
        elif need_dx:
            dx_result = new_sequence(T, B, I, dtype, batch_first, unbatched)
            dx = as_steps(dx_result, batch_first, unbatched)
        dh_0 = np.empty((rows, B, h_size), dtype)
        dc_0 = np.empty((rows, B, H), dtype) if pair else None
        drops = tape._drops
        packs = None if drops else self._kept(BACKWARD)
        pack = packs.__getitem__ if packs else partial(self._pack, kind=BACKWARD, drops=drops)
        with _kernels.Turn(adding if self._in_place else None) as held:
            stack.backward(
                pack, layers, D, dy, dh_n, dc_n, dx, dh_0, dc_0, grads, dropout, config.threads,
                add_to=self._own_grads[0][0] if held else None, replace=not accumulate,
                receiveds=receiveds, dhs=dhs, merge=self._merge, both=tape._both,
            )  # fmt: skip
        if drops:
            for layer, own in enumerate(grads):
                drops.gradients(layer, own)
        if initial:
            for into, by_row in zip(initial, (dh_0, dc_0), strict=False):
                into[...] = 0
                if tape._learned:  # all rows started from it: their sum, in one order
                    with np.errstate(all="ignore"):
                        into[...] = by_row.sum(axis=1, dtype=np.float64, keepdims=True)
        if unbatched:
            dh_0, dc_0 = dh_0[:, 0], None if dc_0 is None else dc_0[:, 0]
        if not held:
            with adding, np.errstate(all="ignore"):  # NaN and inf are results
                if accumulate:
                    self._flat_grads += fresh
                else:
                    self._own_flat_grads[...] = fresh
        if not self._scratch:
            self._scratch.append(scratch)
        dstate_0 = dh_0 if dc_0 is None else (dh_0, dc_0)
        if not (tape._clamps or norms):
            return dx_result, dstate_0
        for clamp in tape._clamps:
            if layers[clamp.layer].between is None:
                needs = "one as forward_train returned it"
                checks.fail(ValueError, "tape", "an altered one", needs)
        clamps = tuple(clamp.gradient(receiveds[clamp.layer]) for clamp in tape._clamps)
        by_caller = None if found is None else layout.of_caller(found)
        return dx_result, dstate_0, Extra(clamps, by_caller)

    def _adding_lock(self) -> Any:
        """Held by who adds to the gradients. Of this process: a fork leaves none to let it go."""
        process = os.getpid()
        return self._adding.get(process) or self._adding.setdefault(process, threading.RLock())

    def _new_scratch(self) -> tuple[np.ndarray, tuple, list[np.ndarray] | None]:
        """A buffer like `flat_grads`, and its views: as `run_backward` takes them, by layer; and
        those of initial states."""
        fresh = aligned(self._flat.size, self._dtype)
        views = views_of(fresh, self._shapes)
        return fresh, self._by_layer(views), self._initial_of(views)

    def _own_tapes(self, tape: StackTape) -> tuple[list[Tape], stack.Dropout]:
        """The layers' tapes as backward may read them, see `own_tape`, and what made the masks."""
        if type(tape) is not StackTape:
            needs = "what forward_train returned as its tape"
            checks.fail(TypeError, "tape", checks.describe(tape), needs)
        I, H, P, L, D = self._sizes
        layers = getattr(tape, "layers", None)
        if type(layers) is not tuple or len(layers) != L:
            got = f"one of {len(layers)} layers" if type(layers) is tuple else "an altered one"
            checks.fail(ValueError, "tape", got, f"one of {L}")
        own = []
        for one in layers:
            own.append(own_tape(one, self._row, (I, H, P, D), self._dtype))
            I = self._width
        # Of packed rows, where they begin and end is what the lowest layer's tape says.
        first, alike = own[0], True
        packed = type(first.x) is _kernels.Packed
        for one in own[1:]:
            alike = alike and one.x.shape[:2] == first.x.shape[:2] and type(one.x) is type(first.x)
            if packed and alike:
                alike = len(one.x.data) == len(first.x.data)
                alike = alike and bool((one.x.starts == first.x.starts).all())
                alike = alike and bool((one.lengths == first.lengths).all())
        if not alike:
            checks.fail(ValueError, "tape", "an altered one", "one as forward_train returned it")
        if getattr(tape, "_owner", None) != self._token:
            checks.fail(ValueError, "tape", "one of another module", "one of this module's own")
        return own, tape._dropout

    # ------------------------------------------------------------------------- files and copies

    def save(self, path: Any) -> None:
        """Writes the module to a file; see `rnnfast.load`.

        The path is taken as it is: no `.npz` is added, though that is the format.
        Killed at any moment, the file is the old one or the new one, whole. Gradients are not
        saved. Raises OSError when the system refuses.
        """
        path = checks.path("path", path)
        storage.write(path, {"class": type(self)._file_name, **self._header()}, self._params)

    def _header(self) -> dict[str, Any]:
        """What makes a module of the parameters, in JSON's types."""
        arguments = {**self._arguments, "dtype": self._dtype.name}
        return {"arguments": arguments, "dropout_calls": self._dropout_calls}

    @classmethod
    def _from_file(cls, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
        """The module of what `save` wrote; KeyError, TypeError or ValueError if it is not such."""
        arguments = _checked({**cls._later, **header["arguments"]})
        cell, _ = cls._row_of(arguments)
        calls = checks.integer("dropout_calls", header["dropout_calls"], 0)
        L, D = arguments["num_layers"], 2 if arguments["bidirectional"] else 1
        P, merged = arguments.get("proj_size", 0), arguments["merge"] != CONCAT
        learned = arguments["learn_initial"]
        count = L * D * len(names_of(cell, P, arguments["bias"])) + learned * len(cell.states)
        if len(arrays) != count:  # before L is used to make as many names
            needs = f"the {count} of its module"
            checks.fail(ValueError, "parameters", f"{len(arrays)} entries", needs)
        I, H, dtype = arguments["input_size"], arguments["hidden_size"], arguments["dtype"]
        shapes = parameter_shapes(cell, I, H, L, D, arguments["bias"], P, merged, learned)
        arrays = checks.entries("parameters", arrays, shapes, dtype)
        module = cls.__new__(cls)
        module._build(arguments, fill=False)
        for name, array in arrays.items():
            module.params[name][...] = array
        module.dropout_calls = calls
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self._header(),
            "frozen": self._packs is not None,
            "flat": self._flat.copy(),
            "flat_grads": self._flat_grads.copy(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        try:
            self._build({**self._later, **state["arguments"]}, fill=False)
            self.flat, self.flat_grads = state["flat"], state["flat_grads"]
            self.dropout_calls = state["dropout_calls"]
            if state["frozen"]:
                self.freeze()
        except (KeyError, TypeError) as error:
            got = f"what does not fit ({type(error).__name__}: {error})"
            checks.fail(ValueError, "state", got, "what a module's __getstate__ returned")

    # --------------------------------------------------------------------------------- streams

    def stream(self, batch_size: int = 1) -> Stream:
        """Steps one at a time, the state kept inside; see `Stream`.

        It has a copy of the weights: later edits do not reach it. Raises ValueError for a
        bidirectional module, which would need the future.

        >>> from rnnfast import LSTM
        >>> s = LSTM(3, 5).stream()
        >>> s.step(np.zeros(3, np.float32)).shape
        (5,)
        """
        return Stream(self, batch_size)

    def __repr__(self) -> str:
        shown = {
            name: self._arguments[name]
            for name, usual in {**DEFAULTS, **self._later}.items()
            if name in self._arguments and self._arguments[name] not in (usual, (usual, usual))
        }
        words = [str(self.input_size), str(self.hidden_size)]
        words += [f"{name}={value!r}" for name, value in shown.items()]
        if self._dtype != checks.FLOAT32:
            words.append(f"dtype={self._dtype.name}")
        return f"{type(self).__name__}({', '.join(words)})"


# Of arguments that every file has.
DEFAULTS = {
    "num_layers": 1, "nonlinearity": "tanh", "bias": True, "batch_first": False, "dropout": 0.0,
    "bidirectional": False, "proj_size": 0, "reset_after": True,
}  # fmt: skip


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that all classes share, checked; a class's own ones as they are."""
    checked = dict(arguments)
    for name in ("input_size", "hidden_size", "num_layers"):
        checked[name] = checks.integer(name, arguments[name], 1)
    for name in ("bias", "batch_first", "bidirectional", "learn_initial"):
        checked[name] = checks.boolean(name, arguments[name])
    for name in ("dropout", "drop_connect"):
        checked[name] = checks.fraction(name, arguments[name])
    merge = checked["merge"] = checks.choice("merge", arguments["merge"], MERGES)
    if merge != CONCAT and not checked["bidirectional"]:
        needs = "bidirectional=True: of one direction there is nothing to merge"
        checks.fail(ValueError, "merge", repr(merge), needs)
    checked["dtype"] = checks.float_dtype("dtype", arguments["dtype"])
    if arguments["seed"] is not None:
        checked["seed"] = checks.integer("seed", arguments["seed"], 0, checks.MAX_SEED)
    return checked

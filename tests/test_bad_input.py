"""Bad and unusual input of every class in every argument: a right result or a clear error.

A generated table: targets (public calls, each with valid arguments) times what can stand in an
argument's place. Knows the public API. The cases run in worker processes, so that a crash or a
hang is one more failed case, with its name; a worker is this file run as a program.
"""

import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cases import options_of, own_options

import rnnfast
from rnnfast import functional
from rnnfast.cells import CELLS, Functions

SECONDS = 20  # for one case; they take a thousandth of a second
ADDRESS_SPACE = 6 * 2**30  # so that a giant request fails here as on a machine that refuses it
T, B, I, H = 5, 3, 4, 7  # no two equal, none the double of another
ALLOWED = TypeError, ValueError, MemoryError


class Target(NamedTuple):
    """A public call with valid arguments.

    `call` takes the named arrays and returns its result arrays; `fixed` says which axes of an array
    have only one right size; `names`, what an error about it may call it (any of these).
    """

    name: str
    call: Callable[[dict], list]
    arrays: dict[str, np.ndarray]
    fixed: dict[str, tuple[int, ...]]
    names: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()  # arrays that `call` gives to two public calls


class Case(NamedTuple):
    name: str
    run: Callable[[], None]


# ------------------------------------------------------------------------------------ expectations


def refused(call, *words, errors=(TypeError, ValueError)):
    """`call` raises one of `errors`; its message has one of `words`, what came, what is needed."""
    try:
        call()
    except errors as error:
        text = str(error)
        assert any(word in text for word in words), f"none of {words} in: {text}"
        if not isinstance(error, MemoryError):
            assert "needs" in text, text
            assert "got" in text or "could not be read" in text, text
        assert len(text) < 1000, text
        return
    raise AssertionError("was not refused")


def refusal(name, words, call, *args, errors=(TypeError, ValueError), **kwargs):
    """The case that such a call is refused."""
    words = (words,) if isinstance(words, str) else words
    return Case(name, partial(refused, partial(call, *args, **kwargs), *words, errors=errors))


def bits(arrays):
    return [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]


def same_bits(target, name, value, before):
    """With `value` in place of the array whose contiguous copy is `before`, the same bits."""
    want = bits(target.call({**target.arrays, name: before}))
    source = before.tobytes()
    got = target.call({**target.arrays, name: value})
    assert bits(got) == want, f"{name}: other bits than with the contiguous copy"
    if isinstance(value, np.ndarray):
        assert value.tobytes() == source, f"{name}: the input was written"
        for array in got:
            assert not np.may_share_memory(array, value), f"{name}: a result aliases it"


# ------------------------------------------------------------------- what can stand for an array


class Raises:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not today")


class Lies:
    """Its `__array__` gives something else."""

    def __init__(self, answer):
        self.answer = answer

    def __array__(self, dtype=None, copy=None):
        return self.answer


class Changes:
    """Its `__array__` gives a right array once, and another shape from then on."""

    def __init__(self, array):
        self.array, self.calls = array, 0

    def __array__(self, dtype=None, copy=None):
        self.calls += 1
        return self.array if self.calls == 1 else self.array.reshape(-1)[:1]


class Disturbs:
    """Its `__array__` gives a right array, and does something to other objects before."""

    def __init__(self, array, act):
        self.array, self.act = array, act

    def __array__(self, dtype=None, copy=None):
        self.act()
        return self.array


class Address:
    """A bare address, as `__array_interface__` gives it: nobody can check that."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__


class DLPack:
    """DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OtherDevice(DLPack):
    def __dlpack_device__(self):
        return (2, 0)


class WantsGrad:
    """As a tensor that takes part in automatic differentiation."""

    requires_grad = True

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self.array

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("can't call numpy() on a tensor that requires grad")


class Subclass(np.ndarray):
    pass


def other_float(array):
    return np.float64 if array.dtype == np.float32 else np.float32


WRONG_DTYPES = {
    "float16": lambda a: a.astype(np.float16),
    "other float": lambda a: a.astype(other_float(a)),
    "longdouble": lambda a: a.astype(np.longdouble),
    "int8": lambda a: a.astype(np.int8),
    "int32": lambda a: a.astype(np.int32),
    "int64": lambda a: a.astype(np.int64),
    "uint64": lambda a: np.ones(a.shape, np.uint64),
    "bool": lambda a: a.astype(bool),
    "complex64": lambda a: a.astype(np.complex64),
    "complex128": lambda a: a.astype(np.complex128),
    "object": lambda a: a.astype(object),
    "str": lambda a: a.astype(str),
    "bytes_": lambda a: a.astype("S8"),
    "datetime64": lambda a: np.zeros(a.shape, "M8[s]"),
    "structured": lambda a: np.zeros(a.shape, [("a", a.dtype)]),
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
}

NOT_ARRAYS = {
    "list": lambda a: a.tolist(),
    "ragged list": lambda a: [[1.0, 2.0], [3.0]],
    "tuple of rows": lambda a: tuple(a) if a.ndim != 1 and len(a) != 2 else (1.0, 2.0, 3.0),
    "number": lambda a: 1.0,
    "integer": lambda a: 3,
    "huge integer": lambda a: 2**100,
    "numpy scalar": lambda a: a.dtype.type(1),
    "True": lambda a: True,
    "text": lambda a: "3",
    "long text": lambda a: "x" * 100_000,
    "bytes": lambda a: b"\0" * a.nbytes,
    "bytearray": lambda a: bytearray(a.nbytes),
    "dict": lambda a: {"x": a},
    "set": lambda a: {1, 2},
    "generator": lambda a: (row for row in a),
    "object()": lambda a: object(),
    "the type": lambda a: np.ndarray,
    "masked array": lambda a: np.ma.masked_array(a, np.zeros(a.shape, bool)),
    "__array__ raises": lambda a: Raises(),
    "__array__ gives a list": lambda a: Lies(a.tolist()),
    "__array__ gives None": lambda a: Lies(None),
    "__array__ gives itself": lambda a: Lies(Lies(None)),
    "__array__ gives another dtype": lambda a: Lies(a.astype(np.int64)),
    "__array__ gives another rank": lambda a: Lies(a[(None,) * (5 - a.ndim)]),
    "bare address": Address,
    "DLPack of another device": OtherDevice,
    "DLPack of another dtype": lambda a: DLPack(a.astype(other_float(a))),
    "released memoryview": lambda a: released(a),
}


def released(array):
    view = memoryview(array.copy())
    view.release()
    return view


def unaligned(array):
    raw = np.empty(array.nbytes + 1, np.uint8)
    out = raw[1:].view(array.dtype).reshape(array.shape)
    out[...] = array
    assert not out.flags.aligned or array.size == 0
    return out


def read_only(array):
    out = array.copy()
    out.flags.writeable = False
    return out


def memory_mapped(array):
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(array.tobytes())
    out = np.memmap(file.name, array.dtype, "r", shape=array.shape)
    os.unlink(file.name)
    return out


def every_second(array, axis):
    big = np.full([2 * n if k == axis else n for k, n in enumerate(array.shape)], np.nan)
    out = big.astype(array.dtype)[tuple(
        slice(None, None, 2) if k == axis else slice(None) for k in range(array.ndim)
    )]  # fmt: skip
    out[...] = array
    return out


def backwards(array, axis):
    return np.flip(np.flip(array, axis).copy(), axis)


def repeated(array, axis):
    """Zero strides along an axis: other values than `array`'s."""
    first = np.take(array, [0], axis)
    return np.broadcast_to(first, array.shape)


def transposed(array):
    axes = tuple(reversed(range(array.ndim)))
    return array.transpose(axes).copy().transpose(axes)


def inside(array):
    """A window of a larger array: no two rows adjacent."""
    big = np.full([n + 2 for n in array.shape], np.nan).astype(array.dtype)
    out = big[tuple(slice(1, -1) for _ in array.shape)]
    out[...] = array
    return out


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "transposed": transposed,
    "unaligned": unaligned,
    "unaligned Fortran order": lambda a: unaligned(a.T).T,
    "read-only": read_only,
    "memory-mapped": memory_mapped,
    "a window": inside,
    "memoryview": lambda a: memoryview(a.copy()),
    "a subclass": lambda a: a.copy().view(Subclass),
    "__array__": lambda a: Lies(a.copy()),
    "DLPack": lambda a: DLPack(a.copy()),
}


def array_cases(target):
    """All that can stand in the place of each array of a target."""
    for name, array in target.arrays.items():
        words = target.names[name]

        def case(label, run, name=name):
            return Case(f"{target.name} / {name} / {label}", run)

        def put(value, name=name):
            return target.call({**target.arrays, name: value})

        def bad(make, array=array, words=words, put=put):
            return lambda: refused(lambda: put(make(array)), *words)

        for label, make in {**WRONG_DTYPES, **NOT_ARRAYS}.items():
            yield case(label, bad(make))
        if name not in target.optional:
            yield case("None", bad(lambda a: None))
        if target.name != "load_state_dict" and name not in ("weight", "bias", "table"):
            yield case("wants gradients", bad(WantsGrad))

        yield case("rank 0", bad(lambda a: a.reshape(-1)[0:1].reshape(())))
        yield case("a rank more", bad(lambda a: a[..., None] if a.ndim > 2 else a[None, None]))
        if (name in ("x", "x_t", "block") and array.shape[-2] == 1) or 0 not in target.fixed[name]:
            yield case("two ranks less", bad(lambda a: a[(0,) * 2]))  # one less is an input, too
        else:
            yield case("a rank less", bad(lambda a: a[0]))
        for axis in target.fixed[name]:
            n = array.shape[axis]
            for label, size in (("0", 0), ("1", 1), ("less 1", n - 1), ("plus 1", n + 1),
                                ("doubled", 2 * n), ("three quarters", 3 * n // 4)):  # fmt: skip
                if size != n:
                    make = resized(axis, size)
                    yield case(f"axis {axis}: {label}", bad(make))
        for axis in range(array.ndim - 1):
            shape = array.shape
            pair = {axis, axis + 1} & set(target.fixed[name])
            if pair and shape[axis] != shape[axis + 1]:
                swap = lambda a, axis=axis: a.swapaxes(axis, axis + 1).copy()  # noqa: E731
                yield case(f"axes {axis}, {axis + 1} swapped", bad(swap))
        yield case("flat", bad(lambda a: a.reshape(1, 1, 1, -1)))

        def good(make, array=array, name=name):
            return lambda: same_bits(target, name, make(array), array)

        for label, make in LAYOUTS.items():
            yield case(label, good(make))
        if name not in target.twice:
            yield case("__array__ that changes", good(lambda a: Changes(a.copy())))
        for axis in range(array.ndim):
            for make in (every_second, backwards):
                yield case(
                    f"{make.__name__} along axis {axis}",
                    good(lambda a, make=make, axis=axis: make(a, axis)),
                )
            yield case(f"zero stride along axis {axis}", zero_stride(target, name, array, axis))
        for label, value in SPECIAL.items():
            yield case(label, special(target, name, array, value))


def reshape(shape_of):
    def act(array):
        array.shape = shape_of(array.shape)

    return act


def as_bytes(array):
    array.dtype = np.uint8


# What the code of one argument may do to the array of another.
ACTS = {
    "flat": reshape(lambda shape: (-1,)),
    "a rank more": reshape(lambda shape: (1, *shape)),
    "reversed": reshape(lambda shape: shape[::-1]),
    "first axes as one": reshape(lambda shape: (-1, *shape[2:])),
    "one row": reshape(lambda shape: (1, -1)),
    "one column": reshape(lambda shape: (-1, 1, 1)),
    "bytes": as_bytes,
}


def disturbed_cases(target):
    """Each argument's `__array__` reshapes each other one: seen before it, or after, or refused."""

    def fresh():
        return {name: array.copy() for name, array in target.arrays.items()}

    def run(name, other, act):
        allowed = [bits(target.call(fresh()))]
        arrays = fresh()
        act(arrays[other])
        try:
            allowed.append(bits(target.call(arrays)))
        except ALLOWED:
            pass
        arrays = fresh()
        arrays[name] = Disturbs(arrays[name], partial(act, arrays[other]))
        try:
            got = bits(target.call(arrays))
        except (TypeError, ValueError) as error:
            assert "needs" in str(error), error
        else:
            assert got in allowed, "neither the result with the old shape nor with the new one"

    for name in target.arrays:
        for other in target.arrays:
            if other != name:
                for label, act in ACTS.items():
                    label = f"{target.name} / {name} / makes {other} {label}"
                    yield Case(label, partial(run, name, other, act))


def resized(axis, size):
    def make(array):
        shape = [size if k == axis else n for k, n in enumerate(array.shape)]
        return np.ones(shape, array.dtype)

    return make


def zero_stride(target, name, array, axis):
    def run():
        value = repeated(array, axis)
        same_bits(target, name, value, value.copy())

    return run


SPECIAL = {"NaN": np.nan, "inf": np.inf, "denormals": 1e-40, "1e38": 1e38, "-0.0": -0.0}


def special(target, name, array, value):
    """Any number may come: the call ends well, twice the same; and a NaN reaches the results."""

    def run():
        put = array.copy()
        put[...] = value
        arrays = {**target.arrays, name: put}
        first = target.call(arrays)
        assert bits(first) == bits(target.call(arrays))
        if np.isnan(value):
            assert any(np.isnan(a).any() for a in first), "the NaN is hidden"

    return run


# ----------------------------------------------------------------------------------------- targets


def module_targets():
    rng = np.random.default_rng(5)
    for cls in (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU):
        for label, kwargs in (
            ("", {}),
            (" batch_first", {"batch_first": True}),
            (" bidirectional x 2", {"bidirectional": True, "num_layers": 2}),
            (" float64", {"dtype": np.float64}),
        ):
            module = cls(I, H, seed=3, **kwargs)
            yield from call_targets(module, cls.__name__ + label, rng)
    module = rnnfast.GRU(I, H, seed=3, reset_after=False)
    yield from call_targets(module, "GRU reset_after=False", rng)


def call_targets(module, label, rng):
    dtype = module.dtype
    rows = module.num_layers * (2 if module.bidirectional else 1)
    N = H * (2 if module.bidirectional else 1)
    pair = type(module).__name__ == "LSTM"
    swap = (lambda a: a.swapaxes(0, 1).copy()) if module.batch_first else (lambda a: a)

    def random(*shape):
        return rng.normal(size=shape).astype(dtype)

    x, dy = swap(random(T, B, I)), swap(random(T, B, N))
    states = {"h": random(rows, B, H), "c": random(rows, B, H)}
    if not pair:
        del states["c"]
    batch = 0 if module.batch_first else 1

    def together(arrays):
        return (arrays["h"], arrays["c"]) if pair else arrays["h"]

    def flat(y, state):
        return [y, *(state if pair else (state,))]

    state_names = {"h": ("state (h_0)", "state:"), "c": ("state (c_0)", "state:")}
    whole = dict.fromkeys(states, (0, 1, 2))
    yield Target(
        f"{label}()",
        lambda a: flat(*module(a["x"], together(a))),
        {"x": x, **states},
        {"x": (batch, 2), **whole},
        {"x": ("x:", "state (h_0)"), **state_names},
        optional=() if pair else ("h",),
    )
    yield Target(
        f"{label}() unbatched",
        lambda a: flat(*module(a["x"], together(a))),
        {"x": random(T, I), **{k: random(rows, H) for k in states}},
        {"x": (1,), **dict.fromkeys(states, (0, 1))},
        {"x": ("x:", "state (h_0)"), **state_names},
        optional=() if pair else ("h",),
    )

    def train(a):
        y, _, tape = module.forward_train(a["x"])
        module.zero_grad()
        dx, dstate = module.backward(tape, a["dy"], together(a))
        return [y, *flat(dx, dstate), module.flat_grads.copy()]

    grad_names = {"h": ("dstate (dh_n)", "dstate:"), "c": ("dstate (dc_n)", "dstate:")}
    yield Target(
        f"{label}.backward",
        train,
        {"x": x, "dy": dy, **states},
        {"x": (batch, 2), "dy": (0, 1, 2), **whole},
        {"x": ("x:", "dy:", "dstate (dh_n)"), "dy": ("dy:",), **grad_names},
        optional=("dy",) if pair else ("dy", "h"),
    )


def functional_targets():
    rng = np.random.default_rng(6)
    for cell in ("rnn_tanh", "lstm", "lstm_coupled_peephole", "gru", "gru_general"):
        row, (kind, options) = CELLS[cell], options_of(cell)
        pair, gates = kind == "lstm", len(row.gates)
        forward, backward, step = (
            partial(
                getattr(functional, f"{kind}_{verb}"),
                **(own_options(cell) if verb == "backward" else options),
            )
            for verb in ("forward", "backward", "step")
        )

        def random(*shape):
            return rng.normal(size=shape).astype(np.float32)

        weights = {
            "W": random(gates * H, I), "R": random(gates * H, H),
            "b_ih": random(gates * H), "b_hh": random(gates * H),
        }  # fmt: skip
        if row.peepholes:
            weights["P"] = random(len(row.peepholes) * H)
        states = {"h": random(1, B, H), "c": random(1, B, H)} if pair else {"h": random(1, B, H)}

        def together(a, pair=pair):
            return (a["h"], a["c"]) if pair else a["h"]

        def tuple_of(a, names=tuple(weights)):
            return tuple(a[name] for name in names)

        def flat(state, pair=pair):
            return list(state) if pair else [state]

        def run(
            a, forward=forward, backward=backward, together=together, flat=flat, tuple_of=tuple_of
        ):
            y, state, tape = forward(a["x"], together(a), tuple_of(a))
            grads = backward(tape, tuple_of(a), a["dy"], None)
            return [y, *flat(state), grads.x, *flat(grads.state), *grads.weights]

        weight_names = {k: (f"weights ({k})", "weights (R)", "x:") for k in weights}
        weight_names["W"] += ("weights (b_ih)", "weights:")
        weight_names["R"] += ("weights (b_ih)", "weights (W)", "state")
        state_names = {"h": ("state (h", "state:"), "c": ("state (c", "state:")}
        yield Target(
            f"functional.{cell}",
            run,
            {"x": random(T, B, I), "dy": random(T, B, H), **states, **weights},
            {
                "x": (1, 2), "dy": (0, 1, 2), "h": (0, 1, 2), "c": (0, 1, 2),
                "W": (0, 1), "R": (0, 1), "b_ih": (0,), "b_hh": (0,),
                **({"P": (0,)} if row.peepholes else {}),
            },
            {"x": ("x:", "state (h"), "dy": ("dy:",), **state_names, **weight_names},
            optional=("dy", "b_ih", "b_hh") if pair else ("dy", "b_ih", "b_hh", "h"),
            twice=tuple(weights),
        )  # fmt: skip

        def one(a, step=step, together=together, flat=flat, weights=weights, tuple_of=tuple_of):
            return flat(step(a["x"], together(a), tuple_of({**weights, **a})))

        yield Target(
            f"functional.{cell}_step",
            one,
            {"x": random(B, I), **{k: random(B, H) for k in states}},
            {"x": (0, 1), "h": (0, 1), "c": (0, 1)},
            {"x": ("x:", "state (h"), **state_names},
            optional=() if pair else ("h",),
        )


def cell_targets():
    rng = np.random.default_rng(8)
    for cls in (rnnfast.RNNCell, rnnfast.LSTMCell, rnnfast.GRUCell):
        cell, pair = cls(I, H, seed=3), cls is rnnfast.LSTMCell

        def random(*shape):
            return rng.normal(size=shape).astype(np.float32)

        def run(a, cell=cell, pair=pair):
            given = (a["h"], a["c"]) if pair else a["h"]
            wanted = (a["dh"], a["dc"]) if pair else a["dh"]
            state, tape = cell.forward_train(a["x"], given)
            cell.zero_grad()
            dx, d = cell.backward(tape, wanted)
            return [*(state if pair else (state,)), dx, *(d if pair else (d,)), cell.flat_grads]

        states = {k: random(B, H) for k in ("h", "dh", "c", "dc")[: 4 if pair else 2]}
        names = {k: (f"state ({k})", "state:", f"dstate ({k})", "dstate:") for k in states}
        yield Target(
            cls.__name__,
            lambda a, run=run: [array.copy() for array in run(a)],
            {"x": random(B, I), **states},
            {"x": (0, 1), **dict.fromkeys(states, (0, 1))},
            {"x": ("x:", "state (h"), **names},
            optional=() if pair else ("h", "dh"),
        )


def stream_targets():
    rng = np.random.default_rng(7)
    for cls in (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU):
        for batch in (1, B):
            stream = cls(I, H, 2, seed=1).stream(batch)
            pair = cls is rnnfast.LSTM

            def random(*shape):
                return rng.normal(size=shape).astype(np.float32)

            def step(a, stream=stream):
                stream.reset()
                return [stream.step(a["x_t"]), np.asarray(stream.state)]

            def process(a, stream=stream):
                stream.reset()
                return [stream.process(a["block"]), np.asarray(stream.state)]

            def set_state(a, stream=stream, pair=pair):
                stream.state = (a["h"], a["c"]) if pair else a["h"]
                return [np.asarray(stream.state)]

            label = f"{cls.__name__}.stream({batch})"
            yield Target(
                f"{label}.step",
                step,
                {"x_t": random(batch, I)},
                {"x_t": (0, 1)},
                {"x_t": ("x_t:",)},
            )
            yield Target(
                f"{label}.process", process, {"block": random(T, batch, I)},
                {"block": (1, 2)}, {"block": ("block:",)},
            )  # fmt: skip
            states = {k: random(2, batch, H) for k in ("h", "c")[: 1 + pair]}
            yield Target(
                f"{label}.state =", set_state, states, dict.fromkeys(states, (0, 1, 2)),
                {"h": ("state (h)", "state:"), "c": ("state (c)", "state:")},
            )  # fmt: skip


def closed_loop_targets():
    rng = np.random.default_rng(9)
    O, K, V = 3, 2, 6

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    for cls in (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU):
        module = cls(O + K, H, 2, seed=1)
        pair = cls is rnnfast.LSTM
        states = {k: random(2, B, H) for k in ("h", "c")[: 1 + pair]}
        head = {"weight": random(O, H), "bias": random(O)}

        def together(a, pair=pair):
            return (a["h"], a["c"]) if pair else a["h"]

        def flat(y, state, pair=pair):
            return [y, *(state if pair else (state,))]

        def forecast(a, module=module, together=together, flat=flat):
            own = a["weight"], a["bias"]
            values, state = module.generate(
                a["first"], T, own, state=together(a), covariates=a["covariates"]
            )
            return flat(values, state)

        def train(a, module=module, flat=flat):
            own, mask = (a["weight"], a["bias"]), np.eye(T, B) > 0
            values, _, tape = module.forecast_train(
                a["first"], T, own, covariates=a["covariates"], teacher=(a["inputs"], mask)
            )
            module.zero_grad()
            g = module.backward_forecast(tape, a["dvalues"])
            grads = [g.first, g.covariates, g.weight, g.bias, module.flat_grads.copy()]
            return [*flat(values, g.state), *grads]

        def tokens(a, module=module, together=together, flat=flat):
            own, more = (a["weight"], a["bias"]), dict(table=a["table"], seed=1, logits=True)
            try:
                chosen, state, logits = module.generate(
                    np.arange(B), T, own, "sample", together(a), **more
                )
            except ValueError as error:
                if "no token can be chosen" not in str(error):
                    raise
                return [np.full(1, np.nan)]  # a token is no NaN
            return [*flat(chosen, state), logits]

        def steps(a, module=module):
            own = a["weight"], a["bias"]
            stream = module.stream(B)
            values = stream.generate(a["first"], T, own, covariates=a["covariates"])
            return [values, np.asarray(stream.state)]

        first = {"first": random(B, O), "covariates": random(T, B, K)}
        names = {
            "first": ("first:", "state (h_0)", "covariates:", "teacher (inputs)"),
            "covariates": ("covariates:",), "inputs": ("teacher (inputs):",),
            "weight": ("head (weight)", "head (bias)"), "bias": ("head (bias)",),
            "table": ("table:",), "dvalues": ("dvalues:",),
            "h": ("state (h_0)", "state:"), "c": ("state (c_0)", "state:"),
        }  # fmt: skip

        def target(label, call, arrays, optional, names=names):
            fixed = {k: tuple(range(v.ndim)) for k, v in arrays.items()}
            own = {k: names[k] for k in arrays}
            return Target(label, call, arrays, fixed, own, optional)

        label, alone = cls.__name__, () if pair else ("h",)
        yield target(
            f"{label}.generate value", forecast, {**first, **head, **states}, ("bias", *alone)
        )
        yield target(
            f"{label}.forecast_train", train,
            {**first, **head, "inputs": random(T, B, O), "dvalues": random(T, B, O)},
            ("bias", "dvalues"),
        )  # fmt: skip
        large = {"weight": random(V, H), "bias": random(V), "table": random(V, O + K)}
        yield target(f"{label}.generate sample", tokens, {**large, **states}, ("bias", *alone))
        yield target(f"{label}.stream({B}).generate", steps, {**first, **head}, ("bias",))


def parameter_targets():
    module = rnnfast.LSTM(I, H, seed=1)
    state = module.state_dict()

    def load(a):
        module.load_state_dict(a)
        return [module.flat.copy()]

    yield Target(
        "load_state_dict", load, state, {k: tuple(range(v.ndim)) for k, v in state.items()},
        dict.fromkeys(state, ("state_dict",)),
    )  # fmt: skip

    def assign(a):
        module.flat = a["flat"]
        module.params["weight_hh_l0"] = a["weight_hh_l0"]
        return [module.flat.copy()]

    yield Target(
        "params[...] = and flat =", assign,
        {"weight_hh_l0": state["weight_hh_l0"], "flat": module.flat.copy()},
        {"weight_hh_l0": (0, 1), "flat": (0,)},
        {"weight_hh_l0": ("weight_hh_l0:",), "flat": ("flat:",)},
    )  # fmt: skip


# ---------------------------------------------------------------------------- all other arguments

F32 = np.float32
CLASSES = rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU


def lengths_cases():
    x = np.random.default_rng(8).normal(size=(T, B, I)).astype(F32)
    bad = {
        "T + 1": [T + 1, 1, 1],
        "-1": [1, -1, 1],
        "float": np.array([1.0, 2.0, 3.0]),
        "complex": np.array([1, 2, 3], complex),
        "floats in a list": [1.0, 2, 3],
        "NaN": [float("nan"), 1, 1],
        "None in a list": [None, 1, 1],
        "True in a list": [True, 1, 1],
        "bool": np.array([True, False, True]),
        "object": np.array([1, 2, 3], object),
        "text in a list": ["1", "2", "3"],
        "str": np.array(["1", "2", "3"]),
        "too few": [1, 2],
        "too many": [1, 2, 3, 4],
        "empty": [],
        "a number": 3,
        "rank 0": np.array(3),
        "rank 2": np.ones((1, B), int),
        "ragged": [[1], [1, 2], 3],
        "2**63": [2**63, 1, 1],
        "2**64 + 1": [2**64 + 1, 1, 1],
        "2**100": [2**100, 1, 1],
        "uint64 of 2**63": np.array([2**63, 1, 1], np.uint64),
        "uint64 of 2**64 - 1": np.array([2**64 - 1, 1, 1], np.uint64),
        "the least int64": np.array([-(2**63), 1, 1]),
        "a word": "abc",
        "dict": {0: 1},
        "generator": (n for n in (1, 2, 3)),
        "masked": np.ma.masked_array([1, 2, 3]),
        "__array__ raises": Raises(),
        "__array__ gives a list": Lies([1, 2, 3]),
        "huge by stride tricks": np.broadcast_to(np.int64(1), (2**40,)),
    }
    right = np.array([3, 0, T])
    good = {
        "list": [3, 0, T],
        "tuple": (3, 0, T),
        "numpy integers": list(right),
        "read-only": read_only(right),
        "every second": every_second(right, 0),
        "backwards": backwards(right, 0),
        "unaligned": unaligned(right),
        "memory-mapped": memory_mapped(right),
        "other byte order": right.astype(">i8"),
        "memoryview": memoryview(right),
        "__array__": Lies(right),
        **{np.dtype(code).name: right.astype(code) for code in "bBhHiIlLqQ"},
    }

    class Clears(int):
        """Its conversion to an integer empties the list that it is in."""

        def __int__(self):
            lengths.clear()
            return 3

        __index__ = __int__

    lengths = [Clears(3), 0, T]
    good["list that its entry clears"] = lengths
    bad["huge range"] = range(2**70)
    bad["range of too few"] = range(B - 1)

    def takes_a_range(module):
        want = bits(module(x, lengths=[1, 2, 3])[:1])
        assert bits(module(x, lengths=range(1, 4))[:1]) == want

    def works(method, value):
        got, want = method(x, lengths=value), method(x, lengths=right.copy())
        assert bits(got[:1]) == bits(want[:1])
        assert not got[0][:, 1].any()

    def changed_meanwhile(module):
        """Another thread rewrites the lengths all the time: an error or a result, no crash."""
        value, stop = np.array([3, 0, T]), threading.Event()

        def disturb():
            while not stop.is_set():
                value[0] = 2**62
                value[0] = 3

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for _ in range(300):
                try:
                    module(x, lengths=value)
                except ValueError as error:
                    assert "lengths" in str(error)
        finally:
            stop.set()
            thread.join()

    for cls in CLASSES:
        module = cls(I, H, bidirectional=True, seed=1)
        for way, method in (("call", module), ("forward_train", module.forward_train)):
            label = f"{cls.__name__} {way} / lengths"
            for name, value in bad.items():
                yield refusal(f"{label} / {name}", "lengths", method, x, lengths=value)
            for name, value in good.items():
                yield Case(f"{label} / {name}", partial(works, method, value))
        label = f"{cls.__name__} / lengths"
        yield Case(f"{label} / changed by another thread", partial(changed_meanwhile, module))
        yield refusal(f"{label} / unbatched x", "lengths", module, x[:, 0], lengths=[2])
        yield Case(f"{label} / range", partial(takes_a_range, module))


NUMBERS: dict[str, Any] = {
    "-1": -1,
    "0": 0,
    "2**31": 2**31,
    "2**63": 2**63,
    "2**64": 2**64,
    "2**200": 2**200,
    "-2**63": -(2**63),
    "NaN": float("nan"),
    "inf": float("inf"),
    "1.5": 1.5,
    "1.0": 1.0,
    "1 + 0j": 1 + 0j,
    "True": True,
    "False": False,
    "np.True_": np.True_,
    "'3'": "3",
    "''": "",
    "b'3'": b"3",
    "None": None,
    "[3]": [3],
    "(3,)": (3,),
    "{}": {},
    "array of 3": np.array([3]),
    "rank 0 array of 3": np.array(3),
    "float32 of 3": np.float32(3),
    "a type": int,
    "object()": object(),
}
# Which of NUMBERS an argument takes. 2**31 units, layers or threads fit no machine.
FLAG = "True", "False", "np.True_"
POSITIVE = "2**31", "2**63", "2**64", "1.5", "1.0", "float32 of 3", "None"
TAKES = {
    "input_size": (),
    "hidden_size": (),
    "num_layers": (),
    "proj_size": ("0",),
    "dropout": ("0", "1.0"),
    "drop_connect": ("0", "1.0"),
    "merge": (),
    "learn_initial": FLAG,
    "seed": ("0", "2**31", "None"),
    "bias": FLAG,
    "batch_first": FLAG,
    "bidirectional": FLAG,
    "reset_after": FLAG,
    "peephole": FLAG,
    "coupled": FLAG,
    "forget_bias": (
        "-1",
        "0",
        "2**31",
        "2**63",
        "2**64",
        "-2**63",
        "1.5",
        "1.0",
        "float32 of 3",
        "None",
    ),
    "clip": POSITIVE,
    "cell_clip": POSITIVE,
    "nonlinearity": (),
    "layer_norm": ("None",),
    "dtype": ("float32 of 3",),  # NumPy takes a scalar for its dtype
}
OWN = {"nonlinearity": "RNN", "reset_after": "GRU"}
OWN |= dict.fromkeys(("proj_size", "peephole", "coupled", "forget_bias", "cell_clip"), "LSTM")
SIZES = {
    "a product over 2**63": (2**40, 2**40, 1),
    "just over 2**63": (2**21, 2**21, 2**21),
    "2**62 each": (2**62, 2**62, 2**62),
    "over the memory": (2**30, 2**20, 1),
    "2**31 layers": (1, 1, 2**31),
    "2**40 layers": (1, 1, 2**40),
}
WORDS = {
    "dtype": (">f4", "f2", "i4", "float33", "None", np.longdouble, [("a", "f4")]),
    "dropout": (-0.1, 1.01, 2, 1e300),
    "drop_connect": (-0.1, 1.01, 2, 1e300),
    "merge": ("sum", "ave", ""),
    "layer_norm": ("gate", "cell", ""),
    "forget_bias": (1e39, "nan"),
}


def constructor_cases():
    def make(cls, argument, value):
        module = cls(**{"input_size": 2, "hidden_size": 3, argument: value})
        module(np.zeros((1, 1, 2), module.dtype))

    for cls in CLASSES:
        name = cls.__name__
        for argument, takes in TAKES.items():
            if OWN.get(argument, name) != name:
                continue
            for label, value in NUMBERS.items():
                call = partial(make, cls, argument, value)
                label = f"{name} / {argument} / {label}"
                if label.endswith(tuple(f"/ {taken}" for taken in takes)):
                    yield Case(label, call)
                else:
                    yield refusal(label, argument, call, errors=ALLOWED)
        for label, sizes in SIZES.items():
            label = f"{name} / sizes / {label}"
            yield refusal(label, "hidden_size", cls, *sizes, errors=ALLOWED)
        for argument, values in WORDS.items():
            for value in values if OWN.get(argument, name) == name else ():
                call = partial(make, cls, argument, value)
                yield refusal(f"{name} / {argument} / {value}", argument, call)
    for value in ("sigmoid", "Tanh"):
        call = partial(make, rnnfast.RNN, "nonlinearity", value)
        yield refusal(f"RNN / nonlinearity / {value}", "nonlinearity", call)


def setting_cases():
    module = rnnfast.LSTM(I, H)
    calls = {
        "set_num_threads": (rnnfast.set_num_threads, "num_threads", ()),
        "stream": (module.stream, "batch_size", ()),
        "show_config": (rnnfast.show_config, "mode", ()),
        "dropout_calls =": (
            partial(setattr, module, "dropout_calls"), "dropout_calls", ("0", "2**31"),
        ),
    }  # fmt: skip
    for label, (call, word, takes) in calls.items():
        for name, value in NUMBERS.items():
            if name in takes:
                yield Case(f"{label} / {name}", partial(call, value))
            else:
                yield refusal(f"{label} / {name}", word, call, value, errors=ALLOWED)
    weights = np.ones((4, 1), F32), np.ones((4, 1), F32), None, None
    for name in ("batch_first", "reverse", "train"):
        x, flag = np.ones((2, 1), F32), {name: 1}
        label = f"functional.lstm_forward / {name} / 1"
        yield refusal(label, name, functional.lstm_forward, x, None, weights, **flag)
    for cls in CLASSES:
        both = cls(I, H, bidirectional=True)
        yield refusal(f"{cls.__name__}.stream / bidirectional", "bidirectional", both.stream)

    def cannot_assign(name):
        """The kernels trust a module's sizes, so nobody may change them."""
        try:
            setattr(module, name, 1000)
        except AttributeError:
            return
        raise AssertionError(f"{name} was assigned")

    for name in (*TAKES, "params", "grads"):
        if name in dir(module):
            yield Case(f"module.{name} = 1000", partial(cannot_assign, name))


def state_cases():
    """Pairs where one array belongs, and the other way round; states of other models."""
    x = np.zeros((T, B, I), F32)
    h = np.zeros((1, B, H), F32)
    pair = {
        "a tensor for a pair": h,
        "c0 missing": (h,),
        "c0 None": (h, None),
        "h0 None": (None, h),
        "three": (h, h, h),
        "empty": (),
        "stacked": np.stack([h, h]),
        "dict": {"h": h},
        "text": "hc",
        "generator": (array for array in (h, h)),
        "a pair of pairs": ((h, h), (h, h)),
    }
    one = {"a pair": (h, h), "a tuple of one": (h,), "a list of one": [h], "dict": {"h": h}}
    other = {
        "of another batch": np.zeros((1, B + 1, H), F32),
        "of two layers": np.zeros((2, B, H), F32),
        "of another model": np.zeros((1, B, H + 1), F32),
        "without layers": np.zeros((B, H), F32),
    }

    def emptied(module, tape):
        """A pair may be a list, which the code of its first array may clear."""
        for run in (partial(module, x), partial(module.backward, tape, None)):
            want = run([h, h])
            both = [h, h]
            both[0] = Disturbs(h, both.clear)
            got = run(both)
            assert bits([got[0], *got[1]]) == bits([want[0], *want[1]])

    for cls in CLASSES:
        module = cls(I, H)
        _, _, tape = module.forward_train(x)
        name, lstm = cls.__name__, cls is rnnfast.LSTM
        if lstm:
            yield Case(f"{name} / state / emptied by its entry", partial(emptied, module, tape))
        for label, state in {
            **(pair if lstm else one),
            **{k: (v, v) if lstm else v for k, v in other.items()},
        }.items():
            yield refusal(f"{name} / state / {label}", "state", module, x, state)
            label = f"{name}.backward / dstate / {label}"
            yield refusal(label, "dstate", module.backward, tape, None, state)


def weights_cases():
    W, R, b = np.ones((4 * H, I), F32), np.ones((4 * H, H), F32), np.ones(4 * H, F32)
    x = np.ones((T, B, I), F32)
    good = W, R, b, b
    three = 3 * H
    giant = np.lib.stride_tricks.as_strided(b, (2**30, 2**28), (0, 0))
    bad = {
        "None": None,
        "an array": W,
        "text": "weights",
        "dict": {"W": W},
        "object()": object(),
        "empty": (),
        "three": (W, R, b),
        "five": (W, R, b, b, b),
        "three directions": (good, good, good),
        "a direction missing": (good, None),
        "directions that differ": (good, (W[:, :2], R, b, b)),
        "3H rows where 4H belong": (W[:three], R[:three], b[:three], b[:three]),
        "W of 3H rows": (W[:three], R, b, b),
        "R of 3H rows": (W, R[:three], b, b),
        "biases of 3H": (W, R, b[:three], b),
        "a bias of [1]": (W, R, b[:1], b),
        "H = 0": (W[:0], R[:0, :0], b[:0], b[:0]),
        "I = 0": (W[:, :0], R, b, b),
        "dtypes that differ": (W, R.astype(np.float64), b, b),
        "giant W": (np.broadcast_to(F32(1), (2**40, I)), R, b, b),
        "giant R": (W, giant, b, b),
        "a pack for backward": functional.pack("lstm", good, "backward"),
        "a pack of another cell": functional.pack("gru", (W[:three], R[:three], None, None)),
    }
    for name, weights in bad.items():
        for call, arguments in (
            (functional.lstm_forward, (x, None, weights)),
            (functional.lstm_step, (x[0], None, weights)),
            (functional.pack, ("lstm", weights)),
        ):
            if name == "a pack for backward" and call is functional.pack:
                continue
            label = f"functional.{call.__name__} / weights / {name}"
            yield refusal(label, "weights", call, *arguments, errors=ALLOWED)

    def empty_pack():
        """Nobody makes one by hand, and nobody should crash by it."""
        try:
            pack = type(functional.pack("lstm", good))()
            assert isinstance(pack.isa, str)
            assert pack.directions == 0
            functional.lstm_forward(x, None, pack)
        except (TypeError, ValueError):
            return
        raise AssertionError("was not refused")

    yield Case("functional.lstm_forward / weights / an empty pack", empty_pack)

    def cleared(make):
        """An entry empties the lists that it came in."""
        want = functional.lstm_forward(x, None, make(), train=False)
        for place in range(4):
            lists = make()
            inner = lists[0] if type(lists[0]) is list else lists
            clear = lambda lists=lists, inner=inner: (inner.clear(), lists.clear())  # noqa: E731
            inner[place] = Disturbs(inner[place], clear)
            got = functional.lstm_forward(x, None, lists, train=False)
            assert bits([got[0], *got[1]]) == bits([want[0], *want[1]])

    for label, make in {
        "list": lambda: list(good),
        "lists of two directions": lambda: [list(good), list(good)],
    }.items():
        label = f"functional.lstm_forward / weights / {label} that an entry clears"
        yield Case(label, partial(cleared, make))
    label = "functional.lstm_forward / reverse / two directions"
    pair = good, good
    yield refusal(label, "reverse", functional.lstm_forward, x, None, pair, reverse=True)
    _, _, tape = functional.lstm_forward(x, None, good)
    for need in ("y", "", None, 3, ["x", "bias"], [None], "weights"):
        label = f"functional.lstm_backward / need / {need!r}"
        arguments = tape, good, None, None
        yield refusal(label, "need", functional.lstm_backward, *arguments, need=need)
    for cell in (None, "LSTM", "lstm_", 3, ""):
        yield refusal(f"functional.pack / cell / {cell!r}", "cell", functional.pack, cell, good)
    for kind in (None, "both", 0, True):
        label = f"functional.pack / kind / {kind!r}"
        yield refusal(label, "kind", functional.pack, "lstm", good, kind)


def fewer_steps(array):
    return array[:, :-1] if array.ndim > 3 else array[:-1]


SPOILT_ARRAYS = {
    "None": lambda a: None,
    "a list": lambda a: [1],
    "a number": lambda a: 7,
    "text": lambda a: "x",
    "fewer steps": fewer_steps,
    "float64": lambda a: a.astype("f8"),
    "Fortran order": np.asfortranarray,
    "empty": lambda a: a[:0],
    "a rank less": lambda a: a[0],
    "flat": lambda a: a.reshape(-1),
}


class Word(str):
    """No plain str: what it is equal to could change between two looks."""


SPOILT_FIELDS = {
    "lengths": (
        np.full(B, 2**62), np.full(B, -1), [1, 2, 3], np.ones(B - 1, int), np.ones(B, np.int32),
    ),
    "cell": ("gru", 3, None, Word("lstm")),
    "functions": ((), "x", 3, Functions(("tanh", "tanh", "tanh"))),
    "reverse": (1, None),
    "batch_first": ("no", 1),
    "unbatched": (True, None),
}  # fmt: skip


def layer_of(tape):
    return tape if type(tape) is functional.Tape else tape.layers[0]


def put_field(field, change, tape):
    layer = layer_of(tape)
    setattr(layer, field, change(getattr(layer, field)))


def put_lengths(tape):
    layer_of(tape).lengths[:] = 10**7


def tiny_arrays(tape):
    """As if a smaller call had made the tape, each array for itself still right."""
    layer = layer_of(tape)
    layer.x = np.zeros((10**6, 1, I), F32)
    layer.h = layer.c = np.zeros((1, 1, 1, H), F32)
    layer.gates = np.zeros((1, 1, 1, 4, H), F32)


def drop_layers(tape):
    if type(tape) is not functional.Tape:
        tape.layers = ()


TAPE_ACTS = {
    "puts 10**7 in tape.lengths": put_lengths,
    "puts small arrays in the tape": tiny_arrays,
    "empties tape.layers": drop_layers,
    **{
        f"makes tape.{field} {label}": partial(put_field, field, change)
        for field in ("x", "h", "c", "gates")
        for label, change in SPOILT_ARRAYS.items()
    },
    **{
        f"reshapes tape.{field}: {label}": lambda tape, field=field, act=act: act(
            getattr(layer_of(tape), field)
        )
        for field in ("x", "h", "c", "gates", "lengths")
        for label, act in ACTS.items()
    },
}


def tape_cases():
    x = np.random.default_rng(1).normal(size=(T, B, I)).astype(F32)
    lstm = rnnfast.LSTM(I, H, seed=1)
    dy = np.ones((T, B, H), F32)

    def tape_of(module):
        array = np.ones((T, B, module.input_size), module.dtype)
        return module.forward_train(array)[2]

    good = tape_of(lstm)
    bad = {
        "of another cell": tape_of(rnnfast.GRU(I, H)),
        "of another H": tape_of(rnnfast.LSTM(I, H + 1)),
        "of another I": tape_of(rnnfast.LSTM(I + 1, H)),
        "of two layers": tape_of(rnnfast.LSTM(I, H, 2)),
        "of two directions": tape_of(rnnfast.LSTM(I, H, bidirectional=True)),
        "of float64": tape_of(rnnfast.LSTM(I, H, dtype=np.float64)),
        "None": None,
        "a dict": {},
        "an array": x,
        "a layer's": good.layers[0],
        "its layers": good.layers,
        "the type": type(good),
    }
    for label, tape in bad.items():
        yield refusal(f"LSTM.backward / tape / {label}", "tape", lstm.backward, tape, dy)
    for shape in ((T + 1, B, H), (T - 1, B, H), (T, B + 1, H), (T, B - 1, H), (B, T, H), (T, H)):
        label = f"LSTM.backward / dy of another call {shape}"
        yield refusal(label, "dy:", lstm.backward, good, np.ones(shape, F32))
    yield refusal("LSTM.backward / need_dx / 1", "need_dx", lstm.backward, good, dy, need_dx=1)
    yield refusal(
        "LSTM.backward / accumulate / 0", "accumulate", lstm.backward, good, dy, accumulate=0
    )

    def spoilt(field, change):
        """The tape's owner may have altered it."""
        tape = tape_of(lstm)
        setattr(tape.layers[0], field, change(getattr(tape.layers[0], field)))
        refused(partial(lstm.backward, tape, dy), "tape", "dy:")

    for field in ("gates", "h", "c", "x"):
        for label, change in SPOILT_ARRAYS.items():
            if (field, label) != ("x", "Fortran order"):  # where it does no harm
                run = partial(spoilt, field, change)
                yield Case(f"LSTM.backward / tape.{field} / {label}", run)
    for field, values in SPOILT_FIELDS.items():
        for value in values:
            run = partial(spoilt, field, lambda _, value=value: value)
            yield Case(f"LSTM.backward / tape.{field} / {value!r}", run)
    never_filled = tape_of(lstm)
    never_filled.layers = (functional.Tape(),)
    yield refusal("LSTM.backward / tape / never filled", "tape", lstm.backward, never_filled, dy)

    def twice():
        results = []
        for _ in range(2):
            lstm.zero_grad()
            dx, (dh, dc) = lstm.backward(good, dy)
            results.append(bits([dx, dh, dc, lstm.flat_grads]))
        assert results[0] == results[1]

    def after_the_weights_changed():
        module = rnnfast.LSTM(I, H, seed=2)
        tape = tape_of(module)
        module.flat *= 0.5
        dx, _ = module.backward(tape, dy)
        assert np.isfinite(dx).all()

    def disturbed(backward, train, argument, act):
        """The code of `dy` or `dstate` alters the tape, which was checked before or is after."""
        given = {"dy": dy, "dh": np.ones((1, B, H), F32), "dc": np.ones((1, B, H), F32)}

        def run(tape, given):
            return bits(backward(tape, given["dy"], [given["dh"], given["dc"]]))

        want = run(train(), given)
        tape = train()
        given[argument] = Disturbs(given[argument], partial(act, tape))
        try:
            got = run(tape, given)
        except (TypeError, ValueError) as error:
            assert "tape" in str(error), error
        else:
            assert got == want

    W, R = np.full((4 * H, I), 0.1, F32), np.full((4 * H, H), 0.1, F32)

    def module_backward(tape, dy, dstate):
        lstm.zero_grad()
        dx, dstate = lstm.backward(tape, dy, dstate)
        return [dx, *dstate, lstm.flat_grads.copy()]

    def functional_backward(tape, dy, dstate):
        grads = functional.lstm_backward(tape, (W, R, None, None), dy, dstate)
        return [grads.x, *grads.state, *grads.weights[:2]]

    trained = [T, 2, 0]
    ways = {
        "LSTM.backward": (
            module_backward, lambda: lstm.forward_train(x.copy(), lengths=trained)[2],
        ),
        "functional.lstm_backward": (
            functional_backward,
            lambda: functional.lstm_forward(
                x.copy(), None, (W, R, None, None), lengths=trained
            )[2],
        ),
    }  # fmt: skip
    for way, (backward, train) in ways.items():
        for argument in ("dy", "dh", "dc"):
            for label, act in TAPE_ACTS.items():
                label = f"{way} / {argument} / {label}"
                yield Case(label, partial(disturbed, backward, train, argument, act))

    def of_another_module():
        """Its sizes are the same, so that only its owner tells."""
        other = rnnfast.LSTM(I, H, seed=2)
        refused(partial(other.backward, good, dy), "tape")
        assert not other.flat_grads.any()

    yield Case("LSTM.backward / tape / of another such module", of_another_module)
    yield Case("LSTM.backward / twice", twice)
    yield Case("LSTM.backward / after the weights changed", after_the_weights_changed)

    weights = np.ones((4 * H, I), F32), np.ones((4 * H, H), F32), None, None
    gru = tuple(None if a is None else a[: 3 * H] for a in weights)
    for label, tape in {
        "None": None,
        "a stack's": good,
        "of a GRU": functional.gru_forward(x, None, gru)[2],
    }.items():
        label = f"functional.lstm_backward / tape / {label}"
        yield refusal(label, "tape", functional.lstm_backward, tape, weights, dy, None)


def window(numbers, start, shape):
    """An array within a buffer of numbers."""
    return numbers[start : start + int(np.prod(shape))].reshape(shape)


def output_cases():
    # As many units as inputs, so that x itself has an output's shape.
    x, block = np.ones((B, I), F32), np.ones((T, B, I), F32)
    shared = np.ones(2 * block.size, F32)
    half, half_block = x.size // 2, block.size // 2
    steps = {
        "x itself": (x, x),
        "a view of x": (x, x[:]),
        "x backwards": (x, x[::-1]),
        "half over x": (window(shared, 0, x.shape), window(shared, half, x.shape)),
        "another dtype": (x, np.ones((B, I))),
        "other byte order": (x, x.astype(">f4")),
        "read-only": (x, read_only(x)),
        "another shape": (x, np.ones((B, I + 1), F32)),
        "transposed": (x, np.ones((I, B), F32)),
        "flat": (x, np.ones(x.size, F32)),
        "a rank more": (x, np.ones((1, B, I), F32)),
        "a list": (x, x.tolist()),
        "text": (x, "out"),
        "True": (x, True),
        "bytearray": (x, bytearray(x.nbytes)),
        "memoryview": (x, memoryview(np.ones((B, I), F32))),
        "a subclass": (x, x.copy().view(Subclass)),
    }
    blocks = {
        "the block itself": (block, block),
        "backwards": (block, block[::-1]),
        "half over it": (
            window(shared, 0, block.shape), window(shared, half_block, block.shape),
        ),
        "another dtype": (block, block.astype("f8")),
        "read-only": (block, read_only(block)),
        "a step less": (block, np.ones((T - 1, B, I), F32)),
        "a list": (block, block.tolist()),
    }  # fmt: skip
    layouts = {
        "contiguous": np.copy,
        "Fortran order": np.asfortranarray,
        "unaligned": unaligned,
        "a window": inside,
    }

    def keeps_the_state(stream, method, given, out):
        before = bits(np.atleast_3d(stream.state))
        refused(partial(method, given, out), "out:")
        assert bits(np.atleast_3d(stream.state)) == before

    def works(stream, make):
        for method, given in ((stream.step, x), (stream.process, block)):
            out = make(np.full(given.shape, np.nan, F32))
            stream.reset()
            want = method(given)
            stream.reset()
            assert method(given, out) is out
            assert bits([want]) == bits([out])

    def reshaped_by_the_input(stream, method, given, act):
        stream.reset()
        want = bits([method(given)])
        stream.reset()
        out = np.full(given.shape, np.nan, F32)
        keep = out[...]
        try:
            method(Disturbs(given, partial(act, out)), out)
        except (TypeError, ValueError) as error:
            assert "out:" in str(error), error
        else:
            assert bits([keep]) == want

    for cls in CLASSES:
        stream = cls(I, I, seed=1).stream(B)
        name = f"{cls.__name__}.stream"
        for method, given in ((stream.step, x), (stream.process, block)):
            for label, act in ACTS.items():
                run = partial(reshaped_by_the_input, stream, method, given, act)
                yield Case(f"{name}.{method.__name__} / input / makes out {label}", run)
        for label, (given, out) in steps.items():
            run = partial(keeps_the_state, stream, stream.step, given, out)
            yield Case(f"{name}.step / out / {label}", run)
        for label, (given, out) in blocks.items():
            run = partial(keeps_the_state, stream, stream.process, given, out)
            yield Case(f"{name}.process / out / {label}", run)
        for label, make in layouts.items():
            yield Case(f"{name} / out / {label} works", partial(works, stream, make))


GIANTS = {  # T and B; with I = 4 NumPy itself has no larger ones
    "T 2**40": (2**40, 1),
    "B 2**40": (1, 2**40),
    "T 2**58": (2**58, 1),
    "B 2**58": (1, 2**58),
    "2**16 x 2**17": (2**16, 2**17),
    "2**20 x 2**20": (2**20, 2**20),
    "2**29 x 2**29": (2**29, 2**29),
    "2**30 x 2**10": (2**30, 2**10),
    "T 2**33": (2**33, 8),
    "over 2**32": (2**16 + 1, 2**17),
    "T 0, B 2**58": (0, 2**58),
}


def giant_cases():
    """Shapes whose products pass 2**31, 2**32, 2**63, by stride tricks: refused at once."""

    def giant(shape, strides):
        return np.lib.stride_tricks.as_strided(np.ones(I, F32), shape, strides)

    def refused_at_once(call, value):
        try:
            call(value)
        except (MemoryError, ValueError) as error:
            assert str(error), "an error without words"
            return
        raise AssertionError("was not refused")

    def many_empty_steps(module):
        y, _, tape = module.forward_train(np.zeros((2**40, 0, I), F32))
        assert y.shape == (2**40, 0, H)
        module.backward(tape, y)

    for cls in CLASSES:
        for both in (False, True):
            module = cls(I, H, 2, bidirectional=both)
            for label, (steps, batch) in GIANTS.items():
                for kind, strides in (("rows", (0, 0, 4)), ("no rows", (0, 0, 0))):
                    x = giant((steps, batch, I), strides)
                    name = f"{cls.__name__}{' bidirectional' * both} / x / {label}, {kind}"
                    yield Case(name, partial(refused_at_once, module, x))
                    run = partial(refused_at_once, module.forward_train, x)
                    yield Case(f"{name}, forward_train", run)
        name = cls.__name__
        process = cls(I, H).stream().process
        block = giant((2**40, 1, I), (0, 0, 4))
        yield Case(f"{name}.stream.process / giant", partial(refused_at_once, process, block))
        run = partial(many_empty_steps, cls(I, H))
        yield Case(f"{name} / x / 2**40 steps of no rows", run)


class Spread(dict):
    """A dict in all but its answers."""

    def items(self):
        return [("weight_ih_l0", 3)]

    def __contains__(self, key):
        return True


def entry_cases():
    module = rnnfast.LSTM(I, H, 2, seed=1)
    right = module.state_dict()
    bad = {
        "None": None,
        "a list": list(right.items()),
        "text": "state_dict",
        "a module": module,
        "empty": {},
        "one missing": {k: v for k, v in right.items() if k != "bias_hh_l1"},
        "one unused": {**right, "weight_hr_l0": np.ones(3, F32)},
        "a number as name": {**right, 3: np.ones(3, F32)},
        "prefixed": {f"lstm.{k}": v for k, v in right.items()},
        "a dict that lies": Spread(),
        "of a bidirectional one": rnnfast.LSTM(I, H, 2, bidirectional=True).state_dict(),
        "of a GRU": rnnfast.GRU(I, H, 2).state_dict(),
        "of another size": rnnfast.LSTM(I, H + 1, 2).state_dict(),
        "of fewer layers": rnnfast.LSTM(I, H).state_dict(),
        "of float64": rnnfast.LSTM(I, H, 2, dtype=np.float64).state_dict(),
        "without biases": rnnfast.LSTM(I, H, 2, bias=False).state_dict(),
    }

    def changes_nothing(entries):
        before = module.flat.tobytes()
        refused(partial(module.load_state_dict, entries), "state_dict")
        assert module.flat.tobytes() == before

    for label, entries in bad.items():
        yield Case(f"load_state_dict / {label}", partial(changes_nothing, entries))
    frozen = rnnfast.LSTM(I, H, 2)
    frozen.freeze()
    yield refusal("load_state_dict / frozen", "frozen", frozen.load_state_dict, right)
    parameters = {name: WantsGrad(array) for name, array in right.items()}
    run = partial(module.load_state_dict, parameters)
    yield Case("load_state_dict / parameters that want gradients work", run)


def table():
    """All cases, in an order that does not change."""
    targets = (
        *module_targets(), *functional_targets(), *stream_targets(), *closed_loop_targets(),
        *cell_targets(), *parameter_targets(),
    )  # fmt: skip
    for target in targets:
        yield from array_cases(target)
        yield from disturbed_cases(target)
    for make in (
        lengths_cases, constructor_cases, setting_cases, state_cases, weights_cases, tape_cases,
        output_cases, giant_cases, entry_cases,
    ):  # fmt: skip
        yield from make()


# ------------------------------------------------------------------------------------- the workers


def work(first):
    """Runs the cases from number `first` on; says which it starts and how each ends."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    faulthandler.enable()
    for number, case in enumerate(table()):
        if number < first:
            continue
        print(json.dumps([number, case.name]), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            case.run()
            outcome = ""
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(outcome), flush=True)
    print(json.dumps("the end"))


def test_every_case():
    """No case crashes, hangs, or ends in another way than a right result or a clear error."""
    failures, cases, first = [], 0, 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    while first is not None:
        worker = subprocess.run(
            [sys.executable, "-W", "ignore", Path(__file__), str(first)],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        lines = [json.loads(line) for line in worker.stdout.splitlines()]
        first = None
        if lines and lines[-1] == "the end":
            del lines[-1]
        elif not lines or len(lines) % 2 == 0:
            raise AssertionError(f"a worker failed outside of the cases:\n{worker.stderr[-4000:]}")
        else:
            number, _ = lines[-1]
            lines.append(f"ended the process ({worker.returncode}): {worker.stderr[-2000:]}")
            first = number + 1
        for (_, name), outcome in zip(lines[::2], lines[1::2], strict=True):
            cases += 1
            if outcome:
                failures.append(f"{name}\n    {outcome}")
    print(f"{cases} cases, {len(failures)} failed")
    assert not failures, f"{len(failures)} of {cases} cases:\n" + "\n".join(failures)
    assert cases >= 1000


if __name__ == "__main__":
    work(int(sys.argv[1]))

"""Every check of an argument and every error message.

Knows NumPy, shapes, what happens between steps, and words; nothing of kernels. Leaves allocation
and arithmetic to `functional`, `layer` and `recurrent`, which trust what has passed here. What
passes has memory layout as the kernels want it: a copy is made where an argument's own layout is of
no use to them, and only there.

What passes stays as it was judged: arrays are views of the library's own, lists are copied before
they are read. For a later argument's `__array__`, another thread or a signal handler may do
anything to the caller's own objects, whose shape and dtype can be assigned.

Messages have one form: the argument, what came, what is needed. The usual case (an exact, aligned
ndarray of the right dtype) is decided by a few attribute reads; words are made on failure only.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from .between import MOST_SETTINGS, Between, spread

ndarray = np.ndarray
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
INTP = np.dtype(np.intp)
BOOL = np.dtype(np.bool_)

MAX_THREADS = 256  # workers of the pool in csrc/pool.c
MAX_SEED = 2**63 - 1
MAX_ROWS = 2**31 - 1  # whose draws are numbered
MAX_STEPS = 2**32  # likewise
MOST_ONE_HOT = 2**24  # a token is kept as a float32
DLPACK_HOSTS = 1, 3  # device types of memory that the CPU reads: its own, and pinned
# Below this many numbers no product of sizes can overflow nor be worth comparing with the memory.
SURELY_SMALL = 2**24
# No array may have more bytes than a ptrdiff_t counts.
MAX_BYTES = sys.maxsize


# ------------------------------------------------------------------------------------------ words


def describe(value: Any) -> str:
    """What came, in a few words, without calling code of the value's own class.

    >>> describe(np.zeros((3, 4)))
    'float64 array of shape (3, 4)'
    >>> describe(2**80), describe("3"), describe(None)
    ('2**80 or more', "'3'", 'None')
    """
    kind = type(value)
    if isinstance(value, ndarray):
        return f"{dtype_name(value.dtype)} array of shape {value.shape}"
    if kind is int:
        if value.bit_length() <= 64:
            return str(value)
        size = value.bit_length() - 1
        return f"2**{size} or more" if value > 0 else f"-2**{size} or less"
    if value is None or kind is bool or kind is float:
        return str(value)
    if kind is str:
        return repr(value if len(value) <= 40 else value[:40] + "...")
    if kind is tuple or kind is list:
        return f"{kind.__name__} of {len(value)}"
    return kind.__name__


def dtype_name(dtype: np.dtype) -> str:
    """Name of a dtype, its byte order included where it is not this machine's.

    >>> dtype_name(np.dtype(np.float32))
    'float32'
    """
    return dtype.name if dtype.isnative else f"{dtype.name} of foreign byte order"


def fail(error: type[Exception], name: str, got: str, needs: str) -> NoReturn:
    """Raises `error` in the one form of all messages.

    >>> fail(ValueError, "dropout", "1.5", "a number in [0, 1]")
    Traceback (most recent call last):
    ValueError: dropout: got 1.5; needs a number in [0, 1]
    """
    raise error(f"{name}: got {got}; needs {needs}")


# ---------------------------------------------------------------------------------------- numbers


def integer(name: str, value: Any, low: int, high: int = sys.maxsize) -> int:
    """An int in low..high; bool, float and str are refused.

    >>> integer("hidden_size", np.int64(8), 1)
    8
    >>> integer("hidden_size", 0, 1)
    Traceback (most recent call last):
    ValueError: hidden_size: got 0; needs an integer of at least 1
    """
    bounds = f"of at least {low}" if high == sys.maxsize else f"in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        fail(TypeError, name, describe(value), f"an integer {bounds}")
    value = operator.index(value)
    if not low <= value <= high:
        fail(ValueError, name, describe(value), f"an integer {bounds}")
    return value


def _number(name: str, value: Any, needs: str) -> Any:
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real:
        fail(TypeError, name, describe(value), needs)
    return value


def fraction(name: str, value: Any) -> float:
    """A float in [0, 1].

    >>> fraction("dropout", 0)
    0.0
    """
    needs = "a number in [0, 1]"
    if not 0 <= _number(name, value, needs) <= 1:  # a NaN is not
        fail(ValueError, name, describe(value), needs)
    return float(value)


def finite(name: str, value: Any, dtype: np.dtype) -> float:
    """A float that is neither infinite nor NaN, in a dtype either.

    >>> finite("forget_bias", 1, FLOAT32)
    1.0
    """
    needs = f"a finite number within {dtype}"
    try:
        number = float(_number(name, value, needs))
    except OverflowError:
        number = math.inf
    if not abs(number) <= float(np.finfo(dtype).max):  # a NaN is not
        fail(ValueError, name, str(number), needs)
    return number


def limit(name: str, value: Any) -> float | None:
    """A number above zero, or None for no limit.

    >>> limit("clip", 3)
    3.0
    >>> limit("clip", 0)
    Traceback (most recent call last):
    ValueError: clip: got 0; needs a finite number above 0, within float32, or None
    """
    if value is None:
        return None
    needs = "a finite number above 0, within float32, or None"
    number = _number(name, value, needs)
    bounds = np.finfo(FLOAT32)
    if not float(bounds.tiny) <= number <= float(bounds.max):  # a NaN is not
        fail(ValueError, name, describe(value), needs)
    return float(number)


def activations(
    name: str, value: Any, letters: str, table: Mapping[str, tuple[float, ...]]
) -> tuple[Any, ...]:
    """One activation for each letter, each a name of `table`, or a tuple of it and its parameters.

    A name comes back alone if it has none, else with all of them, the table's where they were left
    out. Lists are taken for tuples, for files have no others.

    >>> activations("activations", ("tanh", ["elu", 2]), "fg", {"tanh": (), "elu": (1.0,)})
    ('tanh', ('elu', 2.0))
    """
    several = tuple, list
    count = f"{len(letters)} activation{'s' * (len(letters) > 1)} ({', '.join(letters)})"
    needs = f"a tuple of {count}, each a name or (name, alpha, ...)"
    if len(letters) == 1:
        needs += ": ('tanh',), (('elu', 0.5),)"
    if type(value) not in several:
        fail(TypeError, name, describe(value), needs)
    value = tuple(tuple(one) if type(one) in several else one for one in tuple(value))
    if len(value) != len(letters):
        fail(ValueError, name, describe(value), needs)
    return tuple(
        _activation(f"{name} ({letter})", one, table)
        for letter, one in zip(letters, value, strict=True)
    )


def _activation(name: str, value: Any, table: Mapping[str, tuple[float, ...]]) -> Any:
    if type(value) is not tuple or not value:
        value = (value,)
    word, *given = value
    if type(word) is not str or word not in table:
        needs = "one of " + ", ".join(map(repr, table))
        if type(word) is str and word.lower() in table:
            needs = f"{word.lower()!r}: names are in lower case"
        fail(ValueError if type(word) is str else TypeError, name, describe(word), needs)
    usual = table[word]
    if not usual and not given:
        return word
    if len(given) > len(usual):
        takes = ("no parameters", "alpha alone", "alpha and beta")[len(usual)]
        fail(ValueError, name, f"{word!r} with {len(given)} parameters", takes)
    parameters = [finite(name, one, FLOAT32) for one in given]
    return word, *parameters, *usual[len(given) :]


def dropout_acts(dropout: float, layers: int, stacklevel: int) -> None:
    """Warns where dropout has no two layers to act between; `stacklevel` as of the caller.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     dropout_acts(0.5, 2, 1)
    >>> caught
    []
    """
    if dropout and layers == 1:
        needs = "num_layers of at least 2: it acts between layers, so nothing will be dropped"
        text = f"dropout: got {dropout} with num_layers=1; needs {needs}"
        warnings.warn(text, UserWarning, stacklevel + 1)


def variational_acts(variational: bool, recurrent_dropout: float, stacklevel: int) -> None:
    """Warns where there are no masks that could be the same for all steps, as `dropout_acts`."""
    if variational and not recurrent_dropout:
        needs = (
            "recurrent_dropout above 0: it says how often that draws, so nothing will be dropped"
        )
        text = f"variational: got True with recurrent_dropout=0.0; needs {needs}"
        warnings.warn(text, UserWarning, stacklevel + 1)


def boolean(name: str, value: Any) -> bool:
    """True or False; no other object stands for them.

    >>> boolean("bias", 1)
    Traceback (most recent call last):
    TypeError: bias: got 1; needs True or False
    """
    if not isinstance(value, (bool, np.bool_)):
        fail(TypeError, name, describe(value), "True or False")
    return bool(value)


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of a few words.

    >>> choice("nonlinearity", "relu", ("tanh", "relu"))
    'relu'
    """
    right = type(value) is str
    if right and value in choices:
        return value
    needs = " or ".join(map(repr, choices))
    fail(ValueError if right else TypeError, name, describe(value), needs)


def choices(name: str, value: Any, choices: Iterable[str]) -> set[str]:
    """Some of a few words: one alone, or a tuple, list or set of them.

    >>> choices("need", "x", ("x", "state"))
    {'x'}
    """
    if type(value) is str:
        value = (value,)
    elif not isinstance(value, (tuple, list, set, frozenset)):
        fail(TypeError, name, describe(value), "some of " + ", ".join(map(repr, choices)))
    return {choice(name, word, choices) for word in value}


def path(name: str, value: Any) -> str:
    """A file's name.

    >>> path("path", b"model.npz")
    'model.npz'
    """
    if not isinstance(value, (str, bytes, os.PathLike)):
        fail(TypeError, name, describe(value), "a file's name, a str or a Path")
    text = os.fsdecode(value)
    if "\0" in text:
        fail(ValueError, name, describe(text), "a name without null characters")
    return text


def float_dtype(name: str, value: Any) -> np.dtype:
    """float32 or float64, in this machine's byte order, from any of NumPy's spellings.

    >>> float_dtype("dtype", "float32")
    dtype('float32')
    """
    needs = "np.float32 or np.float64"
    if value is None:  # NumPy would read float64
        fail(TypeError, name, "None", needs)
    try:
        dtype = np.dtype(value)
    except MemoryError:
        raise
    except Exception:
        fail(TypeError, name, describe(value), needs)
    if dtype == FLOAT32:
        return FLOAT32
    if dtype == FLOAT64:
        return FLOAT64
    fail(TypeError, name, dtype_name(dtype), needs)


# ------------------------------------------------------------------------------------------ sizes


def _machine_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return MAX_BYTES


MACHINE_BYTES = _machine_bytes()


def room(what: str, numbers: int, itemsize: int) -> None:
    """Refuses sizes before anything is allocated: the one place where their product is judged.

    `numbers` is a product of sizes in Python's integers, which do not overflow. Beyond what a
    ptrdiff_t counts it is a ValueError. Beyond the machine's memory it is a MemoryError here,
    because many systems grant such requests and end the process when the memory is used.

    >>> room("x", 2**62, 4)
    Traceback (most recent call last):
    ValueError: x: got sizes that multiply to 2**62 or more numbers; needs at most 2**61 - 1
    """
    if numbers <= SURELY_SMALL:
        return
    if numbers * itemsize > MAX_BYTES:
        count = f"2**{numbers.bit_length() - 1} or more"
        got = f"sizes that multiply to {count} numbers"
        power = (MAX_BYTES // itemsize).bit_length()
        fail(ValueError, what, got, f"at most 2**{power} - 1")
    if numbers * itemsize > MACHINE_BYTES:
        raise MemoryError(
            f"{what}: got sizes whose results take {numbers * itemsize} bytes; "
            f"needs at most the {MACHINE_BYTES} bytes of this machine's memory"
        )


# ----------------------------------------------------------------------------------------- arrays


def as_array(name: str, value: Any, dtype: np.dtype, *, detach: bool = False) -> ndarray:
    """A fresh ndarray of this dtype over the memory of `value`, whatever its rank and layout.

    Taken: arrays, and objects with the buffer protocol, `__array__` or DLPack on the CPU. Refused:
    sequences, numbers, masked arrays, any other dtype or byte order. With `detach` a tensor that
    wants gradients is taken without them (for parameters), instead of refused.
    """
    value = value[...] if type(value) is ndarray else raw_array(name, value, dtype, detach)
    if value.dtype is not dtype and value.dtype != dtype:
        needs = f"{dtype.name} numbers"
        if value.dtype.kind in "biuf":  # of others, objects may be no numbers, complex ones lose
            own = "bool" if dtype == BOOL else f"np.{dtype.name}"  # old NumPys have no np.bool
            needs = f"{dtype.name}: .astype({own}) converts"
        fail(TypeError, name, describe(value), needs)
    return value


def raw_array(
    name: str, value: Any, dtype: np.dtype, detach: bool, needs: str | None = None
) -> ndarray:
    """`as_array` before its look at the dtype, which is here for the message only, as `needs`."""
    if type(value) is ndarray:
        return value[...]
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(value, masked.MaskedArray):
        fail(TypeError, name, "a masked array", "an array without a mask: use .filled(...)")
    if isinstance(value, ndarray):
        return np.asarray(value)  # its memory, without its subclass
    kind = type(value)
    try:
        wants_grad = getattr(value, "requires_grad", False) is True and hasattr(value, "detach")
        if wants_grad and detach:
            value = value.detach()
        result = None if wants_grad and not detach else _convert(value)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise TypeError(
            f"{name}: got {kind.__name__}, which could not be read as an array "
            f"({type(error).__name__}: {error}); needs {needs or f'an array of {dtype.name}'}"
        ) from error
    if wants_grad and not detach:
        fail(TypeError, name, f"{kind.__name__} that requires grad", "its .detach()")
    if not isinstance(result, ndarray):
        makes = f"an array: np.asarray(..., dtype=np.{dtype.name}) makes one of numbers"
        fail(TypeError, name, describe(value), needs or makes)
    return raw_array(name, result, dtype, detach, needs)


def _convert(value: Any) -> Any:
    """By buffer, `__array__` or DLPack; None if the object has none of them.

    `__array__` is called here, and once: np.asarray would also trust a bare address
    (`__array_interface__`) and look into sequences.
    """
    try:
        return np.asarray(memoryview(value))
    except TypeError:  # no buffer
        pass
    if hasattr(type(value), "__array__"):
        return value.__array__()
    if hasattr(type(value), "__dlpack__"):
        device, _ = value.__dlpack_device__()
        if device not in DLPACK_HOSTS:
            raise BufferError(f"it is on DLPack device {int(device)}, not in this machine's memory")
        return np.from_dlpack(value)
    return None


def _shape(name: str, array: ndarray, shape: tuple[int, ...], letters: str) -> None:
    if array.shape != shape:
        fail(ValueError, name, f"shape {array.shape}", f"[{letters}] = {shape}")


def has_rows(array: ndarray) -> bool:
    """Whether the last axis is one run of aligned numbers, as the kernels read sequences."""
    flags = array.flags
    return flags.aligned and (flags.c_contiguous or array.strides[-1] == array.itemsize)


def _rows(array: ndarray) -> ndarray:
    """The array itself if it has rows, else a contiguous copy."""
    return array if has_rows(array) else _copy(array)


def contiguous(array: ndarray) -> ndarray:
    """The array itself if it is C-contiguous and aligned, else a copy that is."""
    flags = array.flags
    return array if flags.aligned and flags.c_contiguous else _copy(array)


def _copy(array: ndarray) -> ndarray:
    room("a contiguous copy of an argument", array.size, array.itemsize)
    return array.copy()


def exact(name: str, value: Any, dtype: np.dtype, shape: tuple[int, ...], letters: str) -> ndarray:
    """A C-contiguous, aligned array of exactly this shape; `letters` name its sizes.

    >>> exact("h_0", np.zeros((1, 2, 3)), FLOAT64, (1, 5, 3), "L*D, B, H")
    Traceback (most recent call last):
    ValueError: h_0: got shape (1, 2, 3); needs [L*D, B, H] = (1, 5, 3)
    """
    array = value[...] if type(value) is ndarray else as_array(name, value, dtype)
    if array.dtype is not dtype:
        array = as_array(name, array, dtype)
    if array.shape != shape:
        _shape(name, array, shape, letters)
    return contiguous(array)


def sequence(
    name: str, value: Any, dtype: np.dtype, features: int, batch_first: bool
) -> tuple[ndarray, bool]:
    """The input of a layer as [T, B, I], and whether it came unbatched, as [T, I].

    [B, T, I] with `batch_first`. The result may be a view with any strides but the last.

    >>> x, unbatched = sequence("x", np.zeros((5, 3)), FLOAT64, 3, False)
    >>> x.shape, unbatched
    ((5, 1, 3), True)
    """
    if type(value) is ndarray:
        array = value[...]
    elif type(value).__name__ == "PackedSequence":  # PyTorch's, which need not be installed
        needs = "the padded array, with its lengths as lengths="
        fail(TypeError, name, "a PackedSequence", needs)
    else:
        array = as_array(name, value, dtype)
    if array.dtype is not dtype:
        array = as_array(name, array, dtype)
    shape = array.shape
    rank = len(shape)
    if not 2 <= rank <= 3:
        letters = "B, T, I" if batch_first else "T, B, I"
        fail(ValueError, name, f"shape {shape}", f"3 dimensions, [{letters}], or 2, [T, I]")
    if shape[-1] != features:
        got = f"shape {shape}, whose last size is {shape[-1]}"
        fail(ValueError, name, got, f"a last size of {features} (the layer's input_size)")
    flags = array.flags
    if not ((flags.c_contiguous and flags.aligned) or has_rows(array)):
        array = _copy(array)
    if rank == 2:
        return array[:, None], True
    return (array.transpose(1, 0, 2) if batch_first else array), False


def step_input(name: str, value: Any, dtype: np.dtype, features: int) -> tuple[ndarray, bool]:
    """The input of a single step, [B, I] or [I], as [1, B, I], and whether it came unbatched.

    >>> x, unbatched = step_input("x", np.zeros(3), FLOAT64, 3)
    >>> x.shape, unbatched
    ((1, 1, 3), True)
    """
    array = as_array(name, value, dtype)
    if array.ndim not in (1, 2) or array.shape[-1] != features:
        fail(ValueError, name, f"shape {array.shape}", f"[B, I] or [I] with I = {features}")
    return contiguous(array).reshape(1, -1, features), array.ndim == 1


def gradient(
    name: str, value: Any, dtype: np.dtype, sizes: tuple[int, int, int],
    batch_first: bool, unbatched: bool, letter: str = "D*H",
) -> ndarray:  # fmt: skip
    """The gradient of an output, shaped as that output was, as [T, B, N] = `sizes`; `letter`: N as
    the caller knows it."""
    T, B, N = sizes
    array = as_array(name, value, dtype)
    if unbatched:
        _shape(name, array, (T, N), f"T, {letter}")
        return _rows(array)[:, None]
    if batch_first:
        _shape(name, array, (B, T, N), f"B, T, {letter}")
        return _rows(array).transpose(1, 0, 2)
    _shape(name, array, sizes, f"T, B, {letter}")
    return _rows(array)


# Names of the two states of a cell, h and c, as arguments; a cell without c has the first alone.
STATE = "state (h_0)", "state (c_0)"
DSTATE = "dstate (dh_n)", "dstate (dc_n)"
STEP_STATE = "state (h)", "state (c)"
STEP_DSTATE = "dstate (dh)", "dstate (dc)"


def states(
    names: tuple[str, str], value: Any, pair: bool, dtype: np.dtype,
    sizes: tuple[int, int, int], unbatched: bool, P: int = 0,
) -> tuple[ndarray, ndarray | None]:  # fmt: skip
    """The states of a layer or stack as (h, c), each [L*D, B, H] = `sizes`; c is None if no pair.

    They come as a pair of arrays, or as one. Unbatched: [L*D, H]. h has P numbers, if P is not 0.

    >>> h, c = states(STATE, np.zeros((1, 8)), False, FLOAT64, (1, 1, 8), True)
    >>> h.shape, c
    ((1, 1, 8), None)
    """
    if unbatched:
        h, c = _parts(names, value, pair, dtype, (sizes[0], sizes[2]), "L*D, H", P)
        return h[:, None], None if c is None else c[:, None]
    return _parts(names, value, pair, dtype, sizes, "L*D, B, H", P)


def step_states(
    names: tuple[str, str], value: Any, pair: bool, dtype: np.dtype, sizes: tuple[int, int],
    unbatched: bool, P: int = 0,
) -> tuple[ndarray, ndarray | None]:  # fmt: skip
    """`states` for a single step: each [B, H] = `sizes`, or [H]; returned as [1, B, H]."""
    shape, letters = (sizes[1:], "H") if unbatched else (sizes, "B, H")
    h, c = _parts(names, value, pair, dtype, shape, letters, P)
    B, H = sizes
    return h.reshape(1, B, P or H), None if c is None else c.reshape(1, B, H)


def _parts(
    names: tuple[str, str], value: Any, pair: bool, dtype: np.dtype, shape: tuple[int, ...],
    letters: str, P: int,
) -> tuple[ndarray, ndarray | None]:  # fmt: skip
    """(h, c) or (h, None), each checked to be of this shape, h with P instead of H."""
    kind = type(value)
    several = kind is tuple or kind is list
    if not pair:
        if several:
            fail(TypeError, names[0], describe(value), f"one array [{letters}]")
        return exact(names[0], value, dtype, shape, letters), None
    if several:
        value = tuple(value)
    h_letters = letters.replace("H", "proj_size") if P else letters
    if not several or len(value) != 2:
        each = f"each [{letters}]" if not P else f"[{h_letters}] and [{letters}]"
        needs = f"a pair of arrays, {names[0]} and {names[1]}, {each}"
        fail(ValueError if several else TypeError, names[0].split()[0], describe(value), needs)
    h, c = value
    h = exact(names[0], h, dtype, (*shape[:-1], P) if P else shape, h_letters)
    return h, exact(names[1], c, dtype, shape, letters)


def lengths(name: str, value: Any, T: int, B: int, unbatched: bool) -> ndarray:
    """Valid steps of each row: a copy as intp [B], each in 0..T.

    The copy is made before the values are looked at, so that nobody can change what was checked.

    >>> lengths("lengths", [3, 0], 3, 2, False)
    array([3, 0])
    """
    needs = f"{B} integer{'s' * (B != 1)} in 0..{T}"
    if unbatched:
        fail(ValueError, name, describe(value), "None, as x is unbatched: cut x instead")
    if type(value) in (list, tuple, range):
        value = tuple(value[: B + 1])
        if len(value) != B:
            count = str(len(value)) if len(value) < B else f"more than {B}"
            fail(ValueError, name, f"{count} values", needs)
        return np.array([integer(f"{name}[{b}]", n, 0, T) for b, n in enumerate(value)], INTP)
    value = raw_array(name, value, INTP, False, needs)
    if value.dtype.kind not in "iu":
        fail(TypeError, name, describe(value), needs)
    if value.shape != (B,):
        fail(ValueError, name, f"shape {value.shape}", f"shape ({B},): {needs}")
    own = value.copy()
    if B and not (own.min() >= 0 and own.max() <= T):
        b = int(np.flatnonzero((own < 0) | (own > T))[0])
        fail(ValueError, name, f"{own[b]} in row {b}", needs)
    return own.astype(INTP, copy=False)


def mask(
    name: str, value: Any, lengths: ndarray | None, T: int, B: int, batch_first: bool,
    unbatched: bool,
) -> tuple[ndarray | None, ndarray | None]:  # fmt: skip
    """Which steps there are of each row, bool in x's layout: how many of each row, intp [B], and
    their times, then those of the others, [B, T]; None and None where none is missing.

    >>> lengths, times = mask("mask", np.array([[True], [False], [True]]), None, 3, 1, False, False)
    >>> lengths.tolist(), times.tolist()
    ([2], [[0, 2, 1]])
    """
    shape = (T,) if unbatched else (B, T) if batch_first else (T, B)
    needs = f"bools of shape {shape}"
    if lengths is not None:
        fail(ValueError, name, "one beside lengths", "one of both: a mask says it all")
    if type(value) in (list, tuple):
        value = np.array(value)
    value = raw_array(name, value, np.dtype(bool), False, needs)
    if value.dtype.kind != "b":
        fail(TypeError, name, describe(value), needs)
    if value.shape != shape:
        fail(ValueError, name, f"shape {value.shape}", needs)
    rows = value.reshape(1, T) if unbatched else value if batch_first else value.T
    rows = np.array(rows, bool, order="C")  # a copy that nobody else can change
    if rows.all():
        return None, None
    times = np.argsort(~rows, axis=1, kind="stable").astype(INTP, copy=False)
    return rows.sum(axis=1, dtype=INTP), times


def alone(name: str, others: Mapping[str, Any]) -> None:
    """An argument that others, None where they are not given, cannot stand beside."""
    for other, value in others.items():
        if value is not None:
            needs = f"a padded x, with lengths instead of {name}: it lies by steps and rows of x"
            if other in ("lengths", "mask"):
                needs = f"one of both: {name} say how long the rows are"
            fail(ValueError, other, f"one beside {name}", needs)


def packed_rows(
    name: str, x: Any, offsets: Any, dtype: np.dtype, columns: int
) -> tuple[ndarray, ndarray, ndarray]:
    """Sequences that lie one after the other: x [all their steps, I], where each begins and, last,
    where the last one ends. Returns x, the beginnings and the lengths, intp [B].

    >>> x = np.zeros((5, 2), np.float32)
    >>> _, starts, lengths = packed_rows("x", x, [0, 3, 3, 5], FLOAT32, 2)
    >>> starts.tolist(), lengths.tolist()
    ([0, 3, 3], [3, 0, 2])
    """
    x = as_array(name, x, dtype)
    if x.ndim != 2 or x.shape[1] != columns:
        fail(ValueError, name, f"shape {x.shape}", f"[all steps, I] with I = {columns}")
    N = len(x)
    needs = f"B + 1 integers that ascend from 0 to {N}, the steps of x"
    if type(offsets) in (list, tuple):
        offsets = np.array(offsets, INTP if len(offsets) == 0 else None)
    own = raw_array("offsets", offsets, INTP, False, needs).copy()
    if own.dtype.kind not in "iu" or own.ndim != 1:
        fail(TypeError, "offsets", describe(own), needs)
    own = own.astype(INTP)
    lengths = np.diff(own)
    if len(own) == 0 or own[0] != 0 or own[-1] != N or (lengths < 0).any():
        needs += "; of lengths: np.cumsum([0, *lengths])"
        fail(ValueError, "offsets", _some(map(str, own.tolist())), needs)
    return _rows(x), own[:-1].copy(), lengths


def between(
    name: str, value: Any, T: int, B: int, columns: tuple[int, int], dtype: np.dtype
) -> Between:
    """What happens between steps, as kernels take it: fresh views [T, B, columns of h or c].

    Arrays may be of any shape that broadcasts to that. `columns` of c are 0 for a cell without one.
    """
    if type(value) is not Between:
        fail(TypeError, name, describe(value), "a functional.Between")

    def fit(what: str, array: Any, N: int, kind: np.dtype) -> ndarray:
        needs = f"an array of {kind.name} that broadcasts to {(T, B, N)}"
        array = raw_array(f"{name}.{what}", array, kind, False, needs)
        if array.dtype != kind:
            fail(TypeError, f"{name}.{what}", describe(array), needs)
        if not array.flags.aligned:
            array = array.copy()
        try:
            return spread(array, T, B, N)
        except ValueError:
            fail(ValueError, f"{name}.{what}", f"shape {array.shape}", needs)

    settings = []
    for letter, given, N in zip("hc", (value.h, value.c), columns, strict=True):
        if type(given) is not tuple or len(given) > MOST_SETTINGS:
            needs = f"a tuple of at most {MOST_SETTINGS} pairs (where, value)"
            fail(ValueError, f"{name}.{letter}", describe(given), needs)
        if given and not N:
            fail(ValueError, f"{name}.{letter}", "settings", "none: this cell has no c")
        own: list[tuple[ndarray, ndarray | None]] = []
        for i, setting in enumerate(given):
            if type(setting) is not tuple or len(setting) != 2:
                needs = "a pair (where, value), the value an array or None"
                fail(ValueError, f"{name}.{letter}[{i}]", describe(setting), needs)
            where = fit(f"{letter}[{i}] (where)", setting[0], N, np.dtype(bool))
            number = setting[1]
            if number is not None:
                number = fit(f"{letter}[{i}] (value)", number, N, dtype)
            own.append((where, number))
        settings.append(tuple(own))
    if type(value.hold) is not tuple or len(value.hold) != 2:
        fail(ValueError, f"{name}.hold", describe(value.hold), "a pair of numbers in [0, 1]")
    hold = tuple(fraction(f"{name}.hold", one) for one in value.hold)
    keep = value.keep
    if keep is not None:
        keep = fit("keep", keep, columns[0], np.dtype(bool))
    scale = finite(f"{name}.keep_scale", value.keep_scale, dtype)
    if keep is None and scale != 1:
        fail(ValueError, f"{name}.keep_scale", str(scale), "1 where keep is None")
    return Between(settings[0], settings[1], hold, keep, scale)


def broadcasts(name: str, value: Any, dtype: np.dtype, shape: tuple[int, ...]) -> ndarray:
    """An array of a dtype that broadcasts to a shape; a number is one of no axes.

    >>> broadcasts("values", 0.5, FLOAT32, (3, 2, 4))
    array(0.5, dtype=float32)
    """
    needs = f"{dtype.name} numbers that broadcast to {shape}"
    if isinstance(value, (int, float, np.generic, list, tuple)):
        value = np.array(value)
        if value.dtype.kind in ("b" if dtype.kind == "b" else "iuf"):
            value = value.astype(dtype)
    array = raw_array(name, value, dtype, False, needs)
    if array.dtype != dtype:
        fail(TypeError, name, describe(array), needs)
    try:
        np.broadcast_to(array, shape)
    except ValueError:
        fail(ValueError, name, f"shape {array.shape}", needs)
    return array.copy()  # what was judged; it is small, or was going to be read anyway


def indices(name: str, value: Any, n: int) -> ndarray:
    """Different integers in 0..n-1, as a copy.

    >>> indices("units", [2, 0], 3)
    array([2, 0])
    """
    needs = f"different integers in 0..{n - 1}"
    if type(value) in (list, tuple, range):
        value = np.array(value, INTP if len(value) == 0 else None)
    own = raw_array(name, value, INTP, False, needs).copy()
    if own.dtype.kind not in "iu" or own.ndim != 1:
        fail(TypeError, name, describe(own), needs)
    if len(own) and not (0 <= own.min() and own.max() < n and len(set(own.tolist())) == len(own)):
        fail(ValueError, name, str(own.tolist()), needs)
    return own.astype(INTP)


def pair_of_fractions(name: str, value: Any, pair: bool) -> tuple[float, float]:
    """Of a state h and, if there is one, c: a number in [0, 1] for each, or one for both."""
    if type(value) in (list, tuple):
        if not pair or len(value) != 2:
            also = ", or a pair of such, for h and c" if pair else ": the state is h alone"
            needs = "a number in [0, 1]" + also
            fail(ValueError, name, describe(value), needs)
        first, second = value
        return fraction(f"{name}[0]", first), fraction(f"{name}[1]", second)
    own = fraction(name, value)
    return own, own if pair else 0.0


def all_states(
    name: str, value: Any, layers: int, shape: Any, columns: tuple[int, int], dtype: np.dtype
) -> tuple[ndarray | None, ndarray | None]:
    """Gradients by all states of all layers: a pair, by h and by c, either may be None."""
    if not isinstance(value, tuple) or len(value) != 2:
        fail(TypeError, name, describe(value), "a pair (by h, by c), either may be None")
    own = []
    for letter, array, n in zip("hc", value, columns, strict=True):
        if array is not None:
            if not n:
                fail(ValueError, f"{name} (by {letter})", "an array", "None: this module has no c")
            needed = (layers, *shape(n))
            array = as_array(f"{name} (by {letter})", array, dtype)
            if array.shape != needed:
                fail(ValueError, f"{name} (by {letter})", f"shape {array.shape}", f"{needed}")
            array = _rows(array)
        own.append(array)
    return own[0], own[1]


def limits(
    clip: Any, clip_norm: Any, dtype: np.dtype, names: tuple[str, str] = ("clip", "clip_norm")
) -> tuple[float, float]:
    """What gradients are clipped to between steps, by value and by norm; 0 for no limit."""
    found = []
    for name, value in zip(names, (clip, clip_norm), strict=True):
        limit = 0.0 if value is None else finite(name, value, dtype)
        if value is not None and not dtype.type(limit) >= np.finfo(dtype).tiny:
            fail(ValueError, name, describe(value), f"a number above 0 in {dtype}, or None")
        found.append(limit)
    return found[0], found[1]


def output(
    name: str, value: Any, dtype: np.dtype, shape: tuple[int, ...], input_name: str, source: ndarray
) -> ndarray:
    """A view of an array to write to: writable, of this shape, apart from the input in memory."""
    if type(value) is not ndarray:
        fail(TypeError, name, describe(value), f"a NumPy array of {dtype.name}")
    value = value[...]
    if value.dtype != dtype:
        fail(TypeError, name, describe(value), dtype.name)
    if value.shape != shape:
        fail(ValueError, name, f"shape {value.shape}", f"shape {shape}")
    if not value.flags.writeable:
        fail(ValueError, name, "a read-only array", "a writable one")
    apart(input_name, source, name, value)
    return value


def apart(name: str, array: ndarray, out_name: str, out: ndarray) -> None:
    """Refuses an output that may overlap an input, judged by the bounds of their memory.

    >>> x = np.zeros(4)
    >>> apart("x", x[:2], "out", x[1:3])
    Traceback (most recent call last):
    ValueError: out: got memory that overlaps x; needs memory of its own
    """
    if np.may_share_memory(array, out):
        fail(ValueError, out_name, f"memory that overlaps {name}", "memory of its own")


# ---------------------------------------------------------------------------------------- weights


Weights = tuple[tuple[ndarray | None, ...], ...]


_LETTERS = "W", "R", "b_ih", "b_hh", "P", "g_ih", "g_hh", "g_c", "b_c", "W_hr"
_R_WORDS = "G*H, H", "G*H, P"
_WORDS = "G*H, I", "", "G*H", "G*H", "p*H", "G*H", "G*H", "H", "H", "P, H"
_BIASES = frozenset({2, 3, 8})  # may be None
_NO_UNIT_WEIGHTS = 0, 0, 0, 0, 0


@lru_cache  # small calls feel the words that they do not use
def _places(unit_weights: tuple[int, ...], projected: bool) -> tuple[int, ...]:
    """Which of _LETTERS there are."""
    own = (4 + i for i, blocks in enumerate(unit_weights) if blocks)
    return 0, 1, 2, 3, *own, *(9,) * projected


@lru_cache
def _labels(name: str, at: tuple[int, ...]) -> list[str]:
    return [f"{name} ({_LETTERS[place]})" for place in at]


def _weights_needed(at: tuple[int, ...], projected: bool) -> str:
    last = " or with W_hr" if projected else ""
    letters = ", ".join(_LETTERS[place] for place in at)
    return f"({letters}){last}, a pair of such tuples, or a pack"


def weights(
    name: str, value: Any, gates: int, unit_weights: tuple[int, ...] = _NO_UNIT_WEIGHTS,
    projected: bool = False,
) -> Weights:  # fmt: skip
    """Raw weights of a layer, by the names of `cells.PARAMETERS`, per direction, of one dtype.

    `value` is (W, R, b_ih, b_hh), W [G*H, I], R [G*H, H] and the biases [G*H] or None, or a pair of
    such tuples for two directions. Those that a cell has of `unit_weights`, as in its row, follow:
    of p peepholes [p*H], gains g_ih and g_hh [G*H], g_c and b_c [H], the last of which is a bias.
    Where h may be `projected`, W_hr [P, H] may be the last; R is [G*H, P] then. The first W decides
    between float32 and float64.

    >>> W, R, b = np.zeros((12, 2)), np.zeros((12, 3)), np.zeros(12)
    >>> [a is not None for a in weights("weights", (W, R, b, None), 4)[0][:4]]
    [True, True, True, False]
    """
    sequences = tuple, list
    if type(value) in sequences:
        value = tuple(tuple(one) if type(one) in sequences else one for one in tuple(value))
    at = _places(unit_weights, False)
    if type(value) is not tuple or not value:
        fail(TypeError, name, describe(value), _weights_needed(at, projected))
    directions = value if type(value[0]) is tuple else (value,)
    count = len(directions[0]) if type(directions[0]) is tuple else 0
    wrong = len(directions) > 2 or not len(at) <= count <= len(at) + projected
    if wrong or any(type(one) is not tuple or len(one) != count for one in directions):
        fail(ValueError, name, describe(value), _weights_needed(at, projected))
    if count > len(at):
        at = _places(unit_weights, True)
    labels = _labels(name, at)
    # As arrays, each converted once, and then by shape: an object's answer may change.
    W = raw_array(labels[0], directions[0][0], FLOAT32, False)
    dtype = FLOAT64 if W.dtype == FLOAT64 else FLOAT32
    arrays = [
        [
            None if array is None and at[p] in _BIASES else as_array(labels[p], array, dtype)
            for p, array in enumerate((W, *one[1:]) if d == 0 else one)
        ]
        for d, one in enumerate(directions)
    ]
    R = arrays[0][1]
    if W.ndim != 2 or W.shape[1] < 1:
        fail(ValueError, labels[0], f"shape {W.shape}", f"[{gates}*H, I], both at least 1")
    if at[-1] == 9:
        last = arrays[0][-1]
        if last.ndim != 2 or not 1 <= last.shape[0] < last.shape[1]:
            fail(ValueError, labels[-1], f"shape {last.shape}", "[P, H], P at least 1 and below H")
        P, H = last.shape
        if R.shape != (gates * H, P):
            fail(ValueError, labels[1], f"shape {R.shape}", f"[{gates}*H, P] as of W_hr [P, H]")
    elif R.ndim != 2 or R.shape[1] < 1 or R.shape[0] != gates * R.shape[1]:
        fail(ValueError, labels[1], f"shape {R.shape}", f"[{gates}*H, H], H at least 1")
    else:
        P = H = R.shape[1]
    rows = gates * H
    shapes = [(rows, W.shape[1]), (rows, P), (rows,), (rows,), *_NO_UNIT_WEIGHTS, (P, H)]
    for place in at[4:]:
        if place < 9:
            shapes[place] = (unit_weights[place - 4] * H,)
    found = []
    for one in arrays:
        own: list[ndarray | None] = [None] * len(shapes)
        for p, array in enumerate(one):
            if array is not None:
                words = _R_WORDS[P < H] if p == 1 else _WORDS[at[p]]
                own[at[p]] = exact(labels[p], array, dtype, shapes[at[p]], words)
        found.append(tuple(own))
    return tuple(found)


def parameter(
    name: str, value: Any, dtype: np.dtype, shape: tuple[int, ...], letters: str
) -> ndarray:
    """A C-contiguous, aligned array of this shape; of a tensor that wants gradients, its values.

    >>> parameter("table", np.zeros((2, 3)), FLOAT64, (2, 4), "V, I")
    Traceback (most recent call last):
    ValueError: table: got shape (2, 3); needs [V, I] = (2, 4)
    """
    array = as_array(name, value, dtype, detach=True)
    if array.shape != shape:
        _shape(name, array, shape, letters)
    return contiguous(array)


def pair(name: str, value: Any, parts: str) -> tuple[Any, Any]:
    """Two things in a tuple or list.

    >>> pair("head", [1, 2], "weight and bias")
    (1, 2)
    """
    if type(value) not in (tuple, list) or len(value) != 2:
        wrong = type(value) in (tuple, list)
        fail(ValueError if wrong else TypeError, name, describe(value), f"a pair: {parts}")
    first, second = tuple(value)
    return first, second


def head(name: str, value: Any, dtype: np.dtype, N: int) -> tuple[ndarray, ndarray | None]:
    """A linear map of h: weight [O, N] and bias [O], or None.

    >>> [part.shape for part in head("head", (np.zeros((2, 5)), np.zeros(2)), FLOAT64, 5)]
    [(2, 5), (2,)]
    """
    weight, bias = pair(name, value, f"weight [O, {N}] and bias [O], or None for none")
    weight = as_array(f"{name} (weight)", weight, dtype, detach=True)
    if weight.ndim != 2 or weight.shape[1] != N or not weight.shape[0]:
        needs = f"[O, N] = (O, {N}), O at least 1"
        fail(ValueError, f"{name} (weight)", f"shape {weight.shape}", needs)
    if bias is not None:
        bias = parameter(f"{name} (bias)", bias, dtype, weight.shape[:1], "O")
    return contiguous(weight), bias


def tokens(name: str, value: Any, V: int) -> tuple[ndarray, tuple[int, ...]]:
    """Tokens in 0..V-1 as a fresh intp [B], and the shape they came in: (B,), or () for an integer.

    >>> tokens("first", 3, 5)
    (array([3]), ())
    """
    needs = f"tokens, integers in 0..{V - 1}"
    if isinstance(value, (int, np.integer)):
        return np.array([integer(name, value, 0, V - 1)], INTP), ()
    if type(value) in (list, tuple, range):
        own = [integer(f"{name}[{b}]", one, 0, V - 1) for b, one in enumerate(tuple(value))]
        return np.array(own, INTP), (len(own),)
    value = raw_array(name, value, INTP, False, needs)
    if value.dtype.kind not in "iu":
        fail(TypeError, name, describe(value), needs)
    if value.ndim > 1:
        fail(ValueError, name, f"shape {value.shape}", f"{needs}, one for each row")
    own = value.copy()
    if own.size and not (own.min() >= 0 and own.max() < V):
        wrong = own[(own < 0) | (own >= V)]
        fail(ValueError, name, describe(int(wrong[0] if own.ndim else own)), needs)
    return own.astype(INTP, copy=False).reshape(-1), own.shape


def entries(
    name: str, given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype
) -> dict[str, ndarray]:
    """Named arrays that are exactly those of `shapes`: nothing missing, unused or mis-shaped.

    All that is wrong is told at once.

    >>> entries("state_dict", {"a": np.zeros(2), "b": np.zeros(3)}, {"a": (2,)}, FLOAT64)
    Traceback (most recent call last):
    ValueError: state_dict: got entries that do not fit: unused: b; needs exactly: a
    """
    if not isinstance(given, Mapping):
        fail(TypeError, name, describe(given), "a dict of names to arrays")
    given = dict(given)
    missing = [key for key in shapes if key not in given]
    unused = [key if type(key) is str else type(key).__name__ for key in given if key not in shapes]
    arrays = {
        key: as_array(f"{name}[{key!r}]", given[key], dtype, detach=True)
        for key in shapes
        if key in given
    }
    wrong = [
        f"{key} {array.shape} instead of {shapes[key]}"
        for key, array in arrays.items()
        if array.shape != shapes[key]
    ]
    lists = (("missing", missing), ("unused", unused), ("mis-shaped", wrong))
    if missing or unused or wrong:
        got = "; ".join(f"{word}: {_some(items)}" for word, items in lists if items)
        needs = f"exactly: {_some(shapes)}{_prefix(given, shapes) or _other_sizes(arrays, shapes)}"
        fail(ValueError, name, f"entries that do not fit: {got}", needs)
    return arrays


def named(name: str, given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Those of named entries that start with a prefix, without it.

    >>> named("state_dict", {"rnn.bias": 1, "head.bias": 2}, "rnn.")
    {'bias': 1}
    """
    if not isinstance(given, Mapping):
        fail(TypeError, name, describe(given), "a dict of names to arrays")
    given = dict(given)
    own = {
        key.removeprefix(prefix): value
        for key, value in given.items()
        if type(key) is str and key.startswith(prefix)
    }
    if not own:
        starts = sorted({key[: key.rfind(".") + 1] for key in given if type(key) is str})
        needs = f"names of the state_dict's start, one of {_some(map(repr, starts))}"
        inner = [key for key, value in given.items() if isinstance(value, Mapping)]
        if inner:  # a checkpoint, with the model's state_dict inside
            needs = f"a state_dict, not a dict of such: the one in entry {describe(inner[0])}?"
        fail(ValueError, "prefix", describe(prefix), needs)
    return own


def _prefix(given: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A hint at the one prefix, as of a larger model's part, with which all names are there."""
    names = {key for key in given if type(key) is str}
    first = next(iter(shapes))
    for prefix in sorted(key.removesuffix(first) for key in names if key.endswith(first)):
        if prefix and all(prefix + key in names for key in shapes):
            shown = describe(prefix)
            if all(key.startswith(prefix) for key in names):
                return f" (all names start with {shown}: prefix={shown})"
            return f" (names that start with {shown} are there: prefix={shown})"
    return ""


def layer_norm(
    value: Any, choices: tuple[str, ...], functions: Any = None, **others: Any
) -> str | None:
    """What a layer normalises: None, or one of a few words; alone, of the options beside it, and
    without a general cell's functions.

    >>> layer_norm("gates", ("gates",), peephole=True)
    Traceback (most recent call last):
    ValueError: layer_norm: got 'gates' with peephole=True; needs None, or peephole=False
    """
    if value is None:
        return None
    if type(value) is not str or value not in choices:
        error = ValueError if type(value) is str else TypeError
        needs = " or ".join(("None", *map(repr, choices)))
        fail(error, "layer_norm", describe(value), needs)
    if functions is not None:
        got = f"{value!r} beside other activations or a clip"
        fail(ValueError, "layer_norm", got, "None, or a plain cell's activations")
    for name, other in others.items():
        usual = name == "reset_after"
        if other is not usual:
            fail(
                ValueError,
                "layer_norm",
                f"{value!r} with {name}={other}",
                f"None, or {name}={usual}",
            )
    return value


CELL_OF_GATES = {1: ": of an RNN?", 3: ": of a GRU, or a coupled LSTM?", 4: ": of an LSTM?"}


def _other_sizes(arrays: Mapping[str, ndarray], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A hint at the other cell or sizes of which a module's parameters are."""
    known = arrays.keys() & shapes.keys()
    if not {"weight_ih_l0", "weight_hh_l0"} <= known or "weight_hr_l0" in shapes:
        return ""
    W, R = arrays["weight_ih_l0"].shape, arrays["weight_hh_l0"].shape
    rows, H = shapes["weight_hh_l0"]
    fits_one = len(W) == len(R) == 2 and R[1] > 0 and R[0] % R[1] == 0
    if not fits_one or any(array.shape[:1] != R[:1] for array in arrays.values()):
        return ""
    gates, needed = R[0] // R[1], rows // H
    if gates != needed:
        cell = CELL_OF_GATES.get(gates, "")
        return f" (these have {gates} gate{'s' * (gates != 1)} instead of {needed}{cell})"
    pairs = ("input_size", W[1], shapes["weight_ih_l0"][1]), ("hidden_size", R[1], H)
    others = [f"{name} {got}" for name, got, own in pairs if got != own]
    return f" (these fit {', '.join(others)})" if others else ""


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:12]) + (f" and {len(items) - 12} more" if len(items) > 12 else "")

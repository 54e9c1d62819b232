"""Weights that PyTorch or safetensors saved, as NumPy arrays, without PyTorch.

Knows the bytes of both formats; nothing of modules, which judge names and shapes themselves.
Reading trusts nothing. In `torch.save`'s files a pickle says what the bytes mean: a program, which
Python's own `pickle` would run. Here a machine of some 30 opcodes reads it that makes plain values
and notes of tensors, and nothing else: it imports nothing, and a name can only be looked up among
those written down here. Its time and memory grow with the file's size alone, whatever that says.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NoReturn

import numpy as np

from . import checks, storage

NEEDS = "a state_dict, written by torch.save(model.state_dict(), path) or safetensors"

# A pickle has some 100 bytes and 7 objects for each tensor. One from an enemy may cost us 20 bytes
# for each of its own, and 250 for each of these objects: containers, and what a call returns.
MAX_PICKLE = 16 * 2**20
MAX_OBJECTS = 2**20
MAX_DEPTH = 100  # of containers within each other
MAX_DIMS = 32  # of an array in NumPy before 2.0
SMALL = 2**20  # bytes of strided copies that any file may ask for, however short it is itself

# How a file of torch.save before PyTorch 1.6 starts: a pickle of this number alone.
OLD_FORMAT = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")

CUT_OFF = "it is cut off"

# NumPy's letters for PyTorch's types of numbers. NumPy has no bfloat16: it is widened.
CODES = {
    "torch.float64": "f8",
    "torch.float32": "f4",
    "torch.float16": "f2",
    "torch.bfloat16": "bf16",
    "torch.complex128": "c16",
    "torch.complex64": "c8",
    "torch.int64": "i8",
    "torch.int32": "i4",
    "torch.int16": "i2",
    "torch.int8": "i1",
    "torch.uint64": "u8",
    "torch.uint32": "u4",
    "torch.uint16": "u2",
    "torch.uint8": "u1",
    "torch.bool": "b1",
}
# The storages' classes, whose names PyTorch writes in place of the types of numbers that it had
# first; what came later lies in storages of bytes, UNTYPED.
STORAGES = {
    "torch.DoubleStorage": "torch.float64",
    "torch.FloatStorage": "torch.float32",
    "torch.HalfStorage": "torch.float16",
    "torch.BFloat16Storage": "torch.bfloat16",
    "torch.ComplexDoubleStorage": "torch.complex128",
    "torch.ComplexFloatStorage": "torch.complex64",
    "torch.LongStorage": "torch.int64",
    "torch.IntStorage": "torch.int32",
    "torch.ShortStorage": "torch.int16",
    "torch.CharStorage": "torch.int8",
    "torch.ByteStorage": "torch.uint8",
    "torch.BoolStorage": "torch.bool",
}
UNTYPED = "torch.storage.UntypedStorage"
MAKERS = {  # of what `_Machine.make` makes something
    "_codecs.encode",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.device",
}
KNOWN = MAKERS | CODES.keys() | STORAGES.keys() | {UNTYPED}
# What is refused, in words that say more than its name.
WORDS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data, on the meta device",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
}
SAFETENSORS = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": "bf16",
    "C64": "c8",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U64": "u8",
    "U32": "u4",
    "U16": "u2",
    "U8": "u1",
    "BOOL": "b1",
}


def load_torch(path: Any) -> dict[Any, Any]:
    r"""What `torch.save` or safetensors saved, with arrays for tensors; PyTorch is not needed.

    Of a `state_dict`, the result is a dict of names to arrays, as `load_state_dict` takes it; of a
    dict that holds one among other things, as checkpoints do, the same dict. Which format it is,
    the file's content tells and not its name. `torch.save` must be that of PyTorch 1.6 or later;
    for safetensors, the package of that name is needed: `pip install 'rnnfast[safetensors]'`.

    Arrays are read-only, C-contiguous, in this machine's byte order, and of the tensor's own type;
    bfloat16, which NumPy lacks, is widened to float32, exactly. Tensors that share memory may share
    it here. Around them there may be dicts (OrderedDict and Counter become plain ones), lists,
    tuples (`torch.Size` becomes one), sets, strings, bytes, numbers and None; a `torch.device` or
    `torch.dtype` becomes its name.

    Runs no code of the file's and reads at most its size. Raises OSError if it cannot be read,
    ImportError if the package safetensors is missing, and `DamagedFileError`, a ValueError that
    names path and damage, for all else: also for a whole pickled module, TorchScript, and sparse,
    quantised or 8-bit float tensors.

    >>> import tempfile, zipfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     with zipfile.ZipFile(file, "w") as archive:  # as torch.save({"epoch": 3}, file) would
    ...         archive.writestr("any/data.pkl", b"\x80\x02}X\x05\0\0\0epochK\x03s.")
    ...     load_torch(file.name)
    {'epoch': 3}
    """
    path = checks.path("path", path)
    data = storage.whole(path, NEEDS)
    if data.startswith(b"PK\3\4"):
        return _of_torch(path, data)
    if data[8:9] == b"{":  # after the length of a header in JSON
        return _of_safetensors(path, data)
    if data.startswith(OLD_FORMAT):
        needs = "one of PyTorch 1.6 or later: torch.load it there, and torch.save it again"
        storage.damaged(path, "a file in torch.save's old format, which is no zip file", needs)
    kind = "a bare pickle" if data.startswith(b"\x80") else "neither a zip nor a safetensors file"
    _damaged(path, kind)


def _damaged(path: str, damage: str) -> NoReturn:
    storage.damaged(path, damage, NEEDS)


# ------------------------------------------------------------------------------------- torch.save


def _of_torch(path: str, data: bytes) -> dict[Any, Any]:
    with storage.unzipped(path, data, "zip file of torch.save", NEEDS) as archive:
        top = _top(path, archive.namelist())
        members = storage.stored(path, archive, len(data), NEEDS)
    order = members.get(f"{top}/byteorder", b"little")
    if order not in (b"little", b"big"):
        _damaged(path, f"byte order {order!r}")
    pickled = members[f"{top}/data.pkl"]
    if len(pickled) > MAX_PICKLE:
        damage = f"a data.pkl of {len(pickled)} bytes, where {MAX_PICKLE} are the most"
        _damaged(path, damage)
    machine = _Machine(pickled)
    try:
        value = machine.run()
    except (LookupError, ValueError) as error:
        about = "" if machine.unknown is None else f"; it refers to {machine.unknown}"
        _damaged(path, f"no readable data.pkl ({error}{about})")
    folder = f"{top}/data/"
    storages = {
        name.removeprefix(folder): member
        for name, member in members.items()
        if name.startswith(folder)
    }
    result = _Arrays(path, storages, order == b"little", len(data)).plain(value, ())
    if machine.unknown is not None:  # in a place whose content means nothing to us
        _damaged(path, f"a reference to {machine.unknown}")
    if type(result) is not dict:
        _damaged(path, f"{checks.describe(result)} where a dict belongs")
    return result


def _top(path: str, names: list[str]) -> str:
    """The folder in which all lies, named by torch.save after the file that it wrote."""
    if any(name.endswith(".npy") for name in names):
        _damaged(path, "an .npz file, which rnnfast.load or numpy.load reads")
    tops = [top for top, slash, name in (n.partition("/") for n in names) if name == "data.pkl"]
    if len(tops) != 1:
        _damaged(path, f"a zip file with {len(tops)} entries data.pkl")
    script = f"{tops[0]}/code/", f"{tops[0]}/constants.pkl"
    if any(name.startswith(script) for name in names):
        _damaged(path, "TorchScript, as of torch.jit.save")
    return tops[0]


class _Global:
    """A name that the pickle refers to; nothing is ever looked up by it but KNOWN."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Object:
    """Where an object of a class or function that is not KNOWN would stand: its name alone."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Storage:
    """A storage by the name of its class, its key among the file's members, its count of items."""

    __slots__ = ("count", "key", "kind")

    def __init__(self, kind: str, key: str, count: int):
        self.kind, self.key, self.count = kind, key, count


class _Tensor:
    """A tensor as it was written; nothing is checked yet but that offset and tuples are such."""

    __slots__ = ("dtype", "lazy", "offset", "size", "source", "stride")

    def __init__(
        self, source: _Storage, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...],
        dtype: str, metadata: Any,
    ):  # fmt: skip
        self.source, self.offset, self.size, self.stride = source, offset, size, stride
        self.dtype, self.lazy = dtype, bool(metadata)  # conjugated or negated when it is read


class _Machine:
    """Runs a pickle of protocol 2, which torch.save writes, to plain values and the notes above.

    Raises LookupError (an empty stack, an unknown memo) or ValueError.
    """

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open mark
        self.memo: dict[int, Any] = {}
        self.texts: dict[str, str] = {}
        self.spare = len(data)
        self.objects = 0
        self.unknown: str | None = None  # the first name that is not KNOWN

    def run(self) -> Any:
        if self.take(1) != b"\x80":
            raise ValueError("it has no protocol")
        if (protocol := self.number(1)) != 2:
            raise ValueError(f"pickle protocol {protocol}, where torch.save's own choice is 2")
        while (code := self.take(1)) != b".":
            action = ACTIONS.get(code)
            if action is None:
                raise ValueError(f"opcode {code!r} at byte {self.at - 1}")
            action(self)
        result = self.stack.pop()
        if self.stack or self.below or self.at != len(self.data):
            raise ValueError("more than one value")
        return result

    # --- bytes

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(CUT_OFF)
        return self.data[start : self.at]

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise ValueError(CUT_OFF)
        line, self.at = self.data[self.at : end], end + 1
        return line.decode()

    # --- opcodes

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def add(self, value: Any) -> None:
        """Pushes what is counted, as it takes more memory than the bytes that ask for it."""
        self.objects += 1
        if self.objects > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS} containers and tensors")
        self.stack.append(value)

    def integer(self, count: int) -> None:
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def text(self) -> None:
        text = self.take(self.number(4)).decode("utf-8", "surrogatepass")  # as pickle writes it
        # Equal texts become one object: comparing two long ones, as keys, would take its time.
        self.push(self.texts.setdefault(text, text))

    def mark(self) -> None:
        if len(self.below) == 10 * MAX_DEPTH:
            raise ValueError("marks nested too deep")
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """The values since the last mark, which is taken away with them."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def pack(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.add(values)

    def put(self, count: int) -> None:
        self.memo[self.number(count)] = self.stack[-1]

    def get(self, count: int) -> None:
        number = self.number(count)
        if number not in self.memo:
            raise ValueError(f"a reference to value {number}, which is not there")
        self.push(self.memo[number])

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target += values
        elif type(target) is not _Object:
            raise ValueError(f"values to append to {checks.describe(target)}")

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict and len(values) % 2 == 0:
            target.update(zip(map(_key, values[::2]), values[1::2], strict=True))
        elif type(target) is not _Object:
            raise ValueError(f"{len(values)} keys and values to set in {checks.describe(target)}")

    def name(self) -> None:
        module, name = self.line(), self.line()
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if not full.replace(".", "_").isidentifier():
            raise ValueError(f"{checks.describe(full)} for a name")
        if full not in KNOWN and self.unknown is None:
            self.unknown = full
        self.push(_Global(full))

    def persistent(self) -> None:
        match self.stack.pop():
            case ("storage", _Global() as kind, str() as key, str(), int() as count):
                self.add(_Storage(kind.name, key, count))
            case _:
                raise ValueError("an unusual storage")

    def build(self) -> None:
        """Takes a state and sets nothing: an OrderedDict's would be attributes, as _metadata."""
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, _Object):
            raise ValueError(f"a state for {checks.describe(self.stack[-1])}")

    def call(self) -> None:
        """A call by REDUCE or NEWOBJ: of our own makers, or of nothing."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or type(function) not in (_Global, _Object):
            raise ValueError(f"a call of {checks.describe(function)}")
        if type(function) is _Global and function.name in KNOWN:
            self.add(self.make(function.name, arguments))
        else:
            self.add(_Object(function.name))

    def make(self, name: str, arguments: tuple[Any, ...]) -> Any:
        match name.removeprefix("torch._utils."), arguments:
            case "_rebuild_tensor_v2", (
                _Storage() as source, int() as offset, tuple() as size, tuple() as stride,
                bool(), dict(), *metadata,
            ) if len(metadata) <= 1:  # fmt: skip
                dtype = STORAGES.get(source.kind, source.kind)
                return _Tensor(source, offset, size, stride, dtype, metadata and metadata[0])
            case "_rebuild_tensor_v3", (
                _Storage() as source, int() as offset, tuple() as size, tuple() as stride,
                bool(), dict(), _Global() as dtype, *metadata,
            ) if len(metadata) <= 1:  # fmt: skip
                return _Tensor(source, offset, size, stride, dtype.name, metadata and metadata[0])
            case "_rebuild_parameter", (_Tensor() | _Object() as data, bool(), dict()):
                return data
            case "_rebuild_parameter_with_state", (
                _Tensor() | _Object() as data, bool(), dict(), _,
            ):  # fmt: skip
                return data
            case "collections.OrderedDict", ():
                return {}
            case "collections.Counter", (dict() as counts,):
                return counts
            case "torch.Size", (tuple() as size,):
                return size
            case "torch.device", (str() as kind,):
                return kind
            case "torch.device", (str() as kind, int() as index):
                return f"{self.paid(kind)}:{index}"
            case "builtins.complex", (float() as real, float() as imaginary):
                return complex(real, imaginary)
            case "builtins.set" | "builtins.frozenset", (list() as values,):
                return set(map(_key, self.paid(values)))
            case "_codecs.encode", (str() as text, "latin1"):  # bytes, in protocol 2
                return self.paid(text).encode("latin1")
        raise ValueError(f"unusual arguments of {name}")

    def paid(self, value: Any) -> Any:
        """A value to be copied; copies of one and the same may not add up to more than the file."""
        self.spare -= len(value)
        if self.spare < 0:
            raise ValueError("copies that are larger than the file")
        return value


def _key(key: Any) -> Any:
    """A key of a dict or set: of a kind whose hash takes no time, and does not repeat at will."""
    if type(key) is int and key.bit_length() <= 64:
        return key
    if type(key) is str or type(key) is float or type(key) is bool or key is None:
        return key
    raise ValueError(f"{checks.describe(key)} for a key")


ACTIONS: dict[bytes, Any] = {
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),  # BININT1, and so on
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.integer(4),
    b"\x8a": lambda m: m.integer(m.number(1)),  # LONG1, of up to 255 bytes
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": _Machine.text,
    b"]": lambda m: m.add([]),
    b"}": lambda m: m.add({}),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.pack(1),
    b"\x86": lambda m: m.pack(2),
    b"\x87": lambda m: m.pack(3),
    b"(": _Machine.mark,
    b"t": lambda m: m.add(tuple(m.marked())),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.marked()),
    b"s": lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    b"u": lambda m: m.set_items(m.marked()),
    b"q": lambda m: m.put(1),
    b"r": lambda m: m.put(4),
    b"h": lambda m: m.get(1),
    b"j": lambda m: m.get(4),
    b"c": _Machine.name,
    b"Q": _Machine.persistent,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
}


class _Arrays:
    """Makes arrays of a file's tensors, each held against the bytes that there are."""

    def __init__(self, path: str, storages: dict[str, bytes], little: bool, size: int):
        self.path, self.storages, self.order = path, storages, "<" if little else ">"
        self.spare = max(size, SMALL)  # bytes that copies of strided tensors may have, together
        self.flat: dict[tuple[str, str], np.ndarray] = {}
        self.made: dict[int, Any] = {}  # by the id of what it was made of; None: in the making

    def plain(self, value: Any, entry: tuple[Any, ...]) -> Any:
        """What the machine made, with arrays for tensors; each once, however often it stands."""
        kind = type(value)
        if kind not in (dict, list, tuple, _Tensor):
            return self.leaf(value, entry)
        if id(value) in self.made:
            if self.made[id(value)] is None:
                self.refuse(entry, "a container within itself")
            return self.made[id(value)]
        if len(entry) > MAX_DEPTH:
            self.refuse((), f"containers nested more than {MAX_DEPTH} deep")
        self.made[id(value)] = None
        if kind is dict:
            made = {key: self.plain(item, (*entry, key)) for key, item in value.items()}
        elif kind is _Tensor:
            made = self.array(value, entry)
        else:
            made = kind([self.plain(item, (*entry, i)) for i, item in enumerate(value)])
        self.made[id(value)] = made
        return made

    def leaf(self, value: Any, entry: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind is _Global and value.name in CODES:
            return value.name
        if kind is _Global:
            self.refuse(entry, f"a reference to {value.name}")
        if kind is _Storage:
            self.refuse(entry, "a bare storage")
        if kind is _Object:
            whole = "" if entry else "a whole model, or "
            self.refuse(entry, WORDS.get(value.name, f"{whole}an object of {value.name}"))
        return value

    def refuse(self, entry: tuple[Any, ...], damage: str) -> NoReturn:
        place = "".join(f"[{checks.describe(key)}]" for key in entry[:9])
        _damaged(self.path, f"entry {place}: {damage}" if entry else damage)

    def array(self, tensor: _Tensor, entry: tuple[Any, ...]) -> np.ndarray:
        if tensor.dtype not in CODES:
            self.refuse(entry, f"a tensor of {tensor.dtype}")
        if tensor.lazy:
            needed = ".resolve_conj().resolve_neg() it before saving"
            self.refuse(entry, f"a tensor that is conjugated or negated only when read ({needed})")
        flat = self.numbers(tensor.source, CODES[tensor.dtype], entry)
        size, stride, offset = tensor.size, tensor.stride, tensor.offset
        whole = all(type(n) is int for n in (offset, *size, *stride))
        if not whole or len(size) != len(stride) or len(size) > MAX_DIMS:
            # Not printed: it may be a structure that has no end for all purposes.
            self.refuse(entry, "a tensor whose offset, size and stride are no such numbers")
        place = f"a tensor of size {size} and stride {stride} at {offset}"
        # Python's integers: nothing overflows before it is compared.
        if min(offset, *size, *stride, 0) < 0 or not _possible(size):
            self.refuse(entry, place)
        if 0 in size:
            return _frozen(np.zeros(size, flat.dtype))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= flat.size:
            self.refuse(entry, f"{place}, past the end of a storage of {flat.size}")
        item = flat.dtype.itemsize
        # The step along a length of 1 is of no use, and may be anything.
        steps = [step * item if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
        array = np.ndarray(size, flat.dtype, flat, offset * item, steps)
        if not array.flags.c_contiguous:
            self.spare -= array.nbytes
            if self.spare < 0:
                copies = f"strided tensors of more bytes than the file (size {size} here)"
                self.refuse(entry, f"{copies}; .clone() them before saving")
            array = np.array(array, order="C")
        return _frozen(array)

    def numbers(self, source: _Storage, code: str, entry: tuple[Any, ...]) -> np.ndarray:
        """All numbers of a storage, one after the other."""
        data = self.storages.get(source.key)
        if data is None:
            self.refuse(entry, f"no storage {checks.describe(source.key)}")
        item = _item(CODES[STORAGES[source.kind]]) if source.kind in STORAGES else 1
        if source.count != len(data) // item:
            count = checks.describe(source.count)
            self.refuse(entry, f"a storage of {len(data)} bytes for {count} numbers of {item}")
        if (source.key, code) not in self.flat:
            self.flat[source.key, code] = _numbers(data, code, self.order)
        return self.flat[source.key, code]


# ----------------------------------------------------------------------------------- safetensors


def _of_safetensors(path: str, data: bytes) -> dict[Any, Any]:
    try:
        from safetensors import deserialize
    except ImportError:
        needs = "the package safetensors: pip install 'rnnfast[safetensors]'"
        raise ImportError(f"{path}: got a safetensors file; needs {needs}") from None
    try:
        entries = deserialize(data)
    except MemoryError:
        raise
    except Exception as error:  # of a class of the package's own
        _damaged(path, f"no readable safetensors file ({error})")
    arrays = {}
    for name, entry in entries:
        kind, size = entry["dtype"], tuple(entry["shape"])
        place = f"entry [{checks.describe(name)}]"
        if kind not in SAFETENSORS:
            _damaged(path, f"{place}: a tensor of {kind}")
        flat = _numbers(entry["data"], SAFETENSORS[kind], "<")
        if not _possible(size) or math.prod(size) != flat.size:
            _damaged(path, f"{place}: size {size} for {flat.size} numbers")
        arrays[name] = _frozen(flat.reshape(size))
    return arrays


# ------------------------------------------------------------------------------------------- both


def _item(code: str) -> int:
    """Bytes of one number as it is stored."""
    return 2 if code == "bf16" else np.dtype(code).itemsize


def _numbers(data: bytes, code: str, order: str) -> np.ndarray:
    """Bytes as numbers in this machine's byte order; those at the end that make no number go."""
    count = len(data) // _item(code)
    if code == "bf16":  # the upper half of a float32
        return (np.frombuffer(data, f"{order}u2", count).astype(np.uint32) << 16).view(np.float32)
    if code == "b1":
        return np.frombuffer(data, np.uint8, count) != 0
    flat = np.frombuffer(data, order + code, count)
    return flat.astype(flat.dtype.newbyteorder("="), copy=False)


def _possible(size: tuple[Any, ...]) -> bool:
    """Whether NumPy can have an array of this shape; a 0 in it does not make up for the rest."""
    return len(size) <= MAX_DIMS and math.prod(n or 1 for n in size) <= checks.MAX_BYTES // 16


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array

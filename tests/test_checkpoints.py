"""Files of torch.save and safetensors: the same numbers without PyTorch, and no trust in the file.

Knows the public API and both formats, to write files by hand: right, damaged and malicious ones.
Only the tests of files that PyTorch or safetensors wrote need these packages.
"""

import collections
import itertools
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import rnnfast

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve_numpy.py"


# --------------------------------------------------------------------- files written by hand


class Name:
    """A reference to a class or function by its name, as pickle's GLOBAL."""

    def __init__(self, name):
        self.module, _, self.name = name.rpartition(".")


class Call:
    def __init__(self, name, *arguments):
        self.function, self.arguments = Name(name) if isinstance(name, str) else name, arguments


class New(Call):
    """An object of a class, as pickle's NEWOBJ."""


class Built:
    """A value with a state to be set, as pickle's BUILD."""

    def __init__(self, value, state):
        self.value, self.state = value, state


class Persistent:
    def __init__(self, value):
        self.value = value


class Opcodes:
    def __init__(self, opcodes):
        self.opcodes = opcodes


def opcodes(value):
    """The opcodes of protocol 2 that make a value; a memo is never needed."""
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return pickle.LONG1 + bytes([len(data)]) + data
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            data = value.encode("utf-8", "surrogatepass")
            return pickle.BINUNICODE + struct.pack("<I", len(data)) + data
        case tuple():
            return pickle.MARK + b"".join(map(opcodes, value)) + pickle.TUPLE
        case list():
            items = b"".join(map(opcodes, value))
            return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
        case dict():
            items = b"".join(map(opcodes, itertools.chain(*value.items())))
            start = opcodes(Call("collections.OrderedDict")) if ordered(value) else b"}"
            return start + pickle.MARK + items + pickle.SETITEMS
        case Name():
            return pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
        case New():
            return opcodes(value.function) + opcodes(value.arguments) + pickle.NEWOBJ
        case Call():
            return opcodes(value.function) + opcodes(value.arguments) + pickle.REDUCE
        case Built():
            return opcodes(value.value) + opcodes(value.state) + pickle.BUILD
        case Persistent():
            return opcodes(value.value) + pickle.BINPERSID
        case Opcodes():
            return value.opcodes
    raise TypeError(value)


def ordered(value):
    return isinstance(value, collections.OrderedDict)


def stored(key, count, kind="torch.FloatStorage"):
    return Persistent(("storage", Name(kind), key, "cpu", count))


EMPTY = collections.OrderedDict()


def tensor(storage, size, stride=None, offset=0, *more, version=2):
    if stride is None:
        stride = tuple(int(np.prod(size[i + 1 :])) for i in range(len(size)))
    arguments = storage, offset, size, stride, False, EMPTY, *more
    return Call(f"torch._utils._rebuild_tensor_v{version}", *arguments)


def write(path, value, storages=None, *, order=b"little", top="any", extra=None, compression=0):
    """A file as torch.save writes it; `value` may be the pickle itself."""
    data = value if type(value) is bytes else b"\x80\x02" + opcodes(value) + b"."
    members = {"data.pkl": data, ".format_version": b"1"}
    if order is not None:
        members["byteorder"] = order
    members |= {f"data/{key}": bytes(data) for key, data in (storages or {}).items()}
    members |= {"version": b"3\n", **(extra or {})}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{top}/{name}", data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights"


def load(path):
    """Loads what must load: arrays of the kind that is promised."""
    result = rnnfast.load_torch(path)
    assert type(result) is dict
    assert "torch" not in sys.modules or pytest.importorskip("torch")
    for array in arrays(result):
        flags = array.flags
        assert flags.c_contiguous and flags.aligned and not flags.writeable
        assert array.dtype.isnative
    return result


def arrays(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from arrays(item)


def damage(path):
    """The words of the error that a file must end in."""
    tracemalloc.start()
    try:
        with pytest.raises(rnnfast.DamagedFileError) as caught:
            rnnfast.load_torch(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000 + 100 * os.path.getsize(path), f"{peak} bytes"
    message = str(caught.value)
    assert message.startswith(f"{path}: got ")
    got, needs, rest = message.removeprefix(f"{path}: got ").partition("; needs ")
    assert needs and rest and len(message) < 1000
    return got


NUMBERS = {
    "Double": np.array([1.5, -np.inf, np.nan, 5e-324]),
    "Float": np.array([1.5, -np.inf, np.nan, 1e-45], np.float32),
    "Half": np.array([1.5, -np.inf, np.nan, 6e-8], np.float16),
    "ComplexDouble": np.array([1 + 2j, -3j]),
    "ComplexFloat": np.array([1 + 2j, -3j], np.complex64),
    "Long": np.array([-(2**63), 2**63 - 1]),
    "Int": np.array([-(2**31), 2**31 - 1], np.int32),
    "Short": np.array([-(2**15), 2**15 - 1], np.int16),
    "Char": np.array([-128, 127], np.int8),
    "Byte": np.array([0, 255], np.uint8),
    "Bool": np.array([True, False]),
}


def same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("order", ["<", ">", None])
@pytest.mark.parametrize("kind", NUMBERS)
def test_types_of_numbers_in_both_byte_orders(kind, order, path):
    numbers = NUMBERS[kind]
    data = numbers.astype(numbers.dtype.newbyteorder(order or "<")).tobytes()
    value = {"a": tensor(stored("0", numbers.size, f"torch.{kind}Storage"), numbers.shape)}
    name = {"<": b"little", ">": b"big", None: None}[order]  # unsaid, it is little
    same(load(write(path, value, {"0": data}, order=name))["a"], numbers)


@pytest.mark.parametrize("order", ["<", ">"])
def test_bfloat16_is_widened_exactly(order, path):
    bits = np.array([0x3FC0, 0xFF80, 0x0001, 0x8000, 0x7F7F], np.uint16)
    value = {"a": tensor(stored("0", 5, "torch.BFloat16Storage"), (5,))}
    data = bits.astype(f"{order}u2").tobytes()
    name = b"little" if order == "<" else b"big"
    array = load(write(path, value, {"0": data}, order=name))["a"]
    assert array.dtype == np.float32
    assert (array.view(np.uint32) == bits.astype(np.uint32) << 16).all()
    assert array[0] == 1.5 and array[1] == -np.inf


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float32", "bool"])
def test_types_in_untyped_storages(dtype, path):
    numbers = np.array([0, 1, 1], dtype)
    storage = stored("0", numbers.nbytes, "torch.storage.UntypedStorage")
    value = {"a": tensor(storage, (3,), (1,), 0, Name(f"torch.{dtype}"), version=3)}
    same(load(write(path, value, {"0": numbers.tobytes()}))["a"], numbers)


def test_bytes_that_are_no_bools_are_true(path):
    value = {"a": tensor(stored("0", 4, "torch.BoolStorage"), (4,))}
    array = load(write(path, value, {"0": b"\0\1\2\xff"}))["a"]
    assert array.tobytes() == b"\0\1\1\1"


VIEWS = {  # size, stride, offset of views of 24 numbers
    "whole": ((4, 6), (6, 1), 0),
    "scalar": ((), (), 23),
    "transposed": ((6, 4), (1, 6), 0),
    "columns": ((4, 3), (6, 2), 1),
    "tail": ((2, 6), (6, 1), 12),
    "overlapping": ((20, 5), (1, 1), 0),
    "expanded": ((5, 6), (0, 1), 18),
    "of length 1": ((1, 24, 1), (2**70, 1, 99), 0),
    "empty": ((0, 5), (5, 1), 0),
    "empty at the end": ((3, 0), (1, 1), 24),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_become_contiguous(name, path):
    size, stride, offset = VIEWS[name]
    numbers = np.arange(24, dtype=np.float32)
    array = load(
        write(path, {"a": tensor(stored("0", 24), size, stride, offset)}, {"0": numbers.tobytes()})
    )["a"]
    want = np.zeros(size, np.float32)
    for index in np.ndindex(*size):
        want[index] = numbers[offset + sum(i * s for i, s in zip(index, stride, strict=True))]
    same(array, want)


def test_tensors_that_share_a_storage(path):
    numbers = np.arange(6, dtype=np.float32)
    value = {
        "a": tensor(stored("0", 6), (2, 3)),
        "b": tensor(stored("0", 6), (3, 2), (1, 3)),
        "c": tensor(stored("0", 6), (2,), (1,), 4),
    }
    result = load(write(path, value, {"0": numbers.tobytes()}))
    same(result["a"], numbers.reshape(2, 3))
    same(result["b"], result["a"].T.copy())
    same(result["c"], numbers[4:])


def test_an_empty_storage(path):
    value = {"a": tensor(stored("0", 0), (0, 3)), "b": tensor(stored("1", 2), (0,), (1,))}
    result = load(write(path, value, {"0": b"", "1": bytes(8)}))
    assert result["a"].shape == (0, 3) and result["b"].shape == (0,)


def test_a_checkpoint_keeps_its_structure(path):
    weight = tensor(stored("0", 2), (2,))
    value = {
        "model": Built(
            collections.OrderedDict({"w": weight}),
            {"_metadata": collections.OrderedDict({"": {"version": 1}})},
        ),
        "parameter": Call("torch._utils._rebuild_parameter", weight, True, EMPTY),
        "marked": Call("torch._utils._rebuild_parameter_with_state", weight, True, EMPTY, {"a": 1}),
        "optimizer": {"state": {0: {"step": 3}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "milestones": Call("collections.Counter", {3: 1}),
        "size": Call("torch.Size", (2, 3)),
        "devices": [Call("torch.device", "cpu"), Call("torch.device", "cuda", 1)],
        "dtype": Name("torch.float32"),
        "set": Call("__builtin__.set", [1, "a"]),
        "frozenset": Call("builtins.frozenset", [2.5]),
        "complex": Call("__builtin__.complex", 1.0, -2.0),
        "bytes": Call("_codecs.encode", "\xff\x00", "latin1"),
        "plain": [None, True, False, -1, 2**70, -(2**300), 0.5, "text \ud800", (), [], {}],
        None: 1, 2.5: 2, True: 3, 7: 4,
    }  # fmt: skip
    result = load(write(path, value, {"0": np.array([1, 2], "<f4").tobytes()}))
    weight = np.array([1, 2], np.float32)
    for array in (result["model"].pop("w"), result.pop("parameter"), result.pop("marked")):
        same(array, weight)
    assert type(result["model"]) is dict and not hasattr(result["model"], "_metadata")
    assert result == {
        "model": {},
        "optimizer": value["optimizer"],
        "milestones": {3: 1},
        "size": (2, 3),
        "devices": ["cpu", "cuda:1"],
        "dtype": "torch.float32",
        "set": {1, "a"},
        "frozenset": {2.5},
        "complex": 1 - 2j,
        "bytes": b"\xff\x00",
        "plain": value["plain"],
        None: 1, 2.5: 2, True: 3, 7: 4,
    }  # fmt: skip


def test_what_stands_twice_is_made_once(path):
    """By the memo, as pickle does it: BINPUT and BINGET, and their longer forms."""
    one = opcodes(tensor(stored("0", 2), (2,)))
    text = b"}(" + opcodes("a") + one + b"q\x05" + opcodes("b") + b"h\x05" + opcodes("c")
    text += b"]r\xff\xff\xff\xff" + opcodes("d") + b"j\xff\xff\xff\xffu"
    result = load(write(path, Opcodes(text), {"0": bytes(8)}))
    assert result["a"] is result["b"] and result["c"] is result["d"]


def test_integers_of_each_opcode(path):
    text = b"](K\xffM\xff\xffJ\xff\xff\xff\xff\x8a\x00\x8a\x01\x80e"
    value = {"a": Opcodes(text)}
    assert load(write(path, value))["a"] == [255, 65535, -1, 0, -128]


def test_the_content_tells_the_format(tmp_path):
    value = {"a": tensor(stored("0", 1), (1,))}
    for name in ("a.safetensors", "a.npz", "a", "a.pt"):
        assert load(write(tmp_path / name, value, {"0": bytes(4)}, top=name))["a"] == 0


def test_weights_load_into_a_module(path):
    theirs = rnnfast.GRU(3, 4, 2, bidirectional=True, seed=1)
    value, storages = collections.OrderedDict(), {}
    for key, (name, array) in enumerate(theirs.state_dict().items()):
        storages[str(key)] = array.tobytes()
        value[name] = tensor(stored(str(key), array.size), array.shape)
    ours = rnnfast.GRU(3, 4, 2, bidirectional=True, seed=2)
    ours.load_state_dict(load(write(path, value, storages)))
    assert ours.flat.tobytes() == theirs.flat.tobytes()


def test_ten_thousand_tensors_take_a_moment(path):
    value = {f"layers.{i}.weight": tensor(stored(str(i), 4), (2, 2)) for i in range(10_000)}
    write(path, value, {str(i): bytes(16) for i in range(10_000)})
    start = time.process_time()
    assert len(load(path)) == 10_000
    assert time.process_time() - start < 10


# ------------------------------------------------------------------------------- other files


OTHERS = {
    "empty": (b"", "neither"),
    "text": (b"hello, world", "neither"),
    "zeros": (bytes(1000), "neither"),
    "PK": (b"PK\3\4", "no readable zip file"),
    "an empty zip": (b"PK\5\6" + bytes(18), "neither"),
    "a pickle": (pickle.dumps({"a": 1}), "a bare pickle"),
    "old": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02M\xe9\x03.", "old format"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(name, path):
    content, words = OTHERS[name]
    path.write_bytes(content)
    assert words in damage(path)


def test_the_old_format_is_told_what_to_do(path):
    path.write_bytes(OTHERS["old"][0])
    with pytest.raises(rnnfast.DamagedFileError, match=r"needs one of PyTorch 1\.6.*torch\.save"):
        rnnfast.load_torch(path)


def test_files_of_numpy_and_of_rnnfast_are_named(path):
    rnnfast.RNN(1, 1, seed=0).save(path)
    assert "an .npz file, which rnnfast.load" in damage(path)


def test_torchscript_is_named(path):
    for name in ("constants.pkl", "code/__torch__.py"):
        write(path, {}, extra={name: b"x" * 999}, compression=zipfile.ZIP_DEFLATED)
        assert "TorchScript" in damage(path)


def test_zip_files_of_another_kind_are_named(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    assert "0 entries data.pkl" in damage(path)
    with zipfile.ZipFile(path, "w") as archive:
        for top in "ab":
            archive.writestr(f"{top}/data.pkl", b"\x80\x02}.")
    assert "2 entries data.pkl" in damage(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rnnfast.load_torch(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("path", [None, 3, 1.5, ["a"], b"\0", "a\0b"], ids=repr)
def test_what_is_no_path_is_refused(path):
    with pytest.raises((TypeError, ValueError), match=r"^path: got "):
        rnnfast.load_torch(path)


def test_endless_files_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    open_files = len(os.listdir("/dev/fd"))
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        assert "where a regular file belongs" in damage(path)
    assert len(os.listdir("/dev/fd")) == open_files


# ------------------------------------------------------------------------------------- damage


@pytest.fixture
def saved(path):
    """A small file, and what it holds."""
    value = collections.OrderedDict(
        a=tensor(stored("0", 6), (2, 3)),
        b=tensor(stored("0", 6), (3, 2), (1, 3)),
        c=tensor(stored("1", 2, "torch.DoubleStorage"), ()),
        d=tensor(stored("2", 3, "torch.BFloat16Storage"), (3,)),
    )
    value = Built(value, {"_metadata": {"": {"version": 1}}})
    rng = np.random.default_rng(1)
    write(path, value, {"0": rng.bytes(24), "1": rng.bytes(16), "2": rng.bytes(6)})
    return path, rnnfast.load_torch(path)


def load_damaged(path, whole):
    """Loads a damaged file: an error, or, where the damage means nothing, the same.

    Returns whether there was an error.
    """
    try:
        result = load(path)
    except rnnfast.DamagedFileError as error:
        assert str(error).startswith(f"{path}: got ")
        assert len(str(error)) < 1000
        return True
    assert list(result) == list(whole)
    for ours, theirs in zip(result.values(), whole.values(), strict=True):
        same(ours, theirs)
    return False


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x80])
def test_any_damaged_byte_is_noticed_or_means_nothing(flip, saved):
    path, whole = saved
    data = path.read_bytes()
    noticed = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        noticed += load_damaged(path, whole)
    assert noticed > len(data) // 3


def test_a_file_cut_anywhere_is_noticed(saved):
    path, whole = saved
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert load_damaged(path, whole), f"cut at {length}"


def test_holes_and_doubled_parts_are_noticed(saved):
    path, whole = saved
    data = path.read_bytes()
    cuts = random.Random(2)
    for _ in range(200):
        a, b = sorted(cuts.sample(range(len(data)), 2))
        for damaged in (
            data[:a] + data[b:],
            data[:b] + data[a:],
            data[:a] + bytes(b - a) + data[b:],
        ):
            path.write_bytes(damaged)
            load_damaged(path, whole)


def pickle_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def changed_pickles(data, seed):
    """The pickle with its bytes changed, cut, doubled and replaced by other opcodes."""
    changes = random.Random(seed)
    for at in range(len(data)):
        for flip in (0x01, 0x80):
            yield data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        yield data[:at] + changes.randbytes(1) + data[at + 1 :]
        yield data[:at]
        yield data[:at] + b"."
    for _ in range(300):
        a, b = sorted(changes.sample(range(len(data)), 2))
        yield data[:a] + data[b:]
        yield data[:b] + data[a:]
        c, d = sorted(changes.sample(range(len(data)), 2))
        yield data[:a] + data[c:d] + data[b:]


def test_a_changed_pickle_ends_in_an_error_or_in_plain_values(saved):
    """With a checksum that is right: what a reader must judge, that zip cannot."""
    path, _ = saved
    members = pickle_of(path)
    storages = {key: members[f"data/{key}"] for key in "012"}
    ends = collections.Counter()
    for data in changed_pickles(members["data.pkl"], 3):
        write(path, data, storages)
        try:
            result = load(path)
        except rnnfast.DamagedFileError as error:
            assert len(str(error)) < 1000
            ends["error"] += 1
        else:
            for array in arrays(result):
                array.tobytes()  # all of it is there
            ends["result"] += 1
    assert ends["error"] > 1000 and ends["result"] > 20, ends


# -------------------------------------------------------------------------------------- malice


def test_nothing_is_called(tmp_path, monkeypatch):
    """Each way to a call that pickle knows; `pickle` itself shows that the files would work."""
    monkeypatch.chdir(tmp_path)
    made = Name("os.mkdir")
    imported = Call("builtins.__import__", "os")
    attacks = {
        "REDUCE": Call(made, "here"),
        "getattr": Call(Call("builtins.getattr", imported, "mkdir"), "here"),
        "eval": Call("builtins.eval", "__import__('os').mkdir('here')"),
        "python 2's": Call("__builtin__.eval", "__import__('os').mkdir('here')"),
        "INST": Opcodes(b"(" + opcodes("here") + b"ios\nmkdir\n"),
        "OBJ": Opcodes(b"(" + opcodes(made) + opcodes("here") + b"o"),
        "STACK_GLOBAL": Opcodes(
            opcodes("os") + opcodes("mkdir") + b"\x93" + opcodes(("here",)) + b"R"
        ),
        "in an argument": Call("collections.Counter", Call(made, "here")),
        "in metadata": Built(EMPTY, {"_metadata": Call(made, "here")}),
        "thrown away": Opcodes(opcodes(Call(made, "here")) + b"0}"),
        "in the hooks": Call(
            "torch._utils._rebuild_tensor_v2",
            *(stored("0", 1), 0, (1,), (1,), False, Call(made, "here")),
        ),
    }
    for name, attack in attacks.items():
        value = attack if name == "thrown away" else {"a": attack}
        data = b"\x80\x02" + opcodes(value) + b"."
        got = damage(write(tmp_path / "file", data, {"0": bytes(4)}))
        assert re.search(r"mkdir|eval|opcode|unusual|getattr", got), got
        assert os.listdir(tmp_path) == ["file"], name
        if name not in ("in the hooks", "in metadata"):
            try:
                pickle.loads(data)
            except Exception:
                assert name == "in an argument"
            assert "here" in os.listdir(tmp_path), name
            os.rmdir("here")


REFUSED = {
    "os.system": (Call("os.system", "true"), r"entry \['a'\]: an object of os.system"),
    "a class": (Name("os.system"), r"entry \['a'\]: a reference to os.system"),
    "of torch.nn": (
        Built(New("torch.nn.modules.rnn.LSTM"), {"training": True, "x": [1], "y": {"z": 2}}),
        r"entry \['a'\]: an object of torch.nn.modules.rnn.LSTM",
    ),
    "an OrderedDict's method": (Call("collections.OrderedDict.fromkeys", ()), "object of"),
    "OrderedDict with values": (Call("collections.OrderedDict", [["a", 1]]), "unusual arguments"),
    "a dict of what is no dict": (Call("collections.Counter", [1]), "unusual arguments"),
    "a defaultdict": (Call("collections.defaultdict", Name("__builtin__.list")), "defaultdict"),
    "a call of a value": (Opcodes(opcodes("a") + b")R"), "a call of 'a'"),
    "a call without a tuple": (Opcodes(opcodes(Name("torch.Size")) + b"]R"), "a call of"),
    "a call of a storage": (Call("torch.FloatStorage", 10**12), "unusual arguments"),
    "a constructor": (Name("collections.OrderedDict"), "a reference to collections.OrderedDict"),
    "a state of a list": (Built([1], {"a": 1}), "a state for list of 1"),
    "a state of a tensor": (Built(tensor(stored("0", 1), (1,)), (1,)), "a state for _Tensor"),
    "items of a tensor": (Opcodes(opcodes(tensor(stored("0", 1), (1,))) + b"K\0K\1s"), "to set in"),
    "items of a list": (Opcodes(opcodes([1]) + b"K\0K\1s"), "to set in"),
    "an odd item": (Opcodes(b"}(K\0K\1K\2u"), "3 keys and values"),
    "append to a dict": (Opcodes(b"}K\0a"), "to append to"),
    "append to a tensor": (Opcodes(opcodes(tensor(stored("0", 1), (1,))) + b"K\0a"), "append to"),
    "a name with spaces": (Name("os.sys tem"), "for a name"),
    "a name without end": (Opcodes(b"cos"), "cut off"),
    "a path as name": (Name("../../os.system"), "for a name"),
    "a persistent text": (Persistent("0"), "an unusual storage"),
    "a persistent five": (Persistent(("module", Name("torch.FloatStorage"), "0", "cpu", 1)),
                          "an unusual storage"),
    "a persistent six": (Persistent(("storage", Name("torch.FloatStorage"), "0", "cpu", 1, None)),
                         "an unusual storage"),
    "a persistent class": (Persistent(("storage", "FloatStorage", "0", "cpu", 1)), "an unusual"),
    "a key of another kind": (Persistent(("storage", Name("torch.FloatStorage"), 0, "cpu", 1)),
                              "an unusual storage"),
    "a count that is text": (Persistent(("storage", Name("torch.FloatStorage"), "0", "cpu", "1")),
                             "an unusual storage"),
    "a bare storage": (stored("0", 1), r"entry \['a'\]: a bare storage"),
    "no such storage": (tensor(stored("7", 1), (1,)), "no storage '7'"),
    "a storage elsewhere": (tensor(stored("../data.pkl", 1), (1,)), "no storage"),
    "more numbers": (tensor(stored("0", 2), (1,)), "of 4 bytes for 2 numbers of 4"),
    "fewer numbers": (tensor(stored("0", 0), (1,)), "of 4 bytes for 0 numbers"),
    "-1 numbers": (tensor(stored("0", -1), (1,)), "of 4 bytes for -1 numbers"),
    "2**90 numbers": (tensor(stored("0", 2**90), (1,)), r"for 2\*\*90 or more numbers"),
    "another type": (tensor(stored("0", 1, "torch.DoubleStorage"), (1,)), "of 4 bytes for 1 num"),
    "a quantised storage": (tensor(stored("0", 4, "torch.QInt8Storage"), (1,)),
                            r"entry \['a'\]: a tensor of torch.QInt8Storage"),
    "a quantised tensor": (Call("torch._utils._rebuild_qtensor", stored("0", 1), 0),
                           r"entry \['a'\]: a quantised tensor"),
    "a sparse tensor": (Call("torch._utils._rebuild_sparse_tensor", 1),
                        r"entry \['a'\]: a sparse tensor"),
    "a meta tensor": (Call("torch._utils._rebuild_meta_tensor_no_storage", 1), "without data"),
    "float8": (tensor(stored("0", 4, "torch.storage.UntypedStorage"), (1,), (1,), 0,
                      Name("torch.float8_e4m3fn"), version=3), "a tensor of torch.float8_e4m3fn"),
    "a lazy conjugate": (tensor(stored("0", 1), (1,), (1,), 0, {"conj": True}), "resolve_conj"),
    "too few arguments": (Call("torch._utils._rebuild_tensor_v2", stored("0", 1), 0), "unusual"),
    "too many arguments": (tensor(stored("0", 1), (1,), (1,), 0, {}, {}), "unusual arguments"),
    "a list as size": (tensor(stored("0", 1), [1], (1,)), "unusual arguments"),
    "a text as offset": (tensor(stored("0", 1), (1,), (1,), "0"), "unusual arguments"),
    "a size of text": (tensor(stored("0", 1), ("1",), (1,)), "no such numbers"),
    "a size of True": (tensor(stored("0", 1), (True,), (1,)), "no such numbers"),
    "a size of floats": (tensor(stored("0", 1), (1.0,), (1,)), "no such numbers"),
    "more strides": (tensor(stored("0", 1), (1,), (1, 1)), "no such numbers"),
    "33 dimensions": (tensor(stored("0", 1), (1,) * 33, (1,) * 33), "no such numbers"),
    "a negative size": (tensor(stored("0", 1), (-1,), (1,)), r"size \(-1,\)"),
    "two negative sizes": (tensor(stored("0", 1), (-1, -1), (1, 1)), "size"),
    "a negative stride": (tensor(stored("0", 1), (2,), (-1,), 1), r"stride \(-1,\)"),
    "a negative offset": (tensor(stored("0", 1), (1,), (1,), -1), "at -1"),
    "one past the end": (tensor(stored("0", 1), (2,), (1,)), "past the end of a storage of 1"),
    "an offset past the end": (tensor(stored("0", 1), (1,), (1,), 1), "past the end"),
    "a stride past the end": (tensor(stored("0", 1), (2,), (2**62,)), "past the end"),
    "a huge offset": (tensor(stored("0", 1), (1,), (1,), 2**62), "past the end"),
    "an offset over 2**64": (tensor(stored("0", 1), (1,), (1,), 2**64), "past the end"),
    "a stride over 2**64": (tensor(stored("0", 1), (2,), (2**64,)), "past the end"),
    "a product over 2**64": (tensor(stored("0", 1), (2**32, 2**32), (0, 0)), "size"),
    "a size over 2**64": (tensor(stored("0", 1), (2**64,), (0,)), "size"),
    "huge and empty": (tensor(stored("0", 1), (0, 2**62, 2**62), (1, 1, 1)), "size"),
    "expanded to 2**40": (tensor(stored("0", 1), (2**40,), (0,)), "more bytes than the file"),
    "a memo that is not there": (Opcodes(b"h\7"), "value 7, which is not there"),
    "an empty stack": (Opcodes(b"000"), "opcode"),
    "a tuple of nothing": (Opcodes(b"\x87"), "no readable data.pkl"),
    "a tuple without mark": (Opcodes(b"t"), "no readable data.pkl"),
    "an open mark": (Opcodes(b"(N"), "no readable data.pkl"),
    "two values": (Opcodes(b"NN"), "no readable data.pkl"),
    "a long text": (Opcodes(b"X\xff\xff\xff\xffa"), "cut off"),
    "bad UTF-8": (Opcodes(b"X\1\0\0\0\xff"), "no readable data.pkl"),
    "a long integer": (Opcodes(b"\x8b\xff\xff\xff\x7f"), "opcode"),
    "long bytes": (Opcodes(b"B\xff\xff\xff\x7f"), "opcode"),
    "longer bytes": (Opcodes(b"\x8e" + b"\x7f" * 8), "opcode"),
    "a frame": (Opcodes(b"\x95" + b"\x7f" * 8), "opcode"),
    "an extension": (Opcodes(b"\x82\1"), "opcode"),
    "another protocol within": (Opcodes(b"\x80\5N"), "opcode"),
    "a list as key": ({Opcodes(b"]"): 1}, "list of 0 for a key"),
    "a tuple as key": ({(1, 2): 1}, "tuple of 2 for a key"),
    "a tensor as key": ({tensor(stored("0", 1), (1,)): 1}, "_Tensor for a key"),
    "a long integer as key": ({2**64: 1}, "for a key"),
    "a list in a set": (Call("builtins.set", [[1]]), "for a key"),
    "a set of a set": (Call("builtins.set", Call("builtins.set", [1])), "unusual arguments"),
    "no latin1": (Call("_codecs.encode", "\u1234", "latin1"), "no readable data.pkl"),
    "another codec": (Call("_codecs.encode", "a", "zip"), "unusual arguments"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_right_is_refused_by_name(name, path):
    value, words = REFUSED[name]
    got = damage(write(path, {"a": value}, {"0": bytes(4)}))
    assert re.search(words, got), got


ROOTS = {
    "a model": (Built(New("models.Mine"), {"a": 1}), "a whole model, or an object of models.Mine"),
    "a tensor": (tensor(stored("0", 1), (1,)), "float32 array of shape .* where a dict belongs"),
    "a list": ([1], "list of 1 where a dict belongs"),
    "protocol 4": (pickle.dumps({}, 4), "pickle protocol 4"),
    "no protocol": (b"}.", "no protocol"),
    "nothing": (b"", "cut off"),
    "no end": (b"\x80\x02}", "cut off"),
    "more after the end": (b"\x80\x02}.}.", "more than one value"),
    "an object as key": (b"\x80\x02}" + opcodes(New("a.Enum")) + b"K\1s.", "it refers to a.Enum"),
}


@pytest.mark.parametrize("name", ROOTS)
def test_what_is_no_state_dict_is_refused_by_name(name, path):
    value, words = ROOTS[name]
    got = damage(write(path, value, {"0": bytes(4)}))
    assert re.search(words, got), got


@pytest.mark.parametrize("order", [b"", b"middle", b"little\n"])
def test_another_byte_order_is_refused(order, path):
    assert f"byte order {order!r}" in damage(write(path, {}, order=order))


def test_structures_that_double_are_not_walked_twice(path):
    tree = b")" + b"q\0h\0\x86" * 60  # a tuple of the same two, and so on
    result = rnnfast.load_torch(write(path, {"a": Opcodes(tree)}))["a"]
    for _ in range(60):
        assert result[0] is result[1]
        result = result[0]
    assert result == ()


@pytest.mark.parametrize("use", ["key", "set", "size", "stride", "call", "argument", "count"])
def test_structures_that_double_are_not_hashed_nor_printed(use, path):
    tree = Opcodes(b")" + b"q\0h\0\x86" * 60)
    value = {
        "key": {tree: 1},
        "set": Call("builtins.set", [tree]),
        "size": tensor(stored("0", 1), tree, (1, 1)),
        "stride": tensor(stored("0", 1), (1, 1), tree),
        "call": Call(tree, 1),
        "argument": Call("torch.device", tree),
        "count": Persistent(("storage", Name("torch.FloatStorage"), "0", "cpu", tree)),
    }[use]
    damage(write(path, {"a": value}, {"0": bytes(4)}))


@pytest.mark.parametrize("depth", [50, 200, 100_000])
@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "mark"])
def test_deep_structures(kind, depth, path):
    nested = {
        "list": b"]" * depth + b"a" * (depth - 1),
        "tuple": b")" + b"\x85" * (depth - 1),
        "dict": b"}" + b"K\0}" * (depth - 1) + b"s" * (depth - 1),
        "mark": b"(" * depth + b"t" * depth,
    }[kind]
    write(path, {"a": Opcodes(nested)})
    if depth == 50:
        assert rnnfast.load_torch(path)
    else:
        assert re.search("nested", damage(path))


@pytest.mark.parametrize("start", [b"]q\0h\0a", b"}q\0K\0h\0s", b"]q\0h\0\x85a"])
def test_a_structure_within_itself_is_refused(start, path):
    assert "a container within itself" in damage(write(path, {"a": Opcodes(start)}))


def test_copies_of_one_value_do_not_add_up(path):
    """A long text, list or tensor, of which each few bytes of the file ask for a copy."""
    encode, device, make_set = (
        opcodes(Name(n)) for n in ("_codecs.encode", "torch.device", "builtins.set")
    )
    long_text, latin = opcodes("x" * 100_000), opcodes("latin1")
    again = {
        "encode": long_text + b"q\0" + latin + b"q\1" + encode + b"q\2" + b"h\2h\0h\1\x86R" * 9999,
        "device": long_text + b"q\0" + device + b"q\2" + b"h\2h\0K\0\x86R" * 10_000,
        "set": opcodes(list(range(20_000))) + b"q\0" + make_set + b"q\2" + b"h\2h\0\x85R" * 10_000,
    }
    for text in again.values():
        value = Opcodes(b"](" + text + b"e")
        assert "copies that are larger than the file" in damage(write(path, {"a": value}))
    numbers = np.zeros(250_000, np.float32)
    value = {str(i): tensor(stored("0", 250_000), (500, 500), (1, 500)) for i in range(100)}
    write(path, value, {"0": numbers.tobytes()})
    assert "strided tensors of more bytes than the file" in damage(path)


def test_keys_that_are_equal_but_not_the_same_are_not_compared_each_time(path):
    """Two copies of a long key, one set again and again in a dict that has the other."""
    key = opcodes("k" * 2_000_000)
    text = b"}" + key + b"Ns" + key + b"q\0N" + b"s" + b"h\0Ns" * 500_000
    start = time.process_time()
    assert len(rnnfast.load_torch(write(path, Opcodes(text)))) == 1
    assert time.process_time() - start < 20  # and not 500,000 times 40 us more


def test_floods_of_opcodes_end(path):
    for flood in (b"(", b"]", b"}", b")", b"N", b"]q\0", b"h\0", b"0", b"\x8a\0", b"t", b"R"):
        damage(write(path, b"\x80\x02" + b"Nq\0" + flood * 100_000))


@pytest.mark.parametrize("flood", [b"}", b"]", b"(t", b"N\x85", b"h\0)R"], ids=repr)
def test_more_objects_than_any_checkpoint_has_are_refused(flood, path):
    value = Opcodes(opcodes(Name("a.B")) + b"q\0" + flood * (2**20 + 1))
    start = time.process_time()
    with pytest.raises(rnnfast.DamagedFileError, match="more than 1048576"):
        rnnfast.load_torch(write(path, value))
    assert time.process_time() - start < 20


def test_a_pickle_that_is_too_large_is_not_run(path):
    damaged = damage(write(path, b"\x80\x02" + b"N" * 2**24))
    assert "data.pkl of 16777218 bytes" in damaged


def test_members_that_are_compressed_are_refused(path):
    value = {"a": tensor(stored("0", 50_000_000), (50_000_000,))}
    write(path, value, {"0": bytes(200_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 400_000
    assert "is compressed" in damage(path)


def test_an_entry_twice_is_refused(path):
    write(path, {})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("any/data.pkl", b"\x80\x02}.")
    assert re.search("2 entries data.pkl", damage(path))
    write(path, {}, {"0": b""})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("any/data/0", b"")
    assert "'any/data/0' twice" in damage(path)


def test_an_encrypted_member_is_refused(path):
    write(path, {})
    data = path.read_bytes()
    at = data.index(b"PK\1\2")
    path.write_bytes(data[: at + 8] + b"\1" + data[at + 9 :])
    assert "no readable zip file" in damage(path)


def test_importing_takes_neither_torch_nor_the_readers_of_files():
    code = (
        "import sys, numpy; before = set(sys.modules); import rnnfast; "
        "print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(run.stdout.split())
    assert not {"torch", "safetensors", "zipfile", "pickletools"} & new


# ------------------------------------------------------------------------------------- PyTorch


def as_numpy(torch, value):
    """What `load_torch` must give for what torch.save took."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()
    if isinstance(value, dict):
        return {key: as_numpy(torch, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [as_numpy(torch, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, np.ndarray):
        same(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            equal(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            equal(one, other)
    else:
        assert ours == theirs


def check_saved(torch, value, path):
    torch.save(value, path)
    result = load(path)
    equal(result, as_numpy(torch, value))
    return result


TYPES = (
    "float64 float32 float16 bfloat16 complex128 complex64 int64 int32 int16 int8 uint64 uint32"
    " uint16 uint8 bool"
)


@pytest.mark.parametrize("name", TYPES.split())
def test_torch_types(name, path):
    torch = pytest.importorskip("torch")
    numbers = torch.tensor([[0, 1, 2], [3, 100, 1]]).to(getattr(torch, name))
    check_saved(torch, {"a": numbers, "empty": numbers[:0], "scalar": numbers[1, 1].clone()}, path)


def test_torch_views(path):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6, 5)
    views = {
        "t": base.transpose(0, 2), "step": base[::2, 1:4, ::3], "tail": base[3],
        "scalar": base[2, 3, 4],
        "expanded": base[0, :1].expand(7, 5), "base": base, "flipped": base.flip(0),
        "channels": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "new": base[:, None, :, None], "empty": base[:0], "diagonal": base[:, :4, 0].diagonal(),
    }  # fmt: skip
    check_saved(torch, views, path)


@pytest.mark.parametrize("cls", ["RNN", "LSTM", "GRU"])
def test_torch_modules(cls, path):
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.nn, cls)(3, 4, num_layers=2, bidirectional=True)
    weights = check_saved(torch, theirs.state_dict(), path)
    ours = getattr(rnnfast, cls)(3, 4, num_layers=2, bidirectional=True)
    ours.load_state_dict(weights)
    x = torch.randn(5, 2, 3)
    np.testing.assert_allclose(ours(x)[0], theirs(x)[0].detach(), atol=1e-5)


def test_torch_checkpoints(path):
    """With the states of an optimiser after a step, of schedules, and all that is usual."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(5, 4), "rnn": nn.LSTM(4, 3), "norm": nn.BatchNorm1d(3)}
    )
    model.tied = nn.Linear(4, 5)
    model.tied.weight = model["embedding"].weight
    optimizers = [
        kind(model.parameters())
        for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)
    ]
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(optimizers[0], [3, 5]),
        torch.optim.lr_scheduler.OneCycleLR(optimizers[1], 0.1, 100),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[2]),
    ]
    y = model["rnn"](model["embedding"](torch.tensor([[1, 2]])))[0]
    model["norm"](y[0]).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    value = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedules": [dict(schedule.state_dict()) for schedule in schedules],
        "parameters": list(model.parameters()),
        "epoch": 3, "best": None, "losses": [0.5, 0.25], "done": True, "name": "é" * 300,
        "rng": torch.get_rng_state(), "vocabulary": {"a": 0, "b": 1}, "bytes": b"\x00\xff",
        "big": 2**70, "complex": 1j, "set": {1, 2}, "mean": float("inf"),
    }  # fmt: skip
    value["schedules"][0]["milestones"] = dict(value["schedules"][0]["milestones"])
    check_saved(torch, value, path)
    value = {"device": torch.device("cuda", 1), "dtype": torch.float32, "size": torch.Size([2])}
    torch.save(value, path)
    assert load(path) == {"device": "cuda:1", "dtype": "torch.float32", "size": (2,)}


def refused_by_torch(torch):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    return {
        "a quantised tensor": quantised,
        "a sparse tensor": torch.eye(3).to_sparse(),
        "torch.float8_e5m2": torch.zeros(2).to(torch.float8_e5m2),
        "a tensor without data": torch.zeros(3, device="meta"),
        "conjugated": torch.zeros(2, dtype=torch.complex64).conj(),
        "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
        "scalar": np.float64(3),
    }


def test_torch_kinds_that_are_refused_by_name(path):
    torch = pytest.importorskip("torch")
    for words, value in refused_by_torch(torch).items():
        torch.save({"model": {"w": value}}, path)
        got = damage(path)
        assert got.startswith("entry ['model']['w']: ") and words in got


def test_torch_files_of_other_kinds(path):
    torch = pytest.importorskip("torch")
    model = torch.nn.LSTM(2, 2)
    torch.save(model, path)
    assert "a whole model, or an object of torch.nn.modules.rnn.LSTM" in damage(path)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert "old format" in damage(path)
    torch.save(model.state_dict(), path, pickle_protocol=4)
    assert "pickle protocol 4" in damage(path)
    torch.save(model.weight_ih_l0, path)
    assert "where a dict belongs" in damage(path)


def test_torch_files_cut_or_with_a_flipped_bit(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.LSTM(2, 3).state_dict(), path)
    whole, data = load(path), path.read_bytes()
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at])
        assert load_damaged(path, whole)
    flips = random.Random(4)
    for _ in range(1000):
        changed = bytearray(data)
        changed[flips.randrange(len(data))] ^= 1 << flips.randrange(8)
        path.write_bytes(changed)
        load_damaged(path, whole)


def test_the_example_runs(tmp_path):
    pytest.importorskip("torch")
    done = [
        subprocess.run(
            [sys.executable, EXAMPLE, command, tmp_path / "model.pt", *more],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # more would wait for each other's turn
        )
        for command, *more in (("train", "--steps", "3"), ("serve", "--length", "9"))
    ]
    assert [run.returncode for run in done] == [0, 0], done
    theirs, ours = (
        float(re.search(r"(\S+) bits per byte of", run.stdout).group(1)) for run in done
    )
    assert abs(theirs - ours) < 0.002


# --------------------------------------------------------------------------------- safetensors


def safetensors_file(path, entries):
    """Written by hand: names to (dtype, shape, bytes)."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(data for *_, data in entries.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


SAFE = {
    "F64": NUMBERS["Double"], "F32": NUMBERS["Float"], "F16": NUMBERS["Half"],
    "I64": NUMBERS["Long"], "I32": NUMBERS["Int"], "I16": NUMBERS["Short"], "I8": NUMBERS["Char"],
    "U64": np.array([0, 2**64 - 1], np.uint64), "U32": np.array([0, 2**32 - 1], np.uint32),
    "U16": np.array([0, 2**16 - 1], np.uint16), "U8": NUMBERS["Byte"], "BOOL": NUMBERS["Bool"],
}  # fmt: skip


def test_safetensors_types_of_numbers(path):
    pytest.importorskip("safetensors")
    entries = {
        name: (name, array.shape, array.astype(array.dtype.newbyteorder("<")).tobytes())
        for name, array in SAFE.items()
    }
    entries["matrix"] = ("F32", (2, 3), np.arange(6, dtype="<f4").tobytes())
    entries["scalar"] = ("F32", (), np.float32(2).astype("<f4").tobytes())
    entries["empty"] = ("F32", (0, 3), b"")
    entries["BF16"] = ("BF16", (2,), np.array([0x3FC0, 0xFF80], "<u2").tobytes())
    result = load(safetensors_file(path, entries))
    assert set(result) == set(entries)
    for name, array in SAFE.items():
        same(result[name], array)
    same(result["matrix"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert result["scalar"].shape == () and result["scalar"] == 2
    assert result["empty"].shape == (0, 3)
    same(result["BF16"], np.array([1.5, -np.inf], np.float32))


def test_safetensors_own_files(path):
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    module = rnnfast.LSTM(3, 4, seed=1)
    save_file(module.state_dict(), path)
    other = rnnfast.LSTM(3, 4, seed=2)
    other.load_state_dict(load(path))
    assert other.flat.tobytes() == module.flat.tobytes()


def test_safetensors_of_torch(path):
    pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    weights = torch.nn.LSTM(3, 4).to(torch.bfloat16).state_dict()
    save_file(weights, path)
    result = load(path)
    assert set(result) == set(weights)
    for name, tensor in weights.items():
        same(result[name], tensor.float().numpy())


def test_safetensors_types_that_are_refused_by_name(path):
    pytest.importorskip("safetensors")
    entry = {"layer.w": ("F8_E4M3", (2,), b"\0\0")}
    got = damage(safetensors_file(path, entry))  # the package itself, where it does not know these
    assert got == "entry ['layer.w']: a tensor of F8_E4M3" or "no readable" in got


@pytest.mark.parametrize(
    "entry",
    [
        ("F32", (2,), bytes(4)),
        ("F32", (2**62, 4), bytes(4)),
        ("F32", (0, 2**40, 2**22), b""),
        ("F32", (0,) + (1,) * 99, b""),
        ("F32", (-1,), bytes(4)),
        ("F32", (1.0,), bytes(4)),
        ("F32", "1", bytes(4)),
        ("X", (1,), bytes(4)),
    ],
    ids=str,
)
def test_safetensors_that_do_not_fit_are_refused(entry, path):
    pytest.importorskip("safetensors")
    damage(safetensors_file(path, {"a": entry}))


@pytest.mark.parametrize(
    "text", [b"{", b"{}}", b'{"a":' + b"[" * 9999, b'{"a": 1}', b"{" + b"\xff" * 99, b'{"a": {}}']
)
def test_safetensors_headers_that_are_damaged(text, path):
    pytest.importorskip("safetensors")
    for length in (len(text), 0, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + text)
        damage(path)


def test_safetensors_cut_or_with_a_flipped_bit(path):
    pytest.importorskip("safetensors")
    entries = {"a": ("F32", (2, 3), bytes(24)), "b": ("BF16", (4,), bytes(8))}
    data = safetensors_file(path, entries).read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        damage(path)
    for at, flip in itertools.product(range(len(data)), (0x01, 0x80, 0xFF)):
        path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        try:
            result = load(path)
        except rnnfast.DamagedFileError:
            continue
        for array in arrays(result):  # a name, type or shape may well have become another
            array.tobytes()


def test_without_safetensors_it_is_told_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    safetensors_file(path, {"a": ("F32", (1,), bytes(4))})
    with pytest.raises(ImportError, match=r"pip install 'rnnfast\[safetensors\]'") as caught:
        rnnfast.load_torch(path)
    assert str(caught.value).startswith(f"{path}: got a safetensors file; needs ")


def test_files_by_name_bytes_or_path(path):
    write(path, {"a": 1})
    for name in (path, str(path), os.fsencode(path)):
        assert rnnfast.load_torch(name) == {"a": 1}

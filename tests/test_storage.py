"""Saving and loading: the same bits back, whole files only, and no trust in what a file says.

Knows the public API and the formats of zip and .npy, to write damaged and malicious files.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

import rnnfast
from rnnfast import storage

MODULES = {
    "RNN": lambda: rnnfast.RNN(3, 2, nonlinearity="relu", seed=1),
    "LSTM": lambda: rnnfast.LSTM(2, 3, 2, dropout=0.25, bidirectional=True, seed=2),
    "GRU": lambda: rnnfast.GRU(2, 3, bias=False, batch_first=True, dtype=np.float64, seed=3),
    "GRU reset before": lambda: rnnfast.GRU(2, 3, reset_after=False, seed=4),
    "LSTM variant": lambda: rnnfast.LSTM(
        2, 3, 2, peephole=True, bidirectional=True, forget_bias=1.5, seed=5
    ),
    "coupled": lambda: rnnfast.LSTM(2, 3, coupled=True, peephole=True, bias=False, seed=6),
    "merged": lambda: rnnfast.GRU(2, 3, 2, bidirectional=True, merge="mul", seed=7),
    "learned states": lambda: rnnfast.LSTM(2, 3, proj_size=1, learn_initial=True, seed=8),
    "drop_connect": lambda: rnnfast.GRU(2, 3, drop_connect=0.5, seed=9),
    "drawn seed": lambda: rnnfast.RNN(1, 1),
}


def same(a, b):
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    assert (a.seed, a.dropout_calls, a.dtype) == (b.seed, b.dropout_calls, b.dtype)
    assert list(a.params) == list(b.params)
    assert a.flat.tobytes() == b.flat.tobytes()


@pytest.fixture
def saved(tmp_path):
    """A small module and the bytes of its file."""
    module = rnnfast.GRU(1, 2, seed=5)
    path = tmp_path / "gru.npz"
    module.save(path)
    return module, path, path.read_bytes()


# ------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", MODULES)
def test_loads_what_was_saved(name, tmp_path):
    module = MODULES[name]()
    x = np.ones((2, 1, module.input_size), module.dtype)
    module.forward_train(x)
    path = tmp_path / "model"
    module.save(str(path))
    loaded = rnnfast.load(path)
    same(module, loaded)
    for ours, theirs in zip(module.forward_train(x)[:1], loaded.forward_train(x)[:1], strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert os.listdir(tmp_path) == ["model"]  # under just this name, and nothing beside it


def test_a_file_of_the_version_before_peepholes_loads(tmp_path):
    module = rnnfast.LSTM(2, 3, seed=1)
    module.save(tmp_path / "new")
    header, arrays = storage.read(tmp_path / "new")
    for name in ("peephole", "coupled", "forget_bias"):
        del header["arguments"][name]
    storage.write(tmp_path / "old", header, arrays)
    same(module, rnnfast.load(tmp_path / "old"))


def test_numpy_reads_the_file_without_pickle(saved):
    module, path, _ = saved
    with np.load(path, allow_pickle=False) as file:
        for name, array in module.params.items():
            assert np.array_equal(file[name], array)
        header = json.loads(file["rnnfast"].tobytes())
    assert header["class"] == "GRU"
    assert header["arguments"]["hidden_size"] == 2


def test_a_file_that_numpy_rewrote_loads(saved, tmp_path):
    """Also with arrays in Fortran order or of the other byte order."""
    module, path, _ = saved
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    name = "weight_hh_l0"
    arrays[name] = np.asfortranarray(arrays[name])
    arrays["bias_hh_l0"] = arrays["bias_hh_l0"].astype(">f4")
    np.savez(tmp_path / "again.npz", **arrays)
    same(module, rnnfast.load(tmp_path / "again.npz"))


def test_saving_through_a_link_keeps_the_link(saved, tmp_path):
    module, path, _ = saved
    link = tmp_path / "latest"
    link.symlink_to(path)
    module.flat += 1
    module.save(link)
    assert link.is_symlink()
    same(module, rnnfast.load(path))


def test_frozen_modules_save_and_load_unfrozen(saved):
    module, path, _ = saved
    module.freeze()
    module.save(path)
    loaded = rnnfast.load(path)
    loaded.flat += 1
    assert loaded.flat[0] == module.flat[0] + 1


# ---------------------------------------------------------------------------------------- atomic


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved):
    """A file size limit stands for a full disk."""
    _module, path, before = saved
    program = f"""
import resource, rnnfast
module = rnnfast.LSTM(64, 64, seed=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    module.save({str(path)!r})
except OSError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "OSError", done.stderr
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    module, path, before = saved

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    module.flat += 1
    with pytest.raises(KeyboardInterrupt):
        module.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("where", ["missing/model.npz", "."])
def test_saving_where_no_file_can_be_is_an_os_error(where, saved, tmp_path):
    with pytest.raises(OSError, match=r"missing|directory"):
        saved[0].save(tmp_path / where)
    assert os.listdir(tmp_path) == ["gru.npz"]


SAVER = """
import sys, rnnfast
modules = [rnnfast.LSTM(32, 64, seed=seed) for seed in (0, 1)]
print("ready", flush=True)
while True:
    for module in modules:
        module.save(sys.argv[1])
"""


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """SIGKILL at random moments of a program that saves all the time."""
    path = tmp_path / "model.npz"
    whole = [rnnfast.LSTM(32, 64, seed=seed).flat.tobytes() for seed in (0, 1)]
    moments = random.Random(1)
    for _ in range(12):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, path], stdout=subprocess.PIPE)
        assert saver.stdout.readline() == b"ready\n"
        while not path.exists():
            assert saver.poll() is None
        time.sleep(moments.uniform(0, 0.05))
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        assert rnnfast.load(path).flat.tobytes() in whole


# ---------------------------------------------------------------------------------------- damage


def load_damaged(module, path):
    """Loads a damaged file: an error that names it, or, where the damage means nothing, the module.

    Returns whether there was an error.
    """
    try:
        loaded = rnnfast.load(path)
    except rnnfast.DamagedFileError as error:
        assert str(path) in str(error)
        assert "needs" in str(error)
        assert len(str(error)) < 1000
        return True
    same(module, loaded)
    return False


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x80])
def test_any_damaged_byte_is_noticed_or_means_nothing(flip, saved):
    module, path, whole = saved
    noticed = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        noticed += load_damaged(module, path)
    assert noticed > len(whole) // 2


def test_a_file_cut_anywhere_is_noticed(saved):
    module, path, whole = saved
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load_damaged(module, path), f"cut at {length}"


def test_holes_and_doubled_parts_are_noticed(saved):
    module, path, whole = saved
    cuts = random.Random(2)
    for _ in range(300):
        a, b = sorted(cuts.sample(range(len(whole)), 2))
        for damaged in (
            whole[:a] + whole[b:],
            whole[:b] + whole[a:],
            whole[:a] + bytes(b - a) + whole[b:],
        ):
            path.write_bytes(damaged)
            load_damaged(module, path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"\x80\x04.", b"x" * 9999]
)
def test_other_files_are_named(content, saved):
    module, path, _ = saved
    path.write_bytes(content)
    assert load_damaged(module, path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rnnfast.load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("path", [None, 3, 1.5, ["a"], b"\0", "a\0b"], ids=repr)
def test_what_is_no_path_is_refused(path, saved):
    for call in (rnnfast.load, saved[0].save):
        with pytest.raises((TypeError, ValueError), match="path"):
            call(path)


def test_endless_files_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    open_files = len(os.listdir("/dev/fd"))
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(rnnfast.DamagedFileError, match="regular file") as caught:
            rnnfast.load(path)
        assert str(caught.value).startswith(f"{path}: got ")
    assert len(os.listdir("/dev/fd")) == open_files


# --------------------------------------------------------------------------------------- malice


def parts(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members if isinstance(members, list) else members.items():
            archive.writestr(name, data)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_of(shape, descr="<f4", data=b"", version=(1, 0)):
    """A member whose header says what we like."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    size = 2 if version == (1, 0) else 4
    padding = -(8 + size + len(text) + 1) % 64
    header = (text + " " * padding + "\n").encode()
    magic = b"\x93NUMPY" + bytes(version) + len(header).to_bytes(size, "little")
    return magic + header + data


class Bomb:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def header_with(**changes):
    def change(members):
        header = json.loads(np.load(io.BytesIO(members["rnnfast.npy"])).tobytes())
        for key, value in changes.items():
            target = header["arguments"] if key in header["arguments"] else header
            target[key] = value
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        return {**members, "rnnfast.npy": npy(text)}

    return change


def put(name, data):
    return lambda members: {**members, f"{name}.npy": data}


def header_text(text):
    return put("rnnfast", npy(np.frombuffer(text.encode(), np.uint8)))


CHANGES = {
    "an entry missing": lambda m: {k: v for k, v in m.items() if k != "bias_hh_l0.npy"},
    "an entry too many": put("weight_hr_l0", npy(np.zeros(3, np.float32))),
    "no header": lambda m: {k: v for k, v in m.items() if k != "rnnfast.npy"},
    "an entry that is no array": lambda m: {**m, "readme.txt": b"hello"},
    "an entry outside": lambda m: {**m, "../../escape.npy": npy(np.zeros(1))},
    "another shape": put("bias_hh_l0", npy(np.zeros(5, np.float32))),
    "transposed": put("weight_hh_l0", npy(np.zeros((2, 6), np.float32))),
    "float64": put("bias_hh_l0", npy(np.zeros(6))),
    "integers": put("bias_hh_l0", npy(np.zeros(6, np.int32))),
    "pickle": put("bias_hh_l0", npy(np.array([Bomb()] * 6, object))),
    "bare pickle": put("bias_hh_l0", b"\x80\x04."),
    "object dtype without data": put("bias_hh_l0", npy_of("(6,)", "|O", bytes(48))),
    "text": put("bias_hh_l0", npy(np.array(["a"] * 6))),
    "huge shape": put("bias_hh_l0", npy_of(f"({2**40},)", data=bytes(24))),
    "shape over 2**63": put("bias_hh_l0", npy_of(f"({2**62}, {2**62})", data=bytes(24))),
    "shape with a hole": put("bias_hh_l0", npy_of(f"(0, {2**80})")),
    "negative shape": put("bias_hh_l0", npy_of("(-2, -3)", data=bytes(24))),
    "boolean shape": put("bias_hh_l0", npy_of("(True, 6)", data=bytes(24))),
    "shape of 10,000": put("bias_hh_l0", npy_of(str((1,) * 3000 + (6,)), data=bytes(24))),
    "deep nesting": put("bias_hh_l0", npy_of("(" * 9000, data=bytes(24))),
    "code as shape": put("bias_hh_l0", npy_of("__import__('os').mkdir('unpickled')")),
    "less data": put("bias_hh_l0", npy_of("(6,)", data=bytes(20))),
    "more data": put("bias_hh_l0", npy_of("(6,)", data=bytes(28))),
    "npy version 3": put("bias_hh_l0", npy_of("(6,)", data=bytes(24), version=(3, 0))),
    "npy version 9": put("bias_hh_l0", npy_of("(6,)", data=bytes(24), version=(9, 0))),
    "header: not JSON": header_text("hello"),
    "header: deep": header_text("[" * 100_000),
    "header: a list": header_text("[1]"),
    "header: a number": header_text("3"),
    "header: not UTF-8": put("rnnfast", npy(np.full(9, 0xFF, np.uint8))),
    "header: floats": put("rnnfast", npy(np.zeros(9, np.float32))),
    "header: huge number": header_text('{"format": ' + "9" * 10_000 + "}"),
    "format 2": header_with(format=2),
    "format '1'": header_with(format="1"),
    "class Recurrent": header_with(**{"class": "Recurrent"}),
    "class as list": header_with(**{"class": ["GRU"]}),
    "class LSTM": header_with(**{"class": "LSTM"}),
    "hidden_size 2**40": header_with(hidden_size=2**40),
    "hidden_size 2**200": header_with(hidden_size=2**200),
    "hidden_size -1": header_with(hidden_size=-1),
    "hidden_size 2.0": header_with(hidden_size=2.0),
    "hidden_size true": header_with(hidden_size=True),
    "hidden_size text": header_with(hidden_size="2"),
    "num_layers 2**40": header_with(num_layers=2**40),
    "num_layers 2": header_with(num_layers=2),
    "bidirectional": header_with(bidirectional=True),
    "bias false": header_with(bias=False),
    "reset_after 1": header_with(reset_after=1),
    "dropout NaN": header_with(dropout=float("nan")),
    "dtype float16": header_with(dtype="float16"),
    "dtype object": header_with(dtype="O"),
    "dtype a list": header_with(dtype=[["a", "f4"]]),
    "seed -1": header_with(seed=-1),
    "dropout_calls text": header_with(dropout_calls="3"),
    "dropout_calls 2**64": header_with(dropout_calls=2**64),
    "arguments a list": header_with(arguments=[]),
    "no arguments": header_with(arguments={}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_contents_that_do_not_fit_are_refused(name, saved, monkeypatch):
    module, path, _whole = saved
    monkeypatch.chdir(path.parent)
    write_zip(path, CHANGES[name](parts(path)))
    tracemalloc.start()
    try:
        assert load_damaged(module, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000, f"{peak} bytes for a file of {path.stat().st_size}"
    assert os.listdir(path.parent) == [path.name]


def test_a_compressed_bomb_is_refused_unread(saved):
    module, path, _ = saved
    members = {**parts(path), "bias_hh_l0.npy": bytes(200_000_000)}
    write_zip(path, members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 400_000
    tracemalloc.start()
    try:
        assert load_damaged(module, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_entries_within_entries_are_refused(saved):
    """Each entry is the data of the one around it, all correct: together many times the file."""
    _, path, _ = saved
    members = parts(path)
    data, starts = bytes(100_000), []
    for level in range(400):
        entry = zipfile.ZipInfo(f"n{level:03}.npy")
        data = npy_of(f"({len(data)},)", "|u1", data)
        entry.CRC, entry.file_size, entry.compress_size = zlib.crc32(data), len(data), len(data)
        header = entry.FileHeader()
        starts.append((entry, len(header) + len(data)))
        data = header + data
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
        end = archive.fp.tell() + len(data)
        archive.fp.write(data)
        archive.start_dir = end
        for entry, distance in starts:
            entry.header_offset = end - distance
            archive.filelist.append(entry)
    with zipfile.ZipFile(path) as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > 200 * path.stat().st_size
    tracemalloc.start()
    try:
        with pytest.raises(rnnfast.DamagedFileError, match=r"larger than the file|Overlapped"):
            rnnfast.load(path)  # newer versions of zipfile notice it themselves
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * path.stat().st_size


def test_an_entry_twice_is_refused(saved):
    module, path, _ = saved
    members = parts(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, [*members.items(), ("bias_hh_l0.npy", members["bias_hh_l0.npy"])])
    assert load_damaged(module, path)

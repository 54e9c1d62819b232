"""Files of named arrays with a header: NumPy's `.npz`, written whole or not at all.

Knows bytes, zip members and `.npy` headers; nothing of modules, whose arguments are a header here,
nor of the formats of others, which `checkpoints` reads with what it shares with these files.
Reading trusts nothing: it runs no code of the file's (no pickle) and reads at most its size.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from zipfile import ZipFile

HEADER = "rnnfast"  # the member that holds the header: JSON in UTF-8, as an array of bytes
FORMAT = 1
SAVED = "a file that rnnfast has saved"


class DamagedFileError(ValueError):
    """A file that is not what `load` or `load_torch` reads; the message names path and damage."""


def damaged(path: str, damage: str, needs: str = SAVED) -> NoReturn:
    """Raises DamagedFileError in its one form."""
    damage = damage if len(damage) <= 300 else damage[:300] + "..."
    raise DamagedFileError(f"{path}: got {damage}; needs {needs}")


def write(path: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` file; whatever happens, `path` is the old file or the new one, whole.

    The file is made beside its place, forced to the disk, then renamed. OSError tells what the
    system refused, and names `path`; nothing is left behind then.
    """
    import json

    text = json.dumps({"format": FORMAT, **header}).encode()
    members = {HEADER: np.frombuffer(text, np.uint8), **arrays}
    try:
        _replace(os.path.realpath(path), members)  # of a link, the file it means
    except OSError as error:
        if error.errno is None:
            raise
        # The temporary file's name would tell nobody anything.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _replace(path: str, members: Mapping[str, np.ndarray]) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Forces the renaming itself to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def read(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays of a file, in this machine's byte order, to be read only.

    Raises OSError if it cannot be read, DamagedFileError if it is not what `write` makes.
    """
    import json

    data = whole(path)
    with unzipped(path, data, ".npz file") as archive:
        members = {
            name.removesuffix(".npy"): _array(path, name, member)
            for name, member in stored(path, archive, len(data)).items()
        }
    if HEADER not in members:
        damaged(path, f"no entry {HEADER!r}")
    text = members.pop(HEADER)
    try:
        header = json.loads(text.tobytes().decode())
    except (ValueError, RecursionError) as error:
        damaged(path, f"unreadable header ({error})")
    if not isinstance(header, dict):
        damaged(path, "a header without fields")
    version = header.get("format")
    if type(version) is not int or version != FORMAT:
        damaged(path, f"format {version!r} where this version reads {FORMAT}")
    return header, members


def whole(path: str, needs: str = SAVED) -> bytes:
    """The bytes of a regular file: OSError if it cannot be read, DamagedFileError if it is none."""
    # Without waiting: a pipe has no end, and may have no beginning.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "something else"
            damaged(path, f"{kind} where a regular file belongs", needs)
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(status.st_size)
    if len(data) != status.st_size:
        damaged(path, f"{len(data)} of its {status.st_size} bytes", needs)
    return data


@contextlib.contextmanager
def unzipped(path: str, data: bytes, kind: str, needs: str = SAVED) -> Iterator[ZipFile]:
    """The zip archive that `data` is; what fails within the `with` is damage of the file's."""
    import io
    import zipfile

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield archive
    except (MemoryError, DamagedFileError):
        raise
    except Exception as error:  # zipfile meets damage with exceptions of many kinds
        damaged(path, f"no readable {kind} ({type(error).__name__}: {error})", needs)


def stored(path: str, archive: ZipFile, size: int, needs: str = SAVED) -> dict[str, bytes]:
    """The members of an archive of `size` bytes, which have no more bytes together."""
    members: dict[str, bytes] = {}
    total = 0
    for info in archive.infolist():
        name = info.filename
        if name in members:
            damaged(path, f"entry {name!r} twice", needs)
        # Stored as it is, so that no entry can grow, and none may be counted twice.
        total += info.file_size
        if info.compress_type != 0 or info.compress_size != info.file_size or total > size:
            damaged(path, f"entry {name!r} is compressed, or larger than the file", needs)
        members[name] = archive.read(info)  # checks the CRC
    return members


def _array(path: str, name: str, data: bytes) -> np.ndarray:
    """One member, its declared shape and dtype held against the bytes that there are."""
    import io

    if not name.endswith(".npy"):
        needs = f"{SAVED}; load_torch reads PyTorch's" if name.endswith("/data.pkl") else SAVED
        damaged(path, f"entry {name!r}, which is no array", needs)
    file = io.BytesIO(data)
    npy = np.lib.format
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        damaged(path, f"entry {name!r} has .npy version {version}")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind not in "fu" or dtype.hasobject:
        damaged(path, f"entry {name!r} holds {dtype}")
    count = 1
    for length in shape:
        if type(length) is not int or length < 0:
            damaged(path, f"entry {name!r} has shape {shape}")
        count *= length
    there = len(data) - file.tell()
    if count * dtype.itemsize != there:
        damaged(path, f"entry {name!r} of shape {shape} and {dtype} has {there} bytes")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    array = flat.reshape(shape, order="F" if fortran_order else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)  # a file may come from another machine

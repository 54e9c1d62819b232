"""Corpus: real text, split into a training part and a held-out part.

Knows files and strings. Leaves numbering tokens to `vocabulary`. The default text is one that every
machine has: the sources of Python's own standard library.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 10  # this share of the files, or of a single file's text, is held out

# Left out of the default text: what others installed, tests, generated tables, copies of old code.
_LEFT_OUT = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib",
    "encodings", "pydoc_data", "lib2to3", "turtledemo", "distutils", "ensurepip",
}  # fmt: skip


class DataError(ValueError):
    """A text that cannot be used; the message says which, and why."""


@dataclass(frozen=True)
class Corpus:
    """A text in two parts, and what names it exactly.

    `manifest` is a SHA-256 over the names and contents of all files in use: equal manifests mean
    equal texts, split in the same way.
    """

    train: str
    held_out: str
    manifest: str
    files: int


def standard_library(root: str | os.PathLike | None = None) -> Corpus:
    """The Python sources under `root` (None: Python's standard library), split by file.

    Files are taken in the order of their relative paths, and are held out by a hash of that path,
    so that the split is the same wherever the same files are. Files that are not UTF-8 are skipped.
    Raises DataError if nothing is left.

    >>> corpus = standard_library()
    >>> len(corpus.train) > 5 * len(corpus.held_out) > 0
    True
    """
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    train: list[str] = []
    held_out: list[str] = []
    manifest = hashlib.sha256()
    for name, path in sorted(_sources(root)):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(name.encode()).digest()
        part = train if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN else held_out
        part.append(text)
        manifest.update(digest + hashlib.sha256(content).digest())
    if not train or not held_out:
        raise DataError(f"{root}: too few Python sources to train on and to hold out")
    return Corpus(
        "\n".join(train), "\n".join(held_out), manifest.hexdigest(), len(train) + len(held_out)
    )


def _sources(root: Path) -> list[tuple[str, Path]]:
    """(relative path with forward slashes, path) of each Python source in use under `root`."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return found


def text_file(path: str | os.PathLike) -> Corpus:
    """The UTF-8 text of one file; its last part, one character in 10, is held out.

    Raises OSError if the file cannot be read, DataError if it is empty or not UTF-8.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "text")
    ...     _ = path.write_text("abcd" * 10)
    ...     corpus = text_file(path)
    >>> corpus.held_out
    'abcd'
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text, byte {error.start} is wrong") from None
    if not text:
        raise DataError(f"{path}: the file is empty")
    cut = len(text) - len(text) // HELD_OUT_ONE_IN
    return Corpus(text[:cut], text[cut:], hashlib.sha256(content).hexdigest(), 1)

"""Whose threads compute, and how many: PyTorch's, as long as nobody says otherwise.

Knows the OpenMP runtime that PyTorch has loaded, by its symbols. Its threads spin for milliseconds
after each of PyTorch's operations; workers of our own would fight with them for the cores.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

from .. import _kernels, checks, config

SYMBOLS = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"


def call_threads() -> int:
    """How many threads a call may use: as many as PyTorch, unless rnnfast was told a number."""
    return config.threads if config.told else min(torch.get_num_threads(), checks.MAX_THREADS)


def share_threads() -> bool:
    """Makes PyTorch's OpenMP threads our workers; False where it has none that we know how to ask,
    and while another thread is in a call.

    Linux only: the libraries of a process are read from /proc. RNNFAST_OWN_THREADS=1 forbids it.
    """
    if os.environ.get("RNNFAST_OWN_THREADS", "") not in ("", "0"):
        return False
    for path in _openmp_libraries():
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in SYMBOLS]
        except (OSError, AttributeError):
            continue
        return _kernels.use_threads(*found)
    return False


def _openmp_libraries() -> list[str]:
    """Paths of OpenMP runtimes in this process, PyTorch's own copy first."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    paths = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b\S*)$", maps, re.MULTILINE)
    folder = str(Path(torch.__file__).parent)
    return sorted(dict.fromkeys(paths), key=lambda path: not path.startswith(folder))

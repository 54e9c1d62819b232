"""The process-wide settings: threads, plan, isa; first read from the environment, at import.

Knows the compiled layer's lists of what there is. Leaves to the kernels what a setting does.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from . import _kernels, checks

# Read by functional on every call.
threads: int
plan: int
told = False  # whether somebody chose the threads; else they are a guess from the cores


def set_num_threads(n: int) -> None:
    """Sets how many threads a call may use, 1 to 256; small work takes fewer.

    No result depends on it. Raises TypeError or ValueError for anything but such an integer.

    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(before)
    """
    global threads, told
    threads = checks.integer("num_threads", n, 1, checks.MAX_THREADS)
    told = True


def get_num_threads() -> int:
    """How many threads a call may use; at first the cores this process may run on.

    >>> get_num_threads() >= 1
    True
    """
    return threads


def isa() -> str:
    """Name of the instruction set whose kernels are in use: "base", "avx2" or "avx512".

    >>> isa() in ("base", "avx2", "avx512")
    True
    """
    return _kernels.isa()


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Prints what this build and process use, or returns it as a dict with mode="dicts".

    >>> sorted(show_config("dicts"))
    ['dtypes', 'isa', 'isas', 'numpy', 'plan', 'plans', 'rnnfast', 'threads']
    """
    from . import __version__

    checks.choice("mode", mode, ("stdout", "dicts"))
    found = {
        "rnnfast": __version__,
        "numpy": np.__version__,
        "isa": isa(),
        "isas": tuple(_kernels.ISAS),
        "threads": threads,
        "plan": _kernels.PLANS[plan],
        "plans": tuple(_kernels.PLANS),
        "dtypes": ("float32", "float64"),
    }
    if mode == "dicts":
        return found
    for key, value in found.items():
        print(f"{key:8} {', '.join(value) if isinstance(value, tuple) else value}")
    return None


def _variable(name: str) -> str | None:
    """A variable of the environment; an empty one counts as not set."""
    return os.environ.get(name) or None


def read_environment() -> None:
    """Takes RNNFAST_NUM_THREADS, RNNFAST_PLAN and RNNFAST_ISA; a value that cannot be is an error.

    Raises ValueError with the variable, its value and the accepted ones.
    """
    global threads, plan, told
    threads = min(_kernels.cpu_count(), checks.MAX_THREADS)
    if (value := _variable("RNNFAST_NUM_THREADS")) is not None:
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else 0
        if not 1 <= number <= checks.MAX_THREADS:
            needs = f"an integer in 1..{checks.MAX_THREADS}"
            checks.fail(ValueError, "RNNFAST_NUM_THREADS", checks.describe(value), needs)
        threads, told = number, True
    value = _variable("RNNFAST_PLAN") or "auto"
    plan = _kernels.PLANS.index(checks.choice("RNNFAST_PLAN", value, _kernels.PLANS))
    value = _variable("RNNFAST_ISA") or "auto"
    checks.choice("RNNFAST_ISA", value, ("auto", *_kernels.ISAS))
    if not _kernels.set_isa(value):
        # The lists go from weakest to strongest, so what runs here is up to the best.
        _kernels.set_isa("auto")
        able = _kernels.ISAS[: _kernels.ISAS.index(_kernels.isa()) + 1]
        needs = f"what this CPU runs: {' or '.join(repr(name) for name in able)}"
        checks.fail(ValueError, "RNNFAST_ISA", checks.describe(value), needs)


read_environment()

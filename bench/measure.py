"""Checks one library after the other against the reference, then times them in rounds.

Knows workers' processes and the reference. Leaves every call of a library to `worker`, statistics
to `figures`, the choice of what is measured to `suite`.

How figures are taken: each library runs in a process of its own. Its results are checked against
`rnnfast.reference` in float64 before anything is timed. Then come rounds: in each round every
process has one turn, in random order, after an idle gap in which the threads of the one before
cease to spin; a turn counts as the median of its calls. One of the processes measures the machine's
peak, and for one row of a batch another its caches. A ratio or a share belongs to one round; what
is reported is the median over the rounds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

import rnnfast

from .. import reference
from . import models
from .figures import summary
from .happenings import happening
from .libraries import BANDWIDTH, DROP_IN, OURS, PEAK, Results, library, named
from .shapes import MODEL_MODES, Shape, problem

PAIRS = 30  # rounds, if the time is not up before
GAP = 0.02  # s between two turns, after the one before has settled
TURN = 0.02  # s that the calls of one turn may take
CALLS = 50  # at most, in one turn
FEW, SLOW = 3, 2.0  # after so many rounds, peers leave that take so many times the best one's time
PATIENCE = 60.0  # s that a library may take to get ready
SEED = 0

# Largest relative error (L2 norm) of an array, and of each step of y and dx, against the reference:
# forward, gradients. Ours are the project's promises. Peers promise nothing, but ten times as much
# still tells another formula, a dropped gradient or half precision from rounding.
BOUNDS = {"float32": (5e-6, 1e-5), "float64": (1e-13, 1e-12)}
PEERS_BOUND = 10


class WrongResults(Exception):
    """A library's results are not those of the reference, so there is nothing to time."""


class Unsupported(Exception):
    """A library has no such layer, and says so."""


class Failed(Exception):
    """A library's process has ended, or was not ready in time and was ended."""


@functools.lru_cache(maxsize=2)
def expected(shape: Shape, mode: str, seed: int = SEED) -> Results:
    """The arrays that a worker has to write, by the reference in float64.

    >>> from .shapes import shape_of
    >>> sorted(expected(shape_of("gru-i3-h5-b2-t7"), "inference"))
    ['h_n', 'y']
    """
    if mode in MODEL_MODES:
        return models.expected(shape, mode, seed)
    given = problem(shape, seed)

    def exact(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float64)

    weights = {name: exact(array) for name, array in given.weights.items()}
    state = tuple(map(exact, given.state))
    happens = happening(shape)
    between = happens.between
    if between is not None and mode != "training":  # masks are drawn in training alone
        between = happens.expected or between
    how = dict(lengths=given.lengths, mask=happens.mask, between=between)
    cell = shape.cell
    if happens.functions is not None:
        cell, how["functions"] = f"{cell}_general", happens.functions
    drops = mode == "training" and happens.keep_R is not None
    if drops:
        weights["weight_hh_l0"] = weights["weight_hh_l0"] * happens.keep_R
    y, state_n, tapes = reference.stack_forward(cell, exact(given.x), state, weights, **how)
    if mode != "training":
        return named(y, state_n)
    grads = reference.stack_backward(cell, tapes, weights, exact(given.dy), None, **how)
    if drops:
        grads["weight_hh_l0"] = grads["weight_hh_l0"] * happens.keep_R
    return named(y, state_n, grads.pop("x"), grads.pop("state"), grads)


def check(got: Results, want: Results, dtype: str, times: float = 1) -> float:
    """Judges results, against the reference's, by `times` the bounds of the dtype.

    Each array is judged as a whole, and y and dx at each step. Returns the worst error as a
    fraction of its bound. Raises WrongResults with the array, its error and the bound.

    >>> check({"y": np.ones((1, 1, 1), np.float32)}, {"y": np.ones((1, 1, 1))}, "float32")
    0.0
    """
    worst = 0.0
    if got.keys() != want.keys():
        raise WrongResults(f"got {', '.join(sorted(got))}; needs {', '.join(sorted(want))}")
    for name, right in want.items():
        array = got[name]
        if array.shape != right.shape or array.dtype != dtype:
            raise WrongResults(
                f"{name}: got {array.dtype} {array.shape}; needs {dtype} {right.shape}"
            )
        bound = times * BOUNDS[dtype][name.startswith("d")]
        parts = {name: (array, right)}
        if name in ("y", "dx"):
            steps = enumerate(zip(array, right, strict=True))
            parts |= {f"{name}[{t}]": pair for t, pair in steps}
        for part, (here, there) in parts.items():
            wrong, size = np.linalg.norm((here - there).ravel()), np.linalg.norm(there.ravel())
            error = wrong / size if size else (math.inf if wrong else 0.0)  # padding is zero
            if not error <= bound:  # a NaN is not
                raise WrongResults(f"{part}: relative error {error:.2g}; needs {bound:.0e} or less")
            worst = max(worst, float(error / bound))
    return worst


class Worker:
    """A library's process, to be used in a `with` statement; see `worker` for what it understands.

    `library` is the name that its results go by. `about` has its versions; it is None, and
    `missing` says why, if the library is not here. isa: None, or "avx2", beyond which the library
    is not to go.
    """

    def __init__(
        self, name: str, threads: int, isa: str | None = None, patience: float = PATIENCE
    ) -> None:
        self.library = OURS if name == DROP_IN else name
        self.threads, self.patience = threads, patience
        self._runs, self._isa = name, isa
        self._process: subprocess.Popen[str] | None = None
        self._start()

    def _start(self) -> None:
        # -P: the installed package, also in a folder that has sources of it.
        module = "rnnfast.bench.worker"
        command = [sys.executable, "-P", "-m", module, self._runs, str(self.threads)]
        told = library(self._runs).environment(self.threads, self._isa)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, **told},
            start_new_session=True,  # Ctrl-C is for the suite, which then ends its workers
        )
        try:
            hello = self._answer(self.patience)
        except BaseException:
            self.__exit__()
            raise
        self.about: dict[str, str] | None = hello.get("about")
        self.missing: str | None = hello.get("missing")

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return self._process and self._process.pid

    def ask(self, patience: float | None = None, **request: Any) -> dict[str, Any]:
        """One request and its answer; after Failed, by a new process."""
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells of it
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer(patience)

    def _answer(self, patience: float | None) -> dict[str, Any]:
        pipe = self._process.stdout
        if not select.select([pipe], [], [], patience)[0]:
            self._process.kill()
            self.__exit__()
            raise Failed(f"not ready within {patience:g} s")
        line = pipe.readline()
        if not line:
            code = self._process.wait()
            self.__exit__()
            raise Failed(f"the worker of {self.library} ended with code {code}")
        return json.loads(line)

    def results(self, shape: Shape, mode: str, seed: int = SEED) -> tuple[Results, dict[str, Any]]:
        """Makes the worker ready for a shape; its results, and what it says of its first calls.

        Raises Unsupported if the library has no such layer, WrongResults if it fails at it, Failed
        if it ends or takes too long.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "results.npz"))
            asked = {"shape": shape.name, "mode": mode, "seed": seed, "results": path}
            answer = self.ask(self.patience, do="prepare", **asked)
            if "unsupported" in answer:
                raise Unsupported(answer["unsupported"])
            if "error" in answer:
                raise WrongResults(answer["error"])
            with np.load(path) as file:
                return dict(file), answer

    def turn(self, seconds: float = TURN, most: int = CALLS) -> list[float]:
        """Seconds of each of a few calls of what was made ready."""
        answer = self.ask(do="time", seconds=seconds, most=most)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):  # of what was not written yet
            process.stdin.close()
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:  # in the middle of a call
            process.kill()
            process.wait()
        process.stdout.close()


class Others:
    """How many cores' worth of work the machine did that was not ours; Linux only.

    pids: of our processes, beside this one.
    """

    def __init__(self, pids: Iterable[int | None]) -> None:
        self._pids = [os.getpid(), *filter(None, pids)]
        self._began = self._now()

    def cores(self) -> float | None:
        """Since the start; None where the system does not tell.

        >>> cores = Others([]).cores()
        >>> cores is None or cores >= 0
        True
        """
        now = self._now()
        if now is None or self._began is None:
            return None
        clock, busy, own = (a - b for a, b in zip(now, self._began, strict=True))
        return round(max(busy - own, 0) / max(clock, 1e-9), 3)

    def _now(self) -> tuple[float, float, float] | None:
        """The clock, seconds of all cores that were not idle, and those of our processes."""
        tick = os.sysconf("SC_CLK_TCK")
        try:
            line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
            own = 0
            for pid in self._pids:
                fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
                own += sum(map(int, fields.split()[11:13]))  # utime, stime
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft, steal = map(int, line[1:9])
        busy = user + nice + system + interrupts + soft + steal
        return time.monotonic(), busy / tick, own / tick


def measure(
    shape: Shape, mode: str, workers: Iterable[Worker], limit: float | None = None,
    pairs: int = PAIRS, seed: int = SEED,
) -> dict[str, Any]:  # fmt: skip
    """One row: checks the libraries, then times those that are right, in rounds; see `summary`.

    limit: how many seconds the rounds may take before there are `pairs` of them, at least one
    being made.
    """
    workers, want = list(workers), expected(shape, mode, seed)
    counted, errors, left_out, ready, first = {}, {}, {}, [], {}
    refused = False
    for worker in workers:
        name = worker.library
        try:
            got, told = worker.results(shape, mode, seed)
            if name not in (PEAK, BANDWIDTH):
                errors[name] = check(got, want, shape.dtype, 1 if name == OURS else PEERS_BOUND)
        except Unsupported as reason:
            left_out[name] = f"cannot: {reason}"
            continue
        except Failed as reason:
            left_out[name] = f"failed: {reason}"
            refused |= name == OURS
            continue
        except WrongResults as reason:
            left_out[name] = f"refused: {reason}"
            refused = True
            continue
        counted[name] = told["counted"] or shape.operations(mode)
        memory = told["memory"] or {"first": None, "second": None}
        first[name] = {
            "ready_ms": 1e3 * told["ready"],
            "first_ms": 1e3 * told["first"],
            "first_bytes": memory["first"],
            "bytes": memory["second"],
        }
        ready.append(worker)

    others = Others(worker.pid for worker in workers)
    rounds, failed = _rounds(ready, limit, pairs, seed)
    left_out |= {name: f"failed: {reason}" for name, reason in failed.items()}
    refused |= OURS in failed
    found = summary(rounds, counted, shape.bytes_read(mode))
    for name, figures in found.items():
        figures.update(first[name])
        if shape.B == 1 and name not in (PEAK, BANDWIDTH):
            figures["us_per_step"] = 1e3 * figures["median_ms"] / shape.T
    return {
        "shape": shape.name,
        "stands_for": shape.stands_for,
        "mode": mode,
        "pairs": max(map(len, rounds.values()), default=0),
        "others": others.cores(),
        "error_over_bound": errors,
        "left_out": left_out,
        "refused": refused,
        "results": found,
    }


def _rounds(
    workers: list[Worker], limit: float | None, pairs: int, seed: int
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """The turns of each worker, by round, and why those without any failed.

    Peers far behind are in the first few rounds only.
    """
    order, turns = random.Random(seed), list(workers)
    rounds: dict[str, list[list[float]]] = {worker.library: [] for worker in workers}
    failed: dict[str, str] = {}
    began = time.monotonic()
    for made in range(pairs):
        if made and limit is not None and time.monotonic() - began >= limit:
            break
        if made == FEW:
            turns = [w for w in turns if w.library not in _behind(rounds)]
        order.shuffle(turns)
        for worker in list(turns):
            time.sleep(GAP)
            try:
                rounds[worker.library].append(worker.turn())
            except Failed as reason:
                turns.remove(worker)
                del rounds[worker.library]
                failed[worker.library] = str(reason)
    return rounds, failed


def _behind(rounds: dict[str, list[list[float]]]) -> set[str]:
    """Peers that are not going to be the best one."""
    medians = {
        name: statistics.median(map(statistics.median, turns))
        for name, turns in rounds.items()
        if name not in (OURS, PEAK, BANDWIDTH)
    }
    best = min(medians.values(), default=0.0)
    return {name for name, median in medians.items() if median > SLOW * best}


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code: the machine, and the versions of what runs on it.

    >>> machine()["rnnfast"] == rnnfast.__version__
    True
    """
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": rnnfast.isa(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rnnfast": rnnfast.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load": [round(load, 2) for load in os.getloadavg()],
    }

"""Times one layer, forward and forward + backward, of this library, its peers and the machine.

Knows workers, the reference, and statistics of pairs. Leaves every call of a library to `worker`,
and the shapes to `shapes`. Run as `python -m rnnfast.bench.layers`.

How figures are taken: each library runs in a process of its own. Its results are checked against
`rnnfast.reference` in float64 before anything is timed. Then come rounds: in each round every
process has one turn, in random order, after an idle gap in which the threads of the one before
cease to spin; a turn counts as the median of its calls. One of the processes measures the machine's
peak. A ratio or a share belongs to one round; what is reported is the median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

import rnnfast

from .. import checks, reference
from .shapes import MODES, SHAPES, Shape, problem, shape_of

OURS, PEERS, PEAK = "rnnfast", ("torch",), "peak"

PAIRS = 30  # rounds, if the time is not limited
GAP = 0.02  # s between two turns: of all, threads of PyTorch spin longest after a call, some 8 ms
TURN = 0.02  # s that the calls of one turn may take
CALLS = 50  # at most, in one turn
SEED = 0
BUSY = 0.25  # load per core, before anything is measured, from which on others are in the way

# Largest relative error (L2 norm) of an array, and of each step of y and dx, against the reference:
# forward, gradients. Ours are the project's promises. Peers promise nothing, but ten times as much
# still tells another formula, a dropped gradient or half precision from rounding.
BOUNDS = {"float32": (5e-6, 1e-5), "float64": (1e-13, 1e-12)}
PEERS_BOUND = 10

Results = dict[str, np.ndarray]


class WrongResults(Exception):
    """A library's results are not those of the reference, so there is nothing to time."""


def expected(shape: Shape, mode: str, seed: int = SEED) -> Results:
    """The arrays that a worker has to write, by the reference in float64.

    >>> sorted(expected(shape_of("gru-i3-h5-b2-t7"), "inference"))
    ['h_n', 'y']
    """
    given = problem(shape, seed)

    def exact(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(array.astype(np.float64) for array in arrays)

    x, dy = exact(given.x, given.dy)
    state, weights = exact(*given.state), exact(*given.weights.values())
    y, state_n, tape = reference.forward(shape.cell, x, tuple(s[0] for s in state), weights)
    results = {"y": y, **{n: s[None] for n, s in zip(("h_n", "c_n"), state_n, strict=False)}}
    if mode == "training":
        grads = reference.backward(shape.cell, x, tape, weights, dy, None)
        dstate = zip(("dh_0", "dc_0"), grads.pop("state"), strict=False)
        results.update({name: s[None] for name, s in dstate})
        results.update((f"d{name}", array) for name, array in grads.items())
    return results


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
            parts |= {f"{name}[{t}]": pair for t, pair in enumerate(zip(array, right, strict=True))}
        for part, (here, there) in parts.items():
            error = np.linalg.norm((here - there).ravel()) / np.linalg.norm(there.ravel())
            if not error <= bound:  # a NaN is not
                raise WrongResults(f"{part}: relative error {error:.2g}; needs {bound:.0e} or less")
            worst = max(worst, float(error / bound))
    return worst


class Unsupported(Exception):
    """A library has no such layer, and says so."""


class Worker:
    """A library's process, to be used in a `with` statement; see `worker` for what it understands.

    `about` has its versions; it is None, and `missing` says why, if the library is not here.
    """

    def __init__(self, library: str, threads: int) -> None:
        self.library = library
        command = [sys.executable, "-m", "rnnfast.bench.worker", library, str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        try:
            hello = self._answer()
        except BaseException:
            self.__exit__()
            raise
        self.about: dict[str, str] | None = hello.get("about")
        self.missing: str | None = hello.get("missing")

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer. Raises RuntimeError if the process has ended."""
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells of it
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"the worker of {self.library} ended with code {code}")
        return json.loads(line)

    def results(self, shape: Shape, mode: str, seed: int = SEED) -> tuple[Results, float | None]:
        """Makes the worker ready for a shape; its results, and its operations if it counts them.

        Raises Unsupported if the library has no such layer, WrongResults if it fails at it.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "results.npz"))
            asked = {"shape": shape.name, "mode": mode, "seed": seed, "results": path}
            answer = self.ask(do="prepare", **asked)
            if "unsupported" in answer:
                raise Unsupported(answer["unsupported"])
            if "error" in answer:
                raise WrongResults(answer["error"])
            with np.load(path) as file:
                return dict(file), answer["operations"]

    def turn(self, seconds: float = TURN, most: int = CALLS) -> list[float]:
        """Seconds of each of a few calls of what was made ready."""
        answer = self.ask(do="time", seconds=seconds, most=most)
        if "error" in answer:
            raise RuntimeError(f"{self.library}: {answer['error']}")
        return answer["seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # of what was not written yet
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval that has the median of what `values` are drawn from, at least so surely.

    Order statistics: whatever the distribution, each value is above its median with probability
    1/2. Too few values give their whole range, which is less sure.

    >>> median_interval(range(1, 31))
    (10, 21)
    """
    ordered, n = sorted(values), len(values)
    below, outside = 0.0, 0
    while outside < n // 2:
        below += math.comb(n, outside) / 2**n
        if 2 * below > 1 - confidence:
            break
        outside += 1
    outside = max(outside - 1, 0)
    return ordered[outside], ordered[-1 - outside]


def measure(
    shape: Shape, mode: str, workers: Iterable[Worker], seconds: float | None = None,
    pairs: int = PAIRS, seed: int = SEED,
) -> dict[str, Any]:  # fmt: skip
    """One row: checks the libraries, then times those that are right, in rounds; see `summary`.

    seconds: how long the rounds may take, at least one being made; None: as long as `pairs` rounds
    take.
    """
    want = expected(shape, mode, seed)
    operations, errors, left_out, ready = {}, {}, {}, []
    refused = False
    for worker in workers:
        try:
            got, counted = worker.results(shape, mode, seed)
            if worker.library != PEAK:
                times = 1 if worker.library == OURS else PEERS_BOUND
                errors[worker.library] = check(got, want, shape.dtype, times)
        except Unsupported as reason:
            left_out[worker.library] = f"cannot: {reason}"
            continue
        except WrongResults as reason:
            left_out[worker.library] = f"refused: {reason}"
            refused = True
            continue
        operations[worker.library] = counted or shape.operations(mode)
        ready.append(worker)

    order, rounds = random.Random(seed), {worker.library: [] for worker in ready}
    turns = list(ready)
    ends = time.monotonic() + (math.inf if seconds is None else seconds)
    made = 0
    while ready and (made == 0 or (made < pairs if seconds is None else time.monotonic() < ends)):
        order.shuffle(turns)
        for worker in turns:
            time.sleep(GAP)
            rounds[worker.library].append(worker.turn())
        made += 1
    row = {"shape": shape.name, "stands_for": shape.stands_for, "mode": mode, "pairs": made}
    return row | {
        "error_over_bound": errors,
        "left_out": left_out,
        "refused": refused,
        "results": summary(rounds, operations),
        "seconds": rounds,
    }


def summary(
    rounds: dict[str, list[list[float]]], operations: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Figures of each library from the seconds of its calls, by round, and one call's operations.

    - `median_ms`, `min_ms`: median over the rounds (each the median of its calls); the least call
    - `gflops`, `best_gflops`: by these two
    - `share`, `best_share`: of the peak in the same round (median over the rounds); best of best
    - `ratio`, `ratio_interval`: this peer's time over ours in the same round, and where the median
      lies at 95 %

    >>> found = summary({"rnnfast": [[1.0, 2.0, 3.0]], "torch": [[4.0]]}, dict(rnnfast=1, torch=1))
    >>> found["rnnfast"]["median_ms"], found["torch"]["ratio"]
    (2000.0, 2.0)
    """
    turns = {name: [statistics.median(calls) for calls in turn] for name, turn in rounds.items()}
    least = {name: min(map(min, turn)) for name, turn in rounds.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in turns.items():
        median = statistics.median(seconds)
        found[name] = row = {
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * least[name],
            "gflops": operations[name] / median / 1e9,
            "best_gflops": operations[name] / least[name] / 1e9,
        }
        if PEAK in turns and name != PEAK:
            work = operations[name] / operations[PEAK]
            shares = [work * p / s for p, s in zip(turns[PEAK], seconds, strict=True)]
            row["share"] = statistics.median(shares)
            row["best_share"] = work * least[PEAK] / least[name]
        if OURS in turns and name not in (OURS, PEAK):
            ratios = [t / s for t, s in zip(seconds, turns[OURS], strict=True)]
            row["ratio"] = statistics.median(ratios)
            row["ratio_interval"] = median_interval(ratios)
    return found


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


def say_where(about: dict[str, Any]) -> None:
    """Prints what `machine` found, and whether the machine has other things to do."""
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if about["load"][0] > BUSY * about["cores"]:
        print(f"The machine was busy (load {about['load'][0]}): judge no time by this run.")


HEADER = (
    "shape", "mode", "threads", "ms (min)", "GFLOP/s", "of the peak (best)",
    "peer", "peer ms (min)", "peer / ours (95 %)",
)  # fmt: skip


def lines(row: dict[str, Any]) -> list[list[str]]:
    """A row of results as lines of text under `HEADER`, one for each peer, at least one."""
    results, left_out = row["results"], row["left_out"]
    ours = results.get(OURS)
    first = [row["shape"], row["mode"], str(row["threads"])]
    if ours is None:
        first += [left_out[OURS], "", ""]
    else:
        first += [
            f"{ours['median_ms']:.3g} ({ours['min_ms']:.3g})",
            f"{ours['gflops']:.3g}",
            f"{ours['share']:.0%} ({ours['best_share']:.0%})" if "share" in ours else "",
        ]
    found = []
    for peer in (name for name in PEERS if name in results or name in left_out):
        if peer in left_out:
            found.append([*first, peer, left_out[peer], ""])
            continue
        theirs = results[peer]
        ratio = ""
        if "ratio" in theirs:
            low, high = theirs["ratio_interval"]
            ratio = f"{theirs['ratio']:.2f} ({low:.2f} to {high:.2f})"
        times = f"{theirs['median_ms']:.3g} ({theirs['min_ms']:.3g})"
        found.append([*first, peer, times, ratio])
    return found or [[*first, "", "", ""]]


def show(header: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    """Prints a table: in Markdown, or drawn by rich where that is installed and has a terminal."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Column, Table
        except ImportError:
            pass
        else:
            others = (Column(name, overflow="fold") for name in header[1:])
            drawn = Table(Column(header[0], no_wrap=True), *others)
            for line in table:
                drawn.add_row(*line)
            Console().print(drawn)
            return
    for line in (header, ["---"] * len(header), *table):
        print(f"| {' | '.join(line)} |")


def write_json(path: str, found: dict[str, Any]) -> None:
    """Writes what was measured, for other programs to read."""
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which otherwise keeps the message of a ValueError to itself."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _threads(text: str) -> int:
    return checks.integer("threads", int(text), 1, checks.MAX_THREADS)


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; the exit code is 1 if any library was refused for its results."""
    parser = argparse.ArgumentParser(prog="python -m rnnfast.bench.layers", description=__doc__)
    table, shape, threads = list(SHAPES.values()), _argument(shape_of), _argument(_threads)
    parser.add_argument("--shapes", nargs="+", metavar="NAME", default=table, type=shape)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    now = [rnnfast.get_num_threads()]
    parser.add_argument("--threads", nargs="+", metavar="N", default=now, type=threads)
    parser.add_argument("--seconds", type=float, help=f"for each row; default: {PAIRS} rounds")
    parser.add_argument("--json", metavar="FILE", help="all figures, and the times they come from")
    args = parser.parse_args(argv)

    found: dict[str, Any] = {"machine": machine(), "peers": {}, "missing": {}, "rows": []}
    for threads in args.threads:
        _measure_all(found, args.shapes, args.modes, threads, args.seconds)
    say_where(found["machine"] | found["peers"])
    for peer, reason in found["missing"].items():
        print(f"{peer}: missing ({reason})")
    print()
    show(HEADER, [line for row in found["rows"] for line in lines(row)])
    if args.json:
        write_json(args.json, found)
    return int(any(row["refused"] for row in found["rows"]))


def _measure_all(
    found: dict[str, Any], shapes: Sequence[Shape], modes: Sequence[str], threads: int,
    seconds: float | None,
) -> None:  # fmt: skip
    """Adds rows to `found`, by processes that serve them all; tells on stderr how far it is."""
    with contextlib.ExitStack() as stack:
        workers = []
        for library in (OURS, *PEERS, PEAK):
            worker = stack.enter_context(Worker(library, threads))
            if worker.about is None:
                found["missing"][library] = worker.missing
                continue
            found["peers"].update(worker.about if library in PEERS else {})
            workers.append(worker)
        for shape in shapes:
            for mode in modes:
                print(f"{shape.name} {mode}, {threads} threads", file=sys.stderr, flush=True)
                row = measure(shape, mode, workers, seconds)
                found["rows"].append({"threads": threads, **row})


if __name__ == "__main__":
    raise SystemExit(main())

"""The suite as a command: what is measured, in which order, and where the results go.

Knows options, files and processes' lives; leaves measuring to `measure`, words to `report`. Run as
`rnnfast bench` or `python -m rnnfast.bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import rnnfast

from .. import checks
from .compare import compared, key
from .libraries import BANDWIDTH, DROP_IN, OURS, PEAK, PEERS, library
from .measure import PAIRS, PATIENCE, Failed, Worker, machine, measure
from .report import BUSY, Found, about, markdown, read, rounded, show, tables, to_json, write
from .shapes import MODEL_MODES, MODES, SUITES, Shape, shape_of

LIMIT = 60.0  # s that the rounds of one row may take
MACHINE = ("cpu", "cores", "system", "isa", "python", "numpy", "rnnfast")  # of runs that are one


class Job(NamedTuple):
    """One row to be measured."""

    shape: Shape
    mode: str
    threads: int


class Crew:
    """The workers of a run: one for each library and number of threads, started when needed."""

    def __init__(self, peers: list[str], isa: str | None, patience: float) -> None:
        self.peers, self.isa, self.patience = peers, isa, patience
        self.missing: dict[str, str] = {}
        self.about: dict[str, dict[str, str]] = {}
        self._workers: dict[tuple[str, int], Worker] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, job: Job) -> list[Worker]:
        """Those that are asked for this row; the caches' only if it is about one row of a batch.

        Raises ValueError if this library does not start.
        """
        names = (OURS, DROP_IN, *self.peers, PEAK, *[BANDWIDTH] * (job.shape.B == 1))
        asked = (name for name in names if job.mode in library(name).modes)
        return [w for name in asked if (w := self._worker(name, job.threads)) is not None]

    def _worker(self, name: str, threads: int) -> Worker | None:
        """Of a library with so many threads; None if it is missing."""
        if name in self.missing or (name, threads) in self._workers:
            return self._workers.get((name, threads))
        needed = name in (OURS, DROP_IN)
        try:
            worker = Worker(name, threads, self.isa, self.patience)
        except Failed as reason:
            if needed:
                raise ValueError(f"{reason}, as it said above") from None
            self.missing[name] = str(reason)
            return None
        self._stack.enter_context(worker)
        if worker.about is None:
            if needed:
                raise ValueError(worker.missing)
            self.missing[name] = worker.missing
            return None
        self.about.setdefault(name, worker.about)
        self._workers[name, threads] = worker
        return worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "--suite", nargs="+", choices=SUITES, metavar="NAME",
        help=f"tables of shapes: {', '.join(SUITES)} (default: layers)",
    )  # fmt: skip
    shapes = "instead: CELL-iI-hH[-pP]-bB-tT[-lL][-bi][-uneven][-float64] ..."
    add("--shapes", nargs="+", metavar="SHAPE", type=_argument(shape_of), help=shapes)
    modes = (*MODES, *MODEL_MODES)
    add("--modes", nargs="+", choices=modes, help="default: as the suite says")
    add(
        "--threads", nargs="+", metavar="N", type=_argument(_threads),
        help="default: 1 and 2; of the suite threads 1, 2, 4, ... up to all cores",
    )  # fmt: skip
    add(
        "--peers", nargs="*", choices=PEERS, metavar="NAME",
        help=f"beside which libraries: {', '.join(PEERS)} (default: all that are installed)",
    )  # fmt: skip
    add(
        "--seconds", type=_argument(_seconds), default=LIMIT, metavar="S",
        help=f"that a row's {PAIRS} rounds may take (default: %(default)g)",
    )  # fmt: skip
    add(
        "--patience", type=_argument(_seconds), default=PATIENCE, metavar="S",
        help="that a library may take to get ready for a row (default: %(default)g)",
    )  # fmt: skip
    add("--isa", choices=("avx2",), help="hold all sides to AVX2, where they can be held")
    add("--json", metavar="FILE", help="all figures; written after each row")
    add("--append", action="store_true", help="keep what --json has, but for rows measured again")
    add("--markdown", metavar="FILE", help="the tables")
    add("--picture", metavar="FILE", help="PNG or SVG: ratios and roofline (needs matplotlib)")
    add(
        "--compare", nargs=2, metavar=("OLD", "NEW"),
        help="measure nothing; show what changed between two files of --json",
    )  # fmt: skip
    add("--show", metavar="FILE", help="measure nothing; show what a file of --json holds")


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


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds >= 0:
        raise ValueError(f"seconds: got {text}; needs a number of at least 0")
    return seconds


def jobs(args: argparse.Namespace) -> list[Job]:
    """The rows that the options ask for, those of one shape next to each other.

    Raises ValueError for a stream of what cannot be one.
    """
    cores = len(os.sched_getaffinity(0))
    few = sorted({1, min(2, cores)})
    powers = [2**k for k in range(cores.bit_length())]
    found: dict[Job, None] = {}
    if args.shapes:
        chosen = [(args.shapes, ("inference", "training"), few)]
    else:
        suites = [SUITES[name] for name in args.suite or ["layers"]]
        every = sorted({*powers, cores})
        chosen = [(s.shapes, s.modes, every if s.all_threads else few) for s in suites]
    for shapes, modes, threads in chosen:
        for shape in shapes:
            for mode in args.modes or modes:
                if mode == "stream" and (shape.directions == 2 or shape.uneven):
                    raise ValueError(
                        f"--modes stream: got {shape.name}; needs one direction and even lengths"
                    )
                found.update((Job(shape, mode, n), None) for n in args.threads or threads)
    return list(found)


def begun(args: argparse.Namespace, crew: Crew) -> Found:
    """A run without rows yet; with --append, and the file there, the rows that it has."""
    found = {
        "machine": machine() | {"isa": args.isa or rnnfast.isa()},
        "peers": {},
        "missing": {},
        "not_held": [name for name in crew.peers if args.isa and not library(name).holds_isa],
        "rows": [],
    }
    if args.append and Path(args.json).exists():
        old = read(args.json)
        for name in MACHINE:
            if old["machine"].get(name) != found["machine"][name]:
                raise ValueError(
                    f"--append: got {args.json} with {name} {old['machine'].get(name)}; "
                    f"needs {found['machine'][name]}, as it is now"
                )
        found["rows"], found["peers"] = old["rows"], old["peers"]
    return found


def measured(found: Found, work: list[Job], crew: Crew, args: argparse.Namespace) -> None:
    """Adds rows to `found`, and writes it after each; a disturbed row is measured once more."""
    for number, job in enumerate(work, 1):
        shape, mode, threads = job
        threads_text = f"{threads} thread{'s' * (threads > 1)}"
        what = f"[{number}/{len(work)}] {shape.name} {mode}, {threads_text}"
        print(what, file=sys.stderr, flush=True)
        workers = crew.of(job)
        row = measure(shape, mode, workers, args.seconds)
        if (row["others"] or 0) > BUSY:
            print(f"others had {row['others']} cores: once more", file=sys.stderr, flush=True)
            row = min(row, measure(shape, mode, workers, args.seconds), key=_disturbance)
        row = {"threads": threads, "isa": found["machine"]["isa"], **row}
        for name, versions in crew.about.items():
            if name in PEERS and found["peers"].setdefault(name, versions) != versions:
                raise ValueError(
                    f"--append: got {name} {versions}; needs {found['peers'][name]}, as in "
                    f"{args.json}"
                )
        found["missing"] = {name: why for name, why in crew.missing.items() if name in PEERS}
        places = {key(old): place for place, old in enumerate(found["rows"])}
        place = places.get(key(row))
        if place is None:
            found["rows"].append(row)
        else:
            found["rows"][place] = row
        if args.json:
            write(args.json, to_json(found))


def _disturbance(row: dict[str, Any]) -> float:
    return row["others"] or 0.0


def finish(found: Found, args: argparse.Namespace) -> None:
    """Shows a run, by the figures that its file has, and writes what else was asked for."""
    found = rounded(found)
    for line in about(found):
        print(line)
    print()
    show(tables(found))
    if args.markdown:
        write(args.markdown, markdown(found))
    if args.picture:
        from .picture import draw

        draw(found, args.picture)


def run(args: argparse.Namespace) -> int:
    """The command: 0, or 1 if results were refused or, with --compare, rows became slower.

    Raises ValueError for options and files that do not fit, OSError, and KeyboardInterrupt after
    it has shown and written what was measured until then.
    """
    if args.compare:
        table, regressions = compared(*map(read, args.compare))
        show([table])
        return int(regressions > 0)
    if args.show:
        finish(read(args.show), args)
        return 0
    if args.append and not args.json:
        raise ValueError("--append: got no --json; needs the file to be appended to")
    if args.picture:
        from .picture import needs_matplotlib

        needs_matplotlib()
    work = jobs(args)
    peers = list(PEERS) if args.peers is None else [name for name in PEERS if name in args.peers]
    with Crew(peers, args.isa, args.patience) as crew:
        found = begun(args, crew)
        try:
            measured(found, work, crew, args)
        except KeyboardInterrupt:
            crew.__exit__()
            finish(found, args)
            raise
    finish(found, args)
    return int(any(row["refused"] for row in found["rows"]))

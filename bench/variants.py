"""What each variant of a layer costs beside the plain LSTM of its sizes, in turns with it.

Knows the shapes of the suite `family`, and this library as `libraries.ours` calls it. Results are
checked against `rnnfast.reference` before anything is timed. In one process: a ratio is of two
calls of the same round, which a machine shared with others slows down alike; between two rows of
`rnnfast bench` lie seconds. Run as `python -m rnnfast.bench.variants`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import rnnfast

from .libraries.ours import Ours
from .measure import SEED, check, expected, machine
from .overhead import call_seconds
from .report import Table, show
from .shapes import SUITES, Shape, problem, shape_of


def calls_of(shapes: Sequence[Shape], mode: str, threads: int) -> dict[str, Callable]:
    """A call of each shape that has this mode, by its name; raises WrongResults.

    >>> list(calls_of([shape_of("gru-i3-h5-b2-t7")], "training", 1))
    ['gru-i3-h5-b2-t7']
    """
    ours, calls = Ours(threads), {}
    for shape in shapes:
        try:
            call, arrays = ours.prepare(shape, mode, problem(shape, SEED))
        except NotImplementedError:  # gradients that are clipped, in inference
            continue
        check(arrays(call()), expected(shape, mode), shape.dtype)
        calls[shape.name] = call
    return calls


def main(argv: list[str] | None = None) -> int:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(prog="python -m rnnfast.bench.variants", description=__doc__)
    parser.add_argument(
        "shapes", nargs="*", type=shape_of, default=SUITES["family"].shapes,
        help="names of shapes (default: those of the suite family)",
    )  # fmt: skip
    parser.add_argument("--mode", choices=("training", "inference"), default="training")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=60, help="default: %(default)s")
    args = parser.parse_args(argv)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    plain = replace(args.shapes[0], cell="lstm", projection=0, happens="")
    shapes = list(dict.fromkeys([plain, *args.shapes]))
    calls = calls_of(shapes, args.mode, args.threads)
    print(f"{args.mode}, isa {rnnfast.isa()}, threads {args.threads}, {args.rounds} rounds\n")
    seconds = call_seconds(calls, args.rounds, 1)
    lines = []
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds[plain.name], strict=True)]
        times = statistics.median(ratios), min(found) / min(seconds[plain.name])
        ms = [1e3 * value for value in (statistics.median(found), min(found))]
        lines.append(
            [name, *(f"{value:.3g}" for value in ms), *(f"{value:.2f}" for value in times)]
        )
    header = "shape", "ms", "least ms", "times the plain LSTM's", "by least"
    show([Table("", header, lines)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

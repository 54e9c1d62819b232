"""Results as tables for people, in Markdown or on a terminal, and as JSON for programs.

Knows the rows that `measure` makes and `suite` collects. Measures nothing; pictures are drawn by
`picture`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .figures import geometric_mean
from .libraries import BANDWIDTH, OURS, PEAK, PEERS
from .measure import PAIRS
from .shapes import shape_of

BUSY = 0.25  # cores: a row is doubtful if others had more than that meanwhile
DIGITS = 5  # of figures in a file

Found = dict[str, Any]
Row = dict[str, Any]


@dataclass
class Table:
    """Lines of text under a header, and what there is to say about them."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """As Markdown.

        >>> print(Table("t", ("a", "b"), [("1", "2")], ["n"]).markdown())
        ### t
        <BLANKLINE>
        | a | b |
        | --- | --- |
        | 1 | 2 |
        <BLANKLINE>
        n
        """
        found = [f"### {self.title}", ""] if self.title else []
        for line in (self.header, ["---"] * len(self.header), *self.lines):
            found.append(f"| {' | '.join(line)} |")
        for note in self.notes:
            found += ["", note]
        return "\n".join(found)


def show(tables: Iterable[Table]) -> None:
    """Prints tables: in Markdown, or drawn by rich where that is installed and has a terminal."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return _draw(tables)
    print("\n\n".join(table.markdown() for table in tables))


def _draw(tables: Iterable[Table]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as Drawn

    console = Console(highlight=False)
    for table in tables:
        first, *others = table.header
        columns = [Column(name, justify="right", overflow="fold") for name in others]
        drawn = Drawn(
            Column(first, no_wrap=True), *columns, title=table.title, title_justify="left",
            title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for line in table.lines:
            drawn.add_row(*line)
        console.print(drawn)
        for note in table.notes:
            console.print(note, markup=False)
        console.print()


# ---------------------------------------------------------------------------------- from results


def best_peer(row: Row, not_held: Iterable[str] = ()) -> str | None:
    """The peer with the least median time; those in `not_held` do not count.

    >>> times = {"rnnfast": 1, "torch": 2, "jax": 3, "peak": 0}
    >>> results = {name: {"median_ms": ms} for name, ms in times.items()}
    >>> best_peer({"results": results}), best_peer({"results": results}, ["torch"])
    ('torch', 'jax')
    """
    peers = [name for name in PEERS if name in row["results"] and name not in not_held]
    return min(peers, key=lambda name: row["results"][name]["median_ms"], default=None)


def ratio_to_best(row: Row, not_held: Iterable[str] = ()) -> float | None:
    """The best peer's time over ours, or None if either was not measured."""
    peer = best_peer(row, not_held)
    return None if peer is None else row["results"][peer].get("ratio")


def groups(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by mode and threads, in the order in which these come first."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["mode"], row["threads"]), []).append(row)
    return found


def tables(found: Found) -> list[Table]:
    """All that is shown of a run: ratios and their means first, the rest after them."""
    first, families, after, not_held = [], [], [], found["not_held"]
    for (mode, threads), rows in groups(found["rows"]).items():
        title = f"{mode}, {threads} thread{'s' * (threads > 1)}"
        first.append(_ratios(title, rows, not_held))
        after.append(_peers(f"{title}: ms of each library", rows, not_held))
        if any("us_per_step" in row["results"].get(OURS, {}) for row in rows):
            after.append(_steps(f"{title}: one row at a time", rows, not_held))
        after.append(_costs(f"{title}: least time, first call, memory", rows, not_held))
        family = _family(f"{title}: times our own plain LSTM's", rows)
        if family.lines:
            families.append(family)
    return [*first, _totals(found), *families, *after]


def _ratios(title: str, rows: list[Row], not_held: Sequence[str]) -> Table:
    header = ("shape", "ms", "GFLOP/s", "peak", "best peer", "its ms", "ratio", "95 %")
    lines, ratios, few, busy = [], [], [], False
    for row in rows:
        ours = row["results"].get(OURS)
        if ours is None:
            lines.append([row["shape"], row["left_out"].get(OURS, ""), *[""] * 6])
            continue
        marks = ""
        if row["pairs"] < PAIRS:
            marks += "*"
            few.append(row["pairs"])
        if row["others"] is not None and row["others"] > BUSY:
            marks, busy = marks + "!", True
        line = [
            row["shape"] + marks,
            f"{_short(ours['median_ms'])} ±{ours['spread']:.0%}",
            _short(ours["gflops"]),
            f"{ours['share']:.0%}" if "share" in ours else "",
        ]
        peer = best_peer(row, not_held)
        if peer is None:
            line += ["", "", "", ""]
        else:
            theirs = row["results"][peer]
            low, high = theirs["ratio_interval"]
            line += [
                peer, _short(theirs["median_ms"]), f"{theirs['ratio']:.2f}", f"{low:.2f}-{high:.2f}"
            ]  # fmt: skip
            ratios.append(theirs["ratio"])
        lines.append(line)
    notes = []
    if ratios:
        under = sum(ratio < 1 for ratio in ratios)
        notes.append(
            f"Best peer's time over ours: geometric mean {geometric_mean(ratios):.2f} over "
            f"{len(ratios)} rows, {under} under 1.0."
        )
    if few:
        notes.append(f"* {min(few)} rounds or more, not {PAIRS}: the time was up.")
    if busy:
        notes.append(f"! others had more than {BUSY} cores meanwhile: judge nothing by this row.")
    return Table(title, header, lines, notes)


def _peers(title: str, rows: list[Row], not_held: Sequence[str]) -> Table:
    names = [n for n in PEERS if any(n in row["results"] or n in row["left_out"] for row in rows)]
    marked = (name.replace("-", " ") + "†" * (name in not_held) for name in names)
    header = ("shape", OURS, *marked)
    lines, reasons = [], {}
    for row in rows:
        line = [row["shape"]]
        for name in (OURS, *names):
            if name in row["results"]:
                line.append(_short(row["results"][name]["median_ms"]))
            else:
                reason = row["left_out"].get(name, "")
                line.append(reason.partition(":")[0])
                if reason:
                    reasons.setdefault(f"{name} {reason}", []).append(row["shape"])
        lines.append(line)
    notes = [
        reason if len(where) == len(rows) else f"{reason} ({', '.join(where)})"
        for reason, where in reasons.items()
    ]
    if not_held:
        notes.append("† cannot be held to that instruction set, so never the best peer.")
    return Table(title, header, lines, notes)


def _steps(title: str, rows: list[Row], not_held: Sequence[str]) -> Table:
    header = ("shape", "us/step", "bandwidth", "GB/s there", "best peer", "its us/step")
    lines = []
    for row in rows:
        ours = row["results"].get(OURS, {})
        if "us_per_step" not in ours:
            continue
        peer = best_peer(row, not_held)
        caches = row["results"].get(BANDWIDTH)
        lines.append(
            [
                row["shape"],
                _short(ours["us_per_step"]),
                f"{ours['read_share']:.0%}" if "read_share" in ours else "",
                _short(caches["gbytes"]) if caches else "",
                peer or "",
                _short(row["results"][peer]["us_per_step"]) if peer else "",
            ]
        )
    note = "Bandwidth: bytes that each step must read again, over what the caches give at that size"
    return Table(title, header, lines, [f"{note}."])


def _family(title: str, rows: list[Row]) -> Table:
    """Of cells at the sizes at which the plain LSTM was measured as well: how much longer."""
    plain, lines = {}, []
    for row in rows:
        shape = shape_of(row["shape"])
        if (
            shape == replace(shape, cell="lstm", projection=0, happens="")
            and OURS in row["results"]
        ):
            plain[shape] = row["results"][OURS]
    for row in rows:
        shape = shape_of(row["shape"])
        lstm = plain.get(replace(shape, cell="lstm", projection=0, happens=""))
        if shape in plain or lstm is None or OURS not in row["results"]:
            continue
        ours, line = row["results"][OURS], [row["shape"]]
        for figure in ("median_ms", "min_ms"):
            line += [_short(ours[figure]), f"{ours[figure] / lstm[figure]:.2f}"]
        lines.append(line)
    return Table(title, ("shape", "ms", "times", "least ms", "times"), lines)


def _costs(title: str, rows: list[Row], not_held: Sequence[str]) -> Table:
    header = ("shape", "least ms", "first ms", "MB", "best peer", "least ms", "first ms", "MB")
    lines = []
    for row in rows:
        line = [row["shape"]]
        peer = best_peer(row, not_held)
        for name in (OURS, peer):
            figures = row["results"].get(name)
            if name != OURS:
                line.append(name or "")
            if figures is None:
                line += ["", "", ""]
                continue
            held = figures["bytes"]
            line += [_short(figures["min_ms"]), _short(figures["first_ms"])]
            line.append("" if held is None else _short(held / 1e6))
        lines.append(line)
    notes = ["MB: the most that a call holds beyond what the process held before it got ready."]
    return Table(title, header, lines, notes)


def about(found: Found) -> list[str]:
    """Where and with what a run was made, what is missing, what was refused."""
    machine = {k: v for k, v in found["machine"].items() if k not in ("date", "load")}
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    versions = {name: ver for peer in found["peers"].values() for name, ver in peer.items()}
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    lines += [f"{peer}: missing ({reason})" for peer, reason in found["missing"].items()]
    for row in found["rows"]:
        where = f"{row['shape']}, {row['mode']}, {row['threads']} threads"
        lines += [
            f"{name}: {reason} ({where})"
            for name, reason in row["left_out"].items()
            if reason.startswith("refused")
        ]
    return [line for line in lines if line]


def _totals(found: Found) -> Table:
    """Over all rows of each mode and number of threads: means, and how many are behind."""
    header = ("", "rows", "geometric mean", "least", "under 1.0", "of the peak")
    lines = []
    for (mode, threads), rows in groups(found["rows"]).items():
        ratios = [r for row in rows if (r := ratio_to_best(row, found["not_held"])) is not None]
        shares = [row["results"].get(OURS, {}).get("share") for row in rows]
        share = geometric_mean(one for one in shares if one)
        lines.append(
            [
                f"{mode}, {threads} thread{'s' * (threads > 1)}",
                str(len(rows)),
                f"{geometric_mean(ratios):.2f}" if ratios else "",
                f"{min(ratios):.2f}" if ratios else "",
                str(sum(ratio < 1 for ratio in ratios)) if ratios else "",
                f"{share:.0%}" if share else "",
            ]
        )
    return Table("best peer's time over ours", header, lines)


def markdown(found: Found) -> str:
    """The whole report."""
    parts = [*(f"- {line}" for line in about(found)), ""]
    return "\n".join(parts) + "\n\n".join(t.markdown() for t in tables(found))


def _short(number: float) -> str:
    """Three digits.

    >>> _short(0.01659), _short(1234.5), _short(27.31)
    ('0.0166', '1234', '27.3')
    """
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = max(2 - math.floor(math.log10(abs(number))), 0)
    return f"{number:.{digits}f}"


# ----------------------------------------------------------------------------------------- files


def to_json(found: Found) -> str:
    """All figures, a row in a line."""
    head = {name: value for name, value in found.items() if name != "rows"}
    lines = [f" {json.dumps(name)}: {json.dumps(rounded(value))}" for name, value in head.items()]
    rows = ",\n".join(f"  {json.dumps(rounded(row))}" for row in found["rows"])
    lines.append(f' "rows": [\n{rows}\n ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(value: Any) -> Any:
    """Floats with as many digits as mean something.

    >>> rounded({"a": [1.23456789, 2]})
    {'a': [1.2346, 2]}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def write(path: str | Path, text: str) -> None:
    """Writes a file at once: whoever looks sees the old one or the new one, whole."""
    path = Path(path)
    with replaced(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replaced(path: Path):
    """A name to write to, in place of which `path` stands when all has gone well."""
    descriptor, temporary = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str | Path) -> Found:
    """What `to_json` has written. Raises OSError, or ValueError for another file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        ok = isinstance(found, dict) and {"machine", "peers", "not_held", "rows"} <= found.keys()
    except ValueError:
        ok = False
    if not ok:
        raise ValueError(f"{path}: got something else; needs a file that `--json` has written")
    return found


def peak_of(rows: Iterable[Row]) -> float | None:
    """The median of the peaks that rows were measured with, GFLOP/s."""
    peaks = sorted(r["results"][PEAK]["gflops"] for r in rows if PEAK in r["results"])
    return peaks[len(peaks) // 2] if peaks else None

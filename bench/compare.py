"""What became slower or faster between two runs of the suite.

Knows the files that `report` writes. Two runs differ in what the machine had to give, so a time is
compared by way of something that was measured beside it in the same rounds.
"""

from __future__ import annotations

from typing import Any

from .libraries import OURS, PEERS
from .report import Found, Row, Table

MARGIN = 0.05  # what the intervals do not know of: another day, another place in memory


def yardstick(old: Row, new: Row, same: set[str]) -> tuple[str, Any, Any] | None:
    """By what two rows are compared, and each one's measure of speed with its interval.

    The best of those peers in `same` that all rounds of both rows had, in the old row; else the
    share of the peak. Higher is faster. None if there is no such thing.
    """
    peers = [
        name
        for name in PEERS
        if name in same
        and all(
            "ratio" in row["results"].get(name, {})
            and row["results"][name]["rounds"] == row["pairs"]
            for row in (old, new)
        )
    ]
    if peers:
        peer = min(peers, key=lambda name: old["results"][name]["median_ms"])
        return peer, *(
            (row["results"][peer]["ratio"], row["results"][peer]["ratio_interval"])
            for row in (old, new)
        )
    if all("share" in row["results"].get(OURS, {}) for row in (old, new)):
        return "peak", *(
            (row["results"][OURS]["share"], row["results"][OURS]["share_interval"])
            for row in (old, new)
        )
    return None


def compared(old: Found, new: Found) -> tuple[Table, int]:
    """A table of the rows that both runs have, and how many of them became slower.

    Slower is a row whose speed fell by more than MARGIN, its interval being below the old one.
    """
    same = {name for name, version in old["peers"].items() if new["peers"].get(name) == version}
    before = {key(row): row for row in old["rows"]}
    lines, regressions = [], 0
    for row in new["rows"]:
        other = before.pop(key(row), None)
        found = other and yardstick(other, row, same)
        if not found:
            continue
        name, (was, was_interval), (now, now_interval) = found
        verdict = ""
        if now < was * (1 - MARGIN) and now_interval[1] < was_interval[0]:
            verdict, regressions = "SLOWER", regressions + 1
        elif now > was * (1 + MARGIN) and now_interval[0] > was_interval[1]:
            verdict = "faster"
        lines.append(
            [
                row["shape"],
                row["mode"],
                str(row["threads"]),
                name,
                f"{was:.3f}",
                f"{now:.3f}",
                f"{now / was - 1:+.1%}",
                verdict,
            ]
        )
    notes = [f"{len(lines)} rows compared, {regressions} slower."]
    if before:
        gone = ", ".join(f"{shape} {mode} {threads}" for shape, mode, threads, _ in before)
        notes.append(f"Only in the first: {gone}.")
    header = ("shape", "mode", "threads", "against", "speed was", "is", "change", "")
    return Table("second run against first", header, lines, notes), regressions


def key(row: Row) -> tuple[str, str, int, str]:
    """What a row is a measurement of."""
    return row["shape"], row["mode"], row["threads"], row["isa"]

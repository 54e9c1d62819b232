"""Statistics of what was measured: medians, intervals, ratios within a round, geometric means.

Knows numbers and the names of the machine's two measures. Leaves measuring to `measure`, words and
pictures to `report`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .libraries import BANDWIDTH, OURS, PEAK


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


def spread(values: Sequence[float]) -> float:
    """Half the range of the middle half, as a part of the median; 0 for less than four values.

    >>> spread([1, 2, 3, 4, 5])
    0.5
    """
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def geometric_mean(values: Iterable[float]) -> float | None:
    """The mean of ratios; None of none.

    >>> geometric_mean([0.5, 2.0, 8.0])
    2.0
    """
    logs = [math.log(value) for value in values]
    return round(math.exp(statistics.fmean(logs)), 9) if logs else None


def summary(
    rounds: dict[str, list[list[float]]], counted: dict[str, float], bytes_read: float = 0
) -> dict[str, dict[str, Any]]:
    """Figures of each library from the seconds of its calls, by round.

    counted: operations of one call, or the bytes that a call of BANDWIDTH reads; bytes_read: those
    that a call of a library cannot but read. A library may be in the first rounds only.

    - `median_ms`, `min_ms`: median over the rounds (each the median of its calls); the least call
    - `spread`: see `spread`, of the rounds; `rounds`: how many; `turns_ms`: the medians themselves
    - `gflops`, `best_gflops`: by median and least; of BANDWIDTH `gbytes`
    - `share`, `best_share`: of the peak in the same round (median over the rounds); best of best;
      `share_interval`: where the median lies at 95 %
    - `read_share`: bytes_read, as a share of what BANDWIDTH read in that time in the same round
    - `ratio`, `ratio_interval`: this peer's time over ours in the same round, likewise

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
            "spread": spread(seconds),
            "rounds": len(seconds),
            "turns_ms": [1e3 * one for one in seconds],
        }
        if name == BANDWIDTH:
            row["gbytes"] = counted[name] / median / 1e9
            continue
        row["gflops"] = counted[name] / median / 1e9
        row["best_gflops"] = counted[name] / least[name] / 1e9
        if name == PEAK:
            continue
        if PEAK in turns:
            work = counted[name] / counted[PEAK]
            shares = [work * p / s for p, s in zip(turns[PEAK], seconds, strict=False)]
            row["share"] = statistics.median(shares)
            row["share_interval"] = median_interval(shares)
            row["best_share"] = work * least[PEAK] / least[name]
        if BANDWIDTH in turns:
            read = bytes_read / counted[BANDWIDTH]
            shares = [read * b / s for b, s in zip(turns[BANDWIDTH], seconds, strict=False)]
            row["read_share"] = statistics.median(shares)
        if OURS in turns and name != OURS:
            ratios = [t / s for t, s in zip(seconds, turns[OURS], strict=False)]
            row["ratio"] = statistics.median(ratios)
            row["ratio_interval"] = median_interval(ratios)
    return found

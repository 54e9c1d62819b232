"""A picture of a run: the ratio to the best peer for each shape, and the roofline.

Knows matplotlib, which comes with the extra `plot` and is imported only here, and the rows of
`report`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .figures import geometric_mean
from .libraries import BANDWIDTH, OURS
from .report import Found, Row, best_peer, groups, peak_of, replaced
from .shapes import shape_of


def needs_matplotlib() -> None:
    """Raises ValueError, with what to install, if it is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--picture: got no matplotlib; needs it: pip install 'rnnfast[plot]'"
        ) from None


def draw(found: Found, path: str) -> None:
    """Writes the picture, in the format that the file's name says."""
    needs_matplotlib()
    from matplotlib.figure import Figure

    by_group = groups(found["rows"])
    shapes = list(dict.fromkeys(row["shape"] for row in found["rows"]))
    height = 1.6 + 0.17 * len(shapes) * max(len(by_group), 1)
    figure = Figure(figsize=(13, max(height, 4.5)), layout="constrained")
    ratios, roofline = figure.subplots(1, 2, width_ratios=(3, 2))
    _ratios(ratios, by_group, shapes, found["not_held"])
    _roofline(roofline, by_group)
    machine = found["machine"]
    figure.suptitle(
        f"rnnfast {machine['rnnfast']}, {machine['cpu']}, {machine['isa']}, "
        f"{machine['cores']} cores",
        fontsize=10,
    )
    with replaced(Path(path)) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that a font lacks
        figure.savefig(temporary, dpi=150)


def _ratios(axes: Any, by_group: dict, shapes: list[str], not_held: list[str]) -> None:
    """A bar for each row: the best peer's time over ours, with its interval."""
    width = 0.8 / max(len(by_group), 1)
    for number, ((mode, threads), rows) in enumerate(by_group.items()):
        places, values, errors = [], [], []
        for row in rows:
            peer = best_peer(row, not_held)
            if peer is None or OURS not in row["results"]:
                continue
            figures = row["results"][peer]
            low, high = figures["ratio_interval"]
            places.append(shapes.index(row["shape"]) + (number + 0.5) * width - 0.4)
            values.append(figures["ratio"])
            errors.append((max(figures["ratio"] - low, 0), max(high - figures["ratio"], 0)))
        if not values:
            continue
        label = f"{mode}, {threads} thread{'s' * (threads > 1)}: {geometric_mean(values):.2f}"
        sides = list(zip(*errors, strict=True))
        axes.barh(
            places, [value - 1 for value in values], width * 0.9, left=1, xerr=sides,
            error_kw={"elinewidth": 0.8}, label=label,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.set_xlabel("best peer's time / ours (right of 1: rnnfast is faster)")
    axes.legend(fontsize=8, title="geometric mean", title_fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _roofline(axes: Any, by_group: dict) -> None:
    """GFLOP/s over operations per byte of weights that each step has to read again."""
    for number, ((mode, threads), rows) in enumerate(by_group.items()):
        points = [_point(row) for row in rows if OURS in row["results"]]
        if not points:
            continue
        color = f"C{number}"
        label = f"{mode}, {threads} thread{'s' * (threads > 1)}"
        axes.scatter(*zip(*points, strict=True), s=14, color=color, label=label)
        peak = peak_of(rows)
        if peak is not None:
            axes.axhline(peak, color=color, linewidth=0.7, linestyle="--")
        for row in rows:
            caches = row["results"].get(BANDWIDTH)
            if caches:  # the roof over this very row: its slice lies in some cache
                intensity = _intensity(row)
                axes.scatter(intensity, intensity * caches["gbytes"], marker="_", color=color, s=60)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("operations per byte of weights read at each step")
    axes.set_ylabel("GFLOP/s (dashes: measured peak; ticks: measured bandwidth)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _intensity(row: Row) -> float:
    shape = shape_of(row["shape"])
    return shape.operations(row["mode"]) / shape.bytes_read(row["mode"])


def _point(row: Row) -> tuple[float, float]:
    return _intensity(row), row["results"][OURS]["gflops"]

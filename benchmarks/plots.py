"""Scaling plots: how the time grows with one quantity, all others fixed."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .harness import Line
from .report import Results

# What the cost should be proportional to, as a function of the quantity.
COST = {
    "map side": ("tokens", lambda x: x**2),
    "kernel size": ("kernel size squared", lambda x: x**2),
    "dilation": ("dilation", lambda x: 1.0),
    "heads": ("heads", lambda x: x),
    "batch": ("batch", lambda x: x),
}


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope in double-logarithmic axes: 1 where y is proportional to x.

    Raises:
        ValueError: fewer than two different x.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    if spread == 0:
        raise ValueError(f"points must have at least two different x, got {points}")
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def file_name(quantity: str) -> str:
    return "scaling-" + re.sub(r"\W+", "-", quantity) + ".svg"


def series(lines: list[Line]) -> dict[str, dict[int, list[Line]]]:
    """Lines of the scaling group by quantity and thread count, sorted by x."""
    found: dict[str, dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in sorted((line for line in lines if line.sweep and not line.refused), key=lambda line: line.x):
        found[line.sweep][line.threads].append(line)
    return found


def thread_series(lines: list[Line]) -> dict[str, list[Line]]:
    """Lines of the first group by case, one per thread count, where there are at least two."""
    found = defaultdict(list)
    for line in lines:
        if not line.refused and line.group == lines[0].group:
            found[line.name].append(line)
    return {name: sorted(each, key=lambda line: line.threads) for name, each in found.items() if len(each) > 1}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes one SVG for every quantity with at least two values, and one for the number of threads; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for quantity, by_threads in series(results.lines).items():
        if all(len(lines) > 1 for lines in by_threads.values()):
            written.append(folder / file_name(quantity))
            _draw_sweep(quantity, by_threads, written[-1])
    if scaling := thread_series(results.lines):
        written.append(folder / file_name("threads"))
        _draw_threads(scaling, written[-1])
    return written


def _draw_sweep(quantity: str, by_threads: dict[int, list[Line]], path: Path) -> None:
    of, cost = COST[quantity]
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for threads, lines in by_threads.items():
        xs, ys = [line.x for line in lines], [line.ours.median * 1e3 for line in lines]
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        points = [(cost(x), y) for x, y in zip(xs, ys)]
        if len({x for x, _ in points}) > 1:
            label += f": grows with {of} to the power {slope(points):.2f}"
        (drawn,) = axes.plot(xs, ys, "o-", label=label)
        guide = [ys[-1] * cost(x) / cost(xs[-1]) for x in xs]
        axes.plot(xs, guide, ":", color=drawn.get_color(), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=quantity, ylabel="ms, forward", xticks=xs)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.set_title(f"dotted: {'constant' if cost(1) == cost(2) else 'proportional'}", fontsize=9)
    axes.legend(fontsize=8)
    _save(figure, path)


def _draw_threads(scaling: dict[str, list[Line]], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    counts = sorted({line.threads for lines in scaling.values() for line in lines})
    for name, lines in scaling.items():
        speedup = [lines[0].ours.median / line.ours.median for line in lines]
        axes.plot([line.threads for line in lines], speedup, "o-", label=f"{name}: {speedup[-1]:.2f}x")
    axes.plot(counts, [count / counts[0] for count in counts], "k:", linewidth=1)
    axes.set(xlabel="threads", ylabel=f"speed, {counts[0]} thread{'s' if counts[0] > 1 else ''} = 1", xticks=counts)
    axes.legend(fontsize=6)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "natrpb"}):  # with no date either: the same results make the same file
        figure.savefig(path, metadata={"Date": None})

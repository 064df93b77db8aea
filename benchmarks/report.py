"""Results as a file, as a table in the terminal, and as tables in docs/benchmarks.md."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from . import gpu_report
from .harness import OURS, Line
from .timing import Timing
from .units import megabytes, milliseconds, rate

HEADINGS = [
    "case", "threads", "ms, median (minimum)", "GFLOP/s (of FMA peak)", "GB/s (of triad)", "peak MB", "peers, times our median",
]  # fmt: skip


@dataclass
class Results:
    """One run: everything that is reported, and what it was measured on."""

    date: str  # ISO, the day
    commit: str | None
    machine: dict
    versions: dict[str, str]
    yardsticks: dict[int, dict[str, float]] = field(default_factory=dict)  # by thread count
    lines: list[Line] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.machine["device"] == "cuda"

    @property
    def refused(self) -> list[Line]:
        return [line for line in self.lines if line.refused]

    def add_yardsticks(self, threads: int, measured: dict[str, float]) -> None:
        """Takes another reading of the limits of so many threads; the larger one counts, as a disturbed one falls short."""
        earlier = self.yardsticks.get(threads, measured)
        self.yardsticks[threads] = {name: max(value, earlier[name]) for name, value in measured.items()}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError where the file does not hold results."""
        try:
            given = json.loads(path.read_text())
            yardsticks = {int(threads): limits for threads, limits in given.pop("yardsticks").items()}
            lines = [Line.from_dict(line) for line in given.pop("lines")]
            return cls(**given, yardsticks=yardsticks, lines=lines)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} must be a results file of this suite, got {type(error).__name__}: {error}") from None


def peer_text(line: Line, name: str) -> str:
    timing = line.timings[name]
    return f"{name} {line.ratio(name):.3g}x ({milliseconds(timing.median)} ms, {megabytes(timing.peak_bytes)} MB)"


def cells(line: Line, limits: dict[str, float]) -> list[str]:
    """One row, but for the peers."""
    if line.refused:
        return [line.name, str(line.threads), "refused: " + line.refused, "", "", ""]
    ours = line.ours
    seconds = ours.median * (1 if line.attention_share is None else line.attention_share)
    name = line.name if line.attention_share is None else f"{line.name}, {100 * line.attention_share:.0f}% in attention"
    return [
        name,
        str(line.threads),
        f"{milliseconds(ours.median)} ({milliseconds(ours.minimum)})",
        rate(line.flops / seconds * 1e-9, limits["fma_gflops"]),
        rate(line.bytes / seconds * 1e-9, limits["triad_gbytes"]),
        megabytes(ours.peak_bytes),
    ]


def peers_of(line: Line) -> list[str]:
    return [peer_text(line, name) for name in line.timings if name != OURS]


def headings(results: Results) -> list[str]:
    return gpu_report.HEADINGS if results.on_gpu else HEADINGS


def row(results: Results, line: Line) -> tuple[list[str], list[str]]:
    """The cells of a line, and what stands in its last one: a text for every peer."""
    limits = results.yardsticks[line.threads]
    if results.on_gpu:
        return gpu_report.cells(line, limits), gpu_report.peers_of(line)
    return cells(line, limits), peers_of(line)


def by_group(lines: list[Line]) -> dict[str, list[Line]]:
    groups = defaultdict(list)
    for line in lines:
        groups[line.group].append(line)
    return dict(groups)


def disturbance(lines: list[Line]) -> tuple[int, int, list[str]]:
    """Samples taken and rejected, and the lines where at least half of our own samples were."""
    timings: list[Timing] = [timing for line in lines for timing in line.timings.values()]
    doubtful = [
        f"{line.name}, {line.threads} thread{'s' if line.threads > 1 else ''}"
        for line in lines
        if not line.refused and 2 * line.ours.rejected >= line.ours.samples
    ]
    return sum(timing.samples for timing in timings), sum(timing.rejected for timing in timings), doubtful


def absences(lines: list[Line]) -> dict[tuple[str, str], list[str]]:
    """(peer, reason) -> the cases that it does not run."""
    found = defaultdict(list)
    for line in lines:
        for peer, reason in line.absent.items():
            if line.name not in found[peer, reason]:
                found[peer, reason].append(line.name)
    return dict(found)


def header(results: Results) -> Iterator[str]:
    if results.on_gpu:
        yield from gpu_report.header(results)
        return
    machine = results.machine
    caches = " ".join(f"{level} {size}" for level, size in machine["caches"].items())
    yield f"{machine['name']}, {machine['cores']} cores, {machine['isa']}, {caches}"
    yield f"load average before the run {machine['load_before']}, malloc {machine.get('malloc', 'as it is')}"
    yield ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield f"commit {results.commit or 'unknown'}, {results.date}"
    for threads, limits in results.yardsticks.items():
        yield (
            f"{threads} thread{'s' if threads > 1 else ''}: FMA peak {limits['fma_gflops']:.0f} GFLOP/s fp32, "
            f"copy {limits['copy_gbytes']:.1f} GB/s, triad {limits['triad_gbytes']:.1f} GB/s"
        )


def terminal_tables(results: Results) -> Iterator[Table | str]:
    for group, lines in by_group(results.lines).items():
        table = Table(*headings(results), title=group, title_justify="left", title_style="bold")
        for line in lines:
            cells, peers = row(results, line)
            table.add_row(*map(escape, cells), escape("\n".join(peers)), style="red" if line.refused else None)
        yield table
    if goals := list(gpu_report.goal_rows(results)):
        table = Table(*gpu_report.GOAL_HEADINGS, title="Goals", title_justify="left", title_style="bold")
        for texts in goals:
            table.add_row(*map(escape, texts))
        yield table
    yield from (escape(text) for text in footnotes(results))


def footnotes(results: Results) -> Iterator[str]:
    for (peer, reason), names in absences(results.lines).items():
        yield f"{peer} did not run {names[0] if len(names) == 1 else f'{len(names)} cases'}: {reason}"
    samples, rejected, doubtful = disturbance(results.lines)
    yield f"{rejected} of {samples} samples were disturbed and do not count."
    if doubtful:
        which = "; ".join(doubtful) if len(doubtful) <= 8 else f"{len(doubtful)} of {len(results.lines)} lines"
        yield f"Measured under disturbance (at least half of our samples rejected): {which}."


def markdown(results: Results) -> str:
    """The generated part of docs/benchmarks.md."""
    parts = ["\n".join(f"- {line}" for line in header(results))]
    for group, lines in by_group(results.lines).items():
        rows = [[*cells, "<br>".join(peers)] for cells, peers in (row(results, line) for line in lines)]
        parts.append(f"### {group}\n\n" + markdown_table(headings(results), rows))
    if goals := list(gpu_report.goal_rows(results)):
        parts.append("### Goals\n\n" + markdown_table(gpu_report.GOAL_HEADINGS, goals))
    parts.append("\n".join(f"- {text}" for text in footnotes(results)))
    return "\n\n".join(parts)


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows])


def write_docs(results: Results, page: Path, extra: str = "") -> None:
    """Replaces what stands between the page's two markers of the results' device.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = (f"<!-- {results.machine['device']} results: {edge} -->" for edge in ("begin", "end"))
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page.name} must hold {begin!r} and {end!r} once each, in this order")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    page.write_text(f"{before}\n\n{markdown(results)}\n{extra}\n{after}")

"""The tables of results measured on a GPU: shares of the floor, the best of every peer, and what was to be reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .harness import OURS, Line
from .units import megabytes, microseconds, percent, three_digits

if TYPE_CHECKING:
    from .report import Results

HEADINGS = [
    "case", "us, median (minimum)", "TFLOP/s", "GB/s", "of the floor (at 4.3 TB/s)", "peak MB (results)", "SM MHz, °C",
    "peers, times our median",
]  # fmt: skip
GOAL_HEADINGS = ["case", "goal", "measured", "reached"]
GOAL_RATE = 4.3e12  # bytes/s of an H200's copy, by which the goals were set
NO_BIAS = f"{OURS}, no bias"


def header(results: Results) -> Iterator[str]:
    gpu, limits = results.machine, limits_of(results)
    yield (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors, "
        f"{gpu['memory_gib']} GiB, L2 {gpu['l2_mib']} MiB; host {gpu['host']}"
    )
    yield f"driver {gpu['driver']}, CUDA {gpu['cuda']} of torch; kernels compiled for {' '.join(gpu['architectures'])}"
    yield ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield f"commit {results.commit or 'unknown'}, {results.date}"
    yield f"copy {limits['copy_gbytes']:.0f} GB/s, bf16 matrix product {limits['matmul_tflops']:.0f} TFLOP/s"
    idle = gpu["idle"]
    yield f"before the run: {state_text(idle)}" if idle else "nvidia-smi tells no clocks"


def limits_of(results: Results) -> dict[str, float]:
    return next(iter(results.yardsticks.values()))


def state_text(state: dict[str, float]) -> str:
    units = {"sm_mhz": "SM {:.0f} MHz", "memory_mhz": "memory {:.0f} MHz", "celsius": "{:.0f} °C", "watts": "{:.0f} W"}
    return ", ".join(text.format(state[name]) for name, text in units.items() if name in state)


def share_of_floor(line: Line, bytes_per_second: float) -> float:
    """The time that the bytes of the line need at least, over ours."""
    return line.bytes / bytes_per_second / line.ours.median


def throughput(line: Line) -> str:
    if line.items:
        return f"{line.items / line.ours.median:.0f} images/s"
    return f"{line.flops / line.ours.median * 1e-12:.3g}" if line.flops else "-"


def cells(line: Line, limits: dict[str, float]) -> list[str]:
    """One row, but for the peers."""
    if line.refused:
        return [line.name, "refused: " + line.refused, *[""] * (len(HEADINGS) - 3)]
    measured, nominal = (share_of_floor(line, rate) for rate in (limits["copy_gbytes"] * 1e9, GOAL_RATE))
    return [
        line.name,
        f"{microseconds(line.ours.median)} ({microseconds(line.ours.minimum)})",
        throughput(line),
        f"{line.bytes / line.ours.median * 1e-9:.0f}" if line.bytes else "-",
        f"{percent(measured)} ({percent(nominal)})" if line.bytes else "-",
        f"{megabytes(line.ours.peak_bytes)} ({megabytes(line.result_bytes)})",
        ", ".join(f"{line.state[name]:.0f}" if name in line.state else "-" for name in ("sm_mhz", "celsius")),
    ]


def family(name: str) -> str:
    """'FlexAttention (8x8 tiles)' -> 'FlexAttention': one peer in several variants."""
    return name.partition(" (")[0]


def best_peers(line: Line) -> dict[str, str]:
    """The fastest variant of every peer that ran, by family."""
    best: dict[str, str] = {}
    for name in line.timings:
        if name != OURS:
            best[family(name)] = min(best.get(family(name), name), name, key=lambda each: line.timings[each].median)
    return best


def peers_of(line: Line) -> list[str]:
    return [
        f"{name} {line.ratio(name):.3g}x ({microseconds(line.timings[name].median)} us, "
        f"{megabytes(line.timings[name].peak_bytes)} MB)"
        for name in best_peers(line).values()
    ]


def goal_rows(results: Results) -> Iterator[list[str]]:
    """What was to be reached: case, goal, measured, yes or no."""
    for line in results.lines:
        for kind, goal in line.goals.items():
            wanted, measured, reached = goal_of(line, kind, goal, limits_of(results))
            yield [line.name, wanted, measured, "-" if reached is None else "yes" if reached else "**no**"]


def goal_of(line: Line, kind: str, goal: float, limits: dict[str, float]) -> tuple[str, str, bool | None]:
    """The goal in words, what was measured, and whether it was reached; None where nothing was measured.

    Kinds: "floor", at least this share of it; "bias", the time over that without a bias at most this; "images", at least so
    many a second; the family of a peer, at least this many times as fast as its best variant.
    """
    wanted = {
        "floor": f"at least {percent(goal)} of the floor",
        "bias": f"at most {goal:g}x the time without a bias",
        "images": f"at least {goal:.0f} images/s",
    }.get(kind, f"at least {goal:g}x as fast as {kind}")
    if line.refused:
        return wanted, "refused", None
    if kind == "floor":
        share = share_of_floor(line, limits["copy_gbytes"] * 1e9)
        return wanted, percent(share), share >= goal
    if kind == "images":
        return wanted, throughput(line), line.items / line.ours.median >= goal
    name = NO_BIAS if kind == "bias" else best_peers(line).get(kind)
    if name not in line.timings:
        return wanted, "not measured", None
    if kind == "bias":
        price = 1 / line.ratio(name)
        return wanted, f"{price:.2f}x", price <= goal
    return wanted, f"{three_digits(line.ratio(name))}x", line.ratio(name) >= goal

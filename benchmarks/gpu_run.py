"""A run on a GPU: line by line, saved after each, so that a run cut short can be continued."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from . import gpu, gpu_report, machine
from .harness import OURS, Line, Problem, Workload, exact_results, first_line, measure
from .report import Results

LEFT_OUT = "left out of this run"


def is_left_out(name: str, without: Sequence[str]) -> bool:
    return name != OURS and any(pattern in name for pattern in without)


def is_done(line: Line, without: Sequence[str]) -> bool:
    """Whether this run would add nothing to a line: no peer is left out of it that this run has."""
    return all(reason != LEFT_OUT or is_left_out(name, without) for name, reason in line.absent.items())


def begin(path: Path | None, description: dict) -> Results:
    """The results of `path` to be continued, or new ones.

    Raises:
        ValueError: the file belongs to another commit or machine.
    """
    found = Results(datetime.date.today().isoformat(), machine.commit(), description, machine.versions())
    if path is None or not path.exists():
        return found
    earlier = Results.load(path)
    for name, one, other in (
        ("commit", found.commit, earlier.commit),
        ("machine", found.machine["name"], earlier.machine["name"]),
        ("versions", found.versions, earlier.versions),
    ):
        if one != other:
            raise ValueError(f"{path.name} must be of this {name}, {one}, to be continued, got {other}: name another --json")
    return earlier


def without_peers(problem: Problem, without: Sequence[str]) -> tuple[Problem, dict[str, str]]:
    """The problem without the peers that are left out, and these with the reason."""
    kept = [contender for contender in problem.contenders if not is_left_out(contender.name, without)]
    left = {contender.name: LEFT_OUT for contender in problem.contenders if contender not in kept}
    return replace(problem, contenders=kept), left


def measure_one(workload: Workload, budget: float, without: Sequence[str], clock: gpu.Clock) -> Line:
    """One line; one that fails is refused, with the reason, and others follow.

    Raises:
        RuntimeError: an error of the GPU, after which it does nothing more for this process.
    """
    threads, state = torch.get_num_threads(), {}
    try:
        with torch.device("cuda"):
            problem, left = without_peers(workload.make(), without)

        def timer(runners, budget, peaks):
            query = gpu.smi(*gpu.STATE.values())  # answers while the GPU works
            timings = gpu.interleave(runners, budget, peaks, clock, problem.exposed)
            state.update(gpu.state_of(query))
            return timings

        line = measure(workload, threads, budget, problem, exact_results(problem), timer, gpu.peak_memory)
    except Exception as failure:
        if "CUDA error" in str(failure):
            raise
        why = f"{type(failure).__name__}: {first_line(failure)}"
        return Line(workload.name, workload.group, threads, goals=dict(workload.goals), refused=why)
    line.absent |= left
    line.state = state
    return line


def run(
    workloads: Sequence[Workload],
    budget: float,
    console: Console,
    path: Path | None = None,
    without: Sequence[str] = (),
    minutes: float | None = None,
) -> tuple[Results, list[str]]:
    """Measures what the results of `path` do not hold yet.

    Args:
        budget: seconds of timing a line.
        path: where results are saved after every line; None saves none.
        without: leaves out peers whose name holds one of these.
        minutes: no line is begun after so many.

    Returns:
        All results, and the names of the workloads that were not begun.
    """
    start = time.monotonic()
    results = begin(path, gpu.describe())
    measured = gpu.yardsticks()
    earlier = next(iter(results.yardsticks.values()), measured)
    limits = {name: max(measured[name], earlier[name]) for name in measured}
    results.yardsticks = dict.fromkeys([*results.yardsticks, torch.get_num_threads()], limits)
    clock = gpu.Clock()
    done = {line.name for line in results.lines if is_done(line, without)}
    pending = [workload for workload in workloads if workload.name not in done]
    for count, workload in enumerate(pending):
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            return results, [each.name for each in pending[count:]]
        line = measure_one(workload, budget, without, clock)
        torch.cuda.synchronize()  # an error of a kernel ends the run here
        results.lines = [each for each in results.lines if each.name != line.name] + [line]
        if path is not None:
            results.save(path)
        texts = [*gpu_report.cells(line, limits), *gpu_report.peers_of(line)]
        console.print(f"{time.monotonic() - start:4.0f} s  " + "; ".join(filter(None, texts)), markup=False, highlight=False)
        torch._dynamo.reset()  # compiled peers share code, and torch stops compiling it after a few shapes
        torch.cuda.empty_cache()
    return results, []

"""The command line: python -m benchmarks."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import natrpb

from . import cases, gpu, gpu_cases, gpu_run, machine, plots, report
from .harness import Workload, chosen, exact_results, measure

INCOMPLETE = 3  # exit status where time ran out
RESULTS = machine.ROOT / "benchmarks" / "results"
PAGE = machine.ROOT / "docs" / "benchmarks.md"
IMAGES = "images/benchmarks"  # beside the page


def thread_counts(given: str) -> list[int]:
    """'1,2' -> [1, 2]."""
    try:
        counts = sorted({int(part) for part in given.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers separated by commas, got {given!r}")
    return counts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times natrpb beside its peers.")
    parser.add_argument(
        "--case", metavar="PATTERN", action="append", help="names with PATTERN in them, or matching it (* ? []); repeatable"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is timed; cuda has cases of its own")
    parser.add_argument("--quick", action="store_true", help="a minute's worth: a few cases, nothing compiled")
    parser.add_argument("--threads", type=thread_counts, metavar="N,N", help="thread counts, default 1 and all cores")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing a line (default 0.8, quick 0.3)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go; a full run has a default in benchmarks/results"
    )
    parser.add_argument(
        "--without",
        metavar="PATTERN",
        action="append",
        default=[],
        help="on a GPU, leave out peers with PATTERN in their names",
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="on a GPU, begin no case after so long; the same --json continues the run"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="have malloc keep freed memory, for all contenders, so that page faults of fresh results are not timed",
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write the scaling plots there")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and leave")
    parser.add_argument(
        "--write-docs",
        type=Path,
        metavar="FILE",
        help="put the tables and plots of a results file into docs/benchmarks.md and leave",
    )
    given = parser.parse_args(arguments)
    if given.device == "cpu" and (given.without or given.minutes):
        parser.error("--without and --minutes go with --device cuda")
    if given.device == "cuda" and (given.threads or given.plot or given.keep_memory):
        parser.error("--threads, --plot and --keep-memory go with --device cpu")
    return given


def run(workloads: list[Workload], threads: list[int], budget: float, console: Console) -> report.Results:
    """Measures every workload at every thread count."""
    results = report.Results(
        date=datetime.date.today().isoformat(),
        commit=machine.commit(),
        machine=machine.describe(),
        versions=machine.versions(),
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(workloads) * len(threads))
        group = None
        for workload in workloads:
            if workload.group != group:
                group = workload.group
                progress.update(task, description="yardsticks")
                for count in threads:
                    results.add_yardsticks(count, machine.yardsticks(count))
            progress.update(task, description=workload.name)
            torch.set_num_threads(max(threads))
            problem = workload.make()
            exact = exact_results(problem)
            for count in threads:
                results.lines.append(measure(workload, count, budget, problem, exact))
                progress.advance(task)
    return results


def write_docs(path: Path) -> None:
    results = report.Results.load(path)
    images = [] if results.on_gpu else plots.draw(results, PAGE.parent / IMAGES)
    extra = "".join(f"\n![{image.stem.replace('-', ' ')}]({IMAGES}/{image.name})\n" for image in images)
    report.write_docs(results, PAGE, extra)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if given.write_docs:
        write_docs(given.write_docs)
        return 0
    suite = gpu_cases if given.device == "cuda" else cases
    workloads = chosen(suite.quick_workloads() if given.quick else suite.all_workloads(), given.case)
    if given.list:
        console.print("\n".join(f"{workload.group}: {workload.name}" for workload in workloads), markup=False, highlight=False)
        return 0
    if not workloads:
        console.print(f"no case matches {given.case}; --list names them", markup=False)
        return 2
    info = natrpb.info()
    if reason := info["cuda"]["reason"] if given.device == "cuda" else info["reason"]:
        console.print(f"nothing to time: {reason}", markup=False)
        return 2
    start = time.monotonic()
    budget = given.budget or (0.3 if given.quick else 0.8)
    path, left = given.json, []
    if path is None and not given.quick and not given.case:
        described = gpu.describe() if given.device == "cuda" else machine.describe()
        path = RESULTS / f"{machine.slug(described)}-{datetime.date.today().isoformat()}.json"
    if given.device == "cuda":
        results, left = gpu_run.run(workloads, budget, console, path, given.without, given.minutes)
    else:
        if given.keep_memory and not machine.keep_freed_memory():
            console.print("--keep-memory needs glibc's mallopt, which is not there", markup=False)
            return 2
        results = run(workloads, given.threads or sorted({1, torch.get_num_threads()}), budget, console)
        results.machine["malloc"] = "keeps freed memory" if given.keep_memory else "as it is"
        if path:
            results.save(path)
    console.print("\n".join(report.header(results)), markup=False, highlight=False)
    for part in report.terminal_tables(results):
        console.print(part, highlight=False)
    if path:
        console.print(f"results in {path}", markup=False, highlight=False)
    if given.plot:
        console.print("plots: " + ", ".join(map(str, plots.draw(results, given.plot))), markup=False, highlight=False)
    if left:
        console.print(f"not begun, for lack of time: {', '.join(left)}", markup=False, highlight=False)
    console.print(f"{time.monotonic() - start:.0f} s", highlight=False)
    return 1 if results.refused else INCOMPLETE if left else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a machine with a GPU can check, in one command or part by part: build, tests, sanitizers, benchmarks, counters.

python -m benchmarks.gpu_check [--part PART ...] [-- further arguments of pytest]

The Python that runs this runs everything. Nothing is installed: the build is in place, for the GPU that is there. Exit status:
0 all well, 1 something failed, 2 there is no GPU. What could not be done is listed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .units import slug

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FAMILIES = (
    "local_attention",
    "local_attention_gradients",
    "qkvpacked",
    "unfused",
    "window",
    "determinism",
    "fuzz",
    "compile",
    "l2_normalize",
)
IRPE_FAMILIES = ("irpe_ops", "irpe_ops_torch", "irpe_functional", "irpe_relative", "irpe_modules")
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_FAILED = 86  # the exit status asked of compute-sanitizer where it finds something
INCOMPLETE = 3  # of python -m benchmarks, where time ran out
WATCHED = (
    "na-56x56-K7-B128-h2-D32 bf16 forward",
    "na-56x56-K7-B128-h2-D32 bf16 backward",
    "na-7x7-K7-B128-h16-D32 bf16 forward",
    "na-56x56-K13-B128-h2-D32 bf16 forward",
    "window-56x56-K7-shift3-B128-h3-D32 bf16 forward",
    "window-56x56-K7-shift3-B128-h3-D32 bf16 backward",
    "iRPE rpe_index-B128 fp16 backward",
    "iRPE attention-B128 fp16 forward",
    "iRPE attention-B128 fp16 backward",
)
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
SHOWN = (
    "Duration",
    "DRAM Throughput",
    "Compute (SM) Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
    "Issue Slots Busy",
)
PROBE = """import torch
if torch.cuda.is_available():
    print("{}.{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name())
"""
# NB: a thread that waits for a kernel that hangs cannot be interrupted, so the process ends, and xdist takes another.
PYTEST = ("-m", "pytest", "-q", "--tb=short", "--timeout-method=thread")
INTERRUPTED = 124  # the status of a command that took longer than it may


@dataclass
class Outcome:
    """What failed, and what was not done and why."""

    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def run(*command: str, seconds: float | None = None, **environment: str) -> int:
    """Runs a command in the repository, its output shown; returns its exit status.

    After `seconds` it is interrupted, upon which pytest still tells what failed so far, and 15 seconds later killed.
    """
    print("+", *(f"{name}={value}" for name, value in environment.items()), *command, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = INTERRUPTED
    finally:
        if process.poll() is None:  # too long, or an interruption from the keyboard, which a session of its own does not see
            end(process)
    print(f"= {status} after {time.monotonic() - start:.0f} s", flush=True)
    return status


def end(process: subprocess.Popen) -> None:
    """Interrupts, then kills, what is left of a process and its children."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)


def python(*arguments: str, seconds: float | None = None, **environment: str) -> int:
    return run(sys.executable, *arguments, seconds=seconds, **environment)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or where toolkits are usually."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def build(options: argparse.Namespace, outcome: Outcome) -> None:
    """In place and for this GPU alone, whatever TORCH_CUDA_ARCH_LIST says: others would multiply the time."""
    environment = {"NATRPB_CUDA": "1", "TORCH_CUDA_ARCH_LIST": options.capability}
    nvcc = tool("nvcc")
    if nvcc and not shutil.which("nvcc") and not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ):
        environment["CUDA_HOME"] = str(Path(nvcc).parents[1])
    if python("setup.py", "build_ext", "--inplace", **environment):
        outcome.failed.append("build")
        return
    check = "import natrpb; cuda = natrpb.info()['cuda']; print(cuda); raise SystemExit(cuda['reason'])"
    if python("-c", check):
        outcome.failed.append("build: the CUDA kernels do not load, or do not serve this GPU")


def tests(options: argparse.Namespace, outcome: Outcome) -> None:
    """The families of the ops with their tensors on the GPU, then what only a GPU can show, alone for its memory."""
    workers = []
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(options.workers)]
    else:
        outcome.missing.append("pytest-xdist is not installed: the tests ran in one process")
    files = [f"tests/test_{family}.py" for family in (*FAMILIES, *IRPE_FAMILIES)]
    among_many = ("--timeout=120", "--device", "cuda", *workers, *files)
    if python(*PYTEST, *among_many, *options.pytest, seconds=options.seconds):
        outcome.failed.append("tests of the ops on the GPU")
    for file in ("tests/test_cuda.py", "tests/test_cuda_irpe.py"):
        if python(*PYTEST, "--timeout=300", "-rs", file, *options.pytest, seconds=options.seconds):
            outcome.failed.append(file)


def sanitize(options: argparse.Namespace, outcome: Outcome) -> None:
    """Every kernel on small cases; torch's allocator hands out memory that the tool can tell apart."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        outcome.missing.append("compute-sanitizer is not installed: no memcheck, no racecheck")
        return
    help_text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    ours_alone = ["--kernel-name", "kns=natrpb"] if "--kernel-name" in help_text else []
    for name in options.sanitizer or SANITIZERS:
        command = [sanitizer, "--tool", name, "--error-exitcode", str(SANITIZER_FAILED), *ours_alone]
        if name == "memcheck":
            command += ["--report-api-errors", "no"]  # torch tries calls that may fail, and our launches report their own
        command += [sys.executable, "-m", "benchmarks.gpu_launch", "small"]
        status = run(*command, seconds=options.seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status == INTERRUPTED:
            outcome.missing.append(f"compute-sanitizer {name}: not all cases in {options.seconds:.0f} s")
        elif status:
            found = "found errors" if status == SANITIZER_FAILED else f"ended with status {status}"
            outcome.failed.append(f"compute-sanitizer {name} {found}")


def bench(options: argparse.Namespace, outcome: Outcome) -> None:
    path = options.results / f"{options.name}.json"
    limits = ["--minutes", str(options.minutes)] if options.minutes else []
    chosen = [text for pattern in options.case for text in ("--case", pattern)]
    left_out = [text for pattern in options.without for text in ("--without", pattern)]
    status = python("-m", "benchmarks", "--device", "cuda", "--json", str(path), *limits, *chosen, *left_out)
    if status == INCOMPLETE:
        outcome.missing.append(f"benchmarks: time ran out; another run continues {path}")
    elif status:
        outcome.failed.append("benchmarks")
    if path.exists() and python("-m", "benchmarks", "--write-docs", str(path)):
        outcome.failed.append("docs/benchmarks.md")


def ncu(options: argparse.Namespace, outcome: Outcome) -> None:
    """Hardware counters of our kernels in a few cases; the clocks stay as they are."""
    profiler = tool("ncu")
    if profiler is None:
        outcome.missing.append("ncu is not installed: no hardware counters")
        return
    log, found = options.results / f"{options.name}-ncu.log", {}
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [profiler, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:natrpb", "--force-overwrite", "--log-file", str(log)]
    command += [text for section in SECTIONS for text in ("--section", section)]
    for case in options.case or WATCHED:
        if run(*command, sys.executable, "-m", "benchmarks.gpu_launch", case):
            outcome.failed.append(f"ncu: {case}")
            continue
        found[case] = kernels_of(log.read_text())
        for kernel in found[case]:
            print(f"  {kernel['name']}: " + ", ".join(f"{name} {kernel[name]}" for name in SHOWN if name in kernel))
    log.unlink(missing_ok=True)
    path = log.with_suffix(".json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"counters in {path}", flush=True)


def kernels_of(log: str) -> list[dict[str, str]]:
    """The kernels that ncu's CSV lists, in order: their names, and every metric with its unit."""
    lines = log.splitlines()
    begin = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        if not row.get("Metric Name"):  # as in a rule's advice
            continue
        kernel = kernels.setdefault(row["ID"], {"name": short(row["Kernel Name"])})
        kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def short(name: str) -> str:
    """A kernel's name with its template arguments, without namespaces of ours and without parameters."""
    name = re.sub(r"^void |natrpb::cuda::|\(anonymous namespace\)::", "", name)
    return re.sub(r"\((?![^()]*\)\d).*$", "", name)


PARTS = {part.__name__: part for part in (build, tests, sanitize, bench, ncu)}
NEEDED = {"bench": {"build", "tests"}}  # parts that must not have failed before; the build for all others


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the results files go")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no benchmark after so long")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="of bench and ncu: only these cases")
    parser.add_argument("--without", action="append", default=[], metavar="PATTERN", help="of bench: leave out these peers")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="interrupt each run of pytest and of a sanitizer after so long"
    )
    parser.add_argument("--sanitizer", action="append", choices=SANITIZERS, help="only this; repeatable")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes of pytest")
    parser.add_argument("pytest", nargs="*", help="after --: further arguments of pytest")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, outcome = parse(arguments), Outcome()
    found = subprocess.run([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    options.capability, _, gpu = found.partition(" ")
    if not gpu:
        print("torch finds no GPU", file=sys.stderr)
        return 2
    options.name = f"{slug(gpu)}-{datetime.date.today().isoformat()}"
    options.results = options.results.resolve()
    parts = [name for name in PARTS if name in (options.part or PARTS)]
    red: set[str] = set()
    for name in parts:
        if broken := red & NEEDED.get(name, {"build"}):
            outcome.missing.append(f"{name}: not after {' and '.join(sorted(broken))} failed")
            continue
        before = len(outcome.failed)
        PARTS[name](options, outcome)
        if len(outcome.failed) > before:
            red.add(name)
    print(f"\n{gpu}: {', '.join(parts)}: {'FAILED' if outcome.failed else 'all well'}")
    for text in outcome.failed:
        print(f"  failed: {text}")
    for text in outcome.missing:
        print(f"  not done: {text}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())

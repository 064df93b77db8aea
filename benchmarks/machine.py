"""The machine that a result belongs to: its description, its measured limits, and the versions of the software."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch

import natrpb
from natrpb import _ext

from . import units

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "natten", "timm")
STREAM_FLOATS = 1 << 24  # 64 MiB an array and thread, beyond the caches


def cpu_model() -> str:
    """The processor's name, with what tells generations of one name apart, as in "AMD EPYC (family 26, model 2)"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name, family, model = (
        found.group(1).strip() if (found := re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE)) else None
        for key in ("model name", "cpu family", "model")
    )
    if name is None:
        return platform.processor() or platform.machine()
    return f"{name} (family {family}, model {model})" if family and model else name


def caches() -> dict[str, str]:
    """Size of every level that the first core sees, as in {"L1d": "48K", "L2": "1024K"}."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        sizes[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return sizes


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed for the next call, as jemalloc and tcmalloc do; returns whether it can (glibc).

    glibc gives large blocks back to the system instead, and every call then pays a page fault for each 4 KiB of its results.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return all((mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1)))


def describe() -> dict:
    """The processor, without anything that identifies the single machine."""
    return {
        "device": "cpu",
        "name": cpu_model(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": caches(),
        "isa": natrpb.info()["isa"],
        "isa_available": natrpb.info()["isa_available"],
        "load_before": round(os.getloadavg()[0], 2),  # processes that wanted to run in the last minute
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "natrpb": natrpb.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    build = natrpb.info()["build"]
    return (
        found
        | ({"compiler": build["compiler"]} if build else {})
        | ({"nvcc": build["nvcc"]} if build and build["nvcc"] else {})
    )


def commit() -> str | None:
    """The commit of this checkout, with "+" where tracked files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(machine: dict) -> str:
    """A file name for results, as in intel-xeon-2c-avx512 or nvidia-h200."""
    name = units.slug(machine["name"])
    return name if machine["device"] == "cuda" else f"{name}-{machine['cores']}c-{machine['isa'] or 'none'}"


def together(measure: Callable[[], float], threads: int) -> float:
    """The sum of what `threads` threads measure at the same time."""
    barrier = Barrier(threads)

    def run(_: int) -> float:
        barrier.wait()
        return measure()

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(run, range(threads)))


def yardsticks(threads: int, seconds: float = 0.3) -> dict[str, float]:
    """The limits of `threads` threads at once: fp32 GFLOP/s of multiply-adds in registers, GB/s of copy and triad."""
    core = _ext.core
    streams = [functools.partial(core.stream_gbytes, triad, STREAM_FLOATS, seconds) for triad in (False, True)]
    torch.set_num_threads(threads)
    return {
        "fma_gflops": together(functools.partial(core.fma_gflops, seconds), threads),
        "copy_gbytes": together(streams[0], threads),
        "triad_gbytes": together(streams[1], threads),
    }

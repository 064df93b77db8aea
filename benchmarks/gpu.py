"""The GPU that a result belongs to, its measured limits, and timing on it by CUDA events."""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import natrpb

from .harness import Runner, Tensors
from .machine import cpu_model
from .timing import Sample, Timing, summarize

STATE = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu", "watts": "power.draw"}
COPY_BYTES = 4 << 30  # a buffer of the copy that measures bandwidth, far beyond the caches
MATMUL_SIDE = 8192
WARM_UP_SECONDS = 0.5  # of work before limits are measured: an idle GPU's clocks are low
HIDDEN_LAUNCH = 1.5  # work queued before a timed call, in times that launching the call takes
MOST_PASSES = 64  # over the buffer that empties the L2
ROUND_SECONDS = 0.05  # of one contender, before the next has its turn
LEAST_SAMPLES, MOST_SAMPLES = 5, 200
EXPOSED_SECONDS = 0.005  # calls that are timed back to back last this long together


def smi(*fields: str) -> subprocess.Popen | None:
    """Starts to ask nvidia-smi about the current GPU; None where there is no nvidia-smi."""
    identity = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", "-i", identity, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def answers(query: subprocess.Popen | None) -> list[str]:
    """What nvidia-smi answered, a word for every field; nothing where it failed."""
    if query is None:
        return []
    output = query.communicate()[0]
    return [] if query.returncode else [word.strip() for word in output.split(",")]


def state_of(query: subprocess.Popen | None) -> dict[str, float]:
    """The answer to `smi(*STATE.values())`, without what the GPU does not tell."""
    found = {}
    for name, word in zip(STATE, answers(query)):
        try:
            found[name] = float(word)
        except ValueError:  # as in [N/A]
            continue
    return found


def describe() -> dict:
    """The GPU and what drives it, without anything that identifies the single one."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = answers(smi("driver_version"))
    return {
        "device": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size >> 20,
        "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "architectures": natrpb.info()["cuda"]["architectures"],
        "host": cpu_model(),
        "idle": state_of(smi(*STATE.values())),
    }


def seconds_of(call: Callable[[], object], samples: int = 10) -> float:
    """The median of single calls, on the GPU's clock."""
    call()
    events = []
    for _ in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3


def yardsticks() -> dict[str, float]:
    """The limits that shares refer to: GB/s of a device-to-device copy, read and written, and TFLOP/s of a bf16 product."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source, target = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    left, right = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        target.copy_(source)
        torch.cuda.synchronize()
    return {
        "copy_gbytes": 2 * size / seconds_of(lambda: target.copy_(source)) * 1e-9,
        "matmul_tflops": 2 * MATMUL_SIDE**3 / seconds_of(lambda: left @ right) * 1e-12,
    }


def peak_memory(runner: Runner) -> int | None:
    """Bytes by which torch's memory on the GPU rises at most during a call, results included; None for a captured graph."""
    if isinstance(runner, Captured):
        return None  # its memory was taken at the capture
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Captured(Runner):
    """A runner's whole call as one CUDA graph, replayed."""

    def __init__(self, runner: Runner) -> None:
        self.captured, self.layout = runner, runner.layout
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture wants everything to have run before, on another stream
            for _ in range(3):
                runner()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results: Tensors = runner()
        for x in self.results.values():
            x.fill_(math.nan)  # what the replay leaves unwritten fails the check

    def __call__(self) -> dict[str, Tensor]:
        self.graph.replay()
        return self.results

    def prepare(self) -> Callable[[], object]:
        return self.graph.replay


class Clock:
    """Takes samples by CUDA events.

    Before each timed call a buffer of four times the L2 is written and read, which leaves no other data in the cache and none
    that memory still waits for, and then as many bytes are written as the call's results have: the call may have to write
    those back, and may leave as many. The buffer is passed over often enough to keep the GPU busy until the CPU has launched
    the call, so that a sample holds the time of the kernels and not that of their launches.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.empty(max(4 * l2, 256 << 20) // 4, dtype=torch.float32, device="cuda")
        self.pass_seconds = seconds_of(self.pass_over)

    def pass_over(self) -> None:
        self.buffer.zero_()
        self.buffer.sum()

    def flush_for(self, runner: Runner) -> tuple[int, int]:
        """How often the buffer is to be passed over for the launch of a call to be hidden, and the bytes of its results."""
        result_bytes = sum(x.nbytes for x in runner().values())

        def launch_seconds() -> float:
            call = runner.prepare()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        launch = min(launch_seconds() for _ in range(4))
        torch.cuda.synchronize()
        return min(MOST_PASSES, 1 + math.ceil(HIDDEN_LAUNCH * launch / self.pass_seconds)), result_bytes

    def take(self, runner: Runner, count: int, flush: tuple[int, int]) -> list[float]:
        """Seconds of `count` calls, each by itself, after what `flush_for` says."""
        passes, result_bytes = flush
        events = []
        for _ in range(count):
            call = runner.prepare()
            for _ in range(passes):
                self.pass_over()
            self.buffer[: result_bytes // 4].zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def take_together(self, runner: Runner, calls: int) -> float:
        """Seconds of one of `calls` calls back to back, with their launches, their data in the caches if they fit."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            runner()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls


def interleave(
    runners: Mapping[str, Runner], budget: float, peaks: Mapping[str, int | None], clock: Clock, exposed: bool = False
) -> dict[str, Timing]:
    """Times all runners in rounds of up to ten samples each.

    Args:
        runners: by name; each has run before.
        budget: seconds for all together, what comes before the timed calls included. Every runner gets an equal share, but
            at least `LEAST_SAMPLES`, and at most `MOST_SAMPLES`.
        peaks: peak memory by name, to be reported along.
        exposed: time calls back to back.
    """
    draw: dict[str, Callable[[int], list[float]]] = {}
    calls = dict.fromkeys(runners, 1)
    for name, runner in runners.items():
        if exposed:
            calls[name] = max(1, math.ceil(EXPOSED_SECONDS / clock.take_together(runner, 3)))
            draw[name] = lambda count, r=runner, n=calls[name]: [clock.take_together(r, n) for _ in range(count)]
        else:
            flush = clock.flush_for(runner)
            draw[name] = lambda count, r=runner, flush=flush: clock.take(r, count, flush)
    cost = {name: elapsed(lambda name=name: draw[name](1))[1] for name in runners}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    spent, share = dict.fromkeys(runners, 0.0), budget / len(runners)

    def wants_more(name: str) -> bool:
        taken = len(samples[name])
        return taken < LEAST_SAMPLES or (spent[name] < share and taken < MOST_SAMPLES)

    while waiting := [name for name in runners if wants_more(name)]:
        for name in waiting:
            count = max(1, min(10, int(ROUND_SECONDS / cost[name])))
            taken, seconds = elapsed(lambda name=name, count=count: draw[name](count))
            samples[name] += taken
            spent[name] += seconds
    return {name: summarize([Sample(s, 0) for s in samples[name]], calls[name], peaks.get(name)) for name in runners}


def elapsed(call: Callable[[], object]) -> tuple:
    """The result of a call, and the seconds that it took."""
    start = time.perf_counter()
    result = call()
    return result, max(time.perf_counter() - start, 1e-9)

"""Interleaved timing: samples, which of them count, and their median and minimum."""

from __future__ import annotations

import ctypes
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SAMPLE_SECONDS = 0.002  # short calls are repeated to last this long
MAX_SAMPLES = 60
LONG_CALL = 0.5  # seconds; calls this long get by with fewer samples
QUICK_CALL = 0.05  # seconds; calls shorter than this are looked at more than once before they are timed
FAR_ABOVE = 2.0  # times the minimum: disturbed, whatever the cause
SWITCHED_ABOVE = 1.1  # times the minimum, with the processor taken away meanwhile: disturbed
SHARED_ABOVE = 1.5  # times the fastest pace: somebody else's work runs on the same core
PATIENCE = 4.0  # times the budget, at most, until there are enough samples at full pace


class Sample(NamedTuple):
    seconds: float  # of one call
    switches: int  # involuntary context switches of the process meanwhile
    pace: float = 0.0  # seconds that a fixed piece of work took just before or after, whichever was slower


@dataclass(frozen=True)
class Timing:
    """What is reported of one contender; times in seconds of one call."""

    median: float  # of the samples that count
    minimum: float
    median_of_all: float  # with the disturbed samples
    samples: int
    rejected: int
    calls: int  # in one sample
    peak_bytes: int | None = None  # growth of the resident memory during one call


class Pace:
    """Times a fixed piece of work, and remembers its fastest time.

    A core of a rented machine may be half of one, whose other half belongs to others. While that is busy, this work takes
    twice as long and the kernels half as long again, though multiply-adds in registers run as fast as ever.
    """

    def __init__(self) -> None:
        self.fastest = math.inf

    def __call__(self) -> float:
        start = time.perf_counter()
        for _ in range(4000):
            pass
        seconds = time.perf_counter() - start
        self.fastest = min(self.fastest, seconds)
        return seconds

    def is_full(self, sample: Sample) -> bool:
        return sample.pace <= SHARED_ABOVE * self.fastest


PACE = Pace()


def is_disturbed(sample: Sample, minimum: float) -> bool:
    """Whether something else ran meanwhile: far above the minimum, or above it with involuntary context switches."""
    limit = SWITCHED_ABOVE if sample.switches else FAR_ABOVE
    return sample.seconds > limit * minimum


def summarize(samples: list[Sample], calls: int = 1, peak_bytes: int | None = None, pace: Pace = PACE) -> Timing:
    """Median and minimum of the samples at full pace that are not disturbed; the minimum itself always counts.

    Where no sample is at full pace, all are looked at, and called rejected.
    """
    full = [sample for sample in samples if pace.is_full(sample)]
    steady = full or samples
    minimum = min(sample.seconds for sample in steady)
    kept = [sample.seconds for sample in steady if not is_disturbed(sample, minimum)]
    return Timing(
        median=statistics.median(kept),
        minimum=minimum,
        median_of_all=statistics.median(sample.seconds for sample in samples),
        samples=len(samples),
        rejected=len(samples) - (len(kept) if full else 0),
        calls=calls,
        peak_bytes=peak_bytes,
    )


def involuntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def take_sample(call: Callable[[], object], calls: int = 1) -> Sample:
    """Times `calls` calls together; where they are repeated, an untimed one goes first and brings the caches back."""
    before = PACE()
    if calls > 1:
        call()
    switches, start = involuntary_switches(), time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    switches = involuntary_switches() - switches
    return Sample(seconds / calls, switches, max(before, PACE()))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    peaks: Mapping[str, int | None] | None = None,
    sample: Callable[[Callable[[], object], int], Sample] = take_sample,
) -> dict[str, Timing]:
    """Times all calls in rounds: every round runs each of them, fast ones several times.

    Args:
        calls: by name; each must have run before, so that nothing is set up or compiled any more.
        budget: seconds for all together. Every contender gets an equal share, but at least three samples (two where one
            call takes longer than `LONG_CALL`), and at most `MAX_SAMPLES`. Samples below full pace do not count, until
            they have taken `PATIENCE` times the share.
        peaks: peak memory by name, to be reported along.
        sample: takes one sample; tests replace it.
    """
    samples: dict[str, list[Sample]] = {name: [sample(call, 1)] for name, call in calls.items()}
    once = {name: first.seconds for name, (first,) in samples.items()}
    for name, call in calls.items():
        if once[name] <= LONG_CALL:
            samples[name].clear()
        if once[name] < QUICK_CALL:  # a disturbed first look would set too few calls a sample
            once[name] = min(once[name], *(sample(call, 1).seconds for _ in range(5)))
    repeats = {name: max(1, math.ceil(SAMPLE_SECONDS / seconds)) for name, seconds in once.items()}
    lasting = {name: seconds * repeats[name] for name, seconds in once.items()}
    slowest, share = max(lasting.values()), budget / len(calls)
    per_round = {name: max(1, min(10, int(slowest / seconds))) for name, seconds in lasting.items()}
    spent = dict.fromkeys(calls, 0.0)

    def wants_more(name: str) -> bool:
        full = [sample for sample in samples[name] if PACE.is_full(sample)]
        if spent[name] >= PATIENCE * share:
            full = samples[name]
        needed = 2 if once[name] > LONG_CALL else 3
        lasted = sum(sample.seconds for sample in full) * (repeats[name] + (repeats[name] > 1))
        return len(full) < needed or (lasted < share and len(full) < MAX_SAMPLES)

    while waiting := [name for name in calls if wants_more(name)]:
        for name in waiting:
            for _ in range(per_round[name]):
                samples[name].append(sample(calls[name], repeats[name]))
                spent[name] += samples[name][-1].seconds * (repeats[name] + (repeats[name] > 1))
    return {name: summarize(samples[name], repeats[name], (peaks or {}).get(name)) for name in calls}


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which the process' resident memory rises at most during a call; None where Linux does not tell.

    Results included, buffers that a library keeps from earlier calls not.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def resident(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide what the call takes
        reset.write_text("5")  # sets the high-water mark back to the present size
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)

"""Runs ops on the GPU once, without checks or timing, for a tool that watches: compute-sanitizer, ncu.

python -m benchmarks.gpu_launch small          every kernel on small, ugly cases
python -m benchmarks.gpu_launch CASE [CASE]    cases of `python -m benchmarks --device cuda`, by a part of their names
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from natrpb import ops
from tests import irpe_cases
from tests.cases import CAUSAL, DILATED, HEAD_DIMS, MAPS, SMALL, STRIDES, VOLUMES, WINDOWS, Case
from tests.irpe_cases import IrpeCase

from .gpu_cases import all_workloads
from .harness import Runner, Workload, chosen

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)  # time may end before they do
LARGEST = 1e6  # multiply-adds of a small case: tools make kernels a hundred times slower


def small_cases() -> list[Case]:
    """A few of every feature; more than one tile where that is still small."""
    candidates = [*SMALL, *MAPS[:4], *STRIDES[-3:], *CAUSAL[-3:], *DILATED, *VOLUMES[:3], *HEAD_DIMS, *WINDOWS]
    tiles = [Case((19, 37), 3, heads=1), Case((33, 18), 5, shift=2, heads=1), Case((70,), 5, dilation=2, heads=1)]
    return [case for case in [*candidates, *tiles] if case.batch and case.size * case.head_dim <= LARGEST]


def run_small(case: Case, dtype: torch.dtype) -> None:
    """Forward, backward and the unfused ops."""
    inputs = case.inputs(dtype, requires_grad=True)
    out, lse = ops.local_attention(*inputs)
    torch.autograd.grad((out, lse), inputs.tensors(), (torch.randn_like(out), torch.randn_like(lse)))
    if case.value_dim is None:
        qkv = torch.stack([x.detach() for x in inputs[:3]], -3).requires_grad_()
        ops.local_attention_qkvpacked(qkv, *inputs[3:])[0].sum().backward()
    query, key, value = (x.detach().movedim(-2, 1) for x in inputs[:3])
    weights = ops.local_qk(query, key, inputs.rpb, inputs.pattern).detach().softmax(-1)
    ops.local_av(weights, value, inputs.pattern)
    ops.local_av_transposed(weights, query, inputs.pattern)
    ops.local_bias_grad(weights, inputs.pattern)
    torch.cuda.synchronize()


def small_irpe_cases() -> list[IrpeCase]:
    """Every encoding, terms, masks, several tiles and chunks, more channels than a slice and more buckets than bins."""
    tiles = [IrpeCase(70, 50, "kqtv", 30, terms=2, padding=True, mask=True), IrpeCase(40, 70, buckets=600, batch=1)]
    return [*irpe_cases.SMALL, *irpe_cases.HEAD_DIMS, *tiles]


def run_small_irpe(case: IrpeCase, dtype: torch.dtype) -> None:
    """Forward and backward of the attention, and rpe_index in both directions."""
    inputs = case.inputs(dtype, requires_grad=True)
    outputs = [x for x in ops.irpe_attention(*inputs) if x is not None]
    torch.autograd.grad(outputs, list(inputs.floats().values()), [torch.randn_like(x) for x in outputs])
    rows = torch.randn(case.batch, case.heads, case.queries, case.buckets).to(dtype)
    index = torch.randint(0, case.buckets, (case.queries, case.keys), dtype=torch.int32)
    ops.rpe_index_transposed(ops.rpe_index(rows, index), index, case.buckets)
    torch.cuda.synchronize()


def run_workload(workload: Workload) -> None:
    """Ours alone, once to warm up and once to be watched, between the marks of CUDA's profiler."""
    with torch.device("cuda"):
        problem = workload.make()
    runner = Runner(problem.contenders[0], problem)
    runner()
    call = runner.prepare()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    print(workload.name, flush=True)


def named(name: str) -> list[Workload]:
    """The workload of this name, or those that the pattern chooses."""
    workloads = all_workloads()
    return [each for each in workloads if each.name == name] or chosen(workloads, [name])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_launch", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help="small, or parts of names of cases")
    for name in parser.parse_args(arguments).what:
        if name == "small":
            with torch.device("cuda"):
                for dtype in DTYPES:
                    start = time.monotonic()
                    for case in small_cases():
                        run_small(case, dtype)
                    for case in small_irpe_cases():
                        run_small_irpe(case, dtype)
                    count, seconds = len(small_cases()) + len(small_irpe_cases()), time.monotonic() - start
                    print(f"{count} cases in {dtype}, {seconds:.0f} s", flush=True)
            continue
        workloads = named(name)
        if not workloads:
            raise SystemExit(f"no case is called {name!r}")
        for workload in workloads:
            run_workload(workload)


if __name__ == "__main__":
    main()

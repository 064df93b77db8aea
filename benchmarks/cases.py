"""What is timed: every workload of the suite, by group, and who else is asked to do it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from tests.cases import NAT_STAGES, Case

from .harness import Problem, Workload
from .irpe import irpe_workloads
from .models import model_workloads
from .problems import (
    block_problem,
    cosine_problem,
    neighborhood_problem,
    projected_problem,
    unfused_problem,
    window_problem,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRST_STAGE = NAT_STAGES[0]  # [1, 56, 56, 2, 32], K = 7
STAGES = [FIRST_STAGE, replace(FIRST_STAGE, batch=8), *NAT_STAGES[1:3]]
FAR = Case((56, 56), 13, heads=4, head_dim=32)
LENGTHS = [Case((3136,), k, head_dim=32) for k in (7, 31, 127)]  # as many tokens as 56 x 56
VOLUMES = [Case((8, 14, 28), k, head_dim=32) for k in (3, 5, 7)]  # the same
DILATED = [replace(FIRST_STAGE, dilation=d) for d in (2, 8)]
CAUSAL = [replace(FIRST_STAGE, is_causal=True), Case((3136,), 31, is_causal=True, head_dim=32)]
HEAD_DIMS = [replace(FIRST_STAGE, head_dim=head_dim) for head_dim in (16, 24, 64, 128)]
WINDOWS = [Case((56, 56), 7, shift=shift, batch=8, heads=3, head_dim=32) for shift in (0, 3)]
COSINE = Case((64, 64), 8, shift=4, batch=2, heads=3, head_dim=32)  # Swin v2-T at 256

# Compiled peers take tens of seconds to set up, and plain training steps take seconds: few cases have them all.
ALL = ("gather", "unfold", "SDPA", "torch.compile", "FlexAttention", "NATTEN")
EAGER = ("gather", "unfold", "SDPA", "NATTEN")
FEW = ("gather", "SDPA")
ONE = ("gather",)


def workload(
    group: str, case: Case, make: Callable[..., Problem], train: bool, dtype: str = "fp32", what: str = "", **options
) -> Workload:
    """A workload with a readable, unique name; `make` takes (case, dtype, train, **options)."""
    name = f"{what}{case} {dtype} {'forward+backward' if train else 'forward'}"
    sweep = options.pop("sweep", (None, None))
    return Workload(name, group, functools.partial(_seeded, make, case, DTYPES[dtype], train, **options), *sweep)


def _seeded(make: Callable[..., Problem], *arguments, **options) -> Problem:
    torch.manual_seed(0)
    return make(*arguments, **options)


def neighborhoods(
    group: str,
    cases: list[Case],
    forward: tuple[str, ...] | None,
    train: tuple[str, ...] | None,
    dtype: str = "fp32",
    **options,
) -> list[Workload]:
    """Every case forward and in training, beside the peers named for each; None leaves that mode out."""
    modes = [(False, forward), (True, train)]
    return [
        workload(group, case, neighborhood_problem, mode, dtype, wanted=wanted, **options)
        for case in cases
        for mode, wanted in modes
        if wanted is not None
    ]


def sweep(quantity: str, cases: dict[int, Case]) -> list[Workload]:
    """One scaling plot: our time alone, against x."""
    return [
        workload("Scaling", case, neighborhood_problem, False, what=f"{quantity} ", wanted=(), sweep=(quantity, float(x)))
        for x, case in cases.items()
    ]


def all_workloads() -> list[Workload]:
    """Everything, in the order of the report."""
    two = "Neighborhood attention, two axes"
    window = "Windows 7x7"
    return [
        *neighborhoods(two, STAGES[:1], ALL, ALL),
        *neighborhoods(two, STAGES[1:2], FEW, ONE),
        *neighborhoods(two, STAGES[2:3], (*EAGER, "FlexAttention"), EAGER),
        *neighborhoods(two, STAGES[3:], EAGER, EAGER),
        *neighborhoods(two, [FAR], (*FEW, "FlexAttention"), ONE),
        *neighborhoods(two, STAGES[:2], ("in fp32", *FEW), ("in fp32",), dtype="bf16"),
        *neighborhoods("One axis", LENGTHS, FEW, ONE),
        *neighborhoods("Three axes", VOLUMES, FEW, ONE),
        *neighborhoods("Dilated", DILATED, FEW, ONE),
        *neighborhoods("Causal", CAUSAL, FEW, ONE),
        *neighborhoods("Head dimensions", HEAD_DIMS, ONE, ONE),
        *[
            workload("Unfused", FIRST_STAGE, unfused_problem, train, what=f"{which} ", which=which)
            for which in ("qk", "av")
            for train in (False, True)
        ],
        *[workload(window, case, window_problem, train) for case in WINDOWS for train in (False, True)],
        *[workload(window, case, window_problem, train, dtype="bf16") for case in WINDOWS for train in (False, True)],
        *[
            workload("Training from one projection", case, projected_problem, True, dtype, what="qkvpacked ")
            for case in (*STAGES[:2], *WINDOWS)
            for dtype in ("fp32", "bf16")
        ],
        *[
            workload("Windows with cosine scores", COSINE, cosine_problem, train, dtype, what="cosine ")
            for dtype in ("fp32", "bf16")
            for train in (False, True)
        ],
        *[
            workload("Window blocks, with projections", WINDOWS[1], block_problem, train, what="block ")
            for train in (False, True)
        ],
        *model_workloads(),
        *irpe_workloads(),
        *sweep("map side", {n: Case((n, n), 7, head_dim=32) for n in (7, 14, 28, 56, 112)}),
        *sweep("kernel size", {k: Case((56, 56), k, head_dim=32) for k in (3, 5, 7, 9, 13, 21)}),
        *sweep("dilation", {d: replace(FIRST_STAGE, dilation=d) for d in (1, 2, 4, 8)}),
        *sweep("heads", {h: Case((28, 28), 7, heads=h, head_dim=32) for h in (1, 2, 4, 8, 16)}),
        *sweep("batch", {b: Case((28, 28), 7, batch=b, heads=4, head_dim=32) for b in (1, 2, 4, 8, 16)}),
    ]


QUICK = (
    FIRST_STAGE,
    Case((14, 14), 7, heads=8, head_dim=32),
)


def quick_workloads() -> list[Workload]:
    """A minute's worth, without anything that has to be compiled first."""
    return [
        *neighborhoods("Neighborhood attention, two axes", list(QUICK), EAGER, EAGER),
        *[workload("Windows 7x7", WINDOWS[1], window_problem, train) for train in (False, True)],
    ]

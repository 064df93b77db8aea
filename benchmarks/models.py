"""Whole models: a training or inference step with the fused op, and with plain PyTorch in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import natrpb
from natrpb.patterns import Pattern

from .harness import OURS, Contender, Problem, Workload, autograd_results
from .peers import gathered_attention, pattern_index

# Twenty layers add up what a single op rounds.
TOLERANCE = 2e-3


def plain_local_attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, pattern: Pattern, scale: float):
    """`natrpb.ops.local_attention` by gathering; heads-last in, (out, None) out."""
    query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
    return gathered_attention(query, key, value, rpb, pattern, scale).movedim(1, -2), None


def with_plain_op(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def run(**tensors: Tensor) -> Tensor:
        with mock.patch.object(natrpb.ops, "local_attention", plain_local_attention):
            return function(**tensors)

    return run


def attention_share(call: Callable[[], object]) -> float:
    """The part of a call's time that is spent in natrpb's ops, from a few profiled calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with torch.profiler.record_function("whole"):
            for _ in range(3):
                call()
    events = profiled.events()
    whole = next(event for event in events if event.name == "whole").time_range.elapsed_us()

    def is_outermost(event) -> bool:
        return event.name.startswith("natrpb::") and not (event.cpu_parent and event.cpu_parent.name.startswith("natrpb::"))

    return sum(event.time_range.elapsed_us() for event in events if is_outermost(event)) / whole


def attention_flops(model: torch.nn.Module, side: int, batch: int, train: bool) -> tuple[int, int]:
    """Useful operations and least traffic of all attention ops of a NAT on square images; see `benchmarks.problems`."""
    from .problems import attention_bytes, useful_flops

    sizes = []

    def record(query, key, value, rpb, pattern: Pattern, scale: float):
        heads, head_dim = query.shape[-2:]
        valid = pattern_index(pattern, tuple(query.shape[1:-2]), query.device)[2]
        pairs = int(valid.sum()) * query.shape[0] * heads
        sizes.append((useful_flops(pairs, head_dim, train), attention_bytes(query.numel(), query.element_size(), train)))
        return value, None

    with mock.patch.object(natrpb.ops, "local_attention", record), torch.no_grad():
        model(torch.zeros(batch, 3, side, side))
    return sum(flops for flops, _ in sizes), sum(size for _, size in sizes)


def make_problem(name: str, batch: int, train: bool, side: int = 224, **overrides) -> Problem:
    """A model of this library on random square images, its parameters among the inputs; `overrides` go to `create_model`."""
    torch.manual_seed(0)
    model = natrpb.create_model(name, drop_path_rate=0.0, **overrides).train(train)
    parameters = {key.replace(".", "/"): value.detach() for key, value in model.named_parameters()}
    images = torch.randn(batch, 3, side, side)

    def run(images: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, {key.replace("/", "."): x for key, x in parameters.items()}, (images,))

    flops, size = attention_flops(model, side, batch, train)
    return Problem(
        tensors={"images": images, **parameters},
        dout=torch.randn(batch, model.num_classes) if train else None,
        exact=autograd_results(with_plain_op(run)),
        contenders=[Contender(OURS, lambda: run), Contender("gather", lambda: with_plain_op(run))],
        flops=flops,
        bytes=size,
        tolerance=TOLERANCE,
        attention_share=attention_share,
    )


def model_workloads() -> list[Workload]:
    return [
        Workload(
            f"{name}-224-B1 fp32 {'forward+backward' if train else 'forward'}",
            "Whole models",
            functools.partial(make_problem, name, 1, train),
        )
        for name in ("nat_mini", "nat_tiny")
        for train in (False, True)
    ]

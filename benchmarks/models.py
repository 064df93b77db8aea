"""Whole models: a training or inference step with the fused op, and with plain PyTorch in its place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import natrpb
from natrpb.convert import swin
from natrpb.patterns import Pattern

from .harness import OURS, Contender, Layout, Problem, Tensors, Workload, autograd_results
from .peers import gathered_attention, pattern_index
from .timm_import import timm_module

# Twenty layers add up what a single op rounds.
TOLERANCE = 2e-3


def plain_local_attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, pattern: Pattern, scale: float):
    """`natrpb.ops.local_attention` by gathering; heads-last in, (out, None) out."""
    query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
    return gathered_attention(query, key, value, rpb, pattern, scale).movedim(1, -2), None


def replaced_op(attend: Callable[..., tuple]) -> contextlib.AbstractContextManager:
    """Has `attend` called in place of `natrpb.ops.local_attention`, and of the packed op with qkv's slices."""
    return mock.patch.multiple(
        natrpb.ops, local_attention=attend, local_attention_qkvpacked=lambda qkv, *rest: attend(*qkv.unbind(-3), *rest)
    )


def with_plain_op(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def run(**tensors: Tensor) -> Tensor:
        with replaced_op(plain_local_attention):
            return function(**tensors)

    return run


def timm_model(name: str, side: int, **overrides) -> torch.nn.Module:
    """timm's model of the same name, which is that of ours for Swin v1 and v2; raises `Unavailable` without timm."""
    return timm_module().create_model(name, img_size=side, drop_path_rate=0.0, **overrides)


def timm_contender(name: str, side: int, train: bool, **overrides) -> Contender:
    """timm's Swin with the problem's weights, renamed."""

    def build() -> Callable[..., Tensor]:
        model = timm_model(name, side, **overrides).train(train)
        return lambda images, **parameters: torch.func.functional_call(model, dotted(parameters), (images,))

    def renamed(convert: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
        def change(tensors: Tensors) -> Tensors:
            kept = {key: x for key, x in tensors.items() if key in ("images", "dout", "out")}
            weights = convert(dotted({key: x for key, x in tensors.items() if key not in kept}))
            return kept | {key.replace(".", "/"): x for key, x in weights.items()}

        return change

    return Contender("timm", build, Layout(renamed(swin.to_timm), renamed(swin.from_timm)))


def dotted(parameters: Tensors) -> Tensors:
    """By the names that the model itself uses; arguments of functions have slashes in place of dots."""
    return {key.replace("/", "."): x for key, x in parameters.items()}


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
    """Useful operations and least traffic of all attention ops of a model on square images; see `benchmarks.problems`."""
    from .problems import attention_bytes, useful_flops

    sizes = []

    def record(query, key, value, rpb, pattern: Pattern, scale: float):
        heads, head_dim = query.shape[-2:]
        valid = pattern_index(pattern, tuple(query.shape[1:-2]), query.device)[2]
        pairs = int(valid.sum()) * query.shape[0] * heads
        sizes.append((useful_flops(pairs, head_dim, train), attention_bytes(query.numel(), query.element_size(), train)))
        return value, None

    with replaced_op(record), torch.no_grad():
        model(torch.zeros(batch, 3, side, side))
    return sum(flops for flops, _ in sizes), sum(size for _, size in sizes)


def make_problem(name: str, batch: int, train: bool, side: int = 224, **overrides) -> Problem:
    """A model of this library on random square images, its parameters among the inputs; `overrides` go to `create_model`."""
    torch.manual_seed(0)
    model = natrpb.create_model(name, drop_path_rate=0.0, **overrides).train(train)
    parameters = {key.replace(".", "/"): value.detach() for key, value in model.named_parameters()}
    images = torch.randn(batch, 3, side, side)

    def run(images: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dotted(parameters), (images,))

    theirs = [timm_contender(name, side, train, **overrides)] if name.startswith("swin") else []
    flops, size = attention_flops(model, side, batch, train)
    return Problem(
        tensors={"images": images, **parameters},
        dout=torch.randn(batch, model.num_classes) if train else None,
        exact=autograd_results(with_plain_op(run)),
        contenders=[Contender(OURS, lambda: run), Contender("gather", lambda: with_plain_op(run)), *theirs],
        flops=flops,
        bytes=size,
        tolerance=TOLERANCE,
        attention_share=attention_share,
    )


def model_workloads() -> list[Workload]:
    return [
        Workload(
            f"{name.removesuffix('_224')}-224-B1 fp32 {'forward+backward' if train else 'forward'}",
            "Whole models",
            functools.partial(make_problem, name, 1, train),
        )
        for name in ("nat_mini", "nat_tiny", "swin_tiny_patch4_window7_224")
        for train in (False, True)
    ]

"""What is timed on a GPU: the workloads, what they are to reach, and who else is asked to do them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import natrpb
from natrpb.convert import swin
from tests.cases import NAT_STAGES, Case

from . import flex, irpe, peers, windows
from .gpu import Captured
from .gpu_report import NO_BIAS
from .harness import OURS, TOLERANCE, Contender, Problem, Tensors, Unavailable, Workload, autograd_results
from .models import dotted, timm_model, with_plain_op
from .problems import PACKED, block_problem, cosine_problem, exact_attention, pairs_of

BATCH = 128
NA_STAGES = [replace(stage, batch=BATCH) for stage in NAT_STAGES]
FAR = replace(NA_STAGES[0], kernel_size=13)
DILATED = replace(NA_STAGES[0], dilation=8)
SWIN_STAGES = [
    Case((side, side), 7, shift=0, batch=BATCH, heads=heads, head_dim=32)
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24))
]
SHIFTED = [replace(stage, shift=3) for stage in SWIN_STAGES[:3]]
LAST_STAGES = [*SHIFTED[1:], SWIN_STAGES[3]]  # a window spans the last stage's map, which is not shifted
BLOCK = replace(SHIFTED[0], batch=16)  # its exact answer takes all samples at once
COSINE = Case((64, 64), 8, shift=4, batch=16, heads=3, head_dim=32)  # Swin v2-T at 256
LARGE_WINDOWS = [
    Case((96, 96), 12, shift=6, batch=32, heads=4, head_dim=32),  # Swin-B at 384
    Case((64, 64), 16, shift=8, batch=64, heads=3, head_dim=32),  # Swin v2-T at 256
    Case((96, 96), 24, shift=12, batch=32, heads=4, head_dim=32),  # Swin v2-B at 384
    Case((42, 42, 42), 7, shift=3, batch=8, heads=3, head_dim=16),  # as in SwinUNETR
]
SMALL = [NAT_STAGES[0], NAT_STAGES[3]]  # one image: launching takes longer than computing

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
# Tensors of query's size that must move: query, key, value and out; in the backward pass, which also reads lse, these, dout and
# three gradients.
TENSORS = {FORWARD: 4, BACKWARD: 8, TRAINING: 12}
LSE = {FORWARD: 0, BACKWARD: 1, TRAINING: 2}
FLOPS_PER_PAIR = {FORWARD: 4, BACKWARD: 10, TRAINING: 14}  # times head_dim

GRAPH = f"{OURS}, CUDA graph"
NATTEN_BACKENDS = ("hopper-fna", "blackwell-fna", "cutlass-fna", "flex-fna")
MODEL_TOLERANCE = 3e-2  # of fp16 through some twenty layers
MODEL_CHUNK = 8  # images that the exact model computes at a time


def work(case: Case, dtype: torch.dtype, mode: str) -> dict:
    """What a mode of an attention op asks for: the fields of a `Problem` about its cost."""
    per_query = case.batch * case.heads * torch.Size(case.spatial).numel()
    return dict(
        flops=pairs_of(case) * case.head_dim * FLOPS_PER_PAIR[mode],
        bytes=per_query * (case.head_dim * dtype.itemsize * TENSORS[mode] + 4 * LSE[mode]),
        tolerance=TOLERANCE[dtype],
        backward_alone=mode == BACKWARD,
    )


def attention(case: Case, dtype: torch.dtype, mode: str, contenders: Callable[[bool], list[Contender]], **options) -> Problem:
    """Attention over one case; `contenders` makes them, ours first, for inference (False) or training."""
    query, key, value, rpb, _, _ = case.inputs(dtype)
    wide = None if rpb is None else rpb.float()  # as parameters are under autocast
    return Problem(
        tensors=dict(query=query, key=key, value=value, rpb=wide),
        dout=None if mode == FORWARD else torch.randn_like(value),
        exact=exact_attention(case),
        contenders=contenders(mode != FORWARD),
        **work(case, dtype, mode),
        **options,
    )


def ours(case: Case, name: str = OURS, **options) -> Contender:
    return Contender(name, lambda: windows.fused_attend(case), **options)


def natten(case: Case, backend: str) -> Contender:
    """NATTEN from 0.20 on, which has no bias, with one of its back ends."""

    def build() -> Callable[..., Tensor]:
        try:
            module = importlib.import_module("natten")
        except Exception as failure:
            raise Unavailable(f"NATTEN does not import ({type(failure).__name__})") from None
        if not hasattr(module, f"na{case.ndim}d"):
            raise Unavailable("this NATTEN is older than 0.20")
        attend = getattr(module, f"na{case.ndim}d")
        kernel_size, stride, dilation, kind, _ = case.pattern
        pattern = dict(kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=tuple(map(bool, kind)))
        return functools.partial(attend, **pattern, backend=backend)

    return Contender(f"NATTEN, no bias ({backend})", build, without=("rpb",))


# FlexAttention in several orders and block sizes; the report keeps the best.
FLEX = {
    (56, 56): [dict(), dict(tile=(8, 8)), dict(tile=(8, 8), block=64)],
    (28, 28): [dict(), dict(block=64)],
    (14, 14): [dict(), dict(block=64)],
    (7, 7): [dict(), dict(block=64)],
}


def neighborhood(case: Case, dtype: torch.dtype, mode: str, compiled: bool = True, plain: bool = True) -> Problem:
    """Neighborhood attention; `compiled` and `plain` ask for the peers that must be compiled, and those that gather."""

    def contenders(train: bool) -> list[Contender]:
        found = [ours(case), ours(case, NO_BIAS, without=("rpb",))]
        if compiled:
            found += [flex.neighborhood(case, train, **choice) for choice in FLEX[case.spatial]]
        found += [natten(case, backend) for backend in NATTEN_BACKENDS]
        found.append(peers.sdpa(case, train))
        if plain:
            found.append(peers.gather(case))
        return found + ([peers.compiled_gather(case)] if compiled and plain else [])

    return attention(case, dtype, mode, contenders)


def window(case: Case, dtype: torch.dtype, mode: str, compiled: bool = True) -> Problem:
    """Windowed attention on slices of a projection, beside Swin's own path, SDPA, timm and FlexAttention."""

    def contenders(train: bool) -> list[Contender]:
        found = [ours(case, layout=PACKED), *windows.window_peers(case, dtype, train, compiled)]
        if compiled:
            path = windows.Swin(case, dtype, train)
            found.append(flex.windows_as_batch(path))
            if path.positions < flex.USUAL_BLOCK:
                found.append(flex.windows_as_blocks(path))
        return found

    return attention(case, dtype, mode, contenders)


def projected(case: Case, dtype: torch.dtype, mode: str) -> Problem:
    """From what a projection leaves to its gradient: packed, and from three slices, whose gradients autograd stacks."""
    return attention(case, dtype, mode, lambda train: windows.packed_and_sliced(case))


def launches(case: Case, dtype: torch.dtype, mode: str) -> Problem:
    """One image, eager and as a captured CUDA graph, launch after launch."""
    return attention(case, dtype, mode, lambda train: [ours(case), ours(case, GRAPH, wrap=Captured)], exposed=True)


def model(name: str, dtype: torch.dtype, batch: int, side: int = 224, **overrides) -> Problem:
    """Inference of a whole model on random square images; `overrides` go to `create_model`."""
    net = natrpb.create_model(name, drop_path_rate=0.0, **overrides).eval().to(dtype)
    parameters = {key.replace(".", "/"): value.detach() for key, value in net.named_parameters()}

    def run(images: Tensor, **_: Tensor) -> Tensor:
        return net(images)

    def exactly(images: Tensor, **parameters: Tensor) -> Tensor:
        given = dotted(parameters)
        return torch.cat([torch.func.functional_call(net, given, (part,)) for part in images.split(MODEL_CHUNK)])

    def theirs() -> torch.nn.Module:
        model = timm_model(name, side, **overrides)
        model.load_state_dict(swin.to_timm(net.state_dict()))
        return model.eval().to(dtype)

    def answer(tensors: Tensors, dout: Tensor | None) -> Tensors:
        return autograd_results(with_plain_op(exactly))(tensors, dout)

    return Problem(
        tensors={"images": torch.randn(batch, 3, side, side, dtype=dtype), **parameters},
        dout=None,
        exact=answer,
        contenders=[
            Contender(OURS, lambda: run),
            Contender(GRAPH, lambda: run, wrap=Captured),
            Contender(f"{OURS}, compiled", lambda: compiled_model(net)),
            Contender("gather", lambda: with_plain_op(run)),
            *(timm_models(theirs) if name.startswith("swin") else []),
        ],
        flops=0,
        bytes=0,
        tolerance=MODEL_TOLERANCE,
        items=batch,
    )


def timm_models(build: Callable[[], torch.nn.Module]) -> list[Contender]:
    def eager() -> Callable[..., Tensor]:
        net = build()
        return lambda images, **_: net(images)

    return [Contender("timm", eager), Contender("timm, compiled", lambda: compiled_model(build()))]


def compiled_model(net: torch.nn.Module) -> Callable[..., Tensor]:
    compiled = torch.compile(net, dynamic=False)
    return lambda images, **_: compiled(images)


def irpe_attention(dtype: torch.dtype, mode: str, batch: int = BATCH, **options) -> Problem:
    """A layer of DeiT-S with encodings on queries, keys and values."""
    problem = irpe.attention_problem(batch, dtype, mode != FORWARD, **options)
    forward = irpe.attention_problem(batch, dtype, False, **options).flops if mode == BACKWARD else 0
    query = problem.tensors["query"]
    bytes_needed = query.numel() * dtype.itemsize * TENSORS[mode] + 4 * LSE[mode] * query.numel() // irpe.HEAD_DIM
    return replace(problem, flops=problem.flops - forward, bytes=bytes_needed, backward_alone=mode == BACKWARD)


def irpe_workloads() -> list[Workload]:
    fp16, fp32 = torch.float16, torch.float32
    problems = {
        "rpe_index-B128 fp16 forward": functools.partial(irpe.index_problem, BATCH, fp16, False),
        "rpe_index-B128 fp16 backward": functools.partial(irpe.index_backward_problem, BATCH, fp16),
        "rpe_index-B128 fp32 backward": functools.partial(irpe.index_backward_problem, BATCH, fp32),
        "attention-B128 fp16 forward": functools.partial(irpe_attention, fp16, FORWARD),
        "attention-B128 fp16 backward": functools.partial(irpe_attention, fp16, BACKWARD),
        "attention-B128 fp32 forward+backward": functools.partial(irpe_attention, fp32, TRAINING),
    }
    group = "Image relative position encoding, DeiT-S"
    return [Workload(f"iRPE {name}", group, functools.partial(_seeded, make)) for name, make in problems.items()]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def entry(
    group: str, make: Callable[..., Problem], case: Case, mode: str, dtype: str = "bf16", what: str = "", goals=(), **options
) -> Workload:
    return Workload(
        f"{what}{case} {dtype} {mode}",
        group,
        functools.partial(_seeded, make, case, DTYPES[dtype], mode, **options),
        goals=dict(goals),
    )


def _seeded(make: Callable[..., Problem], *arguments, **options) -> Problem:
    torch.manual_seed(0)
    return make(*arguments, **options)


def block(case: Case, dtype: torch.dtype, mode: str) -> Problem:
    """The whole attention block with its projections, timm's own beside it, eager and compiled."""
    return replace(block_problem(case, dtype, mode == TRAINING, compiled=True), flops=0, bytes=0)


def cosine(case: Case, dtype: torch.dtype, mode: str) -> Problem:
    """Windows with Swin v2's cosine scores."""
    return replace(cosine_problem(case, dtype, mode == TRAINING), flops=0, bytes=0)


def all_workloads() -> list[Workload]:
    """Everything, what matters most first."""
    two, seven = "Neighborhood attention with bias, two axes", "Windows 7x7 with bias"
    rivals = {"FlexAttention": 5.0, "NATTEN, no bias": 1.5}
    forward, backward = (0.70, 0.65, 0.60, 0.50), 0.45
    launch, image, large = "Launches, one image", "Whole models, inference", "Larger windows and volumes"
    return [
        *[entry(two, neighborhood, case, FORWARD, goals={"floor": goal, **rivals}) for case, goal in zip(NA_STAGES, forward)],
        *[entry(two, neighborhood, case, BACKWARD, goals={"floor": backward, "bias": 1.15, **rivals}) for case in NA_STAGES],
        entry(two, neighborhood, FAR, FORWARD, goals={"floor": 0.5, **rivals}),
        entry(two, neighborhood, FAR, BACKWARD, goals=rivals, plain=False),
        *[
            entry(seven, window, case, mode, compiled=mode != TRAINING, goals=beside_sdpa | floor)
            for case in (SWIN_STAGES[0], SHIFTED[0])
            for (mode, beside_sdpa), floor in zip(GOALS_BESIDE_SDPA, GOALS_OF_WINDOWS)
        ],
        *[
            entry(seven, window, case, mode, compiled=mode == FORWARD and case in LAST_STAGES, goals=goal)
            for case in (*SWIN_STAGES[1:], *SHIFTED[1:])
            for mode, goal in GOALS_BESIDE_SDPA
        ],
        *[
            entry(large, window, case, mode, compiled=mode == FORWARD, goals=goal)
            for case in LARGE_WINDOWS
            for mode, goal in GOALS_BESIDE_SDPA
        ],
        *[
            entry("Backward to one projection", projected, case, BACKWARD, what="qkvpacked ")
            for case in (NA_STAGES[0], SWIN_STAGES[0])
        ],
        *[model_entry(image, name, goal) for name, goal in (("nat_tiny", 2 * 2772.0), ("dinat_tiny", 2 * 2909.0))],
        model_entry(image, "swin_tiny_patch4_window7_224"),
        *[entry(launch, launches, case, mode) for case in SMALL for mode in (FORWARD, TRAINING)],
        *[entry("Dilated", neighborhood, DILATED, mode, compiled=False, plain=False) for mode in (FORWARD, BACKWARD)],
        *[
            entry("Other dtypes", neighborhood, NA_STAGES[0], mode, dtype, compiled=False, plain=False)
            for dtype in ("fp16", "fp32")
            for mode in (FORWARD, BACKWARD)
        ],
        *[entry("Windows with cosine scores", cosine, COSINE, mode, what="cosine ") for mode in (FORWARD, TRAINING)],
        *irpe_workloads(),
        *[entry("Window blocks, with projections", block, BLOCK, mode, what="block ") for mode in (FORWARD, TRAINING)],
    ]


# For forward, backward, and both.
GOALS_BESIDE_SDPA = [(FORWARD, {"SDPA per window": 2.0}), (BACKWARD, {}), (TRAINING, {"SDPA per window": 4.0})]
GOALS_OF_WINDOWS = [{"floor": 0.7, "FlexAttention": 5.0}, {"floor": 0.45, "FlexAttention": 5.0}, {}]


def model_entry(group: str, name: str, images_per_second: float | None = None) -> Workload:
    make = functools.partial(_seeded, model, name, torch.float16, BATCH)
    goals = {} if images_per_second is None else {"images": images_per_second}
    return Workload(f"{name.removesuffix('_224')}-224-B{BATCH} fp16 forward", group, make, goals=goals)


def quick_workloads() -> list[Workload]:
    """A minute's worth, without anything that has to be compiled first."""
    group = "Neighborhood attention with bias, two axes"
    return [
        *[entry(group, neighborhood, NA_STAGES[0], mode, compiled=False, plain=False) for mode in (FORWARD, BACKWARD)],
        entry("Windows 7x7 with bias", window, SHIFTED[0], TRAINING, compiled=False),
        entry("Launches, one image", launches, SMALL[1], TRAINING),
    ]

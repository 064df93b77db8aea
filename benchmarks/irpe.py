"""Image relative position encoding: the op and the attention, beside what the official code does without its own op.

SDPA without an encoding is no peer, as it computes less: it is the yardstick of what the encoding costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import natrpb
from natrpb import ops
from natrpb.modules.irpe import encodings_of

from .harness import AS_IS, OURS, TOLERANCE, Contender, Layout, Problem, Tensors, Workload, autograd_results
from .models import TOLERANCE as MODEL_TOLERANCE
from .models import attention_share
from .problems import PACKED, attention_bytes, useful_flops

SIDE, HEADS, HEAD_DIM = 14, 6, 64  # DeiT-S on a 224 x 224 image: 196 patches and a classification token
TABLES = ("key_table", "query_table", "value_table")
MODEL = "deit_small_patch16_224_ctx_product_50_shared_qkv"


@functools.lru_cache(maxsize=8)
def map_on(device: torch.device, side: int, dtype: torch.dtype = torch.int32) -> tuple[Tensor, int]:
    """[N, N] of the published models (product, ratio 1.9, one skipped token), and its number of buckets."""
    module, *_ = natrpb.build_rpe(natrpb.get_rpe_config(skip=1, rpe_on="q"), HEAD_DIM, 1)
    index = encodings_of(None, module, None, 1 + side * side, side, side, device)["key_index"]
    return index.reshape(index.shape[-2:]).to(dtype), module.num_buckets


def bucket_map(side: int = SIDE) -> tuple[Tensor, int]:
    """`map_on` the device where tensors are made."""
    return map_on(torch.get_default_device(), side)


@functools.lru_cache(maxsize=8)
def flat_map(device: torch.device, side: int) -> Tensor:
    """The official code's index into rows [N * C]: row * C + bucket, int64 [N * N]."""
    index, buckets = map_on(device, side)
    return (index + buckets * torch.arange(len(index), device=device)[:, None]).flatten()


def indexed(rows: Tensor, side: int) -> Tensor:
    """rpe_index as the official code has it without its own op: [B, h, N, C] -> [B, h, N, N]."""
    return rows.flatten(2)[:, :, flat_map(rows.device, side)].unflatten(2, (rows.shape[2], rows.shape[2]))


def index_problem(batch: int, dtype: torch.dtype, train: bool, side: int = SIDE) -> Problem:
    """rpe_index, forward or forward and backward."""
    index, buckets = bucket_map(side)
    x = torch.randn(batch, HEADS, len(index), buckets, dtype=dtype)
    y = torch.randn(batch, HEADS, *index.shape, dtype=dtype)
    plain = functools.partial(indexed, side=side)
    return Problem(
        tensors={"x": x},
        dout=y if train else None,
        exact=autograd_results(lambda x: plain(x)),
        contenders=[
            Contender(OURS, lambda: lambda x: natrpb.rpe_index(x, index)),
            Contender("indexing", lambda: lambda x: plain(x)),
        ],
        flops=y.numel() if train else 0,
        bytes=(x.numel() + y.numel()) * x.element_size() * (2 if train else 1),
        tolerance=TOLERANCE[dtype],
    )


def index_backward_problem(batch: int, dtype: torch.dtype, side: int = SIDE) -> Problem:
    """The gradient of rpe_index alone; autograd calls index_put for that of an indexing."""
    index, buckets = bucket_map(side)
    positions = len(index)
    y = torch.randn(batch, HEADS, positions, positions, dtype=dtype)
    wide = index.long()

    def index_put(y: Tensor) -> Tensor:
        rows = y.new_zeros(batch, HEADS, positions * buckets)
        rows = torch.ops.aten.index_put_(rows, [None, None, flat_map(y.device, side)], y.flatten(2), True)
        return rows.unflatten(2, (positions, buckets))

    def scatter_add(y: Tensor) -> Tensor:
        return y.new_zeros(batch, HEADS, positions, buckets).scatter_add_(-1, wide.expand_as(y), y)

    return Problem(
        tensors={"y": y},
        dout=None,
        exact=autograd_results(index_put),
        contenders=[
            Contender(OURS, lambda: lambda y: ops.rpe_index_transposed(y, index, buckets)),
            Contender("indexing", lambda: index_put),
            Contender("scatter_add", lambda: scatter_add),
        ],
        flops=y.numel(),
        bytes=(y.numel() + batch * HEADS * positions * buckets) * y.element_size(),
        tolerance=TOLERANCE[dtype],
    )


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, key_table: Tensor, query_table: Tensor, value_table: Tensor, side: int = SIDE
) -> Tensor:
    """Attention with encodings on queries, keys and values as the official code composes it; heads-last, shared tables."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5
    q = q * scale
    scores = q @ k.mT + indexed(q @ key_table, side) + indexed((k * scale) @ query_table, side).mT
    weights = scores.softmax(-1)
    batch, heads, positions, _ = weights.shape
    encoding = value_table[0][map_on(query.device, side, torch.int64)[0]]  # [N, N, d]
    by_query = weights.permute(2, 0, 1, 3).reshape(positions, batch * heads, positions) @ encoding
    return (weights @ v).transpose(1, 2) + by_query.unflatten(1, (batch, heads)).transpose(0, 1)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def _without(names: Callable[[str], bool], layout: Layout = AS_IS) -> Layout:
    """`layout` without the tensors that a contender does not take."""
    return Layout(lambda tensors: {name: x for name, x in layout.pack(tensors).items() if not names(name)}, dict)


def attention_flops(batch: int, positions: int, buckets: int, train: bool) -> int:
    """Of one layer: all pairs, and the three products with tables."""
    tables = 3 * 2 * batch * HEADS * positions * buckets * HEAD_DIM
    return useful_flops(batch * HEADS * positions**2, HEAD_DIM, train) + tables * (3 if train else 1)


def attention_problem(batch: int, dtype: torch.dtype, train: bool, side: int = SIDE) -> Problem:
    index, buckets = bucket_map(side)
    query, key, value = (torch.randn(batch, len(index), HEADS, HEAD_DIM, dtype=dtype) for _ in range(3))
    tables = {name: torch.randn(1, HEAD_DIM, buckets, dtype=dtype) / 4 for name in TABLES}
    tables["value_table"] = tables["value_table"].mT.contiguous()
    maps = {name.replace("table", "index"): index for name in TABLES} | {"query_index": index.t().contiguous()}
    plain = functools.partial(plain_attention, side=side)
    return Problem(
        tensors=dict(query=query, key=key, value=value, **tables),
        dout=torch.randn_like(value) if train else None,
        exact=autograd_results(lambda **x: plain(**x)),
        contenders=[
            Contender(OURS, lambda: functools.partial(natrpb.irpe_attention, **maps), PACKED),
            Contender("indexing", lambda: plain, PACKED),
            Contender("SDPA without encoding", lambda: sdpa, _without(TABLES.__contains__, PACKED), checked=False),
        ],
        flops=attention_flops(batch, len(index), buckets, train),
        bytes=attention_bytes(query.numel(), query.element_size(), train),
        tolerance=TOLERANCE[dtype],
    )


def _attend_with(function: Callable[..., Tensor], encoded: bool):
    """A forward for `natrpb.iRPEAttention` around another attention function."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        inputs = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        tables = (self.rpe_k.table, self.rpe_q.table, self.rpe_v.table) if encoded else ()
        return self.proj(function(*inputs, *tables).flatten(2))

    return forward


def model_problem(batch: int, train: bool, name: str = MODEL, **overrides) -> Problem:
    """A step of DeiT-S with encodings on queries, keys and values, its parameters among the inputs."""
    torch.manual_seed(0)
    model = natrpb.create_model(name, drop_path_rate=0.0, **overrides).train(train)
    parameters = {key.replace(".", "/"): value.detach() for key, value in model.named_parameters()}
    for key, value in parameters.items():
        if "lookup_table" in key:
            value.normal_(std=0.05)  # new tables are zero, as if there were none
    side = model.grid_size
    images = torch.randn(batch, 3, 16 * side, 16 * side)

    def run(images: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, {key.replace("/", "."): x for key, x in parameters.items()}, (images,))

    def run_with(function: Callable[..., Tensor], encoded: bool) -> Callable[..., Tensor]:
        @functools.wraps(run)
        def patched(**tensors: Tensor) -> Tensor:
            with mock.patch.object(natrpb.iRPEAttention, "forward", _attend_with(function, encoded)):
                return run(**tensors)

        return patched

    plain = run_with(functools.partial(plain_attention, side=side), True)
    positions, buckets, depth = 1 + side * side, bucket_map(side)[1], len(model.blocks)
    without = _without(lambda name: "lookup_table" in name)
    # Of the last block only the classification token counts, and its pairs share one bucket: this gradient is zero, of which
    # no relative error can be told.
    zero = f"blocks/{depth - 1}/attn/rpe_k/lookup_table_weight"

    def exact(tensors: Tensors, dout: Tensor | None) -> Tensors:
        return {name: x for name, x in autograd_results(plain)(tensors, dout).items() if name != zero}

    return Problem(
        tensors={"images": images, **parameters},
        dout=torch.randn(batch, model.num_classes) if train else None,
        exact=exact,
        contenders=[
            Contender(OURS, lambda: run),
            Contender("indexing", lambda: plain),
            Contender("SDPA without encoding", lambda: run_with(sdpa, False), without, checked=False),
        ],
        flops=depth * attention_flops(batch, positions, buckets, train),
        bytes=depth * attention_bytes(batch * positions * HEADS * HEAD_DIM, 4, train),
        tolerance=MODEL_TOLERANCE,
        attention_share=attention_share,
    )


def irpe_workloads() -> list[Workload]:
    group = "Image relative position encoding, DeiT-S"
    modes = ((False, "forward"), (True, "forward+backward"))

    def seeded(make: Callable[..., Problem], *arguments) -> Problem:
        torch.manual_seed(0)
        return make(*arguments)

    def workload(name: str, make: Callable[..., Problem], *arguments) -> Workload:
        return Workload(f"iRPE {name}", group, functools.partial(seeded, make, *arguments))

    return [
        workload("rpe_index-B8 fp32 forward", index_problem, 8, torch.float32, False),
        workload("rpe_index-B8 fp32 backward", index_backward_problem, 8, torch.float32),
        workload("rpe_index-B8 bf16 backward", index_backward_problem, 8, torch.bfloat16),
        *[workload(f"attention-B8 fp32 {mode}", attention_problem, 8, torch.float32, train) for train, mode in modes],
        workload("attention-B8 bf16 forward", attention_problem, 8, torch.bfloat16, False),
        workload(f"{MODEL}-B8 fp32 forward+backward", model_problem, 8, True),
    ]

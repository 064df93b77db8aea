"""Neighborhood attention without this library: what people write in plain PyTorch, and other packages.

Every peer gets its tensors in the layout that suits it, and everything that does not depend on them (indices, masks; for
inference also the dense bias) is prepared outside the timed call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from natrpb import reference
from natrpb.patterns import NEIGHBORHOOD, Pattern
from tests.cases import Case

from .harness import Contender, Layout, Tensors, Unavailable

DENSE_LIMIT = {"cpu": 1 << 30, "cuda": 16 << 30}  # bytes; larger dense tensors are not tried
BIAS_ALIGNMENT = 16  # entries from one row of a bias to the next, for SDPA's memory-efficient back end


def per_tensor(convert: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], *names: str) -> Layout:
    """A layout that converts the named tensors and leaves the others."""

    def with_names(function: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {name: function(x) if name in names else x for name, x in tensors.items()}

    return Layout(with_names(convert), with_names(back))


# [B, *, h, d] <-> [B, h, *, d]
HEADS_FIRST = per_tensor(
    lambda x: x.movedim(-2, 1).contiguous(), lambda x: x.movedim(1, -2), "query", "key", "value", "dout", "out"
)
pattern_index = functools.lru_cache(maxsize=64)(reference.pattern_index)  # (pattern, spatial, device)


@functools.lru_cache(maxsize=64)
def has_empty_slots(pattern: Pattern, spatial: tuple[int, ...]) -> bool:
    """Whether some query has fewer keys than slots, as at the border of a causal or shifted window."""
    return not bool(reference.pattern_index(pattern, spatial)[2].all())


def rows(x: Tensor, keys: Tensor, empty: Tensor | None) -> Tensor:
    """Every query's keys or values: x [B, h, *, d] -> [B, h, N, T, d]; zero where a slot holds no key."""
    gathered = x.flatten(2, -2)[:, :, keys]
    return gathered if empty is None else gathered.masked_fill(empty[..., None], 0)


def tables(pattern: Pattern, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and table entries of every query of heads-first x, and which slots are empty, None where no slot is."""
    spatial = tuple(x.shape[2:-1])
    keys, relative, valid = pattern_index(pattern, spatial, x.device)
    return keys, relative, ~valid if has_empty_slots(pattern, spatial) else None


def gathered_scores(query: Tensor, key: Tensor, rpb: Tensor | None, pattern: Pattern) -> Tensor:
    """[B, h, N, T] from heads-first tensors, by advanced indexing."""
    keys, relative, empty = tables(pattern, query)
    scores = torch.einsum("bhnd,bhntd->bhnt", query.flatten(2, -2), rows(key, keys, empty))
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, relative]
    return scores if empty is None else scores.masked_fill(empty, float("-inf"))


def gathered_sums(weights: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """[B, h, *, d] from weights [B, h, N, T] and heads-first values."""
    keys, _, empty = tables(pattern, value)
    return torch.einsum("bhnt,bhntd->bhnd", weights, rows(value, keys, empty)).unflatten(2, value.shape[2:-1])


def gathered_attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, pattern: Pattern, scale: float) -> Tensor:
    """`natrpb.reference.local_attention` with its index tables kept between calls; heads-first."""
    weights = gathered_scores(query * scale, key, rpb, pattern).softmax(-1)
    return gathered_sums(weights, value, pattern)


def gather(case: Case) -> Contender:
    def build() -> Callable[..., Tensor]:
        return functools.partial(gathered_attention, pattern=case.pattern, scale=case.head_dim**-0.5)

    return Contender("gather", build, HEADS_FIRST)


def compiled_gather(case: Case) -> Contender:
    """torch.compile of the gather: the index tables become inputs of the graph."""

    def build() -> Callable[..., Tensor]:
        if has_empty_slots(case.pattern, case.spatial):
            raise Unavailable("compiled for patterns without empty slots only")
        keys, relative, _ = pattern_index(case.pattern, case.spatial, torch.get_default_device())
        scale = case.head_dim**-0.5

        def attend(query, key, value, rpb, keys, relative):
            k, v = (x.flatten(2, -2)[:, :, keys] for x in (key, value))
            scores = torch.einsum("bhnd,bhntd->bhnt", query.flatten(2, -2) * scale, k) + rpb.flatten(1)[:, relative]
            return torch.einsum("bhnt,bhntd->bhnd", scores.softmax(-1), v).reshape(value.shape)

        compiled = torch.compile(attend, dynamic=False)
        return functools.partial(compiled, keys=keys, relative=relative)

    return Contender("torch.compile", build, HEADS_FIRST)


def dense_bias(rpb: Tensor, case: Case) -> Tensor:
    """The bias of every pair of positions, -inf for pairs outside the pattern: [h, *rpb_shape] -> [h, N, N]."""
    keys, relative, valid = pattern_index(case.pattern, case.spatial, rpb.device)
    positions = keys.shape[0]
    pairs = (torch.arange(positions, device=rpb.device)[:, None] * positions + keys)[valid]
    dense = rpb.new_full((rpb.shape[0], positions * positions), float("-inf"))
    return dense.index_copy(1, pairs, rpb.flatten(1)[:, relative[valid]]).unflatten(1, (positions, positions))


def fused_sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """scaled_dot_product_attention; on a GPU by its memory-efficient back end, the only fused one with a bias gradient."""
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def aligned(bias: Tensor) -> Tensor:
    """[..., N, N] with rows as SDPA's memory-efficient back end wants them; it would copy others in every call."""
    columns = bias.shape[-1]
    if not bias.is_cuda or columns % BIAS_ALIGNMENT == 0:
        return bias
    return F.pad(bias, (0, -columns % BIAS_ALIGNMENT))[..., :columns]


def sdpa(case: Case, train: bool) -> Contender:
    """scaled_dot_product_attention over all pairs; in training the bias is made from the table in every step."""

    def build() -> Callable[..., Tensor]:
        positions = torch.Size(case.spatial).numel()
        size = 4 * case.heads * positions**2 * (case.batch if train else 1)
        if size > DENSE_LIMIT[torch.get_default_device().type]:
            raise Unavailable(f"{'attention weights' if train else 'dense bias'} of {size / 1e9:.1f} GB")
        kept = {}

        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            if train:
                bias = aligned(dense_bias(rpb, case))
            else:
                bias = kept["bias"] if kept else kept.setdefault("bias", aligned(dense_bias(rpb, case)))
            flat = (x.flatten(2, -2) for x in (query, key, value))
            return fused_sdpa(*flat, bias.expand(case.batch, -1, -1, -1)).unflatten(2, case.spatial)

        return attend

    return Contender("SDPA", build, HEADS_FIRST)


def unfold(case: Case) -> Contender:
    """Sliding windows by Tensor.unfold, the ones at the border repeated."""

    def build() -> Callable[..., Tensor]:
        kernel_size, stride, dilation, kind, _ = case.pattern
        if set(stride + dilation) != {1} or set(kind) != {NEIGHBORHOOD}:
            raise Unavailable("sliding windows have no stride, dilation or causality")
        firsts = [(torch.arange(length) - k // 2).clamp(min=0, max=length - k) for length, k in zip(case.spatial, kernel_size)]
        _, relative, _ = pattern_index(case.pattern, case.spatial, torch.get_default_device())
        scale = case.head_dim**-0.5

        def windows(x: Tensor) -> Tensor:
            """[B, h, *, d] -> [B, h, *, d, K_0, ...]."""
            for axis, k in enumerate(kernel_size):
                x = x.unfold(2 + axis, k, 1)
            for axis, first in enumerate(firsts):
                x = x.index_select(2 + axis, first)
            return x

        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            k, v = (windows(x).flatten(3 + case.ndim).flatten(2, 1 + case.ndim) for x in (key, value))  # [B, h, N, d, T]
            scores = torch.einsum("bhnd,bhndt->bhnt", query.flatten(2, -2) * scale, k) + rpb.flatten(1)[:, relative]
            return torch.einsum("bhnt,bhndt->bhnd", scores.softmax(-1), v).unflatten(2, case.spatial)

        return attend

    return Contender("unfold", build, HEADS_FIRST)


def natten_functions(case: Case) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """NATTEN's unfused qk and av of this rank, the only ones with a bias on a CPU (0.17)."""
    try:
        functional = importlib.import_module("natten.functional")
    except Exception as failure:
        raise Unavailable(f"NATTEN does not import ({type(failure).__name__})") from None
    names = f"na{case.ndim}d_qk", f"na{case.ndim}d_av"
    if not all(hasattr(functional, name) for name in names):
        raise Unavailable("this NATTEN has neither bias nor CPU kernels (both left in 0.20)")
    if set(case.pattern.stride) != {1}:
        raise Unavailable("NATTEN 0.17 has no stride")
    return getattr(functional, names[0]), getattr(functional, names[1])


def natten(case: Case) -> Contender:
    def build() -> Callable[..., Tensor]:
        qk, av = natten_functions(case)
        kernel_size, _, dilation, kind, _ = case.pattern
        pattern = dict(kernel_size=kernel_size, dilation=dilation, is_causal=tuple(map(bool, kind)))
        scale = case.head_dim**-0.5

        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            return av(qk(query * scale, key, rpb=rpb, **pattern).softmax(-1), value, **pattern)

        return attend

    return Contender("NATTEN", build, HEADS_FIRST)

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

from natrpb import reference
from natrpb.patterns import NEIGHBORHOOD, Pattern
from tests.cases import Case

from .harness import Contender, Layout, Tensors, Unavailable

DENSE_LIMIT = 1 << 30  # bytes; larger dense tensors are not tried


def per_tensor(convert: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], *names: str) -> Layout:
    """A layout that converts the named tensors and leaves the others."""

    def with_names(function: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {name: function(x) if name in names else x for name, x in tensors.items()}

    return Layout(with_names(convert), with_names(back))


# [B, *, h, d] <-> [B, h, *, d]
HEADS_FIRST = per_tensor(
    lambda x: x.movedim(-2, 1).contiguous(), lambda x: x.movedim(1, -2), "query", "key", "value", "dout", "out"
)
pattern_index = functools.lru_cache(maxsize=64)(reference.pattern_index)


def rows(x: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Every query's keys or values: x [B, h, *, d] -> [B, h, N, T, d]; zero where a slot holds no key."""
    gathered = x.flatten(2, -2)[:, :, keys]
    return gathered if bool(valid.all()) else gathered.masked_fill(~valid[..., None], 0)


def gathered_scores(query: Tensor, key: Tensor, rpb: Tensor | None, pattern: Pattern) -> Tensor:
    """[B, h, N, T] from heads-first tensors, by advanced indexing."""
    keys, relative, valid = pattern_index(pattern, tuple(query.shape[2:-1]))
    scores = torch.einsum("bhnd,bhntd->bhnt", query.flatten(2, -2), rows(key, keys, valid))
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, relative]
    return scores if bool(valid.all()) else scores.masked_fill(~valid, float("-inf"))


def gathered_sums(weights: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """[B, h, *, d] from weights [B, h, N, T] and heads-first values."""
    spatial = value.shape[2:-1]
    keys, _, valid = pattern_index(pattern, tuple(spatial))
    return torch.einsum("bhnt,bhntd->bhnd", weights, rows(value, keys, valid)).unflatten(2, spatial)


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
        keys, relative, valid = pattern_index(case.pattern, case.spatial)
        if not bool(valid.all()):
            raise Unavailable("compiled for patterns without empty slots only")
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
    keys, relative, valid = pattern_index(case.pattern, case.spatial)
    positions = keys.shape[0]
    pairs = (torch.arange(positions)[:, None] * positions + keys)[valid]
    dense = rpb.new_full((rpb.shape[0], positions * positions), float("-inf"))
    return dense.index_copy(1, pairs, rpb.flatten(1)[:, relative[valid]]).unflatten(1, (positions, positions))


def sdpa(case: Case, train: bool) -> Contender:
    """scaled_dot_product_attention over all pairs; in training the bias is made from the table in every step."""

    def build() -> Callable[..., Tensor]:
        positions = torch.Size(case.spatial).numel()
        size = 4 * case.heads * positions**2 * (case.batch if train else 1)
        if size > DENSE_LIMIT:
            raise Unavailable(f"{'attention weights' if train else 'dense bias'} of {size / 1e9:.1f} GB")
        kept = {}

        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            if train:
                bias = dense_bias(rpb, case)
            else:
                bias = kept["bias"] if kept else kept.setdefault("bias", dense_bias(rpb, case))
            flat = (x.flatten(2, -2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(*flat, attn_mask=bias.expand(case.batch, -1, -1, -1))
            return out.unflatten(2, case.spatial)

        return attend

    return Contender("SDPA", build, HEADS_FIRST)


def unfold(case: Case) -> Contender:
    """Sliding windows by Tensor.unfold, the ones at the border repeated."""

    def build() -> Callable[..., Tensor]:
        kernel_size, stride, dilation, kind, _ = case.pattern
        if set(stride + dilation) != {1} or set(kind) != {NEIGHBORHOOD}:
            raise Unavailable("sliding windows have no stride, dilation or causality")
        firsts = [(torch.arange(length) - k // 2).clamp(min=0, max=length - k) for length, k in zip(case.spatial, kernel_size)]
        _, relative, _ = pattern_index(case.pattern, case.spatial)
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


def flex(case: Case, train: bool) -> Contender:
    """FlexAttention, compiled, with the table captured by score_mod."""

    def build() -> Callable[..., Tensor]:
        if train:
            raise Unavailable("FlexAttention has no backward on CPUs")
        kernel_size, stride, dilation, kind, _ = case.pattern
        if set(stride + dilation) != {1} or set(kind) != {NEIGHBORHOOD}:
            raise Unavailable("written for plain neighborhoods only")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        positions = torch.Size(case.spatial).numel()

        def offsets(i: Tensor, j: Tensor) -> list[tuple[Tensor, Tensor]]:
            """Per axis: key minus first key of the query's window, key minus query."""
            pairs = []
            for length, k in zip(reversed(case.spatial), reversed(kernel_size)):
                p, q, i, j = i % length, j % length, i // length, j // length
                pairs.append((q - (p - k // 2).clamp(min=0, max=length - k), q - p))
            return pairs[::-1]

        def mask_mod(b, h, i, j):
            inside = torch.ones_like(i, dtype=torch.bool)
            for (from_first, _), k in zip(offsets(i, j), kernel_size):
                inside = inside & (from_first >= 0) & (from_first < k)
            return inside

        mask = create_block_mask(mask_mod, None, None, positions, positions, device="cpu")

        @functools.partial(torch.compile, dynamic=False)
        def flat_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
            def score_mod(score, b, h, i, j):
                index = torch.zeros_like(i)
                for (_, relative), k in zip(offsets(i, j), kernel_size):
                    index = index * (2 * k - 1) + (relative + k - 1).clamp(min=0, max=2 * k - 2)
                return score + table[h, index]

            return flex_attention(query, key, value, score_mod=score_mod, block_mask=mask)

        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            # NB: torch 2.13 fails to lower views of flex_attention's inputs inside the graph on a CPU.
            flat = (x.flatten(2, -2) for x in (query, key, value))
            return flat_attention(*flat, rpb.flatten(1)).unflatten(2, case.spatial)

        return attend

    return Contender("FlexAttention", build, HEADS_FIRST)


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

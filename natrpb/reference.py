"""Every op of the library in plain PyTorch: the specification, and the fallback where no compiled kernel can run.

Written to be read. All tensors may be of any floating dtype and on any device; everything is differentiable by autograd, to
any order. Shapes: B batch, `*` one to three spatial axes with N positions in all, h heads, D head_dim, Dv value head_dim,
T = product of kernel sizes (`Pattern.num_slots`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .patterns import CAUSAL, NEIGHBORHOOD, Pattern


def axis_keys(length: int, kernel_size: int, stride: int, dilation: int, kind: int, shift: int):
    """Keys and bias indices of every query of one axis; see `natrpb.patterns` for the rules.

    Returns:
        keys: int64 [length, kernel_size], positions of the keys; clamped into range where not valid.
        rel: int64 [length, kernel_size], (key - query) / dilation + kernel_size - 1, the index into a bias table.
        valid: bool [length, kernel_size], whether the slot holds a key.
    """
    i = torch.arange(length)
    g, p = i % dilation, i // dilation
    group_length = (length - g + dilation - 1) // dilation
    if kind == NEIGHBORHOOD:
        leader = torch.minimum(p // stride * stride + stride // 2, group_length - 1)
        first = torch.minimum((leader - kernel_size // 2).clamp(min=0), group_length - kernel_size)
        last = first + kernel_size - 1
    elif kind == CAUSAL:
        leader = torch.minimum(p // stride * stride + stride - 1, group_length - 1)
        first = (leader - kernel_size + 1).clamp(min=0)
        last = p
    else:
        block = torch.div(p - shift, kernel_size, rounding_mode="floor")
        first = (block * kernel_size + shift).clamp(min=0)
        last = torch.minimum((block + 1) * kernel_size + shift, group_length) - 1
    slot = first[:, None] + torch.arange(kernel_size)
    valid = slot <= last[:, None]
    slot = torch.minimum(slot, last[:, None])
    return slot * dilation + g[:, None], slot - p[:, None] + kernel_size - 1, valid


def pattern_index(pattern: Pattern, spatial: Sequence[int], device=None):
    """Combines the axes of a pattern, row-major.

    Returns:
        keys: int64 [N, T], flat position of every query's keys.
        rel: int64 [N, T], flat index into a bias table of `pattern.rpb_shape`.
        valid: bool [N, T].
    """
    keys = rel = torch.zeros(1, 1, dtype=torch.int64)
    valid = torch.ones(1, 1, dtype=torch.bool)
    for length, table, *axis in zip(spatial, pattern.rpb_shape, *pattern):
        k, r, v = axis_keys(length, *axis)
        n, t = keys.shape[0] * length, keys.shape[1] * axis[0]
        keys = (keys[:, None, :, None] * length + k[None, :, None, :]).reshape(n, t)
        rel = (rel[:, None, :, None] * table + r[None, :, None, :]).reshape(n, t)
        valid = (valid[:, None, :, None] & v[None, :, None, :]).reshape(n, t)
    return keys.to(device), rel.to(device), valid.to(device)


def _gather(x: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Every query's rows of x: [B, h, *, D] -> [B, h, N, T, D]; zero where a slot holds no key, whatever x holds."""
    return x.flatten(2, -2)[:, :, keys].masked_fill(~valid[..., None], 0)


def local_bias(rpb: Tensor, pattern: Pattern, spatial: Sequence[int]) -> Tensor:
    """The bias of every (query, slot) pair: rpb [h, *rpb_shape] -> [h, *, T]; zero where a slot holds no key."""
    _, rel, valid = pattern_index(pattern, spatial, rpb.device)
    # NB: reshape, not flatten: torch's batched gradients have no rule for flatten.
    bias = rpb.reshape(rpb.shape[0], -1)[:, rel].masked_fill(~valid, 0)
    return bias.reshape(rpb.shape[0], *spatial, pattern.num_slots)


def local_qk(query: Tensor, key: Tensor, rpb: Tensor | None, pattern: Pattern, fill: float = float("-inf")) -> Tensor:
    """Scores of every query with its keys: attn[b,h,i,t] = <query_i, key_j(i,t)> + rpb[h, rel(i,t)], no scale.

    Args:
        query, key: [B, h, *, D].
        rpb: [h, *rpb_shape] or None.
        fill: what a slot without a key holds; 0 where the result is a derivative.

    Returns:
        [B, h, *, T] in query's dtype.
    """
    spatial = query.shape[2:-1]
    keys, _, valid = pattern_index(pattern, spatial, query.device)
    attn = torch.einsum("bhnd,bhntd->bhnt", query.flatten(2, -2), _gather(key, keys, valid))
    if rpb is not None:
        attn = attn + local_bias(rpb, pattern, spatial).flatten(1, -2)
    return attn.to(query.dtype).masked_fill(~valid, fill).unflatten(2, spatial)


def local_av(attn: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """Weighted sums of values: out[b,h,i] = sum over t of attn[b,h,i,t] * value_j(i,t); slots without a key count nothing.

    Args:
        attn: [B, h, *, T].
        value: [B, h, *, Dv].

    Returns:
        [B, h, *, Dv] in value's dtype.
    """
    spatial = value.shape[2:-1]
    keys, _, valid = pattern_index(pattern, spatial, value.device)
    attn = attn.flatten(2, -2).masked_fill(~valid, 0)
    return torch.einsum("bhnt,bhntd->bhnd", attn, _gather(value, keys, valid)).unflatten(2, spatial)


def local_av_transposed(attn: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """The transpose of `local_av` in its second argument: out[b,h,j] = sum over (i,t) with j(i,t) = j of attn[b,h,i,t] * x_i.

    Args:
        attn: [B, h, *, T].
        x: [B, h, *, D], one row per query.

    Returns:
        [B, h, *, D], one row per key, in x's dtype.
    """
    spatial = x.shape[2:-1]
    keys, _, valid = pattern_index(pattern, spatial, x.device)
    contribution = attn.flatten(2, -2)[..., None] * x.flatten(2, -2)[:, :, :, None]
    contribution = contribution.masked_fill(~valid[..., None], 0).flatten(2, 3)  # [B, h, N * T, D]
    out = torch.zeros_like(x.flatten(2, -2)).index_add(2, keys.flatten(), contribution)
    return out.unflatten(2, spatial)


def local_bias_grad(dattn: Tensor, pattern: Pattern) -> Tensor:
    """The transpose of `local_bias`: drpb[h, r] = sum of dattn[b,h,i,t] over all b and (i,t) with rel(i,t) = r.

    Args:
        dattn: [B, h, *, T].

    Returns:
        [h, *rpb_shape].
    """
    spatial = dattn.shape[2:-1]
    _, rel, valid = pattern_index(pattern, spatial, dattn.device)
    per_slot = dattn.flatten(2, -2).masked_fill(~valid, 0).sum(0).flatten(1)  # [h, N * T]
    entries = 1
    for size in pattern.rpb_shape:
        entries *= size
    drpb = per_slot.new_zeros(per_slot.shape[0], entries).index_add(1, rel.flatten(), per_slot)
    return drpb.unflatten(1, pattern.rpb_shape)


def local_attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, pattern: Pattern, scale: float):
    """softmax(scale * <query, key> + rpb) @ value over each query's keys (Hassani et al. 2023, eq. 2-4, for every pattern).

    Args:
        query, key: [B, *, h, D].
        value: [B, *, h, Dv].
        rpb: [h, *rpb_shape] or None; not multiplied by scale.

    Returns:
        out [B, *, h, Dv] in query's dtype, and lse [B, *, h] = log sum exp(score), fp32 (fp64 for fp64).
    """
    query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
    scores = local_qk(query * scale, key, rpb, pattern)
    scores = scores.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    out = local_av(scores.softmax(-1).to(value.dtype), value, pattern)
    return out.movedim(1, -2), scores.logsumexp(-1).movedim(1, -1)


def l2_normalize(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """Rows of length `factor`: out[b,i,h] = factor[h] * x[b,i,h] / |x[b,i,h]|, computed in fp32 (fp64 for fp64).

    A row of zeros stays one and has no gradient. Products of such rows are the cosines of Swin v2 (Liu et al. 2022, eq. 2).

    Args:
        x: [B, *, h, D].
        factor: [h], or None for 1.

    Returns:
        [B, *, h, D] in x's dtype.
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    square = wide.square().sum(-1, keepdim=True)
    # NB: two choices, since the gradient of the one that is not taken must be finite, too.
    inverse = torch.where(square == 0, 0, torch.where(square == 0, 1, square).rsqrt())
    unit = wide * inverse
    return (unit if factor is None else unit * factor.to(wide.dtype)[:, None]).to(x.dtype)

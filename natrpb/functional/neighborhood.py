"""Neighborhood attention in one to three dimensions, fused and unfused."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops._common import as_autocast, wide_dtype, without_autocast
from ..patterns import check_fits, neighborhood_pattern
from ._checks import (
    AXES,
    check_attention_inputs,
    check_head_dim,
    check_probability,
    check_qkvpacked,
    check_rpb,
    check_tensor,
    finite_float,
    share_heads,
)


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
):
    """Neighborhood attention over one axis; see `na2d`, with [B, L, heads, D] in place of [B, H, W, heads, D]."""
    return _neighborhood_attention(
        1, query, key, value, kernel_size, stride, dilation, is_causal, rpb, scale,
        additional_keys, additional_values, dropout_p, return_lse,
    )  # fmt: skip


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
):
    """Neighborhood attention over two axes, fused, with learned relative position bias.

    out(q) = sum over the keys k of q's neighborhood of softmax_k(scale * <q, k> + rpb[head, k - q + K - 1]) * v_k
    (Hassani et al. 2023; dilation: Hassani and Shi 2022; stride: Hassani et al. 2025). At the borders the window stops
    moving and keeps its size.

    Args:
        query: [B, H, W, heads, D], fp64, fp32, bf16 or fp16; any strides, a contiguous last axis is read without a copy.
        key: [B, H, W, heads_kv, D]; heads must be a multiple of heads_kv.
        value: [B, H, W, heads_kv, Dv]; Dv may differ from D.
        kernel_size: K, one per axis or one for all; odd or even, kernel_size * dilation at most the axis' length.
        stride: queries that share one neighborhood, 1 <= stride <= kernel_size.
        dilation: step between neighboring keys.
        is_causal: bool per axis; a causal query sees itself and the keys before it.
        rpb: [heads, 2 K_0 - 1, 2 K_1 - 1] in any float dtype, index key minus query; its gradient is summed in fp32, and
            not at all where rpb does not require one.
        scale: default D ** -0.5; not applied to rpb.
        additional_keys, additional_values: [B, T, heads_kv, D] and [B, T, heads_kv, Dv], tokens that every query sees too,
            without bias.
        dropout_p: dropout on the attention weights; runs unfused and stores the weights.
        return_lse: also return lse.

    Returns:
        out [B, H, W, heads, Dv] in query's dtype; with return_lse also lse [B, H, W, heads], the logarithm of the sum of
        exp(score), fp32 (fp64 for fp64), differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return _neighborhood_attention(
        2, query, key, value, kernel_size, stride, dilation, is_causal, rpb, scale,
        additional_keys, additional_values, dropout_p, return_lse,
    )  # fmt: skip


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
):
    """Neighborhood attention over three axes; see `na2d`, with [B, D0, H, W, heads, D] in place of [B, H, W, heads, D]."""
    return _neighborhood_attention(
        3, query, key, value, kernel_size, stride, dilation, is_causal, rpb, scale,
        additional_keys, additional_values, dropout_p, return_lse,
    )  # fmt: skip


def na1d_qkvpacked(
    qkv: Tensor,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
):
    """Neighborhood attention over one axis from qkv [B, L, 3, heads, D]; see `na2d_qkvpacked`."""
    return _neighborhood_attention_qkvpacked(
        1, qkv, kernel_size, stride, dilation, is_causal, rpb, scale, additional_keys, additional_values, dropout_p, return_lse
    )


def na2d_qkvpacked(
    qkv: Tensor,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
):
    """`na2d` of a fused projection: query, key and value are the three parts of qkv, and so is its gradient.

    A projection's gradient needs them in one tensor. From `na2d` of three slices autograd gets three, and copies them
    together: as much memory again, and a pass over it, in every training step.

    Args:
        qkv: [B, H, W, 3, heads, D], `linear(x).unflatten(-1, (3, heads, D))`; any strides.
        kernel_size, stride, dilation, is_causal, rpb, scale, dropout_p, return_lse: as in `na2d`. With dropout or additional
            tokens the gradients are copied together, too.
        additional_keys, additional_values: [B, T, heads, D].

    Returns, raises:
        as `na2d`.
    """
    return _neighborhood_attention_qkvpacked(
        2, qkv, kernel_size, stride, dilation, is_causal, rpb, scale, additional_keys, additional_values, dropout_p, return_lse
    )


def na3d_qkvpacked(
    qkv: Tensor,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
):
    """Neighborhood attention over three axes from qkv [B, D0, H, W, 3, heads, D]; see `na2d_qkvpacked`."""
    return _neighborhood_attention_qkvpacked(
        3, qkv, kernel_size, stride, dilation, is_causal, rpb, scale, additional_keys, additional_values, dropout_p, return_lse
    )


def na1d_qk(query: Tensor, key: Tensor, kernel_size, dilation=1, is_causal=False, rpb: Tensor | None = None) -> Tensor:
    """Neighborhood scores over one axis, unfused; see `na2d_qk`, with [B, heads, L, D] in place of [B, heads, H, W, D]."""
    return _qk(1, query, key, kernel_size, dilation, is_causal, rpb)


def na2d_qk(query: Tensor, key: Tensor, kernel_size, dilation=1, is_causal=False, rpb: Tensor | None = None) -> Tensor:
    """Neighborhood scores over two axes, unfused and heads-first, as NATTEN 0.17 defines them: no scale is applied.

    Args:
        query, key: [B, heads, H, W, D], fp64, fp32, bf16 or fp16.
        kernel_size, dilation, is_causal: as in `na2d`.
        rpb: [heads, 2 K_0 - 1, 2 K_1 - 1] or None.

    Returns:
        [B, heads, H, W, K_0 * K_1] in query's dtype, slots row-major; -inf where a causal slot holds no key.
    """
    return _qk(2, query, key, kernel_size, dilation, is_causal, rpb)


def na3d_qk(query: Tensor, key: Tensor, kernel_size, dilation=1, is_causal=False, rpb: Tensor | None = None) -> Tensor:
    """Neighborhood scores over three axes, unfused; see `na2d_qk`, with [B, heads, D0, H, W, D]."""
    return _qk(3, query, key, kernel_size, dilation, is_causal, rpb)


def na1d_av(attn: Tensor, value: Tensor, kernel_size, dilation=1, is_causal=False) -> Tensor:
    """Neighborhood weighted sums over one axis, unfused; see `na2d_av`, with [B, heads, L, K] and [B, heads, L, Dv]."""
    return _av(1, attn, value, kernel_size, dilation, is_causal)


def na2d_av(attn: Tensor, value: Tensor, kernel_size, dilation=1, is_causal=False) -> Tensor:
    """Weighted sums of every query's neighborhood over two axes, unfused and heads-first, as NATTEN 0.17 defines them.

    Args:
        attn: [B, heads, H, W, K_0 * K_1], the weights, usually softmax of `na2d_qk`; cast to value's dtype.
        value: [B, heads, H, W, Dv].
        kernel_size, dilation, is_causal: as in `na2d`.

    Returns:
        [B, heads, H, W, Dv] in value's dtype; weights of slots without a key are not read.
    """
    return _av(2, attn, value, kernel_size, dilation, is_causal)


def na3d_av(attn: Tensor, value: Tensor, kernel_size, dilation=1, is_causal=False) -> Tensor:
    """Neighborhood weighted sums over three axes, unfused; see `na2d_av`, with [B, heads, D0, H, W, ...]."""
    return _av(3, attn, value, kernel_size, dilation, is_causal)


def _neighborhood_attention(
    ndim, query, key, value, kernel_size, stride, dilation, is_causal, rpb, scale,
    additional_keys, additional_values, dropout_p, return_lse,
):  # fmt: skip
    check_attention_inputs(query, key, value, ndim)
    heads = query.shape[-2]
    pattern, scale = _checked(query, query.shape[1:-2], kernel_size, stride, dilation, is_causal, rpb, scale)
    check_probability("dropout_p", dropout_p)
    _check_additional(additional_keys, additional_values, key, value)

    key, value = share_heads(key, heads), share_heads(value, heads)
    if additional_keys is not None:
        additional_keys, additional_values = (share_heads(x, heads) for x in (additional_keys, additional_values))
    if dropout_p > 0:
        out, lse = _with_dropout(query, key, value, rpb, pattern, scale, additional_keys, additional_values, dropout_p)
    else:
        out, lse = ops.local_attention(query, key, value, rpb, pattern, scale)
        if additional_keys is not None:
            out, lse = _merge_additional(out, lse, query, additional_keys, additional_values, scale)
    return (out, lse) if return_lse else out


def _neighborhood_attention_qkvpacked(
    ndim, qkv, kernel_size, stride, dilation, is_causal, rpb, scale, additional_keys, additional_values, dropout_p, return_lse
):
    check_qkvpacked(qkv, ndim)
    check_probability("dropout_p", dropout_p)
    if dropout_p > 0 or additional_keys is not None or additional_values is not None:
        return _neighborhood_attention(
            ndim, *qkv.unbind(-3), kernel_size, stride, dilation, is_causal, rpb, scale,
            additional_keys, additional_values, dropout_p, return_lse,
        )  # fmt: skip
    pattern, scale = _checked(qkv, qkv.shape[1:-3], kernel_size, stride, dilation, is_causal, rpb, scale)
    out, lse = ops.local_attention_qkvpacked(qkv, rpb, pattern, scale)
    return (out, lse) if return_lse else out


def _checked(x, spatial, kernel_size, stride, dilation, is_causal, rpb, scale):
    """The pattern, which fits the map, and the scale of a call on x [..., heads, D]; rpb fits both."""
    pattern = neighborhood_pattern(len(spatial), kernel_size, stride, dilation, is_causal)
    check_fits(pattern, spatial)
    heads, head_dim = x.shape[-2:]
    scale = head_dim**-0.5 if scale is None else finite_float("scale", scale)
    check_rpb(rpb, heads, pattern, x.device)
    return pattern, scale


def _with_dropout(query, key, value, rpb, pattern, scale, additional_keys, additional_values, dropout_p):
    """Attention with dropout on the weights, from the unfused ops; heads-last in and out."""
    query, key, value, additional_keys, additional_values = as_autocast(query, key, value, additional_keys, additional_values)
    wide = wide_dtype(query.dtype)
    with without_autocast(query.device):
        wide_query, wide_key = (x.movedim(-2, 1).to(wide) for x in (query, key))  # [B, heads, *, D]
        scores = ops.local_qk(wide_query * scale, wide_key, rpb, pattern)
        if additional_keys is not None:
            extra = torch.einsum("b...hd,bthd->bh...t", query.to(wide), additional_keys.to(wide)) * scale
            scores = torch.cat([scores, extra], dim=-1)
        lse = scores.logsumexp(-1).movedim(1, -1)
        weights = torch.dropout(scores.softmax(-1), dropout_p, True).to(value.dtype)
        slots = pattern.num_slots
        out = ops.local_av(weights[..., :slots], value.movedim(-2, 1), pattern).movedim(1, -2)
        if additional_keys is not None:
            out = out + torch.einsum("bh...t,bthd->b...hd", weights[..., slots:], additional_values)
    return out, lse


def _merge_additional(out, lse, query, additional_keys, additional_values, scale):
    """Adds keys that every query sees: a second attention, merged by the two log-sum-exps."""
    query, keys, values = (x.to(lse.dtype) for x in as_autocast(query, additional_keys, additional_values))
    with without_autocast(query.device):
        scores = torch.einsum("b...hd,bthd->b...ht", query, keys) * scale
        extra_lse = scores.logsumexp(-1)
        extra = torch.einsum("b...ht,bthd->b...hd", scores.softmax(-1), values)
        # The shares exp(lse - total) as sigmoids, which sum to one however large the scores are.
        merged = out * (lse - extra_lse).sigmoid()[..., None] + extra * (extra_lse - lse).sigmoid()[..., None]
        return merged.to(out.dtype), torch.logaddexp(lse, extra_lse)


def _qk(ndim, query, key, kernel_size, dilation, is_causal, rpb):
    layout = f"[B, heads, {', '.join(AXES[ndim])}, D]"
    check_tensor("query", query, ndim + 3, layout)
    check_tensor("key", key, ndim + 3, layout, like=query)
    pattern = neighborhood_pattern(ndim, kernel_size, 1, dilation, is_causal)
    if key.shape != query.shape:
        raise ValueError(f"key must have query's shape, {list(query.shape)}, got {list(key.shape)}")
    check_fits(pattern, query.shape[2:-1])
    check_head_dim(query.shape[-1])
    check_rpb(rpb, query.shape[1], pattern, query.device)
    return ops.local_qk(query, key, rpb, pattern)


def _av(ndim, attn, value, kernel_size, dilation, is_causal):
    layout = f"[B, heads, {', '.join(AXES[ndim])}, Dv]"
    check_tensor("value", value, ndim + 3, layout)
    check_tensor("attn", attn, ndim + 3, f"[B, heads, {', '.join(AXES[ndim])}, T]")
    pattern = neighborhood_pattern(ndim, kernel_size, 1, dilation, is_causal)
    if attn.device != value.device:
        raise ValueError(f"attn must be on value's device, {value.device}, got {attn.device}")
    if attn.shape[:-1] != value.shape[:-1] or attn.shape[-1] != pattern.num_slots:
        raise ValueError(
            f"attn must have shape {[*value.shape[:-1], pattern.num_slots]} (value's, with one weight per slot), "
            f"got {list(attn.shape)}"
        )
    check_fits(pattern, value.shape[2:-1])
    check_head_dim(value.shape[-1])
    return ops.local_av(attn.to(value.dtype), value, pattern)


def _check_additional(keys, values, key, value):
    if (keys is None) != (values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if keys is None:
        return
    check_tensor("additional_keys", keys, 4, "[B, T, heads, D]", like=key)
    check_tensor("additional_values", values, 4, "[B, T, heads, Dv]", like=key)
    batch, heads_kv, head_dim = key.shape[0], key.shape[-2], key.shape[-1]
    if keys.shape[0] != batch or keys.shape[2:] != (heads_kv, head_dim) or keys.shape[1] < 1:
        raise ValueError(
            f"additional_keys must have shape [{batch}, T, {heads_kv}, {head_dim}] with T >= 1, got {list(keys.shape)}"
        )
    expected = [batch, keys.shape[1], heads_kv, value.shape[-1]]
    if list(values.shape) != expected:
        raise ValueError(f"additional_values must have shape {expected}, got {list(values.shape)}")

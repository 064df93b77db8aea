"""Attention with relative position encodings that depend on content: on keys, queries and values, contextual or as a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops._common import as_autocast, wide_dtype, without_autocast
from ._checks import FLOATS, check_head_dim, check_probability, check_tensor, finite_float
from ._encoded import Call, attend, bucket_rows, spread


def rpe_index(x: Tensor, index: Tensor) -> Tensor:
    """Spreads every row's buckets over its pairs: y[b,h,i,j] = x[b,h,i, index[i,j]] (Wu et al. 2021, section 3).

    The gradient sums in a fixed order, so that it is equal in bits at every call. Stands in for the official op,
    `RPEIndexFunction.apply`.

    Args:
        x: [B, h, Nq, C], fp64, fp32, bf16 or fp16; any strides.
        index: int32 or int64 [Nq, Nk], 0 <= index < C, shared by the batch and the heads. An entry out of range is refused on
            a CPU and gives NaN on a GPU.

    Returns:
        [B, h, Nq, Nk] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: an entry out of range, on a CPU.
    """
    check_tensor("x", x, 4, "[B, h, Nq, C]")
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be an int32 or int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    if index.dim() != 2 or index.shape[0] != x.shape[2]:
        raise ValueError(f"index must have shape [{x.shape[2]}, Nk] (x's rows, keys), got {list(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"index must be on x's device, {x.device}, got {index.device}")
    return ops.rpe_index(x, index)


def irpe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_table: Tensor | None = None,
    key_index: Tensor | None = None,
    query_table: Tensor | None = None,
    query_index: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    value_table: Tensor | None = None,
    value_index: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention with relative position encodings on keys, queries and values, fused (Wu et al. 2021, section 3).

        score(i,j) = scale * (<q_i, k_j> + <q_i, key_table[:, key_index(i,j)]> + <k_j, query_table[:, query_index(i,j)]>)
                     + bias_table[bias_index(i,j)]
        out_i = sum_j softmax_j(score(i,j)) * (v_j + value_table[value_index(i,j)])

    No tensor of a number per pair of positions is stored. Tables are per head, or [1, ...] for all heads alike. Index maps
    are those of `natrpb.irpe` or any others; a map [T, Nq, Nk] stands for the sum of T encodings from one table.

    Args:
        query: [B, Nq, h, D], fp64, fp32, bf16 or fp16; any strides.
        key: [B, Nk, h, D].
        value: [B, Nk, h, Dv].
        key_table: [h or 1, D, C], contextual encoding on keys.
        key_index: int32 or int64 [Nq, Nk] or [T, Nq, Nk], by query and key, 0 <= index < C. An entry out of range is refused on
            a CPU and gives NaN on a GPU.
        query_table, query_index: the same on queries; `query_index` too is by query and key.
        bias_table, bias_index: [h or 1, C] and its map; not multiplied by scale.
        value_table, value_index: [h or 1, C, Dv] and its map.
        key_padding_mask: bool [B, Nk], True where a key is excluded for all queries.
        attn_mask: [Nq, Nk] for the whole batch, or [B or 1, h or 1, Nq, Nk]: bool, True where a pair is excluded, or of any
            floating dtype, added to the scores, where -inf excludes. Only bool [Nq, Nk] runs fused, others store the
            weights. A query with no key left gets zeros.
        scale: default D ** -0.5.
        dropout_p: dropout on the attention weights, before both sums of the values; runs unfused and stores the weights.
        return_lse: also return lse.
        return_weights: also return the attention weights, after dropout; runs unfused and stores them.

    Returns:
        out [B, Nq, h, Dv] in query's dtype; then, where asked for, lse [B, Nq, h], the logarithm of the sum of exp(score),
        fp32 (fp64 for fp64), differentiable, and the weights [B, h, Nq, Nk] in query's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: an entry of a map out of range, on a CPU.
    """
    check_tensor("query", query, 4, "[B, Nq, h, D]")
    check_tensor("key", key, 4, "[B, Nk, h, D]", like=query)
    check_tensor("value", value, 4, "[B, Nk, h, Dv]", like=query)
    batch, queries, heads, head_dim = query.shape
    keys, value_dim = key.shape[1], value.shape[-1]
    if key.shape != (batch, keys, heads, head_dim):
        raise ValueError(f"key must have query's shape but for Nk, {list(query.shape)}, got {list(key.shape)}")
    if value.shape != (batch, keys, heads, value_dim):
        raise ValueError(f"value must have key's shape but for the last axis, {list(key.shape)}, got {list(value.shape)}")
    check_head_dim(head_dim, value_dim)
    _check_encoding("key", key_table, key_index, (heads, head_dim, None), queries, keys, query)
    _check_encoding("query", query_table, query_index, (heads, head_dim, None), queries, keys, query)
    _check_encoding("bias", bias_table, bias_index, (heads, None), queries, keys, query)
    _check_encoding("value", value_table, value_index, (heads, None, value_dim), queries, keys, query)
    check_mask("key_padding_mask", key_padding_mask, (batch, keys), query)
    check_attn_mask(attn_mask, (batch, heads, queries, keys), query)
    check_probability("dropout_p", dropout_p)
    scale = head_dim**-0.5 if scale is None else finite_float("scale", scale)

    query, key, value = as_autocast(query, key, value)
    if query_table is not None and key_padding_mask is not None:
        key = key.masked_fill(key_padding_mask[..., None, None], 0)  # what padding holds must not reach query_table's gradient
    tables = [None if table is None else table.to(query.dtype) for table in (key_table, query_table, value_table)]
    call = Call(key_index, query_index, bias_index, value_index, key_padding_mask, attn_mask, scale)
    fused_mask = attn_mask is None or (attn_mask.dim() == 2 and attn_mask.dtype == torch.bool)
    with without_autocast(query.device):
        if dropout_p > 0 or return_weights or not fused_mask:
            out, lse, weights = _unfused(query, key, value, *tables, bias_table, call, dropout_p)
        else:
            out, lse = attend(query, key, value, *tables, bias_table, call)
            weights = None
    extras = [extra for extra, wanted in ((lse, return_lse), (weights, return_weights)) if wanted]
    return (out, *extras) if extras else out


def _unfused(query, key, value, key_table, query_table, value_table, bias_table, call: Call, dropout_p: float):
    """Attention from unfused ops, with any mask and dropout on the weights: out, lse and weights.

    All is computed in fp32 (fp64 for fp64) and rounded at the end: scores may exceed what fp16 holds.
    """
    dtype, wide = query.dtype, wide_dtype(query.dtype)
    tensors = (query, key, value, key_table, query_table, value_table, bias_table)
    query, key, value, key_table, query_table, value_table, bias_table = (None if x is None else x.to(wide) for x in tensors)
    query_rows = None if key_table is None else bucket_rows(query, key_table, call.scale)
    key_rows = None if query_table is None else bucket_rows(key, query_table, call.scale)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, h, N, D]
    excluded = torch.zeros(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if call.key_padding_mask is not None:
        key, value = (x.masked_fill(call.key_padding_mask[:, None, :, None], 0) for x in (key, value))
        excluded = excluded | call.key_padding_mask[:, None, None, :]

    scores = (query * call.scale) @ key.transpose(-1, -2)
    for index in _terms(call.key_index):
        scores = scores + ops.rpe_index(query_rows, index)
    for index in _terms(call.query_index):
        scores = scores + ops.rpe_index(key_rows, index.t()).transpose(-1, -2)
    for index in _terms(call.bias_index):
        scores = scores + ops.rpe_index(bias_table[None, :, None].expand(-1, -1, index.shape[0], -1), index)
    mask = call.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(wide)
        mask = mask == float("-inf")
    if mask is not None:
        excluded = excluded | mask
    empty = excluded.all(-1, keepdim=True)
    scores = scores.masked_fill(excluded & ~empty, float("-inf")).masked_fill(empty, 0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    weights = torch.dropout(scores.softmax(-1).masked_fill(excluded, 0), dropout_p, True)
    out = weights @ value
    for index in _terms(call.value_index):
        out = out + spread(ops.rpe_index_transposed(weights, index, value_table.shape[1]), value_table)
    return out.transpose(1, 2).to(dtype), lse.transpose(1, 2), weights.to(dtype)


def _terms(index: Tensor | None) -> tuple[Tensor, ...]:
    """The [Nq, Nk] maps of all terms."""
    if index is None:
        return ()
    return index.unbind(0) if index.dim() == 3 else (index,)


def _check_encoding(name, table, index, shape, queries, keys, query):
    """One table and its map; `shape` is the table's, with None for the buckets."""
    if (table is None) != (index is None):
        raise ValueError(f"{name}_table and {name}_index must be given together")
    if table is None:
        return
    if not isinstance(table, Tensor) or table.dtype not in FLOATS:
        raise TypeError(f"{name}_table must be a floating-point tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    fits = table.dim() == len(shape) and table.shape[0] in (1, shape[0])
    if not fits or any(wanted not in (None, side) for side, wanted in zip(table.shape[1:], shape[1:])):
        letters = ", ".join("C" if side is None else str(side) for side in shape[1:])
        raise ValueError(f"{name}_table must have shape [{shape[0]} or 1, {letters}] (heads first), got {list(table.shape)}")
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}_index must be an int32 or int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    if index.dim() not in (2, 3) or index.shape[-2:] != (queries, keys) or 0 in index.shape[:-2]:
        raise ValueError(f"{name}_index must have shape [{queries}, {keys}] or [T, {queries}, {keys}], got {list(index.shape)}")
    for what, tensor in ((f"{name}_table", table), (f"{name}_index", index)):
        if tensor.device != query.device:
            raise ValueError(f"{what} must be on query's device, {query.device}, got {tensor.device}")


def check_mask(name, mask, shape, query):
    """A bool mask of one shape, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor or None, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(mask.shape)}")
    if mask.device != query.device:
        raise ValueError(f"{name} must be on query's device, {query.device}, got {mask.device}")


def check_attn_mask(mask, shape, query):
    """A mask on pairs, or None; `shape` is that of the scores, [B, h, Nq, Nk]."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, *FLOATS):
        got = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"attn_mask must be a bool or floating-point tensor or None, got {got}")
    batch, heads, queries, keys = shape
    fits = mask.dim() in (2, 4) and tuple(mask.shape[-2:]) == (queries, keys)
    if not fits or any(side not in (1, full) for side, full in zip(mask.shape[:-2], (batch, heads))):
        layout = f"[{queries}, {keys}] or [{batch} or 1, {heads} or 1, {queries}, {keys}]"
        raise ValueError(f"attn_mask must have shape {layout}, got {list(mask.shape)}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on query's device, {query.device}, got {mask.device}")

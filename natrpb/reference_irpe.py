"""Attention with image relative position encodings in plain PyTorch: the specification, and the fallback, of those ops.

Written to be read, as `natrpb.reference`: any floating dtype and device, differentiable to any order. Shapes: B batch, h heads,
Nq queries, Nk keys, D head_dim, Dv value head_dim, C buckets, T terms. A pair's encoding is the sum of T of them (two where
rows and columns of a map have encodings of their own, else one); every term has its index map, and a map [Nq, Nk] stands for
[1, Nq, Nk]. The terms of one argument share its C buckets: where they are to be apart, their ids are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rpe_index(x: Tensor, index: Tensor) -> Tensor:
    """Spreads every row's buckets over its pairs: y[b,h,i,j] = x[b,h,i, index[i,j]] (Wu et al. 2021, section 3).

    Args:
        x: [B, h, Nq, C].
        index: int32 or int64 [Nq, Nk], 0 <= index < C.

    Returns:
        [B, h, Nq, Nk] in x's dtype.
    """
    return x.gather(-1, index.long().expand(*x.shape[:2], *index.shape))


def rpe_index_transposed(y: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """The transpose of `rpe_index`, its gradient: x[b,h,i,c] = sum of y[b,h,i,j] over all j with index[i,j] = c.

    Args:
        y: [B, h, Nq, Nk].
        index: int32 or int64 [Nq, Nk], 0 <= index < num_buckets.
        num_buckets: C.

    Returns:
        [B, h, Nq, C] in y's dtype; sums of 16-bit types run in fp32.
    """
    wide = y.to(_wide(y.dtype))
    rows = wide.new_zeros(*y.shape[:-1], num_buckets)
    return rows.scatter_add(-1, index.long().expand(y.shape), wide).to(y.dtype)


def irpe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_rows: Tensor | None = None,
    index_k: Tensor | None = None,
    key_rows: Tensor | None = None,
    index_q: Tensor | None = None,
    table: Tensor | None = None,
    index_t: Tensor | None = None,
    index_v: Tensor | None = None,
    num_buckets: int = 0,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention whose scores take encodings from per-row tables, and whose weights are also summed per bucket.

        score(i,j) = scale * <q_i, k_j> + sum_t query_rows[b,h,i, index_k[t,i,j]]       (encoding on keys, contextual)
                                        + sum_t key_rows[b,h,j, index_q[t,i,j]]         (on queries, contextual)
                                        + sum_t table[h, index_t[t,i,j]]                (bias mode, any of both)
        p(i,j) = softmax over the keys j that neither mask excludes
        out_i = sum_j p(i,j) v_j;   binned[b,h,i,c] = sum of p(i,j) over all (t,j) with index_v[t,i,j] = c

    The encoding on values, sum_j p(i,j) w_v[index_v(i,j)], is binned @ w_v (Wu et al. 2021, section 3).
    A query with no key left has out = 0, binned = 0, lse = -inf, and no gradient. What a padded key's key and value hold is
    not read.

    Args:
        query: [B, Nq, h, D].
        key: [B, Nk, h, D].
        value: [B, Nk, h, Dv].
        query_rows: [B, h, Nq, Ck] in query's dtype, or None; not multiplied by scale, nor are key_rows and table.
        index_k: int32 or int64 [Nq, Nk] or [T, Nq, Nk], given where query_rows is.
        key_rows: [B, h, Nk, Cq] in query's dtype, or None.
        index_q: as index_k, by query and key too: index_q[t,i,j] is an entry of key j's row.
        table: [h, Ct] in any floating dtype, or None.
        index_t: as index_k, given where table is.
        index_v: as index_k, or None for no `binned`.
        num_buckets: C of `binned`.
        key_padding_mask: bool [B, Nk], True where a key is excluded for all queries, or None.
        attn_mask: bool [Nq, Nk], True where a pair is excluded in the whole batch, or None. Both as in
            `torch.nn.MultiheadAttention`.
        scale: factor on <q, k>.

    Returns:
        out [B, Nq, h, Dv] in value's dtype; lse [B, Nq, h] = log sum exp(score), fp32 (fp64 for fp64); binned
        [B, h, Nq, num_buckets] in value's dtype, or None without index_v.
    """
    wide = _wide(query.dtype)
    query, key, value = (x.movedim(2, 1) for x in (query, key, value))  # [B, h, N, D]
    excluded = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if key_padding_mask is not None:
        key, value = (x.masked_fill(key_padding_mask[:, None, :, None], 0) for x in (key, value))
        excluded = excluded | key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        excluded = excluded | attn_mask

    scores = ((query * scale) @ key.transpose(-1, -2)).to(wide)
    if query_rows is not None:
        for index in _terms(index_k):
            scores = scores + rpe_index(query_rows, index)
    if key_rows is not None:
        for index in _terms(index_q):
            scores = scores + rpe_index(key_rows, index.t()).transpose(-1, -2)
    if table is not None:
        for index in _terms(index_t):
            scores = scores + table.to(wide)[:, index.long()]

    # A row without keys takes finite scores, so that no NaN enters the softmax or its derivatives; then all is set to zero.
    empty = excluded.all(-1, keepdim=True)
    scores = scores.masked_fill(excluded & ~empty, float("-inf")).masked_fill(empty, 0)
    weights = scores.softmax(-1).masked_fill(excluded, 0).to(value.dtype)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    binned = None
    if index_v is not None:
        binned = sum(rpe_index_transposed(weights, index, num_buckets) for index in _terms(index_v))
    return (weights @ value).movedim(1, 2), lse.movedim(1, 2), binned


def _terms(index: Tensor):
    """The [Nq, Nk] maps of all terms."""
    return index.unbind(0) if index.dim() == 3 else (index,)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The relative position encodings that came before iRPE, by their papers' formulas: index maps for `irpe_attention`.

P. Shaw, J. Uszkoreit, A. Vaswani, "Self-Attention with Relative Position Representations", NAACL 2018.
Z. Dai, Z. Yang, Y. Yang, J. Carbonell, Q. V. Le, R. Salakhutdinov, "Transformer-XL", ACL 2019.
P. Ramachandran, N. Parmar, A. Vaswani, I. Bello, A. Levskaya, J. Shlens, "Stand-Alone Self-Attention in Vision Models" (SASA),
    NeurIPS 2019.
Z. Huang, D. Liang, P. Xu, B. Xiang, "Improve Transformer Models with Better Relative Position Embeddings", EMNLP 2020 Findings.
H. Wang, Y. Zhu, B. Green, H. Adam, A. Yuille, L.-C. Chen, "Axial-DeepLab", ECCV 2020.

Offsets are key minus query throughout. Tables have one entry per offset from -k to k, [h, ...] or [1, ...] for all heads
alike; an offset beyond takes the outermost. All functions take the masks, scale and dropout of `irpe_attention`;
`axial_attention`, whose axes are attended apart, no `attn_mask`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..irpe import clipped_map_offsets, clipped_offsets
from ..ops._common import wide_dtype, without_autocast
from ._checks import check_tensor, finite_float
from .irpe import check_attn_mask, check_mask, irpe_attention


def shaw_attention(
    query: Tensor, key: Tensor, value: Tensor, key_table: Tensor, value_table: Tensor | None = None, **options
) -> Tensor | tuple[Tensor, ...]:
    """Contextual encodings on keys and values (Shaw et al. 2018, eq. 3, 4).

        e_ij = <q_i, k_j + a^K_ij> / sqrt(D);   z_i = sum_j softmax_j(e_ij) (v_j + a^V_ij);   a_ij = w_clip(j - i, k)

    Args:
        query, key: [B, N, h, D].
        value: [B, N, h, Dv].
        key_table: [h or 1, D, 2 k + 1], w^K; the paper shares it among heads.
        value_table: [h or 1, 2 k' + 1, Dv], w^V, or None for none.
        **options: key_padding_mask, attn_mask, scale, dropout_p, return_lse, return_weights of `irpe_attention`.

    Returns:
        As `irpe_attention`.

    Raises:
        ValueError, TypeError: as `irpe_attention`, and for tables with an even number of entries.
    """
    encodings = dict(key_table=key_table, key_index=_offsets("key_table", key_table, -1, query, key))
    if value_table is not None:
        encodings |= dict(value_table=value_table, value_index=_offsets("value_table", value_table, 1, query, key))
    return irpe_attention(query, key, value, **encodings, **options)


def huang_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, **options) -> Tensor | tuple[Tensor, ...]:
    """One contextual encoding that meets both queries and keys (Huang et al. 2020, method 4).

        e_ij = (<q_i, k_j> + <q_i, a_ij> + <k_j, a_ij>) / sqrt(D);   a_ij = w_clip(j - i, k)

    Args:
        query, key: [B, N, h, D].
        value: [B, N, h, Dv].
        table: [h or 1, D, 2 k + 1], w.
        **options: key_padding_mask, attn_mask, scale, dropout_p, return_lse, return_weights of `irpe_attention`.

    Returns:
        As `irpe_attention`.

    Raises:
        ValueError, TypeError: as `irpe_attention`, and for a table with an even number of entries.
    """
    index = _offsets("table", table, -1, query, key)
    return irpe_attention(query, key, value, table, index, table, index, **options)


def transformer_xl_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, u: Tensor, v: Tensor, **options
) -> Tensor | tuple[Tensor, ...]:
    """Encodings on keys and two vectors that stand in for the query (Dai et al. 2019, section 3.3).

        e_ij = (<q_i + u, k_j> + <q_i + v, r_(i-j)>) / sqrt(D),   r = W_(k,R) R

    Keys may begin with a memory: the last query stands at the last key. The paper's models are causal: their attn_mask
    excludes keys after the query.

    Args:
        query: [B, Nq, h, D].
        key: [B, Nk, h, D], Nk >= Nq.
        value: [B, Nk, h, Dv].
        table: [h or 1, D, 2 k + 1], r by key minus query: W_(k,R) [h D, dim] @ `natrpb.irpe.sinusoids(k, dim)`, by head.
        u, v: [h, D].
        **options: key_padding_mask, attn_mask, scale, dropout_p, return_lse, return_weights of `irpe_attention`.

    Returns:
        As `irpe_attention`.

    Raises:
        ValueError, TypeError: as `irpe_attention`, and for a table with an even number of entries.
    """
    index = _offsets("table", table, -1, query, key)
    heads, head_dim = query.shape[2:]
    for name, vector in (("u", u), ("v", v)):
        check_tensor(name, vector, 2, "[h, D]")
        if vector.shape != (heads, head_dim):
            raise ValueError(f"{name} must have shape [{heads}, {head_dim}] (h, D), got {list(vector.shape)}")
    if table.shape[0] not in (1, heads) or table.shape[1] != head_dim:
        raise ValueError(f"table must have shape [{heads} or 1, {head_dim}, 2 k + 1], got {list(table.shape)}")
    scale = options.pop("scale", None)
    scale = head_dim**-0.5 if scale is None else finite_float("scale", scale)
    # <q + v, r> = <q + u, r> + <v - u, r>: the second term depends on head and offset only, it is a bias
    wide = wide_dtype(query.dtype)
    with without_autocast(query.device):
        bias = scale * ((v.to(wide) - u.to(wide))[:, None] @ table.to(wide))[:, 0]  # [h, 2 k + 1]
    return irpe_attention(query + u.to(query.dtype), key, value, table, index, None, None, bias, index, scale=scale, **options)


def sasa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_table: Tensor,
    col_table: Tensor,
    kernel_size: int | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **options,
) -> Tensor | tuple[Tensor, ...]:
    """Encodings on keys whose channels are half the row's, half the column's (Ramachandran et al. 2019, eq. 3).

        y_i = sum_j softmax_j(<q_i, k_j + concat(r_row(j - i), r_col(j - i))>) v_j

    Args:
        query, key: [B, H, W, h, D], D even.
        value: [B, H, W, h, Dv].
        row_table: [h or 1, D / 2, 2 k + 1], by row offset.
        col_table: [h or 1, D / 2, 2 k' + 1], by column offset.
        kernel_size: odd; keys at most kernel_size // 2 rows and columns away; None for the whole map. All scores are computed.
        attn_mask: [H * W, H * W] or [B or 1, h or 1, H * W, H * W], row by row, see `irpe_attention`.
        key_padding_mask: bool [B, H, W], True where a key is excluded.
        **options: scale (the paper has 1, here D ** -0.5 is the default), dropout_p, return_lse, return_weights.

    Returns:
        out [B, H, W, h, Dv]; further results of `irpe_attention` with H * W in place of H, W.

    Raises:
        ValueError, TypeError: as `irpe_attention`, for tables with an even number of entries or another number of channels.
    """
    _check_maps(query, key, value, key_padding_mask)
    height, width, heads, head_dim = query.shape[1:]
    for name, table in (("row_table", row_table), ("col_table", col_table)):
        check_tensor(name, table, 3, f"[{heads} or 1, {head_dim} / 2, 2 k + 1]")
        if 2 * table.shape[1] != head_dim or table.shape[0] not in (1, heads):
            raise ValueError(f"{name} must have shape [{heads} or 1, {head_dim} / 2, 2 k + 1], got {list(table.shape)}")
    distances = _distance("row_table", row_table, -1), _distance("col_table", col_table, -1)
    index = clipped_map_offsets(height, width, *distances, device=query.device)
    if kernel_size is not None:
        _check_odd("kernel_size", kernel_size)
        outside = _outside(height, width, kernel_size // 2, query.device)
        check_attn_mask(attn_mask, (query.shape[0], heads, height * width, height * width), query)
        if attn_mask is None:
            attn_mask = outside
        else:
            attn_mask = attn_mask.masked_fill(outside, True if attn_mask.dtype == torch.bool else float("-inf"))
    # [h or 1, D, rows + columns], zero where a half does not look
    halves = (
        F.pad(row_table, (0, 0, 0, head_dim // 2)),
        F.pad(col_table, (0, 0, head_dim // 2, 0)),
    )
    shared = max(row_table.shape[0], col_table.shape[0])
    table = torch.cat([half.expand(shared, -1, -1) for half in halves], -1)
    result = irpe_attention(
        *(x.flatten(1, 2) for x in (query, key, value)),
        table,
        index,
        attn_mask=attn_mask,
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.flatten(1),
        **options,
    )
    out, *extras = result if isinstance(result, tuple) else (result,)
    out = out.unflatten(1, (height, width))
    return (out, *extras) if extras else out


def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: int,
    key_table: Tensor | None = None,
    query_table: Tensor | None = None,
    value_table: Tensor | None = None,
    span: int | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention along one axis of a map, with encodings on keys, queries and values (Wang et al. 2020, eq. 4).

        y_o = sum_p softmax_p(<q_o, k_p> + <q_o, r^q_(p-o)> + <k_p, r^k_(p-o)>) (v_p + r^v_(p-o))

    Args:
        query, key: [B, H, W, h, D].
        value: [B, H, W, h, Dv].
        axis: 0 to attend along the height, 1 along the width.
        key_table: [h or 1, D, 2 k + 1], the paper's r^q, which queries meet; or None.
        query_table: [h or 1, D, 2 k' + 1], the paper's r^k, which keys meet; or None.
        value_table: [h or 1, 2 k'' + 1, Dv], r^v; or None.
        span: odd; keys at most span // 2 away; None for the whole axis.
        key_padding_mask: bool [B, H, W], True where a key is excluded.
        scale: default D ** -0.5; the paper has 1 and normalises the terms outside.
        dropout_p: see `irpe_attention`.

    Returns:
        [B, H, W, h, Dv].

    Raises:
        ValueError, TypeError: as `irpe_attention`, for another axis or tables with an even number of entries.
    """
    _check_maps(query, key, value, key_padding_mask)
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (height) or 1 (width), got {axis!r}")
    if span is not None:
        _check_odd("span", span)

    def lines(x: Tensor) -> Tensor:
        """[B, H, W, ...] -> [B * lines, length, ...]."""
        return (x.transpose(1, 2) if axis == 0 else x).flatten(0, 1)

    batch, height, width = query.shape[:3]
    other, length = (width, height) if axis == 0 else (height, width)
    query, key, value = lines(query), lines(key), lines(value)
    encodings = {}
    for name, table, buckets in (("key", key_table, -1), ("query", query_table, -1), ("value", value_table, 1)):
        if table is not None:
            encodings[f"{name}_table"] = table
            encodings[f"{name}_index"] = _offsets(f"{name}_table", table, buckets, query, key)
    out = irpe_attention(
        query,
        key,
        value,
        **encodings,
        key_padding_mask=None if key_padding_mask is None else lines(key_padding_mask),
        attn_mask=None if span is None else _outside(1, length, span // 2, query.device),
        scale=scale,
        dropout_p=dropout_p,
    )
    out = out.unflatten(0, (batch, other))
    return out.transpose(1, 2) if axis == 0 else out


def _offsets(name: str, table: Tensor, axis: int, query: Tensor, key: Tensor) -> Tensor:
    """The map [Nq, Nk] into a table with its offsets along `axis`; the last query stands at the last key."""
    check_tensor("query", query, 4, "[B, N, h, D]")
    check_tensor("key", key, 4, "[B, N, h, D]", like=query)
    check_tensor(name, table, 3, "[h or 1, D, 2 k + 1]" if axis == -1 else "[h or 1, 2 k + 1, Dv]")
    queries, keys = query.shape[1], key.shape[1]
    return clipped_offsets(queries, keys, _distance(name, table, axis), query_start=keys - queries, device=query.device)


def _distance(name: str, table: Tensor, axis: int) -> int:
    """k of a table with entries from -k to k."""
    entries = table.shape[axis]
    if entries % 2 == 0:
        raise ValueError(f"{name} must have an odd number of entries, from -k to k, got {list(table.shape)}")
    return entries // 2


def _outside(height: int, width: int, distance: int, device: torch.device) -> Tensor:
    """bool [N, N], True where a key is more than `distance` rows or columns away."""
    offsets = clipped_map_offsets(height, width, device=device)
    centre = torch.tensor([height - 1, 2 * height - 1 + width - 1], device=device)
    return ((offsets - centre[:, None, None]).abs() > distance).any(0)


def _check_maps(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> None:
    layout = "[B, H, W, h, D]"
    check_tensor("query", query, 5, layout)
    for name, x in (("key", key), ("value", value)):
        check_tensor(name, x, 5, layout, like=query)
        if x.shape[:4] != query.shape[:4]:
            raise ValueError(f"{name} must have query's shape but for the last axis, {list(query.shape)}, got {list(x.shape)}")
    check_mask("key_padding_mask", key_padding_mask, tuple(query.shape[:3]), query)


def _check_odd(name: str, given: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1 or given % 2 == 0:
        raise ValueError(f"{name} must be odd and positive, got {given!r}")

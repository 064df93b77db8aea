"""Image relative position encoding written out: buckets by Python arithmetic, encodings as tensors with an entry per pair."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

TABLES = ("euclidean", "quantization", "product", "cross_rows", "cross_cols")


def piecewise(x: float, ratio: float) -> int:
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    if abs(x) <= alpha:
        return round(x)
    far = round(alpha + math.log(abs(x) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(1, x) * min(far, beta))


def bucket(table: str, dr: int, dc: int, ratio: float) -> int:
    """Bucket of one pair from its row and column offset, query minus key."""
    half = int(2 * ratio)
    if table == "euclidean":
        return piecewise(round(math.sqrt(dr * dr + dc * dc)), ratio) + half
    if table == "quantization":
        return piecewise(dr * dr + dc * dc, ratio) + half
    if table == "product":
        return (piecewise(dr, ratio) + half) * (2 * half + 1) + piecewise(dc, ratio) + half
    return piecewise(dr if table == "cross_rows" else dc, ratio) + half


def buckets_of(table: str, ratio: float) -> int:
    """Buckets without that of skipped tokens."""
    side = 2 * int(2 * ratio) + 1
    return side * side if table == "product" else side


def bucket_map(table: str, height: int, width: int, skip: int, ratio: float) -> Tensor:
    """int64 [L, L]."""
    of_offset = torch.tensor(
        [[bucket(table, dr, dc, ratio) for dc in range(1 - width, width)] for dr in range(1 - height, height)]
    )
    ids = torch.full((skip + height * width,) * 2, buckets_of(table, ratio))
    for i, (row, col) in enumerate(itertools.product(range(height), range(width))):
        # offsets row - 0 ... row - (height - 1) stand in the table from row + height - 1 down to row
        seen = of_offset[row : row + height, col : col + width].flip(0, 1)
        ids[skip + i, skip:] = seen.flatten()
    return ids


def tables_of(method: str) -> list[tuple[str, str]]:
    """(prefix in the state dict, table) of a method."""
    if method == "cross":
        return [("rp_rows.", "cross_rows"), ("rp_cols.", "cross_cols")]
    return [("", method)]


def dense_attention(query, key, value, rpe_q, rpe_k, rpe_v, scale, excluded=None, added=None) -> Tensor:
    """Attention with gathered encodings; every tensor heads-first.

    Args:
        query, key, value: [B, h, L, d].
        rpe_q, rpe_k, rpe_v: lists of (table, bucket map [L, L]): tables [h or 1, d, C], for a bias [h or 1, C], on values
            [h or 1, C, d].
        excluded: bool, broadcast to [B, h, L, L].
        added: to the scores, broadcast to [B, h, L, L].
    """
    heads = query.shape[1]

    def every_head(table: Tensor) -> Tensor:
        return table.expand(heads, *table.shape[1:])

    scores = scale * torch.einsum("bhid,bhjd->bhij", query, key)
    for table, index in rpe_k:
        if table.dim() == 2:
            scores = scores + every_head(table)[:, index]
        else:
            scores = scores + torch.einsum("bhid,hdij->bhij", scale * query, every_head(table)[:, :, index])
    for table, index in rpe_q:
        if table.dim() == 2:
            scores = scores + every_head(table)[:, index.t()]
        else:
            scores = scores + torch.einsum("bhjd,hdij->bhij", scale * key, every_head(table)[:, :, index.t()])
    if added is not None:
        scores = scores + added
    if excluded is not None:
        scores = scores.masked_fill(excluded, float("-inf"))
    weights = scores.softmax(-1)
    out = torch.einsum("bhij,bhjd->bhid", weights, value)
    for table, index in rpe_v:
        out = out + torch.einsum("bhij,hijd->bhid", weights, every_head(table)[:, index])
    return out

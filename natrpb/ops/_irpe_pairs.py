"""Attention with image relative position encodings pair by pair, in tensors [B, h, Nq, Nk]: what its higher derivatives need.

Everything is composed from matrix products, `rpe_index` and its transpose, so it can be differentiated to any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._register import call_op


class Rows(NamedTuple):
    """The encodings, or their gradients or tangents, where they are: [B, h, Nq, Ck], [B, h, Nk, Cq] and [h, Ct]."""

    query: Tensor | None
    key: Tensor | None
    table: Tensor | None


class Pairs:
    """The linear maps between encodings and pairs.

    Args:
        maps: index_k, index_q, index_t, index_v, num_buckets, key_padding_mask, attn_mask.
        buckets: Ck, Cq, Ct; 0 where there is no such encoding.
    """

    def __init__(self, maps: tuple, buckets: tuple[int, int, int]) -> None:
        self.index_k, self.index_q, self.index_t, self.index_v, self.num_buckets, self.padding, self.mask = maps
        self.buckets = buckets

    @staticmethod
    def _spread(rows: Tensor, index: Tensor) -> Tensor:
        return sum(call_op("rpe_index", rows, one) for one in _terms(index))

    @staticmethod
    def _gather(pairs: Tensor, index: Tensor, buckets: int) -> Tensor:
        return sum(call_op("rpe_index_transposed", pairs, one, buckets) for one in _terms(index))

    def encode(self, rows: Rows) -> Tensor | None:
        """The sum of the encodings that are there, for every pair."""
        terms = []
        if rows.query is not None:
            terms.append(self._spread(rows.query, self.index_k))
        if rows.key is not None:
            terms.append(self._spread(rows.key, self.index_q.mT).mT)
        if rows.table is not None:
            positions = self.index_t.shape[-2]
            terms.append(self._spread(rows.table[None, :, None].expand(-1, -1, positions, -1), self.index_t))
        return total(*terms)

    def decode(self, pairs: Tensor) -> Rows:
        """The transpose of `encode`."""
        on_k, on_q, on_t = self.buckets
        return Rows(
            self._gather(pairs, self.index_k, on_k) if on_k else None,
            self._gather(pairs.mT, self.index_q.mT, on_q) if on_q else None,
            self._gather(pairs.sum(0, keepdim=True), self.index_t, on_t).sum((0, 2)) if on_t else None,
        )

    def bin(self, pairs: Tensor) -> Tensor | None:
        """The sums of pairs by bucket of the value encoding, [B, h, Nq, num_buckets]."""
        return None if self.index_v is None else self._gather(pairs, self.index_v, self.num_buckets)

    def unbin(self, binned: Tensor | None) -> Tensor | None:
        """The transpose of `bin`."""
        return None if binned is None else self._spread(binned, self.index_v)

    def softmax(self, scores: Tensor) -> Tensor:
        """The weights: 0 where a mask excludes a pair, and for every pair of a query without keys."""
        excluded = torch.zeros_like(scores[:, :1], dtype=torch.bool)
        if self.padding is not None:
            excluded = excluded | self.padding[:, None, None, :]
        if self.mask is not None:
            excluded = excluded | self.mask
        empty = excluded.all(-1, keepdim=True)
        return scores.masked_fill(excluded & ~empty, float("-inf")).masked_fill(empty, 0).softmax(-1).masked_fill(excluded, 0)

    def open(self, key: Tensor) -> Tensor:
        """Keys or values [B, h, Nk, D] with padded ones set to zero, whatever they hold."""
        return key if self.padding is None else key.masked_fill(self.padding[:, None, :, None], 0)


def _terms(index: Tensor) -> tuple[Tensor, ...]:
    return index.unbind(0) if index.dim() == 3 else (index,)


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None

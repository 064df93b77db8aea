"""Local attention straight from its definition in words: enumeration and plain loops, no closed form.

Positions of an axis that are equal modulo the dilation form a *line*; attention never leaves a line. On a line

* neighborhood: queries come in teams of `stride` in a row. The team's leader is its (stride // 2)-th member, or the
  last one where the line ends before. Every query of the team sees, out of all runs of K positions in a row, the run
  whose (K // 2)-th member is closest to the leader.
* causal: the leader is the last member of the team. A query sees the positions up to itself that are less than K steps
  before the leader.
* window: the line is cut before position `shift` and then before every K-th one; a query sees the piece that it is in.

Nothing here is shared with the library but the `Pattern` tuple that carries the numbers.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from natrpb.patterns import CAUSAL, NEIGHBORHOOD, Pattern


def neighborhood(length: int, kernel_size: int, stride: int, dilation: int, kind: int, shift: int, query: int) -> list[int]:
    """Positions of the keys that `query` sees on one axis, ascending."""
    line = [j for j in range(length) if j % dilation == query % dilation]
    at = line.index(query)
    team = [n for n in range(len(line)) if n // stride == at // stride]
    if kind == NEIGHBORHOOD:
        leader = team[min(stride // 2, len(team) - 1)]
        runs = [range(first, first + kernel_size) for first in range(len(line) - kernel_size + 1)]
        closest = min(runs, key=lambda run: abs(run[kernel_size // 2] - leader))
        return [line[n] for n in closest]
    if kind == CAUSAL:
        return [line[n] for n in range(at + 1) if team[-1] - n < kernel_size]
    cuts = range(shift, len(line), kernel_size)

    def piece(n: int) -> int:
        return sum(cut <= n for cut in cuts)

    return [j for n, j in enumerate(line) if piece(n) == piece(at)]


@lru_cache(maxsize=4096)
def neighborhoods(length: int, *axis: int) -> tuple[tuple[int, ...], ...]:
    """The neighborhood of every query of one axis; `axis` is (kernel_size, stride, dilation, kind, shift)."""
    return tuple(tuple(neighborhood(length, *axis, query)) for query in range(length))


def axes(pattern: Pattern) -> list[tuple[int, ...]]:
    """One (kernel_size, stride, dilation, kind, shift) per axis of a pattern."""
    return list(zip(*pattern))


def pairs(pattern: Pattern, spatial: tuple[int, ...]):
    """Yields (query, key, entry) for every query and each of its keys: three tuples with one coordinate per axis.

    `entry` is the place of the pair in a bias table, (key - query) / dilation + K - 1 on every axis.
    """
    for query in itertools.product(*map(range, spatial)):
        per_axis = [neighborhoods(length, *axis)[i] for length, axis, i in zip(spatial, axes(pattern), query)]
        for key in itertools.product(*per_axis):
            entry = tuple((j - i) // d + k - 1 for i, j, k, d in zip(query, key, pattern.kernel_size, pattern.dilation))
            yield query, key, entry


def slots(pattern: Pattern, spatial: tuple[int, ...]) -> list[list[int | None]]:
    """For every query (row-major) the flat position of the key in each slot, None where the slot is empty."""
    result = []
    for query in itertools.product(*map(range, spatial)):
        per_axis = []
        for length, axis, i in zip(spatial, axes(pattern), query):
            keys = neighborhoods(length, *axis)[i]
            per_axis.append(keys + (None,) * (axis[0] - len(keys)))
        result.append([flat(key, spatial) for key in itertools.product(*per_axis)])
    return result


def flat(position: tuple[int | None, ...], spatial: tuple[int, ...]) -> int | None:
    """Row-major index of a position, None if a coordinate is None."""
    index = 0
    for coordinate, length in zip(position, spatial):
        if coordinate is None:
            return None
        index = index * length + coordinate
    return index


def dense(pattern: Pattern, spatial: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Who sees whom, as matrices over flat positions.

    Returns:
        mask: bool [N, N] (query, key).
        entry: int64 [N, N], flat index into a bias table, 0 where the pair does not attend.
    """
    n = math.prod(spatial)
    mask = torch.zeros(n, n, dtype=torch.bool)
    entry = torch.zeros(n, n, dtype=torch.int64)
    rows = [(flat(q, spatial), flat(k, spatial), flat(e, pattern.rpb_shape)) for q, k, e in pairs(pattern, spatial)]
    if rows:
        query, key, index = torch.tensor(rows).unbind(1)
        mask[query, key] = True
        entry[query, key] = index
    return mask, entry


def dense_attention(query, key, value, rpb, pattern, scale, extra_keys=None, extra_values=None) -> tuple[Tensor, Tensor]:
    """The fused op through full [N, N] scores, in fp64; differentiable.

    Args:
        query, key, value: [B, *, h, D], [B, *, h, D], [B, *, h, Dv].
        rpb: [h, 2 K_0 - 1, ...] or None.
        extra_keys, extra_values: [B, T, h, D] and [B, T, h, Dv], seen by every query without bias, or None.

    Returns:
        out [B, *, h, Dv] and lse [B, *, h], fp64.
    """
    spatial = tuple(query.shape[1:-2])
    mask, entry = dense(pattern, spatial)
    query, key, value = (x.double().flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, h, N, D]
    scores = scale * query @ key.mT
    if rpb is not None:
        scores = scores + rpb.double().flatten(1)[:, entry]
    scores = scores.masked_fill(~mask, float("-inf"))
    if extra_keys is not None:
        extra_keys, extra_values = (x.double().transpose(1, 2) for x in (extra_keys, extra_values))
        scores = torch.cat([scores, scale * query @ extra_keys.mT], dim=-1)
        value = torch.cat([value, extra_values], dim=-2)
    out = scores.softmax(-1) @ value
    return out.transpose(1, 2).unflatten(1, spatial), scores.logsumexp(-1).transpose(1, 2).unflatten(1, spatial)


def attention(query, key, value, rpb, pattern, scale) -> tuple[Tensor, Tensor]:
    """The fused op, one Python loop per index; arguments and results as in `dense_attention`, without extra keys."""
    spatial = tuple(query.shape[1:-2])
    batch, heads, value_dim = query.shape[0], query.shape[-2], value.shape[-1]
    out = torch.zeros(batch, *spatial, heads, value_dim, dtype=torch.float64)
    lse = torch.zeros(batch, *spatial, heads, dtype=torch.float64)
    keys_of: dict[tuple, list] = {}
    for q, k, entry in pairs(pattern, spatial):
        keys_of.setdefault(q, []).append((k, entry))
    for b in range(batch):
        for h in range(heads):
            for q, seen in keys_of.items():
                row = query[(b, *q, h)].tolist()
                scores = []
                for k, entry in seen:
                    score = scale * sum(x * y for x, y in zip(row, key[(b, *k, h)].tolist()))
                    scores.append(score + (rpb[(h, *entry)].item() if rpb is not None else 0.0))
                total = sum(math.exp(s) for s in scores)
                lse[(b, *q, h)] = math.log(total)
                for c in range(value_dim):
                    weighted = (math.exp(s) * value[(b, *k, h)][c].item() for s, (k, _) in zip(scores, seen))
                    out[(b, *q, h)][c] = sum(weighted) / total
    return out, lse

"""Which keys one query sees and where each pair's bias stands in the table, as numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..patterns import CAUSAL, NEIGHBORHOOD, WINDOW, Pattern, check_fits, per_axis

_MARGIN = 1  # positions shown beyond the outermost key of an axis that is cropped
_LONGEST_LINE = 16  # positions of an axis that text shows without cropping


def bias_index_map(pattern: Pattern, spatial: Sequence[int], query: Sequence[int]) -> Tensor:
    """The place in the bias table of every key that one query sees.

    Args:
        pattern: from `natrpb.patterns.neighborhood_pattern` or `window_pattern`.
        spatial: lengths of the map's axes.
        query: a position, one coordinate per axis.

    Returns:
        int64 [*spatial, axes]: the index on every axis of a table of `pattern.rpb_shape`,
        (key - query) / dilation + K - 1; -1 on all axes where the query does not see the key.

    Raises:
        ValueError: the pattern does not fit the map, or the query lies outside.
        TypeError: coordinates that are no integers.
    """
    spatial, query = check_position(pattern, spatial, query)
    seen = torch.ones((), dtype=torch.bool)
    indices = []
    for axis, (length, position, *axis_pattern) in enumerate(zip(spatial, query, *pattern)):
        keys, rel, valid = (x[position] for x in reference.axis_keys(length, *axis_pattern))
        index = torch.full((length,), -1)
        index[keys[valid]] = rel[valid]
        shape = [length if a == axis else 1 for a in range(pattern.ndim)]
        seen = seen & (index >= 0).view(shape)
        indices.append(index.view(shape).expand(spatial))
    return torch.stack(indices, dim=-1).masked_fill(~seen[..., None], -1)


def check_position(pattern: Pattern, spatial: Sequence[int], query: Sequence[int]) -> tuple[tuple, tuple]:
    """The map's lengths and the query as tuples, once they are known to fit; raises as `bias_index_map`."""
    spatial, query = per_axis("spatial", spatial, pattern.ndim), per_axis("query", query, pattern.ndim)
    check_fits(pattern, spatial)
    for axis, (length, position) in enumerate(zip(spatial, query)):
        if not 0 <= position < length:
            raise ValueError(f"query must lie in the map, 0 to {length - 1} on axis {axis}, got {position}")
    return spatial, query


def describe(pattern: Pattern) -> str:
    """A pattern in words, e.g. "neighborhood attention, kernel size 7, dilation 2"."""
    if WINDOW in pattern.kind:
        words = [f"window attention, window {_brief(pattern.kernel_size)}"]
        return ", ".join(words + [f"shift {_brief(pattern.shift)}"] * any(pattern.shift))
    causal = "" if CAUSAL not in pattern.kind else "causal " if NEIGHBORHOOD not in pattern.kind else "partly causal "
    words = [f"{causal}neighborhood attention, kernel size {_brief(pattern.kernel_size)}"]
    for name in ("stride", "dilation"):
        if any(step != 1 for step in getattr(pattern, name)):
            words.append(f"{name} {_brief(getattr(pattern, name))}")
    return ", ".join(words)


def explain_text(pattern: Pattern, spatial: Sequence[int], query: Sequence[int]) -> str:
    """A picture in characters of what one query sees.

    Every key stands as its index into the bias table, one number per axis; the query itself stands in brackets, positions
    that it does not see are dots. Long axes are cropped to the neighborhood. Arguments and errors as in `bias_index_map`.
    """
    spatial, query = check_position(pattern, spatial, query)
    index = bias_index_map(pattern, spatial, query)
    seen = index[..., 0] >= 0
    table = ", ".join(f"0 to {size - 1}" for size in pattern.rpb_shape)
    lines = [
        f"{describe(pattern)}, on a map of {' x '.join(map(str, spatial))}",
        f"query {_position(query)} sees {int(seen.sum())} keys; each stands as its index into the bias table ({table})",
    ]
    *rows, columns = shown_ranges(seen, _LONGEST_LINE)[-2:]
    for plane in planes_with_keys(seen):
        if plane:
            lines += ["", f"plane {plane[0]} of axis 0"]
        positions = [(*plane, row) for row in rows[0]] if rows else [plane]
        lines += ["", *_grid(index, query, positions, columns)]
    return "\n".join(lines)


def shown_ranges(seen: Tensor, longest: int) -> list[range]:
    """Per axis the positions worth showing: all up to `longest`, else those around the keys; seen bool [*spatial]."""
    ranges = []
    for length, occupied in zip(seen.shape, seen.nonzero().unbind(-1)):
        first, last = int(occupied.min()) - _MARGIN, int(occupied.max()) + _MARGIN
        ranges.append(range(length) if length <= longest else range(max(first, 0), min(last + 1, length)))
    return ranges


def planes_with_keys(seen: Tensor) -> list[tuple[int, ...]]:
    """Leading coordinates of the planes to show: one empty tuple but for maps with three axes; seen bool [*spatial]."""
    if seen.dim() < 3:
        return [()]
    return [(plane,) for plane in seen.flatten(1).any(1).nonzero().flatten().tolist()]


def _grid(index: Tensor, query: tuple, rows: list[tuple], columns: range) -> list[str]:
    """A header with the columns' positions, then one line per row; rows hold all coordinates but the last."""
    cells = [[_cell(index[(*row, column)], (*row, column) == query) for column in columns] for row in rows]
    labels = [str(row[-1]) if row else "" for row in rows]
    width = max(len(cell) for line in cells for cell in line)
    margin = max(map(len, labels))
    lines = [" " * margin + " " + " ".join(str(column).center(width) for column in columns).rstrip()]
    lines += [
        label.rjust(margin) + " " + " ".join(cell.center(width) for cell in line).rstrip() for label, line in zip(labels, cells)
    ]
    return lines


def _cell(index: Tensor, is_query: bool) -> str:
    if index[0] < 0:
        return "."
    text = ",".join(map(str, index.tolist()))
    return f"[{text}]" if is_query else text


def _position(position: Sequence[int]) -> str:
    return str(position[0]) if len(position) == 1 else f"({', '.join(map(str, position))})"


def _brief(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))

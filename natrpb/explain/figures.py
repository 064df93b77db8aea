"""Pictures, as matplotlib figures: `figure.savefig("file.png")` writes one, a notebook shows it.

Nothing here touches pyplot's global state or needs a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..patterns import Pattern
from .geometry import bias_index_map, check_position, describe, planes_with_keys, shown_ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUERY_COLOR = "#00c2a8"
_LONGEST_SIDE = 32  # positions of an axis that are drawn without cropping
_ANNOTATED_KEYS = 700  # beyond, the indices would be too small to read


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; ImportError, with the way out, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib (pip install matplotlib): {error}") from error
    return Figure(figsize=(width, height), layout="constrained")


def neighborhood_figure(pattern: Pattern, spatial: Sequence[int], query: Sequence[int]) -> Figure:
    """Draws which keys one query sees and, in each, its index into the bias table, one number per axis.

    Args, Raises: as `natrpb.explain.bias_index_map`. A map with three axes is drawn as its planes that hold keys, an axis
    that is long is cropped to the neighborhood.
    """
    spatial, query = check_position(pattern, spatial, query)
    index = bias_index_map(pattern, spatial, query)
    seen = index[..., 0] >= 0
    lifted = index if pattern.ndim > 1 else index[None]  # one axis is drawn as a single row
    rows, columns = shown_ranges(lifted[..., 0] >= 0, _LONGEST_SIDE)[-2:]
    planes = planes_with_keys(seen)

    cell = 0.46 if pattern.ndim < 3 else 0.56
    across = min(len(planes), 3)
    down = -(-len(planes) // across)
    figure = new_figure(max(max(cell * len(columns), 2.2) * across + 1.0, 6.5), (max(cell * len(rows), 0.8) + 0.5) * down + 1.2)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(planes) :]:
        panel.set_axis_off()
    for panel, plane in zip(panels, planes):
        marked = (0, *query)[-2:] if query[: len(plane)] == plane else None
        _draw_plane(panel, lifted[plane], rows, columns, marked, annotate=int(seen.sum()) <= _ANNOTATED_KEYS)
        panel.set_xlabel(f"position on axis {pattern.ndim - 1}")
        if pattern.ndim > 1:
            panel.set_ylabel(f"position on axis {pattern.ndim - 2}")
        else:
            panel.set_yticks([])
        if plane:
            panel.set_title(f"plane {plane[0]} of axis 0", fontsize=9)
    size = " x ".join(map(str, spatial))
    where = str(query[0]) if len(query) == 1 else str(query)
    figure.suptitle(
        f"{describe(pattern)}; map {size}\n"
        f"query {where}, outlined, sees {int(seen.sum())} keys; numbers: index into the bias table",
        fontsize=10,
    )
    return figure


def _draw_plane(panel: Axes, index: Tensor, rows: range, columns: range, query: tuple[int, int] | None, annotate: bool) -> None:
    """One plane of a map; index int64 [H, W, axes], -1 where the query sees no key."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    seen = (index[rows.start : rows.stop, columns.start : columns.stop, 0] >= 0).int()
    extent = (columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5)
    panel.imshow(seen.numpy(), cmap=ListedColormap(["#f1f3f5", "#a5c8f0"]), vmin=0, vmax=1, extent=extent)
    panel.set_xticks([x - 0.5 for x in columns], minor=True)
    panel.set_yticks([y - 0.5 for y in rows], minor=True)
    panel.grid(which="minor", color="white", linewidth=1)
    panel.tick_params(which="minor", length=0)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.yaxis.get_major_locator().set_params(integer=True)
    if annotate:
        for row in rows:
            for column in columns:
                if index[row, column, 0] >= 0:
                    text = ",".join(map(str, index[row, column].tolist()))
                    panel.text(column, row, text, ha="center", va="center", fontsize=7.5)
    if query is not None:
        corner = (query[1] - 0.5, query[0] - 0.5)
        panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d6336c", linewidth=2, zorder=5))


def bias_table_figure(tables: Mapping[str, Tensor], dilation: int | Sequence[int] = 1) -> Figure:
    """Draws bias tables as heat maps: a row per table, a column per head, one colour scale for all.

    Args:
        tables: by name, [heads, 2 K_0 - 1, 2 K_1 - 1] each, indexed by key minus query.
        dilation: of the attention, one for all tables or one per table: the axes show offsets in positions.

    Raises:
        ValueError: no tables, tables of another rank, or dilations that are not one per table.
    """
    if not tables or any(table.dim() != 3 for table in tables.values()):
        shapes = {name: list(table.shape) for name, table in tables.items()}
        raise ValueError(f"tables must hold tensors [heads, 2 K_0 - 1, 2 K_1 - 1], got {shapes}")
    dilations = [dilation] * len(tables) if isinstance(dilation, int) else list(dilation)
    if len(dilations) != len(tables):
        raise ValueError(f"dilation must be one int or one per table ({len(tables)}), got {len(dilations)}")
    heads = max(table.shape[0] for table in tables.values())
    limit = max(max(table.abs().max().item() for table in tables.values()), 1e-6)
    figure = new_figure(2.3 * heads + 1.6, 2.35 * len(tables) + 0.9)
    panels = figure.subplots(len(tables), heads, squeeze=False)
    for row, ((name, table), step) in enumerate(zip(tables.items(), dilations)):
        line = panels[row]
        for panel in line[table.shape[0] :]:
            panel.set_axis_off()
        for head, values in enumerate(table.detach().float().cpu()):
            panel = line[head]
            reach_y, reach_x = ((side // 2 + 0.5) * step for side in values.shape)
            extent = (-reach_x, reach_x, reach_y, -reach_y)
            drawn = panel.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
            panel.plot(0, 0, marker="+", color="black", markersize=7)
            panel.set_title(f"{name}, head {head}", fontsize=9)
            panel.tick_params(labelsize=7)
            if head == 0:
                panel.set_ylabel("rows, key - query", fontsize=8)
            if row == len(tables) - 1:
                panel.set_xlabel("columns, key - query", fontsize=8)
    figure.colorbar(drawn, ax=panels, shrink=min(1.0, 2.5 / len(tables)), label="bias added to the score")
    figure.suptitle("Learned relative position bias (+ marks the query itself)", fontsize=11)
    return figure


def attention_figure(
    image: Tensor, weights: Tensor, queries: Sequence[Sequence[int]], pattern: Pattern, title: str = "Attention"
) -> Figure:
    """Draws what chosen queries look at: the image with their neighborhoods, then a row of heat maps per query.

    Args:
        image: [H, W, 3] in 0 to 1; its sides are multiples of the map's.
        weights: [queries, heads, H', W'], see `attention_weights`.
        queries: positions in the map.
        pattern: of the attention, for the neighborhoods' outlines.
        title: heading of the figure.

    Raises:
        ValueError: image, weights and queries do not belong together.
    """
    if image.dim() != 3 or image.shape[2] != 3:
        raise ValueError(f"image must have shape [H, W, 3], got {list(image.shape)}")
    if weights.dim() != 4 or weights.shape[0] != len(queries) or not len(queries):
        raise ValueError(f"weights must have shape [{len(queries)} queries, heads, H, W], got {list(weights.shape)}")
    count, heads, *spatial = weights.shape
    token = image.shape[0] // spatial[0]
    if [side * token for side in spatial] != list(image.shape[:2]):
        raise ValueError(f"image must have the map's sides, {spatial}, times one factor, got {list(image.shape[:2])}")
    weights, image = weights.detach().float().cpu(), image.cpu().clamp(0, 1)
    boxes = [_box(pattern, spatial, query) for query in queries]

    width = 1.75 * (heads + 1) + 1.2
    top = width * image.shape[0] / image.shape[1] * 0.82
    figure = new_figure(width, top + 1.75 * count + 1.3)
    above, below = figure.subfigures(2, 1, height_ratios=[top + 0.6, 1.75 * count + 0.4])
    overview = above.subplots()
    overview.imshow(image.numpy())
    overview.set_axis_off()
    for number, (query, box) in enumerate(zip(queries, boxes), start=1):
        _outline(overview, box, token, "white", 3.0)
        _outline(overview, box, token, "black", 1.2)
        _outline(overview, (query[0], query[0] + 1, query[1], query[1] + 1), token, _QUERY_COLOR, 2.0)
        above_box = box[0] * token > 0.08 * image.shape[0]
        overview.text(
            (box[2] + box[3]) / 2 * token - 0.5,
            box[0] * token - 3 if above_box else box[1] * token + 3,
            str(number),
            ha="center",
            va="bottom" if above_box else "top",
            fontsize=9,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.85, "linewidth": 0},
        )
    overview.set_title("queries (coloured) and their neighborhoods (black)", fontsize=9)

    panels = below.subplots(count, heads + 1, squeeze=False)
    for number, (line, query, box) in enumerate(zip(panels, queries, boxes), start=1):
        _draw_query(line, image, weights[number - 1], query, box, token)
        line[0].set_ylabel(f"{number}: row {query[0]},\ncolumn {query[1]}", fontsize=8)
    for panel, name in zip(panels[0], ["image"] + [f"head {head}" for head in range(heads)]):
        panel.set_title(name, fontsize=9)
    drawn = panels[0, 1].images[-1]
    bar = below.colorbar(drawn, ax=panels, shrink=0.6, ticks=[0, 1], label="attention weight")
    bar.ax.set_yticklabels(["0", "panel's\nlargest"], fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_query(line: Sequence[Axes], image: Tensor, weights: Tensor, query: Sequence[int], box: tuple, token: int) -> None:
    """The image around one neighborhood, then the weights [heads, H', W'] of each head over it, as a share of the largest."""
    gray = image.mean(-1)
    margin = 2
    for head, panel in enumerate(line, start=-1):
        panel.set_facecolor("#dddddd")
        if head < 0:
            panel.imshow(image.numpy())
        else:
            share = weights[head] / weights[head].max()
            share = share.repeat_interleave(token, 0).repeat_interleave(token, 1)
            inside = torch.zeros_like(gray)
            inside[box[0] * token : box[1] * token, box[2] * token : box[3] * token] = 0.75
            panel.imshow(gray.numpy(), cmap="gray", vmin=0, vmax=1)
            panel.imshow(share.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=inside.numpy())
            panel.text(
                0.97,
                0.03,
                f"max {weights[head].max():.2f}",
                transform=panel.transAxes,
                fontsize=7,
                ha="right",
                va="bottom",
                color="white",
                bbox={"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0},
            )
        _outline(panel, box, token, "white", 1.0)
        _outline(panel, (query[0], query[0] + 1, query[1], query[1] + 1), token, _QUERY_COLOR, 1.8)
        panel.set_xlim((box[2] - margin) * token - 0.5, (box[3] + margin) * token - 0.5)
        panel.set_ylim((box[1] + margin) * token - 0.5, (box[0] - margin) * token - 0.5)
        panel.set_xticks([])
        panel.set_yticks([])


def _box(pattern: Pattern, spatial: Sequence[int], query: Sequence[int]) -> tuple[int, int, int, int]:
    """Row start, row stop, column start, column stop of what a query sees."""
    rows, columns = (bias_index_map(pattern, spatial, query)[..., 0] >= 0).nonzero().unbind(-1)
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def _outline(panel: Axes, box: tuple[int, int, int, int], token: int, color: str, linewidth: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (box[2] * token - 0.5, box[0] * token - 0.5)
    sides = ((box[3] - box[2]) * token, (box[1] - box[0]) * token)
    panel.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=color, linewidth=linewidth))

"""Relative position bias tables: index tables of both conventions, conversion, resizing, log-spaced coordinates.

NAT's tables are indexed by *key minus query*, Swin's by *query minus key*, so one is the other flipped on every spatial axis.
This library's ops take NAT's layout, [heads, 2 K_0 - 1, ...].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .patterns import neighborhood_pattern, per_axis, window_pattern


def nat_index(spatial: int | Sequence[int], kernel_size, dilation=1, stride=1, is_causal=False) -> Tensor:
    """Flat table index of every (query, key slot) pair of neighborhood attention (key minus query + K - 1, row-major).

    Args:
        spatial: length of every axis, an int for one axis.
        kernel_size, dilation, stride, is_causal: one per axis, or one for all.

    Returns:
        int64 [N, T], N positions, T = product of kernel sizes; slots without a key (causal) repeat the last valid one.
    """
    spatial = (spatial,) if isinstance(spatial, int) else tuple(spatial)
    pattern = neighborhood_pattern(len(spatial), kernel_size, stride, dilation, is_causal)
    return reference.pattern_index(pattern, spatial)[1]


def swin_index(window_size: int | Sequence[int]) -> Tensor:
    """Swin's `relative_position_index`: flat table index of every pair of one window (query minus key + W - 1).

    Args:
        window_size: W per axis; an int stands for a square two-dimensional window.

    Returns:
        int64 [N, N] with N = product of the window's sides (Liu et al. 2021, section 3.2).
    """
    window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
    pattern = window_pattern(len(window), window)
    relative = reference.pattern_index(pattern, window)[1]  # key minus query
    entries = math.prod(pattern.rpb_shape)
    return entries - 1 - relative


def swin_to_nat(table: Tensor, window_size: int | Sequence[int] | None = None) -> Tensor:
    """Swin's bias table as a NAT table.

    Args:
        table: [(2 W_0 - 1) * ..., heads], as Swin checkpoints store it.
        window_size: W per axis; None for a square two-dimensional window.

    Returns:
        [heads, 2 W_0 - 1, ...], a view where possible; differentiable.

    Raises:
        ValueError: the rows do not match the window.
    """
    sides = _table_sides(table, window_size)
    grid = table.t().unflatten(1, sides)
    return grid.flip(tuple(range(1, grid.dim())))


def nat_to_swin(table: Tensor) -> Tensor:
    """The inverse of `swin_to_nat`: [heads, 2 W_0 - 1, ...] -> [(2 W_0 - 1) * ..., heads]."""
    if table.dim() < 2:
        raise ValueError(f"table must have shape [heads, 2 W_0 - 1, ...], got {list(table.shape)}")
    return table.flip(tuple(range(1, table.dim()))).flatten(1).t()


def _table_sides(table: Tensor, window_size) -> tuple[int, ...]:
    if table.dim() != 2:
        raise ValueError(f"table must have shape [(2 W_0 - 1) * ..., heads], got {list(table.shape)}")
    rows = table.shape[0]
    if window_size is None:
        side = math.isqrt(rows)
        if side * side != rows or side % 2 == 0:
            raise ValueError(f"table has {rows} rows, not (2 W - 1)^2: pass window_size")
        return (side, side)
    window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
    sides = tuple(2 * w - 1 for w in window)
    if math.prod(sides) != rows:
        raise ValueError(f"a window of {window} needs {math.prod(sides)} table rows, got {rows}")
    return sides


def dense_bias(rpb: Tensor, window_size: int | Sequence[int]) -> Tensor:
    """The bias of every pair of one window, from a table in NAT's layout.

    Args:
        rpb: [heads, 2 W_0 - 1, ...].
        window_size: W per axis; an int stands for all axes of the table.

    Returns:
        [heads, N, N] indexed (head, query, key); differentiable.
    """
    window = per_axis("window_size", window_size, rpb.dim() - 1)
    pattern = window_pattern(len(window), window)
    if tuple(rpb.shape[1:]) != pattern.rpb_shape:
        raise ValueError(f"rpb must have shape [heads, {', '.join(map(str, pattern.rpb_shape))}], got {list(rpb.shape)}")
    return reference.local_bias(rpb, pattern, window).flatten(1, -2)


def resize(rpb: Tensor, kernel_size, mode: str = "bicubic", align_corners: bool = False) -> Tensor:
    """Resizes a bias table to another kernel or window size.

    Args:
        rpb: [heads, 2 K_0 - 1, 2 K_1 - 1], either convention.
        kernel_size: new K per axis, or one for both.
        mode: "bicubic", as the official Swin and NAT code resize, "bilinear", or "geometric": linear interpolation
            between entries taken to lie at distances 1, 1 + q, 1 + q + q^2, ... from the centre, q chosen so that the
            outermost entries stay outermost, as BEiT's code and timm resize. An axis that keeps its size is not touched.
        align_corners: see `torch.nn.functional.interpolate`; not for "geometric".

    Returns:
        [heads, 2 K'_0 - 1, 2 K'_1 - 1] in rpb's dtype; differentiable.

    Raises:
        ValueError: another shape or mode.
    """
    if rpb.dim() != 3:
        raise ValueError(f"rpb must have shape [heads, 2 K_0 - 1, 2 K_1 - 1], got {list(rpb.shape)}")
    if mode not in ("bicubic", "bilinear", "geometric"):
        raise ValueError(f"mode must be 'bicubic', 'bilinear' or 'geometric', got {mode!r}")
    if align_corners and mode == "geometric":
        raise ValueError("align_corners is not defined for mode 'geometric'")
    size = tuple(2 * k - 1 for k in per_axis("kernel_size", kernel_size, 2))
    if tuple(rpb.shape[1:]) == size:
        return rpb
    compute = rpb.to(torch.promote_types(rpb.dtype, torch.float32))
    if mode == "geometric":
        rows, columns = (_geometric_weights(old, new, compute) for old, new in zip(rpb.shape[1:], size))
        return (rows @ compute @ columns.t()).to(rpb.dtype)
    return F.interpolate(compute[None], size=size, mode=mode, align_corners=align_corners)[0].to(rpb.dtype)


def _geometric_weights(old: int, new: int, like: Tensor) -> Tensor:
    """[new, old], the linear interpolation along one axis from `old` entries in geometric progression to `new` even ones."""
    if old == new:
        return torch.eye(old, dtype=like.dtype, device=like.device)
    half = old // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio**half) / (1 - ratio)  # 1 + ratio + ... + ratio^(half - 1)
        low, high = (low, ratio) if reach > new // 2 else (ratio, high)
    distances = torch.cumsum(ratio ** torch.arange(half, dtype=torch.float64), 0)
    known = torch.cat([-distances.flip(0), distances.new_zeros(1), distances])
    wanted = torch.arange(new, dtype=torch.float64) - new // 2
    wanted = wanted.clamp(known[0], known[-1])
    right = torch.searchsorted(known, wanted).clamp(min(1, half), old - 1)
    left = (right - 1).clamp(min=0)
    share = (wanted - known[left]) / (known[right] - known[left]).clamp(min=1)  # gaps are at least 1; 0 / 1 for one entry
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights.scatter_add_(1, left[:, None], 1 - share[:, None])
    weights.scatter_add_(1, right[:, None], share[:, None])
    return weights.to(like)


def resize_swin(table: Tensor, window_size, old_window_size=None, mode: str = "bicubic") -> Tensor:
    """`resize` for a table in the layout of Swin's checkpoints.

    Args:
        table: [(2 W_0 - 1) * (2 W_1 - 1), heads].
        window_size: new W per axis, or one for both.
        old_window_size: W of the table; None for a square window.
        mode: see `resize`.

    Returns:
        [(2 W'_0 - 1) * (2 W'_1 - 1), heads] in table's dtype; differentiable.

    Raises:
        ValueError: the rows do not match the window, or another mode.
    """
    return nat_to_swin(resize(swin_to_nat(table, old_window_size), window_size, mode))


def log_spaced_coords(window_size: int | Sequence[int], pretrained_window_size: int | Sequence[int] = 0) -> Tensor:
    """Swin v2's log-spaced relative coordinates, sign(x) * log2(1 + 8 |x| / (W - 1)) / log2(8) (Liu et al. 2022, eq. 4).

    Args:
        window_size: W per axis; an int stands for a square window.
        pretrained_window_size: the window that the coordinates are relative to, 0 for window_size itself.

    Returns:
        fp32 [2 W_0 - 1, 2 W_1 - 1, 2], in Swin's order (query minus key); for n axes [2 W_0 - 1, ..., n].
    """
    ndim = 2 if isinstance(window_size, int) else len(window_size)
    window = per_axis("window_size", window_size, ndim)
    pretrained = per_axis("pretrained_window_size", pretrained_window_size, ndim)
    axes = []
    for w, p in zip(window, pretrained):
        steps = torch.arange(1 - w, w, dtype=torch.float32)
        axes.append(steps * 8 / max((p if p > 0 else w) - 1, 1))
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return coords.sign() * torch.log2(coords.abs() + 1) / math.log2(8)

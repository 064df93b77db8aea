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
from .patterns import check_fits, neighborhood_pattern, per_axis, window_pattern

RESIZE_MODES = ("bicubic", "bilinear", "geometric", "geometric_cubic")


def nat_index(spatial: int | Sequence[int], kernel_size, dilation=1, stride=1, is_causal=False) -> Tensor:
    """Flat table index of every (query, key slot) pair of neighborhood attention (key minus query + K - 1, row-major).

    Args:
        spatial: length of every axis, an int for one axis.
        kernel_size, dilation, stride, is_causal: one per axis, or one for all.

    Returns:
        int64 [N, T], N positions, T = product of kernel sizes; slots without a key (causal) repeat the last valid one.
    """
    spatial = _lengths("spatial", spatial, 1)
    pattern = neighborhood_pattern(len(spatial), kernel_size, stride, dilation, is_causal)
    check_fits(pattern, spatial)
    return reference.pattern_index(pattern, spatial)[1]


def swin_index(window_size: int | Sequence[int]) -> Tensor:
    """Swin's `relative_position_index`: flat table index of every pair of one window (query minus key + W - 1).

    Args:
        window_size: W per axis; an int stands for a square two-dimensional window.

    Returns:
        int64 [N, N] with N = product of the window's sides (Liu et al. 2021, section 3.2).
    """
    window = _lengths("window_size", window_size, 2)
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
    _check_table("table", table, "[(2 W_0 - 1) * ..., heads]", ranks=(2,))
    sides = _table_sides(table, window_size)
    grid = table.t().unflatten(1, sides)
    return grid.flip(tuple(range(1, grid.dim())))


def nat_to_swin(table: Tensor) -> Tensor:
    """The inverse of `swin_to_nat`: [heads, 2 W_0 - 1, ...] -> [(2 W_0 - 1) * ..., heads]."""
    _check_table("table", table, "[heads, 2 W_0 - 1, ...]")
    return table.flip(tuple(range(1, table.dim()))).flatten(1).t()


def _table_sides(table: Tensor, window_size) -> tuple[int, ...]:
    rows = table.shape[0]
    if window_size is None:
        side = math.isqrt(rows)
        if side * side != rows or side % 2 == 0:
            raise ValueError(f"table has {rows} rows, not (2 W - 1)^2: pass window_size")
        return (side, side)
    window = _lengths("window_size", window_size, 2)
    sides = window_pattern(len(window), window).rpb_shape
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
    _check_table("rpb", rpb, "[heads, 2 W_0 - 1, ...]")
    pattern = window_pattern(rpb.dim() - 1, window_size)
    if tuple(rpb.shape[1:]) != pattern.rpb_shape:
        raise ValueError(f"rpb must have shape [heads, {', '.join(map(str, pattern.rpb_shape))}], got {list(rpb.shape)}")
    return reference.local_bias(rpb, pattern, pattern.kernel_size).flatten(1, -2)


def resize(rpb: Tensor, kernel_size, mode: str = "bicubic", align_corners: bool = False) -> Tensor:
    """Resizes a bias table to another kernel or window size.

    Args:
        rpb: [heads, 2 K_0 - 1, 2 K_1 - 1], either convention.
        kernel_size: new K per axis, or one for both.
        mode: "bicubic", as the official Swin and NAT code resize, "bilinear", or "geometric": linear interpolation
            between entries taken to lie at distances 1, 1 + q, 1 + q + q^2, ... from the centre, q chosen so that the
            outermost entries stay outermost, as BEiT's code and timm resize. An axis that keeps its size is not touched.
            "geometric_cubic": the same with cubic splines (not-a-knot) in place of lines, as SimMIM's code resizes Swin's
            tables; K must be at least 3 then.
        align_corners: see `torch.nn.functional.interpolate`; not for "geometric" and "geometric_cubic".

    Returns:
        [heads, 2 K'_0 - 1, 2 K'_1 - 1] in rpb's dtype; differentiable.

    Raises:
        ValueError: another shape or mode.
    """
    _check_table("rpb", rpb, "[heads, 2 K_0 - 1, 2 K_1 - 1]", ranks=(3,))
    if mode not in RESIZE_MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, RESIZE_MODES))}, got {mode!r}")
    geometric = mode.startswith("geometric")
    if align_corners and geometric:
        raise ValueError(f"align_corners is not defined for mode {mode!r}")
    size = neighborhood_pattern(2, kernel_size).rpb_shape
    if tuple(rpb.shape[1:]) == size:
        return rpb
    compute = rpb.to(torch.promote_types(rpb.dtype, torch.float32))
    if geometric:
        cubic = mode == "geometric_cubic"
        rows, columns = (_geometric_weights(old, new, cubic).to(compute) for old, new in zip(rpb.shape[1:], size))
        return (rows @ compute @ columns.t()).to(rpb.dtype)
    return F.interpolate(compute[None], size=size, mode=mode, align_corners=align_corners)[0].to(rpb.dtype)


def _geometric_weights(old: int, new: int, cubic: bool) -> Tensor:
    """fp64 [new, old], the interpolation along one axis from `old` entries in geometric progression to `new` even ones."""
    if old == new:
        return torch.eye(old, dtype=torch.float64)
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
    gap = (known[right] - known[left]).clamp(min=1)  # gaps are at least 1; 0 / 1 for one entry
    share = (wanted - known[left]) / gap
    weights = torch.zeros(new, old, dtype=torch.float64)
    curvature = torch.zeros(new, old, dtype=torch.float64)  # of the spline's second derivatives at the entries
    for side, part in ((left, 1 - share), (right, share)):
        weights.scatter_add_(1, side[:, None], part[:, None])
        curvature.scatter_add_(1, side[:, None], ((part**3 - part) * gap**2 / 6)[:, None])
    return weights + curvature @ _second_derivatives(known) if cubic else weights


def _second_derivatives(x: Tensor) -> Tensor:
    """[n, n], from values at x to the second derivatives there of the cubic spline through them.

    Its first derivative is continuous: h_0 M_0 + 2 (h_0 + h_1) M_1 + h_1 M_2 = 6 ((y_2 - y_1) / h_1 - (y_1 - y_0) / h_0) for
    every three neighbors with gaps h_0 and h_1. The third one is too at the second entry from either end (not-a-knot).
    """
    n = len(x)
    if n < 4:
        raise ValueError(f"mode 'geometric_cubic' takes tables of at least 5 entries per axis (kernel_size 3), got {n}")
    system, values = torch.zeros(2, n, n, dtype=x.dtype)
    gaps = x.diff()
    for i in range(1, n - 1):
        before, after = gaps[i - 1], gaps[i]
        system[i, i - 1 : i + 2] = torch.stack([before, 2 * (before + after), after])
        values[i, i - 1 : i + 2] = torch.stack([6 / before, -6 / before - 6 / after, 6 / after])
    for row, i in ((0, 1), (n - 1, n - 2)):
        before, after = gaps[i - 1], gaps[i]
        system[row, i - 1 : i + 2] = torch.stack([after, -before - after, before])
    return torch.linalg.solve(system, values)


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
    ndim = len(_lengths("window_size", window_size, 2))
    window = window_pattern(ndim, window_size).kernel_size
    pretrained = per_axis("pretrained_window_size", pretrained_window_size, ndim)
    axes = []
    for w, p in zip(window, pretrained):
        steps = torch.arange(1 - w, w, dtype=torch.float32)
        axes.append(steps * 8 / max((p if p > 0 else w) - 1, 1))
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return coords.sign() * torch.log2(coords.abs() + 1) / math.log2(8)


def _lengths(name: str, given, ndim: int) -> tuple[int, ...]:
    """One to three integers, one per axis; a single one stands for `ndim` axes."""
    if isinstance(given, int) and not isinstance(given, bool):
        return (given,) * ndim
    if isinstance(given, Sequence) and not isinstance(given, str) and 1 <= len(given) <= 3:
        return per_axis(name, given, len(given))
    raise TypeError(f"{name} must be an int or one to three of them, got {given!r}")


def _check_table(name: str, table, layout: str, ranks: tuple[int, ...] = (2, 3, 4)) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor {layout}, got {getattr(table, 'dtype', type(table).__name__)}")
    if table.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {table.layout}")
    if table.dim() not in ranks or 0 in table.shape:
        raise ValueError(f"{name} must have shape {layout}, got {list(table.shape)}")

"""Windowed attention with relative position bias, as Swin Transformer v1 and v2 use it, in one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..ops._common import as_autocast, wide_dtype, without_autocast
from ..patterns import Pattern, window_pattern
from ._checks import (
    AXES,
    FLOATS,
    check_attention_inputs,
    check_probability,
    check_qkvpacked,
    check_rpb,
    finite_float,
    share_heads,
)

PADDINGS = ("cut", "pad_then_roll", "roll_then_pad")
SMALL_MAPS = ("axis", "map", "shift")
MAX_LOGIT_SCALE = math.log(100.0)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    rpb: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    *,
    convention: str = "swin",
    dense_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within (shifted) windows with learned relative position bias: no roll, partition, mask or reverse.

    out(q) = sum over the keys k of q's window of softmax_k(scale * <q, k> + rpb[head, q - k + W - 1]) * v_k
    (Liu et al. 2021, eq. 4), or with logit_scale exp(min(logit_scale, log 100)) * cos(q, k) in place of scale * <q, k>
    (Liu et al. 2022, eq. 2). Windows of W positions begin at shift_size - W, shift_size, shift_size + W, ...; the border
    cuts the first and the last. On maps whose sides W divides this is what cyclic shift and region mask compute. The maps
    may have any size; libraries that pad others first are followed by padding the input of the qkv projection, see
    `natrpb.WindowAttention` and `natrpb.functional.pad_to_windows`.

    Args:
        query: [B, *spatial, heads, D] with one to three spatial axes, fp64, fp32, bf16 or fp16; any strides.
        key: [B, *spatial, heads_kv, D]; heads must be a multiple of heads_kv.
        value: [B, *spatial, heads_kv, Dv].
        window_size: W, one per axis or one for all; may exceed the axis' length.
        shift_size: where the windows begin, 0 <= shift_size < W per axis; Swin's shifted blocks use W // 2.
        rpb: [(2 W_0 - 1) * ..., heads], the layout of Swin's checkpoints, or [heads, 2 W_0 - 1, ...]; on one axis the former
            in Swin's convention, the latter in NAT's. Any float dtype; its gradient is summed in fp32, and not at all
            where rpb does not require one.
        scale: default D ** -0.5; not applied to rpb; not together with logit_scale.
        logit_scale: [heads] or [heads, 1, 1]; query and key are then normalised in fp32 (a zero vector stays zero and
            has no gradient) and rounded to their dtype, as under autocast. Above log(100) its gradient is zero.
        convention: "swin" where rpb is indexed by query minus key, "nat" where by key minus query.
        dense_bias: [heads, N, N] with N = product of W, indexed (query, key) by position within the window, added to the
            scores; runs unfused and stores the attention weights.
        dropout_p: dropout on the attention weights; runs unfused and stores them.
        return_lse: also return lse.

    Returns:
        out [B, *spatial, heads, Dv] in query's dtype; with return_lse also lse [B, *spatial, heads], the logarithm of the
        sum of exp(score), fp32 (fp64 for fp64), differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    ndim = query.dim() - 3 if isinstance(query, Tensor) else 2
    if ndim not in AXES:
        raise ValueError(f"query must have shape [B, 1 to 3 spatial axes, heads, D], got {list(query.shape)}")
    check_attention_inputs(query, key, value, ndim)
    heads, head_dim = query.shape[-2:]
    pattern = window_pattern(ndim, window_size, shift_size)
    check_probability("dropout_p", dropout_p)
    if scale is not None:
        scale = finite_float("scale", scale)
    _check_logit_scale(logit_scale, scale, heads, query)
    _check_dense_bias(dense_bias, heads, pattern, query)
    rpb = _nat_table(rpb, convention, heads, pattern)
    check_rpb(rpb, heads, pattern, query.device)

    key, value = share_heads(key, heads), share_heads(value, heads)
    if logit_scale is not None:
        query, key, scale = _cosine(query, key, logit_scale)
    elif scale is None:
        scale = head_dim**-0.5
    if dropout_p > 0 or dense_bias is not None:
        out, lse = _unfused(query, key, value, rpb, dense_bias, pattern, scale, dropout_p)
    else:
        out, lse = ops.local_attention(query, key, value, *_within_map(rpb, pattern, query.shape[1:-2]), scale)
    return (out, lse) if return_lse else out


def window_attention_qkvpacked(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    rpb: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    *,
    convention: str = "swin",
    dense_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`window_attention` of a fused projection: query, key and value are the three parts of qkv, and so is its gradient.

    A projection's gradient needs them in one tensor. From `window_attention` of three slices autograd gets three, and copies
    them together: as much memory again, and a pass over it, in every training step.

    Args:
        qkv: [B, *spatial, 3, heads, D], `linear(x).unflatten(-1, (3, heads, D))`; any strides.
        window_size, shift_size, rpb, scale, logit_scale, convention, dense_bias, dropout_p, return_lse: as in
            `window_attention`. With logit_scale, dense_bias or dropout the gradients are copied together, too.

    Returns, raises:
        as `window_attention`.
    """
    ndim = qkv.dim() - 4 if isinstance(qkv, Tensor) else 2
    if ndim not in AXES:
        raise ValueError(f"qkv must have shape [B, 1 to 3 spatial axes, 3, heads, D], got {list(qkv.shape)}")
    check_qkvpacked(qkv, ndim)
    check_probability("dropout_p", dropout_p)
    if dropout_p > 0 or dense_bias is not None or logit_scale is not None:
        return window_attention(
            *qkv.unbind(-3), window_size, shift_size, rpb, scale, logit_scale,
            convention=convention, dense_bias=dense_bias, dropout_p=dropout_p, return_lse=return_lse,
        )  # fmt: skip
    heads, head_dim = qkv.shape[-2:]
    pattern = window_pattern(ndim, window_size, shift_size)
    scale = head_dim**-0.5 if scale is None else finite_float("scale", scale)
    rpb = _nat_table(rpb, convention, heads, pattern)
    check_rpb(rpb, heads, pattern, qkv.device)
    out, lse = ops.local_attention_qkvpacked(qkv, *_within_map(rpb, pattern, qkv.shape[1:-3]), scale)
    return (out, lse) if return_lse else out


def fit_shift(
    window_size: Sequence[int], shift_size: Sequence[int], spatial: Sequence[int], small_maps: str = "axis"
) -> tuple[int, ...]:
    """The shift that is left on maps that one window spans, by one of the rules in use.

    Args:
        window_size, shift_size, spatial: one int per axis.
        small_maps: "axis" drops the shift on every axis no longer than its window (torchvision; timm at construction);
            "map" drops it on all axes if there is such an axis (official code, Hugging Face); "shift" keeps it
            (mmdetection).
    """
    if small_maps not in SMALL_MAPS:
        raise ValueError(f"small_maps must be one of {', '.join(map(repr, SMALL_MAPS))}, got {small_maps!r}")
    spanned = [length <= w for length, w in zip(spatial, window_size, strict=True)]
    if small_maps == "map":
        spanned = [any(spanned)] * len(spanned)
    if small_maps == "shift":
        return tuple(shift_size)
    return tuple(0 if whole else s for whole, s in zip(spanned, shift_size, strict=True))


def pad_to_windows(x: Tensor, window_size: Sequence[int], shift_size: Sequence[int], padding: str) -> Tensor:
    """Brings a map to whole windows as other libraries do, for `window_attention` with the same window and shift.

    Zeros are appended on every axis. With "roll_then_pad" they stand after the last position of the *rolled* map, which
    for shifted windows lies inside the map, so that tokens change places too. `crop_from_windows` undoes both.

    Args:
        x: [B, *spatial, C].
        window_size, shift_size: one int per axis.
        padding: "cut" leaves x as it is; "pad_then_roll" (mmdetection, torchvision, Hugging Face); "roll_then_pad" (timm).

    Returns:
        [B, *padded, C].
    """
    missing = _missing(x.shape[1:-1], window_size, padding)
    if not any(missing):
        return x
    shifts, axes = _rolled_axes(missing, shift_size, padding)
    widths = [0, 0]  # channels first: F.pad counts axes from the last
    for amount in reversed(missing):
        widths += [0, amount]
    if not axes:
        return F.pad(x, widths)
    return F.pad(x.roll([-s for s in shifts], axes), widths).roll(shifts, axes)


def crop_from_windows(
    out: Tensor, spatial: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int], padding: str
) -> Tensor:
    """Takes the positions of the map that `pad_to_windows` was given: [B, *padded, ...] -> [B, *spatial, ...]."""
    missing = _missing(spatial, window_size, padding)
    if not any(missing):
        return out
    shifts, axes = _rolled_axes(missing, shift_size, padding)
    inner = (slice(None), *(slice(length) for length in spatial))
    if not axes:
        return out[inner]
    return out.roll([-s for s in shifts], axes)[inner].roll(shifts, axes)


def _missing(spatial: Sequence[int], window_size: Sequence[int], padding: str) -> list[int]:
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
    return [0 if padding == "cut" else -length % w for length, w in zip(spatial, window_size, strict=True)]


def _rolled_axes(missing: Sequence[int], shift_size: Sequence[int], padding: str) -> tuple[list[int], list[int]]:
    """Shifts, and axes of a [B, *spatial, C] tensor, where rolling before or after padding is not the same."""
    if padding != "roll_then_pad":
        return [], []
    axes = [axis for axis, (amount, shift) in enumerate(zip(missing, shift_size, strict=True)) if amount and shift]
    return [shift_size[axis] for axis in axes], [axis + 1 for axis in axes]


def _nat_table(rpb: Tensor | None, convention: str, heads: int, pattern: Pattern) -> Tensor | None:
    """A table in any of the accepted layouts as the ops take it, [heads, 2 W_0 - 1, ...] by key minus query."""
    if convention not in ("swin", "nat"):
        raise ValueError(f"convention must be 'swin' or 'nat', got {convention!r}")
    if rpb is None or not isinstance(rpb, Tensor):
        return rpb
    sides = pattern.rpb_shape
    # On one axis both layouts have rank two: the convention tells which it is.
    flat = convention == "swin" if pattern.ndim == 1 else rpb.dim() == 2
    expected = (math.prod(sides), heads) if flat else (heads, *sides)
    if tuple(rpb.shape) != expected:
        layouts = [f"{[math.prod(sides), heads]} (rows of 2 W - 1 per axis, heads)", f"{[heads, *sides]}"]
        accepted = " or ".join(layouts) if pattern.ndim > 1 else layouts[not flat] + f" in convention {convention!r}"
        raise ValueError(f"rpb must have shape {accepted} for window_size {list(pattern.kernel_size)}, got {list(rpb.shape)}")
    grid = rpb.t().reshape(heads, *sides) if flat else rpb
    return grid.flip(tuple(range(1, grid.dim()))) if convention == "swin" else grid


def _within_map(rpb: Tensor | None, pattern: Pattern, spatial: Sequence[int]) -> tuple[Tensor | None, Pattern]:
    """The same windows where they are longer than an axis, without the scores and table entries of what lies beyond it."""
    if all(w <= length for w, length in zip(pattern.kernel_size, spatial)):
        return rpb, pattern
    sizes, shifts = [], []
    for w, shift, length in zip(pattern.kernel_size, pattern.shift, spatial):
        if w > length:
            shift = shift if shift < length else 0
            w = max(shift + 1, length - shift)
        sizes.append(w)
        shifts.append(shift)
    if rpb is not None:
        rpb = rpb[(slice(None), *(slice(old - new, old + new - 1) for old, new in zip(pattern.kernel_size, sizes)))]
    return rpb, pattern._replace(kernel_size=tuple(sizes), shift=tuple(shifts))


def _check_logit_scale(logit_scale, scale, heads, query):
    if logit_scale is None:
        return
    if not isinstance(logit_scale, Tensor) or logit_scale.dtype not in FLOATS:
        raise TypeError(f"logit_scale must be a floating-point tensor, got {getattr(logit_scale, 'dtype', type(logit_scale))}")
    if tuple(logit_scale.shape) not in ((heads,), (heads, 1, 1)):
        raise ValueError(f"logit_scale must have shape [{heads}] or [{heads}, 1, 1], got {list(logit_scale.shape)}")
    if logit_scale.device != query.device:
        raise ValueError(f"logit_scale must be on query's device, {query.device}, got {logit_scale.device}")
    if scale is not None:
        raise ValueError("scale and logit_scale exclude each other")


def _check_dense_bias(dense_bias, heads, pattern, query):
    if dense_bias is None:
        return
    if not isinstance(dense_bias, Tensor) or dense_bias.dtype not in FLOATS:
        raise TypeError(f"dense_bias must be a floating-point tensor, got {getattr(dense_bias, 'dtype', type(dense_bias))}")
    expected = (heads, pattern.num_slots, pattern.num_slots)
    if tuple(dense_bias.shape) != expected:
        raise ValueError(f"dense_bias must have shape {list(expected)} (heads, N, N), got {list(dense_bias.shape)}")
    if dense_bias.device != query.device:
        raise ValueError(f"dense_bias must be on query's device, {query.device}, got {dense_bias.device}")


def _cosine(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Query and key whose plain product, with scale 1, is exp(min(logit_scale, log 100)) * cos(query, key)."""
    factor = logit_scale.to(wide_dtype(query.dtype)).flatten().clamp(max=MAX_LOGIT_SCALE).exp()
    return ops.l2_normalize(query, factor), ops.l2_normalize(key), 1.0


def _unfused(query, key, value, rpb, dense_bias, pattern, scale, dropout_p):
    """Attention with a dense bias or dropout, from the unfused ops; heads-last in and out."""
    query, key, value = (x.movedim(-2, 1) for x in as_autocast(query, key, value))  # [B, heads, *, D]
    wide = wide_dtype(query.dtype)
    with without_autocast(query.device):
        scores = ops.local_qk(query.to(wide) * scale, key.to(wide), rpb, pattern)
        if dense_bias is not None:
            scores = scores + _window_bias(dense_bias, pattern, query.shape[2:-1])
        lse = scores.logsumexp(-1).movedim(1, -1)
        weights = torch.dropout(scores.softmax(-1), dropout_p, True).to(value.dtype)
        return ops.local_av(weights, value, pattern).movedim(1, -2), lse


def _window_bias(dense_bias: Tensor, pattern: Pattern, spatial: Sequence[int]) -> Tensor:
    """dense_bias [heads, N, N] of every (query, slot) pair of a map: [heads, *spatial, N]."""
    place = torch.zeros((), dtype=torch.int64)  # of every position within its window, row-major
    for length, window, shift in zip(spatial, pattern.kernel_size, pattern.shift):
        place = place[..., None] * window + (torch.arange(length) - shift) % window
    place = place.flatten()
    keys = reference.pattern_index(pattern, spatial)[0]  # [positions, N]
    pairs = (place[:, None] * pattern.num_slots + place[keys]).to(dense_bias.device)
    return dense_bias.flatten(1)[:, pairs].unflatten(1, tuple(spatial))

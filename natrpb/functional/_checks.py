"""Argument checks that the public functions share; every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from ..ops._register import autocasts
from ..patterns import Pattern

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AXES = {1: ("L",), 2: ("H", "W"), 3: ("D0", "H", "W")}
_NUMBERS = (float, numbers.Real)  # NB: the usual one first, which is found faster
_HEADS_LAST = {ndim: f"[B, {', '.join(axes)}, heads, D]" for ndim, axes in AXES.items()}


def check_tensor(name, given, rank, layout, like=None):
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(given).__name__}")
    if given.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {given.dtype}")
    if given.layout != torch.strided or given.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if given.is_nested else given.layout}")
    if given.dim() != rank:
        raise ValueError(f"{name} must have shape {layout}, got {list(given.shape)}")
    if like is not None:
        if given.device != like.device:
            raise ValueError(f"{name} must be on query's device, {like.device}, got {given.device}")
        if given.dtype != like.dtype and (torch.float64 in (given.dtype, like.dtype) or not autocasts(like.device)):
            raise TypeError(f"{name} must have query's dtype, {like.dtype}, got {given.dtype}")


def check_attention_inputs(query, key, value, ndim: int):
    """Checks heads-last query, key and value of an attention over `ndim` axes, key and value perhaps with fewer heads."""
    layout = _HEADS_LAST[ndim]
    check_tensor("query", query, ndim + 3, layout)
    check_tensor("key", key, ndim + 3, layout, like=query)
    check_tensor("value", value, ndim + 3, layout, like=query)
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if key_shape != shape and (key_shape[:-2] != shape[:-2] or key_shape[-1] != shape[-1]):
        raise ValueError(f"key must have query's shape but for heads, {list(shape)}, got {list(key_shape)}")
    if value_shape != key_shape and value_shape[:-1] != key_shape[:-1]:
        raise ValueError(f"value must have key's shape but for the last axis, {list(key_shape)}, got {list(value_shape)}")
    check_head_dim(shape[-1], value_shape[-1])


def check_qkvpacked(qkv, ndim: int):
    """Checks query, key and value packed in one heads-last tensor of an attention over `ndim` axes."""
    layout = f"[B, {', '.join(AXES[ndim])}, 3, heads, D]"
    check_tensor("qkv", qkv, ndim + 4, layout)
    if qkv.shape[-3] != 3:
        raise ValueError(f"qkv must have shape {layout}, got {list(qkv.shape)}")
    check_head_dim(qkv.shape[-1])


def check_probability(name: str, given) -> None:
    if isinstance(given, bool) or not isinstance(given, _NUMBERS) or not 0 <= given <= 1:
        raise ValueError(f"{name} must be a number between 0 and 1, got {given!r}")


def finite_float(name, given) -> float:
    """The number as a float; ValueError where it is none or not finite."""
    if isinstance(given, _NUMBERS) and not isinstance(given, bool):
        try:
            number = float(given)
        except OverflowError:
            number = math.inf
        if -math.inf < number < math.inf:  # NB: a compiler's symbolic number does not go through math.isfinite
            return number
    raise ValueError(f"{name} must be a finite number or None, got {given!r}")


def check_head_dim(*dims):
    for dim in dims:
        if dim < 1:
            raise ValueError(f"the last axis (head_dim) must hold at least 1 element, got {dim}")


def check_rpb(rpb, heads, pattern: Pattern, device):
    if rpb is None:
        return
    if not isinstance(rpb, Tensor) or rpb.dtype not in FLOATS:
        raise TypeError(f"rpb must be a floating-point tensor or None, got {getattr(rpb, 'dtype', type(rpb).__name__)}")
    if rpb.layout != torch.strided:
        raise TypeError(f"rpb must be a dense tensor, got {rpb.layout}")
    expected = (heads, *pattern.rpb_shape)
    if rpb.shape != expected:
        raise ValueError(f"rpb must have shape {list(expected)} (heads, 2 K - 1 per axis), got {list(rpb.shape)}")
    if rpb.device != device:
        raise ValueError(f"rpb must be on the other tensors' device, {device}, got {rpb.device}")


def share_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats key/value heads so that every query head has its own (grouped-query attention); x [..., heads_kv, D]."""
    heads_kv = x.shape[-2]
    if heads_kv == heads:
        return x
    if heads_kv < 1 or heads % heads_kv:
        raise ValueError(f"query's heads must be a multiple of key's, got {heads} and {heads_kv}")
    return x.repeat_interleave(heads // heads_kv, dim=-2)

"""What the op families share: dtypes, layouts, and the way through the reference."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ._register import autocasts


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, lse and bias tables: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast hands them to an op: in its dtype where it is on; float64 stays, as torch's own rule."""
    device = tensors[0].device
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def without_autocast(device: torch.device):
    """A context in which every dtype stays as it is."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def on_reference(function, casts: int, *args):
    """Calls the reference; under autocast with the first `casts` tensors cast, as the compiled op casts them."""
    cast = as_autocast(*args[:casts])
    with without_autocast(args[0].device):
        return function(*cast, *args[casts:])


def sum_of(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def heads_first(dtype: torch.dtype, *tensors: Tensor | None):
    """[B, *, h, D] -> [B, h, *, D] in `dtype`."""
    return tuple(None if x is None else x.movedim(-2, 1).to(dtype) for x in tensors)


def heads_last(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    """[B, h, *, D] -> [B, *, h, D] in `dtype`."""
    return None if x is None else x.movedim(1, -2).to(dtype)

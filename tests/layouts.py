"""The same call with its tensors laid out in memory in every way that models and mischief produce."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Inputs


def _each(change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs._replace(query=change(inputs.query), key=change(inputs.key), value=change(inputs.value))


def _fused_qkv(inputs: Inputs) -> Inputs:
    """Slices of one [B, *, 3, h, D] projection, as every NAT module makes them."""
    qkv = torch.stack(inputs[:3], dim=-3)
    query, key, value = qkv.unbind(-3)
    return inputs._replace(query=query, key=key, value=value)


def _heads_first(x: Tensor) -> Tensor:
    return x.movedim(-2, 1).contiguous().movedim(1, -2)


def _spatial_reversed(x: Tensor) -> Tensor:
    order = (0, *reversed(range(1, x.dim() - 2)), x.dim() - 2, x.dim() - 1)
    return x.permute(order).contiguous().permute(order)


def _inside_larger_map(x: Tensor) -> Tensor:
    larger = x.new_full([*(n + 3 for n in x.shape[:-2]), *x.shape[-2:]], float("nan"))
    inner = larger[tuple(slice(1, n + 1) for n in x.shape[:-2])]
    return inner.copy_(x)


def _every_other_channel(x: Tensor) -> Tensor:
    wide = x.new_full([*x.shape[:-1], 2 * x.shape[-1]], float("nan"))
    return wide[..., ::2].copy_(x)


def _channels_before_heads(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _unaligned(x: Tensor) -> Tensor:
    return x.new_full([x.numel() + 1], float("nan"))[1:].view(x.shape).copy_(x)


def _expanded(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, 1).expand_as(x)


LAYOUTS: dict[str, Callable[[Inputs], Inputs]] = {
    "contiguous": lambda inputs: inputs,
    "fused-qkv": _fused_qkv,
    "heads-first": _each(_heads_first),
    "spatial-reversed": _each(_spatial_reversed),
    "inside-larger-map": _each(_inside_larger_map),
    "every-other-channel": _each(_every_other_channel),
    "channels-before-heads": _each(_channels_before_heads),
    "unaligned": _each(_unaligned),
    "one-sample-expanded": _each(_expanded(0)),
    "one-row-expanded": _each(_expanded(1)),
    "one-column-expanded": _each(_expanded(2)),
    "one-head-expanded": _each(_expanded(-2)),
    "one-channel-expanded": _each(_expanded(-1)),
    "strided-bias": lambda inputs: inputs._replace(rpb=inputs.rpb.mT.contiguous().mT),
}

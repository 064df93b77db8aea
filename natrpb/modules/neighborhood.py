"""Neighborhood attention as a module: fused qkv projection, attention with an optional bias table, output projection.

Argument names and state-dict keys are those of NATTEN's modules (https://github.com/SHI-Labs/NATTEN, MIT), so
checkpoints trained with any of its versions load unchanged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..patterns import neighborhood_pattern

_OLDER_SPELLINGS = {"dim": "embed_dim", "bias": "rel_pos_bias"}


def _accept_older_spellings(init: Callable) -> Callable:
    """Lets `dim` stand for `embed_dim` (NATTEN before 0.20) and `bias` for `rel_pos_bias` (before 0.17)."""

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        for old, name in _OLDER_SPELLINGS.items():
            if old in kwargs:
                if name in kwargs or (name == "embed_dim" and args):
                    raise TypeError(f"{old} is an older spelling of {name}: give one of them, got both")
                kwargs[name] = kwargs.pop(old)
        init(self, *args, **kwargs)

    return wrapper


class _NeighborhoodAttention(nn.Module):
    ndim: int
    _attend: Callable[..., Tensor]

    @_accept_older_spellings
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad_small_inputs: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a positive multiple of num_heads, got {embed_dim} and {num_heads}")
        if not 0 <= attn_drop <= 1:
            raise ValueError(f"attn_drop must be between 0 and 1, got {attn_drop}")
        pattern = neighborhood_pattern(self.ndim, kernel_size, stride, dilation, is_causal)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kernel_size, self.stride, self.dilation = pattern.kernel_size, pattern.stride, pattern.dilation
        self.is_causal = tuple(bool(kind) for kind in pattern.kind)
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.pad_small_inputs = pad_small_inputs

        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.empty(num_heads, *pattern.rpb_shape)) if rel_pos_bias else None
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the bias table from a normal distribution with deviation 0.02, cut at -2 and 2."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *spatial, embed_dim] -> [B, *spatial, embed_dim]."""
        if x.dim() != self.ndim + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have shape [B, {self.ndim} spatial axes, {self.embed_dim}] for {type(self).__name__}, "
                f"got {list(x.shape)}"
            )
        spatial = x.shape[1:-1]
        if self.pad_small_inputs:
            x = self._pad(x)
        out = self._attend(
            self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)),
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            rpb=self.rpb,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        ).flatten(-2)
        if out.shape[1:-1] != spatial:
            out = out[(slice(None), *(slice(length) for length in spatial))]
        return self.proj_drop(self.proj(out))

    def _pad(self, x: Tensor) -> Tensor:
        """Appends zeros to every axis shorter than kernel_size * dilation; these tokens take part in the attention."""
        missing = [max(k * d - length, 0) for k, d, length in zip(self.kernel_size, self.dilation, x.shape[1:-1], strict=True)]
        if not any(missing):
            return x
        widths = [0, 0]  # channels first: F.pad counts axes from the last
        for amount in reversed(missing):
            widths += [0, amount]
        return F.pad(x, widths)

    def extra_repr(self) -> str:
        def brief(sizes: tuple) -> str:
            return str(sizes[0]) if len(set(sizes)) == 1 else str(sizes)

        parts = [f"{self.embed_dim}, num_heads={self.num_heads}, kernel_size={brief(self.kernel_size)}"]
        if any(s != 1 for s in self.stride):
            parts.append(f"stride={brief(self.stride)}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation={brief(self.dilation)}")
        if any(self.is_causal):
            parts.append(f"is_causal={brief(self.is_causal)}")
        parts.append(f"rel_pos_bias={self.rpb is not None}")
        if not math.isclose(self.scale, self.head_dim**-0.5):
            parts.append(f"qk_scale={self.scale:g}")
        if self.attn_drop:
            parts.append(f"attn_drop={self.attn_drop:g}")
        if self.pad_small_inputs:
            parts.append("pad_small_inputs=True")
        return ", ".join(parts)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over [B, L, embed_dim]; arguments as in `NeighborhoodAttention2D`."""

    ndim = 1
    _attend = staticmethod(functional.na1d_qkvpacked)


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over [B, H, W, embed_dim] (Hassani et al. 2023; dilated: Hassani and Shi 2022).

    Everything after `is_causal` is keyword-only: the positional order there differs between NATTEN versions.

    Args:
        embed_dim: channels C, a multiple of num_heads; older spelling `dim`.
        num_heads: heads h, each of C / h channels.
        kernel_size: K, one per axis or one for all.
        stride: queries that share one neighborhood, 1 <= stride <= kernel_size.
        dilation: step between neighboring keys.
        is_causal: bool per axis or one for all.
        rel_pos_bias: learn a bias per head and relative offset; older spelling `bias`.
        qkv_bias: bias of the qkv projection.
        qk_scale: factor on query-key products, default (C / h) ** -0.5.
        attn_drop: dropout on the attention weights in training; runs unfused and stores the weights.
        proj_drop: dropout on the output.
        pad_small_inputs: where an axis is shorter than kernel_size * dilation, append zeros to the input and crop the
            output, as the NAT models do; otherwise such inputs raise.

    Parameters:
        qkv.weight [3 C, C], qkv.bias [3 C]: rows packed as (query, key, value), then heads.
        rpb [h, 2 K_0 - 1, ...]: indexed by key minus query; absent without rel_pos_bias.
        proj.weight [C, C], proj.bias [C].

    Raises:
        ValueError, TypeError: arguments out of range or given twice; inputs of the wrong shape.
    """

    ndim = 2
    _attend = staticmethod(functional.na2d_qkvpacked)


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over [B, D0, H, W, embed_dim]; arguments as in `NeighborhoodAttention2D`."""

    ndim = 3
    _attend = staticmethod(functional.na3d_qkvpacked)

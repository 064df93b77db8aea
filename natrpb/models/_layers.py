"""Blocks that the model families share."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import NeighborhoodAttention2D


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, zeroes a sample's whole branch with probability `drop_prob`.

    Args:
        drop_prob: 0 <= drop_prob < 1; what survives is divided by 1 - drop_prob.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob must be at least 0 and less than 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        keep = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(keep_prob)
        return x * (keep / keep_prob)

    def extra_repr(self) -> str:
        return f"{self.drop_prob:.3g}"


class Mlp(nn.Module):
    """Linear, GELU, Linear, with dropout after each linear layer; [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class NeighborhoodBlock(nn.Module):
    """Pre-norm transformer block with neighborhood attention; [B, H, W, dim] -> [B, H, W, dim].

    Args:
        layer_scale: start value of the two per-channel factors gamma1 and gamma2 (Touvron et al. 2021), None for none.
        drop_path: probability of dropping each of the two branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        mlp_ratio: float = 4.0,
        *,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            rel_pos_bias=rel_pos_bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
            pad_small_inputs=True,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        if layer_scale is None:
            self.gamma1 = self.gamma2 = None
        else:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x)), self.gamma1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class PatchEmbed(nn.Module):
    """Non-overlapping patches, the last filled with zeros: [B, in_chans, H, W] -> [B, ceil(H/P), ceil(W/P), dim]."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def init_linear(module: nn.Module) -> None:
    """Linear layers of NAT and DiNAT start normal with deviation 0.02 and a zero bias; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_schedule(rate: float, depth: int) -> list[float]:
    """Drop probability of every block, rising linearly from 0 to `rate`."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def as_int(given: object) -> object:
    """What stands for an integer, such as NumPy's, as an int; anything else as it is."""
    try:
        return operator.index(given)
    except TypeError:
        return given


def block_dilations(dilation: int | Sequence[int], depth: int) -> list[int]:
    """Dilation of every block: an int alternates 1, d, 1, d, ...; a sequence holds one per block."""
    dilation = as_int(dilation)
    if isinstance(dilation, int):
        return [dilation if i % 2 else 1 for i in range(depth)]
    if len(dilation) != depth:
        raise ValueError(f"dilations must be one int, or one per block ({depth}), got {len(dilation)}: {dilation!r}")
    return [as_int(each) for each in dilation]


def resize_position_embedding(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """[1, 1 + S^2, C] of a square map and one token before it -> [1, 1 + height * width, C], the token's entry unchanged.

    Bicubic, as the DeiT authors fine-tune at other sizes; 16-bit embeddings are resized in fp32.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    grid = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    compute = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = F.interpolate(compute, (height, width), mode="bicubic", align_corners=False).to(grid.dtype)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

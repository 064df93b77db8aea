"""DeiT with image relative position encoding: a plain vision transformer whose attention encodes where keys stand.

Paper: K. Wu, H. Peng, M. Chen, J. Fu, H. Chao, "Rethinking and Improving Relative Position Encoding for Vision Transformer",
       ICCV 2021, arXiv:2107.14222; DeiT: H. Touvron, M. Cord, M. Douze, F. Massa, A. Sablayrolles, H. Jégou, "Training
       data-efficient image transformers & distillation through attention", ICML 2021, arXiv:2012.12877.
Names, configurations and state-dict keys: https://github.com/microsoft/Cream (MIT), iRPE/DeiT-with-iRPE; weights:
https://github.com/wkcn/iRPE-model-zoo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..modules import get_rpe_config, iRPEAttention
from ..modules.irpe import RPEConfigs
from ._base import ImageModel
from ._layers import DropPath, Mlp, PatchEmbed, drop_path_schedule, init_linear, resize_position_embedding
from ._registry import register_model

_URL = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/"


class DeiTBlock(nn.Module):
    """Pre-norm transformer block around attention with position encodings; [B, 1 + H W, dim] -> [B, 1 + H W, dim].

    Args:
        attn: gives dim.
        mlp_ratio: hidden channels of the MLP as a multiple of dim.
        drop: dropout in the MLP.
        drop_path: probability of dropping each of the two branches.
    """

    def __init__(self, attn: iRPEAttention, mlp_ratio: float, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(attn.dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(attn.dim)
        self.mlp = Mlp(attn.dim, int(attn.dim * mlp_ratio), drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeiT(ImageModel):
    """DeiT, for images of any size: the absolute position embedding is resized to the image's patches.

    Args:
        embed_dim: channels C.
        depth: blocks.
        num_heads: heads.
        rpe_config: see `natrpb.get_rpe_config`, with skip = 1 for the classification token; None for plain DeiT.
        mlp_ratio: hidden channels of the MLPs as a multiple of C.
        patch_size: side of the patches.
        grid_size: patches per side that the position embedding is stored for, 14 for 224x224 images; that of loaded weights
            is resized to it.
        in_chans: channels of the image.
        num_classes: outputs of the head, 0 for none.
        qkv_bias, qk_scale: as in `natrpb.iRPEAttention`.
        drop_rate: dropout after the position embedding, projections and MLP layers.
        attn_drop_rate: dropout on attention weights (unfused, slower).
        drop_path_rate: drop probability of the last block; grows linearly from 0.
        features_only, out_indices, out_norms: as in `NAT`; the only stage is number 0, its map is without the
            classification token.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        rpe_config: RPEConfigs | None = None,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        grid_size: int = 14,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        out_norms: bool = True,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid_size**2, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            DeiTBlock(
                iRPEAttention(embed_dim, num_heads, qkv_bias, qk_scale, attn_drop_rate, drop_rate, rpe_config),
                mlp_ratio,
                drop_rate,
                drop_path,
            )
            for drop_path in drop_path_schedule(drop_path_rate, depth)
        )
        self._add_outputs([embed_dim], [patch_size], num_classes, features_only, out_indices, out_norms)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def _tokens(self, x: Tensor) -> tuple[Tensor, int, int]:
        """x [B, in_chans, H, W] -> [B, 1 + H' W', C] of the last block, classification token first; H', W'."""
        x = self.patch_embed(x)
        height, width = x.shape[1:3]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        x = self.pos_drop(x + self._position_embedding(height, width))
        for block in self.blocks:
            x = block(x, height, width)
        return x, height, width

    def _position_embedding(self, height: int, width: int) -> Tensor:
        """[1, 1 + height * width, C], resized bicubically as the DeiT authors fine-tune at other sizes."""
        if (height, width) == (self.grid_size, self.grid_size):
            return self.pos_embed
        return resize_position_embedding(self.pos_embed, height, width)

    def _stages(self, x: Tensor, count: int) -> list[Tensor]:
        x, height, width = self._tokens(x)
        return [x[:, 1:].unflatten(1, (height, width))]

    def forward_features(self, x: Tensor) -> Tensor:
        """x [B, in_chans, H, W] -> [B, 1 + H' W', num_features], normalised, classification token first."""
        if self.features_only:
            raise RuntimeError("forward_features needs the final norm, which a features_only model does not have")
        return self.norm(self._tokens(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 1 + H' W', num_features] -> logits [B, num_classes], or the classification token with `pre_logits`."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def no_weight_decay(self) -> set[str]:
        """Names of the classification token and the position embedding, which the official code exempts."""
        return {"cls_token", "pos_embed"}


_TINY = dict(embed_dim=192, depth=12, num_heads=3)
_SMALL = dict(embed_dim=384, depth=12, num_heads=6)
_BASE = dict(embed_dim=768, depth=12, num_heads=12)


def _rpe(rpe_on: str, ratio: float = 1.9, method: str = "product") -> dict:
    return dict(rpe_config=get_rpe_config(ratio, method, "contextual", True, 1, rpe_on))


@register_model(url=_URL + "deit_tiny_patch16_224_ctx_product_50_shared_k.pth")
def deit_tiny_patch16_224_ctx_product_50_shared_k(**overrides) -> DeiT:
    """DeiT-Ti with iRPE on keys: 5.76 M parameters, 1.28 G multiply-adds and 73.7% ImageNet-1k top-1 at 224x224."""
    return DeiT(**(_TINY | _rpe("k") | overrides))


@register_model()
def deit_small_patch16_224_ctx_euc_20_shared_k(**overrides) -> DeiT:
    """DeiT-S with iRPE on keys, method euclidean; no weights are published."""
    return DeiT(**(_SMALL | _rpe("k", 20, "euclidean") | overrides))


@register_model()
def deit_small_patch16_224_ctx_quant_51_shared_k(**overrides) -> DeiT:
    """DeiT-S with iRPE on keys, method quantization; no weights are published."""
    return DeiT(**(_SMALL | _rpe("k", 33, "quantization") | overrides))


@register_model()
def deit_small_patch16_224_ctx_cross_56_shared_k(**overrides) -> DeiT:
    """DeiT-S with iRPE on keys, method cross; no weights are published."""
    return DeiT(**(_SMALL | _rpe("k", 20, "cross") | overrides))


@register_model(url=_URL + "deit_small_patch16_224_ctx_product_50_shared_k.pth")
def deit_small_patch16_224_ctx_product_50_shared_k(**overrides) -> DeiT:
    """DeiT-S with iRPE on keys: 22.09 M parameters, 4.66 G multiply-adds and 80.9% ImageNet-1k top-1 at 224x224."""
    return DeiT(**(_SMALL | _rpe("k") | overrides))


@register_model(url=_URL + "deit_small_patch16_224_ctx_product_50_shared_qk.pth")
def deit_small_patch16_224_ctx_product_50_shared_qk(**overrides) -> DeiT:
    """DeiT-S with iRPE on queries and keys: 22.13 M parameters, 4.71 G multiply-adds and 81.0% ImageNet-1k top-1."""
    return DeiT(**(_SMALL | _rpe("qk") | overrides))


@register_model(url=_URL + "deit_small_patch16_224_ctx_product_50_shared_qkv.pth")
def deit_small_patch16_224_ctx_product_50_shared_qkv(**overrides) -> DeiT:
    """DeiT-S with iRPE on queries, keys and values: 22.17 M parameters, 4.89 G multiply-adds and 81.2% ImageNet-1k top-1."""
    return DeiT(**(_SMALL | _rpe("qkv") | overrides))


@register_model(url=_URL + "deit_base_patch16_224_ctx_product_50_shared_k.pth")
def deit_base_patch16_224_ctx_product_50_shared_k(**overrides) -> DeiT:
    """DeiT-B with iRPE on keys: 86.61 M parameters, 17.68 G multiply-adds and 82.3% ImageNet-1k top-1 at 224x224."""
    return DeiT(**(_BASE | _rpe("k") | overrides))


@register_model(url=_URL + "deit_base_patch16_224_ctx_product_50_shared_qkv.pth")
def deit_base_patch16_224_ctx_product_50_shared_qkv(**overrides) -> DeiT:
    """DeiT-B with iRPE on queries, keys and values: 86.68 M parameters, 18.14 G multiply-adds and 82.8% ImageNet-1k top-1."""
    return DeiT(**(_BASE | _rpe("qkv") | overrides))

"""Isotropic NAT and DiNAT: a plain vision transformer (patches of 16, one resolution) with neighborhood attention; ViT-rpb.

ViT-rpb is their peer with global attention and a bias table over the 14x14 positions of a 224x224 image. There a neighborhood
of 14x14 is the whole map, and both tables are indexed by key minus query. The official model takes no other image; here maps
are treated as by the others, so that global attention on a larger one needs `kernel_size` to be its side.

Paper: A. Hassani, H. Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001.
Configurations and state-dict keys: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._base import ImageModel
from ._layers import NeighborhoodBlock, PatchEmbed, block_dilations, drop_path_schedule, init_linear
from ._registry import register_model

_URL = "https://shi-labs.com/projects/dinat/checkpoints/isotropic/"


class IsotropicNAT(ImageModel):
    """Neighborhood attention at one resolution, 1/16 of the image's.

    Args:
        embed_dim: channels.
        depth: blocks.
        num_heads: heads.
        dilations: an int d for blocks that alternate 1, d, 1, d, ..., or a list with one dilation per block.
        mlp_ratio, kernel_size, layer_scale, rel_pos_bias, in_chans, num_classes, qkv_bias, qk_scale, drop_rate,
        attn_drop_rate, drop_path_rate, features_only, out_indices, out_norms: as in `NAT`; the only stage is number 0.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        kernel_size: int | Sequence[int] = 7,
        dilations: int | Sequence[int] = 1,
        layer_scale: float | None = None,
        rel_pos_bias: bool = True,
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
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size=16)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.Sequential(
            *(
                NeighborhoodBlock(
                    embed_dim,
                    num_heads,
                    kernel_size,
                    dilation,
                    mlp_ratio,
                    rel_pos_bias=rel_pos_bias,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path,
                    layer_scale=layer_scale,
                )
                for dilation, drop_path in zip(
                    block_dilations(dilations, depth), drop_path_schedule(drop_path_rate, depth), strict=True
                )
            )
        )
        self._add_outputs([embed_dim], [16], num_classes, features_only, out_indices, out_norms)
        self.apply(init_linear)

    def _stages(self, x: Tensor, count: int) -> list[Tensor]:
        return [self.layers(self.pos_drop(self.patch_embed(x)))]


_SMALL = dict(embed_dim=384, depth=12, num_heads=12, drop_path_rate=0.1)
_BASE = dict(embed_dim=768, depth=12, num_heads=24, drop_path_rate=0.4)
_GLOBAL = dict(kernel_size=14)


@register_model(url=_URL + "nat_isotropic_small_in1k_224.pth")
def nat_isotropic_small(**overrides) -> IsotropicNAT:
    """Isotropic NAT-Small: 22.0 M parameters, 4.3 GFLOP and 80.0% ImageNet-1k top-1 at 224x224."""
    return IsotropicNAT(**(_SMALL | overrides))


@register_model(url=_URL + "dinat_isotropic_small_in1k_224.pth")
def dinat_isotropic_small(**overrides) -> IsotropicNAT:
    """Isotropic DiNAT-Small: 22.0 M parameters, 4.3 GFLOP and 80.8% ImageNet-1k top-1 at 224x224."""
    return IsotropicNAT(**(_SMALL | dict(dilations=2) | overrides))


@register_model(url=_URL + "nat_isotropic_base_in1k_224.pth")
def nat_isotropic_base(**overrides) -> IsotropicNAT:
    """Isotropic NAT-Base: 86.5 M parameters, 16.9 GFLOP and 81.6% ImageNet-1k top-1 at 224x224."""
    return IsotropicNAT(**(_BASE | overrides))


@register_model(url=_URL + "dinat_isotropic_base_in1k_224.pth")
def dinat_isotropic_base(**overrides) -> IsotropicNAT:
    """Isotropic DiNAT-Base: 86.5 M parameters, 16.9 GFLOP and 82.1% ImageNet-1k top-1 at 224x224."""
    return IsotropicNAT(**(_BASE | dict(dilations=2) | overrides))


@register_model(url=_URL + "vitrpb_small_in1k_224.pth")
def vitrpb_small(**overrides) -> IsotropicNAT:
    """ViT-rpb-Small: 22.1 M parameters, 4.6 GFLOP and 81.2% ImageNet-1k top-1 at 224x224."""
    return IsotropicNAT(**(_SMALL | _GLOBAL | overrides))


@register_model(url=_URL + "vitrpb_base_in1k_224.pth")
def vitrpb_base(**overrides) -> IsotropicNAT:
    """ViT-rpb-Base: 86.6 M parameters, 17.5 GFLOP and 82.5% ImageNet-1k top-1 at 224x224."""
    return IsotropicNAT(**(_BASE | _GLOBAL | overrides))

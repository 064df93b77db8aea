"""DiNAT_s: dilated neighborhood attention in Swin's layout (patches of 4, patch merging, mlp_ratio 4, no layer scale).

Paper: A. Hassani, H. Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001; patch merging: Z. Liu et al.,
       "Swin Transformer", ICCV 2021, arXiv:2103.14030.
Configurations and state-dict keys: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Pyramid
from ._layers import PatchEmbed
from ._registry import register_model

_1K = "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/"
_22K = "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/"


class PatchStem(PatchEmbed):
    """Patches of 4x4 and a LayerNorm: [B, in_chans, H, W] -> [B, ceil(H/4), ceil(W/4), dim]."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(in_chans, dim, patch_size=4)


class PatchMerging(nn.Module):
    """Concatenates 2x2 positions, normalises and projects: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), 2 dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # channel blocks in checkpoint order: (row, column) = (0, 0), (1, 0), (0, 1), (1, 1)
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class DiNAT_s(Pyramid):
    """The Swin-like variant of the Dilated Neighborhood Attention Transformer. Arguments as in `Pyramid`."""

    stages_name = "layers"
    stem_type = PatchStem
    downsample_type = PatchMerging


_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4, drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4, drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mlp_ratio=4, drop_path_rate=0.5)
_LARGE = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), mlp_ratio=4, drop_path_rate=0.35)
_AT_224 = dict(dilations=(8, 4, 2, 1))
_AT_384 = dict(dilations=(13, 6, 3, 1))


@register_model(url=_1K + "dinat_s_tiny_in1k_224.pth")
def dinat_s_tiny(**overrides) -> DiNAT_s:
    """DiNAT_s-Tiny: 28.3 M parameters, 4.5 GFLOP and 81.8% ImageNet-1k top-1 at 224x224."""
    return DiNAT_s(**(_TINY | _AT_224 | overrides))


@register_model(url=_1K + "dinat_s_small_in1k_224.pth")
def dinat_s_small(**overrides) -> DiNAT_s:
    """DiNAT_s-Small: 49.6 M parameters, 8.7 GFLOP and 83.5% ImageNet-1k top-1 at 224x224."""
    return DiNAT_s(**(_SMALL | _AT_224 | overrides))


@register_model(url=_1K + "dinat_s_base_in1k_224.pth")
def dinat_s_base(**overrides) -> DiNAT_s:
    """DiNAT_s-Base: 87.8 M parameters, 15.4 GFLOP and 83.8% ImageNet-1k top-1 at 224x224."""
    return DiNAT_s(**(_BASE | _AT_224 | overrides))


@register_model(url=_1K + "dinat_s_large_in1k_224.pth")
def dinat_s_large(**overrides) -> DiNAT_s:
    """DiNAT_s-Large: 196.5 M parameters, 34.5 GFLOP and 86.5% ImageNet-1k top-1 at 224x224, from ImageNet-22k."""
    return DiNAT_s(**(_LARGE | _AT_224 | overrides))


@register_model(url=_1K + "dinat_s_large_in1k_384.pth", input_size=384)
def dinat_s_large_384(**overrides) -> DiNAT_s:
    """DiNAT_s-Large with the dilations of 384x384 images: 101.5 GFLOP, 87.4% ImageNet-1k top-1."""
    return DiNAT_s(**(_LARGE | _AT_384 | overrides))


@register_model(url=_22K + "dinat_s_large_in22k_224.pth", num_classes=None)
def dinat_s_large_21k(**overrides) -> DiNAT_s:
    """DiNAT_s-Large as trained on ImageNet-22k at 224x224; the start for fine-tuning."""
    return DiNAT_s(**(_LARGE | _AT_224 | dict(drop_path_rate=0.2) | overrides))

"""NAT and DiNAT: pyramids of neighborhood attention with overlapping convolutional stem and downsampling.

Papers: A. Hassani, S. Walton, J. Li, S. Li, H. Shi, "Neighborhood Attention Transformer", CVPR 2023, arXiv:2204.07143;
        A. Hassani, H. Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001.
Configurations and state-dict keys: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from __future__ import annotations

from torch import Tensor, nn

from ._base import Pyramid
from ._registry import register_model

_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
_DINAT_1K = "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/"
_DINAT_22K = "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/"


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 and a LayerNorm: [B, in_chans, H, W] -> [B, ceil(H/4), ceil(W/4), dim]."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2 and a LayerNorm: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), 2 dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(Pyramid):
    """Neighborhood Attention Transformer; with `dilations`, the Dilated one. Arguments as in `Pyramid`."""

    stages_name = "levels"
    stem_type = ConvStem
    downsample_type = ConvDownsample


_MINI = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3, drop_path_rate=0.2)
_TINY = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3, drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2, drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2, drop_path_rate=0.5)
_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2, drop_path_rate=0.35)
# Every second block spans the whole map: K * dilation = 7 * 8 = 56 in the first stage of a 224 x 224 image, and so on.
_AT_224 = dict(dilations=(8, 4, 2, 1))
_AT_384 = dict(dilations=(13, 6, 3, 1))


@register_model(url=_NAT + "nat_mini.pth", hf_id="shi-labs/nat-mini-in1k-224")
def nat_mini(**overrides) -> NAT:
    """NAT-Mini: 20.0 M parameters, 2.7 GFLOP and 81.8% ImageNet-1k top-1 at 224x224."""
    return NAT(**(_MINI | overrides))


@register_model(url=_NAT + "nat_tiny.pth", hf_id="shi-labs/nat-tiny-in1k-224")
def nat_tiny(**overrides) -> NAT:
    """NAT-Tiny: 27.9 M parameters, 4.3 GFLOP and 83.2% ImageNet-1k top-1 at 224x224."""
    return NAT(**(_TINY | overrides))


@register_model(url=_NAT + "nat_small.pth", hf_id="shi-labs/nat-small-in1k-224")
def nat_small(**overrides) -> NAT:
    """NAT-Small: 50.7 M parameters, 7.8 GFLOP and 83.7% ImageNet-1k top-1 at 224x224."""
    return NAT(**(_SMALL | dict(layer_scale=1e-5) | overrides))


@register_model(url=_NAT + "nat_base.pth", hf_id="shi-labs/nat-base-in1k-224")
def nat_base(**overrides) -> NAT:
    """NAT-Base: 89.8 M parameters, 13.7 GFLOP and 84.3% ImageNet-1k top-1 at 224x224."""
    return NAT(**(_BASE | dict(layer_scale=1e-5) | overrides))


@register_model(url=_DINAT_1K + "dinat_mini_in1k_224.pth", hf_id="shi-labs/dinat-mini-in1k-224")
def dinat_mini(**overrides) -> NAT:
    """DiNAT-Mini: 20.0 M parameters, 2.7 GFLOP and 81.8% ImageNet-1k top-1 at 224x224."""
    return NAT(**(_MINI | _AT_224 | overrides))


@register_model(url=_DINAT_1K + "dinat_tiny_in1k_224.pth", hf_id="shi-labs/dinat-tiny-in1k-224")
def dinat_tiny(**overrides) -> NAT:
    """DiNAT-Tiny: 27.9 M parameters, 4.3 GFLOP and 82.7% ImageNet-1k top-1 at 224x224."""
    return NAT(**(_TINY | _AT_224 | overrides))


@register_model(url=_DINAT_1K + "dinat_small_in1k_224.pth", hf_id="shi-labs/dinat-small-in1k-224")
def dinat_small(**overrides) -> NAT:
    """DiNAT-Small: 50.7 M parameters, 7.8 GFLOP and 83.8% ImageNet-1k top-1 at 224x224; no layer scale."""
    return NAT(**(_SMALL | _AT_224 | overrides))


@register_model(url=_DINAT_1K + "dinat_base_in1k_224.pth", hf_id="shi-labs/dinat-base-in1k-224")
def dinat_base(**overrides) -> NAT:
    """DiNAT-Base: 89.8 M parameters, 13.7 GFLOP and 84.4% ImageNet-1k top-1 at 224x224."""
    return NAT(**(_BASE | _AT_224 | dict(layer_scale=1e-5) | overrides))


@register_model(url=_DINAT_1K + "dinat_large_in22k_in1k_224.pth", hf_id="shi-labs/dinat-large-in22k-in1k-224")
def dinat_large(**overrides) -> NAT:
    """DiNAT-Large: 200.9 M parameters, 30.6 GFLOP and 86.6% ImageNet-1k top-1 at 224x224, from ImageNet-22k."""
    return NAT(**(_LARGE | _AT_224 | overrides))


@register_model(url=_DINAT_1K + "dinat_large_in22k_in1k_384.pth", hf_id="shi-labs/dinat-large-in22k-in1k-384", input_size=384)
def dinat_large_384(**overrides) -> NAT:
    """DiNAT-Large with the dilations of 384x384 images: 89.7 GFLOP, 87.4% ImageNet-1k top-1."""
    return NAT(**(_LARGE | _AT_384 | overrides))


@register_model(
    url=_DINAT_1K + "dinat_large_in22k_in1k_384_11x11.pth",
    hf_id="shi-labs/dinat-large-11x11-in22k-in1k-384",
    input_size=384,
)
def dinat_large_384_11x11(**overrides) -> NAT:
    """DiNAT-Large with kernel size 11 for 384x384 images: 201.1 M parameters, 92.4 GFLOP, 87.5% ImageNet-1k top-1."""
    return NAT(**(_LARGE | _AT_224 | dict(kernel_size=11) | overrides))


@register_model(url=_DINAT_22K + "dinat_large_in22k_224.pth", num_classes=None)
def dinat_large_21k(**overrides) -> NAT:
    """DiNAT-Large as trained on ImageNet-22k at 224x224; the start for fine-tuning."""
    return NAT(**(_LARGE | _AT_224 | dict(drop_path_rate=0.2) | overrides))


@register_model(url=_DINAT_22K + "dinat_large_in22k_224_11x11interp.pth", num_classes=None)
def dinat_large_21k_11x11(**overrides) -> NAT:
    """`dinat_large_21k` with kernel size 11: the same weights, the bias tables resized by bicubic interpolation."""
    return NAT(**(_LARGE | _AT_224 | dict(drop_path_rate=0.2, kernel_size=11) | overrides))

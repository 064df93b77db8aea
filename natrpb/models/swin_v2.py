"""Swin Transformer v2: post-norm blocks, cosine attention with learned scales, bias from an MLP over log-spaced offsets.

Paper: Z. Liu, H. Hu, Y. Lin, Z. Yao, Z. Xie, Y. Wei, J. Ning, Y. Cao, Z. Zhang, L. Dong, F. Wei, B. Guo, "Swin Transformer
       V2: Scaling Up Capacity and Resolution", CVPR 2022, arXiv:2111.09883.
Configurations and state-dict keys: https://github.com/microsoft/Swin-Transformer (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import WindowAttentionV2
from ._registry import register_model
from .swin import SwinBlock, SwinPyramid, per_stage

_URL = "https://github.com/SwinTransformer/storage/releases/download/v2.0.0/"
_HUB = "microsoft/"


class SwinV2Block(SwinBlock):
    """Post-norm transformer block: each branch is normalised before it joins; arguments as in `SwinBlock`."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attn(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMergingV2(nn.Module):
    """Concatenates 2x2 positions, projects and normalises: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), 2 dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, row, W/2, column, dim]
        return self.norm(self.reduction(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinV2(SwinPyramid):
    """Swin Transformer v2. Arguments as in `SwinPyramid`.

    Args:
        pretrained_window_sizes: the windows of the weights that are fine-tuned, in the forms of window_size; 0
            for the model's own. Offsets are measured relative to them, so that the MLP sees known coordinates. Where
            `create_model` is given a window_size, the default is the published windows.
    """

    attention_type = WindowAttentionV2
    block_type = SwinV2Block
    merging_type = PatchMergingV2

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int] | Sequence[Sequence[int]] = 8,
        *,
        pretrained_window_sizes: int | Sequence[int] | Sequence[Sequence[int]] = 0,
        **options,
    ) -> None:
        pretrained = per_stage("pretrained_window_sizes", pretrained_window_sizes, len(depths))
        attention_options = [dict(pretrained_window_size=window) for window in pretrained]
        super().__init__(embed_dim, depths, num_heads, window_size, attention_options, **options)
        for stage in self.layers:
            for block in stage.blocks:  # blocks start as the identity
                nn.init.zeros_(block.norm1.weight)
                nn.init.zeros_(block.norm2.weight)


def _build(config: dict, overrides: dict) -> SwinV2:
    """A published configuration; with another window, offsets stay relative to the windows of the weights."""
    if "window_size" in overrides:
        known = config.get("pretrained_window_sizes", config["window_size"])
        overrides = {"pretrained_window_sizes": known} | overrides
    return SwinV2(**(config | overrides))


# Windows never exceed the map of the published image size: the last stage of a 256 x 256 image has 8 x 8 positions.
_W8 = dict(window_size=8)
_W12 = dict(window_size=(12, 12, 12, 6))
_W16 = dict(window_size=(16, 16, 16, 8))
_W24 = dict(window_size=(24, 24, 24, 12))
_FROM_W12 = dict(pretrained_window_sizes=(12, 12, 12, 6))
_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_BASE_22K = _BASE | dict(drop_path_rate=0.2)
_LARGE = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.2)


@register_model(
    url=_URL + "swinv2_tiny_patch4_window8_256.pth",
    hf_id=_HUB + "swinv2-tiny-patch4-window8-256",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_tiny_patch4_window8_256(**overrides) -> SwinV2:
    """Swin v2-T: 28.3 M parameters, 5.9 GFLOP and 81.8% ImageNet-1k top-1 at 256x256."""
    return _build(_TINY | _W8, overrides)


@register_model(
    url=_URL + "swinv2_tiny_patch4_window16_256.pth",
    hf_id=_HUB + "swinv2-tiny-patch4-window16-256",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_tiny_patch4_window16_256(**overrides) -> SwinV2:
    """Swin v2-T with windows of 16: 6.6 GFLOP and 82.8% ImageNet-1k top-1 at 256x256."""
    return _build(_TINY | _W16, overrides)


@register_model(
    url=_URL + "swinv2_small_patch4_window8_256.pth",
    hf_id=_HUB + "swinv2-small-patch4-window8-256",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_small_patch4_window8_256(**overrides) -> SwinV2:
    """Swin v2-S: 49.7 M parameters, 11.5 GFLOP and 83.7% ImageNet-1k top-1 at 256x256."""
    return _build(_SMALL | _W8, overrides)


@register_model(
    url=_URL + "swinv2_small_patch4_window16_256.pth",
    hf_id=_HUB + "swinv2-small-patch4-window16-256",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_small_patch4_window16_256(**overrides) -> SwinV2:
    """Swin v2-S with windows of 16: 12.6 GFLOP and 84.1% ImageNet-1k top-1 at 256x256."""
    return _build(_SMALL | _W16, overrides)


@register_model(
    url=_URL + "swinv2_base_patch4_window8_256.pth",
    hf_id=_HUB + "swinv2-base-patch4-window8-256",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_base_patch4_window8_256(**overrides) -> SwinV2:
    """Swin v2-B: 87.9 M parameters, 20.3 GFLOP and 84.2% ImageNet-1k top-1 at 256x256."""
    return _build(_BASE | _W8, overrides)


@register_model(
    url=_URL + "swinv2_base_patch4_window16_256.pth",
    hf_id=_HUB + "swinv2-base-patch4-window16-256",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_base_patch4_window16_256(**overrides) -> SwinV2:
    """Swin v2-B with windows of 16: 21.8 GFLOP and 84.6% ImageNet-1k top-1 at 256x256."""
    return _build(_BASE | _W16, overrides)


@register_model(
    url=_URL + "swinv2_base_patch4_window12_192_22k.pth",
    hf_id=_HUB + "swinv2-base-patch4-window12-192-22k",
    input_size=192,
    num_classes=21841,
)
def swinv2_base_patch4_window12_192_22k(**overrides) -> SwinV2:
    """Swin v2-B as trained on ImageNet-22k at 192x192."""
    return _build(_BASE_22K | _W12, overrides)


@register_model(
    url=_URL + "swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth",
    hf_id=_HUB + "swinv2-base-patch4-window12to16-192to256-22kto1k-ft",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_base_patch4_window12to16_192to256_22kto1k_ft(**overrides) -> SwinV2:
    """Swin v2-B from ImageNet-22k, windows of 12 to 16: 86.2% ImageNet-1k top-1 at 256x256."""
    return _build(_BASE_22K | _W16 | _FROM_W12, overrides)


@register_model(
    url=_URL + "swinv2_base_patch4_window12to24_192to384_22kto1k_ft.pth",
    hf_id=_HUB + "swinv2-base-patch4-window12to24-192to384-22kto1k-ft",
    input_size=384,
)
def swinv2_base_patch4_window12to24_192to384_22kto1k_ft(**overrides) -> SwinV2:
    """Swin v2-B from ImageNet-22k, windows of 12 to 24: 54.7 GFLOP and 87.1% ImageNet-1k top-1 at 384x384."""
    return _build(_BASE_22K | _W24 | _FROM_W12, overrides)


@register_model(
    url=_URL + "swinv2_large_patch4_window12_192_22k.pth",
    hf_id=_HUB + "swinv2-large-patch4-window12-192-22k",
    input_size=192,
    num_classes=21841,
)
def swinv2_large_patch4_window12_192_22k(**overrides) -> SwinV2:
    """Swin v2-L as trained on ImageNet-22k at 192x192."""
    return _build(_LARGE | _W12, overrides)


@register_model(
    url=_URL + "swinv2_large_patch4_window12to16_192to256_22kto1k_ft.pth",
    hf_id=_HUB + "swinv2-large-patch4-window12to16-192to256-22kto1k-ft",
    input_size=256,
    crop_pct=0.875,
)
def swinv2_large_patch4_window12to16_192to256_22kto1k_ft(**overrides) -> SwinV2:
    """Swin v2-L from ImageNet-22k, windows of 12 to 16: 47.5 GFLOP and 86.9% ImageNet-1k top-1 at 256x256."""
    return _build(_LARGE | _W16 | _FROM_W12, overrides)


@register_model(
    url=_URL + "swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth",
    hf_id=_HUB + "swinv2-large-patch4-window12to24-192to384-22kto1k-ft",
    input_size=384,
)
def swinv2_large_patch4_window12to24_192to384_22kto1k_ft(**overrides) -> SwinV2:
    """Swin v2-L from ImageNet-22k, windows of 12 to 24: 115.4 GFLOP and 87.6% ImageNet-1k top-1 at 384x384."""
    return _build(_LARGE | _W24 | _FROM_W12, overrides)

"""Swin Transformer (v1): a pyramid of windowed attention, every second block with shifted windows.

Paper: Z. Liu, Y. Lin, Y. Cao, H. Hu, Y. Wei, Z. Zhang, S. Lin, B. Guo, "Swin Transformer: Hierarchical Vision Transformer
       using Shifted Windows", ICCV 2021, arXiv:2103.14030.
Configurations and state-dict keys: https://github.com/microsoft/Swin-Transformer (MIT).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import WindowAttention
from ..patterns import per_axis
from ._base import ImageModel, Stage
from ._layers import DropPath, Mlp, PatchEmbed, as_int, drop_path_schedule, init_linear
from ._registry import register_model
from .dinat_s import PatchMerging

_URL = "https://github.com/SwinTransformer/storage/releases/download/"


class SwinBlock(nn.Module):
    """Pre-norm transformer block around windowed attention; [B, H, W, dim] -> [B, H, W, dim].

    Args:
        attn: gives dim and window.
        mlp_ratio: hidden channels of the MLP as a multiple of dim.
        drop: dropout in the MLP.
        drop_path: probability of dropping each of the two branches.
    """

    def __init__(self, attn: WindowAttention, mlp_ratio: float = 4.0, drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(attn.dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(attn.dim)
        self.mlp = Mlp(attn.dim, int(attn.dim * mlp_ratio), drop)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(prefix + "attn_mask", None)  # an official buffer; shifted windows need none
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class UnfoldMerging(nn.Module):
    """P x P positions to one by unfolding and a linear layer: [B, H, W, in_dim] -> [B, ceil(H/P), ceil(W/P), dim].

    The same map as a convolution of size and stride P; `natrpb.convert.linear_to_conv` converts the weight. The last
    patches are filled with zeros.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(in_dim * patch_size**2, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        x = F.pad(x, (0, 0, 0, -x.shape[2] % p, 0, -x.shape[1] % p))
        x = x.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # [B, H/P, P, W/P, P, in_dim]
        return self.linear(x.permute(0, 1, 3, 5, 2, 4).flatten(3))  # channels (in_dim, row, column), as F.unfold


class SwinPyramid(ImageModel):
    """What Swin v1 and v2 share: stages of windowed attention, each at half the resolution and twice the channels.

    Args:
        embed_dim: channels C of the first stage; stage i has C * 2^i.
        depths: blocks per stage; every second one shifts its windows by W // 2.
        num_heads: heads per stage.
        window_size: an int W or a pair (rows, columns) for all stages, or a sequence of one int or pair per stage. Two
            different ints for two stages could be either and are refused: there, write a pair per stage.
        attention_options: per stage, further arguments of the attention.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's.
        patch_size: side of the patches that become the first stage's positions.
        in_chans: channels of the image.
        num_classes: outputs of the head, 0 for none.
        qkv_bias: bias of the query, key (v1) and value projection.
        drop_rate: dropout after the patch embedding, projections and MLP layers.
        attn_drop_rate: dropout on attention weights (unfused, slower).
        drop_path_rate: drop probability of the last block; grows linearly from 0.
        padding: what is done on maps that W does not divide: "cut", "pad_then_roll" or "roll_then_pad", see
            `natrpb.WindowAttention`.
        small_maps: what becomes of the shift where one window spans an axis: "axis", "map" or "shift", see there.
        features_only, out_indices, out_norms: as in `NAT`.

    Raises:
        ValueError: arguments that contradict each other.
    """

    attention_type: ClassVar[type[WindowAttention]]
    block_type: ClassVar[type[SwinBlock]]
    merging_type: ClassVar[type[nn.Module]]  # (dim): [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), 2 dim]

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int] | Sequence[Sequence[int]],
        attention_options: Sequence[dict],
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        padding: str = "cut",
        small_maps: str = "axis",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        out_norms: bool = True,
    ) -> None:
        super().__init__()
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry per stage of depths, {len(depths)}, got {len(num_heads)}")
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(drop_path_schedule(drop_path_rate, sum(depths)))
        windows = per_stage("window_size", window_size, len(depths))

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList()
        for i, (dim, depth, heads, window) in enumerate(zip(channels, depths, num_heads, windows, strict=True)):
            blocks = [
                self.block_type(
                    self.attention_type(
                        dim,
                        window,
                        heads,
                        [w // 2 if block % 2 else 0 for w in window],
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                        padding=padding,
                        small_maps=small_maps,
                        **attention_options[i],
                    ),
                    mlp_ratio,
                    drop_rate,
                    next(drop_paths),
                )
                for block in range(depth)
            ]
            self.layers.append(Stage(blocks, self.merging_type(dim) if dim != channels[-1] else None))
        reductions = [patch_size * 2**i for i in range(len(depths))]
        self._add_outputs(channels, reductions, num_classes, features_only, out_indices, out_norms)
        self.apply(init_linear)

    def _stages(self, x: Tensor, count: int) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        stages = list(self.layers)[:count]
        maps = [stages[0](x)]
        for previous, stage in itertools.pairwise(stages):
            maps.append(stage(previous.downsample(maps[-1])))
        return maps

    def no_weight_decay(self) -> set[str]:
        """Names of what makes the position bias, and of logit scales: the official code exempts them from weight decay."""
        kinds = ("relative_position_bias_table", "logit_scale", "cpb_mlp")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}


def per_stage(name: str, given: int | Sequence, stages: int) -> list[tuple[int, int]]:
    """One (rows, columns) per stage from an int or pair for all stages, or from one int or pair per stage.

    Raises:
        ValueError: another number of entries, or two different ints for two stages, which could be either.
    """
    given = as_int(given)
    each = [given] * stages if isinstance(given, int) else [as_int(one) for one in given]
    if len(each) == 2 and all(isinstance(one, int) for one in each):
        rows, columns = each
        if stages == 2 and rows != columns:
            raise ValueError(
                f"{name} ({rows}, {columns}) is ambiguous for two stages: write (({rows}, {rows}), ({columns}, {columns})) for "
                f"one int per stage, (({rows}, {columns}), ({rows}, {columns})) for rows and columns"
            )
        each = [(rows, columns)] * stages
    if len(each) != stages:
        raise ValueError(f"{name} must have one entry per stage of depths, {stages}, got {len(each)}")
    return [per_axis(name, window, 2) for window in each]


class Swin(SwinPyramid):
    """Swin Transformer v1. Arguments as in `SwinPyramid`, and `qk_scale` as in `natrpb.WindowAttention`."""

    attention_type = WindowAttention
    block_type = SwinBlock
    merging_type = PatchMerging

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int] | Sequence[Sequence[int]] = 7,
        *,
        qk_scale: float | None = None,
        **options,
    ) -> None:
        super().__init__(embed_dim, depths, num_heads, window_size, [dict(qk_scale=qk_scale)] * len(depths), **options)


_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_LARGE = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.2)
_TINY_22K = _TINY | dict(drop_path_rate=0.1)
_SMALL_22K = _SMALL | dict(drop_path_rate=0.2)
_BASE_22K = _BASE | dict(drop_path_rate=0.2)
_W12 = dict(window_size=12)


@register_model(url=_URL + "v1.0.0/swin_tiny_patch4_window7_224.pth", hf_id="microsoft/swin-tiny-patch4-window7-224")
def swin_tiny_patch4_window7_224(**overrides) -> Swin:
    """Swin-T: 28.3 M parameters, 4.5 GFLOP and 81.2% ImageNet-1k top-1 at 224x224."""
    return Swin(**(_TINY | overrides))


@register_model(url=_URL + "v1.0.8/swin_tiny_patch4_window7_224_22k.pth", num_classes=21841)
def swin_tiny_patch4_window7_224_22k(**overrides) -> Swin:
    """Swin-T as trained on ImageNet-22k at 224x224."""
    return Swin(**(_TINY_22K | overrides))


@register_model(url=_URL + "v1.0.8/swin_tiny_patch4_window7_224_22kto1k_finetune.pth")
def swin_tiny_patch4_window7_224_22kto1k_finetune(**overrides) -> Swin:
    """Swin-T from ImageNet-22k: 80.9% ImageNet-1k top-1 at 224x224."""
    return Swin(**(_TINY_22K | overrides))


@register_model(url=_URL + "v1.0.0/swin_small_patch4_window7_224.pth", hf_id="microsoft/swin-small-patch4-window7-224")
def swin_small_patch4_window7_224(**overrides) -> Swin:
    """Swin-S: 49.6 M parameters, 8.7 GFLOP and 83.2% ImageNet-1k top-1 at 224x224."""
    return Swin(**(_SMALL | overrides))


@register_model(url=_URL + "v1.0.8/swin_small_patch4_window7_224_22k.pth", num_classes=21841)
def swin_small_patch4_window7_224_22k(**overrides) -> Swin:
    """Swin-S as trained on ImageNet-22k at 224x224."""
    return Swin(**(_SMALL_22K | overrides))


@register_model(url=_URL + "v1.0.8/swin_small_patch4_window7_224_22kto1k_finetune.pth")
def swin_small_patch4_window7_224_22kto1k_finetune(**overrides) -> Swin:
    """Swin-S from ImageNet-22k: 83.2% ImageNet-1k top-1 at 224x224."""
    return Swin(**(_SMALL_22K | overrides))


@register_model(url=_URL + "v1.0.0/swin_base_patch4_window7_224.pth", hf_id="microsoft/swin-base-patch4-window7-224")
def swin_base_patch4_window7_224(**overrides) -> Swin:
    """Swin-B: 87.8 M parameters, 15.4 GFLOP and 83.5% ImageNet-1k top-1 at 224x224."""
    return Swin(**(_BASE | overrides))


@register_model(
    url=_URL + "v1.0.0/swin_base_patch4_window12_384.pth", hf_id="microsoft/swin-base-patch4-window12-384", input_size=384
)
def swin_base_patch4_window12_384(**overrides) -> Swin:
    """Swin-B with windows of 12 at 384x384: 87.9 M parameters, 47.1 GFLOP and 84.5% ImageNet-1k top-1."""
    return Swin(**(_BASE | _W12 | overrides))


@register_model(
    url=_URL + "v1.0.0/swin_base_patch4_window7_224_22k.pth",
    hf_id="microsoft/swin-base-patch4-window7-224-in22k",
    num_classes=21841,
)
def swin_base_patch4_window7_224_22k(**overrides) -> Swin:
    """Swin-B as trained on ImageNet-22k at 224x224."""
    return Swin(**(_BASE_22K | overrides))


@register_model(
    url=_URL + "v1.0.0/swin_base_patch4_window12_384_22k.pth",
    hf_id="microsoft/swin-base-patch4-window12-384-in22k",
    input_size=384,
    num_classes=21841,
)
def swin_base_patch4_window12_384_22k(**overrides) -> Swin:
    """Swin-B with windows of 12 as trained on ImageNet-22k at 384x384."""
    return Swin(**(_BASE_22K | _W12 | overrides))


@register_model(url=_URL + "v1.0.0/swin_base_patch4_window7_224_22kto1k.pth")
def swin_base_patch4_window7_224_22kto1k(**overrides) -> Swin:
    """Swin-B from ImageNet-22k: 85.2% ImageNet-1k top-1 at 224x224."""
    return Swin(**(_BASE_22K | overrides))


@register_model(url=_URL + "v1.0.0/swin_base_patch4_window12_384_22kto1k.pth", input_size=384)
def swin_base_patch4_window12_384_22kto1k(**overrides) -> Swin:
    """Swin-B with windows of 12 from ImageNet-22k: 86.4% ImageNet-1k top-1 at 384x384."""
    return Swin(**(_BASE_22K | _W12 | overrides))


@register_model(
    url=_URL + "v1.0.0/swin_large_patch4_window7_224_22k.pth",
    hf_id="microsoft/swin-large-patch4-window7-224-in22k",
    num_classes=21841,
)
def swin_large_patch4_window7_224_22k(**overrides) -> Swin:
    """Swin-L as trained on ImageNet-22k at 224x224."""
    return Swin(**(_LARGE | overrides))


@register_model(
    url=_URL + "v1.0.0/swin_large_patch4_window12_384_22k.pth",
    hf_id="microsoft/swin-large-patch4-window12-384-in22k",
    input_size=384,
    num_classes=21841,
)
def swin_large_patch4_window12_384_22k(**overrides) -> Swin:
    """Swin-L with windows of 12 as trained on ImageNet-22k at 384x384."""
    return Swin(**(_LARGE | _W12 | overrides))


@register_model(url=_URL + "v1.0.0/swin_large_patch4_window7_224_22kto1k.pth", hf_id="microsoft/swin-large-patch4-window7-224")
def swin_large_patch4_window7_224_22kto1k(**overrides) -> Swin:
    """Swin-L from ImageNet-22k: 196.5 M parameters, 34.5 GFLOP and 86.3% ImageNet-1k top-1 at 224x224."""
    return Swin(**(_LARGE | overrides))


@register_model(
    url=_URL + "v1.0.0/swin_large_patch4_window12_384_22kto1k.pth",
    hf_id="microsoft/swin-large-patch4-window12-384",
    input_size=384,
)
def swin_large_patch4_window12_384_22kto1k(**overrides) -> Swin:
    """Swin-L with windows of 12 from ImageNet-22k: 103.9 GFLOP and 87.3% ImageNet-1k top-1 at 384x384."""
    return Swin(**(_LARGE | _W12 | overrides))

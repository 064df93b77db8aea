"""What all families share: stages in, logits or per-stage maps out; and the four-stage pyramid of NAT and DiNAT_s."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ._layers import NeighborhoodBlock, block_dilations, drop_path_schedule, init_linear


class ImageModel(nn.Module):
    """Classifier, or with `features_only` a backbone for detection and segmentation; any image size.

    Attributes:
        num_features: channels before the head.
        num_classes: 0 for no head.
        feature_info: per returned map: `index` of the stage, `num_chs` channels, `reduction` of the image's sides.
        pretrained_cfg: what is known of the published weights, set by `create_model`.
    """

    pretrained_cfg: dict | None = None

    def _stages(self, x: Tensor, count: int) -> list[Tensor]:
        """x [B, in_chans, H, W] -> [B, H_i, W_i, C_i] of the first `count` stages, before their downsampling."""
        raise NotImplementedError

    def _add_outputs(
        self,
        channels: Sequence[int],
        reductions: Sequence[int],
        num_classes: int,
        features_only: bool,
        out_indices: Sequence[int] | None,
        out_norms: bool,
    ) -> None:
        _check_classes(num_classes)
        if out_indices is None:
            out_indices = range(len(channels))
        elif not features_only:
            raise ValueError("out_indices needs features_only=True")
        if not len(out_indices) or any(not 0 <= i < len(channels) for i in out_indices):
            raise ValueError(f"out_indices must name stages from 0 to {len(channels) - 1}, got {list(out_indices)}")
        self.num_stages = len(channels)
        self.num_features = channels[-1]
        self.num_classes = 0 if features_only else num_classes
        self.features_only = features_only
        self.feature_info = [{"index": i, "num_chs": channels[i], "reduction": reductions[i]} for i in sorted(set(out_indices))]
        if features_only:
            for info in self.feature_info:
                norm = nn.LayerNorm(info["num_chs"]) if out_norms else nn.Identity()
                self.add_module(f"norm{info['index']}", norm)
        else:
            self.norm = nn.LayerNorm(self.num_features)
            self.reset_classifier(num_classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """x [B, in_chans, H, W] -> logits [B, num_classes]; with features_only a list of [B, C_i, H_i, W_i]."""
        if self.features_only:
            return self._feature_maps(x)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """x [B, in_chans, H, W] -> [B, H', W', num_features], the last stage, normalised."""
        if self.features_only:
            raise RuntimeError("forward_features needs the final norm, which a features_only model does not have")
        return self.norm(self._stages(x, self.num_stages)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, H', W', num_features] -> logits [B, num_classes], or their mean over positions with `pre_logits`."""
        x = x.mean(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def _feature_maps(self, x: Tensor) -> list[Tensor]:
        wanted = [info["index"] for info in self.feature_info]
        stages = self._stages(x, wanted[-1] + 1)
        return [getattr(self, f"norm{i}")(stages[i]).permute(0, 3, 1, 2).contiguous() for i in wanted]

    def get_classifier(self) -> nn.Module:
        """The head, `nn.Identity` where there are no classes; AttributeError for a features_only model."""
        self._check_has_classifier()
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a fresh one, of the model's dtype and on its device; 0 classes for none.

        Raises:
            ValueError: num_classes below 0.
            AttributeError: a features_only model.
        """
        self._check_has_classifier()
        _check_classes(num_classes)
        self.num_classes = num_classes
        like = self.norm.weight
        make = nn.Linear if num_classes else nn.Identity
        self.head = make(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        init_linear(self.head)

    def _check_has_classifier(self) -> None:
        if self.features_only:
            raise AttributeError("a features_only model returns maps, it has no classifier")

    def no_weight_decay(self) -> set[str]:
        """Names of the bias tables: weight decay would pull them towards no position information."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}


def _check_classes(num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")


class Stage(nn.Module):
    """Blocks at one resolution; `downsample` leads to the next stage and is called on the way there."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        for block in self.blocks:
            x = block(x)
        return x


class Pyramid(ImageModel):
    """Stages of neighborhood attention, each with half the resolution and twice the channels of the one before.

    Subclasses give the stem, the downsampler and the name under which the state dict holds the stages.

    Args:
        embed_dim: channels C of the first stage; stage i has C * 2^i.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's.
        kernel_size: K, one per axis or one for both.
        dilations: per stage, an int d for blocks that alternate 1, d, 1, d, ..., or a list with one dilation per block;
            None for no dilation.
        layer_scale: start value of the branches' per-channel factors, None for none.
        rel_pos_bias: learn a bias table per block.
        in_chans: channels of the image.
        num_classes: outputs of the head, 0 for none.
        qkv_bias, qk_scale: as in `NeighborhoodAttention2D`.
        drop_rate: dropout after the stem, projections and MLP layers.
        attn_drop_rate: dropout on attention weights (unfused, slower).
        drop_path_rate: drop probability of the last block; grows linearly from 0.
        features_only: return the maps of the stages instead of logits; no final norm, no head.
        out_indices: which stages, default all. Later ones stay, as in the official detection code, but get no gradients.
        out_norms: normalise every returned map by a LayerNorm of its own, `norm{i}`, as the official detection code.

    Raises:
        ValueError: arguments that contradict each other.
    """

    stages_name: ClassVar[str]
    stem_type: ClassVar[type[nn.Module]]  # (in_chans, dim): [B, in_chans, H, W] -> [B, H/4, W/4, dim]
    downsample_type: ClassVar[type[nn.Module]]  # (dim): [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), 2 dim]

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        kernel_size: int | Sequence[int] = 7,
        dilations: Sequence[int | Sequence[int]] | None = None,
        layer_scale: float | None = None,
        rel_pos_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        out_norms: bool = True,
    ) -> None:
        super().__init__()
        if dilations is None:
            dilations = [1] * len(depths)
        for name, given in (("num_heads", num_heads), ("dilations", dilations)):
            if len(given) != len(depths):
                raise ValueError(f"{name} must have one entry per stage of depths, {len(depths)}, got {len(given)}")
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(drop_path_schedule(drop_path_rate, sum(depths)))

        self.patch_embed = self.stem_type(in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        stages = nn.ModuleList()
        for dim, depth, heads, dilation in zip(channels, depths, num_heads, dilations, strict=True):
            blocks = [
                NeighborhoodBlock(
                    dim,
                    heads,
                    kernel_size,
                    block_dilation,
                    mlp_ratio,
                    rel_pos_bias=rel_pos_bias,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=next(drop_paths),
                    layer_scale=layer_scale,
                )
                for block_dilation in block_dilations(dilation, depth)
            ]
            stages.append(Stage(blocks, self.downsample_type(dim) if dim != channels[-1] else None))
        self.add_module(self.stages_name, stages)
        reductions = [4 * 2**i for i in range(len(depths))]
        self._add_outputs(channels, reductions, num_classes, features_only, out_indices, out_norms)
        self.apply(init_linear)

    def _stages(self, x: Tensor, count: int) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        stages = list(getattr(self, self.stages_name))[:count]
        maps = [stages[0](x)]
        for previous, stage in itertools.pairwise(stages):
            maps.append(stage(previous.downsample(maps[-1])))
        return maps

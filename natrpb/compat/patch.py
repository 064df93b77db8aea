"""Swaps the local attention of other libraries' Swin and DiNAT models for this library's, in place.

Parameters, buffers and state-dict keys stay; only the code between the qkv projection and the output projection changes, so
outputs and gradients stay the same. Modules within that code (timm's and Hugging Face's `attn`, with its softmax and dropout)
are no longer called, nor are their hooks; those of all others are. Known are, by their classes:

    timm                swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block
    torchvision         ShiftedWindowAttention, ShiftedWindowAttentionV2
    transformers >= 5   SwinLayer, Swinv2Layer; NeighborhoodAttention of DiNAT
"""

from __future__ import annotations

import functools
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import na2d, na2d_av, na2d_qk, window_attention, window_attention_qkvpacked
from ..functional.window import crop_from_windows, fit_shift, pad_to_windows

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Makes a timm, torchvision or Hugging Face Swin (v1 or v2) run on `natrpb.window_attention`, in place.

    Maps that the windows do not divide are padded by the library's own rule. Modules change their class to a subclass of
    it: deep copies and state dicts work, pickling the whole model does not. Patched Hugging Face Swin layers return None for
    the attention weights, which never exist. Patching twice changes nothing.

    Hugging Face's DiNAT runs on `natrpb.na2d`, or with `output_attentions` on the unfused ops. transformers builds it only
    where it finds NATTEN, so `natrpb.compat.natten.install()` comes first. That alone is not enough: releases since 4.57
    permute queries, keys and values wrongly.

    Args:
        model: a model, or any module that contains one.

    Returns:
        The same model.

    Raises:
        ValueError: nothing in it is known.
    """
    found = False
    for module in model.modules():
        patched = _patched(type(module))
        if patched is not None:
            module.__class__ = patched
        found = found or isinstance(module, _Patched)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no Swin block of timm, torchvision or transformers >= 5, and no DiNAT of the last"
        )
    return model


@functools.cache
def _patched(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of another library's class that replaces it, None for classes that are not known."""
    replacement = _REPLACEMENTS.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if replacement is None else type(cls.__name__, (replacement, cls), {"__module__": __name__})


class _Patched:
    """Marks the replacements."""


def _attend(x: Tensor, project, heads: int, window, shift, padding: str, **scores) -> Tensor:
    """Pads, projects, attends and crops: [B, H, W, C] -> [B, H, W, heads * d].

    Args:
        project: [B, *, C] -> one tensor [B, *, 3 heads d], or three [B, *, heads d].
    """
    window, shift, spatial = tuple(map(int, window)), tuple(map(int, shift)), x.shape[1:-1]
    projected = project(pad_to_windows(x, window, shift, padding))
    if isinstance(projected, Tensor):
        out = window_attention_qkvpacked(projected.unflatten(-1, (3, heads, -1)), window, shift, **scores)
    else:
        out = window_attention(*(part.unflatten(-1, (heads, -1)) for part in projected), window, shift, **scores)
    return crop_from_windows(out.flatten(-2), spatial, window, shift, padding)


def _mlp_table(mlp: nn.Module, coords: Tensor) -> Tensor:
    """Swin v2's table, [heads, 2 W_0 - 1, 2 W_1 - 1] by query minus key, from coords [1, 2 W_0 - 1, 2 W_1 - 1, 2]."""
    return 16 * mlp(coords)[0].permute(2, 0, 1).sigmoid()


class _TimmBlock(_Patched):
    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        out = _attend(
            x,
            attn.qkv,
            attn.num_heads,
            self.window_size,
            self.shift_size,
            "roll_then_pad",
            rpb=attn.relative_position_bias_table,
            scale=attn.scale,
            dropout_p=attn.attn_drop.p if self.training else 0.0,
        )
        return attn.proj_drop(attn.proj(out))


class _TimmBlockV2(_Patched):
    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        out = _attend(
            x,
            lambda padded: F.linear(padded, attn.qkv.weight, bias),
            attn.num_heads,
            self.window_size,
            self.shift_size,
            "roll_then_pad",
            rpb=_mlp_table(attn.cpb_mlp, attn.relative_coords_table),
            logit_scale=attn.logit_scale,
            dropout_p=attn.attn_drop.p if self.training else 0.0,
        )
        return attn.proj_drop(attn.proj(out))


class _TorchvisionAttention(_Patched):
    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, self.qkv.bias, rpb=self.relative_position_bias_table)

    def _attend(self, x: Tensor, bias: Tensor | None, **scores) -> Tensor:
        out = _attend(
            x,
            lambda padded: F.linear(padded, self.qkv.weight, bias),
            self.num_heads,
            self.window_size,
            fit_shift(self.window_size, self.shift_size, x.shape[1:-1]),
            "pad_then_roll",
            dropout_p=self.attention_dropout if self.training else 0.0,
            **scores,
        )
        return F.dropout(self.proj(out), self.dropout, self.training)


class _TorchvisionAttentionV2(_TorchvisionAttention):
    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:  # keys have none: the middle third is stored and not used
            query, key, value = bias.chunk(3)
            bias = torch.cat([query, torch.zeros_like(key), value])
        table = _mlp_table(self.cpb_mlp, self.relative_coords_table)
        return self._attend(x, bias, rpb=table, logit_scale=self.logit_scale)


class _HuggingFaceLayer(_Patched):
    def forward(self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs):
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        attn = self.attention
        out = _attend(
            self.layernorm_before(hidden_states).unflatten(1, tuple(input_dimensions)),
            lambda x: (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)),
            attn.num_attention_heads,
            (self.window_size, self.window_size),
            (self.shift_size, self.shift_size),
            "pad_then_roll",
            rpb=attn.relative_position_bias.relative_position_bias_table,
            scale=attn.scaling,
            dropout_p=attn.attention_dropout if self.training else 0.0,
        )
        out = self.dropout(attn.o_proj(out)).flatten(1, 2)
        hidden_states = hidden_states + self.drop_path(out)
        out = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + out, None


class _HuggingFaceLayerV2(_Patched):
    def forward(self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool = False):
        attn = self.attention.self
        out = _attend(
            hidden_states.unflatten(1, tuple(input_dimensions)),
            lambda x: (attn.query(x), attn.key(x), attn.value(x)),
            attn.num_attention_heads,
            (self.window_size, self.window_size),
            (self.shift_size, self.shift_size),
            "pad_then_roll",
            rpb=_mlp_table(attn.continuous_position_bias_mlp, attn.relative_coords_table),
            logit_scale=attn.logit_scale,
            dropout_p=attn.dropout.p if self.training else 0.0,
        )
        out = self.attention.output(out, hidden_states).flatten(1, 2)
        hidden_states = hidden_states + self.drop_path(self.layernorm_before(out))
        out = self.layernorm_after(self.output(self.intermediate(hidden_states)))
        hidden_states = hidden_states + self.drop_path(out)
        return (hidden_states, None) if output_attentions else (hidden_states,)


class _HuggingFaceNeighborhood(_Patched):
    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False):
        heads, pattern = self.num_attention_heads, {"kernel_size": self.kernel_size, "dilation": self.dilation}
        query, key, value = (
            project(hidden_states).unflatten(-1, (heads, -1)) for project in (self.query, self.key, self.value)
        )
        if not output_attentions:
            dropout_p = self.dropout.p if self.training else 0.0
            return (na2d(query, key, value, **pattern, rpb=self.rpb, dropout_p=dropout_p).flatten(-2),)
        query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
        scores = na2d_qk(query * self.attention_head_size**-0.5, key, **pattern, rpb=self.rpb)
        weights = self.dropout(scores.softmax(-1))
        return na2d_av(weights, value, **pattern).movedim(1, -2).flatten(-2), weights


_REPLACEMENTS: dict[str, type] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _TimmBlock,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _TimmBlockV2,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _TorchvisionAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _TorchvisionAttentionV2,
    "transformers.models.swin.modeling_swin.SwinLayer": _HuggingFaceLayer,
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer": _HuggingFaceLayerV2,
    "transformers.models.dinat.modeling_dinat.NeighborhoodAttention": _HuggingFaceNeighborhood,
}

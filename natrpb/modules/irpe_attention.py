"""Attention modules with image relative position encodings: DeiT's and, for maps of any sides with padding, DETR's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import irpe_attention
from ..functional._checks import check_tensor
from .irpe import RPEConfigs, build_rpe, encodings_of


class iRPEAttention(nn.Module):
    """Multi-head attention with image relative position encodings: [B, L, dim] -> [B, L, dim] (Wu et al. 2021).

    Args:
        dim: channels C, a multiple of num_heads.
        num_heads: heads h, each of d = C / h channels.
        qkv_bias: bias of the qkv projection.
        qk_scale: factor on scores and contextual encodings, default d ** -0.5.
        attn_drop: dropout on the attention weights in training; runs unfused and stores the weights.
        proj_drop: dropout on the output.
        rpe_config: see `natrpb.modules.get_rpe_config`, None for no encoding.

    Parameters:
        qkv.weight [3 C, C], qkv.bias [3 C]: rows packed as (query, key, value), then heads.
        rpe_q, rpe_k, rpe_v: see `iRPE` and `iRPE_Cross`, with keys such as rpe_k.lookup_table_weight.
        proj.weight [C, C], proj.bias [C].

    Raises:
        ValueError: arguments out of range; inputs of the wrong shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rpe_config: RPEConfigs | None = None,
    ) -> None:
        super().__init__()
        _check_heads("dim", dim, num_heads, "attn_drop", attn_drop)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(rpe_config, self.head_dim, num_heads)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Attends within every sequence.

        Args:
            x: [B, L, dim], skipped tokens first, then the map row by row.
            height, width: the map's sides, default the square root of L, rounded down; not looked at without encodings.

        Returns:
            [B, L, dim].
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [B, L, {self.dim}], got {list(x.shape)}")
        # qkv[b, n, 3, h, d]: the three slices are read in place, with the strides of the projection
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        out = irpe_attention(
            query,
            key,
            value,
            **encodings_of(self.rpe_q, self.rpe_k, self.rpe_v, x.shape[1], height, width, x.device),
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out.flatten(2)))

    def extra_repr(self) -> str:
        drop = f", attn_drop={self.attn_drop:g}" if self.attn_drop else ""
        return f"{self.dim}, num_heads={self.num_heads}{drop}"


class RPEMultiheadAttention(nn.Module):
    """The self-attention of DETR's encoder with image relative position encodings; a drop-in for the official class.

    Arguments stand in the official order, and need_weights is on by default as there: pass need_weights=False to run fused.
    Unlike there, a query whose keys are all excluded gets zeros instead of NaN.

    Args:
        embed_dim: channels E, a multiple of num_heads.
        num_heads: heads h.
        dropout: dropout on the attention weights in training; runs unfused and stores the weights.
        bias: bias of the projections.
        add_bias_kv, add_zero_attn: only False.
        kdim, vdim: channels of keys and values; only None or embed_dim.
        rpe_config: see `natrpb.modules.get_rpe_config`, with skip = 0, or `parse_rpe_config`; None for no encoding.
        batch_first: inputs and outputs are [B, L, E] instead of [L, B, E].

    Parameters:
        in_proj_weight [3 E, E], in_proj_bias [3 E]: rows packed as (query, key, value), then heads.
        out_proj.weight [E, E], out_proj.bias [E].
        rpe_q, rpe_k, rpe_v: see `iRPE` and `iRPE_Cross`.

    Raises:
        ValueError, TypeError: arguments out of range; inputs of the wrong shape or dtype.
        NotImplementedError: add_bias_kv, add_zero_attn, kdim or vdim that are not supported.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        rpe_config: RPEConfigs | None = None,
        *,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        for name, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise NotImplementedError(f"{name} must be False, got {given!r}: keys without a position are not supported")
        for name, given in (("kdim", kdim), ("vdim", vdim)):
            if given is not None and given != embed_dim:
                raise NotImplementedError(f"{name} must be None or embed_dim, {embed_dim}, got {given!r}")
        _check_heads("embed_dim", embed_dim, num_heads, "dropout", dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(rpe_config, self.head_dim, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the input projection as Glorot and Bengio (2010) do and sets biases to zero, as `nn.MultiheadAttention`."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        hw: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from every query to all keys of its sequence.

        Args:
            query: [L, B, E] ([B, L, E] with batch_first), fp64, fp32, bf16 or fp16; with encodings the map row by row.
            key, value: [S, B, E] ([B, S, E]), in query's dtype; S = L with encodings.
            key_padding_mask: bool or uint8 [B, S], True or not 0 at padding, which is not read.
            need_weights: also return the weights; runs unfused and stores them.
            attn_mask: [L, S], or [B * h, L, S] with a sequence's heads side by side: bool or uint8, True or not 0 where a
                pair is excluded, or of any floating dtype, added to the scores. Only bool and uint8 [L, S] run fused.
            hw: the map's (height, width), default the square root of L, rounded down; not looked at without encodings.

        Returns:
            out, as query; and the weights after dropout, averaged over heads, [B, L, S] in out's dtype, or None.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        self._check_inputs(query, key, value)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        height, width = (None, None) if hw is None else hw
        encodings = encodings_of(self.rpe_q, self.rpe_k, self.rpe_v, query.shape[1], height, width, query.device)
        if encodings and key.shape[1] != query.shape[1]:
            raise ValueError(f"key must have query's length, {query.shape[1]}, for its encodings, got {key.shape[1]}")
        key_padding_mask, attn_mask = (
            mask != 0 if isinstance(mask, Tensor) and mask.dtype == torch.uint8 else mask
            for mask in (key_padding_mask, attn_mask)
        )
        result = irpe_attention(
            *self._project(query, key, value),
            **encodings,
            key_padding_mask=key_padding_mask,
            attn_mask=self._by_head(attn_mask, query.shape[0], query.shape[1], key.shape[1]),
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=need_weights,
        )
        out, weights = (result[0], result[1].mean(1)) if need_weights else (result, None)
        out = self.out_proj(out.flatten(2))
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        batch = 0 if self.batch_first else 1
        for name, x, length in (("query", query, "L"), ("key", key, "S"), ("value", value, "S")):
            layout = f"[B, {length}, {self.embed_dim}]" if self.batch_first else f"[{length}, B, {self.embed_dim}]"
            check_tensor(name, x, 3, layout, like=query)
            if x.shape[-1] != self.embed_dim or x.shape[batch] != query.shape[batch]:
                raise ValueError(f"{name} must have shape {layout}, B as in query, got {list(x.shape)}")
        if value.shape != key.shape:
            raise ValueError(f"value must have key's shape, {list(key.shape)}, got {list(value.shape)}")

    def _by_head(self, mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor | None:
        """The mask on pairs as `irpe_attention` takes it: [B * h, L, S] -> [B, h, L, S]."""
        if not isinstance(mask, Tensor):
            return mask
        shapes = (queries, keys), (batch * self.num_heads, queries, keys)
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"attn_mask must have shape {list(shapes[0])} or {list(shapes[1])}, got {list(mask.shape)}")
        return mask if mask.dim() == 2 else mask.reshape(batch, self.num_heads, queries, keys)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Three times [B, L, E] -> [B, L, h, d]."""
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
            for x, weight, bias in zip((query, key, value), weights, biases)
        ]

    def extra_repr(self) -> str:
        drop = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.embed_dim}, num_heads={self.num_heads}{drop}"


def _check_heads(name: str, dim: int, num_heads: int, drop_name: str, drop: float) -> None:
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(f"{name} must be a positive multiple of num_heads, got {dim} and {num_heads}")
    if not 0 <= drop <= 1:
        raise ValueError(f"{drop_name} must be between 0 and 1, got {drop}")

"""Windowed attention as modules: Swin's v1 (bias table) and v2 (cosine attention, bias from an MLP over log-spaced offsets).

State-dict keys are those of the official code (https://github.com/microsoft/Swin-Transformer, MIT); index tables,
coordinates and masks, which it stores, are not needed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rpb
from ..functional import window_attention_qkvpacked
from ..functional.window import PADDINGS, SMALL_MAPS, crop_from_windows, fit_shift, pad_to_windows
from ..patterns import window_pattern

POSITION_BIASES = ("table", "shared_table", "dense", "none")


class WindowAttention(nn.Module):
    """Multi-head attention within (shifted) windows, on maps: [B, *spatial, dim] -> [B, *spatial, dim] (Liu et al. 2021).

    Args:
        dim: channels C.
        window_size: W; an int for a square two-dimensional window, a sequence for one to three axes.
        num_heads: heads h.
        shift_size: where the windows begin, 0 <= shift_size < W; Swin's shifted blocks use W // 2.
        head_dim: channels per head d, default C / h.
        qkv_bias: bias of the qkv projection.
        qk_scale: factor on query-key products, default d ** -0.5.
        attn_drop: dropout on the attention weights in training; runs unfused and stores the weights.
        proj_drop: dropout on the output.
        position_bias: "table" learns a bias per head and relative offset, "shared_table" one table for all heads, "dense"
            a bias [N, N] of every pair of positions of a window, shared by all heads (unfused, stores the weights),
            "none" no bias.
        tau: if given, cosine attention with this temperature: scores are cos(q, k) / max(tau, 0.01) plus the bias; not
            together with qk_scale.
        padding: what is done where W does not divide the map. "cut": windows end at the border. "pad_then_roll"
            (mmdetection, torchvision, Hugging Face) and "roll_then_pad" (timm) append zero tokens, which attend and are
            attended to with the qkv bias as their query, key and value, and differ in their place in shifted windows.
        small_maps: what becomes of the shift where one window spans an axis. "axis": dropped on that axis (torchvision,
            timm); "map": dropped on all axes (official code, Hugging Face); "shift": kept (mmdetection).

    Parameters:
        qkv.weight [3 h d, C], qkv.bias [3 h d]: rows packed as (query, key, value), then heads.
        relative_position_bias_table [(2 W_0 - 1) * ..., h], indexed by query minus key; [(2 W_0 - 1) * ..., 1] if shared.
        position_bias [N, N], for "dense".
        proj.weight [C, h d], proj.bias [C].

    Raises:
        ValueError, TypeError: arguments out of range; inputs of the wrong shape.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        num_heads: int,
        shift_size: int | Sequence[int] = 0,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        position_bias: str = "table",
        tau: float | None = None,
        padding: str = "cut",
        small_maps: str = "axis",
    ) -> None:
        super().__init__()
        if position_bias not in POSITION_BIASES:
            raise ValueError(f"position_bias must be one of {', '.join(map(repr, POSITION_BIASES))}, got {position_bias!r}")
        if tau is not None and tau <= 0:
            raise ValueError(f"tau must be positive, got {tau}")
        if tau is not None and qk_scale is not None:
            raise ValueError("qk_scale and tau exclude each other")
        self._configure(dim, window_size, num_heads, shift_size, head_dim, attn_drop, padding, small_maps)
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.tau = tau
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        entries = math.prod(2 * w - 1 for w in self.window_size)
        self.relative_position_bias_table = self.position_bias = None
        if position_bias in ("table", "shared_table"):
            self.relative_position_bias_table = nn.Parameter(torch.empty(entries, num_heads if position_bias == "table" else 1))
        elif position_bias == "dense":
            self.position_bias = nn.Parameter(torch.empty(math.prod(self.window_size), math.prod(self.window_size)))
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def _configure(self, dim, window_size, num_heads, shift_size, head_dim, attn_drop, padding, small_maps) -> None:
        """Checks and keeps what v1 and v2 share."""
        if dim < 1 or num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"dim must be a positive multiple of num_heads, got {dim} and {num_heads}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        if not 0 <= attn_drop <= 1:
            raise ValueError(f"attn_drop must be between 0 and 1, got {attn_drop}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
        if small_maps not in SMALL_MAPS:
            raise ValueError(f"small_maps must be one of {', '.join(map(repr, SMALL_MAPS))}, got {small_maps!r}")
        ndim = len(window_size) if isinstance(window_size, Sequence) else 2
        pattern = window_pattern(ndim, window_size, shift_size)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.window_size, self.shift_size = pattern.kernel_size, pattern.shift
        self.attn_drop = attn_drop
        self.padding, self.small_maps = padding, small_maps

    def reset_parameters(self) -> None:
        """Draws the bias from a normal distribution with deviation 0.02, cut at -2 and 2."""
        for bias in (self.relative_position_bias_table, self.position_bias):
            if bias is not None:
                nn.init.trunc_normal_(bias, std=0.02)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ("relative_position_index", "relative_coords_table"):  # official buffers; here nothing is looked up in them
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *spatial, dim] -> [B, *spatial, dim]."""
        if x.dim() != len(self.window_size) + 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must have shape [B, {len(self.window_size)} spatial axes, {self.dim}] for window_size "
                f"{list(self.window_size)}, got {list(x.shape)}"
            )
        spatial = x.shape[1:-1]
        shift = fit_shift(self.window_size, self.shift_size, spatial, self.small_maps)
        x = pad_to_windows(x, self.window_size, shift, self.padding)
        out = window_attention_qkvpacked(
            self._project(x).unflatten(-1, (3, self.num_heads, self.head_dim)),
            self.window_size,
            shift,
            dropout_p=self.attn_drop if self.training else 0.0,
            **self._scores(),
        ).flatten(-2)
        out = crop_from_windows(out, spatial, self.window_size, shift, self.padding)
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor) -> Tensor:
        """[B, *, dim] -> [B, *, 3 h d]."""
        return self.qkv(x)

    def _scores(self) -> dict:
        """What `window_attention` adds to the scores and multiplies them by."""
        scores: dict = {"scale": self.scale}
        if self.tau is not None:
            scores = {"logit_scale": self.qkv.weight.new_full((self.num_heads,), -math.log(self.tau))}
        if self.relative_position_bias_table is not None:
            scores["rpb"] = self.relative_position_bias_table.expand(-1, self.num_heads)
        if self.position_bias is not None:
            scores["dense_bias"] = self.position_bias.expand(self.num_heads, -1, -1)
        return scores

    def extra_repr(self) -> str:
        def brief(sizes: tuple) -> str:
            return str(sizes[0]) if len(sizes) == 2 and len(set(sizes)) == 1 else str(sizes)

        parts = [f"{self.dim}, window_size={brief(self.window_size)}, num_heads={self.num_heads}"]
        if any(self.shift_size):
            parts.append(f"shift_size={brief(self.shift_size)}")
        if self.attn_drop:
            parts.append(f"attn_drop={self.attn_drop:g}")
        if self.padding != "cut":
            parts.append(f"padding={self.padding!r}")
        return ", ".join(parts)


class ContinuousPositionBias(nn.Sequential):
    """A bias table from a small MLP over log-spaced relative offsets: 16 * sigmoid(MLP(offset)) (Liu et al. 2022, eq. 3, 4).

    The MLP is Linear, ReLU, Linear without bias. Its weights do not depend on the window: another one's table comes from a
    `ContinuousPositionBias` of that window with the same weights.

    Args:
        window_size: W; an int for a square two-dimensional window, a sequence for one to three axes.
        num_heads: heads h.
        pretrained_window_size: the window that offsets are relative to, 0 for window_size itself.
        hidden_features: width of the hidden layer.

    Parameters:
        0.weight [hidden_features, axes], 0.bias [hidden_features], 2.weight [h, hidden_features].
    """

    def __init__(
        self,
        window_size: int | Sequence[int],
        num_heads: int,
        pretrained_window_size: int | Sequence[int] = 0,
        hidden_features: int = 512,
    ) -> None:
        coords = rpb.log_spaced_coords(window_size, pretrained_window_size)
        super().__init__(
            nn.Linear(coords.shape[-1], hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, num_heads, bias=False),
        )
        self.window_size, self.pretrained_window_size = window_size, pretrained_window_size
        self.register_buffer("coords", coords.to(self[0].weight), persistent=False)
        self.register_load_state_dict_post_hook(_reset)

    def reset_parameters(self) -> None:
        """Makes the offsets anew, which no checkpoint holds: `to_empty` leaves nothing in them. The layers have their own."""
        self.coords = rpb.log_spaced_coords(self.window_size, self.pretrained_window_size).to(self[0].weight)

    def forward(self) -> Tensor:
        """The table, [h, 2 W_0 - 1, ...], indexed by query minus key."""
        return 16 * super().forward(self.coords).sigmoid().movedim(-1, 0)


def _reset(bias: ContinuousPositionBias, _) -> None:
    bias.reset_parameters()


class WindowAttentionV2(WindowAttention):
    """Swin v2's attention: cosine scores with a learned scale per head, bias from an MLP over offsets (Liu et al. 2022).

    Args:
        dim, window_size, num_heads, shift_size, attn_drop, proj_drop, padding, small_maps: as in `WindowAttention`.
        pretrained_window_size: the window of the weights that are fine-tuned, 0 for window_size; see
            `ContinuousPositionBias`.
        qkv_bias: bias of queries and values; keys have none.

    Parameters:
        qkv.weight [3 C, C]; q_bias, v_bias [C]; proj.weight [C, C], proj.bias [C].
        logit_scale [h, 1, 1]: logarithm of the scale, starting at log(10), used up to log(100).
        cpb_mlp: a `ContinuousPositionBias`.

    Raises:
        ValueError, TypeError: arguments out of range; inputs of the wrong shape.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        num_heads: int,
        shift_size: int | Sequence[int] = 0,
        *,
        pretrained_window_size: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        padding: str = "cut",
        small_maps: str = "axis",
    ) -> None:
        nn.Module.__init__(self)
        self._configure(dim, window_size, num_heads, shift_size, None, attn_drop, padding, small_maps)
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.cpb_mlp = ContinuousPositionBias(self.window_size, num_heads, pretrained_window_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the logit scale to log(10) and the biases to zero."""
        nn.init.constant_(self.logit_scale, math.log(10))
        if self.q_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def _project(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        return F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))

    def _scores(self) -> dict:
        table = self.cpb_mlp().flatten(1).t()  # as in checkpoints: one axis takes Swin's convention in no other layout
        return {"logit_scale": self.logit_scale, "rpb": table}

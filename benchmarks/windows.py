"""Shifted-window attention without this library: Swin's own sequence of operations, SDPA per window, timm's module.

Swin moves the input of its projections (roll and partition, C channels) and the attention's output (reverse and roll back).
The peers of the op pay the same: their query comes as a map, and their key and value already in windows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from natrpb import ops
from natrpb import rpb as tables
from tests.cases import Case

from .harness import AS_IS, OURS, Contender, Layout, Tensors, Unavailable


def partition(x: Tensor, window: int, shift: int) -> Tensor:
    """[B, H, W, ...] -> [B * windows, window ** 2, ...], rolled by -shift first."""
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    batch, height, width, *rest = x.shape
    x = x.view(batch, height // window, window, width // window, window, *rest)
    return x.transpose(2, 3).reshape(-1, window * window, *rest)


def reverse(x: Tensor, window: int, shift: int, height: int, width: int) -> Tensor:
    """[B * windows, window ** 2, ...] -> [B, H, W, ...]: the inverse of `partition`."""
    rest = x.shape[2:]
    x = x.view(-1, height // window, width // window, window, window, *rest)
    x = x.transpose(2, 3).reshape(-1, height, width, *rest)
    return x.roll((shift, shift), (1, 2)) if shift else x


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Swin's mask of the shifted windows: [windows, window ** 2, window ** 2], -100 between what the roll brought together."""
    region = torch.zeros(1, height, width)
    slices = slice(-window), slice(-window, -shift), slice(-shift, None)
    for number, (down, across) in enumerate(itertools.product(slices, slices)):
        region[:, down, across] = number
    region = partition(region, window, 0)
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)


def table_index(window: int) -> Tensor:
    """[N, N] for one window of N positions, into a table flattened per head (key minus query)."""
    return (tables.swin_index(window).neg() + (2 * window - 1) ** 2 - 1).flatten()


def window_bias(rpb: Tensor, index: Tensor, positions: int) -> Tensor:
    """[h, 2 W - 1, 2 W - 1] -> [h, N, N]."""
    return rpb.flatten(1)[:, index].unflatten(1, (positions, positions))


class Swin:
    """Swin's attention on windows of one case; `softmax(q k + bias + mask) v` step by step, or by SDPA."""

    def __init__(self, case: Case, dtype: torch.dtype, train: bool) -> None:
        self.window, self.shift = case.pattern.kernel_size[0], case.pattern.shift[0]
        self.height, self.width = case.spatial
        self.positions, self.scale, self.train = self.window**2, case.head_dim**-0.5, train
        self.index = table_index(self.window)
        self.mask = shift_mask(*case.spatial, self.window, self.shift).to(dtype) if self.shift else None
        self.kept: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        """[B * windows, N, h, d] -> the same, in Swin's own steps."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = (query * self.scale) @ key.transpose(-2, -1)
        scores = scores + window_bias(rpb, self.index, self.positions)
        if self.mask is not None:
            scores = scores.unflatten(0, (-1, self.mask.shape[0])) + self.mask[:, None]
            scores = scores.flatten(0, 1)
        return (scores.softmax(-1) @ value).transpose(1, 2)

    def attend_sdpa(self, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        """The same by SDPA; for inference bias and mask are added up beforehand."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        bias = self.full_bias(rpb)
        bias = bias.expand(query.shape[0] // bias.shape[0], *bias.shape).flatten(0, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)

    def full_bias(self, rpb: Tensor) -> Tensor:
        """[1 or windows, h, N, N]."""
        if self.kept is not None:
            return self.kept
        bias = window_bias(rpb, self.index, self.positions)[None]
        if self.mask is not None:
            bias = bias + self.mask[:, None]
        if not self.train:
            self.kept = bias
        return bias

    def around(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Adds what Swin does around its windows: query comes as a map, and so does the result leave."""

        def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            out = attend(partition(query, self.window, self.shift), key, value, rpb)
            return reverse(out, self.window, self.shift, self.height, self.width)

        return run

    def layout(self) -> Layout:
        def pack(tensors: Tensors) -> Tensors:
            return {
                name: partition(x, self.window, self.shift) if name in ("key", "value") else x for name, x in tensors.items()
            }

        def unpack(results: Tensors) -> Tensors:
            return {
                name: reverse(x, self.window, self.shift, self.height, self.width) if name in ("key", "value") else x
                for name, x in results.items()
            }

        return Layout(pack, unpack)


def window_peers(case: Case, dtype: torch.dtype, train: bool) -> list[Contender]:
    swin = Swin(case, dtype, train)
    return [
        Contender("Swin's path", lambda: swin.around(swin.attend), swin.layout()),
        Contender("SDPA per window", lambda: swin.around(swin.attend_sdpa), swin.layout()),
    ]


# The whole attention block: both projections as well, from a map [B, H, W, C] to a map.


def block(attend: Callable[..., Tensor], heads: int) -> Callable[..., Tensor]:
    """A block around `attend(query, key, value, rpb)` on heads-last maps; its inputs by name."""

    def run(x, qkv_weight, qkv_bias, proj_weight, proj_bias, rpb):
        qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, heads, -1))
        return F.linear(attend(*qkv.unbind(-3), rpb).flatten(-2), proj_weight, proj_bias)

    return run


def fused_attend(case: Case) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        return ops.local_attention(query, key, value, rpb, case.pattern, case.head_dim**-0.5)[0]

    return attend


def block_contenders(case: Case, dtype: torch.dtype, train: bool) -> list[Contender]:
    swin = Swin(case, dtype, train)

    def in_windows(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        inner = block(attend, case.heads)

        def run(x: Tensor, **parameters: Tensor) -> Tensor:
            return reverse(inner(partition(x, swin.window, swin.shift), **parameters), swin.window, swin.shift, *case.spatial)

        return run

    return [
        Contender(OURS, lambda: block(fused_attend(case), case.heads), AS_IS),
        Contender("Swin's path", lambda: in_windows(swin.attend)),
        Contender("SDPA per window", lambda: in_windows(swin.attend_sdpa)),
        timm_block(case, dtype, swin),
    ]


_TIMM_NAMES = {
    "qkv_weight": "qkv.weight",
    "qkv_bias": "qkv.bias",
    "proj_weight": "proj.weight",
    "proj_bias": "proj.bias",
    "rpb": "relative_position_bias_table",
}


def timm_block(case: Case, dtype: torch.dtype, swin: Swin) -> Contender:
    """timm's WindowAttention between Swin's roll and partition."""

    def build() -> Callable[..., Tensor]:
        module = timm_window_attention()(
            case.heads * case.head_dim, case.heads, window_size=(swin.window, swin.window), qkv_bias=True
        ).to(dtype)

        def run(x: Tensor, **parameters: Tensor) -> Tensor:
            given = {_TIMM_NAMES[name]: tensor for name, tensor in parameters.items()}
            windows = partition(x, swin.window, swin.shift)
            out = torch.func.functional_call(module, given, (windows,), {"mask": swin.mask})
            return reverse(out, swin.window, swin.shift, *case.spatial)

        return run

    to_swin = lambda tensors: {**tensors, "rpb": tables.nat_to_swin(tensors["rpb"]).contiguous()}  # noqa: E731

    def to_nat(results: Tensors) -> Tensors:
        return results if "rpb" not in results else {**results, "rpb": tables.swin_to_nat(results["rpb"])}

    return Contender("timm", build, Layout(to_swin, to_nat))


@functools.cache
def timm_window_attention() -> type:
    try:
        from timm.models.swin_transformer import WindowAttention
    except Exception as failure:
        raise Unavailable(f"timm does not import ({type(failure).__name__})") from None
    return WindowAttention

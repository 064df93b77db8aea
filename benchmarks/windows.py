"""Shifted-window attention without this library: Swin's own sequence of operations, SDPA per window, timm's module.

Swin moves the input of its projections (roll and partition, C channels) and the attention's output (reverse and roll back).
The peers of the op pay the same: their query comes as a map, and their key and value already in windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from natrpb import ops
from natrpb import rpb as tables
from tests.cases import Case

from .harness import AS_IS, OURS, Contender, Layout, Tensors, Unavailable
from .peers import BIAS_ALIGNMENT, fused_sdpa
from .timm_import import timm_module


def partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[B, *spatial, ...] -> [B * windows, N, ...], N positions a window, rolled by -shift first."""
    axes = len(window)
    if any(shift):
        x = x.roll([-s for s in shift], tuple(range(1, axes + 1)))
    split = [part for length, w in zip(x.shape[1:], window) for part in (length // w, w)]
    x = x.reshape(x.shape[0], *split, *x.shape[axes + 1 :])
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.dim())]
    return x.permute(order).reshape(-1, math.prod(window), *x.shape[2 * axes + 1 :])


def reverse(x: Tensor, window: Sequence[int], shift: Sequence[int], spatial: Sequence[int]) -> Tensor:
    """[B * windows, N, ...] -> [B, *spatial, ...]: the inverse of `partition`."""
    axes, rest = len(window), x.shape[2:]
    x = x.reshape(-1, *(length // w for length, w in zip(spatial, window)), *window, *rest)
    order = [0, *(axis for i in range(axes) for axis in (1 + i, 1 + axes + i)), *range(2 * axes + 1, x.dim())]
    x = x.permute(order).reshape(-1, *spatial, *rest)
    return x.roll(tuple(shift), tuple(range(1, axes + 1))) if any(shift) else x


def window_regions(spatial: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Swin's regions in every window: int64 [windows, N], different between what the roll brought together."""
    region = torch.zeros(1, *spatial, dtype=torch.int64)
    per_axis = [[slice(-w), slice(-w, -s), slice(-s, None)] if s else [slice(None)] for w, s in zip(window, shift)]
    for number, slices in enumerate(itertools.product(*per_axis)):
        region[(0, *slices)] = number
    return partition(region, window, [0] * len(window))


def shift_mask(spatial: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Swin's mask of the shifted windows: [windows, N, N], -100 between different regions."""
    region = window_regions(spatial, window, shift)
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)


def table_index(window: Sequence[int]) -> Tensor:
    """[N * N] for one window of N positions, into a table flattened per head (key minus query)."""
    return (tables.swin_index(tuple(window)).neg() + math.prod(2 * w - 1 for w in window) - 1).flatten()


def window_bias(rpb: Tensor, index: Tensor, positions: int) -> Tensor:
    """[h, 2 W - 1, ...] -> [h, N, N]."""
    return rpb.flatten(1)[:, index].unflatten(1, (positions, positions))


class Swin:
    """Swin's attention on windows of one case; `softmax(q k + bias + mask) v` step by step, or by SDPA.

    Made on torch's default device.
    """

    def __init__(self, case: Case, dtype: torch.dtype, train: bool) -> None:
        self.window, self.shift, self.spatial = case.pattern.kernel_size, case.pattern.shift, case.spatial
        self.positions, self.scale, self.train = math.prod(self.window), case.head_dim**-0.5, train
        self.windows = math.prod(case.spatial) // self.positions  # of one sample
        self.index = table_index(self.window)
        self.mask = shift_mask(self.spatial, self.window, self.shift).to(dtype) if any(self.shift) else None
        self.kept: Tensor | None = None

    def regions(self) -> Tensor:
        return window_regions(self.spatial, self.window, self.shift)

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
        return fused_sdpa(query, key, value, self.full_bias(rpb, query.shape[0])).transpose(1, 2)

    def full_bias(self, rpb: Tensor, windows: int) -> Tensor:
        """[windows, h, N, N] for all windows of the batch."""
        if self.kept is not None:
            return self.kept
        bias = window_bias(rpb, self.index, self.positions)[None]
        if self.mask is not None:
            bias = bias + self.mask[:, None]
        padding = -self.positions % BIAS_ALIGNMENT if rpb.is_cuda else 0
        bias = F.pad(bias, (0, padding)).expand(windows // bias.shape[0], -1, -1, -1, -1)
        bias = bias.flatten(0, 1)[..., : self.positions]
        if not self.train:
            self.kept = bias
        return bias

    def around(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Adds what Swin does around its windows: query comes as a map, and so does the result leave."""

        def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            out = attend(partition(query, self.window, self.shift), key, value, rpb)
            return reverse(out, self.window, self.shift, self.spatial)

        return run

    def layout(self) -> Layout:
        def pack(tensors: Tensors) -> Tensors:
            return {
                name: partition(x, self.window, self.shift) if name in ("key", "value") else x for name, x in tensors.items()
            }

        def unpack(results: Tensors) -> Tensors:
            return {
                name: reverse(x, self.window, self.shift, self.spatial) if name in ("key", "value") else x
                for name, x in results.items()
            }

        return Layout(pack, unpack)


def window_peers(case: Case, dtype: torch.dtype, train: bool, compiled: bool = False) -> list[Contender]:
    swin = Swin(case, dtype, train)
    return [
        Contender("Swin's path", lambda: swin.around(swin.attend), swin.layout()),
        Contender("SDPA per window", lambda: swin.around(swin.attend_sdpa), swin.layout()),
        timm_windows(case, dtype, swin),
        *([compiled_path(swin), timm_windows(case, dtype, swin, compiled=True)] if compiled else []),
    ]


def compiled_path(swin: Swin) -> Contender:
    return Contender("Swin's path, compiled", lambda: torch.compile(swin.around(swin.attend), dynamic=False), swin.layout())


# The whole attention block: both projections as well, from a map [B, H, W, C] to a map.


def block(attend: Callable[..., Tensor], heads: int) -> Callable[..., Tensor]:
    """A block around `attend(qkv, rpb)`, qkv [B, *, 3, h, d]; its inputs by name."""

    def run(x, qkv_weight, qkv_bias, proj_weight, proj_bias, rpb):
        qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, heads, -1))
        return F.linear(attend(qkv, rpb).flatten(-2), proj_weight, proj_bias)

    return run


def of_slices(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend(query, key, value, rpb)` as a function of (qkv, rpb): autograd stacks its three gradients."""
    return lambda qkv, rpb: attend(*qkv.unbind(-3), rpb)


def fused_attend(case: Case) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None) -> Tensor:
        return ops.local_attention(query, key, value, rpb, case.pattern, case.head_dim**-0.5)[0]

    return attend


def packed_attend(case: Case) -> Callable[..., Tensor]:
    def attend(qkv: Tensor, rpb: Tensor) -> Tensor:
        return ops.local_attention_qkvpacked(qkv, rpb, case.pattern, case.head_dim**-0.5)[0]

    return attend


def block_contenders(case: Case, dtype: torch.dtype, train: bool, compiled: bool = False) -> list[Contender]:
    swin = Swin(case, dtype, train)

    def in_windows(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        inner = block(of_slices(attend), case.heads)

        def run(x: Tensor, **parameters: Tensor) -> Tensor:
            windows = partition(x, swin.window, swin.shift)
            return reverse(inner(windows, **parameters), swin.window, swin.shift, case.spatial)

        return run

    return [
        Contender(OURS, lambda: block(packed_attend(case), case.heads), AS_IS),
        Contender("Swin's path", lambda: in_windows(swin.attend)),
        Contender("SDPA per window", lambda: in_windows(swin.attend_sdpa)),
        timm_block(case, dtype, swin),
        *([timm_block(case, dtype, swin, compiled=True)] if compiled else []),
    ]


# From what a projection leaves, in training to its gradient: qkv in one tensor [B, *, 3, h, d].

_PARTS = "query", "key", "value"


def projected(to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Layout:
    """qkv in place of query, key and value, all three brought to a contender's own order of positions and `back` again."""

    def pack(tensors: Tensors) -> Tensors:
        rest = {name: x for name, x in tensors.items() if name not in _PARTS}
        return {"qkv": torch.stack([to(tensors[name]) for name in _PARTS], -3)} | rest

    def unpack(results: Tensors) -> Tensors:
        rest = {name: x for name, x in results.items() if name != "qkv"}
        return rest | (dict(zip(_PARTS, map(back, results["qkv"].unbind(-3)))) if "qkv" in results else {})

    return Layout(pack, unpack)


def projected_windows(swin: Swin) -> Layout:
    """qkv [B * windows, N, 3, h, d]: in windows already, which spares a peer the roll and the partition of its input."""
    return projected(
        lambda x: partition(x, swin.window, swin.shift), lambda x: reverse(x, swin.window, swin.shift, swin.spatial)
    )


def packed_and_sliced(case: Case) -> list[Contender]:
    """Ours from one qkv, packed and by its three slices."""
    as_map = projected(lambda x: x, lambda x: x)
    return [
        Contender(OURS, lambda: packed_attend(case), as_map),
        Contender("of three slices", lambda: of_slices(fused_attend(case)), as_map),
    ]


def projected_window_peers(case: Case, dtype: torch.dtype, train: bool) -> list[Contender]:
    swin = Swin(case, dtype, train)

    def to_map(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        run = of_slices(attend)
        return lambda qkv, rpb: reverse(run(qkv, rpb), swin.window, swin.shift, swin.spatial)

    return [
        Contender("Swin's path", lambda: to_map(swin.attend), projected_windows(swin)),
        Contender("SDPA per window", lambda: to_map(swin.attend_sdpa), projected_windows(swin)),
        timm_windows(case, dtype, swin),
    ]


# timm's module, between what Swin does around it.

_TIMM_NAMES = {
    "qkv_weight": "qkv.weight",
    "qkv_bias": "qkv.bias",
    "proj_weight": "proj.weight",
    "proj_bias": "proj.bias",
    "rpb": "relative_position_bias_table",
}


def timm_attention(case: Case, dtype: torch.dtype, swin: Swin) -> torch.nn.Module:
    if case.ndim != 2:
        raise Unavailable("timm's windows have two axes")
    kind = timm_module("timm.models.swin_transformer").WindowAttention
    return kind(case.heads * case.head_dim, case.heads, window_size=swin.window, qkv_bias=True).to(dtype)


def timm_contender(build: Callable[[], Callable[..., Tensor]], layout: Layout, compiled: bool) -> Contender:
    """A contender as it is, or all of it compiled."""
    if not compiled:
        return Contender("timm", build, layout)
    return Contender("timm, compiled", lambda: torch.compile(build(), dynamic=False), layout)


def timm_block(case: Case, dtype: torch.dtype, swin: Swin, compiled: bool = False) -> Contender:
    """timm's WindowAttention between Swin's roll and partition."""

    def build() -> Callable[..., Tensor]:
        module = timm_attention(case, dtype, swin)

        def run(x: Tensor, **parameters: Tensor) -> Tensor:
            given = {_TIMM_NAMES[name]: tensor for name, tensor in parameters.items()}
            windows = partition(x, swin.window, swin.shift)
            out = torch.func.functional_call(module, given, (windows,), {"mask": swin.mask})
            return reverse(out, swin.window, swin.shift, case.spatial)

        return run

    def to_nat(results: Tensors) -> Tensors:
        return results if "rpb" not in results else {**results, "rpb": tables.swin_to_nat(results["rpb"], swin.window)}

    return timm_contender(build, Layout(lambda tensors: {**tensors, "rpb": to_timm_table(tensors["rpb"])}, to_nat), compiled)


def timm_windows(case: Case, dtype: torch.dtype, swin: Swin, compiled: bool = False) -> Contender:
    """timm's WindowAttention without its projections, which pass on a qkv that is in windows already; the result leaves as a
    map."""

    def build() -> Callable[..., Tensor]:
        module = timm_attention(case, dtype, swin)
        module.qkv = module.proj = torch.nn.Identity()

        def run(qkv: Tensor, rpb: Tensor) -> Tensor:
            given = {"relative_position_bias_table": rpb}
            out = torch.func.functional_call(module, given, (qkv.flatten(2),), {"mask": swin.mask})
            return reverse(out.unflatten(-1, (case.heads, -1)), swin.window, swin.shift, case.spatial)

        return run

    layout = projected_windows(swin)

    def pack(tensors: Tensors) -> Tensors:
        packed = layout.pack(tensors)
        return packed | {"rpb": to_timm_table(packed["rpb"])}

    def unpack(results: Tensors) -> Tensors:
        found = layout.unpack(results)
        return found | ({"rpb": tables.swin_to_nat(found["rpb"], swin.window)} if "rpb" in found else {})

    return timm_contender(build, Layout(pack, unpack), compiled)


def to_timm_table(rpb: Tensor) -> Tensor:
    return tables.nat_to_swin(rpb).contiguous()

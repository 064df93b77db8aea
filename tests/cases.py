"""The shapes that tests and benchmarks share: every case has a readable name and makes its own inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from natrpb.patterns import Pattern, neighborhood_pattern, window_pattern


class Inputs(NamedTuple):
    """Arguments of `natrpb.ops.local_attention`, heads-last."""

    query: Tensor  # [B, *, h, D]
    key: Tensor  # [B, *, h, D]
    value: Tensor  # [B, *, h, Dv]
    rpb: Tensor | None  # [h, 2 K_0 - 1, ...]
    pattern: Pattern
    scale: float

    def tensors(self) -> list[Tensor]:
        return [x for x in self[:4] if x is not None]

    def cast(self, dtype: torch.dtype) -> Inputs:
        """A copy with the same numbers as new leaves of another, or the same, dtype."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)

        return Inputs(*map(cast, self[:4]), *self[4:])


@dataclass(frozen=True)
class Case:
    """One call of local attention. A shift, even 0, makes it windowed; else it is neighborhood or causal attention."""

    spatial: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    shift: int | tuple[int, ...] | None = None
    batch: int = 1
    heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None
    rpb: bool = True

    def __str__(self) -> str:
        def joined(given) -> str:
            items = given if isinstance(given, tuple) else (given,)
            return "x".join(str(int(item)) for item in items)

        parts = ["na" if self.shift is None else "window", joined(self.spatial), f"K{joined(self.kernel_size)}"]
        for letter, given, usual in (("s", self.stride, 1), ("d", self.dilation, 1), ("causal", self.is_causal, False)):
            if given != usual:
                parts.append(f"{letter}{joined(given)}")
        if self.shift is not None:
            parts.append(f"shift{joined(self.shift)}")
        parts += [f"B{self.batch}", f"h{self.heads}", f"D{self.head_dim}"]
        if self.value_dim is not None:
            parts.append(f"Dv{self.value_dim}")
        if not self.rpb:
            parts.append("nobias")
        return "-".join(parts)

    @property
    def ndim(self) -> int:
        return len(self.spatial)

    @property
    def pattern(self) -> Pattern:
        if self.shift is not None:
            return window_pattern(self.ndim, self.kernel_size, self.shift)
        return neighborhood_pattern(self.ndim, self.kernel_size, self.stride, self.dilation, self.is_causal)

    def inputs(self, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Inputs:
        """Standard normal query, key and value, and a table of standard deviation 1/2, from torch's current seed."""
        lead, value_dim = (self.batch, *self.spatial, self.heads), self.value_dim or self.head_dim

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

        query, key, value = draw(*lead, self.head_dim), draw(*lead, self.head_dim), draw(*lead, value_dim)
        rpb = None
        if self.rpb:
            rpb = draw(self.heads, *self.pattern.rpb_shape).detach().mul(0.5).requires_grad_(requires_grad)
        return Inputs(query, key, value, rpb, self.pattern, self.head_dim**-0.5)

    @property
    def size(self) -> int:
        """Scores that the case computes, a measure of its cost."""
        return self.batch * self.heads * math.prod(self.spatial) * self.pattern.num_slots


# L = 1, K, K + 1, 2K - 1, 2K, K * d, primes, and lengths that neither K nor d divides; K odd and even.
LENGTHS = [
    Case((1,), 1),
    Case((2,), 1),
    *[Case((length,), 5) for length in (5, 6, 9, 10, 13)],
    *[Case((length,), 4) for length in (4, 5, 7, 8, 11)],
    *[Case((length,), 2) for length in (2, 3, 4)],
    Case((6,), 3, dilation=2),
    Case((7,), 3, dilation=2),
    Case((17,), 3, dilation=5),
    Case((23,), 7, dilation=3),
    Case((12,), 4, dilation=3),
    Case((19,), 6, dilation=2),
    Case((11,), 1, dilation=4),
    Case((92,), 7, dilation=13),
]
# The NAT kernel size on maps of L = K, K + 1, 2K - 1, 2K, non-square, and wide enough to have an interior.
MAPS = [Case(spatial, 7, head_dim=32) for spatial in ((7, 7), (8, 8), (13, 13), (14, 14), (15, 17), (28, 28))]
# Widths around 16 and 32, where vectors end.
WIDTHS = [Case((7, width), 7, heads=1, head_dim=16) for width in (15, 16, 17, 31, 32, 33)]
STRIDES = [
    *[Case((13,), 5, stride=stride) for stride in (2, 3, 4, 5)],
    *[Case((14,), 4, stride=stride) for stride in (2, 3, 4)],
    Case((17,), 3, stride=2, dilation=3),
    Case((12, 12), 4, stride=4),
    Case((11, 13), (3, 5), stride=(2, 3)),
    Case((5, 6, 7), (3, 4, 3), stride=(3, 2, 1), heads=1),
]
CAUSAL = [
    Case((11,), 5, is_causal=True),
    Case((9,), 4, is_causal=True),
    Case((13,), 5, stride=3, is_causal=True),
    Case((13,), 4, stride=4, dilation=2, is_causal=True),
    Case((9, 8), 5, is_causal=True),
    Case((9, 8), 5, is_causal=(True, False)),
    Case((9, 8), 5, is_causal=(False, True)),
    Case((5, 6, 7), 3, is_causal=(True, False, False)),
]
DILATED = [
    Case((14, 14), 7, dilation=2, head_dim=32),
    Case((13, 16), 3, dilation=(4, 5)),
    Case((15, 11), (5, 3), dilation=(2, 1)),
    Case((9, 8), (2, 4), dilation=(3, 2)),
]
MIXED = [
    Case((10, 9), (3, 4), stride=(2, 3), dilation=(2, 1), is_causal=(True, False), heads=3),
    Case((8, 9, 7), (3, 4, 2), stride=(1, 2, 2), dilation=(2, 1, 3), is_causal=(True, False, True)),
    Case((7, 9), 7, rpb=False),
    Case((10,), 3, dilation=3, is_causal=True, rpb=False),
]
VOLUMES = [
    Case((3, 3, 3), 3),
    Case((4, 5, 6), (2, 3, 4)),
    Case((6, 5, 7), (3, 5, 3), dilation=(2, 1, 2)),
    Case((1, 1, 5), (1, 1, 5)),
    Case((5, 1, 4), (3, 1, 2)),
]
BATCH_AND_HEADS = [
    Case((6, 7), 3, batch=0),
    Case((6, 7), 3, batch=1, heads=1),
    Case((6, 7), 3, batch=3, heads=5),
    Case((9,), 4, batch=0, heads=1),
]
HEAD_DIMS = [
    *[Case((6, 9), 3, head_dim=head_dim) for head_dim in (1, 3, 8, 24, 32, 33, 64, 128, 256)],
    *[
        Case((6, 9), 3, head_dim=head_dim, value_dim=value_dim)
        for head_dim, value_dim in ((8, 5), (32, 64), (5, 1), (1, 40), (33, 32))
    ],
]
# At most 16 slots, channels that fill vectors: rows of several vectors and rows that share one, the last slots of tiles, and
# so many heads that columns lie far apart.
FEW_SLOTS = [
    Case((8,), 7, head_dim=32),
    Case((40,), 7, head_dim=32),
    Case((33,), 13, stride=4, head_dim=16, value_dim=32),
    Case((50,), 16, dilation=3, head_dim=16),
    Case((9, 35), 3, head_dim=32),
    Case((8, 7), 3, heads=8, head_dim=16),
    Case((6, 21), (2, 5), stride=(2, 3), heads=1, head_dim=64),
    Case((9, 17), (8, 2), head_dim=16, rpb=False),
    Case((4, 5, 18), (2, 2, 4), heads=1, head_dim=16),
]
LARGE_KERNELS = [
    Case((13, 13), 13, heads=1, head_dim=16),
    Case((16, 15), 13, heads=1, head_dim=16),
    Case((63,), 63),
    Case((80,), 63),
    Case((150,), 64),
    Case((6, 7, 8), 5, heads=1),
]
WINDOWS = [
    *[Case((10,), 4, shift=shift) for shift in (0, 1, 2, 3)],
    Case((1,), 1, shift=0),
    Case((5,), 1, shift=0),
    Case((5, 6), 8, shift=0),
    Case((5, 6), 8, shift=3),
    Case((14, 14), 7, shift=0, heads=3, head_dim=32),
    Case((14, 14), 7, shift=3, heads=3, head_dim=32),
    Case((15, 17), 7, shift=3, head_dim=32),
    Case((9, 11), (4, 5), shift=(1, 2), batch=2),
    Case((6, 7), (2, 3), shift=(0, 2), rpb=False),
    Case((24, 13), 12, shift=6, heads=1),
    Case((5, 4, 3), (2, 3, 2), shift=(1, 1, 0)),
    Case((4, 6, 5), 3, shift=2),
    Case((17, 40), (16, 20), shift=(3, 5), heads=1),
    Case((4, 9, 5), (4, 5, 5), shift=(0, 2, 1)),
    *[
        Case((7, 6), (6, 5), shift=(2, 3), head_dim=head_dim, value_dim=value_dim)
        for head_dim, value_dim in ((1, 3), (2, 2), (24, 24), (33, 8), (34, 130), (256, 64))
    ],
]

CASES = [
    *LENGTHS, *MAPS, *WIDTHS, *STRIDES, *CAUSAL, *DILATED, *MIXED, *VOLUMES, *BATCH_AND_HEADS, *HEAD_DIMS,
    *FEW_SLOTS, *LARGE_KERNELS, *WINDOWS,
]  # fmt: skip

# A few that between them have every feature, for properties that do not depend on the exact shape.
SMALL = [
    Case((9,), 4, dilation=2, batch=2),
    Case((13,), 5, stride=3, is_causal=True),
    Case((7, 9), (3, 5), value_dim=5),
    Case((10, 9), (3, 4), stride=(2, 3), dilation=(2, 1), is_causal=(True, False)),
    Case((4, 5, 6), (2, 3, 4), dilation=(2, 1, 1)),
    Case((6, 9), (5, 4), shift=(2, 1), batch=2, value_dim=6),
    Case((7, 6), (4, 3), shift=(1, 2), batch=2),
    Case((9, 17), 7, head_dim=32, rpb=False),
]

# The stages of NAT on a 224 x 224 image.
NAT_STAGES = [Case((side, side), 7, heads=heads, head_dim=32) for side, heads in ((56, 2), (28, 4), (14, 8), (7, 16))]

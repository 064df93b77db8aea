"""FlexAttention as a peer: compiled, with the bias table captured by score_mod, over neighborhoods and over windows.

Its kernels go through the sequence in blocks, and skip pairs of blocks that the mask empties. How many remain depends on the
order in which a map becomes a sequence, and on the size of the blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natrpb.patterns import NEIGHBORHOOD
from tests.cases import Case

from .harness import Contender, Layout, Tensors, Unavailable
from .windows import Swin

USUAL_BLOCK = 128  # of FlexAttention's masks


def flex_attention():
    """(create_block_mask, flex_attention)."""
    from torch.nn.attention import flex_attention as module

    return module.create_block_mask, module.flex_attention


def name_of(*choices: str) -> str:
    """'FlexAttention (8x8 tiles, blocks of 64)'; the report keeps the fastest of them."""
    made = ", ".join(filter(None, choices))
    return "FlexAttention" + (f" ({made})" if made else "")


def flat_table(layout: Layout, kernel_size: Sequence[int]) -> Layout:
    """The same layout with the table flat, [h, entries].

    NB: torch 2.13 gives a captured table no gradient unless it comes to the compiled function as the leaf that asks for one.
    """

    def pack(tensors: Tensors) -> Tensors:
        packed = layout.pack(tensors)
        return packed | {"rpb": packed["rpb"].flatten(1)}

    def unpack(results: Tensors) -> Tensors:
        tables = {name: x.unflatten(1, [2 * k - 1 for k in kernel_size]) for name, x in results.items() if name == "rpb"}
        return layout.unpack(results) | tables

    return Layout(pack, unpack)


def kernel_options(block: int) -> dict[str, int]:
    """Blocks of the kernels that fit the mask's; nothing for the usual size, where FlexAttention chooses."""
    if block == USUAL_BLOCK:
        return {}
    sizes = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    return dict.fromkeys(sizes, block)


def row_major(i: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """The coordinates of flat index i in a box."""
    found = []
    for side in reversed(sides[1:]):
        found.append(i % side)
        i = i // side
    return [i, *reversed(found)]


class Order:
    """How the positions of a map become a sequence: tile after tile, and row by row within a tile.

    Args:
        spatial: the map.
        tile: sides of a tile, which must divide the map's; the whole map where nothing else is asked for.
    """

    def __init__(self, spatial: Sequence[int], tile: Sequence[int] | None = None) -> None:
        self.spatial, self.tile = tuple(spatial), tuple(tile or spatial)
        if any(length % side for length, side in zip(self.spatial, self.tile)):
            raise ValueError(f"tile must divide the map, {self.spatial}, got {self.tile}")

    def coordinates(self, i: Tensor) -> list[Tensor]:
        """Where on the map the i-th token of the sequence lies."""
        if self.tile == self.spatial:
            return row_major(i, self.spatial)
        area = math.prod(self.tile)
        tiles = row_major(i // area, [length // side for length, side in zip(self.spatial, self.tile)])
        return [tile * side + x for tile, side, x in zip(tiles, self.tile, row_major(i % area, self.tile))]

    def layout(self) -> Layout:
        """Heads-last maps as heads-first sequences: [B, *, h, d] <-> [B, h, N, d]."""
        places = torch.zeros(math.prod(self.spatial), dtype=torch.int64, device="cpu")
        for length, place in zip(self.spatial, self.coordinates(torch.arange(len(places), device="cpu"))):
            places = places * length + place
        back = places.argsort()
        names = ("query", "key", "value", "dout", "out")

        def each(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
            return lambda tensors: {name: change(x) if name in names else x for name, x in tensors.items()}

        pack = each(lambda x: x.flatten(1, -3)[:, places].transpose(1, 2).contiguous())
        unpack = each(lambda x: x.transpose(1, 2)[:, back].unflatten(1, self.spatial))
        return Layout(pack, unpack)


def table_entry(query: list[Tensor], key: list[Tensor], kernel_size: Sequence[int]) -> Tensor:
    """Flat index into one head's table, key minus query + K - 1 on every axis."""
    index = torch.zeros_like(query[0])
    for p, q, k in zip(query, key, kernel_size):
        index = index * (2 * k - 1) + (q - p + k - 1)
    return index


def nearby(query: list[Tensor], key: list[Tensor], kernel_size: Sequence[int]) -> list[Tensor]:
    """The key, or for pairs that are masked anyway the closest position for which the table has an entry."""
    return [torch.minimum(torch.maximum(q, p - k + 1), p + k - 1) for p, q, k in zip(query, key, kernel_size)]


def check_device(train: bool) -> torch.device:
    device = torch.get_default_device()
    if train and device.type == "cpu":
        raise Unavailable("FlexAttention has no backward on CPUs")
    return device


def neighborhood(case: Case, train: bool, tile: tuple[int, ...] | None = None, block: int = USUAL_BLOCK) -> Contender:
    """Plain neighborhoods, the map as a sequence of tiles, the mask in blocks of `block` tokens."""
    order = Order(case.spatial, tile)

    def build() -> Callable[..., Tensor]:
        device = check_device(train)
        kernel_size, stride, dilation, kind, _ = case.pattern
        if set(stride + dilation) != {1} or set(kind) != {NEIGHBORHOOD}:
            raise Unavailable("written for plain neighborhoods only")
        create_block_mask, attention = flex_attention()
        positions = math.prod(case.spatial)

        def mask_mod(b, h, i, j):
            inside = torch.ones_like(i, dtype=torch.bool)
            for p, q, length, k in zip(order.coordinates(i), order.coordinates(j), case.spatial, kernel_size):
                first = (p - k // 2).clamp(min=0, max=length - k)
                inside = inside & (q >= first) & (q < first + k)
            return inside

        mask = create_block_mask(mask_mod, None, None, positions, positions, device=device.type, BLOCK_SIZE=block)

        @functools.partial(torch.compile, dynamic=False)
        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            def score_mod(score, b, h, i, j):
                p, q = order.coordinates(i), order.coordinates(j)
                return score + rpb[h, table_entry(p, nearby(p, q, kernel_size), kernel_size)]

            return attention(query, key, value, score_mod=score_mod, block_mask=mask, kernel_options=kernel_options(block))

        return attend

    tiles = "" if tile is None else "x".join(map(str, tile)) + " tiles"
    blocks = "" if block == USUAL_BLOCK else f"blocks of {block}"
    return Contender(name_of(tiles, blocks), build, flat_table(order.layout(), case.pattern.kernel_size))


def windows_as_batch(swin: Swin) -> Contender:
    """Every window a sequence of its own, what the roll brought together masked by score_mod."""

    def build() -> Callable[..., Tensor]:
        check_device(swin.train)
        _, attention = flex_attention()
        inside, count = Order(swin.window), swin.windows
        region = swin.regions() if any(swin.shift) else None
        region_again = swin.regions()  # score_mod may not index one tensor twice

        @functools.partial(torch.compile, dynamic=False)
        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            def score_mod(score, b, h, i, j):
                score = score + rpb[h, table_entry(inside.coordinates(i), inside.coordinates(j), swin.window)]
                return (
                    score
                    if region is None
                    else torch.where(region[b % count, i] == region_again[b % count, j], score, -math.inf)
                )

            return attention(query, key, value, score_mod=score_mod)

        def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            return attend(*(x.transpose(1, 2) for x in (query, key, value)), rpb).transpose(1, 2)

        return swin.around(run)

    return Contender(name_of("windows as batch"), build, flat_table(swin.layout(), swin.window))


def windows_as_blocks(swin: Swin) -> Contender:
    """All windows of a sample in one sequence, pairs of different windows masked."""

    def build() -> Callable[..., Tensor]:
        device = check_device(swin.train)
        create_block_mask, attention = flex_attention()
        inside, count, positions = Order(swin.window), swin.windows, swin.positions
        region = swin.regions()
        group = (torch.arange(count, device=device)[:, None] * (region.max() + 1) + region).flatten()
        mask = create_block_mask(
            lambda b, h, i, j: group[i] == group[j], None, None, len(group), len(group), device=device.type
        )

        @functools.partial(torch.compile, dynamic=False)
        def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            def score_mod(score, b, h, i, j):
                first, second = inside.coordinates(i % positions), inside.coordinates(j % positions)
                return score + rpb[h, table_entry(first, second, swin.window)]

            return attention(query, key, value, score_mod=score_mod, block_mask=mask)

        def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            sequences = (x.unflatten(0, (-1, count)).flatten(1, 2).transpose(1, 2) for x in (query, key, value))
            return attend(*sequences, rpb).transpose(1, 2).unflatten(1, (count, positions)).flatten(0, 1)

        return swin.around(run)

    return Contender(name_of("windows as blocks"), build, flat_table(swin.layout(), swin.window))

"""Cases of attention with image relative position encodings: sizes, encodings and masks, each with a readable id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = ("query", "key", "value", "query_rows", "key_rows", "table")


class IrpeInputs(NamedTuple):
    """The arguments of `natrpb.ops.irpe_attention`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_rows: Tensor | None
    index_k: Tensor | None
    key_rows: Tensor | None
    index_q: Tensor | None
    table: Tensor | None
    index_t: Tensor | None
    index_v: Tensor | None
    num_buckets: int
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    scale: float

    def floats(self) -> dict[str, Tensor]:
        """The tensors that can have a gradient, by name."""
        return {name: getattr(self, name) for name in FLOATS if getattr(self, name) is not None}

    def cast(self, dtype: torch.dtype) -> IrpeInputs:
        """Fresh leaves in `dtype` that require grad where these do."""
        return self._replace(**{k: x.detach().to(dtype).requires_grad_(x.requires_grad) for k, x in self.floats().items()})


@dataclass(frozen=True)
class IrpeCase:
    """One call.

    Attributes:
        queries, keys: Nq and Nk.
        on: which encodings take part: k, q, t (bias table), v.
        buckets: of every map.
        terms: 0 for maps [Nq, Nk], else [terms, Nq, Nk].
        padding: some keys padded, those of the first sample all but one.
        mask: some pairs excluded, those of the first query all.
    """

    queries: int
    keys: int
    on: str = "kqtv"
    buckets: int = 7
    terms: int = 0
    padding: bool = False
    mask: bool = False
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 0

    @property
    def size(self) -> int:
        """Attention weights: pairs of positions, over batch and heads."""
        return self.batch * self.heads * self.queries * self.keys

    def __str__(self) -> str:
        parts = [f"{self.queries}x{self.keys}", self.on or "none", f"C{self.buckets}"]
        parts += [f"T{self.terms}"] * bool(self.terms) + ["padded"] * self.padding + ["masked"] * self.mask
        dims = f"-{self.value_dim}" if self.value_dim else ""
        return "-".join([*parts, f"B{self.batch}h{self.heads}d{self.head_dim}{dims}"])

    def inputs(self, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> IrpeInputs:
        """Random inputs whose values `dtype` can hold."""

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

        def index() -> Tensor:
            shape = (self.terms,) * bool(self.terms) + (self.queries, self.keys)
            return torch.randint(0, self.buckets, shape, dtype=torch.int32)

        def given(letter: str, make):
            return make() if letter in self.on else None

        padding = mask = None
        if self.padding:
            padding = torch.rand(self.batch, self.keys) < 0.4
            padding[:1] = True
            padding[:, self.keys // 2 :][:, :1] = False
        if self.mask:
            mask = torch.rand(self.queries, self.keys) < 0.4
            mask[:1] = True
        b, h = self.batch, self.heads
        return IrpeInputs(
            query=draw(b, self.queries, h, self.head_dim),
            key=draw(b, self.keys, h, self.head_dim),
            value=draw(b, self.keys, h, self.value_dim or self.head_dim),
            query_rows=given("k", lambda: draw(b, h, self.queries, self.buckets)),
            index_k=given("k", index),
            key_rows=given("q", lambda: draw(b, h, self.keys, self.buckets)),
            index_q=given("q", index),
            table=given("t", lambda: draw(h, self.buckets)),
            index_t=given("t", index),
            index_v=given("v", index),
            num_buckets=self.buckets if "v" in self.on else 0,
            key_padding_mask=padding,
            attn_mask=mask,
            scale=self.head_dim**-0.5,
        )


SIZES = [IrpeCase(n, m) for n, m in ((1, 1), (2, 2), (17, 17), (1, 9), (9, 1), (16, 32), (47, 49), (5, 130))]
COMBINATIONS = [
    IrpeCase(11, 13, on, terms=terms, padding=padding, mask=mask, value_dim=5)
    for on in ("", "k", "q", "t", "v", "kq", "kv", "qv", "kqv", "kqtv")
    for terms, padding, mask in ((0, False, False), (2, True, False), (0, False, True), (0, True, True))
]
BUCKETS = [IrpeCase(18, 35, buckets=buckets) for buckets in (1, 16, 32, 33, 50, 64, 65, 82, 128, 129, 170)]
HEAD_DIMS = [
    IrpeCase(10, 12, head_dim=head_dim, value_dim=value_dim)
    for head_dim, value_dim in ((1, 0), (3, 0), (24, 40), (32, 0), (64, 0), (33, 1), (64, 100))
]
# Several windows of queries, several chunks of keys, with the maximum anywhere.
LARGE = [
    IrpeCase(197, 197, "kqv", 50, batch=1, heads=2, head_dim=64),
    IrpeCase(50, 600, "kqtv", 50, padding=True, mask=True, heads=1, head_dim=16),
    IrpeCase(300, 257, "kqtv", 9, terms=2, batch=1, heads=1),
    IrpeCase(101, 7, "kqv", 50, batch=3, heads=6),
]
EMPTY = [IrpeCase(4, 5, batch=0), IrpeCase(0, 5), IrpeCase(4, 0, buckets=3)]

CASES = [*SIZES, *COMBINATIONS, *BUCKETS, *HEAD_DIMS, *LARGE]

# A few that between them have every feature, for properties that do not depend on the exact shape.
SMALL = [
    IrpeCase(4, 5, "kqtv", 3, heads=1, head_dim=2, batch=1),
    IrpeCase(5, 4, "kqv", 3, terms=2, padding=True, heads=2, head_dim=2, value_dim=1),
    IrpeCase(4, 6, "kt", 3, mask=True, padding=True, heads=2, head_dim=1, batch=2),
    IrpeCase(3, 3, "v", 2, mask=True, heads=1, head_dim=3, batch=1),
    IrpeCase(3, 4, "", heads=1, head_dim=2, batch=1),
]

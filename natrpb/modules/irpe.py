"""Image relative position encoding as modules, with the names, signatures and state-dict keys of the official code.

Paper: K. Wu, H. Peng, M. Chen, J. Fu, H. Chao, "Rethinking and Improving Relative Position Encoding for Vision Transformer",
       ICCV 2021, arXiv:2107.14222.
Official code: https://github.com/microsoft/Cream (MIT), iRPE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..functional._encoded import bucket_rows
from ..irpe import Method, Term, as_method, coefficients, num_buckets, term_maps

_MODES = {"bias": "bias", "contextual": "contextual", "ctx": "contextual"}


@dataclass
class RPEConfig:
    """One encoding; see `get_single_rpe_config`. The fields are those of the official config."""

    shared_head: bool  # one table for all heads
    mode: str  # "bias" or "contextual"
    method: Method
    alpha: float
    beta: float
    gamma: float
    num_buckets: int  # with that of the skipped tokens; for cross, of each of the two tables


@dataclass
class RPEConfigs:
    """The encodings on queries, keys and values, None where there is none."""

    rpe_q: RPEConfig | None = None
    rpe_k: RPEConfig | None = None
    rpe_v: RPEConfig | None = None


def get_single_rpe_config(
    ratio: float = 1.9,
    method: Method | str | int = Method.PRODUCT,
    mode: str = "contextual",
    shared_head: bool = True,
    skip: int = 0,
) -> RPEConfig:
    """The configuration of one encoding; arguments as in `get_rpe_config`."""
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    method = as_method(method)
    return RPEConfig(shared_head, _MODES[mode], method, *coefficients(ratio), num_buckets(method, ratio, skip))


def get_rpe_config(
    ratio: float = 1.9,
    method: Method | str | int = Method.PRODUCT,
    mode: str = "contextual",
    shared_head: bool = True,
    skip: int = 0,
    rpe_on: str = "k",
) -> RPEConfigs:
    """The configuration of the encodings on queries, keys and values, as `build_rpe` takes it.

    Args:
        ratio: scales how many buckets there are, see `natrpb.irpe.coefficients`; published models use 1.9 for product, 20
            for euclidean and cross, 33 for quantization.
        method: "euc", "quant", "cross", "product", their long names, or a `natrpb.irpe.Method`.
        mode: "bias" for a number per head and bucket, "contextual" or "ctx" for a vector, multiplied with the query, key
            or attention weight that it meets.
        shared_head: one table for all heads.
        skip: tokens before those of the map, e.g. 1 for a classification token; their pairs share one more bucket.
        rpe_on: any of the letters "q", "k", "v"; values have no bias mode.

    Raises:
        ValueError: no such method, mode or letter.
    """
    if not set(rpe_on) <= set("qkv"):
        raise ValueError(f"rpe_on must hold the letters q, k and v only, got {rpe_on!r}")
    arguments = (ratio, method, mode, shared_head, skip)
    return RPEConfigs(**{f"rpe_{letter}": get_single_rpe_config(*arguments) for letter in set(rpe_on)})


def parse_rpe_config(text: str, skip: int = 0) -> RPEConfigs | None:
    """The configuration that a string of the official detection code names, e.g. "rpe-2.0-product-ctx-1-k".

    Args:
        text: rpe-{ratio}-{method}-{mode}-{shared_head, 0 or 1}-{rpe_on}, or empty.
        skip: see `get_rpe_config`.

    Returns:
        The configuration; None for an empty string.

    Raises:
        ValueError: another form.
    """
    if not text:
        return None
    try:
        prefix, ratio, method, mode, shared_head, rpe_on = text.split("-")
        if prefix != "rpe" or shared_head not in ("0", "1"):
            raise ValueError("it must begin with rpe and have 0 or 1 for shared heads")
        return get_rpe_config(float(ratio), method, mode, shared_head == "1", skip, rpe_on)
    except ValueError as error:
        raise ValueError(f"text must be rpe-ratio-method-mode-shared-on, got {text!r}: {error}") from error


class iRPE(nn.Module):
    """One image relative position encoding of any method but cross.

    Called on its own it is the official, unfused module. `natrpb.iRPEAttention` does not call it but reads its table.

    Args:
        head_dim: channels per head d.
        num_heads: heads h of the table, 1 for one that all heads share.
        mode: "bias" or "contextual".
        method: see `natrpb.irpe.as_method`.
        transposed: True on queries and keys, False on values.
        num_buckets: C, default rpe_config's.
        initializer: changes a new table in place; tables are zero without.
        rpe_config: see `get_single_rpe_config`.

    Parameters:
        lookup_table_bias [h, C], in bias mode.
        lookup_table_weight [h, d, C], in contextual mode, or [h, C, d] where not transposed.

    Raises:
        ValueError: no such method or mode, or bias mode on values.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int = 8,
        mode: str | None = None,
        method: Method | str | int | None = None,
        transposed: bool = True,
        num_buckets: int | None = None,
        initializer: Callable[[Tensor], object] | None = None,
        rpe_config: RPEConfig | None = None,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
        if rpe_config is None:
            raise ValueError("rpe_config must be given: it holds the coefficients of the bucket function")
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.mode = _MODES[mode]
        self.method = as_method(method)
        self.transposed = transposed
        self.num_buckets = rpe_config.num_buckets if num_buckets is None else num_buckets
        self.initializer = initializer
        self.rpe_config = rpe_config
        if self.mode == "bias" and not transposed:
            raise ValueError("mode must be 'contextual' on values: a bias has no channels to add to a value")
        if self.method == Method.CROSS:
            raise ValueError("method cross has two tables: use iRPE_Cross")
        if self.mode == "bias":
            self.lookup_table_bias = nn.Parameter(torch.empty(num_heads, self.num_buckets))
        else:
            sides = (head_dim, self.num_buckets) if transposed else (self.num_buckets, head_dim)
            self.lookup_table_weight = nn.Parameter(torch.empty(num_heads, *sides))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the table to zero, then lets the initializer change it."""
        nn.init.zeros_(self.table)
        if self.initializer is not None:
            with torch.no_grad():
                self.initializer(self.table)

    @property
    def table(self) -> nn.Parameter:
        """The table of either mode."""
        return self.lookup_table_bias if self.mode == "bias" else self.lookup_table_weight

    def tables(self) -> tuple[iRPE, ...]:
        """The encodings of one table each that add up to this one."""
        return (self,)

    def term(self, transposed: bool = False) -> Term:
        """What its map depends on; `transposed` for the bucket of (key, query) at (query, key)."""
        config = self.rpe_config
        return Term(self.method, config.alpha, config.beta, config.gamma, transposed=transposed)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """The encoding of every pair, or of every query's values.

        Args:
            x: queries (for an encoding on keys) or keys (on queries) [B, heads, L, d], times the scale of the scores; on
                values the attention weights [B, heads, L, L].
            height, width: sides of the map, default the square root of L, rounded down; what L is longer is skipped tokens.

        Returns:
            What is to be added to the scores, [B, heads, L, L] ([1, h, L, L] in bias mode); for an encoding on queries its
            transpose is. On values what is to be added to the output, [B, heads, L, d].

        Raises:
            ValueError: a table that was built for another number of skipped tokens.
        """
        index = self._index(x, height, width)
        if self.mode == "bias":
            rows = self.table[None, :, None].expand(1, -1, index.shape[0], -1)
            return ops.rpe_index(rows, index)
        if self.transposed:
            return ops.rpe_index(bucket_rows(x.transpose(1, 2), self.table, 1.0), index)
        return ops.rpe_index_transposed(x, index, self.num_buckets) @ self.table.to(x.dtype)

    def _index(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        """int32 [L, L]."""
        height, width, skip = map_size(x.shape[2], height, width)
        check_skip((self,), skip)
        return term_maps((self.term(),), height, width, skip, x.device)[0]

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, mode={self.mode!r}, method={self.method.name}, "
            f"transposed={self.transposed}, num_buckets={self.num_buckets}"
        )


class iRPE_Cross(nn.Module):
    """The image relative position encoding of method cross: the sum of one for row and one for column offsets.

    Args:
        method: cross, by name or number.
        **kwargs: as in `iRPE`, for each of the two.

    Parameters:
        rp_rows.*, rp_cols.*: see `iRPE`.
    """

    def __init__(self, method: Method | str | int = Method.CROSS, **kwargs) -> None:
        super().__init__()
        if as_method(method) != Method.CROSS:
            raise ValueError(f"method must be cross, got {method!r}: use iRPE")
        self.rp_rows = iRPE(**kwargs, method=Method.CROSS_ROWS)
        self.rp_cols = iRPE(**kwargs, method=Method.CROSS_COLS)

    def tables(self) -> tuple[iRPE, ...]:
        """The encodings of one table each that add up to this one."""
        return (self.rp_rows, self.rp_cols)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """See `iRPE.forward`."""
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)


def build_rpe(config: RPEConfigs | None, head_dim: int, num_heads: int) -> list[nn.Module | None]:
    """The encodings that a configuration asks for.

    Args:
        config: see `get_rpe_config`, or any object with the attributes rpe_q, rpe_k, rpe_v; None for none.
        head_dim: channels per head.
        num_heads: heads.

    Returns:
        [rpe_q, rpe_k, rpe_v], each an `iRPE`, an `iRPE_Cross` or None.
    """
    if config is None:
        return [None, None, None]

    def build(single: RPEConfig | None, transposed: bool) -> nn.Module | None:
        if single is None:
            return None
        kind = iRPE_Cross if as_method(single.method) == Method.CROSS else iRPE
        heads = 1 if single.shared_head else num_heads
        options = dict(mode=single.mode, transposed=transposed, num_buckets=single.num_buckets, rpe_config=single)
        return kind(method=single.method, head_dim=head_dim, num_heads=heads, **options)

    return [build(config.rpe_q, True), build(config.rpe_k, True), build(config.rpe_v, False)]


def map_size(length: int, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(height, width, skipped tokens) of a sequence; without sides, the largest square map that fits.

    Raises:
        ValueError: only one side given, or a map larger than the sequence.
    """
    if (height is None) != (width is None):
        raise ValueError(f"height and width must be given together, got {height} and {width}")
    if height is None:  # NB: math.isqrt refuses the symbolic lengths of torch.compile; below 2**52 this is equal
        height = width = torch.sym_int(torch.sym_sqrt(length))
    elif height * width > length:
        raise ValueError(f"height * width must be at most the sequence's length, got {height} * {width} > {length}")
    return height, width, length - height * width


def check_skip(encodings: tuple[iRPE, ...], skip: int) -> None:
    """Raises ValueError where a table has a bucket for skipped tokens and there are none, or the other way round."""
    for encoding in encodings:
        expected = encoding.term().num_buckets(skip)
        if encoding.num_buckets != expected:
            raise ValueError(
                f"num_buckets must be {expected} for a sequence with {skip} skipped tokens, got {encoding.num_buckets}: "
                "build the encoding with skip as in the sequence, or pass height and width"
            )


def encodings_of(
    rpe_q: nn.Module | None, rpe_k: nn.Module | None, rpe_v: nn.Module | None, length: int, height, width, device
) -> dict[str, Tensor]:
    """The tables and maps of up to three encodings, as `natrpb.functional.irpe_attention` takes them; none without encodings.

    Args:
        rpe_q, rpe_k, rpe_v: as `build_rpe` returns them.
        length: L of the sequence; height, width: see `iRPE.forward`.
        device: of the maps.

    Raises:
        ValueError: see `map_size` and `check_skip`.
    """
    if rpe_q is None and rpe_k is None and rpe_v is None:
        return {}  # any sequence will do, whatever its map
    height, width, skip = map_size(length, height, width)
    groups: dict[str, list[tuple[iRPE, Term]]] = {}
    for name, rpe in (("query", rpe_q), ("key", rpe_k), ("value", rpe_v)):
        for encoding in () if rpe is None else rpe.tables():
            check_skip((encoding,), skip)
            group = "bias" if encoding.mode == "bias" else name
            groups.setdefault(group, []).append((encoding, encoding.term(transposed=name == "query")))
    arguments = {}
    for name, members in groups.items():
        tables = [encoding.table for encoding, _ in members]
        heads = max(len(table) for table in tables)
        axis = 1 if name == "value" else -1  # of the buckets
        joined = tables[0] if len(tables) == 1 else torch.cat([t.expand(heads, *t.shape[1:]) for t in tables], axis)
        arguments[f"{name}_table"] = joined
        arguments[f"{name}_index"] = term_maps(tuple(term for _, term in members), height, width, skip, device)
    return arguments

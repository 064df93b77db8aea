"""Relative position buckets: which entry of an encoding's table a pair of positions takes.

Image relative position encoding (iRPE) maps the offset of two positions of a map, query minus key, to a bucket:

    euclidean      g(round(sqrt(dr^2 + dc^2)))      one bucket for both directions
    quantization   g(dr^2 + dc^2)                   one bucket for both directions
    product        g(dr) and g(dc) as one pair
    cross          g(dr) and g(dc), each in a table of its own, the two encodings added

with the piecewise function g, which keeps short distances apart and merges long ones. The earlier one-dimensional methods
clip the offset instead (`clipped_offsets`).

Paper: K. Wu, H. Peng, M. Chen, J. Fu, H. Chao, "Rethinking and Improving Relative Position Encoding for Vision Transformer",
       ICCV 2021, arXiv:2107.14222.
Method numbers and bucket counts: https://github.com/microsoft/Cream (MIT), iRPE.
"""

from __future__ import annotations

import enum
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Method(enum.IntEnum):
    """How offsets become buckets; numbered as in the official code, whose METHOD this is."""

    EUCLIDEAN = 0
    QUANTIZATION = QUANT = 1
    PRODUCT = 3
    CROSS = 4
    CROSS_ROWS = 41
    CROSS_COLS = 42


_METHOD_NAMES = {name.lower(): method for name, method in Method.__members__.items()} | {"euc": Method.EUCLIDEAN}


def as_method(method: Method | str | int) -> Method:
    """A method by its name ("euclidean" or "euc", "quantization" or "quant", "product", "cross") or official number.

    Raises:
        ValueError: no such method.
    """
    if isinstance(method, str) and method.lower() in _METHOD_NAMES:
        return _METHOD_NAMES[method.lower()]
    if isinstance(method, int) and not isinstance(method, bool) and method in set(Method):
        return Method(method)
    raise ValueError(f"method must be one of {', '.join(_METHOD_NAMES)}, or an official number, got {method!r}")


class Coefficients(NamedTuple):
    """What g depends on."""

    alpha: float  # distances up to alpha have buckets of their own
    beta: float  # g never exceeds beta, which need not be whole
    gamma: float  # the distance at which the logarithmic part reaches beta; infinite: clip at beta instead


def coefficients(ratio: float = 1.9) -> Coefficients:
    """The official ones, alpha : beta : gamma = 1 : 2 : 8, times `ratio`.

    Raises:
        ValueError: ratio is not a positive finite number.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be a positive finite number, got {ratio!r}")
    return Coefficients(1 * ratio, 2 * ratio, 8 * ratio)


def piecewise_index(relative_position: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """The piecewise function g (Wu et al. 2021, eq. 18): round(x) up to alpha, logarithmic beyond, at most beta.

        g(x) = round(x)                                                                            |x| <= alpha
        g(x) = sign(x) * trunc(min(round(alpha + ln(|x| / alpha) / ln(gamma / alpha) * (beta - alpha)), beta))      else

    Halves round to even. The minimum is taken before truncation, so that beta = 3.8 gives 3 where it binds. Logarithms are
    taken in fp32 (fp64 for fp64), as in the official code.

    Args:
        relative_position: distances or offsets of any shape, integer or floating.
        alpha, beta, gamma: 0 < alpha < gamma.

    Returns:
        int64, of the same shape.

    Raises:
        ValueError: alpha and gamma out of order.
    """
    if not 0 < alpha < gamma:
        raise ValueError(f"alpha and gamma must be positive and increasing, got {alpha} and {gamma}")
    x = relative_position if relative_position.dtype == torch.float64 else relative_position.float()
    far = (x.abs() / alpha).clamp(min=1).log() / math.log(gamma / alpha) * (beta - alpha) + alpha
    far = x.sign() * far.round().clamp(max=beta)
    return torch.where(x.abs() <= alpha, x.round(), far).long()


def clip_index(relative_position: Tensor, beta: float) -> Tensor:
    """The clip function that g improves on, max(-beta, min(beta, round(x))), truncated (Shaw et al. 2018, section 3.2).

    Args:
        relative_position: distances or offsets of any shape, integer or floating.
        beta: the bound.

    Returns:
        int64, of the same shape.
    """
    x = relative_position if relative_position.dtype == torch.float64 else relative_position.float()
    return x.round().clamp(-beta, beta).long()


def num_buckets(method: Method | str | int, ratio: float = 1.9, skip: int = 0) -> int:
    """Rows that the table of an encoding has, reachable or not; for cross, each of its two tables.

    Args:
        method: see `as_method`.
        ratio: see `coefficients`.
        skip: tokens before the map's; if any, they have one more bucket.
    """
    return _num_buckets(as_method(method), coefficients(ratio).beta, skip)


def _num_buckets(method: Method, beta: float, skip: int) -> int:
    side = 2 * int(beta) + 1
    return (side**2 if method == Method.PRODUCT else side) + (skip > 0)


def bucket_ids(
    method: Method | str | int,
    height: int,
    width: int,
    skip: int = 0,
    ratio: float = 1.9,
    *,
    clip: bool = False,
    directed: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bucket of every pair of positions of a map, row-major; the same tensor at every call, not to be written to.

    Args:
        method: see `as_method`.
        height, width: the map's sides.
        skip: tokens before the map's (classification, distillation): all pairs with one of them share the last bucket.
        ratio: see `coefficients`; at 1.9 the product method has 7 x 7 buckets.
        clip: map offsets by `clip_index` at beta instead of `piecewise_index`.
        directed: False takes offsets by their absolute values, so that (q, k) and (k, q) share a bucket; euclidean and
            quantization do so in any case.
        device: where the map is wanted.

    Returns:
        int32 [L, L] by query and key, L = skip + height * width, 0 <= id < num_buckets(method, ratio, skip); for cross
        [2, L, L], ids into the table of rows and into the table of columns.

    Raises:
        ValueError: no such method, sides below 1, skip below 0.
    """
    method, (alpha, beta, gamma) = as_method(method), coefficients(ratio)
    gamma = math.inf if clip else gamma
    tables = (Method.CROSS_ROWS, Method.CROSS_COLS) if method == Method.CROSS else (method,)
    terms = tuple(Term(table, alpha, beta, gamma, directed) for table in tables)
    maps = _bucket_maps(terms, height, width, skip, False, torch.device(device))
    return maps if method == Method.CROSS else maps[0]


class Term(NamedTuple):
    """One of the encodings that are added for a pair: a table of its own and the map into it."""

    method: Method  # any but CROSS, which is two terms
    alpha: float
    beta: float
    gamma: float  # infinite: clip at beta
    directed: bool = True
    transposed: bool = False  # take the bucket of (key, query): encodings on queries

    def num_buckets(self, skip: int) -> int:
        return _num_buckets(self.method, self.beta, skip)


def term_maps(terms: tuple[Term, ...], height: int, width: int, skip: int, device: torch.device) -> Tensor:
    """The maps of several terms into their tables laid end to end, int32 [T, L, L]; cached, not to be written to."""
    return _bucket_maps(terms, height, width, skip, True, device)


def _bucket_maps(terms: tuple[Term, ...], height: int, width: int, skip: int, apart: bool, device: torch.device) -> Tensor:
    """int32 [T, L, L]; `apart` adds to every term's ids the buckets of the terms before it."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() or peek_interpreter_stack():
        # NB: while a graph is traced or a function transformed, sizes may be symbolic and tensors stand for others.
        numbers = [(t.method.value, t.alpha, t.beta, t.gamma, int(t.directed), int(t.transposed)) for t in terms]
        return torch.ops.natrpb.irpe_bucket_maps(sum(numbers, ()), height, width, skip, apart, device)
    return _cached_maps(terms, height, width, skip, apart, device)


@torch.library.custom_op(
    "natrpb::irpe_bucket_maps",
    mutates_args=(),
    schema="(float[] terms, SymInt height, SymInt width, SymInt skip, bool apart, Device device) -> Tensor",
)
def _traced_maps(terms, height, width, skip, apart, device):
    """One node in a graph that makes the maps, opaque to it; `terms` are the fields of all terms in a row."""
    fields = len(Term._fields)
    each = [terms[i : i + fields] for i in range(0, len(terms), fields)]
    terms = tuple(Term(Method(int(method)), *coefficients, bool(d), bool(t)) for method, *coefficients, d, t in each)
    return _cached_maps(terms, height, width, skip, apart, device).clone()  # a graph may use its own tensors' memory again


@_traced_maps.register_fake
def _(terms, height, width, skip, apart, device):
    length = skip + height * width
    return torch.empty(len(terms) // len(Term._fields), length, length, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _cached_maps(terms, height, width, skip, apart, device) -> Tensor:
    with torch.inference_mode(False):  # tensors of inference mode could not be saved for a backward later
        return _make_maps(terms, height, width, skip, apart).to(device)


def _make_maps(terms, height, width, skip, apart) -> Tensor:
    if height < 1 or width < 1 or skip < 0:
        raise ValueError(f"height and width must be at least 1 and skip at least 0, got {height}, {width} and {skip}")
    positions = torch.cartesian_prod(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"))
    offsets = positions[:, None] - positions  # [height * width, height * width, 2], query minus key
    maps, first = [], 0
    for term in terms:
        maps.append(_term_map(term, offsets, skip) + first)
        first += term.num_buckets(skip) if apart else 0
    return torch.stack(maps).int()


def _term_map(term: Term, offsets: Tensor, skip: int) -> Tensor:
    """[L, L] of offsets [L - skip, L - skip, 2]."""
    if not term.directed:
        offsets = offsets.abs()

    def index(x: Tensor) -> Tensor:
        """g, moved up so that it starts at 0."""
        clip = math.isinf(term.gamma)
        return int(term.beta) + (clip_index(x, term.beta) if clip else piecewise_index(x, *term[1:4]))

    rows, cols = offsets.unbind(-1)
    if term.method == Method.EUCLIDEAN:
        ids = index((rows**2 + cols**2).float().sqrt().round())
    elif term.method == Method.QUANTIZATION:
        ids = index(rows**2 + cols**2)
    elif term.method == Method.PRODUCT:
        ids = index(rows) * (2 * int(term.beta) + 1) + index(cols)
    else:
        ids = index(rows if term.method == Method.CROSS_ROWS else cols)
    if skip:
        ids = F.pad(ids, (skip, 0, skip, 0), value=term.num_buckets(0))
    return ids.t() if term.transposed else ids


def clipped_offsets(
    num_queries: int,
    num_keys: int | None = None,
    max_distance: int | None = None,
    *,
    query_start: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The one-dimensional map of Shaw et al. and Huang et al.: clip(key - query, -max_distance, max_distance) + max_distance.

    Args:
        num_queries: Nq.
        num_keys: Nk, default Nq.
        max_distance: k in Shaw et al. 2018, section 3.2; default the greatest distance there is, which clips nothing
            (Transformer-XL, Axial-DeepLab).
        query_start: position of the first query among the keys; Transformer-XL's memory of M tokens makes it M.
        device: where the map is wanted.

    Returns:
        int32 [Nq, Nk], 0 <= id <= 2 * max_distance.

    Raises:
        ValueError: lengths below 1, max_distance below 0.
    """
    num_keys = num_queries if num_keys is None else num_keys
    if num_queries < 1 or num_keys < 1:
        raise ValueError(f"num_queries and num_keys must be at least 1, got {num_queries} and {num_keys}")
    offsets = (
        torch.arange(num_keys, device=device) - torch.arange(query_start, query_start + num_queries, device=device)[:, None]
    )
    if max_distance is None:
        max_distance = max(abs(query_start + num_queries - 1), abs(num_keys - 1 - query_start))
    if max_distance < 0:
        raise ValueError(f"max_distance must be at least 0, got {max_distance}")
    return (offsets.clamp(-max_distance, max_distance) + max_distance).int()


def clipped_map_offsets(
    height: int,
    width: int,
    row_distance: int | None = None,
    col_distance: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The two-dimensional map of SASA: row and column offset, key minus query, clipped each (Ramachandran et al. 2019).

    Args:
        height, width: the map's sides; positions are counted row by row.
        row_distance, col_distance: the bounds, default height - 1 and width - 1, which clip nothing.
        device: where the map is wanted.

    Returns:
        int32 [2, N, N], N = height * width: rows in 0 .. 2 * row_distance, columns in the 2 * col_distance + 1 ids after.

    Raises:
        ValueError: sides below 1, distances below 0.
    """
    rows = clipped_offsets(height, None, row_distance, device=device)  # [height, height]
    cols = clipped_offsets(width, None, col_distance, device=device)
    first = 2 * (height - 1 if row_distance is None else row_distance) + 1
    sides = (height, width, height, width)
    maps = rows[:, None, :, None].expand(sides), (cols + first)[None, :, None, :].expand(sides)
    return torch.stack(maps).reshape(2, height * width, height * width)


def sinusoids(max_distance: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Transformer-XL's R for every offset: sin and cos of the distance, query minus key, at dim / 2 frequencies.

    Args:
        max_distance: greatest distance in both directions.
        dim: channels, even.
        device: where the table is wanted.

    Returns:
        fp32 [dim, 2 * max_distance + 1], columns as `clipped_offsets` counts them: column c is R at max_distance - c.

    Raises:
        ValueError: odd dim.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    distance = torch.arange(max_distance, -max_distance - 1, -1, dtype=torch.float32, device=device)
    frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angle = frequency[:, None] * distance
    return torch.cat([angle.sin(), angle.cos()])

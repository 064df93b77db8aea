"""Image relative position encodings: chooses the compiled op or the reference, and differentiates the compiled ones.

`rpe_index` and its transpose are each other's derivatives. Of the fused attention, the first derivative is a compiled op too;
what comes after it, and the forward mode, are composed from products that store the attention weights (`_irpe_pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _ext
from .. import reference_irpe as reference
from ._common import heads_first, heads_last, on_reference, wide_dtype
from ._irpe_pairs import Pairs, Rows, total
from ._register import below_autograd, call_op, register_autocast, register_autograd, register_fake, register_vmap


def rpe_index(x: Tensor, index: Tensor) -> Tensor:
    """See `natrpb.reference_irpe.rpe_index`: x [B, h, Nq, C] and index [Nq, Nk] in, [B, h, Nq, Nk] out."""
    if not _ext.runs_compiled(x.device, "rpe_index"):
        return reference.rpe_index(x, index)
    return call_op("rpe_index", x, _narrowed(index))


def rpe_index_transposed(y: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """See `natrpb.reference_irpe.rpe_index_transposed`: y [B, h, Nq, Nk] and index in, [B, h, Nq, num_buckets] out."""
    if not _ext.runs_compiled(y.device, "rpe_index_transposed"):
        return reference.rpe_index_transposed(y, index, num_buckets)
    return call_op("rpe_index_transposed", y, _narrowed(index), num_buckets)


def _narrowed(index: Tensor | None) -> Tensor | None:
    """An int64 map of a GPU as int32. What exceeds that stays out of range, where the op's own conversion would wrap around.

    Maps of the CPU go to the op as they are, since it checks them.
    """
    if index is None or index.dtype != torch.int64 or index.device.type == "cpu":
        return index
    limits = torch.iinfo(torch.int32)
    return index.clamp(limits.min, limits.max).to(torch.int32)


def irpe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_rows: Tensor | None = None,
    index_k: Tensor | None = None,
    key_rows: Tensor | None = None,
    index_q: Tensor | None = None,
    table: Tensor | None = None,
    index_t: Tensor | None = None,
    index_v: Tensor | None = None,
    num_buckets: int = 0,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `natrpb.reference_irpe.irpe_attention`: heads-last query, key, value in, (out, lse, binned) out."""
    floats = (query, key, value, query_rows, key_rows, table)
    rest = (index_k, index_q, index_t, index_v, num_buckets, key_padding_mask, attn_mask, scale)
    if not _ext.runs_compiled(query.device, "irpe_attention_forward"):
        return _reference(floats, rest)
    table = None if table is None else table.to(wide_dtype(query.dtype))
    maps = map(_narrowed, rest[:4])
    out, lse, binned = call_op("irpe_attention_forward", *floats[:5], table, *maps, *rest[4:])
    return out, lse, None if index_v is None else binned


def _reference(floats: tuple[Tensor | None, ...], rest: tuple):
    """The reference, from arguments in the order of the op; under autocast with the first five cast, as the op casts them."""
    index_k, index_q, index_t, *others = rest
    *inputs, table = floats
    names = [i for i, x in enumerate(inputs) if x is not None]

    def run(*present: Tensor):
        query, key, value, query_rows, key_rows = (dict(zip(names, present)).get(i) for i in range(5))
        return reference.irpe_attention(query, key, value, query_rows, index_k, key_rows, index_q, table, index_t, *others)

    present = [x for x in inputs if x is not None]
    return on_reference(run, len(present), *present)


class _Saved(NamedTuple):
    """What derivatives start from: pairs' maps, heads-first query, key, value in fp32 or fp64, and the softmax's weights."""

    pairs: Pairs
    q: Tensor  # [B, h, Nq, D]
    k: Tensor  # [B, h, Nk, D]
    v: Tensor  # [B, h, Nk, Dv]
    p: Tensor  # [B, h, Nq, Nk]
    scale: float

    @classmethod
    def of(cls, floats: tuple[Tensor | None, ...], rest: tuple) -> _Saved:
        *maps, scale = rest
        pairs = Pairs(tuple(maps), tuple(0 if x is None else x.shape[-1] for x in floats[3:]))
        wide = wide_dtype(floats[0].dtype)
        q, k, v = heads_first(wide, *floats[:3])
        k, v = pairs.open(k), pairs.open(v)
        rows = Rows(*(None if x is None else x.to(wide) for x in floats[3:]))
        scores = total(scale * q @ k.mT, pairs.encode(rows))
        return cls(pairs, q, k, v, pairs.softmax(scores), scale)

    def score_tangent(self, tq: Tensor | None, tk: Tensor | None, rows: Rows) -> Tensor:
        """The scores' directional derivative, or what the derivative of dscore's products with query and key comes to."""
        return total(
            torch.zeros_like(self.p),
            None if tq is None else self.scale * tq @ self.k.mT,
            None if tk is None else self.scale * self.q @ self.pairs.open(tk).mT,
            self.pairs.encode(rows),
        )

    def softmax_derivative(self, ts: Tensor) -> Tensor:
        """Of the weights, in direction ts of the scores; it is its own transpose."""
        return self.p * (ts - (self.p * ts).sum(-1, keepdim=True))


def _rows(dtype: torch.dtype, given: Sequence[Tensor | None]) -> Rows:
    return Rows(*(None if x is None else x.to(dtype) for x in given))


class _Attention(Function):
    """(query, key, value, query_rows, key_rows, table | maps, num_buckets, masks, scale) -> (out, lse, binned)."""

    @staticmethod
    def forward(*args):
        return below_autograd("irpe_attention_forward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.numbers = inputs[10], inputs[13]
        saved = (*inputs[:10], *inputs[11:13])
        ctx.save_for_backward(*saved, *output)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _arguments(ctx) -> tuple:
        """The tensors of the call, then its maps, num_buckets, masks and scale."""
        saved, (num_buckets, scale) = ctx.saved_tensors, ctx.numbers
        return saved[:6], (*saved[6:10], num_buckets, *saved[10:12], scale)

    @staticmethod
    def backward(ctx, dout, dlse, dbinned):
        floats, rest = _Attention._arguments(ctx)
        outputs = ctx.saved_tensors[12:]
        if rest[3] is None:
            dbinned = None
        if dout is None and dlse is None and dbinned is None:
            return (None,) * 14
        if dout is None:
            dout = torch.zeros_like(outputs[0])
        gradients = call_op("irpe_attention_backward", dout, dlse, dbinned, *floats, *outputs, *rest)
        return *(None if x is None else dx for x, dx in zip(floats, gradients)), *(None,) * 8

    @staticmethod
    def jvp(ctx, tquery, tkey, tvalue, *others):
        floats, rest = _Attention._arguments(ctx)
        dtype = floats[0].dtype
        saved = _Saved.of(floats, rest)
        tq, tk, tv = heads_first(saved.p.dtype, tquery, tkey, tvalue)
        ts = saved.score_tangent(tq, tk, _rows(saved.p.dtype, others[:3]))
        tp = saved.softmax_derivative(ts)
        tout = total(tp @ saved.v, None if tv is None else saved.p @ saved.pairs.open(tv))
        tbinned = saved.pairs.bin(tp)
        tbinned = tout.new_zeros(0) if tbinned is None else tbinned
        return heads_last(dtype, tout), (saved.p * ts).sum(-1).movedim(1, -1), tbinned.to(dtype)


class _AttentionBackward(Function):
    """(dout, dlse, dbinned, query .. table, out, lse, binned | maps, num_buckets, masks, scale) -> gradients of query .. table.

    What the forward pass returned counts as given: the derivative is that of the whole pass in its inputs. With
    dp = dout v^T + unbin(dbinned), it is  dscore = p * bracket,  bracket = dp - sum(p dp) + dlse.
    """

    @staticmethod
    def forward(*args):
        return below_autograd("irpe_attention_backward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.numbers = inputs[16], inputs[19]
        saved = (*inputs[:9], *inputs[12:16], *inputs[17:19])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _start(ctx):
        """Everything that both derivatives start from: the inputs, `_Saved`, dout heads-first, dp and bracket."""
        saved, (num_buckets, scale) = ctx.saved_tensors, ctx.numbers
        dout, dlse, dbinned = saved[:3]
        here = _Saved.of(saved[3:9], (*saved[9:13], num_buckets, *saved[13:15], scale))
        (do,) = heads_first(here.p.dtype, dout)
        dp = total(do @ here.v.mT, here.pairs.unbin(None if dbinned is None else dbinned.to(here.p.dtype)))
        bracket = dp - (here.p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            bracket = bracket + dlse.movedim(-1, 1)[..., None]
        return saved[:9], here, do, dp, bracket

    @staticmethod
    def backward(ctx, gquery, gkey, gvalue, *grows):
        (dout, dlse, dbinned, *floats), here, do, dp, bracket = _AttentionBackward._start(ctx)
        gq, gk, gv = heads_first(here.p.dtype, gquery, gkey, gvalue)
        gk, gv = (None if x is None else here.pairs.open(x) for x in (gk, gv))
        grows = (None if x is None else g for g, x in zip(grows, floats[3:]))
        p, pairs = here.p, here.pairs
        a = here.score_tangent(gq, gk, _rows(p.dtype, grows))  # d L / d dscore
        mean = (p * a).sum(-1, keepdim=True)
        gdp = p * (a - mean)
        gp = total(a * bracket - mean * dp, None if gv is None else do @ gv.mT)  # d L / d p
        gs = here.softmax_derivative(gp)
        dscore = p * bracket
        second = (
            total(here.scale * gs @ here.k, None if gk is None else here.scale * dscore @ gk),
            pairs.open(total(here.scale * gs.mT @ here.q, None if gq is None else here.scale * dscore.mT @ gq)),
            pairs.open(gdp.mT @ do),
        )
        gdbinned = None if dbinned is None else pairs.bin(gdp).to(dbinned.dtype)
        return (
            heads_last(dout.dtype, total(gdp @ here.v, None if gv is None else p @ gv)),
            None if dlse is None else mean[..., 0].movedim(1, -1),
            gdbinned,
            *(heads_last(x.dtype, g) for x, g in zip(floats, second)),
            *(None if g is None else g.to(x.dtype) for x, g in zip(floats[3:], pairs.decode(gs))),
            *(None,) * 11,
        )

    @staticmethod
    def jvp(ctx, tdout, tdlse, tdbinned, tquery, tkey, tvalue, *others):
        (_, _, _, *floats), here, do, dp, bracket = _AttentionBackward._start(ctx)
        dtype, p, pairs = here.p.dtype, here.p, here.pairs
        tdo, tq, tk, tv = heads_first(dtype, tdout, tquery, tkey, tvalue)
        tk, tv = (None if x is None else pairs.open(x) for x in (tk, tv))
        tp = here.softmax_derivative(here.score_tangent(tq, tk, _rows(dtype, others[:3])))
        tdp = total(
            torch.zeros_like(p),
            None if tdo is None else tdo @ here.v.mT,
            None if tv is None else do @ tv.mT,
            pairs.unbin(None if tdbinned is None else tdbinned.to(dtype)),
        )
        tbracket = tdp - (tp * dp + p * tdp).sum(-1, keepdim=True)
        if tdlse is not None:
            tbracket = tbracket + tdlse.movedim(-1, 1)[..., None]
        dscore, tds = p * bracket, tp * bracket + p * tbracket
        gradients = (
            here.scale * total(tds @ here.k, None if tk is None else dscore @ tk),
            here.scale * pairs.open(total(tds.mT @ here.q, None if tq is None else dscore.mT @ tq)),
            pairs.open(total(tp.mT @ do, None if tdo is None else p.mT @ tdo)),
        )
        rows = (p.new_zeros(0) if g is None else g for g in pairs.decode(tds))
        dtypes = [floats[0].dtype] * 2 + [dtype]
        return *(heads_last(x.dtype, g) for x, g in zip(floats, gradients)), *(g.to(t) for g, t in zip(rows, dtypes))


class _RpeIndex(Function):
    """(x | index) -> y."""

    @staticmethod
    def forward(*args):
        return below_autograd("rpe_index", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index = inputs
        ctx.num_buckets = x.shape[-1]
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx, dy):
        return rpe_index_transposed(dy, *ctx.saved_tensors, ctx.num_buckets), None

    @staticmethod
    def jvp(ctx, tx, _):
        return rpe_index(tx, *ctx.saved_tensors)


class _RpeIndexTransposed(Function):
    """(y | index, num_buckets) -> x."""

    @staticmethod
    def forward(*args):
        return below_autograd("rpe_index_transposed", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.num_buckets = inputs[2]
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, dx):
        return rpe_index(dx, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx, ty, *_):
        return rpe_index_transposed(ty, *ctx.saved_tensors, ctx.num_buckets)


def _fake_rpe_index(x, index):
    return x.new_empty((*x.shape[:-1], index.shape[1]))


def _fake_rpe_index_transposed(y, index, num_buckets):
    return y.new_empty((*y.shape[:-1], num_buckets))


def _fake_forward(query, key, value, query_rows, key_rows, table, index_k, index_q, index_t, index_v, num_buckets, *_):
    batch, positions, heads, _ = query.shape
    binned = (0,) if index_v is None else (batch, heads, positions, num_buckets)
    return (
        query.new_empty((batch, positions, heads, value.shape[-1])),
        query.new_empty((batch, positions, heads), dtype=wide_dtype(query.dtype)),
        query.new_empty(binned),
    )


def _fake_backward(dout, dlse, dbinned, query, key, value, query_rows, key_rows, table, *_):
    rows = (query.new_empty((0,) if x is None else x.shape) for x in (query_rows, key_rows))
    dtable = query.new_empty((0,) if table is None else table.shape, dtype=wide_dtype(query.dtype))
    return *(query.new_empty(x.shape) for x in (query, key, value)), *rows, dtable


if _ext.reason is None:
    register_fake("rpe_index", _fake_rpe_index)
    register_fake("rpe_index_transposed", _fake_rpe_index_transposed)
    register_fake("irpe_attention_forward", _fake_forward)
    register_fake("irpe_attention_backward", _fake_backward)

    register_autograd("rpe_index", _RpeIndex)
    register_autograd("rpe_index_transposed", _RpeIndexTransposed)
    register_autograd("irpe_attention_forward", _Attention)
    register_autograd("irpe_attention_backward", _AttentionBackward)

    register_autocast("irpe_attention_forward", casts=(0, 1, 2, 3, 4))

    last, first, lead = -2, 1, 0  # where heads-last tensors, rows of buckets, and the table hold their heads
    inputs, results = (last, last, last, first, first, lead), (last, -1, first)
    register_vmap("rpe_index", (first,), (first,))
    register_vmap("rpe_index_transposed", (first,), (first,))
    register_vmap("irpe_attention_forward", inputs, results)
    register_vmap("irpe_attention_backward", (*results, *inputs, *results), inputs)

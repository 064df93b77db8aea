"""Local attention, fused and unfused: chooses the compiled op or the reference, and differentiates the compiled ones.

The three unfused products are each other's derivatives,

    qk(q, k)[i,t] = <q_i, k_j(i,t)>      av(a, v)_i = sum_t a_it v_j(i,t)      av_transposed(a, x)_j = sum_{j(i,t) = j} a_it x_i

and so are adding a bias table and `local_bias_grad`. The fused backward's own derivative and the fused forward mode are
composed from them, so every op can be differentiated to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _ext, reference
from ..patterns import Pattern
from ._register import (
    AUTOCAST_DEVICES,
    below_autograd,
    call_op,
    register_autocast,
    register_autograd,
    register_fake,
    register_vmap,
)

_NEG_INF = float("-inf")


def local_attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, pattern: Pattern, scale: float):
    """See `natrpb.reference.local_attention`: heads-last tensors in, (out, lse) out; rpb in any float dtype."""
    if not _ext.runs_compiled(query.device, "local_attention_forward"):
        return _on_reference(reference.local_attention, 3, query, key, value, rpb, pattern, scale)
    if rpb is not None and rpb.dtype != _wide(query.dtype):
        rpb = rpb.to(_wide(query.dtype))
    return call_op("local_attention_forward", query, key, value, rpb, *pattern, scale)


def local_qk(query: Tensor, key: Tensor, rpb: Tensor | None, pattern: Pattern, fill: float = _NEG_INF) -> Tensor:
    """See `natrpb.reference.local_qk`: heads-first tensors in, [B, h, *, T] out; rpb in any float dtype."""
    if not _ext.runs_compiled(query.device, "local_qk"):
        return _on_reference(reference.local_qk, 2, query, key, rpb, pattern, fill)
    if rpb is not None and rpb.dtype != _wide(query.dtype):
        rpb = rpb.to(_wide(query.dtype))
    return call_op("local_qk", query, key, rpb, *pattern, fill)


def local_av(attn: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """See `natrpb.reference.local_av`: attn [B, h, *, T] and value [B, h, *, Dv] of one dtype in, [B, h, *, Dv] out."""
    if not _ext.runs_compiled(value.device, "local_av"):
        return _on_reference(reference.local_av, 2, attn, value, pattern)
    return call_op("local_av", attn, value, *pattern)


def local_av_transposed(attn: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """See `natrpb.reference.local_av_transposed`: attn [B, h, *, T] and x [B, h, *, D] in, one row per key out."""
    if not _ext.runs_compiled(x.device, "local_av_transposed"):
        return reference.local_av_transposed(attn, x, pattern)
    return call_op("local_av_transposed", attn, x, *pattern)


def local_bias_grad(dattn: Tensor, pattern: Pattern) -> Tensor:
    """See `natrpb.reference.local_bias_grad`; the table comes in fp32 (fp64 for fp64)."""
    if not _ext.runs_compiled(dattn.device, "local_bias_grad"):
        return reference.local_bias_grad(dattn.to(_wide(dattn.dtype)), pattern)
    return call_op("local_bias_grad", dattn, *pattern)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, lse and bias tables: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on_reference(function, casts: int, *args):
    """Calls the reference; under autocast with the first `casts` tensors cast, as the compiled op casts them."""
    device = args[0].device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return function(*args)
    dtype = torch.get_autocast_dtype(device)
    cast = (x if x.dtype == torch.float64 else x.to(dtype) for x in args[:casts])
    with torch.autocast(device, enabled=False):
        return function(*cast, *args[casts:])


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


class _Fused(Function):
    """(query, key, value, rpb | pattern, scale) -> (out, lse)."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_attention_forward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pattern, ctx.scale = Pattern(*(tuple(x) for x in inputs[4:9])), inputs[9]
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.save_for_forward(*inputs[:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        *inputs, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 10
        if dout is None:
            dout = torch.zeros_like(inputs[2])
        needs_drpb = ctx.needs_input_grad[3]
        gradients = call_op("local_attention_backward", dout, dlse, *inputs, out, lse, *ctx.pattern, ctx.scale, needs_drpb)
        return *gradients[:3], gradients[3] if needs_drpb else None, *(None,) * 6

    @staticmethod
    def jvp(ctx, tquery, tkey, tvalue, trpb, *_):
        query, key, value, rpb = ctx.saved_tensors
        pattern, scale, dtype = ctx.pattern, ctx.scale, value.dtype
        q, k, v, tq, tk, tv = _heads_first(_wide(dtype), query, key, value, tquery, tkey, tvalue)
        p = local_qk(q * scale, k, rpb, pattern).softmax(-1)
        ts = _sum(*_score_tangents(q, k, tq, tk, trpb, pattern, scale))
        tout = None if tv is None else local_av(p, tv, pattern)
        tlse = torch.zeros_like(p[..., 0])
        if ts is not None:
            tlse = (p * ts).sum(-1)
            tout = _sum(tout, local_av(p * (ts - tlse[..., None]), v, pattern))
        if tout is None:
            tout = torch.zeros_like(v)
        return tout.movedim(1, -2).to(dtype), tlse.movedim(1, -1)


class _FusedBackward(Function):
    """(dout, dlse, query, key, value, rpb, out, lse | pattern, scale, needs_drpb) -> (dquery, dkey, dvalue, drpb).

    drpb is empty unless it is needed: a table that does not learn spares its sums.

    out and lse are what the forward gave for the other inputs, no variables of their own: the derivatives below are those of
    the gradients as functions of dout, dlse, query, key, value and rpb; out and lse receive none.
    """

    @staticmethod
    def forward(*args):
        return below_autograd("local_attention_backward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pattern, ctx.scale, ctx.needs_drpb = Pattern(*(tuple(x) for x in inputs[8:13])), *inputs[13:]
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])
        ctx.set_materialize_grads(False)

    @staticmethod
    def _weights(ctx):
        """Everything that both derivatives start from, in fp32 or fp64 and heads-first: p, dp, and dscore's bracket."""
        dout, dlse, query, key, value, rpb = ctx.saved_tensors
        wide = _wide(value.dtype)
        do, q, k, v = _heads_first(wide, dout, query, key, value)
        p = local_qk(q * ctx.scale, k, rpb, ctx.pattern).softmax(-1)
        dp = local_qk(do, v, None, ctx.pattern, 0.0)
        bracket = dp - (p * dp).sum(-1, keepdim=True)  # dscore = p * bracket
        if dlse is not None:
            bracket = bracket + dlse.movedim(-1, 1)[..., None]
        return do, q, k, v, p, dp, bracket

    @staticmethod
    def backward(ctx, gquery, gkey, gvalue, grpb):
        dout, dlse, query, key, value = ctx.saved_tensors[:5]
        pattern, scale = ctx.pattern, ctx.scale
        do, q, k, v, p, dp, bracket = _FusedBackward._weights(ctx)
        gq, gk, gv = _heads_first(p.dtype, gquery, gkey, gvalue)
        a = _sum(*_score_tangents(q, k, gq, gk, grpb if ctx.needs_drpb else None, pattern, scale))  # d L / d dscore
        c = None if gv is None else local_qk(do, gv, None, pattern, 0.0)  # d L / d p through dvalue
        gdlse = gvalue_v = gdout = None
        gp = c
        if a is not None:
            mean = (p * a).sum(-1, keepdim=True)
            gdp = p * (a - mean)
            gdlse = mean[..., 0]
            gdout = local_av(gdp, v, pattern)
            gvalue_v = local_av_transposed(gdp, do, pattern)
            gp = _sum(c, a * bracket - mean * dp)
        if gv is not None:
            gdout = _sum(gdout, local_av(p, gv, pattern))
        if gp is None:
            return (None,) * 15
        gs = p * (gp - (p * gp).sum(-1, keepdim=True))
        dscore = p * bracket
        gquery_q = scale * local_av(gs, k, pattern)
        gkey_k = scale * local_av_transposed(gs, q, pattern)
        if gk is not None:
            gquery_q = gquery_q + scale * local_av(dscore, gk, pattern)
        if gq is not None:
            gkey_k = gkey_k + scale * local_av_transposed(dscore, gq, pattern)
        return (
            _heads_last(dout.dtype, gdout),
            None if dlse is None or gdlse is None else gdlse.movedim(1, -1),
            _heads_last(query.dtype, gquery_q),
            _heads_last(key.dtype, gkey_k),
            _heads_last(value.dtype, gvalue_v),
            local_bias_grad(gs, pattern) if ctx.needs_input_grad[5] else None,
            *(None,) * 9,
        )

    @staticmethod
    def jvp(ctx, tdout, tdlse, tquery, tkey, tvalue, trpb, *_):
        query, pattern, scale = ctx.saved_tensors[2], ctx.pattern, ctx.scale
        do, q, k, v, p, dp, bracket = _FusedBackward._weights(ctx)
        tdo, tq, tk, tv = _heads_first(p.dtype, tdout, tquery, tkey, tvalue)
        dscore = p * bracket
        zero = torch.zeros_like(p)
        ts = _sum(zero, *_score_tangents(q, k, tq, tk, trpb, pattern, scale))
        tp = p * (ts - (p * ts).sum(-1, keepdim=True))
        tdp = zero
        if tdo is not None:
            tdp = tdp + local_qk(tdo, v, None, pattern, 0.0)
        if tv is not None:
            tdp = tdp + local_qk(do, tv, None, pattern, 0.0)
        tbracket = tdp - (tp * dp + p * tdp).sum(-1, keepdim=True)
        if tdlse is not None:
            tbracket = tbracket + tdlse.movedim(-1, 1)[..., None]
        tds = tp * bracket + p * tbracket
        tdq = scale * local_av(tds, k, pattern)
        tdk = scale * local_av_transposed(tds, q, pattern)
        tdv = local_av_transposed(tp, do, pattern)
        if tk is not None:
            tdq = tdq + scale * local_av(dscore, tk, pattern)
        if tq is not None:
            tdk = tdk + scale * local_av_transposed(dscore, tq, pattern)
        if tdo is not None:
            tdv = tdv + local_av_transposed(p, tdo, pattern)
        tdrpb = local_bias_grad(tds, pattern) if ctx.needs_drpb else tds.new_zeros(0)
        return *(_heads_last(query.dtype, x) for x in (tdq, tdk, tdv)), tdrpb


def _heads_first(dtype: torch.dtype, *tensors: Tensor | None):
    """[B, *, h, D] -> [B, h, *, D] in `dtype`."""
    return tuple(None if x is None else x.movedim(-2, 1).to(dtype) for x in tensors)


def _heads_last(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    """[B, h, *, D] -> [B, *, h, D] in `dtype`."""
    return None if x is None else x.movedim(1, -2).to(dtype)


def _score_tangents(q, k, tq, tk, trpb, pattern: Pattern, scale: float):
    """The directional derivative of the scores, term by term: [B, h, *, T] or None; zero where a slot holds no key."""
    return (
        None if tq is None else scale * local_qk(tq, k, None, pattern, 0.0),
        None if tk is None else scale * local_qk(q, tk, None, pattern, 0.0),
        None if trpb is None else reference.local_bias(trpb.to(q.dtype), pattern, q.shape[2:-1]),
    )


class _Qk(Function):
    """(query, key, rpb | pattern, fill) -> attn."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_qk", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pattern = Pattern(*(tuple(x) for x in inputs[3:8]))
        ctx.has_rpb = inputs[2] is not None
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx, dattn):
        query, key = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            local_av(dattn, key, ctx.pattern) if needs[0] else None,
            local_av_transposed(dattn, query, ctx.pattern) if needs[1] else None,
            local_bias_grad(dattn, ctx.pattern) if needs[2] and ctx.has_rpb else None,
            *(None,) * 6,
        )

    @staticmethod
    def jvp(ctx, tquery, tkey, trpb, *_):
        query, key = ctx.saved_tensors
        terms = _score_tangents(query, key, tquery, tkey, trpb, ctx.pattern, 1.0)
        shape = (*query.shape[:-1], ctx.pattern.num_slots)
        return _sum(query.new_zeros(shape), *terms).to(query.dtype)


class _Av(Function):
    """(attn, value | pattern) -> out."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_av", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pattern = Pattern(*(tuple(x) for x in inputs[2:7]))
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx, dout):
        attn, value = ctx.saved_tensors
        return (
            local_qk(dout, value, None, ctx.pattern, 0.0) if ctx.needs_input_grad[0] else None,
            local_av_transposed(attn, dout, ctx.pattern) if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )

    @staticmethod
    def jvp(ctx, tattn, tvalue, *_):
        attn, value = ctx.saved_tensors
        return _sum(
            None if tattn is None else local_av(tattn, value, ctx.pattern),
            None if tvalue is None else local_av(attn, tvalue, ctx.pattern),
        )


class _AvTransposed(Function):
    """(attn, x | pattern) -> out."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_av_transposed", *args)

    setup_context = _Av.setup_context

    @staticmethod
    def backward(ctx, dout):
        attn, x = ctx.saved_tensors
        return (
            local_qk(x, dout, None, ctx.pattern, 0.0) if ctx.needs_input_grad[0] else None,
            local_av(attn, dout, ctx.pattern) if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )

    @staticmethod
    def jvp(ctx, tattn, tx, *_):
        attn, x = ctx.saved_tensors
        return _sum(
            None if tattn is None else local_av_transposed(tattn, x, ctx.pattern),
            None if tx is None else local_av_transposed(attn, tx, ctx.pattern),
        )


class _BiasGrad(Function):
    """(dattn | pattern) -> drpb."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_bias_grad", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pattern = Pattern(*(tuple(x) for x in inputs[1:6]))
        ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype

    @staticmethod
    def backward(ctx, drpb):
        bias = reference.local_bias(drpb, ctx.pattern, ctx.shape[2:-1])
        return bias.to(ctx.dtype).expand(ctx.shape), *(None,) * 5

    @staticmethod
    def jvp(ctx, tattn, *_):
        return local_bias_grad(tattn, ctx.pattern)


def _fake_forward(query, key, value, rpb, kernel_size, stride, dilation, kind, shift, scale):
    return query.new_empty(value.shape), query.new_empty(value.shape[:-1], dtype=_wide(query.dtype))


def _fake_backward(
    dout, dlse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, kind, shift, scale, needs_drpb
):  # fmt: skip
    drpb_shape = rpb.shape if needs_drpb else (0,)
    gradients = (query.new_empty(x.shape) for x in (query, key, value))
    return *gradients, query.new_empty(drpb_shape, dtype=_wide(query.dtype))


def _fake_qk(query, key, rpb, kernel_size, stride, dilation, kind, shift, fill):
    slots = Pattern(kernel_size, stride, dilation, kind, shift).num_slots
    return query.new_empty((*query.shape[:-1], slots))


def _fake_av(attn, value, kernel_size, stride, dilation, kind, shift):
    return value.new_empty(value.shape)


def _fake_bias_grad(dattn, kernel_size, stride, dilation, kind, shift):
    table = Pattern(kernel_size, stride, dilation, kind, shift).rpb_shape
    return dattn.new_empty((dattn.shape[1], *table), dtype=_wide(dattn.dtype))


if _ext.reason is None:
    register_fake("local_attention_forward", _fake_forward)
    register_fake("local_attention_backward", _fake_backward)
    register_fake("local_qk", _fake_qk)
    register_fake("local_av", _fake_av)
    register_fake("local_av_transposed", _fake_av)
    register_fake("local_bias_grad", _fake_bias_grad)

    register_autograd("local_attention_forward", _Fused)
    register_autograd("local_attention_backward", _FusedBackward)
    register_autograd("local_qk", _Qk)
    register_autograd("local_av", _Av)
    register_autograd("local_av_transposed", _AvTransposed)
    register_autograd("local_bias_grad", _BiasGrad)

    register_autocast("local_attention_forward", casts=(0, 1, 2))
    register_autocast("local_qk", casts=(0, 1))
    register_autocast("local_av", casts=(0, 1))

    last, first, table = -2, 1, 0  # where heads-last, heads-first and table tensors hold their heads
    register_vmap("local_attention_forward", (last, last, last, table), (last, -1))
    register_vmap("local_attention_backward", (last, -1, last, last, last, table, last, -1), (last, last, last, table))
    register_vmap("local_qk", (first, first, table), (first,))
    register_vmap("local_av", (first, first), (first,))
    register_vmap("local_av_transposed", (first, first), (first,))
    register_vmap("local_bias_grad", (first,), (table,))

"""Local attention, fused: chooses the compiled op or the reference, and differentiates the compiled ones.

Query, key and value come as three tensors, or packed as a projection leaves them, [B, *, 3, h, D]: then the gradient is
packed, too, where autograd would stack three. The fused backward's own derivative and the fused forward mode are composed from
the unfused ops, so every op can be differentiated to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _ext, reference
from ..patterns import Pattern
from ._common import heads_first, heads_last, on_reference, sum_of, wide_dtype
from ._register import below_autograd, call_op, register_autocast, register_autograd, register_fake, register_vmap
from .unfused import local_av, local_av_transposed, local_bias_grad, local_qk, score_tangents

_THIRDS = -3  # the axis of qkv [B, *, 3, h, D] that holds query, key and value


def local_attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, pattern: Pattern, scale: float):
    """See `natrpb.reference.local_attention`: heads-last tensors in, (out, lse) out; rpb in any float dtype."""
    if not _ext.runs_compiled(query.device, "local_attention_forward"):
        return on_reference(reference.local_attention, 3, query, key, value, rpb, pattern, scale)
    return call_op("local_attention_forward", query, key, value, _table(rpb, query), *pattern, scale)


def local_attention_qkvpacked(qkv: Tensor, rpb: Tensor | None, pattern: Pattern, scale: float):
    """`local_attention` of the three parts of qkv [B, *, 3, h, D]; its gradient is written as one tensor."""
    if not _ext.runs_compiled(qkv.device, "local_attention_qkvpacked_forward"):
        return on_reference(reference.local_attention, 3, *qkv.unbind(_THIRDS), rpb, pattern, scale)
    return call_op("local_attention_qkvpacked_forward", qkv, _table(rpb, qkv), *pattern, scale)


def _table(rpb: Tensor | None, query: Tensor) -> Tensor | None:
    """rpb in the dtype that the compiled ops take."""
    return rpb if rpb is None or rpb.dtype == wide_dtype(query.dtype) else rpb.to(wide_dtype(query.dtype))


class _Fused(Function):
    """(query, key, value, rpb | pattern, scale) -> (out, lse)."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_attention_forward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep_forward(ctx, 4, inputs, output)

    @staticmethod
    def backward(ctx, dout, dlse):
        gradients = _gradients(ctx, "local_attention_backward", dout, dlse)
        return (None,) * 10 if gradients is None else (*gradients, *(None,) * 6)

    @staticmethod
    def jvp(ctx, tquery, tkey, tvalue, trpb, *_):
        return _forward_tangents(ctx, ctx.saved_tensors, (tquery, tkey, tvalue, trpb))


class _Packed(Function):
    """(qkv, rpb | pattern, scale) -> (out, lse)."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_attention_qkvpacked_forward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep_forward(ctx, 2, inputs, output)

    @staticmethod
    def backward(ctx, dout, dlse):
        gradients = _gradients(ctx, "local_attention_qkvpacked_backward", dout, dlse)
        return (None,) * 8 if gradients is None else (*gradients, *(None,) * 6)

    @staticmethod
    def jvp(ctx, tqkv, trpb, *_):
        qkv, rpb = ctx.saved_tensors
        return _forward_tangents(ctx, (*_unpacked(qkv), rpb), (*_unpacked(tqkv), trpb))


def _keep_forward(ctx, tensors: int, inputs, output) -> None:
    """Saves a forward's leading tensors, its pattern and its scale."""
    ctx.pattern, ctx.scale = Pattern(*map(tuple, inputs[tensors : tensors + 5])), inputs[tensors + 5]
    ctx.save_for_backward(*inputs[:tensors], *output)
    ctx.save_for_forward(*inputs[:tensors])
    ctx.set_materialize_grads(False)


def _gradients(ctx, op: str, dout: Tensor | None, dlse: Tensor | None):
    """What the backward op returns for a forward's context, None for a table that does not learn; None if nothing came in."""
    *inputs, rpb, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None
    if dout is None:
        dout = torch.zeros_like(out)
    needs_drpb = ctx.needs_input_grad[len(inputs)]
    *gradients, drpb = call_op(op, dout, dlse, *inputs, rpb, out, lse, *ctx.pattern, ctx.scale, needs_drpb)
    return *gradients, drpb if needs_drpb else None


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
        _keep_backward(ctx, 6, inputs)

    @staticmethod
    def backward(ctx, gquery, gkey, gvalue, grpb):
        second = _second_gradients(ctx, ctx.saved_tensors, (gquery, gkey, gvalue, grpb), ctx.needs_input_grad[5])
        return *second, *(None,) * 9

    @staticmethod
    def jvp(ctx, tdout, tdlse, tquery, tkey, tvalue, trpb, *_):
        return _backward_tangents(ctx, ctx.saved_tensors, (tdout, tdlse, tquery, tkey, tvalue, trpb))


class _PackedBackward(Function):
    """(dout, dlse, qkv, rpb, out, lse | pattern, scale, needs_drpb) -> (dqkv, drpb), as `_FusedBackward`."""

    @staticmethod
    def forward(*args):
        return below_autograd("local_attention_qkvpacked_backward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep_backward(ctx, 4, inputs)

    @staticmethod
    def backward(ctx, gqkv, grpb):
        dout, dlse, qkv, rpb = ctx.saved_tensors
        primals = (dout, dlse, *_unpacked(qkv), rpb)
        gdout, gdlse, *gparts, grpb = _second_gradients(ctx, primals, (*_unpacked(gqkv), grpb), ctx.needs_input_grad[3])
        return gdout, gdlse, _packed(gparts, qkv), grpb, *(None,) * 9

    @staticmethod
    def jvp(ctx, tdout, tdlse, tqkv, trpb, *_):
        dout, dlse, qkv, rpb = ctx.saved_tensors
        *parts, tdrpb = _backward_tangents(ctx, (dout, dlse, *_unpacked(qkv), rpb), (tdout, tdlse, *_unpacked(tqkv), trpb))
        return _packed(parts, qkv), tdrpb


def _keep_backward(ctx, tensors: int, inputs) -> None:
    """Saves a backward's leading tensors but out and lse, which follow them, its pattern, scale and needs_drpb."""
    rest = inputs[tensors + 2 :]
    ctx.pattern, ctx.scale, ctx.needs_drpb = Pattern(*map(tuple, rest[:5])), *rest[5:]
    ctx.save_for_backward(*inputs[:tensors])
    ctx.save_for_forward(*inputs[:tensors])
    ctx.set_materialize_grads(False)


def _unpacked(qkv: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if qkv is None else qkv.unbind(_THIRDS)


def _packed(parts, like: Tensor) -> Tensor | None:
    """Stacks heads-last tensors [B, *, h, D], zeros for those that are None; None if all are."""
    if all(part is None for part in parts):
        return None
    zeros = torch.zeros_like(like.select(_THIRDS, 0))
    return torch.stack([zeros if part is None else part for part in parts], _THIRDS)


def _forward_tangents(ctx, primals, tangents) -> tuple[Tensor, Tensor]:
    """The tangents of (out, lse) from those of (query, key, value, rpb)."""
    query, key, value, rpb = primals
    *tangents, trpb = tangents
    pattern, scale = ctx.pattern, ctx.scale
    q, k, v, tq, tk, tv = heads_first(wide_dtype(value.dtype), query, key, value, *tangents)
    p = local_qk(q * scale, k, rpb, pattern).softmax(-1)
    ts = sum_of(*score_tangents(q, k, tq, tk, trpb, pattern, scale))
    tout = None if tv is None else local_av(p, tv, pattern)
    tlse = torch.zeros_like(p[..., 0])
    if ts is not None:
        tlse = (p * ts).sum(-1)
        tout = sum_of(tout, local_av(p * (ts - tlse[..., None]), v, pattern))
    if tout is None:
        tout = torch.zeros_like(v)
    return heads_last(value.dtype, tout), tlse.movedim(1, -1)


def _weights(ctx, primals):
    """What the derivatives of the backward start from, in fp32 or fp64 and heads-first: p, dp, and dscore's bracket."""
    dout, dlse, query, key, value, rpb = primals
    do, q, k, v = heads_first(wide_dtype(value.dtype), dout, query, key, value)
    p = local_qk(q * ctx.scale, k, rpb, ctx.pattern).softmax(-1)
    dp = local_qk(do, v, None, ctx.pattern, 0.0)
    bracket = dp - (p * dp).sum(-1, keepdim=True)  # dscore = p * bracket
    if dlse is not None:
        bracket = bracket + dlse.movedim(-1, 1)[..., None]
    return do, q, k, v, p, dp, bracket


def _second_gradients(ctx, primals, cotangents, needs_rpb: bool):
    """Gradients of (dout, dlse, query, key, value, rpb) from those of (dquery, dkey, dvalue, drpb)."""
    dout, dlse, query, key, value, _ = primals
    *cotangents, grpb = cotangents
    pattern, scale = ctx.pattern, ctx.scale
    do, q, k, v, p, dp, bracket = _weights(ctx, primals)
    gq, gk, gv = heads_first(p.dtype, *cotangents)
    a = sum_of(*score_tangents(q, k, gq, gk, grpb if ctx.needs_drpb else None, pattern, scale))  # d L / d dscore
    c = None if gv is None else local_qk(do, gv, None, pattern, 0.0)  # d L / d p through dvalue
    gdlse = gvalue_v = gdout = None
    gp = c
    if a is not None:
        mean = (p * a).sum(-1, keepdim=True)
        gdp = p * (a - mean)
        gdlse = mean[..., 0]
        gdout = local_av(gdp, v, pattern)
        gvalue_v = local_av_transposed(gdp, do, pattern)
        gp = sum_of(c, a * bracket - mean * dp)
    if gv is not None:
        gdout = sum_of(gdout, local_av(p, gv, pattern))
    if gp is None:
        return (None,) * 6
    gs = p * (gp - (p * gp).sum(-1, keepdim=True))
    dscore = p * bracket
    gquery_q = scale * local_av(gs, k, pattern)
    gkey_k = scale * local_av_transposed(gs, q, pattern)
    if gk is not None:
        gquery_q = gquery_q + scale * local_av(dscore, gk, pattern)
    if gq is not None:
        gkey_k = gkey_k + scale * local_av_transposed(dscore, gq, pattern)
    return (
        heads_last(dout.dtype, gdout),
        None if dlse is None or gdlse is None else gdlse.movedim(1, -1),
        heads_last(query.dtype, gquery_q),
        heads_last(key.dtype, gkey_k),
        heads_last(value.dtype, gvalue_v),
        local_bias_grad(gs, pattern) if needs_rpb else None,
    )


def _backward_tangents(ctx, primals, tangents):
    """The tangents of (dquery, dkey, dvalue, drpb) from those of (dout, dlse, query, key, value, rpb)."""
    query = primals[2]
    tdout, tdlse, tquery, tkey, tvalue, trpb = tangents
    pattern, scale = ctx.pattern, ctx.scale
    do, q, k, v, p, dp, bracket = _weights(ctx, primals)
    tdo, tq, tk, tv = heads_first(p.dtype, tdout, tquery, tkey, tvalue)
    dscore = p * bracket
    zero = torch.zeros_like(p)
    ts = sum_of(zero, *score_tangents(q, k, tq, tk, trpb, pattern, scale))
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
    return *(heads_last(query.dtype, x) for x in (tdq, tdk, tdv)), tdrpb


def _fake_forward(query, key, value, rpb, kernel_size, stride, dilation, kind, shift, scale):
    return query.new_empty(value.shape), query.new_empty(value.shape[:-1], dtype=wide_dtype(query.dtype))


def _fake_packed_forward(qkv, rpb, *pattern_and_scale):
    query = qkv.select(_THIRDS, 0)
    return _fake_forward(query, query, query, rpb, *pattern_and_scale)


def _fake_backward(
    dout, dlse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, kind, shift, scale, needs_drpb
):  # fmt: skip
    return *(query.new_empty(x.shape) for x in (query, key, value)), _fake_drpb(query, rpb, needs_drpb)


def _fake_packed_backward(dout, dlse, qkv, rpb, out, lse, kernel_size, stride, dilation, kind, shift, scale, needs_drpb):
    return qkv.new_empty(qkv.shape), _fake_drpb(qkv, rpb, needs_drpb)


def _fake_drpb(query, rpb, needs_drpb):
    return query.new_empty(rpb.shape if needs_drpb else (0,), dtype=wide_dtype(query.dtype))


if _ext.reason is None:
    register_fake("local_attention_forward", _fake_forward)
    register_fake("local_attention_backward", _fake_backward)
    register_fake("local_attention_qkvpacked_forward", _fake_packed_forward)
    register_fake("local_attention_qkvpacked_backward", _fake_packed_backward)

    register_autograd("local_attention_forward", _Fused)
    register_autograd("local_attention_backward", _FusedBackward)
    register_autograd("local_attention_qkvpacked_forward", _Packed)
    register_autograd("local_attention_qkvpacked_backward", _PackedBackward)

    register_autocast("local_attention_forward", casts=(0, 1, 2))
    register_autocast("local_attention_qkvpacked_forward", casts=(0,))

    last, table = -2, 0  # where heads-last tensors, qkv among them, and tables hold their heads
    register_vmap("local_attention_forward", (last, last, last, table), (last, -1))
    register_vmap("local_attention_backward", (last, -1, last, last, last, table, last, -1), (last, last, last, table))
    register_vmap("local_attention_qkvpacked_forward", (last, table), (last, -1))
    register_vmap("local_attention_qkvpacked_backward", (last, -1, last, table, last, -1), (last, table))

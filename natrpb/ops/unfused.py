"""The unfused local-attention ops, heads-first, and their derivatives.

The three products are each other's derivatives,

    qk(q, k)[i,t] = <q_i, k_j(i,t)>      av(a, v)_i = sum_t a_it v_j(i,t)      av_transposed(a, x)_j = sum_{j(i,t) = j} a_it x_i

and so are adding a bias table and `local_bias_grad`: every op can be differentiated to any order.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function

from .. import _ext, reference
from ..patterns import Pattern
from ._common import on_reference, sum_of, wide_dtype
from ._register import below_autograd, call_op, register_autocast, register_autograd, register_fake, register_vmap

_NEG_INF = float("-inf")


def local_qk(query: Tensor, key: Tensor, rpb: Tensor | None, pattern: Pattern, fill: float = _NEG_INF) -> Tensor:
    """See `natrpb.reference.local_qk`: heads-first tensors in, [B, h, *, T] out; rpb in any float dtype."""
    if not _ext.runs_compiled(query.device, "local_qk"):
        return on_reference(reference.local_qk, 2, query, key, rpb, pattern, fill)
    if rpb is not None and rpb.dtype != wide_dtype(query.dtype):
        rpb = rpb.to(wide_dtype(query.dtype))
    return call_op("local_qk", query, key, rpb, *pattern, fill)


def local_av(attn: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """See `natrpb.reference.local_av`: attn [B, h, *, T] and value [B, h, *, Dv] of one dtype in, [B, h, *, Dv] out."""
    if not _ext.runs_compiled(value.device, "local_av"):
        return on_reference(reference.local_av, 2, attn, value, pattern)
    return call_op("local_av", attn, value, *pattern)


def local_av_transposed(attn: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """See `natrpb.reference.local_av_transposed`: attn [B, h, *, T] and x [B, h, *, D] in, one row per key out."""
    if not _ext.runs_compiled(x.device, "local_av_transposed"):
        return reference.local_av_transposed(attn, x, pattern)
    return call_op("local_av_transposed", attn, x, *pattern)


def local_bias_grad(dattn: Tensor, pattern: Pattern) -> Tensor:
    """See `natrpb.reference.local_bias_grad`; the table comes in fp32 (fp64 for fp64)."""
    if not _ext.runs_compiled(dattn.device, "local_bias_grad"):
        return reference.local_bias_grad(dattn.to(wide_dtype(dattn.dtype)), pattern)
    return call_op("local_bias_grad", dattn, *pattern)


def score_tangents(q, k, tq, tk, trpb, pattern: Pattern, scale: float):
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
        terms = score_tangents(query, key, tquery, tkey, trpb, ctx.pattern, 1.0)
        shape = (*query.shape[:-1], ctx.pattern.num_slots)
        return sum_of(query.new_zeros(shape), *terms).to(query.dtype)


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
        return sum_of(
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
        return sum_of(
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


def _fake_qk(query, key, rpb, kernel_size, stride, dilation, kind, shift, fill):
    slots = Pattern(kernel_size, stride, dilation, kind, shift).num_slots
    return query.new_empty((*query.shape[:-1], slots))


def _fake_av(attn, value, kernel_size, stride, dilation, kind, shift):
    return value.new_empty(value.shape)


def _fake_bias_grad(dattn, kernel_size, stride, dilation, kind, shift):
    table = Pattern(kernel_size, stride, dilation, kind, shift).rpb_shape
    return dattn.new_empty((dattn.shape[1], *table), dtype=wide_dtype(dattn.dtype))


if _ext.reason is None:
    register_fake("local_qk", _fake_qk)
    register_fake("local_av", _fake_av)
    register_fake("local_av_transposed", _fake_av)
    register_fake("local_bias_grad", _fake_bias_grad)

    register_autograd("local_qk", _Qk)
    register_autograd("local_av", _Av)
    register_autograd("local_av_transposed", _AvTransposed)
    register_autograd("local_bias_grad", _BiasGrad)

    register_autocast("local_qk", casts=(0, 1))
    register_autocast("local_av", casts=(0, 1))

    first, table = 1, 0  # where heads-first and table tensors hold their heads
    register_vmap("local_qk", (first, first, table), (first,))
    register_vmap("local_av", (first, first), (first,))
    register_vmap("local_av_transposed", (first, first), (first,))
    register_vmap("local_bias_grad", (first,), (table,))

"""L2 normalisation: chooses the compiled op or the reference, and differentiates the compiled one.

With u = x / |x| and the projection P w = (w - u <u, w>) / |x|, which is the derivative of u and its own transpose,

    out = f u      dx = f P dout      dfactor = sum of <u, dout>

so the backward pass also is the forward mode; what comes after it is composed from plain products in fp32 or fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _ext, reference
from ._common import sum_of, wide_dtype
from ._register import below_autograd, call_op, register_autograd, register_fake, register_vmap


def l2_normalize(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """See `natrpb.reference.l2_normalize`: x [B, *, h, D] and factor [h] in any float dtype in, [B, *, h, D] out.

    Autocast leaves x as it is: the result is rounded once, to x's dtype.
    """
    if not _ext.runs_compiled(x.device, "l2_normalize"):
        return reference.l2_normalize(x, factor)
    factor = None if factor is None else factor.to(wide_dtype(x.dtype))
    return call_op("l2_normalize", x.flatten(1, -3), factor).unflatten(1, x.shape[1:-2])


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| and 1 / |x|, in fp32 or fp64; zero for a row of zeros."""
    x = x.to(wide_dtype(x.dtype))
    square = x.square().sum(-1, keepdim=True)
    inverse = torch.where(square == 0, 0, torch.where(square == 0, 1, square).rsqrt())
    return x * inverse, inverse


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _project(w: Tensor, u: Tensor, inverse: Tensor) -> Tensor:
    """P w, from u and 1 / |x|."""
    return inverse * (w - u * _dot(u, w))


def _bend(w: Tensor, dout: Tensor, u: Tensor, inverse: Tensor, f: Tensor | float) -> Tensor:
    """The derivative of dx in direction w of x: a second derivative of <dout, out>, hence its own transpose."""
    along, across = _dot(u, w), _dot(u, dout)
    return -f * inverse.square() * (along * dout + across * w + u * (_dot(dout, w) - 3 * along * across))


def _over_heads(factor: Tensor | None) -> Tensor | float:
    """factor [h] as [h, 1], beside rows [B, N, h, D]."""
    return 1.0 if factor is None else factor[:, None]


class _L2Normalize(Function):
    """(x, factor) -> out."""

    @staticmethod
    def forward(*args):
        return below_autograd("l2_normalize", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dout):
        x, factor = ctx.saved_tensors
        dx, dfactor = call_op("l2_normalize_backward", dout, x, factor)
        return dx, None if factor is None else dfactor

    @staticmethod
    def jvp(ctx, tx, tfactor):
        x, factor = ctx.saved_tensors
        return sum_of(
            None if tx is None else call_op("l2_normalize_backward", tx, x, factor)[0],
            None if tfactor is None else call_op("l2_normalize", x, tfactor),
        )


class _L2NormalizeBackward(Function):
    """(dout, x, factor) -> (dx, dfactor)."""

    @staticmethod
    def forward(*args):
        return below_autograd("l2_normalize_backward", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _start(ctx):
        dout, x, factor = ctx.saved_tensors
        u, inverse = _unit(x)
        return dout.to(u.dtype), u, inverse, _over_heads(factor)

    @staticmethod
    def backward(ctx, gdx, gdfactor):
        dtype = ctx.saved_tensors[0].dtype
        do, u, inverse, f = start = _L2NormalizeBackward._start(ctx)
        gdout = gx = gfactor = None
        if gdx is not None:
            w = gdx.to(u.dtype)
            projected = _project(w, u, inverse)
            gdout, gx = f * projected, _bend(w, *start)
            gfactor = None if ctx.saved_tensors[2] is None else (projected * do).sum((0, 1, 3))
        if gdfactor is not None and ctx.saved_tensors[2] is not None:
            g = gdfactor[:, None]
            gdout = sum_of(gdout, g * u)
            gx = sum_of(gx, g * _project(do, u, inverse))
        return None if gdout is None else gdout.to(dtype), None if gx is None else gx.to(dtype), gfactor

    @staticmethod
    def jvp(ctx, tdout, tx, tfactor):
        dtype = ctx.saved_tensors[0].dtype
        do, u, inverse, f = start = _L2NormalizeBackward._start(ctx)
        tdout, tx = (None if t is None else t.to(u.dtype) for t in (tdout, tx))
        tdx = sum_of(
            torch.zeros_like(u),
            None if tdout is None else f * _project(tdout, u, inverse),
            None if tfactor is None else _over_heads(tfactor) * _project(do, u, inverse),
            None if tx is None else _bend(tx, *start),
        )
        if ctx.saved_tensors[2] is None:
            return tdx.to(dtype), u.new_zeros(0)
        along = sum_of(
            torch.zeros_like(u),
            None if tdout is None else u * tdout,
            None if tx is None else do * _project(tx, u, inverse),
        )
        return tdx.to(dtype), along.sum((0, 1, 3))


def _fake(x, factor):
    return x.new_empty(x.shape)


def _fake_backward(dout, x, factor):
    return x.new_empty(x.shape), x.new_empty((0,) if factor is None else factor.shape, dtype=wide_dtype(x.dtype))


if _ext.reason is None:
    register_fake("l2_normalize", _fake)
    register_fake("l2_normalize_backward", _fake_backward)

    register_autograd("l2_normalize", _L2Normalize)
    register_autograd("l2_normalize_backward", _L2NormalizeBackward)

    rows, per_head = -2, 0  # where the tensors hold their heads
    register_vmap("l2_normalize", (rows, per_head), (rows,))
    register_vmap("l2_normalize_backward", (rows, rows, per_head), (rows, per_head))

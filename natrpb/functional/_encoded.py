"""The fused attention with its tables: rows of buckets before the op, products with binned weights after it.

Autograd would keep both for the backward, and the output without the value encoding beside the whole. `_Encoded` keeps only
the whole output, lse and the binned weights, and makes the rows again: a block of DeiT-S with encodings on queries, keys and
values then keeps 6% instead of 22% more than one without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import Function, forward_ad

from .. import _ext, ops
from ..ops._register import call_op


class Call(NamedTuple):
    """What an attention call takes beside its floating-point tensors; see `natrpb.functional.irpe_attention`."""

    key_index: Tensor | None
    query_index: Tensor | None
    bias_index: Tensor | None
    value_index: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    scale: float


def attend(query, key, value, key_table, query_table, value_table, bias_table, call: Call) -> tuple[Tensor, Tensor]:
    """Attention with encodings: out [B, Nq, h, Dv] and lse [B, Nq, h]; tables in query's dtype but for the bias."""
    tensors = (query, key, value, key_table, query_table, value_table, bias_table)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    traced = torch.compiler.is_compiling() or peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    encoded = any(x is not None for x in tensors[3:6])
    if differentiated and not traced and encoded and _ext.runs_compiled(query.device, "irpe_attention_forward"):
        return _Encoded.apply(*tensors, *call)
    return _composed(tensors, call)


def _composed(tensors: tuple[Tensor | None, ...], call: Call) -> tuple[Tensor, Tensor]:
    out, lse, binned = ops.irpe_attention(*_op_arguments(tensors, call))
    return (out, lse) if binned is None else (out + spread(binned, tensors[5]).transpose(1, 2), lse)


def _op_arguments(tensors: tuple[Tensor | None, ...], call: Call) -> tuple:
    """The arguments of `natrpb.ops.irpe_attention`."""
    query, key, value, key_table, query_table, value_table, bias_table = tensors
    return (
        query,
        key,
        value,
        None if key_table is None else bucket_rows(query, key_table, call.scale),
        call.key_index,
        None if query_table is None else bucket_rows(key, query_table, call.scale),
        call.query_index,
        None if bias_table is None else bias_table.expand(query.shape[2], -1),
        call.bias_index,
        call.value_index,
        0 if value_table is None else value_table.shape[1],
        call.key_padding_mask,
        call.attn_mask,
        call.scale,
    )


def bucket_rows(x: Tensor, table: Tensor, scale: float) -> Tensor:
    """scale * <x_i, table[:, c]> for every row and bucket: x [B, N, h, D], table [h or 1, D, C] -> [B, h, N, C]."""
    batch, length, heads, _ = x.shape  # NB: below reshape, not unflatten: torch's batched gradients have no rule for that
    rows = torch.bmm(_by_head(x), (scale * table).to(x.dtype).expand(heads, -1, -1))
    return rows.reshape(heads, batch, length, table.shape[2]).transpose(0, 1)


def _by_head(x: Tensor) -> Tensor:
    """[B, N, h, D] -> [h, B * N, D], a view where x is a slice of a fused qkv projection."""
    return x.permute(2, 0, 1, 3).reshape(x.shape[2], x.shape[0] * x.shape[1], x.shape[3])


def spread(binned: Tensor, table: Tensor) -> Tensor:
    """The encoding on values of every query: binned [B, h, N, C] @ table [h or 1, C, Dv] -> [B, h, N, Dv]."""
    return binned @ (table[0] if len(table) == 1 else table)


class _Encoded(Function):
    """(query, key, value, key_table, query_table, value_table, bias_table | *Call) -> (out, lse)."""

    @staticmethod
    def forward(ctx, *args):
        tensors, call = args[:7], Call(*args[7:])
        out, lse, binned = ops.irpe_attention(*_op_arguments(tensors, call))
        if binned is not None:
            out += spread(binned, tensors[5]).transpose(1, 2)
        ctx.scale = call.scale
        ctx.save_for_backward(*tensors, *call[:-1], out, lse, binned)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *inputs, out, lse, binned = ctx.saved_tensors
        tensors, call = tuple(inputs[:7]), Call(*inputs[7:], ctx.scale)
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(tensors, call, ctx.needs_input_grad, dout, dlse)
        else:
            dout = torch.zeros_like(out) if dout is None else dout
            gradients = _gradients(tensors, call, ctx.needs_input_grad, out, lse, binned, dout, dlse)
        return *gradients, *(None,) * len(call)


def _differentiable_gradients(tensors, call: Call, needs, dout, dlse) -> list[Tensor | None]:
    """The gradients as autograd composes them, for derivatives of them."""
    results = [(x, dx) for x, dx in zip(_composed(tensors, call), (dout, dlse)) if dx is not None]
    outputs, cotangents = zip(*results)
    wanted = [x for x, need in zip(tensors, needs) if need]
    found = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs[: len(tensors)]]


def _gradients(tensors, call: Call, needs, out, lse, binned, dout, dlse) -> list[Tensor | None]:
    """The gradients from the fused backward."""
    query, key, value, key_table, query_table, value_table, bias_table = tensors
    _, _, _, query_rows, index_k, key_rows, index_q, table, *rest = _op_arguments(tensors, call)
    if table is not None:
        table = table.to(lse.dtype)
    dbinned = dvalue_table = None
    if value_table is not None:
        dout_first = dout.transpose(1, 2)  # [B, h, N, Dv]
        dbinned = spread(dout_first, value_table.transpose(1, 2))
        if needs[5]:
            dvalue_table = _sum_to((binned.transpose(2, 3) @ dout_first).sum(0), value_table)
    # NB: the op wants <dout, out> + <dbinned, binned> of the forward's results, and that is <dout, out> of the whole output.
    no_bins = query.new_zeros(0) if binned is None else torch.zeros_like(binned)
    dquery, dkey, dvalue, dquery_rows, dkey_rows, dbias = call_op(
        "irpe_attention_backward",
        dout, dlse, dbinned, query, key, value, query_rows, key_rows, table, out, lse, no_bins, index_k, index_q, *rest,
    )  # fmt: skip
    dkey_table = dquery_table = None
    if key_table is not None:
        dquery, dkey_table = _add_rows_gradient(dquery, query, key_table, dquery_rows, call.scale)
    if query_table is not None:
        dkey, dquery_table = _add_rows_gradient(dkey, key, query_table, dkey_rows, call.scale)
    dbias = None if bias_table is None else _sum_to(dbias, bias_table)
    return [dquery, dkey, dvalue, dkey_table, dquery_table, dvalue_table, dbias]


def _add_rows_gradient(dx: Tensor, x: Tensor, table: Tensor, drows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Both gradients of `bucket_rows`, that of x added to dx [B, N, h, D]."""
    by_head = _by_head(drows.transpose(1, 2))  # [h, B * N, C]
    through_rows = torch.bmm(by_head, (scale * table).expand(x.shape[2], -1, -1).transpose(1, 2))
    dx = dx + through_rows.reshape(x.shape[2], *x.shape[:2], x.shape[3]).permute(1, 2, 0, 3)
    return dx, _sum_to(scale * torch.bmm(_by_head(x).transpose(1, 2), by_head), table)


def _sum_to(gradient: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table that all heads may share, from one per head."""
    return (gradient.sum(0, keepdim=True) if len(table) == 1 else gradient).to(table.dtype)

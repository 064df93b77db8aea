"""Image relative position encodings: chooses the compiled op or the reference, and differentiates the compiled ones.

`rpe_index` and its transpose are each other's derivatives. Of the fused attention, the first derivative is a compiled op; what
comes after it, and the forward mode, differentiate the reference, which stores the attention weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _ext
from .. import reference_irpe as reference
from ._register import below_autograd, register_autocast, register_autograd, register_fake, register_vmap
from .local_attention import _on_reference, _wide


def rpe_index(x: Tensor, index: Tensor) -> Tensor:
    """See `natrpb.reference_irpe.rpe_index`: x [B, h, Nq, C] and index [Nq, Nk] in, [B, h, Nq, Nk] out."""
    if not _ext.runs_compiled(x.device):
        return reference.rpe_index(x, index)
    return torch.ops.natrpb.rpe_index(x, index)


def rpe_index_transposed(y: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """See `natrpb.reference_irpe.rpe_index_transposed`: y [B, h, Nq, Nk] and index in, [B, h, Nq, num_buckets] out."""
    if not _ext.runs_compiled(y.device):
        return reference.rpe_index_transposed(y, index, num_buckets)
    return torch.ops.natrpb.rpe_index_transposed(y, index, num_buckets)


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
    if not _ext.runs_compiled(query.device):
        present, outputs = _reference_of(floats, rest)
        return _on_reference(outputs, len(present), *present)
    table = None if table is None else table.to(_wide(query.dtype))
    out, lse, binned = torch.ops.natrpb.irpe_attention_forward(*floats[:5], table, *rest)
    return out, lse, None if index_v is None else binned


def _reference_of(floats: tuple[Tensor | None, ...], rest: tuple) -> tuple[tuple[Tensor, ...], Callable[..., tuple]]:
    """The reference in the order of the op's arguments: the floats that are there, and the function of them."""
    index_k, index_q, index_t, *others = rest

    def outputs(*present: Tensor) -> tuple:
        left = iter(present)
        query, key, value, query_rows, key_rows, table = (None if x is None else next(left) for x in floats)
        return reference.irpe_attention(
            query, key, value, query_rows, index_k, key_rows, index_q, table, index_t, *others
        )  # fmt: skip

    return tuple(x for x in floats if x is not None), outputs


def _gradients_of(floats: tuple[Tensor | None, ...], rest: tuple, cotangents: tuple[Tensor | None, ...]):
    """The reference's backward pass: (present cotangents, present floats) -> gradients of the latter, in fp32 or fp64."""
    wide = _wide(floats[0].dtype)
    present, outputs = _reference_of(floats, rest)
    given = [i for i, x in enumerate(cotangents) if x is not None]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        douts, inputs = tensors[: len(given)], tensors[len(given) :]

        def chosen(*inputs: Tensor) -> tuple[Tensor, ...]:
            results = outputs(*(x.to(wide) for x in inputs))
            return tuple(results[i] for i in given)

        _, pull = torch.func.vjp(chosen, *inputs)
        return pull(tuple(x.to(wide) for x in douts))

    return tuple(cotangents[i] for i in given) + present, gradients


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
        ctx.save_for_forward(*saved, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _saved(ctx):
        saved = ctx.saved_tensors
        num_buckets, scale = ctx.numbers
        return saved[:6], (*saved[6:10], num_buckets, *saved[10:12], scale), saved[12:]

    @staticmethod
    def backward(ctx, dout, dlse, dbinned):
        floats, rest, outputs = _Attention._saved(ctx)
        if rest[3] is None:
            dbinned = None
        if dout is None and dlse is None and dbinned is None:
            return (None,) * 14
        if dout is None:
            dout = torch.zeros_like(outputs[0])
        gradients = torch.ops.natrpb.irpe_attention_backward(dout, dlse, dbinned, *floats, *outputs, *rest)
        return *(None if x is None else dx for x, dx in zip(floats, gradients)), *(None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        # The derivative of the backward pass, which is linear in the outputs' cotangents.
        floats, rest, results = _Attention._saved(ctx)
        results = results if rest[3] is not None else results[:2]
        cotangents = tuple(torch.zeros_like(x) for x in results)
        _, gradients = _gradients_of(floats, rest, cotangents)
        inputs = tuple(x for x in floats if x is not None)
        _, pull = torch.func.vjp(lambda *given: gradients(*given, *inputs), *cotangents)
        directions = (torch.zeros_like(x) if t is None else t for x, t in zip(floats, tangents) if x is not None)
        found = pull(tuple(directions))
        return found if len(found) == 3 else (*found, floats[0].new_zeros(0))


class _AttentionBackward(Function):
    """(dout, dlse, dbinned, query .. table, out, lse, binned | maps, num_buckets, masks, scale) -> gradients of query .. table.

    What the forward pass returned counts as given: the derivative is that of the whole pass in its inputs.
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
    def _gradients(ctx):
        saved = ctx.saved_tensors
        num_buckets, scale = ctx.numbers
        rest = (*saved[9:13], num_buckets, *saved[13:15], scale)
        return saved[:9], _gradients_of(saved[3:9], rest, saved[:3])

    @staticmethod
    def backward(ctx, *given):
        inputs, (present, gradients) = _AttentionBackward._gradients(ctx)
        results, pull = torch.func.vjp(gradients, *present)
        found = (g for g, x in zip(given, inputs[3:]) if x is not None)
        second = iter(pull(tuple(torch.zeros_like(x) if g is None else g for x, g in zip(results, found))))
        return *(None if x is None else next(second) for x in inputs), *(None,) * 11

    @staticmethod
    def jvp(ctx, *tangents):
        inputs, (present, gradients) = _AttentionBackward._gradients(ctx)
        results, pull = torch.func.vjp(gradients, *present)
        _, push = torch.func.vjp(lambda *given: torch.func.vjp(gradients, *present)[1](given), *results)
        directions = (torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents) if x is not None)
        found = iter(push(tuple(directions)))
        return tuple(inputs[3].new_zeros(0) if x is None else next(found) for x in inputs[3:])


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
        query.new_empty((batch, positions, heads), dtype=_wide(query.dtype)),
        query.new_empty(binned),
    )


def _fake_backward(dout, dlse, dbinned, query, key, value, query_rows, key_rows, table, *_):
    rows = (query.new_empty((0,) if x is None else x.shape) for x in (query_rows, key_rows))
    dtable = query.new_empty((0,) if table is None else table.shape, dtype=_wide(query.dtype))
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

"""rpe_index and attention with image relative position encodings: results and derivatives against the specification."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from natrpb import _ext, ops, reference_irpe

from .irpe_cases import CASES, EMPTY, LARGE, SMALL, IrpeCase, IrpeInputs
from .support import DTYPES, ON_CUDA_KERNELS, at_most_twice_the_error, close, dtype_id

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def results(op, inputs: IrpeInputs) -> list[Tensor]:
    """out, lse and, where there is one, binned; -inf of rows without keys as 0, so that errors can be measured."""
    return [x.masked_fill(x == -math.inf, 0) for x in op(*inputs) if x is not None]


def gradients(op, inputs: IrpeInputs, cotangents: list[Tensor]) -> list[Tensor]:
    outputs = results(op, inputs)
    given = [x.to(out.dtype) for x, out in zip(cotangents, outputs)]
    return list(torch.autograd.grad(outputs, list(inputs.floats().values()), given))


def cotangents_of(case: IrpeCase, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of out, lse and binned, whose values `dtype` can hold."""
    outputs = results(reference_irpe.irpe_attention, case.inputs())
    return [torch.randn(x.shape, dtype=torch.float64).to(dtype).double() for x in outputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*CASES, *EMPTY], ids=str)
def test_results_match_the_reference(case, dtype):
    inputs = case.inputs(dtype)
    ours = results(ops.irpe_attention, inputs)
    exact = results(reference_irpe.irpe_attention, inputs.cast(torch.float64))
    plain = results(reference_irpe.irpe_attention, inputs)
    for name, *each in zip(("out", "lse", "binned"), ours, plain, exact, strict=False):
        if dtype == torch.float64:
            close(each[0], each[2], 1e-12)
        else:
            at_most_twice_the_error(name, *each)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*CASES, *EMPTY], ids=str)
def test_gradients_match_the_reference(case, dtype):
    inputs = case.inputs(dtype, requires_grad=True)
    given = cotangents_of(case, dtype)
    ours = gradients(ops.irpe_attention, inputs, given)
    exact = gradients(reference_irpe.irpe_attention, inputs.cast(torch.float64), given)
    plain = gradients(reference_irpe.irpe_attention, inputs, given)
    for name, *each in zip(inputs.floats(), ours, plain, exact):
        if dtype == torch.float64:
            close(each[0], each[2], 1e-11)
        elif case.keys == 1 and name != "value":  # zero, as weights of one key are always 1
            close(each[0].double(), each[2], torch.finfo(dtype).eps * 10)
        else:
            # A table's entry adds the errors of many queries' <dout, out>, which CUDA kernels take from the rounded out.
            rounded_sums = ON_CUDA_KERNELS and name == "table" and dtype.itemsize == 2
            at_most_twice_the_error(f"d{name}", *each, floor=2 if rounded_sums else None)


@pytest.mark.parametrize("op", [ops.irpe_attention, reference_irpe.irpe_attention], ids=["op", "reference"])
@pytest.mark.parametrize("case", [*SMALL, IrpeCase(6, 9, "kqtv", 5, terms=2, padding=True, mask=True)], ids=str)
def test_definition_pair_by_pair(case, op):
    inputs = case.inputs()
    out, lse, binned = op(*inputs)
    maps = {
        name: x if x is None or x.dim() == 3 else x[None] for name, x in inputs._asdict().items() if name.startswith("index")
    }

    def encoding(name: str, letter: str, *row: int) -> float:
        rows, index = getattr(inputs, name), maps[f"index_{letter}"]
        return 0.0 if rows is None else sum(rows[row][term].item() for term in index[:, i, j].tolist())

    for b, h, i in itertools.product(range(case.batch), range(case.heads), range(case.queries)):
        weights = torch.zeros(case.keys, dtype=torch.float64)
        for j in range(case.keys):
            padded = inputs.key_padding_mask is not None and inputs.key_padding_mask[b, j]
            if padded or (inputs.attn_mask is not None and inputs.attn_mask[i, j]):
                continue
            score = inputs.scale * (inputs.query[b, i, h] @ inputs.key[b, j, h])
            score += encoding("query_rows", "k", b, h, i) + encoding("key_rows", "q", b, h, j) + encoding("table", "t", h)
            weights[j] = score.exp()
        total = weights.sum()
        close(lse[b, i, h], total.log())
        weights = weights / total if total else weights
        close(out[b, i, h], weights @ inputs.value[b, :, h])
        if binned is not None:
            bins = torch.zeros(case.buckets, dtype=torch.float64)
            for index in maps["index_v"]:
                bins.index_add_(0, index[i], weights)
            close(binned[b, h, i], bins)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_entry_by_entry_with_forward_mode_and_vmap(case):
    inputs = case.inputs(requires_grad=True)
    names, leaves = zip(*inputs.floats().items())
    assert gradcheck(
        lambda *x: tuple(results(ops.irpe_attention, inputs._replace(**dict(zip(names, x))))),
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.not_emulated("takes a minute; second derivatives come from rpe_index, which other tests have")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case):
    inputs = case.inputs(requires_grad=True)
    names, leaves = zip(*inputs.floats().items())
    assert gradgradcheck(
        lambda *x: tuple(results(ops.irpe_attention, inputs._replace(**dict(zip(names, x))))), leaves, check_fwd_over_rev=True
    )


@pytest.mark.not_emulated("takes a minute")
@pytest.mark.parametrize("case", [LARGE[0], LARGE[1]], ids=str)
def test_gradcheck_of_large_cases_in_a_random_direction(case):
    inputs = case.inputs(requires_grad=True)
    names, leaves = zip(*inputs.floats().items())
    assert gradcheck(
        lambda *x: tuple(results(ops.irpe_attention, inputs._replace(**dict(zip(names, x))))), leaves, fast_mode=True
    )


@pytest.mark.parametrize("used", [0, 1, 2], ids=["out", "lse", "binned"])
@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_results_may_go_unused(case, used):
    inputs = case.inputs(requires_grad=True)
    ours, exact = (
        torch.autograd.grad(
            results(op, inputs)[used].sin().sum(), list(inputs.floats().values()), allow_unused=True, materialize_grads=True
        )
        for op in (ops.irpe_attention, reference_irpe.irpe_attention)
    )
    for one, other in zip(ours, exact):
        close(one, other)


@pytest.mark.parametrize("wanted", ["query", "value", "query_rows", "key_rows", "table"])
def test_gradients_come_only_where_asked_for(wanted):
    inputs = IrpeCase(6, 5).inputs()
    getattr(inputs, wanted).requires_grad_()
    out, _, binned = ops.irpe_attention(*inputs)
    (out.sin().sum() + binned.cos().sum()).backward()
    ours = getattr(inputs, wanted).grad
    inputs = inputs.cast(torch.float64)
    out, _, binned = reference_irpe.irpe_attention(*inputs)
    (out.sin().sum() + binned.cos().sum()).backward()
    close(ours, getattr(inputs, wanted).grad)
    assert all(x.grad is None for name, x in inputs.floats().items() if name != wanted)


def _inside_larger(x: Tensor) -> Tensor:
    larger = x.new_full([n + 3 for n in x.shape[:-1]] + [x.shape[-1]], math.nan)
    return larger[tuple(slice(1, n + 1) for n in x.shape[:-1])].copy_(x)


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, -2).contiguous().transpose(1, -2),
    "channels-apart": lambda x: x.mT.contiguous().mT,
    "inside-larger": _inside_larger,
    "expanded": lambda x: x[:1].expand_as(x),
    "unaligned": lambda x: x.new_full([x.numel() + 1], math.nan)[1:].view(x.shape).copy_(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_memory_layout_does_not_matter(layout, dtype):
    case = IrpeCase(19, 21, "kqtv", 11, padding=True, mask=True)
    inputs = case.inputs(dtype)
    strided = inputs._replace(**{name: layout(x).requires_grad_() for name, x in inputs.floats().items() if name != "table"})
    strided = strided._replace(
        **{name: getattr(inputs, name).mT.contiguous().mT for name in ("index_k", "index_q", "attn_mask")}
    )
    packed = strided._replace(**{name: x.detach().contiguous().requires_grad_() for name, x in strided.floats().items()})
    strided = strided._replace(table=packed.table)
    given = cotangents_of(case, dtype)
    for one, other in zip(results(ops.irpe_attention, strided), results(ops.irpe_attention, packed)):
        assert torch.equal(one, other)
    spread = [layout(x) if x.dim() == 4 else x for x in given]
    packed_given = [x.contiguous() for x in spread]
    ours = gradients(ops.irpe_attention, strided, spread)
    for one, other in zip(ours, gradients(ops.irpe_attention, packed, packed_given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", [SMALL[1], IrpeCase(20, 70, "kqtv", 9, padding=True)], ids=str)
def test_what_padded_keys_hold_is_not_read(case, dtype):
    inputs = case.inputs(dtype, requires_grad=True)
    poisoned = inputs.cast(dtype)
    with torch.no_grad():
        for x in (poisoned.key, poisoned.value):
            x.masked_fill_(inputs.key_padding_mask[:, :, None, None], math.nan)
    given = cotangents_of(case, dtype)
    for one, other in zip(results(ops.irpe_attention, poisoned), results(ops.irpe_attention, inputs)):
        assert torch.equal(one, other)
    ours = gradients(ops.irpe_attention, poisoned, given)
    for one, other in zip(ours, gradients(ops.irpe_attention, inputs, given), strict=True):
        assert torch.equal(one, other)
    assert (ours[1][inputs.key_padding_mask] == 0).all() and (ours[2][inputs.key_padding_mask] == 0).all()


@pytest.mark.parametrize("keys", [6, 600])
def test_queries_without_keys(keys):
    inputs = IrpeCase(5, keys, mask=True).inputs(requires_grad=True)
    out, lse, binned = ops.irpe_attention(*inputs)
    assert (out[:, 0] == 0).all() and (binned[:, :, 0] == 0).all() and (lse[:, 0] == -math.inf).all()
    grads = torch.autograd.grad(
        (out, lse, binned), list(inputs.floats().values()), [torch.randn_like(x) for x in (out, lse, binned)]
    )
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, 0] == 0).all() and (grads[3][:, :, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_scores_far_apart(dtype):
    """Chunks of keys whose scores differ by more than exp can hold, in both orders, and exact -inf."""
    inputs = IrpeCase(4, 700, "t", buckets=4, heads=1).inputs(dtype)
    table = torch.tensor([[0.0, -300.0, 300.0, -math.inf]], dtype=dtype)
    index = torch.zeros(4, 700, dtype=torch.int32)
    index[0, :300], index[1, 300:], index[2, 500], index[3, 1:] = 1, 1, 2, 3
    inputs = inputs._replace(table=table, index_t=index)
    exact = reference_irpe.irpe_attention(*inputs.cast(torch.float64))
    for one, other in zip(ops.irpe_attention(*inputs)[:2], exact):
        close(one.double(), other, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_table_gradient_leaves_in_the_tables_dtype(dtype):
    inputs = IrpeCase(6, 7).inputs(torch.float32)
    table = inputs.table.to(dtype).requires_grad_()
    ops.irpe_attention(*inputs._replace(table=table))[0].sin().sum().backward()
    exact = inputs.cast(torch.float64)
    exact = exact._replace(table=table.detach().double().requires_grad_())
    reference_irpe.irpe_attention(*exact)[0].sin().sum().backward()
    assert table.grad.dtype == dtype
    close(table.grad.double(), exact.table.grad, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


INDEX_SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 4),
    (1, 6, 17, 33, 50),
    (3, 6, 197, 197, 50),
    (2, 9, 19, 40, 130),
    (1, 1, 2, 300, 7),
    (1, 2, 5, 70, 600),
]


def index_case(batch, heads, queries, keys, buckets, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, h, Nq, C], y [B, h, Nq, Nk] and an index map."""
    x = torch.randn(batch, heads, queries, buckets, dtype=torch.float64).to(dtype)
    y = torch.randn(batch, heads, queries, keys, dtype=torch.float64).to(dtype)
    return x, y, torch.randint(0, buckets, (queries, keys), dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", INDEX_SIZES, ids=str)
class TestRpeIndex:
    def test_forward_is_exact(self, size, dtype):
        x, _, index = index_case(*size, dtype)
        assert torch.equal(ops.rpe_index(x, index), x.gather(-1, index.long().expand(*x.shape[:2], -1, -1)))
        assert torch.equal(ops.rpe_index(x, index), ops.rpe_index(x, index.long()))

    def test_transposed_matches_the_reference(self, size, dtype):
        x, y, index = index_case(*size, dtype)
        ours = ops.rpe_index_transposed(y, index, x.shape[-1])
        exact = reference_irpe.rpe_index_transposed(y.double(), index, x.shape[-1])
        plain = torch.zeros_like(x).scatter_add(-1, index.long().expand_as(y), y)
        at_most_twice_the_error("x", ours, plain, exact)

    def test_gradient(self, size, dtype):
        x, y, index = index_case(*size, dtype)
        x.requires_grad_()
        (grad,) = torch.autograd.grad(ops.rpe_index(x, index), x, y)
        assert torch.equal(grad, ops.rpe_index_transposed(y, index, x.shape[-1]))


class TestRpeIndexProperties:
    def test_one_by_one(self):
        x, y, index = index_case(2, 2, 4, 5, 3)
        spread, summed = ops.rpe_index(x, index), ops.rpe_index_transposed(y, index, 3)
        for b, h, i in itertools.product(range(2), range(2), range(4)):
            bins = [0.0] * 3
            for j in range(5):
                assert spread[b, h, i, j] == x[b, h, i, index[i, j]]
                bins[index[i, j]] += y[b, h, i, j].item()
            close(summed[b, h, i], torch.tensor(bins, dtype=torch.float64))

    @pytest.mark.parametrize("layout", ["transposed", "channels-apart", "inside-larger", "expanded"])
    def test_layouts(self, layout):
        x, y, index = index_case(2, 3, 18, 19, 5, torch.float32)
        x, y, index = LAYOUTS[layout](x), LAYOUTS[layout](y), index.mT.contiguous().mT
        assert torch.equal(ops.rpe_index(x, index), ops.rpe_index(x.contiguous(), index))
        ours = ops.rpe_index_transposed(y, index, 5)
        assert torch.equal(ours, ops.rpe_index_transposed(y.contiguous(), index, 5))

    def test_derivatives(self):
        x, y, index = index_case(2, 2, 3, 4, 3)
        x.requires_grad_(), y.requires_grad_()
        checks = dict(check_forward_ad=True, check_batched_grad=True)
        assert gradcheck(lambda x: ops.rpe_index(x, index), x, **checks)
        assert gradgradcheck(lambda x: ops.rpe_index(x, index) ** 2, x)
        assert gradcheck(lambda y: ops.rpe_index_transposed(y, index, 3), y, **checks)
        assert gradgradcheck(lambda y: ops.rpe_index_transposed(y, index, 3) ** 2, y)

    def test_sums_of_16_bit_types_run_in_fp32(self):
        """4096 equal small terms: a 16-bit sum would stop growing long before the end."""
        y = torch.full((1, 1, 1, 4096), 0.01, dtype=torch.bfloat16)
        index = torch.zeros(1, 4096, dtype=torch.int32)
        close(ops.rpe_index_transposed(y, index, 1).double(), 4096 * y[0, 0, 0, :1].double().view(1, 1, 1, 1), 4e-3)

    @pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (1, 1, 2, 0, 0)])
    def test_empty(self, sizes):
        x, y = (torch.randn(*sizes[:3], n) for n in (sizes[4], sizes[3]))
        index = torch.zeros(sizes[2], sizes[3], dtype=torch.int32)
        assert ops.rpe_index(x, index).shape == y.shape
        assert torch.equal(ops.rpe_index_transposed(y, index, sizes[4]), torch.zeros_like(x))


def test_reference_serves_devices_without_kernels(monkeypatch):
    case = IrpeCase(6, 7, "kqtv", 5, padding=True, mask=True)
    inputs = case.inputs(requires_grad=True)
    expected = results(ops.irpe_attention, inputs)
    x, y, index = index_case(2, 2, 4, 5, 3)
    spread, summed = ops.rpe_index(x, index), ops.rpe_index_transposed(y, index, 3)
    monkeypatch.setattr(_ext, "compiled_ops", {})
    monkeypatch.setattr(_ext, "_warned", set())
    with pytest.warns(RuntimeWarning, match="plain PyTorch reference"):
        ours = results(ops.irpe_attention, inputs)
    for one, other in zip(ours, expected):
        close(one, other)
    close(ops.rpe_index(x, index), spread)
    close(ops.rpe_index_transposed(y, index, 3), summed)
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        out, lse, binned = ops.irpe_attention(*case.inputs(torch.float32))
    assert out.dtype == binned.dtype == torch.bfloat16 and lse.dtype == torch.float32

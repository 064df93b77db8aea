"""The fused op's derivatives: gradcheck to second order and in forward mode, gradients against the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import natrpb
from natrpb import ops, reference
from natrpb.patterns import CAUSAL

from . import bruteforce
from .cases import SMALL, Case, Inputs
from .layouts import LAYOUTS
from .support import CASES_BY_DTYPE, DTYPES, at_most_twice_the_error, close, dtype_id, rounding

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("query", "key", "value", "rpb")


def feature_grid() -> list[Case]:
    """1-D, 2-D, 3-D x odd and even K x stride x dilation x causal, small enough for numerical derivatives."""
    cases = []
    for ndim, kernel_size, stride, dilation, is_causal in itertools.product((1, 2, 3), (3, 2), (1, 2), (1, 2), (False, True)):
        length = kernel_size * dilation + 1
        spatial = ((length + 3,), (length, length - 1), (length - 1, 2, 3))[ndim - 1]
        # Beyond the first axes the third dimension keeps the volume small: K = 2, no dilation.
        size = (kernel_size, kernel_size, 2)[:ndim] if ndim < 3 else (kernel_size, 2, 2)
        step = (dilation,) * ndim if ndim < 3 else (dilation, 1, 1)
        team = (stride,) * ndim
        causal = (is_causal, False, is_causal)[:ndim]
        cases.append(Case(spatial, size, team, step, causal, heads=1, head_dim=3, value_dim=2))
    return cases


WINDOWS = [
    Case((7,), 3, shift=1, heads=1, head_dim=2),
    Case((5, 4), (2, 3), shift=(1, 2), heads=2, head_dim=2),
    Case((5, 5), (5, 4), shift=(2, 1), heads=1, head_dim=2),
    Case((3, 2, 3), 2, shift=1, heads=1, head_dim=2),
]
GRID = [*feature_grid(), *WINDOWS]
TINY = [
    Case((5,), 3, heads=1, head_dim=2),
    Case((5,), 2, dilation=2, is_causal=True, heads=2, head_dim=1),
    Case((3, 4), (2, 3), stride=(2, 1), heads=1, head_dim=2, value_dim=1),
    Case((2, 3, 2), 2, is_causal=(True, False, False), heads=1, head_dim=1),
    Case((4, 3), 2, shift=1, heads=1, head_dim=2),
    Case((3, 3), 3, heads=1, head_dim=2, rpb=False),
]


def attention_of(inputs: Inputs):
    """The op as a function of its tensors alone."""
    if inputs.rpb is None:
        return lambda q, k, v: ops.local_attention(q, k, v, None, inputs.pattern, inputs.scale)
    return lambda q, k, v, rpb: ops.local_attention(q, k, v, rpb, inputs.pattern, inputs.scale)


def strided(inputs: Inputs) -> Inputs:
    """Leaves whose memory is heads-first."""
    heads_first = LAYOUTS["heads-first"](inputs)
    return Inputs(*(x if x is None else x.detach().requires_grad_() for x in heads_first[:4]), *inputs[4:])


@pytest.mark.parametrize("layout", ["contiguous", "heads-first"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_gradcheck_of_output_and_lse(case, layout):
    inputs = case.inputs(requires_grad=True)
    if layout == "heads-first":
        inputs = strided(inputs)
    assert gradcheck(attention_of(inputs), inputs.tensors(), fast_mode=True)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck_entry_by_entry_with_forward_mode_and_vmap(case):
    inputs = case.inputs(requires_grad=True)
    assert gradcheck(
        attention_of(inputs),
        inputs.tensors(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("case", GRID[::3], ids=str)
def test_gradcheck_in_forward_mode(case):
    inputs = case.inputs(requires_grad=True)
    assert gradcheck(attention_of(inputs), inputs.tensors(), check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradgradcheck(case):
    inputs = case.inputs(requires_grad=True)
    assert gradgradcheck(attention_of(inputs), inputs.tensors())


@pytest.mark.parametrize("case", [case for case in TINY if case.rpb], ids=str)
def test_gradgradcheck_beside_a_table_that_does_not_learn(case):
    query, key, value, rpb, pattern, scale = case.inputs(requires_grad=True)
    fixed = rpb.detach()
    assert gradgradcheck(lambda q, k, v: ops.local_attention(q, k, v, fixed, pattern, scale), (query, key, value))


@pytest.mark.parametrize("case", GRID[::5], ids=str)
def test_gradgradcheck_on_the_grid(case):
    inputs = strided(case.inputs(requires_grad=True))
    assert gradgradcheck(attention_of(inputs), inputs.tensors(), fast_mode=True)


def gradients(op, inputs: Inputs, dout, dlse) -> list[torch.Tensor]:
    out, lse = op(*inputs)
    return list(torch.autograd.grad((out, lse), inputs.tensors(), (dout.to(out.dtype), dlse.to(lse.dtype))))


def cotangents(case: Case, dtype: torch.dtype):
    """Gradients of out [B, *, h, Dv] and lse [B, *, h], representable in `dtype`."""
    lead = (case.batch, *case.spatial, case.heads)
    dout = torch.randn(*lead, case.value_dim or case.head_dim, dtype=torch.float64).to(dtype)
    return dout, torch.randn(*lead, dtype=torch.float32)


@pytest.mark.parametrize(("case", "dtype"), CASES_BY_DTYPE)
def test_gradients_match_the_reference(case, dtype):
    inputs = case.inputs(dtype, requires_grad=True)
    dout, dlse = cotangents(case, dtype)
    ours = gradients(ops.local_attention, inputs, dout, dlse)
    exact = gradients(reference.local_attention, inputs.cast(torch.float64), dout, dlse)
    if dtype == torch.float64:
        for one, other in zip(ours, exact):
            close(one, other)
        return
    plain = gradients(reference.local_attention, inputs, dout, dlse)
    for name, *results in zip(NAMES, ours, plain, exact):
        at_most_twice_the_error(f"d{name}", *results)


@pytest.mark.parametrize("used", ["out", "lse"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_one_result_may_go_unused(case, used):
    inputs = case.inputs(requires_grad=True)
    position = ("out", "lse").index(used)
    ours, exact = (
        torch.autograd.grad(op(*inputs)[position].sin().sum(), inputs.tensors(), allow_unused=True, materialize_grads=True)
        for op in (ops.local_attention, reference.local_attention)
    )
    for one, other in zip(ours, exact):
        close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_memory_layout_of_inputs_does_not_matter(layout, dtype):
    case = Case((7, 9), (3, 4), batch=2)
    inputs = layout(case.inputs(dtype))
    for x in inputs.tensors():
        x.requires_grad_()
    packed = Inputs(*(x.detach().contiguous().requires_grad_() for x in inputs[:4]), *inputs[4:])
    dout, dlse = cotangents(case, dtype)
    ours = gradients(ops.local_attention, inputs, dout, dlse)
    expected = gradients(ops.local_attention, packed, dout, dlse)
    for one, other in zip(ours, expected):
        close(one, other, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_of_the_incoming_gradient_does_not_matter(layout):
    inputs = Case((7, 9), (3, 4), batch=2).inputs(requires_grad=True)
    dout = layout(Case((7, 9), (3, 4), batch=2).inputs()).value
    dlse = dout[..., 0]
    packed = gradients(ops.local_attention, inputs, dout.clone(memory_format=torch.contiguous_format), dlse.contiguous())
    for one, other in zip(gradients(ops.local_attention, inputs, dout, dlse), packed):
        close(one, other, 1e-12)


@pytest.mark.parametrize("wanted", [names for n in (1, 2, 3) for names in itertools.combinations(NAMES, n)], ids="+".join)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[5]], ids=str)
def test_gradients_come_only_where_asked_for(case, wanted):
    inputs = case.inputs()
    for name in wanted:
        getattr(inputs, name).requires_grad_()
    results = []
    for op in (ops.local_attention, reference.local_attention):
        leaves = inputs.cast(torch.float64)
        out, lse = op(*leaves)
        (out.sin().sum() + (lse.cos().sum() if set(wanted) != {"value"} else 0)).backward()
        results.append([getattr(leaves, name).grad for name in NAMES])
    for name, ours, exact in zip(NAMES, *results):
        if name in wanted:
            close(ours, exact)
        else:
            assert ours is None


@pytest.mark.parametrize("case", [case for case in SMALL if case.rpb], ids=str)
def test_nothing_is_recorded_without_gradients(case):
    out, lse = ops.local_attention(*case.inputs())
    assert not out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        out, lse = ops.local_attention(*case.inputs(requires_grad=True))
    assert not out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_keys_outside_the_neighborhood_do_not_reach_the_query_gradient(case, dtype):
    clean = case.inputs(dtype, requires_grad=True)
    dout, dlse = cotangents(case, dtype)
    expected = gradients(ops.local_attention, clean, dout, dlse)[0].flatten(1, case.ndim)
    mask = bruteforce.dense(case.pattern, case.spatial)[0]
    for query in (0, len(mask) // 2, len(mask) - 1):
        inputs = clean.cast(dtype)
        with torch.no_grad():
            for x in (inputs.key, inputs.value):
                poison_(x, ~mask[query])
        dquery = gradients(ops.local_attention, inputs, dout, dlse)[0]
        close(dquery.flatten(1, case.ndim)[:, query], expected[:, query], rounding(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_queries_that_do_not_see_a_key_do_not_reach_its_gradient(case, dtype):
    clean = case.inputs(dtype, requires_grad=True)
    dout, dlse = cotangents(case, dtype)
    expected = [x.flatten(1, case.ndim) for x in gradients(ops.local_attention, clean, dout, dlse)[1:3]]
    mask = bruteforce.dense(case.pattern, case.spatial)[0]
    for key in (0, len(mask) // 2, len(mask) - 1):
        inputs, poisoned_dout, poisoned_dlse = clean.cast(dtype), dout.clone(), dlse.clone()
        with torch.no_grad():
            for x in (inputs.query, poisoned_dout, poisoned_dlse[..., None]):
                poison_(x, ~mask[:, key])
        ours = gradients(ops.local_attention, inputs, poisoned_dout, poisoned_dlse)[1:3]
        for one, other in zip(ours, expected):
            close(one.flatten(1, case.ndim)[:, key], other[:, key], rounding(dtype))


def poison_(x: torch.Tensor, positions: torch.Tensor) -> None:
    """Writes NaN into x [B, *, h, D] at flat positions, given as bool [N]."""
    x.masked_fill_(positions.view(1, *x.shape[1:-2], 1, 1), math.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [Case((7, 7), 7), Case((5, 3), (5, 3), shift=0), Case((9, 9), 7)], ids=str)
def test_a_key_that_an_infinite_score_masks_leaves_the_other_gradients_alone(case, dtype):
    inputs = case.inputs(dtype)
    inputs.query[..., 0] = -1
    inputs.key[:, 1, 1, :, 0] = math.inf  # its score is minus infinity
    for x in inputs.tensors():
        x.requires_grad_()
    dout, dlse = cotangents(case, dtype)
    ours = gradients(ops.local_attention, inputs, dout, dlse)
    exact = gradients(reference.local_attention, inputs.cast(torch.float64), dout, dlse)
    assert ours[0].isnan().any()  # zero times infinity, for queries that see the key
    for one, other in zip(ours[1:], exact[1:]):
        assert one.isfinite().all()
        close(one.double(), other, max(1e-4, 2 * rounding(dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("case", [case for case in SMALL if case.rpb], ids=str)
def test_pairs_masked_by_minus_infinity_get_zero_gradient(case, dtype):
    inputs = case.inputs(dtype)
    center = torch.zeros(case.pattern.rpb_shape, dtype=torch.bool)
    center[tuple(k - 1 for k in case.pattern.kernel_size)] = True
    masked = (torch.rand(inputs.rpb.shape) < 0.5) & ~center
    inputs.rpb.masked_fill_(masked, -math.inf)
    for x in inputs.tensors():
        x.requires_grad_()
    dout, dlse = cotangents(case, dtype)
    ours = gradients(ops.local_attention, inputs, dout, dlse)
    exact = gradients(reference.local_attention, inputs.cast(torch.float64), dout, dlse)
    assert (ours[3][masked] == 0).all()
    for one, other in zip(ours, exact):
        close(one.double(), other, 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-30, 8.0])
@pytest.mark.parametrize("case", SMALL[1:6:2], ids=str)
def test_gradients_at_odd_scales(case, scale, dtype):
    inputs = case.inputs(dtype, requires_grad=True)._replace(scale=scale)
    dout, dlse = cotangents(case, dtype)
    ours = gradients(ops.local_attention, inputs, dout, dlse)
    exact = gradients(reference.local_attention, inputs.cast(torch.float64), dout, dlse)
    for one, other in zip(ours, exact):
        close(one.double(), other, 1e-10 if dtype == torch.float64 else 2e-4)


def test_entries_of_the_table_that_no_pair_uses_get_zero_gradient():
    case = Case((8,), 4, is_causal=True)
    inputs = case.inputs(requires_grad=True)
    ops.local_attention(*inputs)[0].sin().sum().backward()
    assert case.pattern.kind == (CAUSAL,)
    assert (inputs.rpb.grad[:, 4:] == 0).all() and (inputs.rpb.grad[:, :4] != 0).all()


@pytest.mark.parametrize("table", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_table_gradient_leaves_in_the_tables_dtype(dtype, table):
    case = Case((9, 8), 3)
    inputs = case.inputs(dtype)
    rpb = inputs.rpb.to(table).requires_grad_()
    weights = torch.randn(inputs.value.shape, dtype=dtype)
    (natrpb.na2d(*inputs[:3], 3, rpb=rpb) * weights).sum().backward()
    exact = rpb.detach().double().requires_grad_()
    out, _ = reference.local_attention(*(x.double() for x in inputs[:3]), exact, case.pattern, inputs.scale)
    (out * weights).sum().backward()
    assert rpb.grad.dtype == table
    allowed = {
        torch.float64: 1e-10,
        torch.float32: 1e-5,
        torch.bfloat16: 0.0625,
        torch.float16: 0.0078125,
    }  # 8 units in 16 bits
    largest = exact.grad.abs().max()
    close(rpb.grad.double() / largest, exact.grad / largest, max(allowed[dtype], allowed[table]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_table_gradient_is_summed_in_fp32(dtype):
    """1600 equal small terms per entry: a 16-bit sum would stop growing long before the end."""
    case = Case((40, 40), 3, heads=1, head_dim=1)
    zeros = torch.zeros(1, *case.spatial, 1, 1, dtype=dtype)
    rpb = torch.zeros(1, 5, 5, requires_grad=True)
    ops.local_attention(zeros, zeros, zeros, rpb, case.pattern, 1.0)[1].sum().backward()
    exact = torch.zeros(1, 5, 5, dtype=torch.float64)
    for _, _, entry in bruteforce.pairs(case.pattern, case.spatial):
        exact[(0, *entry)] += 1 / 9
    close(rpb.grad.double(), exact, 1e-2)


def test_gradients_flow_through_dropout_and_additional_tokens():
    query, key, value, table, *_ = Case((5, 4), 3, heads=1, head_dim=2).inputs(requires_grad=True)
    tokens = torch.randn(2, 1, 3, 1, 2, dtype=torch.float64).unbind()
    tokens = [x.clone().requires_grad_() for x in tokens]

    def call(q, k, v, rpb, extra_keys, extra_values, dropout_p=0.0):
        torch.manual_seed(7)
        return natrpb.na2d(
            q, k, v, 3, rpb=rpb, additional_keys=extra_keys, additional_values=extra_values, dropout_p=dropout_p,
            return_lse=True,
        )  # fmt: skip

    leaves = (query, key, value, table, *tokens)
    assert gradcheck(call, leaves, fast_mode=True, check_forward_ad=True)
    assert gradcheck(lambda *x: call(*x, dropout_p=0.4), leaves, fast_mode=True)


@pytest.mark.parametrize("heads_kv", [1, 2])
def test_gradients_of_shared_heads_are_summed(heads_kv):
    query, key, value, table, *_ = Case((4, 5), 3, heads=4, head_dim=2).inputs()
    key, value = (x[..., :heads_kv, :].clone().requires_grad_() for x in (key, value))
    query.requires_grad_(), table.requires_grad_()
    assert gradcheck(lambda q, k, v, b: natrpb.na2d(q, k, v, 3, rpb=b), (query, key, value, table), fast_mode=True)

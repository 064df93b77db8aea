"""The unfused ops: scores, weighted sums and their transposes against the reference, and their derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import natrpb
from natrpb import ops, reference

from . import bruteforce
from .cases import CASES, SMALL, Case
from .layouts import LAYOUTS
from .support import CASES_BY_DTYPE, at_most_twice_the_error, close, dtype_id

pytestmark = pytest.mark.usefixtures("poisoned_memory")

QK = {1: natrpb.na1d_qk, 2: natrpb.na2d_qk, 3: natrpb.na3d_qk}
AV = {1: natrpb.na1d_av, 2: natrpb.na2d_av, 3: natrpb.na3d_av}
TINY = [
    Case((5,), 3, heads=1, head_dim=2),
    Case((7,), 2, dilation=2, is_causal=True, heads=2, head_dim=2),
    Case((3, 4), (2, 3), stride=(2, 1), heads=1, head_dim=2, value_dim=3),
    Case((2, 3, 2), 2, is_causal=(True, False, False), heads=1, head_dim=2),
    Case((4, 3), 2, shift=1, heads=2, head_dim=2),
    Case((3, 3), 3, heads=1, head_dim=2, rpb=False),
]


class Unfused:
    """Heads-first tensors of a case, with random weights [B, h, *, T] beside query, key, value and the table."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64, requires_grad: bool = False):
        inputs = case.inputs(dtype)
        self.query, self.key, self.value = (x.movedim(-2, 1) for x in inputs[:3])
        self.rpb, self.pattern = inputs.rpb, inputs.pattern
        self.attn = torch.randn(*self.query.shape[:-1], case.pattern.num_slots, dtype=torch.float64).to(dtype)
        self.empty = ~reference.pattern_index(case.pattern, case.spatial)[2].unflatten(0, case.spatial)
        if requires_grad:
            self.query, self.key, self.value, self.attn = (
                x.detach().requires_grad_() for x in (self.query, self.key, self.value, self.attn)
            )
            self.rpb = self.rpb if self.rpb is None else self.rpb.requires_grad_()

    def double(self) -> Unfused:
        copy = object.__new__(Unfused)
        for name, item in vars(self).items():
            setattr(copy, name, item.double() if isinstance(item, torch.Tensor) and name != "empty" else item)
        return copy


CALLS = {
    "local_qk": lambda op, u: op(u.query, u.key, u.rpb, u.pattern),
    "local_av": lambda op, u: op(u.attn, u.value, u.pattern),
    "local_av_transposed": lambda op, u: op(u.attn, u.query, u.pattern),
    "local_bias_grad": lambda op, u: op(u.attn, u.pattern),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("case", "dtype"), CASES_BY_DTYPE)
def test_results_match_the_reference(case, dtype, name):
    tensors, call = Unfused(case, dtype), CALLS[name]
    ours = call(getattr(ops, name), tensors)
    exact = call(getattr(reference, name), tensors.double())
    assert torch.equal(ours.isinf(), exact.isinf()), "empty slots score -inf"
    ours, exact = (x.masked_fill(x.isinf(), 0) for x in (ours, exact))
    if dtype == torch.float64:
        close(ours, exact)
        return
    if name == "local_bias_grad":
        assert ours.dtype == torch.float32
        tensors = tensors.double()
        tensors.attn = tensors.attn.float()
    plain = call(getattr(reference, name), tensors)
    at_most_twice_the_error(name, ours, plain.masked_fill(plain.isinf(), 0), exact)


@pytest.mark.parametrize("case", [case for case in CASES if case.shift is None and case.stride == 1], ids=str)
def test_scores_softmax_and_sums_make_the_fused_op(case):
    query, key, value, rpb, _, scale = case.inputs()
    first = [x.movedim(-2, 1) for x in (query * scale, key, value)]
    arguments = (case.kernel_size, case.dilation, case.is_causal)
    scores = QK[case.ndim](*first[:2], *arguments, rpb=rpb)
    out = AV[case.ndim](scores.softmax(-1), first[2], *arguments)
    fused, lse = ops.local_attention(query, key, value, rpb, case.pattern, scale)
    close(out.movedim(1, -2), fused)
    close(scores.logsumexp(-1).movedim(1, -1), lse)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_slots_are_row_major_and_empty_ones_score_minus_infinity(case):
    u = Unfused(case)
    scores = ops.local_qk(u.query, u.key, None, u.pattern).flatten(2, -2)
    products = u.query.flatten(2, -2) @ u.key.flatten(2, -2).mT
    for query, row in enumerate(bruteforce.slots(case.pattern, case.spatial)):
        for slot, key in enumerate(row):
            expected = products[:, :, query, key] if key is not None else torch.full(products.shape[:2], -math.inf)
            close(scores[:, :, query, slot], expected.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", ["local_av", "local_av_transposed", "local_bias_grad"])
@pytest.mark.parametrize("case", [case for case in SMALL if case.shift is not None or case.is_causal], ids=str)
def test_weights_of_empty_slots_are_not_read(case, name, dtype):
    u = Unfused(case, dtype)
    clean = CALLS[name](getattr(ops, name), u)
    u.attn = u.attn.masked_fill(u.empty, math.nan)
    close(CALLS[name](getattr(ops, name), u), clean, 0.0)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_keys_outside_the_neighborhood_are_not_read(case):
    u = Unfused(case)
    mask = bruteforce.dense(case.pattern, case.spatial)[0]
    scores, sums = ops.local_qk(u.query, u.key, u.rpb, u.pattern), ops.local_av(u.attn, u.value, u.pattern)
    for query in (0, len(mask) // 2, len(mask) - 1):
        unseen = ~mask[query].view(*case.spatial, 1)
        key, value = u.key.masked_fill(unseen, math.nan), u.value.masked_fill(unseen, math.nan)
        poisoned = (ops.local_qk(u.query, key, u.rpb, u.pattern), ops.local_av(u.attn, value, u.pattern))
        for ours, expected in zip(poisoned, (scores, sums)):
            close(ours.flatten(2, -2)[:, :, query], expected.flatten(2, -2)[:, :, query])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_queries_that_do_not_see_a_key_do_not_reach_its_row(case):
    u = Unfused(case)
    mask = bruteforce.dense(case.pattern, case.spatial)[0]
    clean = ops.local_av_transposed(u.attn, u.query, u.pattern).flatten(2, -2)
    for key in (0, len(mask) // 2, len(mask) - 1):
        query = u.query.masked_fill(~mask[:, key].view(*case.spatial, 1), math.nan)
        close(ops.local_av_transposed(u.attn, query, u.pattern).flatten(2, -2)[:, :, key], clean[:, :, key])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_transposes_are_adjoint(case):
    u = Unfused(case)
    dout = torch.randn_like(u.value)
    forward = (ops.local_av(u.attn, u.value, u.pattern) * dout).sum()
    close((u.value * ops.local_av_transposed(u.attn, dout, u.pattern)).sum(), forward)
    rpb = torch.randn(case.heads, *case.pattern.rpb_shape, dtype=torch.float64)
    bias = reference.local_bias(rpb, u.pattern, case.spatial)
    close((rpb * ops.local_bias_grad(u.attn, u.pattern)).sum(), (bias * u.attn).sum())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    inputs = layout(Case((7, 9), (3, 4), batch=2).inputs())
    query, key, value = (x.movedim(-2, 1) for x in inputs[:3])
    attn = torch.randn(2, 2, 9, 12, 7, dtype=torch.float64).permute(0, 1, 4, 2, 3)  # [B, h, H, W, T]
    pattern = inputs.pattern
    calls = {
        "local_qk": (query, key, inputs.rpb),
        "local_av": (attn, value),
        "local_av_transposed": (attn, value),
        "local_bias_grad": (attn,),
    }
    for name, tensors in calls.items():
        op = getattr(ops, name)
        packed = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
        close(op(*tensors, pattern), op(*packed, pattern), 1e-14)


@pytest.mark.parametrize("name", ["local_qk", "local_av", "local_av_transposed", "local_bias_grad"])
@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck_to_second_order_and_in_forward_mode(case, name):
    u = Unfused(case, requires_grad=True)
    op = getattr(ops, name)
    if name == "local_qk":
        leaves = [u.query, u.key] + ([u.rpb] if case.rpb else [])

        def function(query, key, rpb=None):
            return op(query, key, rpb, u.pattern).masked_fill(u.empty, 0)
    else:
        leaves = {"local_av": [u.attn, u.value], "local_av_transposed": [u.attn, u.query], "local_bias_grad": [u.attn]}
        leaves = leaves[name]

        def function(*tensors):
            return op(*tensors, u.pattern)

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_match_the_reference(case):
    grads = []
    weights = None
    for module in (ops, reference):
        torch.manual_seed(0)
        u = Unfused(case, requires_grad=True)
        scores = module.local_qk(u.query, u.key, u.rpb, u.pattern)
        weights = scores.softmax(-1) if weights is None else weights.detach()
        out = module.local_av(scores.softmax(-1) + u.attn, u.value, u.pattern)
        transposed = module.local_av_transposed(u.attn, u.query, u.pattern)
        table = module.local_bias_grad(u.attn, u.pattern)
        (out.sin().sum() + transposed.sin().sum() + table.sin().sum()).backward()
        grads.append([x.grad for x in (u.query, u.key, u.value, u.attn, u.rpb) if x is not None])
    for ours, exact in zip(*grads):
        close(ours, exact)


@pytest.mark.parametrize("wanted", ["query", "key", "rpb"])
def test_gradients_of_scores_come_only_where_asked_for(wanted):
    u = Unfused(SMALL[2])
    getattr(u, wanted).requires_grad_()
    natrpb.na2d_qk(u.query, u.key, (3, 5), rpb=u.rpb).sin().sum().backward()
    for name in ("query", "key", "rpb"):
        assert (getattr(u, name).grad is not None) == (name == wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_weights_are_cast_to_the_dtype_of_the_values(dtype):
    u = Unfused(SMALL[2])
    value = u.value.to(dtype)
    out = natrpb.na2d_av(u.attn, value, (3, 5))
    assert out.dtype == dtype
    close(out, natrpb.na2d_av(u.attn.to(dtype), value, (3, 5)), 0.0)


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("what", ["dense-bias", "dropout", "additional-keys"])
def test_scores_are_fp32_where_attention_runs_unfused(what, dtype, autocast):
    """Rounded to 16 bits, scores of some hundreds would err by whole units."""
    given = [torch.randn(1, 8, 8, 2, 16) * size for size in (30, 30, 1)]
    tokens, bias = torch.randn(2, 1, 3, 2, 16), torch.randn(2, 16, 16)
    rpb = torch.randn(2, 7, 7)

    def attend(query, key, value, tokens, bias, rpb):
        if what == "additional-keys":
            return natrpb.na2d(query, key, value, 4, rpb=rpb, additional_keys=30 * tokens[0], additional_values=tokens[1])
        unfused = dict(dense_bias=bias) if what == "dense-bias" else dict(rpb=rpb, dropout_p=1e-9)
        return natrpb.window_attention(query, key, value, 4, convention="nat", **unfused)

    rounded = [x.to(dtype) for x in (*given, tokens)]
    exact = attend(*(x.double() for x in rounded), bias.double(), rpb.double())
    if autocast:
        with torch.autocast(given[0].device.type, dtype):
            out = attend(*(x.float() for x in rounded), bias, rpb)
    else:
        out = attend(*rounded, bias, rpb)
    assert out.dtype == dtype
    close(out.double(), exact, 4 * torch.finfo(dtype).eps)

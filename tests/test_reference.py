"""The plain PyTorch specification against loops and full score matrices that share nothing with it."""

from __future__ import annotations

import math

import pytest
import torch

from natrpb import reference

from . import bruteforce
from .cases import CASES, SMALL, Case
from .support import close

TINY = [
    Case((5,), 3, heads=1, head_dim=2),
    Case((6,), 2, stride=2, dilation=2, is_causal=True, heads=2, head_dim=3),
    Case((4, 5), (3, 2), is_causal=(False, True), batch=2, heads=1, head_dim=2, value_dim=3),
    Case((3, 4, 2), (2, 3, 1), stride=(1, 2, 1), heads=1, head_dim=2),
    Case((5, 4), 3, shift=(2, 1), heads=2, head_dim=2),
    Case((4, 3), 3, heads=1, head_dim=1, rpb=False),
]
DENSE = [case for case in CASES if case.pattern.num_slots * case.size < 3e7]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_attention_is_that_of_the_loops(case):
    inputs = case.inputs()
    for ours, loops in zip(reference.local_attention(*inputs), bruteforce.attention(*inputs)):
        close(ours, loops, 1e-12)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_full_score_matrices_agree_with_the_loops(case):
    inputs = case.inputs()
    for matrices, loops in zip(bruteforce.dense_attention(*inputs), bruteforce.attention(*inputs)):
        close(matrices, loops, 1e-12)


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_attention_is_that_of_full_score_matrices(case):
    inputs = case.inputs()
    for ours, matrices in zip(reference.local_attention(*inputs), bruteforce.dense_attention(*inputs)):
        close(ours, matrices, 1e-12)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_are_those_of_full_score_matrices(case):
    ours = case.inputs(requires_grad=True)
    matrices = ours.cast(torch.float64)
    for op, inputs in ((reference.local_attention, ours), (bruteforce.dense_attention, matrices)):
        out, lse = op(*inputs)
        (out.cos().sum() + lse.sin().sum()).backward()
    for one, other in zip(ours.tensors(), matrices.tensors()):
        close(one.grad, other.grad, 1e-12)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_unfused_ops_follow_the_slots(case):
    query, key, value, rpb, pattern, _ = case.inputs()
    spatial = case.spatial
    entry = bruteforce.dense(pattern, spatial)[1]
    query, key, value = (x.movedim(-2, 1).flatten(2, -2) for x in (query, key, value))  # [B, h, N, D]
    attn = torch.randn(case.batch, case.heads, query.shape[2], pattern.num_slots, dtype=torch.float64)
    scores = torch.full_like(attn, float("-inf"))
    weighted, transposed = torch.zeros_like(value), torch.zeros_like(query)
    bias_grad = torch.zeros(case.heads, math.prod(pattern.rpb_shape), dtype=torch.float64)
    for q, row in enumerate(bruteforce.slots(pattern, spatial)):
        for t, k in enumerate(row):
            if k is None:
                continue
            scores[:, :, q, t] = (query[:, :, q] * key[:, :, k]).sum(-1)
            weighted[:, :, q] += attn[:, :, q, t, None] * value[:, :, k]
            transposed[:, :, k] += attn[:, :, q, t, None] * query[:, :, q]
            bias_grad[:, entry[q, k]] += attn[:, :, q, t].sum(0)
            if case.rpb:
                scores[:, :, q, t] += rpb.flatten(1)[:, entry[q, k]]

    def on_map(x):
        return x.unflatten(2, spatial)

    close(reference.local_qk(on_map(query), on_map(key), rpb, pattern), on_map(scores), 1e-12)
    close(reference.local_av(on_map(attn), on_map(value), pattern), on_map(weighted), 1e-12)
    close(reference.local_av_transposed(on_map(attn), on_map(query), pattern), on_map(transposed), 1e-12)
    close(reference.local_bias_grad(on_map(attn), pattern).flatten(1), bias_grad, 1e-12)


@pytest.mark.parametrize("case", [case for case in SMALL if case.rpb], ids=str)
def test_bias_and_its_gradient_are_each_others_transpose(case):
    pattern = case.pattern
    rpb = torch.randn(case.heads, *pattern.rpb_shape, dtype=torch.float64)
    bias = reference.local_bias(rpb, pattern, case.spatial)
    dattn = torch.randn(1, *bias.shape, dtype=torch.float64)
    close((bias * dattn[0]).sum(), (rpb * reference.local_bias_grad(dattn, pattern)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_keep_the_dtype_and_lse_is_fp32(dtype):
    out, lse = reference.local_attention(*SMALL[2].inputs(dtype))
    assert out.dtype == dtype and lse.dtype == torch.float32

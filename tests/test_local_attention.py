"""The fused forward: output and lse against the fp64 reference, for every shape, dtype, memory layout and odd value."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import natrpb
from natrpb import ops, reference, rpb
from natrpb.patterns import neighborhood_pattern, window_pattern

from . import bruteforce
from .cases import CASES, SMALL, Case, Inputs
from .layouts import LAYOUTS
from .support import CASES_BY_DTYPE, DTYPES, at_most_twice_the_error, close, dtype_id, rounding

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NEIGHBORHOOD_ATTENTION = {1: natrpb.na1d, 2: natrpb.na2d, 3: natrpb.na3d}


@pytest.mark.parametrize(("case", "dtype"), CASES_BY_DTYPE)
def test_output_and_lse_match_the_reference(case, dtype):
    inputs = case.inputs(dtype)
    ours = ops.local_attention(*inputs)
    exact = reference.local_attention(*inputs.cast(torch.float64))
    assert ours[0].dtype == dtype
    assert ours[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        close(ours[0], exact[0])
        close(ours[1], exact[1])
        return
    plain = reference.local_attention(*inputs)
    at_most_twice_the_error("out", ours[0], plain[0], exact[0])
    at_most_twice_the_error("lse", ours[1], plain[1], exact[1])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_output_and_lse_match_plain_loops(case):
    inputs = case.inputs()
    for ours, matrices in zip(ops.local_attention(*inputs), bruteforce.dense_attention(*inputs)):
        close(ours, matrices)


@pytest.mark.parametrize("case", [case for case in CASES if case.shift is None and case.size < 1e5], ids=str)
def test_public_functions_spread_arguments_and_scale_by_default(case):
    query, key, value, table, *_ = inputs = case.inputs()
    function = NEIGHBORHOOD_ATTENTION[case.ndim]
    arguments = (case.kernel_size, case.stride, case.dilation, case.is_causal, table)
    out, lse = function(query, key, value, *arguments, return_lse=True)
    expected = ops.local_attention(*inputs)
    close(out, expected[0], 1e-14)
    close(lse, expected[1], 1e-14)
    close(function(query, key, value, *arguments), out, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", [Case((7, 9), (3, 4), batch=2), Case((5, 6, 4), 3, head_dim=16)], ids=str)
def test_memory_layout_does_not_matter(case, layout, dtype):
    inputs = layout(case.inputs(dtype))
    packed = inputs._replace(**{name: getattr(inputs, name).contiguous() for name in ("query", "key", "value")})
    before = [x.clone() for x in inputs.tensors()]
    for ours, expected in zip(ops.local_attention(*inputs), ops.local_attention(*packed)):
        close(ours, expected, 1e-14 if dtype == torch.float64 else 1e-6)
    assert all(torch.equal(x, y) for x, y in zip(inputs.tensors(), before)), "inputs are left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_offsets_beyond_two_to_the_31_elements(dtype, monkeypatch):
    """Rows so far apart that the last ones do not fit 32 bits; memory in between is never touched, and so never there."""
    shape, apart = (1, 10, 9, 2, 32), 1 << 28
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        whole = torch.empty(10 * apart, dtype=dtype)
    except RuntimeError:
        pytest.skip(f"no address space for {10 * apart * dtype.itemsize >> 30} GiB")
    near = Case(shape[1:3], (3, 5), heads=2, head_dim=32).inputs(dtype)
    query, key, value, dout = (
        whole.as_strided(shape, (whole.numel(), apart, 64, 32, 1), n * 9 * 64).copy_(x)
        for n, x in enumerate((*near[:3], near[0]))
    )
    assert (value[0, -1].data_ptr() - whole.data_ptr()) // dtype.itemsize > 1 << 31
    far = [x.requires_grad_() for x in (query, key, value, near.rpb)]
    close_by = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in far]
    results = []
    for leaves in (far, close_by):
        out, lse = ops.local_attention(*leaves, near.pattern, near.scale)
        results.append([out, lse, *torch.autograd.grad(out, leaves, dout if leaves is far else dout.contiguous())])
    for given, expected in zip(*results, strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_keys_outside_the_neighborhood_are_not_read(case, dtype):
    inputs = case.inputs(dtype)
    clean = ops.local_attention(*inputs)
    mask = bruteforce.dense(case.pattern, case.spatial)[0]
    n = len(mask)
    for query in {0, 1, n // 3, n // 2, n - 2, n - 1}:
        unseen = ~mask[query]
        key, value = (poison(x, unseen) for x in (inputs.key, inputs.value))
        for ours, expected in zip(ops.local_attention(inputs.query, key, value, *inputs[3:]), clean):
            close(ours.flatten(1, case.ndim)[:, query], expected.flatten(1, case.ndim)[:, query], rounding(dtype))


def poison(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A copy of x [B, *, h, D] with NaN at flat positions, given as bool [N]."""
    flat = x.detach().clone().flatten(1, -3)
    flat[:, positions] = math.nan
    return flat.view_as(x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which", ["query", "key", "value", "rpb"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    "case",
    [Case((9,), 4, is_causal=True), Case((6, 7), 3), Case((5, 6), 3, shift=1), Case((6, 9), 5, shift=(2, 1))],
    ids=str,
)
def test_nan_and_infinity_propagate_as_in_the_reference(case, dtype, which, value):
    inputs = case.inputs(dtype)
    getattr(inputs, which).view(-1)[11] = value
    out, lse = ops.local_attention(*inputs)
    exact, exact_lse = reference.local_attention(*inputs.cast(torch.float64))
    close(out.double(), exact, max(1e-4, rounding(dtype)))
    close(lse.double(), exact_lse, max(1e-4, rounding(dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-30, -1e-30, 8.0])
@pytest.mark.parametrize("case", SMALL[1:6:2], ids=str)
def test_scale_may_be_zero_tiny_negative_or_large(case, scale, dtype):
    inputs = case.inputs(dtype)._replace(scale=scale)
    for ours, exact in zip(ops.local_attention(*inputs), reference.local_attention(*inputs.cast(torch.float64))):
        close(ours.double(), exact, 1e-10 if dtype == torch.float64 else max(1e-4, rounding(dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("sign", [1, -1], ids=["plus", "minus"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_huge_scores_do_not_overflow(case, sign, dtype):
    """Integers times a power of two: every score is exact in every dtype, so the softmax picks the same keys."""
    inputs = case.inputs(dtype)._replace(scale=sign * 2.0**24)
    for x in inputs.tensors():
        x.round_()
    if inputs.rpb is not None:
        inputs.rpb.mul_(2.0**24)
    out, lse = ops.local_attention(*inputs)
    exact, exact_lse = reference.local_attention(*inputs.cast(torch.float64))
    assert out.isfinite().all() and lse.isfinite().all()
    close(out.double(), exact, 1e-6)
    close(lse.double(), exact_lse, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("case", [case for case in SMALL if case.rpb], ids=str)
def test_bias_of_minus_infinity_masks_pairs(case, dtype):
    inputs = case.inputs(dtype)
    center = torch.zeros(case.pattern.rpb_shape, dtype=torch.bool)
    center[tuple(k - 1 for k in case.pattern.kernel_size)] = True
    inputs.rpb.masked_fill_((torch.rand(inputs.rpb.shape) < 0.5) & ~center, -math.inf)
    out, lse = ops.local_attention(*inputs)
    exact, exact_lse = bruteforce.dense_attention(*inputs)
    assert out.isfinite().all() and lse.isfinite().all()
    close(out.double(), exact, 1e-10 if dtype == torch.float64 else 1e-5)
    close(lse.double(), exact_lse, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_query_with_every_pair_masked_gives_what_softmax_gives(dtype):
    inputs = Case((6, 7), 3).inputs(dtype)
    inputs.rpb[0] = -math.inf
    for ours, plain in zip(ops.local_attention(*inputs), reference.local_attention(*inputs)):
        close(ours, plain, 1e-5)


def test_constant_bias_shifts_lse_alone():
    inputs = Case((9, 8), 3).inputs()
    out, lse = ops.local_attention(*inputs)
    moved, moved_lse = ops.local_attention(*inputs._replace(rpb=inputs.rpb + 1e4))
    close(moved, out, 1e-9)
    close(moved_lse, lse + 1e4, 1e-9)


@pytest.mark.parametrize("table", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_table_may_have_another_dtype(dtype, table):
    inputs = Case((9, 8), 3).inputs(dtype)
    inputs = inputs._replace(rpb=inputs.rpb.to(table))
    out, _ = natrpb.na2d(*inputs[:3], 3, rpb=inputs.rpb, return_lse=True)
    assert out.dtype == dtype
    close(out.double(), reference.local_attention(*inputs.cast(torch.float64))[0], 0.05 if dtype in DTYPES[2:] else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
def test_one_neighborhood_over_everything_is_sdpa(length, is_causal, dtype):
    query, key, value, table, *_ = Case((length,), length, batch=2).inputs(dtype)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    bias = table[:, distance + length - 1]  # [h, query, key]
    if is_causal:
        bias = bias.masked_fill(distance > 0, -math.inf)
    first = [x.transpose(1, 2) for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*first, attn_mask=bias).transpose(1, 2)
    ours = natrpb.na1d(query, key, value, length, is_causal=is_causal, rpb=table)
    close(ours, expected, 1e-10 if dtype == torch.float64 else 1e-5)
    plain = F.scaled_dot_product_attention(*first, is_causal=is_causal).transpose(1, 2)
    close(natrpb.na1d(query, key, value, length, is_causal=is_causal), plain, 1e-10 if dtype == torch.float64 else 1e-5)


def swin(inputs: Inputs, window: int, shift: int, table: torch.Tensor) -> torch.Tensor:
    """Swin's own way for [B, H, W, h, D]: roll, partition, bias gathered from table [(2W-1)^2, h], mask, roll back."""
    height, width, heads = inputs.query.shape[1:4]
    region = torch.zeros(height, width)
    for n, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
        for m, columns in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * n + m if shift else 0

    def partition(x: torch.Tensor) -> torch.Tensor:  # [B, H, W, ...] -> [B, H/w, W/w, w*w, ...]
        x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
        return x.transpose(2, 3).flatten(3, 4)

    def split(x: torch.Tensor) -> torch.Tensor:
        return partition(x.roll((-shift, -shift), (1, 2))).transpose(3, 4)  # [B, H/w, W/w, h, w*w, D]

    query, key, value = (split(x) for x in inputs[:3])
    bias = table[rpb.swin_index(window)].permute(2, 0, 1)  # [h, w*w, w*w]
    tiles = partition(region[None])  # [1, H/w, W/w, w*w]
    mask = (tiles[..., None] != tiles[..., None, :]).to(bias.dtype)[:, :, :, None] * -1e30
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias + mask)
    out = out.transpose(3, 4).unflatten(3, (window, window)).transpose(2, 3)  # [B, H/w, w, W/w, w, h, D]
    return out.reshape(-1, height, width, heads, out.shape[-1]).roll((shift, shift), (1, 2))


@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (3, 1), (6, 3)])
def test_windows_are_swins_with_the_table_flipped(window, shift):
    case = Case((12, 12), window, shift=shift, batch=2, heads=3)
    inputs = case.inputs()
    table = torch.randn((2 * window - 1) ** 2, 3, dtype=torch.float64)
    ours, _ = ops.local_attention(*inputs._replace(rpb=rpb.swin_to_nat(table)))
    close(ours, swin(inputs, window, shift, table))


@pytest.mark.parametrize("spatial", [(12,), (6, 9), (3, 6, 3)], ids=str)
def test_strided_neighborhood_with_stride_k_is_windowed_attention(spatial):
    inputs = Case(spatial, 3).inputs()
    strided = ops.local_attention(*inputs._replace(pattern=neighborhood_pattern(len(spatial), 3, 3)))
    windowed = ops.local_attention(*inputs._replace(pattern=window_pattern(len(spatial), 3)))
    for ours, expected in zip(strided, windowed):
        close(ours, expected, 1e-14)


@pytest.mark.parametrize("case", [Case((5, 6), 3, batch=2), Case((8,), 3, dilation=2, is_causal=True)], ids=str)
@pytest.mark.parametrize("extra", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_additional_tokens_join_every_neighborhood(case, extra, dtype):
    inputs = case.inputs(dtype)
    keys, values = (torch.randn(case.batch, extra, case.heads, case.head_dim).to(dtype) for _ in range(2))
    function = NEIGHBORHOOD_ATTENTION[case.ndim]
    out, lse = function(
        *inputs[:3], case.kernel_size, case.stride, case.dilation, case.is_causal, inputs.rpb,
        additional_keys=keys, additional_values=values, return_lse=True,
    )  # fmt: skip
    exact, exact_lse = bruteforce.dense_attention(*inputs, keys, values)
    assert out.dtype == dtype
    close(out.double(), exact, 1e-10 if dtype == torch.float64 else 1e-5)
    close(lse.double(), exact_lse, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5, 1e9])
def test_weights_of_additional_tokens_and_neighborhood_sum_to_one_at_any_scale(scale):
    """Equal scores everywhere; a large lse has no digits left for the logarithm of a small sum."""
    ones = torch.ones(1, 6, 7, 2, 8)
    tokens = torch.ones(1, 4, 2, 8)
    out = natrpb.na2d(ones, ones, ones, 3, scale=scale, additional_keys=tokens, additional_values=tokens)
    close(out, torch.ones_like(out), 1e-5)


@pytest.mark.parametrize("heads_kv", [1, 2, 3, 6])
def test_query_heads_share_keys_and_values(heads_kv):
    query, key, value, table, *_ = Case((7, 6), 3, heads=6).inputs()
    key, value = key[..., :heads_kv, :], value[..., :heads_kv, :5]
    spread = [x.repeat_interleave(6 // heads_kv, dim=-2) for x in (key, value)]
    tokens = torch.randn(2, 1, 4, heads_kv, 8, dtype=torch.float64).unbind()
    tokens = (tokens[0], tokens[1][..., :5])
    close(natrpb.na2d(query, key, value, 3, rpb=table), natrpb.na2d(query, *spread, 3, rpb=table))
    spread_tokens = [x.repeat_interleave(6 // heads_kv, dim=-2) for x in tokens]
    close(
        natrpb.na2d(query, key, value, 3, additional_keys=tokens[0], additional_values=tokens[1]),
        natrpb.na2d(query, *spread, 3, additional_keys=spread_tokens[0], additional_values=spread_tokens[1]),
    )


@pytest.mark.parametrize("tokens", [False, True], ids=["alone", "additional"])
def test_dropout_drops_each_weight_with_its_probability(tokens):
    """Zero queries give equal weights, and one-hot values show each of them in the output."""
    length, kernel_size, extra, probability = 12, 5, 3 * tokens, 0.3
    query = torch.zeros(400, length, 2, 4)
    eye = torch.eye(length + extra).expand(400, 2, -1, -1).transpose(1, 2)  # [B, L + T, h, L + T]
    added = {}
    if tokens:
        added = {"additional_keys": torch.zeros(400, extra, 2, 4), "additional_values": eye[:, length:]}
    out, lse = natrpb.na1d(query, query, eye[:, :length], kernel_size, dropout_p=probability, return_lse=True, **added)
    seen = bruteforce.dense(neighborhood_pattern(1, kernel_size), (length,))[0]
    seen = torch.cat([seen, torch.ones(length, extra, dtype=torch.bool)], dim=1)
    weights = out.transpose(1, 2)[:, :, seen]
    kept = weights != 0
    count = kernel_size + extra
    assert (out.transpose(1, 2)[:, :, ~seen] == 0).all()
    close(weights[kept], torch.full_like(weights[kept], 1 / count / (1 - probability)), 1e-6)
    assert abs(kept.double().mean().item() - (1 - probability)) < 4 * (0.3 * 0.7 / kept.numel()) ** 0.5
    close(lse, torch.full_like(lse, math.log(count)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_dropout_keeps_scores_in_float32(dtype):
    """Beyond what 16 bits hold, or hold exactly, as the fused op does."""
    query, key, value = (60 * x for x in Case((6, 7), 3, heads=2, head_dim=64).inputs(dtype)[:3])
    plain = natrpb.na2d(query, key, value, 3)
    assert plain.isfinite().all()
    close(natrpb.na2d(query, key, value, 3, dropout_p=1e-12), plain, 0.02)


def test_dropout_of_nothing_and_of_everything():
    query, key, value, table, *_ = Case((6, 7), 3).inputs()
    plain = natrpb.na2d(query, key, value, 3, rpb=table)
    close(natrpb.na2d(query, key, value, 3, rpb=table, dropout_p=0.0), plain, 0.0)
    close(natrpb.na2d(query, key, value, 3, rpb=table, dropout_p=1e-12), plain)
    assert (natrpb.na2d(query, key, value, 3, rpb=table, dropout_p=1.0) == 0).all()

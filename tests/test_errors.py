"""Bad input ends in a sentence that names the argument; odd but legal input in the right result."""

from __future__ import annotations

import math

import pytest
import torch

import natrpb
from natrpb import reference
from natrpb.patterns import neighborhood_pattern, window_pattern

from .support import close


def map2d(*lead: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """[B, H, W, h, D] for the fused op; `lead` overrides the whole shape."""
    return torch.randn(lead or (2, 6, 7, 4, 8), dtype=dtype, device=device)


# What changes in a good call of na2d, the error, and what its sentence must say.
FUSED = {
    "query-not-a-tensor": ({"query": [[1.0]]}, TypeError, "query must be a tensor"),
    "query-rank": ({"query": map2d(2, 6, 7, 8)}, ValueError, r"query must have shape \[B, H, W, heads, D\]"),
    "query-rank-3d": ({"query": map2d(2, 1, 6, 7, 4, 8)}, ValueError, "query must have shape"),
    "query-integer": ({"query": torch.ones(2, 6, 7, 4, 8, dtype=torch.int64)}, TypeError, "query must be float64"),
    "query-complex": ({"query": map2d(dtype=torch.complex64)}, TypeError, "query must be float64"),
    "query-sparse": ({"query": map2d().to_sparse()}, TypeError, "query must be a dense tensor"),
    "key-rank": ({"key": map2d(2, 6, 7, 8)}, ValueError, "key must have shape"),
    "key-shape": ({"key": map2d(2, 6, 8, 4, 8)}, ValueError, "key must have query's shape"),
    "key-batch": ({"key": map2d(1, 6, 7, 4, 8)}, ValueError, "key must have query's shape"),
    "key-head-dim": ({"key": map2d(2, 6, 7, 4, 9)}, ValueError, "key must have query's shape"),
    "key-dtype": ({"key": map2d(dtype=torch.float64)}, TypeError, "key must have query's dtype"),
    "key-device": ({"key": map2d(device="meta")}, ValueError, "key must be on query's device"),
    "query-nested": (
        {"query": torch.nested.nested_tensor([map2d(6, 7, 4, 8)])},
        TypeError,
        "must be a dense tensor, got a nested",
    ),
    "key-missing": ({"key": None}, TypeError, "key must be a tensor"),
    "value-shape": ({"value": map2d(2, 7, 6, 4, 8)}, ValueError, "value must have key's shape"),
    "value-heads": ({"value": map2d(2, 6, 7, 2, 8)}, ValueError, "value must have key's shape"),
    "value-dtype": ({"value": map2d(dtype=torch.float16)}, TypeError, "value must have query's dtype"),
    "value-device": ({"value": map2d(device="meta")}, ValueError, "value must be on query's device"),
    "value-dim-zero": ({"value": map2d(2, 6, 7, 4, 0)}, ValueError, r"head_dim\) must hold at least 1"),
    "heads-not-multiple": (
        {"key": map2d(2, 6, 7, 3, 8), "value": map2d(2, 6, 7, 3, 8)},
        ValueError,
        "heads must be a multiple of key's, got 4 and 3",
    ),
    "heads-kv-zero": (
        {"key": map2d(2, 6, 7, 0, 8), "value": map2d(2, 6, 7, 0, 8)},
        ValueError,
        "heads must be a multiple of key's, got 4 and 0",
    ),
    "kernel-too-large": ({"kernel_size": 7}, ValueError, r"kernel_size \* dilation must not exceed .* 7 \* 1 > 6"),
    "dilation-too-large": ({"dilation": (1, 3)}, ValueError, r"kernel_size \* dilation .* 3 \* 3 > 7 on axis 1"),
    "kernel-zero": ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    "kernel-negative": ({"kernel_size": (3, -3)}, ValueError, "kernel_size must be at least 1, got -3 on axis 1"),
    "kernel-float": ({"kernel_size": 3.0}, TypeError, "kernel_size must be int"),
    "kernel-bool": ({"kernel_size": True}, TypeError, "kernel_size must be int"),
    "kernel-text": ({"kernel_size": "33"}, TypeError, "kernel_size must be int"),
    "kernel-none": ({"kernel_size": None}, TypeError, "kernel_size must be int"),
    "kernel-length": ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be one int or 2 of them, got 3"),
    "kernel-huge": ({"kernel_size": 2**62}, ValueError, r"kernel_size \* dilation must not exceed"),
    "stride-above-kernel": ({"stride": 4}, ValueError, r"stride must be between 1 and kernel_size \(3\), got 4"),
    "stride-zero": ({"stride": (0, 1)}, ValueError, "stride must be between 1"),
    "stride-negative": ({"stride": -1}, ValueError, "stride must be between 1"),
    "stride-length": ({"stride": (1,)}, ValueError, "stride must be one int or 2"),
    "dilation-zero": ({"dilation": 0}, ValueError, "dilation must be at least 1"),
    "dilation-negative": ({"dilation": (1, -2)}, ValueError, "dilation must be at least 1, got -2 on axis 1"),
    "dilation-type": ({"dilation": 1.5}, TypeError, "dilation must be int"),
    "causal-length": ({"is_causal": (True,)}, ValueError, "is_causal must be one bool or 2"),
    "causal-type": ({"is_causal": 1}, TypeError, "is_causal must be bool"),
    "causal-mixed": ({"is_causal": (True, 0)}, TypeError, "is_causal must be bool"),
    "rpb-shape": ({"rpb": torch.zeros(4, 5, 6)}, ValueError, r"rpb must have shape \[4, 5, 5\].* got \[4, 5, 6\]"),
    "rpb-heads": ({"rpb": torch.zeros(1, 5, 5)}, ValueError, "rpb must have shape"),
    "rpb-rank": ({"rpb": torch.zeros(4, 25)}, ValueError, "rpb must have shape"),
    "rpb-integer": ({"rpb": torch.zeros(4, 5, 5, dtype=torch.int32)}, TypeError, "rpb must be a floating-point tensor"),
    "rpb-not-a-tensor": ({"rpb": 0.0}, TypeError, "rpb must be a floating-point tensor"),
    "rpb-sparse": ({"rpb": torch.zeros(4, 5, 5).to_sparse()}, TypeError, "rpb must be"),
    "rpb-device": (
        {"rpb": torch.zeros(4, 5, 5, device="meta")},
        ValueError,
        "rpb must be on the other tensors' device, cpu, got meta",
    ),
    "scale-text": ({"scale": "1"}, ValueError, "scale must be a finite number"),
    "scale-nan": ({"scale": math.nan}, ValueError, "scale must be a finite number"),
    "scale-infinite": ({"scale": math.inf}, ValueError, "scale must be a finite number"),
    "scale-beyond-floats": ({"scale": 10**400}, ValueError, "scale must be a finite number"),
    "dropout-above-one": ({"dropout_p": 1.5}, ValueError, "dropout_p must be a number between 0 and 1"),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be"),
    "dropout-nan": ({"dropout_p": math.nan}, ValueError, "dropout_p must be"),
    "additional-keys-alone": ({"additional_keys": map2d(2, 3, 4, 8)}, ValueError, "must be given together"),
    "additional-values-alone": ({"additional_values": map2d(2, 3, 4, 8)}, ValueError, "must be given together"),
    "additional-keys-shape": (
        {"additional_keys": map2d(2, 3, 4, 9), "additional_values": map2d(2, 3, 4, 8)},
        ValueError,
        r"additional_keys must have shape \[2, T, 4, 8\]",
    ),
    "additional-values-shape": (
        {"additional_keys": map2d(2, 3, 4, 8), "additional_values": map2d(2, 4, 4, 8)},
        ValueError,
        r"additional_values must have shape \[2, 3, 4, 8\]",
    ),
    "additional-keys-none-of-them": (
        {"additional_keys": map2d(2, 0, 4, 8), "additional_values": map2d(2, 0, 4, 8)},
        ValueError,
        "additional_keys must have shape .* T >= 1",
    ),
    "additional-keys-dtype": (
        {"additional_keys": map2d(2, 3, 4, 8, dtype=torch.float64), "additional_values": map2d(2, 3, 4, 8)},
        TypeError,
        "additional_keys must have query's dtype",
    ),
    "additional-values-device": (
        {"additional_keys": map2d(2, 3, 4, 8), "additional_values": map2d(2, 3, 4, 8, device="meta")},
        ValueError,
        "additional_values must be on query's device",
    ),
}


@pytest.mark.parametrize(("change", "error", "match"), FUSED.values(), ids=FUSED)
def test_bad_arguments_of_the_fused_op_are_named(change, error, match):
    arguments = {"query": map2d(), "key": map2d(), "value": map2d(), "kernel_size": 3} | change
    with pytest.raises(error, match=match):
        natrpb.na2d(**arguments)


def first2d(*lead: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """[B, h, H, W, D] for the unfused ops; `lead` overrides the whole shape."""
    return torch.randn(lead or (2, 4, 6, 7, 8), dtype=dtype, device=device)


QK = {
    "query-rank": ({"query": first2d(4, 6, 7, 8)}, ValueError, r"query must have shape \[B, heads, H, W, D\]"),
    "query-integer": ({"query": torch.ones(2, 4, 6, 7, 8, dtype=torch.int8)}, TypeError, "query must be float64"),
    "key-shape": ({"key": first2d(2, 2, 6, 7, 8)}, ValueError, "key must have query's shape"),
    "key-dtype": ({"key": first2d(dtype=torch.bfloat16)}, TypeError, "key must have query's dtype"),
    "key-device": ({"key": first2d(device="meta")}, ValueError, "key must be on query's device"),
    "kernel-too-large": ({"kernel_size": (7, 3)}, ValueError, r"kernel_size \* dilation"),
    "kernel-type": ({"kernel_size": None}, TypeError, "kernel_size must be int"),
    "dilation-negative": ({"dilation": -1}, ValueError, "dilation must be at least 1"),
    "causal-length": ({"is_causal": (True, True, True)}, ValueError, "is_causal must be"),
    "rpb-shape": ({"rpb": torch.zeros(4, 3, 3)}, ValueError, "rpb must have shape"),
    "head-dim-zero": ({"query": first2d(2, 4, 6, 7, 0), "key": first2d(2, 4, 6, 7, 0)}, ValueError, "head_dim"),
}
AV = {
    "value-not-a-tensor": ({"value": 3}, TypeError, "value must be a tensor"),
    "value-rank": ({"value": first2d(6, 7, 8)}, ValueError, r"value must have shape \[B, heads, H, W, Dv\]"),
    "attn-rank": ({"attn": first2d(6, 7, 9)}, ValueError, "attn must have shape"),
    "attn-slots": ({"attn": first2d(2, 4, 6, 7, 8)}, ValueError, r"attn must have shape \[2, 4, 6, 7, 9\]"),
    "attn-heads": ({"attn": first2d(2, 3, 6, 7, 9)}, ValueError, "attn must have shape"),
    "attn-integer": ({"attn": torch.ones(2, 4, 6, 7, 9, dtype=torch.int64)}, TypeError, "attn must be float64"),
    "attn-device": ({"attn": first2d(2, 4, 6, 7, 9, device="meta")}, ValueError, "attn must be on value's device"),
    "kernel-too-large": (
        {"kernel_size": 7, "attn": first2d(2, 4, 6, 7, 49)},
        ValueError,
        r"kernel_size \* dilation must not exceed",
    ),
}


@pytest.mark.parametrize(("change", "error", "match"), QK.values(), ids=QK)
def test_bad_arguments_of_the_scores_are_named(change, error, match):
    arguments = {"query": first2d(), "key": first2d(), "kernel_size": 3} | change
    with pytest.raises(error, match=match):
        natrpb.na2d_qk(**arguments)


@pytest.mark.parametrize(("change", "error", "match"), AV.values(), ids=AV)
def test_bad_arguments_of_the_sums_are_named(change, error, match):
    arguments = {"attn": first2d(2, 4, 6, 7, 9), "value": first2d(), "kernel_size": 3} | change
    with pytest.raises(error, match=match):
        natrpb.na2d_av(**arguments)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_rank_of_each_dimension_is_stated(ndim):
    function = (natrpb.na1d, natrpb.na2d, natrpb.na3d)[ndim - 1]
    layout = ("L", "H, W", "D0, H, W")[ndim - 1]
    wrong = torch.zeros([2] * (ndim + 4))
    with pytest.raises(ValueError, match=rf"query must have shape \[B, {layout}, heads, D\]"):
        function(wrong, wrong, wrong, 1)


def test_integers_cannot_require_grad_and_are_refused():
    integers = torch.ones(2, 6, 7, 4, 8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="floating point"):
        integers.requires_grad_()
    with pytest.raises(TypeError, match="query must be float64"):
        natrpb.na2d(integers, integers, integers, 3)


@pytest.mark.parametrize(
    "shape",
    [(0, 6, 7, 4, 8), (2, 6, 7, 0, 8), (2, 0, 7, 4, 8), (2, 6, 0, 4, 8), (0, 0, 0, 0, 8)],
    ids=["batch", "heads", "height", "width", "all"],
)
@pytest.mark.parametrize("features", [{}, {"is_causal": True}, {"stride": 2, "dilation": 2}], ids=str)
def test_empty_input_gives_empty_output_and_gradients(shape, features):
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(shape[3], 5, 5, requires_grad=True)
    out, lse = natrpb.na2d(*tensors, 3, rpb=rpb, return_lse=True, **features)
    assert out.shape == shape and lse.shape == shape[:-1]
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.shape == shape for x in tensors)
    assert rpb.grad.shape == rpb.shape and (rpb.grad == 0).all()


def test_empty_input_of_the_unfused_ops():
    query = torch.randn(0, 4, 6, 7, 8, requires_grad=True)
    scores = natrpb.na2d_qk(query, query, 3)
    assert scores.shape == (0, 4, 6, 7, 9)
    out = natrpb.na2d_av(scores.softmax(-1), query, 3)
    assert out.shape == query.shape
    out.sum().backward()
    assert query.grad.shape == query.shape


def test_empty_batch_is_still_checked():
    empty = torch.randn(0, 6, 7, 4, 8)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed"):
        natrpb.na2d(empty, empty, empty, 9)
    with pytest.raises(ValueError, match="rpb must have shape"):
        natrpb.na2d(empty, empty, empty, 3, rpb=torch.zeros(4, 3, 3))


def test_lists_and_sizes_count_as_sequences():
    query, key, value = map2d(), map2d(), map2d()
    expected = natrpb.na2d(query, key, value, (3, 4), (1, 2), (2, 1), (True, False))
    close(natrpb.na2d(query, key, value, [3, 4], [1, 2], [2, 1], [True, False]), expected, 0.0)
    close(natrpb.na2d(query, key, value, torch.Size((3, 4)), (1, 2), (2, 1), (True, False)), expected, 0.0)


def test_numbers_may_be_numpys():
    np = pytest.importorskip("numpy")
    query, key, value = map2d(), map2d(), map2d()
    expected = natrpb.na2d(query, key, value, (3, 4), 1, 1, scale=0.5)
    ours = natrpb.na2d(query, key, value, (np.int64(3), 4), np.int32(1), np.uint8(1), scale=np.float32(0.5))
    close(ours, expected, 0.0)
    close(natrpb.na2d(query, key, value, (3, 4), scale=0.5, dropout_p=np.float64(0)), expected, 0.0)
    assert natrpb.WindowAttention(8, np.int64(4), 2, np.int64(1)).window_size == (4, 4)


def test_dtypes_that_autocast_does_not_join():
    query, key = map2d(dtype=torch.float64), map2d()
    for one, other in ((query, key), (key, query)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="key must have query's dtype"):
            natrpb.na2d(one, other, other, 3)
    meta = map2d(device="meta")
    with pytest.raises(TypeError, match="key must have query's dtype"):
        natrpb.na2d(meta, meta.half(), meta.half(), 3)


def test_scale_may_be_an_int():
    query, key, value = map2d(), map2d(), map2d()
    close(natrpb.na2d(query, key, value, 3, scale=2), natrpb.na2d(query, key, value, 3, scale=2.0), 0.0)


def test_scale_may_be_an_int_beyond_64_bits():
    query, tokens = map2d(), map2d(2, 3, 4, 8)
    additional = {"additional_keys": tokens, "additional_values": tokens}
    ours, same = (natrpb.na2d(query, query, query, 3, scale=scale, **additional) for scale in (2**64, 2.0**64))
    close(ours, same, 0.0)


def test_meta_tensors_give_shapes():
    query = map2d(device="meta")
    rpb = torch.zeros(4, 5, 5, device="meta")
    out, lse = natrpb.na2d(query, query, query[..., :5], 3, rpb=rpb, return_lse=True)
    assert out.device.type == lse.device.type == "meta"
    assert out.shape == (2, 6, 7, 4, 5) and lse.shape == (2, 6, 7, 4) and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: window_pattern(2, 0), ValueError, "window_size must be at least 1"),
        (lambda: window_pattern(2, (4, -1)), ValueError, "window_size must be at least 1, got -1 on axis 1"),
        (lambda: window_pattern(2, -(10**6)), ValueError, "window_size must be at least 1, got -1000000 on axis 0"),
        (lambda: window_pattern(2, 4, 4), ValueError, r"shift_size must be between 0 and window_size - 1 \(3\), got 4"),
        (lambda: window_pattern(2, 4, -1), ValueError, "shift_size must be"),
        (lambda: window_pattern(2, 4, (1, 2, 3)), ValueError, "shift_size must be one int or 2"),
        (lambda: window_pattern(2, 4.0), TypeError, "window_size must be int"),
        (lambda: neighborhood_pattern(1, [3, 3]), ValueError, "kernel_size must be one int or 1"),
    ],
    ids=["size-zero", "size-negative", "huge", "shift-too-large", "shift-negative", "shift-length", "size-type", "length"],
)
def test_bad_patterns_are_named(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_reference_of_an_empty_map_is_empty():
    query = torch.randn(1, 0, 2, 4)
    out, lse = reference.local_attention(query, query, query, None, neighborhood_pattern(1, 3), 1.0)
    assert out.shape == (1, 0, 2, 4) and lse.shape == (1, 0, 2)

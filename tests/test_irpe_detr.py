"""RPEMultiheadAttention, the drop-in for DETR-with-iRPE's attention, against torch.nn.MultiheadAttention and the definition."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from natrpb import RPEMultiheadAttention, get_rpe_config
from natrpb.modules import parse_rpe_config

from .irpe_dense import dense_attention
from .support import DTYPES, at_most_twice_the_error, close, dtype_id
from .test_irpe_modules import METHOD, RATIOS, encoding_tables, with_random_tables


def build(text: str = "", **options) -> RPEMultiheadAttention:
    return with_random_tables(RPEMultiheadAttention(8, 2, rpe_config=parse_rpe_config(text), **options))


def draw(length: int, batch_first: bool = False) -> tuple[Tensor, Tensor]:
    """What DETR passes as query (or key) and value: they differ by the position embedding."""
    x = torch.randn((2, length, 8) if batch_first else (length, 2, 8), dtype=torch.float64)
    return x + torch.randn_like(x), x


def draw_masks(keys: int) -> dict[str, Tensor]:
    """One of every form, for 12 queries of 2 sequences in 2 heads; the fourth key is never excluded."""
    padding = torch.zeros(2, keys, dtype=torch.bool)
    padding[0, keys - 3 :] = padding[1, :3] = True
    excluded = torch.rand(4, 12, keys) < 0.3
    excluded[..., 3] = False
    numbers = torch.randn(4, 12, keys)
    return {
        "padding": padding,
        "bool": excluded[0],
        "bool-3d": excluded,
        "float": numbers[0],
        "float-3d": numbers,
        "infinite": numbers.masked_fill(excluded, -torch.inf),
    }


def definition(module, query, value, method, height, width, excluded=None, added=None) -> Tensor:
    """What self-attention [L, B, E] computes, from gathered encodings."""
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    first = [
        nn.functional.linear(x, w, b).unflatten(-1, (2, 4)).permute(1, 2, 0, 3)
        for x, w, b in zip((query, query, value), weights, biases)
    ]
    encodings = [encoding_tables(module, letter, method, height, width, 0, RATIOS[method]) for letter in "qkv"]
    out = dense_attention(*first, *encodings, 0.5, excluded, added)
    return module.out_proj(out.permute(2, 0, 1, 3).flatten(2))


def test_arguments_stand_in_the_official_order():
    """microsoft/Cream, iRPE/DETR-with-iRPE/models/rpe_attention/multi_head_attention.py; batch_first is natrpb's own."""
    official = "embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim rpe_config".split()
    assert list(inspect.signature(RPEMultiheadAttention).parameters) == [*official, "batch_first"]
    forward = inspect.signature(RPEMultiheadAttention.forward).parameters
    assert list(forward)[1:] == "query key value key_padding_mask need_weights attn_mask hw".split()
    assert forward["need_weights"].default is True
    values = (8, 2, 0.1, True, False, False, 8, None, get_rpe_config())
    for module in (RPEMultiheadAttention(*values), RPEMultiheadAttention(**dict(zip(official, values)))):
        assert module.dropout == 0.1 and module.rpe_k is not None


@pytest.mark.parametrize(
    "option, message",
    [
        ({"add_bias_kv": True}, "add_bias_kv must be False, got True"),
        ({"add_zero_attn": True}, "add_zero_attn must be False, got True"),
        ({"kdim": 4}, "kdim must be None or embed_dim, 8, got 4"),
        ({"vdim": 16}, "vdim must be None or embed_dim, 8, got 16"),
    ],
)
def test_what_is_not_supported_is_named(option, message):
    with pytest.raises(NotImplementedError, match=message):
        RPEMultiheadAttention(8, 2, **option)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keys", [12, 7])
def test_without_encoding_it_is_multihead_attention(keys, bias, batch_first):
    module = build(bias=bias, batch_first=batch_first)
    torch_module = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).double()
    assert set(module.state_dict()) == set(torch_module.state_dict())
    torch_module.load_state_dict(module.state_dict())
    query, (key, value) = draw(12, batch_first)[0], draw(keys, batch_first)
    masks = {name: mask.double() if mask.is_floating_point() else mask for name, mask in draw_masks(keys).items()}
    padding = masks.pop("padding")
    for given in ({}, {"key_padding_mask": padding}, *({"attn_mask": mask} for mask in masks.values())):
        expected, expected_weights = torch_module(query, key, value, **given)
        out, weights = module(query, key, value, **given)
        close(out, expected)
        close(weights, expected_weights)
        out, weights = module(query, key, value, **given, need_weights=False)
        close(out, expected)
        assert weights is None
        if all(mask.dtype == torch.bool for mask in given.values()):
            of_bytes = {name: 2 * mask.byte() for name, mask in given.items()}
            close(module(query, key, value, **of_bytes)[0], expected)
    both = (masks["bool"] | padding[:, None, None]).expand(-1, 2, -1, -1).flatten(0, 1)
    expected = torch_module(query, key, value, attn_mask=both)[0]
    for mask in (masks["bool"], torch.zeros(12, keys).masked_fill(masks["bool"], -torch.inf)):
        close(module(query, key, value, padding, attn_mask=mask)[0], expected)


@pytest.mark.parametrize("mask", ["none", "padding", "bool", "bool-3d", "float", "float-3d", "infinite"])
@pytest.mark.parametrize("keys", [12, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradients_are_those_of_multihead_attention(dtype, keys, mask):
    """Of inputs, parameters and a mask of numbers."""
    inputs = [x.to(dtype) for x in (draw(12)[0], *draw(keys))]
    given = {} if mask == "none" else {"key_padding_mask" if mask == "padding" else "attn_mask": draw_masks(keys)[mask]}
    dout, dweights = torch.randn(12, 2, 8), torch.randn(2, 12, keys)
    ours, plain = RPEMultiheadAttention(8, 2).to(dtype), nn.MultiheadAttention(8, 2).to(dtype)
    plain.load_state_dict(ours.state_dict())

    def results(module: nn.Module, to: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: x.detach().to(to).requires_grad_() for name, x in zip(("query", "key", "value"), inputs)}
        masks = {name: x.to(dtype).to(to) if x.is_floating_point() else x for name, x in given.items()}
        numbers = {name: x.detach().requires_grad_() for name, x in masks.items() if x.is_floating_point()}
        out, weights = module(*leaves.values(), **masks | numbers)
        loss = (out * dout.to(dtype).to(to)).sum() + (weights * dweights.to(dtype).to(to)).sum()
        leaves |= dict(module.named_parameters()) | numbers
        return {"out": out.detach(), "weights": weights.detach()} | dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values())))
        )

    found, yardstick = results(ours, dtype), results(plain, dtype)
    for name, exact in results(copy.deepcopy(plain).double(), torch.float64).items():
        at_most_twice_the_error(name, found[name], yardstick[name], exact)


@METHOD
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("on", ["k", "qk", "qkv"])
def test_encodings_on_padded_maps_of_any_sides(on, need_weights, method):
    module, (query, value) = build(f"rpe-{RATIOS[method]}-{method}-ctx-0-{on}"), draw(3 * 5)
    padding = torch.zeros(2, 3, 5, dtype=torch.bool)
    padding[0, 2:] = padding[1, :, 3:] = True
    padding = padding.flatten(1)
    expected = definition(module, query, value, method, 3, 5, padding[:, None, None])
    close(module(query, query, value, padding, need_weights, hw=(3, 5))[0], expected)


@pytest.mark.parametrize("name", ["bool", "bool-3d", "float", "float-3d", "infinite"])
def test_encodings_with_masks_on_pairs(name):
    module, (query, value) = build("rpe-1.9-product-ctx-0-qkv"), draw(3 * 4)
    mask = draw_masks(12)[name]
    by_head = mask if mask.dim() == 2 else mask.unflatten(0, (2, 2))
    as_defined = {"excluded": by_head} if mask.dtype == torch.bool else {"added": by_head.double()}
    expected = definition(module, query, value, "product", 3, 4, **as_defined)
    close(module(query, query, value, attn_mask=mask, hw=(3, 4))[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("name", ["bool", "bool-3d", "float", "float-3d", "infinite"])
def test_masks_under_autocast(name, dtype):
    module, (query, value) = build("rpe-1.9-product-ctx-1-qkv").float(), (x.float() for x in draw(3 * 4))
    masks = draw_masks(12)
    given = dict(key_padding_mask=masks["padding"], attn_mask=masks[name], hw=(3, 4))
    expected, expected_weights = module(query, query, value, **given)
    with torch.autocast(query.device.type, dtype=dtype):
        out, weights = module(query, query, value, **given)
    assert out.dtype == weights.dtype == dtype
    close(out.float(), expected, 0.05)
    close(weights.float(), expected_weights, 0.05)


def test_a_query_without_keys_gets_zeros():
    module, (query, value) = build(bias=False), draw(6)
    mask = torch.randn(6, 6, dtype=torch.float64)
    mask[2] = -torch.inf
    for form in (mask, mask.isinf(), mask.expand(4, 6, 6)):
        out, weights = module(query.requires_grad_(), query, value, attn_mask=form)
        assert not out[2].any() and not weights[:, 2].any() and out[3].all()
        assert torch.autograd.grad(out.square().sum(), query)[0].isfinite().all()


def test_dropout():
    module, (query, value) = build("rpe-1.9-product-ctx-1-k", dropout=0.4), draw(9)
    assert not torch.equal(module(query, query, value)[0], module(query, query, value)[0])
    module.eval()
    assert torch.equal(module(query, query, value)[0], module(query, query, value)[0])


def test_weights_are_those_after_dropout():
    module, (query, value) = RPEMultiheadAttention(8, 1, dropout=0.5).double(), draw(12)
    out, weights = module(query, query, value)
    assert 0.3 < (weights == 0).double().mean() < 0.7
    values = nn.functional.linear(value, module.in_proj_weight[16:], module.in_proj_bias[16:])
    close(out, module.out_proj(torch.einsum("bij,jbc->ibc", weights, values)))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": 1}, TypeError, r"query must be a tensor \[L, B, 8\], got int"),
        ({"query": torch.zeros(6, 2, 4)}, ValueError, r"query must have shape \[L, B, 8\], B as in query, got \[6, 2, 4\]"),
        ({"query": torch.zeros(6, 8)}, ValueError, r"query must have shape \[L, B, 8\], got \[6, 8\]"),
        ({"key": torch.zeros(6, 1, 8)}, ValueError, r"key must have shape \[S, B, 8\], B as in query, got \[6, 1, 8\]"),
        ({"key": torch.zeros(6, 2, 8).double()}, TypeError, "key must have query's dtype"),
        ({"value": torch.zeros(5, 2, 8)}, ValueError, r"value must have key's shape, \[6, 2, 8\], got \[5, 2, 8\]"),
        ({"attn_mask": torch.zeros(6, 6).int()}, TypeError, "attn_mask must be a bool or floating-point tensor or None, got "),
        ({"attn_mask": [[0]]}, TypeError, "attn_mask must be a bool or floating-point tensor or None, got list"),
        ({"attn_mask": torch.zeros(6)}, ValueError, r"attn_mask must have shape \[6, 6\] or \[4, 6, 6\], got \[6\]"),
        ({"attn_mask": torch.zeros(2, 2, 6, 6)}, ValueError, r"attn_mask must have shape \[6, 6\] or \[4, 6, 6\], got "),
        ({"attn_mask": torch.zeros(2, 6, 6).bool()}, ValueError, r"attn_mask must have shape \[6, 6\] or \[4, 6, 6\], got "),
        ({"key_padding_mask": torch.zeros(2, 6)}, TypeError, "key_padding_mask must be a bool tensor or None, got "),
        ({"key_padding_mask": torch.zeros(6, 2).bool()}, ValueError, r"key_padding_mask must have shape \[2, 6\], got "),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    x = torch.zeros(6, 2, 8)
    with pytest.raises(error, match=message):
        RPEMultiheadAttention(8, 2)(**({"query": x, "key": x, "value": x} | change))


def test_encodings_are_of_one_map():
    module, (query, value) = build("rpe-1.9-product-ctx-1-k"), draw(6)
    with pytest.raises(ValueError, match="key must have query's length, 6, for its encodings, got 5"):
        module(query, value[:5], value[:5], hw=(2, 3))

"""NeighborhoodAttention1D/2D/3D: constructor contract, layout, padding, dropout, initialisation."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from natrpb import functional
from natrpb.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
OPS = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}
SPATIAL = {1: (9,), 2: (6, 5), 3: (3, 5, 4)}
EACH_NDIM = pytest.mark.parametrize("ndim", [1, 2, 3], ids="{}d".format)


def test_older_spellings_mean_the_same():
    old = NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3, bias=True)
    new = NeighborhoodAttention2D(embed_dim=8, num_heads=2, kernel_size=3, rel_pos_bias=True)
    assert repr(old) == repr(new)
    assert old.rpb.shape == (2, 5, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(embed_dim=8, dim=8, num_heads=2, kernel_size=3), "older spelling of embed_dim"),
        (dict(embed_dim=8, num_heads=2, kernel_size=3, bias=True, rel_pos_bias=True), "older spelling of rel_pos_bias"),
        (dict(num_heads=2, kernel_size=3), "embed_dim"),
        (dict(embed_dim=8, num_heads=2, kernel_size=3, window_size=3), "window_size"),
        (dict(embed_dim=8, num_heads=2, kernel_size=3.0), "kernel_size"),
    ],
    ids=["dim-twice", "bias-twice", "no-dim", "unknown", "float-kernel"],
)
def test_arguments_of_the_wrong_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        NeighborhoodAttention2D(**arguments)


def test_dim_beside_a_positional_embed_dim():
    with pytest.raises(TypeError, match="older spelling of embed_dim"):
        NeighborhoodAttention2D(8, 2, 3, dim=8)


def test_everything_after_is_causal_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        NeighborhoodAttention2D(8, 2, 3, 1, 1, False, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(embed_dim=9), "multiple of num_heads"),
        (dict(num_heads=0), "multiple of num_heads"),
        (dict(kernel_size=0), "kernel_size"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size"),
        (dict(stride=4), "stride"),
        (dict(dilation=0), "dilation"),
        (dict(is_causal=(True,)), "is_causal"),
        (dict(attn_drop=1.5), "attn_drop"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(**(dict(embed_dim=8, num_heads=2, kernel_size=3) | arguments))


@EACH_NDIM
def test_state_dict_has_nattens_keys(ndim):
    module = MODULES[ndim](12, 3, 5, rel_pos_bias=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert shapes == {
        "rpb": (3, *(9,) * ndim),
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }
    bare = MODULES[ndim](12, 3, 5, qkv_bias=False)
    assert set(bare.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}


def test_state_dict_round_trip():
    module, other = (NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True) for _ in range(2))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 6, 7, 8)
    assert torch.equal(module(x), other(x))


@EACH_NDIM
def test_output_is_attention_of_the_packed_projection(ndim):
    channels, heads = 8, 2
    module = MODULES[ndim](channels, heads, 3, stride=2, rel_pos_bias=True, qk_scale=0.7).double()
    x = torch.randn(2, *SPATIAL[ndim], channels, dtype=torch.float64)
    thirds = zip(module.qkv.weight.split(channels), module.qkv.bias.split(channels))
    query, key, value = ((x @ weight.T + bias).unflatten(-1, (heads, -1)) for weight, bias in thirds)
    expected = OPS[ndim](query, key, value, 3, stride=2, rpb=module.rpb, scale=0.7).flatten(-2)
    torch.testing.assert_close(module(x), expected @ module.proj.weight.T + module.proj.bias)


@EACH_NDIM
def test_projection_is_read_in_place(ndim):
    class Spy(MODULES[ndim]):
        def _attend(self, qkv, **_):
            self.seen = qkv
            return qkv.select(-3, 2)

    module = Spy(8, 2, 3)
    module(torch.randn(2, *SPATIAL[ndim], 8))
    assert module.seen._is_view() and module.seen.is_contiguous()
    assert module.seen.shape == (2, *SPATIAL[ndim], 3, 2, 4)


@EACH_NDIM
def test_every_parameter_learns(ndim):
    module = MODULES[ndim](8, 2, 3, rel_pos_bias=True)
    module(torch.randn(1, *SPATIAL[ndim], 8)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("spatial", [(4, 9), (9, 4), (2, 3), (1, 1)], ids=str)
def test_small_inputs_are_padded_with_zeros_and_cropped(spatial):
    module = NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True, pad_small_inputs=True)
    nn.init.normal_(module.qkv.bias)  # what a padded token's key and value are
    x = torch.randn(2, *spatial, 8)
    padded = torch.zeros(2, max(spatial[0], 6), max(spatial[1], 6), 8)
    padded[:, : spatial[0], : spatial[1]] = x
    assert module(x).shape == x.shape
    torch.testing.assert_close(module(x), module(padded)[:, : spatial[0], : spatial[1]])


@EACH_NDIM
def test_each_axis_pads_by_its_own_size(ndim):
    kernel_size, dilation = (3, 5, 2)[:ndim], (2, 1, 3)[:ndim]
    module = MODULES[ndim](4, 1, kernel_size, dilation=dilation, pad_small_inputs=True)
    x = torch.randn(1, *(2, 3, 4)[:ndim], 4)
    assert module(x).shape == x.shape
    assert module._pad(x).shape == (1, *(6, 5, 6)[:ndim], 4)
    large = torch.randn(1, *(7, 6, 8)[:ndim], 4)
    assert module._pad(large) is large


def test_small_inputs_raise_without_padding():
    module = NeighborhoodAttention2D(8, 2, 3, dilation=2)
    with pytest.raises(ValueError, match=r"3 \* 2 > 5 on axis 1"):
        module(torch.randn(1, 6, 5, 8))


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 6, 6, 7), (1, 6, 6, 6, 8)], ids=str)
def test_inputs_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match="x must have shape"):
        NeighborhoodAttention2D(8, 2, 3)(torch.randn(shape))


def test_empty_batch():
    assert NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)(torch.randn(0, 6, 6, 8)).shape == (0, 6, 6, 8)


def test_a_causal_module_does_not_look_ahead():
    module = NeighborhoodAttention1D(8, 2, 4, is_causal=True, rel_pos_bias=True)
    x = torch.randn(1, 10, 8)
    changed = x.clone()
    changed[:, 6:] += 1
    before, after = module(x), module(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_attention_dropout_acts_in_training_only():
    x = torch.randn(1, 6, 6, 8)
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True, attn_drop=0.5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    everything = NeighborhoodAttention2D(8, 2, 3, attn_drop=1.0)
    assert torch.equal(everything(x), everything.proj.bias.expand_as(x))


def test_output_dropout_acts_in_training_only():
    x = torch.randn(1, 6, 6, 8)
    module = NeighborhoodAttention2D(8, 2, 3, proj_drop=1.0)
    assert not module(x).any()
    assert module.eval()(x).all()


def test_table_starts_normal_with_deviation_one_fiftieth():
    rpb = NeighborhoodAttention2D(64, 64, 13, rel_pos_bias=True).rpb
    assert abs(rpb.std() - 0.02) < 1e-3
    assert abs(rpb.mean()) < 1e-3


def test_autocast_computes_in_bfloat16_and_keeps_parameters():
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.randn(1, 6, 6, 8))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert module.rpb.grad.dtype == torch.float32


def test_repr_names_what_differs_from_the_defaults():
    plain = repr(NeighborhoodAttention2D(8, 2, 3))
    assert "NeighborhoodAttention2D(\n  8, num_heads=2, kernel_size=3, rel_pos_bias=False\n" in plain
    module = NeighborhoodAttention2D(8, 2, (3, 5), 2, (1, 4), (True, False), qk_scale=1.0, attn_drop=0.1, pad_small_inputs=True)
    for part in (
        "kernel_size=(3, 5)",
        "stride=2",
        "dilation=(1, 4)",
        "is_causal=(True, False)",
        "qk_scale=1",
        "attn_drop=0.1",
        "pad_small_inputs=True",
    ):
        assert part in repr(module)

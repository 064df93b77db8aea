"""natrpb.explain: its numbers against brute force and the ops, and that its figures draw."""

from __future__ import annotations

import itertools

import pytest
import torch

import natrpb
from natrpb import explain, rpb
from natrpb.patterns import neighborhood_pattern, window_pattern

PATTERNS = [
    ((9,), neighborhood_pattern(1, 4, dilation=2)),
    ((6, 7), neighborhood_pattern(2, (3, 5), stride=(2, 1))),
    ((6, 7), neighborhood_pattern(2, 3, is_causal=(True, False))),
    ((5, 6), window_pattern(2, (3, 4), (1, 2))),
    ((3, 4, 3), neighborhood_pattern(3, (2, 3, 2))),
]


@pytest.mark.parametrize(("spatial", "pattern"), PATTERNS, ids=str)
def test_index_map_holds_what_the_op_reads(spatial, pattern):
    """Keys and values are one-hot and the table counts up, so the op itself says who is seen with which entry."""
    count = torch.Size(spatial).numel()
    table = torch.arange(1, 1 + torch.Size(pattern.rpb_shape).numel(), dtype=torch.float64).view(1, *pattern.rpb_shape)
    silent = torch.zeros(1, *spatial, 1, 1, dtype=torch.float64)
    value = torch.eye(count, dtype=torch.float64).view(1, *spatial, 1, count)
    out, lse = natrpb.ops.local_attention(silent, silent, value, table, pattern, 1.0)
    scores = out.log() + lse[..., None]  # [1, *spatial, 1, count], log of zero where the key is not seen
    for query in itertools.product(*map(range, spatial)):
        index = explain.bias_index_map(pattern, spatial, query)
        seen = index[..., 0] >= 0
        flat = torch.zeros(spatial, dtype=torch.int64)
        for axis, size in enumerate(pattern.rpb_shape):
            flat = flat * size + index[..., axis]
        expected = torch.where(seen, (1 + flat).double(), -torch.inf)
        torch.testing.assert_close(scores[(0, *query, 0)].view(spatial), expected)


def test_text_shows_the_window_stopping_at_the_border():
    text = explain.explain_text(neighborhood_pattern(1, 3), (6,), (5,))
    assert text.splitlines()[-1].split() == [".", ".", ".", "0", "1", "[2]"]


@pytest.mark.parametrize("query", [(0, 0), (3, 6), (5, 2)])
def test_attention_weights_are_the_softmax_the_module_uses(query):
    torch.manual_seed(0)
    module = natrpb.NeighborhoodAttention2D(12, 3, 3, dilation=2, rel_pos_bias=True).double()
    module.proj.weight.data.copy_(torch.eye(12))
    module.proj.bias.data.zero_()
    x = torch.randn(2, 6, 7, 12, dtype=torch.float64)
    weights = explain.attention_weights(module, x, query)  # [B, heads, H, W]
    value = module.qkv(x).unflatten(-1, (3, 3, 4))[..., 2, :, :]
    expected = torch.einsum("bhij,bijhd->bhd", weights, value).flatten(1)
    torch.testing.assert_close(module(x)[:, query[0], query[1]], expected)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 3, dtype=torch.float64))


def test_attention_inputs_keeps_every_layer():
    model = natrpb.create_model("nat_mini", depths=(1, 2, 1, 1), num_classes=3)
    inputs = explain.attention_inputs(model.eval(), torch.randn(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in inputs.values()] == [(16, 16, 64), (8, 8, 128), (8, 8, 128), (4, 4, 256), (2, 2, 512)]


def test_bad_positions_and_modules_are_named():
    pattern = neighborhood_pattern(2, 3)
    with pytest.raises(ValueError, match="query"):
        explain.bias_index_map(pattern, (5, 5), (5, 0))
    with pytest.raises(ValueError, match="kernel_size"):
        explain.explain_text(pattern, (2, 5), (0, 0))
    with pytest.raises(TypeError, match="module"):
        explain.attention_weights(torch.nn.Linear(3, 3), torch.zeros(1, 5, 5, 3), (0, 0))


def test_figures_draw(tmp_path):
    pytest.importorskip("matplotlib")
    figure = explain.neighborhood_figure(window_pattern(2, 4, 2), (9, 9), (0, 8))
    figure.savefig(tmp_path / "neighborhood.png")
    assert (tmp_path / "neighborhood.png").stat().st_size > 5000
    assert rpb.nat_index((9, 9), 3).shape == (81, 9)

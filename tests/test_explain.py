"""natrpb.explain: numbers against the brute-force definition and the modules, text and figures against the numbers."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import nn

import natrpb
from natrpb import explain
from natrpb.patterns import neighborhood_pattern, window_pattern

from . import bruteforce
from .support import close

PATTERNS = [
    pytest.param(neighborhood_pattern(1, 3), (7,), id="1d"),
    pytest.param(neighborhood_pattern(1, 4, stride=3, dilation=2, is_causal=True), (11,), id="1d-causal-strided"),
    pytest.param(neighborhood_pattern(2, 3), (3, 5), id="2d-K-equals-L"),
    pytest.param(neighborhood_pattern(2, (3, 4), (1, 2), (2, 1), (False, True)), (7, 6), id="2d-everything"),
    pytest.param(window_pattern(2, 3), (6, 7), id="2d-window"),
    pytest.param(window_pattern(2, (3, 4), (1, 2)), (5, 7), id="2d-window-shifted"),
    pytest.param(neighborhood_pattern(3, 2, dilation=(1, 2, 1)), (3, 4, 3), id="3d"),
]


class TestBiasIndexMap:
    @pytest.mark.parametrize(("pattern", "spatial"), PATTERNS)
    def test_every_query(self, pattern, spatial):
        expected = torch.full((*spatial, *spatial, len(spatial)), -1)
        for query, key, entry in bruteforce.pairs(pattern, spatial):
            expected[(*query, *key)] = torch.tensor(entry)
        for query in itertools.product(*map(range, spatial)):
            assert torch.equal(explain.bias_index_map(pattern, spatial, query), expected[query])

    @pytest.mark.parametrize(
        ("spatial", "query", "sentence"),
        [
            ((7, 7), (7, 0), r"query must lie in the map, 0 to 6 on axis 0, got 7"),
            ((7, 7), (0, -1), r"0 to 6 on axis 1, got -1"),
            ((7, 7), (0,), r"query must be one int or 2 of them, got 1"),
            ((7,), (0, 0), r"spatial must be one int or 2 of them, got 1"),
            ((7, 2), (0, 0), r"kernel_size \* dilation must not exceed .* got 3 \* 1 > 2 on axis 1"),
        ],
    )
    def test_refuses(self, spatial, query, sentence):
        with pytest.raises(ValueError, match=sentence):
            explain.bias_index_map(neighborhood_pattern(2, 3), spatial, query)


class TestText:
    def test_one_axis(self):
        text = explain.explain_text(neighborhood_pattern(1, 3, dilation=2), (8,), (5,))
        assert text.splitlines() == [
            "neighborhood attention, kernel size 3, dilation 2, on a map of 8",
            "query 5 sees 3 keys; each stands as its index into the bias table (0 to 4)",
            "",
            "  0   1   2   3   4   5   6   7",
            "  .   .   .   1   .  [2]  .   3",
        ]

    def test_two_axes_in_the_corner(self):
        text = explain.explain_text(neighborhood_pattern(2, (2, 3)), (3, 4), (0, 3))
        assert text.splitlines()[3:] == [
            "    0     1     2     3",
            "0   .    1,0   1,1  [1,2]",
            "1   .    2,0   2,1   2,2",
            "2   .     .     .     .",
        ]

    def test_planes_of_three_axes_without_empty_ones(self):
        text = explain.explain_text(neighborhood_pattern(3, 2, dilation=(2, 1, 1)), (6, 4, 4), (1, 2, 2))
        assert [line for line in text.splitlines() if line.startswith("plane")] == ["plane 1 of axis 0", "plane 3 of axis 0"]
        assert text.count("[1,1,1]") == 1

    def test_long_axes_are_cropped(self):
        lines = explain.explain_text(neighborhood_pattern(2, 5), (56, 99), (55, 40)).splitlines()
        assert lines[3].split() == ["37", "38", "39", "40", "41", "42", "43"]
        assert [line.split()[0] for line in lines[4:]] == ["50", "51", "52", "53", "54", "55"]

    @pytest.mark.parametrize(("pattern", "spatial"), PATTERNS)
    def test_shows_every_key(self, pattern, spatial):
        query = tuple(length // 2 for length in spatial)
        index = explain.bias_index_map(pattern, spatial, query)
        keys = [",".join(map(str, entry)) for entry in index.flatten(0, -2).tolist() if entry[0] >= 0]
        own = ",".join(map(str, index[query].tolist()))
        expected = [f"[{key}]" if key == own else key for key in keys]
        picture = explain.explain_text(pattern, spatial, query).splitlines()[3:]
        if len(spatial) == 1:
            words = [word for word in picture[1].split() if word != "."]
        else:
            rows = [line.split()[1:] for line in picture if line[:1].isdigit() or line.strip()[:1].isdigit()]
            words = [word for row in rows for word in row if "," in word]
        assert words == expected


MODULES = [
    pytest.param(natrpb.NeighborhoodAttention1D, dict(kernel_size=4, stride=2, is_causal=True), (9,), id="1d-causal"),
    pytest.param(natrpb.NeighborhoodAttention2D, dict(kernel_size=3), (5, 4), id="2d"),
    pytest.param(natrpb.NeighborhoodAttention2D, dict(kernel_size=(3, 2), dilation=(2, 1), stride=(1, 2)), (7, 5), id="2d-all"),
    pytest.param(natrpb.NeighborhoodAttention2D, dict(kernel_size=5, pad_small_inputs=True), (3, 6), id="2d-padded"),
    pytest.param(natrpb.NeighborhoodAttention3D, dict(kernel_size=2, is_causal=(True, False, False)), (3, 2, 4), id="3d"),
]


class TestWeights:
    @pytest.mark.parametrize("rel_pos_bias", [True, False])
    @pytest.mark.parametrize(("kind", "options", "spatial"), MODULES)
    def test_weights_give_the_modules_output(self, kind, options, spatial, rel_pos_bias):
        # qkv_bias=False: padded tokens have zero values, so that cropping their weights away changes no sum.
        module = kind(12, 3, rel_pos_bias=rel_pos_bias, qkv_bias=False, **options).double()
        if rel_pos_bias:
            nn.init.normal_(module.rpb)
        x = torch.randn(2, *spatial, 12, dtype=torch.float64)
        value = module.qkv(x).unflatten(-1, (3, 3, 4)).select(-3, 2)  # [B, *, h, d]
        expected = module(x)
        for query in itertools.product(*map(range, spatial)):
            weights = explain.attention_weights(module, x, query)
            assert weights.shape == (2, 3, *spatial)
            out = torch.einsum("bhn,bnhd->bhd", weights.flatten(2), value.flatten(1, -3))
            close(module.proj(out.flatten(1)), expected[(slice(None), *query)])

    def test_only_keys_of_the_query_have_weight(self):
        module = natrpb.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True)
        weights = explain.attention_weights(module, torch.randn(1, 7, 8, 8), (0, 7))
        seen = explain.bias_index_map(neighborhood_pattern(2, 3, dilation=2), (7, 8), (0, 7))[..., 0] >= 0
        assert torch.equal(weights[0] > 0, seen.expand(2, -1, -1))
        close(weights.sum((-2, -1)), torch.ones(1, 2), 1e-6)
        assert not weights.requires_grad

    def test_half_precision_is_normalised_in_fp32(self):
        module = natrpb.NeighborhoodAttention1D(8, 2, 5).bfloat16()
        weights = explain.attention_weights(module, torch.randn(1, 9, 8).bfloat16(), (4,))
        assert weights.dtype == torch.float32
        close(weights.sum(-1), torch.ones(1, 2), 1e-6)

    def test_refuses(self):
        module = natrpb.NeighborhoodAttention2D(8, 2, 3)
        with pytest.raises(TypeError, match="module must be a NeighborhoodAttention1D, 2D or 3D, got Linear"):
            explain.attention_weights(nn.Linear(8, 8), torch.randn(1, 5, 5, 8), (0, 0))
        with pytest.raises(ValueError, match=r"x must have shape \[B, 2 spatial axes, 8\], got \[5, 5, 8\]"):
            explain.attention_weights(module, torch.randn(5, 5, 8), (0, 0))
        with pytest.raises(ValueError, match=r"query must lie in the map of \(5, 5\), got \(0, 5\)"):
            explain.attention_weights(module, torch.randn(1, 5, 5, 8), (0, 5))


class TestInputs:
    def test_of_a_model(self):
        model = natrpb.models.NAT(embed_dim=16, depths=(1, 2), num_heads=(2, 4), mlp_ratio=1, kernel_size=3, num_classes=2)
        inputs = explain.attention_inputs(model.eval(), torch.randn(2, 3, 32, 24))
        assert {name: list(x.shape) for name, x in inputs.items()} == {
            "levels.0.blocks.0.attn": [2, 8, 6, 16],
            "levels.1.blocks.0.attn": [2, 4, 3, 32],
            "levels.1.blocks.1.attn": [2, 4, 3, 32],
        }
        attention = model.get_submodule("levels.1.blocks.1.attn")
        assert not attention._forward_pre_hooks
        assert explain.attention_weights(attention, inputs["levels.1.blocks.1.attn"], (3, 2)).shape == (2, 4, 4, 3)

    def test_hooks_go_when_the_model_fails(self):
        module = natrpb.NeighborhoodAttention1D(8, 2, 5)
        with pytest.raises(ValueError, match="kernel_size"):
            explain.attention_inputs(module, torch.randn(1, 2, 8))
        assert not module._forward_pre_hooks


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("matplotlib")
class TestFigures:
    @pytest.mark.parametrize(("pattern", "spatial"), PATTERNS)
    def test_neighborhood_shows_every_key_where_it_is(self, pattern, spatial):
        query = tuple(length - 1 for length in spatial)
        index = explain.bias_index_map(pattern, spatial, query)
        planes = index[None] if len(spatial) < 3 else index[(index[..., 0] >= 0).flatten(1).any(1)]
        planes = planes[:, None] if len(spatial) == 1 else planes
        figure = explain.neighborhood_figure(pattern, spatial, query)
        for panel, plane in zip(figure.axes, planes, strict=False):
            drawn = {text.get_position(): text.get_text() for text in panel.texts}
            keys = (plane[..., 0] >= 0).nonzero().tolist()
            assert drawn == {(x, y): ",".join(map(str, plane[y, x].tolist())) for y, x in keys}
        outlines = [patch.get_xy() for panel in figure.axes for patch in panel.patches]
        assert outlines == [(query[-1] - 0.5, (0, *query)[-2] - 0.5)]

    def test_bias_tables(self, tmp_path):
        tables = {"first": torch.randn(2, 5, 5), "second": torch.randn(3, 3, 7, requires_grad=True)}
        figure = explain.bias_table_figure(tables, dilation=[1, 2])
        titles = [panel.get_title() for panel in figure.axes if panel.images]
        assert titles == [f"first, head {head}" for head in range(2)] + [f"second, head {head}" for head in range(3)]
        images = [panel.images[0] for panel in figure.axes if panel.images]
        close(torch.tensor(images[3].get_array()), tables["second"][1].detach(), 1e-6)
        assert list(images[0].get_extent()) == [-2.5, 2.5, 2.5, -2.5]
        assert list(images[2].get_extent()) == [-7, 7, 3, -3]
        assert len({image.get_clim() for image in images}) == 1
        figure.savefig(tmp_path / "tables.png")
        assert (tmp_path / "tables.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("tables", [{}, {"a": torch.zeros(2, 5)}], ids=["none", "rank"])
    def test_bias_tables_refuse(self, tables):
        with pytest.raises(ValueError, match=r"tables must hold tensors \[heads, 2 K_0 - 1, 2 K_1 - 1\]"):
            explain.bias_table_figure(tables)

    def test_bias_tables_refuse_dilations(self):
        with pytest.raises(ValueError, match=r"dilation must be one int or one per table \(1\), got 2"):
            explain.bias_table_figure({"a": torch.zeros(2, 5, 5)}, dilation=[1, 2])

    def test_attention(self, tmp_path):
        pattern = neighborhood_pattern(2, 3)
        queries = [(0, 0), (3, 5)]
        seen = torch.stack([explain.bias_index_map(pattern, (4, 6), query)[..., 0] >= 0 for query in queries])
        weights = torch.rand(2, 3, 4, 6) * seen[:, None]
        figure = explain.attention_figure(torch.rand(16, 24, 3), weights, queries, pattern, "a title")
        overview, *panels = [panel for panel in figure.axes if panel.images]
        assert [text.get_text() for text in overview.texts] == ["1", "2"]
        assert len(panels) == 2 * (1 + 3)
        share = torch.tensor(panels[2].images[-1].get_array())  # first query, second head; every token is 4 x 4 pixels
        close(share[::4, ::4], weights[0, 1] / weights[0, 1].max(), 1e-6)
        figure.savefig(tmp_path / "attention.png")
        assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("image", "weights", "sentence"),
        [
            ((3, 8, 8), (1, 2, 4, 4), r"image must have shape \[H, W, 3\], got \[3, 8, 8\]"),
            ((8, 8, 3), (2, 2, 4, 4), r"weights must have shape \[1 queries, heads, H, W\], got \[2, 2, 4, 4\]"),
            ((9, 8, 3), (1, 2, 4, 4), r"image must have the map's sides, \[4, 4\], times one factor, got \[9, 8\]"),
        ],
    )
    def test_attention_refuses(self, image, weights, sentence):
        with pytest.raises(ValueError, match=sentence):
            explain.attention_figure(torch.rand(image), torch.rand(weights), [(0, 0)], neighborhood_pattern(2, 3))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib \(pip install matplotlib\)"):
        explain.neighborhood_figure(neighborhood_pattern(1, 3), (5,), (0,))

"""Bias tables: conversion between conventions, dense bias, resizing, coordinates, and what they say on bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from natrpb import rpb

from .support import close

WINDOWS = [(2, 2), (3, 4), (7, 7), (1, 5), (2, 3, 4), (6,)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_nat_and_swin_tables_convert_both_ways(window):
    table = torch.randn(math.prod(2 * w - 1 for w in window), 3)
    nat = rpb.swin_to_nat(table, window)
    assert nat.shape == (3, *(2 * w - 1 for w in window))
    assert torch.equal(rpb.nat_to_swin(nat), table)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_swin_index_is_query_minus_key(window):
    index = rpb.swin_index(window)
    positions = list(itertools.product(*map(range, window)))
    for (n, query), (m, key) in itertools.product(enumerate(positions), repeat=2):
        flat = 0
        for q, k, w in zip(query, key, window):
            flat = flat * (2 * w - 1) + q - k + w - 1
        assert index[n, m] == flat


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_dense_bias_of_a_converted_table_is_swins_gather(window):
    table = torch.randn(math.prod(2 * w - 1 for w in window), 2)
    expected = table[rpb.swin_index(window)].permute(2, 0, 1)
    assert torch.equal(rpb.dense_bias(rpb.swin_to_nat(table, window), window), expected)


def test_square_window_is_found_from_the_rows():
    table = torch.randn(169, 4)
    assert torch.equal(rpb.swin_to_nat(table), rpb.swin_to_nat(table, (7, 7)))
    assert torch.equal(rpb.swin_to_nat(table, 7), rpb.swin_to_nat(table, (7, 7)))


def test_conversion_and_dense_bias_are_differentiable():
    table = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rpb.dense_bias(rpb.swin_to_nat(t), 2), table)
    assert torch.autograd.gradcheck(lambda t: rpb.nat_to_swin(rpb.swin_to_nat(t)), table)


@pytest.mark.parametrize("spatial", [(9,), (5, 6), (3, 4, 5)], ids=str)
def test_nat_index_has_one_row_per_query_and_one_column_per_slot(spatial):
    index = rpb.nat_index(spatial, 3)
    assert index.dtype == torch.int64 and index.shape == (math.prod(spatial), 3 ** len(spatial))
    assert index.min() >= 0 and index.max() < 5 ** len(spatial)


def test_nat_index_takes_an_int_for_one_axis():
    assert torch.equal(rpb.nat_index(9, 4, dilation=2), rpb.nat_index((9,), (4,), (2,)))


def test_nat_index_of_a_causal_axis_never_looks_ahead():
    assert rpb.nat_index(8, 4, is_causal=True).max() == 3


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_keeps_constants_dtype_and_identity(mode):
    assert rpb.resize(torch.ones(2, 13, 13), 11, mode).allclose(torch.ones(2, 21, 21))
    table = torch.randn(2, 13, 13)
    assert torch.equal(rpb.resize(table, 7, mode), table)
    half = rpb.resize(table.bfloat16(), 5, mode)
    assert half.dtype == torch.bfloat16 and half.shape == (2, 9, 9)
    assert rpb.resize(table.double(), (5, 9), mode).shape == (2, 9, 17)


def test_resize_commutes_with_the_flip_between_conventions():
    table = torch.randn(3, 13, 13, dtype=torch.float64)
    close(rpb.resize(table.flip(1, 2), 11), rpb.resize(table, 11).flip(1, 2))


def test_resize_is_differentiable():
    table = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rpb.resize(t, (3, 4)), table)


def test_log_spaced_coordinates_follow_the_formula():
    coords = rpb.log_spaced_coords((3, 4))
    assert coords.shape == (5, 7, 2) and coords.dtype == torch.float32
    for row, column in itertools.product(range(5), range(7)):
        for axis, (step, window) in enumerate([(row - 2, 3), (column - 3, 4)]):
            scaled = 8 * step / (window - 1)
            expected = math.copysign(math.log2(abs(scaled) + 1) / 3, scaled)
            assert coords[row, column, axis].item() == pytest.approx(expected, abs=1e-6)


def test_log_spaced_coordinates_can_be_relative_to_a_pretrained_window():
    wide = rpb.log_spaced_coords(12, 8)
    assert wide[11, 11].tolist() == [0, 0]
    assert wide[11 + 7, 11].tolist() == pytest.approx([math.log2(9) / 3, 0.0])
    assert rpb.log_spaced_coords(1).tolist() == [[[0, 0]]]


BAD_CALLS = {
    "rows-even": (lambda: rpb.swin_to_nat(torch.zeros(168, 3)), ValueError, "168 rows"),
    "rows-square-of-even": (lambda: rpb.swin_to_nat(torch.zeros(16, 3)), ValueError, "16 rows"),
    "rows-other-window": (lambda: rpb.swin_to_nat(torch.zeros(169, 3), (7, 8)), ValueError, "window of .* needs 195"),
    "swin-table-rank": (lambda: rpb.swin_to_nat(torch.zeros(169)), ValueError, "table must have shape"),
    "nat-table-rank": (lambda: rpb.nat_to_swin(torch.zeros(169)), ValueError, "table must have shape"),
    "dense-other-window": (lambda: rpb.dense_bias(torch.zeros(2, 5, 5), 4), ValueError, "rpb must have shape"),
    "dense-rank": (lambda: rpb.dense_bias(torch.zeros(2, 5, 5), (3, 3, 3)), ValueError, "window_size must be"),
    "resize-rank": (lambda: rpb.resize(torch.zeros(5, 5), 4), ValueError, "rpb must have shape"),
    "resize-mode": (lambda: rpb.resize(torch.zeros(2, 5, 5), 4, mode="nearest"), ValueError, "mode must be"),
    "resize-float": (lambda: rpb.resize(torch.zeros(2, 5, 5), 2.5), TypeError, "kernel_size must be"),
    "resize-zero": (lambda: rpb.resize(torch.zeros(2, 5, 5), 0), ValueError, "kernel_size must be"),
    "coords-zero": (lambda: rpb.log_spaced_coords(0), ValueError, "window_size must be"),
    "coords-text": (lambda: rpb.log_spaced_coords("7"), TypeError, "window_size must be"),
    "swin-index-zero": (lambda: rpb.swin_index(0), ValueError, "window_size must be"),
    "swin-index-negative": (lambda: rpb.swin_index((3, -1)), ValueError, "window_size must be"),
    "nat-index-too-short": (lambda: rpb.nat_index(5, 7), ValueError, r"kernel_size \* dilation"),
    "nat-index-stride": (lambda: rpb.nat_index(9, 3, stride=4), ValueError, "stride must be"),
    "nat-index-rank": (lambda: rpb.nat_index((9, 9), (3, 3, 3)), ValueError, "kernel_size must be"),
    "nat-index-causal": (lambda: rpb.nat_index(9, 3, is_causal=(True, False)), ValueError, "is_causal must be"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()

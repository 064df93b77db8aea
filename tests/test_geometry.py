"""Who sees whom: the compiled geometry and the reference against enumeration, NAT's CUDA formulas and golden tables."""

from __future__ import annotations

import pytest
import torch

from natrpb import reference, rpb
from natrpb.patterns import CAUSAL, NEIGHBORHOOD, WINDOW, Pattern, neighborhood_pattern, window_pattern

from . import bruteforce
from .support import close, needs_compiled

LENGTHS = range(1, 21)
KINDS = {"neighborhood": NEIGHBORHOOD, "causal": CAUSAL, "window": WINDOW}


def axes_of_length(length: int, kind: int):
    """Every (kernel_size, stride, dilation, kind, shift) that fits an axis; windows may be larger than the axis."""
    if kind == WINDOW:
        for window in range(1, length + 3):
            for dilation in (1, 2, 3):
                for shift in range(window):
                    yield window, 1, dilation, kind, shift
        return
    for kernel_size in range(1, length + 1):
        for dilation in range(1, length // kernel_size + 1):
            for stride in range(1, kernel_size + 1):
                yield kernel_size, stride, dilation, kind, 0


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_keys_are_the_enumerated_ones(length, kind):
    for axis in axes_of_length(length, kind):
        kernel_size, _, dilation, *_ = axis
        keys, rel, valid = reference.axis_keys(length, *axis)
        assert keys.shape == rel.shape == valid.shape == (length, kernel_size)
        assert ((keys >= 0) & (keys < length)).all() and ((rel >= 0) & (rel <= 2 * kernel_size - 2)).all(), axis
        rows = zip(keys.tolist(), rel.tolist(), valid.tolist())
        for query, ((row, entries, real), expected) in enumerate(zip(rows, bruteforce.neighborhoods(length, *axis))):
            count = len(expected)
            assert query in expected, "a query sees itself"
            assert row[:count] == list(expected) and real == [True] * count + [False] * (kernel_size - count), axis
            assert entries[:count] == [(key - query) // dilation + kernel_size - 1 for key in expected], axis


@needs_compiled
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_compiled_keys_queries_and_table_index_are_the_enumerated_ones(length, kind):
    from natrpb import _core

    for axis in axes_of_length(length, kind):
        kernel_size, _, dilation, *_ = axis
        compiled = _core.Axis(length, *axis)
        expected = bruteforce.neighborhoods(length, *axis)
        seen_by: list[list[int]] = [[] for _ in range(length)]
        for query, keys in enumerate(expected):
            assert compiled.keys(query) == (keys[0], keys[-1], dilation), (axis, query)
            assert keys == tuple(range(keys[0], keys[-1] + 1, dilation)), "keys are evenly spaced"
            for key in keys:
                seen_by[key].append(query)
                assert compiled.bias_index(query, key) == (key - query) // dilation + kernel_size - 1, (
                    axis,
                    query,
                    key,
                )
        for key, queries in enumerate(seen_by):
            first, last, step = compiled.queries(key)
            assert list(range(first, last + 1, step)) == queries, (axis, key)


def naive_cuda(length: int, kernel_size: int, dilation: int, query: int) -> tuple[int, int]:
    """First key and first table index of a query, as NATTEN's naive CUDA kernels compute them (odd kernel sizes)."""
    radius = kernel_size // 2
    if dilation == 1:
        past_end = query + radius >= length
        start = max(query - radius, 0) + past_end * (length - query - radius - 1)
        bias = radius + (query < radius) * (radius - query) + past_end * (length - query - 1 - radius)
        return start, bias
    if query - radius * dilation < 0:
        return query % dilation, kernel_size - 1 - query // dilation
    if query + radius * dilation >= length:
        group, whole = query % dilation, length // dilation * dilation
        rest = length - whole
        if group < rest:
            start = length - rest + group - 2 * radius * dilation
        else:
            start = whole + group - kernel_size * dilation
        return start, (length - query - 1) // dilation
    return query - radius * dilation, radius


def test_keys_and_table_index_are_those_of_nats_cuda_kernels():
    for length in (*LENGTHS, 37, 56):
        for kernel_size in range(3, length + 1, 2):
            for dilation in range(1, length // kernel_size + 1):
                keys, rel, _ = reference.axis_keys(length, kernel_size, 1, dilation, NEIGHBORHOOD, 0)
                first = list(zip(keys[:, 0].tolist(), rel[:, 0].tolist()))
                assert first == [naive_cuda(length, kernel_size, dilation, query) for query in range(length)]


def test_inverse_of_the_neighborhood_is_that_of_nats_cuda_kernels():
    """Queries of key j, for odd K: from (j < K d ? j mod d : j - N d) by d to (j >= L - K d ? L : j + (N + 1) d)."""
    for length in LENGTHS:
        for kernel_size in range(3, length + 1, 2):
            for dilation in range(1, length // kernel_size + 1):
                expected = bruteforce.neighborhoods(length, kernel_size, 1, dilation, NEIGHBORHOOD, 0)
                radius, reach = kernel_size // 2, kernel_size * dilation
                for key in range(length):
                    first = key % dilation if key < reach else key - radius * dilation
                    end = length if key >= length - reach else key + (radius + 1) * dilation
                    assert [q for q in range(length) if key in expected[q]] == list(range(first, end, dilation))


@pytest.mark.parametrize(
    ("spatial", "pattern"),
    [
        ((5, 6), neighborhood_pattern(2, (3, 4), (2, 1), 1, (False, True))),
        ((7, 6), neighborhood_pattern(2, (3, 2), 1, (2, 3))),
        ((3, 4, 5), neighborhood_pattern(3, (2, 3, 4), 1, 1, (True, False, False))),
        ((5, 7), window_pattern(2, (2, 3), (1, 2))),
    ],
    ids=["stride-causal", "dilation", "volume", "window"],
)
def test_axes_combine_row_major(spatial, pattern):
    keys, rel, valid = reference.pattern_index(pattern, spatial)
    slots = bruteforce.slots(pattern, spatial)
    entry = bruteforce.dense(pattern, spatial)[1]
    assert valid.tolist() == [[key is not None for key in row] for row in slots]
    for query, row in enumerate(slots):
        for slot, key in enumerate(row):
            if key is not None:
                assert keys[query, slot] == key and rel[query, slot] == entry[query, key]


def test_nat_index_is_the_legacy_table_flipped_over_the_queries(golden):
    legacy = golden["nat_bias_index_unflipped_kernel3_size5x5"].long()
    assert torch.equal(rpb.nat_index((5, 5), 3), legacy.flip(0))


def test_nat_index_counts_from_the_last_entry_at_the_first_query():
    assert rpb.nat_index(9, 3)[[0, 4, 8], 0].tolist() == [2, 1, 0]


@pytest.mark.parametrize("window", [(2, 2), (3, 3), (3, 4)], ids=str)
def test_swin_index_is_the_official_one(golden, window):
    expected = golden[f"swin_relative_position_index_{window[0]}x{window[1]}"].long()
    assert torch.equal(rpb.swin_index(window), expected)


def test_swin_index_takes_an_int_for_a_square(golden):
    assert torch.equal(rpb.swin_index(3), golden["swin_relative_position_index_3x3"].long())


def test_converted_swin_table_gathers_the_official_bias(golden):
    table, expected = golden["swin_bias_table_3x3_by_flat_index"], golden["swin_bias_gathered_3x3"]
    dense = rpb.dense_bias(rpb.swin_to_nat(table[:, None]), 3)
    assert torch.equal(dense[0], expected)


@pytest.mark.parametrize("size", [(6, 6), (9, 6)], ids=["6x6", "9x6"])
def test_shifted_windows_are_the_rolled_and_masked_ones(golden, size):
    """Roll by -1, partition into 3x3 windows, mask: the pairs left over are those of our shifted pattern, unrolled."""
    window, shift, (height, width) = 3, 1, size
    masks = {name: golden[f"swin_shift_mask_window3_displacement1_{name}"] == 0 for name in MASKS.values()}
    position = torch.arange(height * width).view(size).roll((-shift, -shift), (0, 1))
    expected = torch.zeros(height * width, height * width, dtype=torch.bool)
    for row in range(height // window):
        for column in range(width // window):
            tile = position[row * window : (row + 1) * window, column * window : (column + 1) * window].flatten()
            name = MASKS.get((row == height // window - 1, column == width // window - 1))
            pairs = masks[name] if name else torch.ones(window**2, window**2, dtype=torch.bool)
            expected[tile[:, None], tile] = pairs
    keys, _, valid = reference.pattern_index(window_pattern(2, window, shift), size)
    ours = torch.zeros_like(expected)
    ours[torch.arange(len(keys))[:, None].expand_as(keys)[valid], keys[valid]] = True
    assert torch.equal(ours, expected)


MASKS = {(True, False): "upper_lower", (False, True): "left_right", (True, True): "both"}


def test_log_spaced_coordinates_are_the_official_ones(golden):
    expected = golden["swinv2_log_spaced_coords_window2x2"][0]
    close(rpb.log_spaced_coords(2), expected, 1e-4)


def test_resize_with_aligned_corners_is_the_official_bicubic(golden):
    small, large = golden["bicubic_align_corners_3x3"][0], golden["bicubic_align_corners_5x5"][0]
    close(rpb.resize(small, 3, align_corners=True), large, 2e-4)


def test_strided_neighborhood_with_stride_k_is_a_window():
    for kernel_size in range(1, 8):
        for blocks in (1, 2, 3):
            length = kernel_size * blocks
            strided = bruteforce.neighborhoods(length, kernel_size, kernel_size, 1, NEIGHBORHOOD, 0)
            assert strided == bruteforce.neighborhoods(length, kernel_size, 1, 1, WINDOW, 0)


def test_pattern_of_a_call_lists_one_number_per_axis():
    assert neighborhood_pattern(2, 7, 1, (2, 3), (True, False)) == Pattern(
        (7, 7), (1, 1), (2, 3), (CAUSAL, NEIGHBORHOOD), (0, 0)
    )
    assert window_pattern(1, 4, 2) == Pattern((4,), (1,), (1,), (WINDOW,), (2,))

"""Buckets of relative positions: against Python arithmetic, against printed values, and how they are kept."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from natrpb import irpe

from .irpe_dense import TABLES, bucket_map, buckets_of

RATIOS = [1.9, 2.0, 2.5, 3.0, 20, 33]
MAPS = [(1, 1), (1, 6), (5, 1), (2, 3), (7, 5), (14, 14)]
PIECEWISE = {  # g(0), g(1), ... as the official code prints them
    1.9: [0, 1, 2, 2] + [3] * 16,
    2.0: [0, 1, 2, 2] + [3] * 6 + [4] * 10,
    2.5: [0, 1, 2, 3, 3, 3] + [4] * 8 + [5] * 6,
    3.0: [0, 1, 2, 3, 3] + [4] * 4 + [5] * 8 + [6] * 3,
}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_small_maps_by_definition(table, ratio, skip):
    for height, width in MAPS:
        ids = irpe.bucket_ids(table, height, width, skip, ratio)
        assert ids.dtype == torch.int32
        assert torch.equal(ids.long(), bucket_map(table, height, width, skip, ratio))
        assert ids.amin() >= 0 and ids.amax() < irpe.num_buckets(table, ratio, skip)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("table", TABLES)
def test_large_map_by_definition(table, ratio):
    expected = bucket_map(table, 20, 24, 0, ratio)
    assert torch.equal(irpe.bucket_ids(table, 20, 24, 0, ratio).long(), expected)
    for skip in (1, 2):
        ids = irpe.bucket_ids(table, 20, 24, skip, ratio)
        assert torch.equal(ids[skip:, skip:].long(), expected)
        extra = buckets_of(table, ratio)
        assert (ids[:skip] == extra).all() and (ids[:, :skip] == extra).all()


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_cross_is_rows_and_columns(skip):
    ids = irpe.bucket_ids("cross", 4, 6, skip, 2.5)
    assert torch.equal(ids[0], irpe.bucket_ids("cross_rows", 4, 6, skip, 2.5))
    assert torch.equal(ids[1], irpe.bucket_ids("cross_cols", 4, 6, skip, 2.5))


@pytest.mark.parametrize("ratio", PIECEWISE)
def test_piecewise_function_as_printed(ratio):
    expected = torch.tensor(PIECEWISE[ratio])
    for x in (torch.arange(20), torch.arange(20, dtype=torch.int32), torch.arange(20.0), torch.arange(20.0).double()):
        index = irpe.piecewise_index(x, *irpe.coefficients(ratio))
        assert index.dtype == torch.int64
        assert torch.equal(index, expected)
        assert torch.equal(irpe.piecewise_index(-x, *irpe.coefficients(ratio)), -expected)


def test_piecewise_function_rounds_halves_to_even_and_cuts_before_it_truncates():
    assert irpe.piecewise_index(torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5]), 4, 8, 32).tolist() == [0, 2, 0, -2, 2]
    assert irpe.piecewise_index(torch.tensor([100, -100]), 1.9, 3.8, 15.2).tolist() == [3, -3]


@pytest.mark.parametrize(
    "method, ratio, allocated, reached",
    [
        ("product", 1.9, 49, 49),
        ("product", 2.0, 81, 81),
        ("product", 2.5, 121, 81),
        ("product", 3.0, 169, 121),
        ("euclidean", 20, 81, 19),
        ("cross", 20, 81, 27),
        ("quantization", 33, 133, 50),
    ],
)
def test_bucket_counts(method, ratio, allocated, reached):
    assert irpe.num_buckets(method, ratio) == allocated
    assert irpe.num_buckets(method, ratio, skip=1) == irpe.num_buckets(method, ratio, skip=2) == allocated + 1
    ids = irpe.bucket_ids(method, 14, 14, 0, ratio)
    for one in ids if method == "cross" else [ids]:
        assert len(one.unique()) == reached


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_distance_is_near_a_rounding_tie(ratio):
    """What fp32 logarithms of different machines give rounds alike."""
    alpha, beta, gamma = irpe.coefficients(ratio)
    far = [alpha + math.log(x / alpha) / math.log(gamma / alpha) * (beta - alpha) for x in range(math.ceil(alpha + 0.01), 2000)]
    assert min(abs(y - math.floor(y) - 0.5) for y in far if y < beta + 1) > 1e-3


def test_names_and_numbers_of_methods():
    assert [int(method) for method in irpe.Method] == [0, 1, 3, 4, 41, 42]
    for names in (
        ("euc", "euclidean", 0),
        ("quant", "Quantization", 1),
        ("product", "PRODUCT", 3),
        ("cross", irpe.Method.CROSS),
    ):
        assert len({irpe.as_method(name) for name in names}) == 1
    for wrong in ("manhattan", 2, True, None, 3.0):
        with pytest.raises(ValueError, match="method must be one of"):
            irpe.as_method(wrong)


@pytest.mark.parametrize("method", ["euclidean", "quantization", "product", "cross_rows", "cross_cols"])
def test_undirected_maps_are_symmetric(method):
    directed = irpe.bucket_ids(method, 5, 7, 1)
    undirected = irpe.bucket_ids(method, 5, 7, 1, directed=False)
    assert torch.equal(undirected, undirected.t())
    is_directed = method not in ("euclidean", "quantization")
    assert torch.equal(directed, directed.t()) != is_directed
    if is_directed:
        after = torch.ones_like(directed, dtype=torch.bool)  # pairs whose offsets are not negative
        after[1:, 1:] = torch.tensor(
            [[qr >= kr and qc >= kc for kr, kc in itertools.product(range(5), range(7))]
             for qr, qc in itertools.product(range(5), range(7))]
        )  # fmt: skip
        assert torch.equal(directed[after], undirected[after])


def test_clipped_variant():
    ids = irpe.bucket_ids("product", 6, 5, ratio=1.9, clip=True)
    places = list(itertools.product(range(6), range(5)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        rows, cols = (max(-3, min(3, q - k)) + 3 for q, k in zip(query, key))
        assert ids[i, j] == rows * 7 + cols
    assert irpe.clip_index(torch.tensor([-9, -2, 0, 3, 9]), 3.8).tolist() == [-3, -2, 0, 3, 3]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="height and width must be at least 1"):
        irpe.bucket_ids("product", 0, 3)
    with pytest.raises(ValueError, match="skip at least 0"):
        irpe.bucket_ids("product", 3, 3, -1)
    for ratio in (0, -1.0, math.inf, math.nan, True, "2"):
        with pytest.raises(ValueError, match="ratio must be a positive finite number"):
            irpe.bucket_ids("product", 3, 3, ratio=ratio)
    with pytest.raises(ValueError, match="alpha and gamma"):
        irpe.piecewise_index(torch.arange(3), 2.0, 4.0, 2.0)


def test_maps_are_made_once():
    assert irpe.bucket_ids("product", 6, 4, 1) is not irpe.bucket_ids("product", 4, 6, 1)
    ids = irpe.bucket_ids("product", 6, 4, 1)
    assert ids.data_ptr() == irpe.bucket_ids("product", 6, 4, 1, device="cpu").data_ptr()
    assert irpe.bucket_ids("product", 6, 4, 1, device="meta").device.type == "meta"


def test_terms_lie_end_to_end():
    term = irpe.Term(irpe.Method.PRODUCT, *irpe.coefficients(2.0))
    turned = term._replace(transposed=True)
    maps = irpe.term_maps((term, turned), 3, 5, 1, torch.device("cpu"))
    ids = irpe.bucket_ids("product", 3, 5, 1, 2.0)
    assert torch.equal(maps[0], ids)
    assert torch.equal(maps[1], ids.t() + 82)


class TestFirstCallInsideATransform:
    """What the cache keeps must be ordinary memory, whatever the first call stood in."""

    @pytest.fixture(autouse=True)
    def empty_cache(self):
        irpe._cached_maps.cache_clear()

    def usable(self):
        ids = irpe.bucket_ids("product", 3, 4, 1)
        assert type(ids) is torch.Tensor and not ids.is_inference()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(ids)
        assert torch.equal(ids.long(), bucket_map("product", 3, 4, 1, 1.9))

    def test_inference_mode(self):
        with torch.inference_mode():
            irpe.bucket_ids("product", 3, 4, 1)
        self.usable()

    def test_fake_tensors(self):
        with FakeTensorMode():
            assert irpe.bucket_ids("product", 3, 4, 1).shape == (13, 13)
        self.usable()
        with FakeTensorMode() as mode:  # and what is there does not come in
            assert mode.is_our_fake(irpe.bucket_ids("product", 3, 4, 1))

    def test_functional_gradient(self):
        torch.func.grad(lambda x: (x * irpe.bucket_ids("product", 3, 4, 1)).sum())(torch.ones(13, 13))
        self.usable()

    def test_compile(self):
        def function(x):
            return x.sum() + irpe.bucket_ids("product", *x.shape, 1)

        compiled = torch.compile(function, backend="eager", fullgraph=True)
        for shape in ((3, 4), (4, 3), (5, 6)):
            assert torch.equal(compiled(torch.ones(shape)), function(torch.ones(shape)))
        self.usable()

    def test_default_device(self):
        with torch.device("meta"):
            irpe.bucket_ids("product", 3, 4, 1)
        self.usable()


@pytest.mark.parametrize(
    "queries, keys, distance, start", [(5, None, 2, 0), (7, 7, None, 0), (3, 8, None, 5), (4, 9, 3, 5), (6, 2, 1, 0)]
)
def test_clipped_offsets(queries, keys, distance, start):
    ids = irpe.clipped_offsets(queries, keys, distance, query_start=start)
    keys = queries if keys is None else keys
    offsets = {(i, j): j - (i + start) for i in range(queries) for j in range(keys)}
    reach = max(map(abs, offsets.values())) if distance is None else distance
    assert ids.shape == (queries, keys) and ids.dtype == torch.int32
    for (i, j), offset in offsets.items():
        assert ids[i, j] == max(-reach, min(reach, offset)) + reach


@pytest.mark.parametrize("distances", [(None, None), (1, 2), (9, 0)], ids=str)
def test_clipped_map_offsets(distances):
    ids = irpe.clipped_map_offsets(4, 3, *distances)
    rows, cols = (side if given is None else given for side, given in zip((3, 2), distances))
    for i, j in itertools.product(range(12), repeat=2):
        (qr, qc), (kr, kc) = divmod(i, 3), divmod(j, 3)
        assert ids[0, i, j] == max(-rows, min(rows, kr - qr)) + rows
        assert ids[1, i, j] == 2 * rows + 1 + max(-cols, min(cols, kc - qc)) + cols


def test_bad_offsets_are_named():
    with pytest.raises(ValueError, match="num_queries and num_keys"):
        irpe.clipped_offsets(0)
    with pytest.raises(ValueError, match="max_distance"):
        irpe.clipped_offsets(3, max_distance=-1)
    with pytest.raises(ValueError, match="dim must be even"):
        irpe.sinusoids(3, 5)


def test_sinusoids():
    table = irpe.sinusoids(4, 6)
    assert table.shape == (6, 9)
    for column, t in itertools.product(range(9), range(3)):
        angle = (4 - column) / 10000 ** (2 * t / 6)
        assert table[t, column].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[3 + t, column].item() == pytest.approx(math.cos(angle), abs=1e-6)

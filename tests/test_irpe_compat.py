"""The drop-in for the official iRPE modules."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from natrpb.compat import irpe

from .irpe_dense import bucket_map, buckets_of
from .support import close


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("name", ["euclidean", "quantization", "product", "cross_rows", "cross_cols"])
def test_bucket_ids(name, skip, dtype):
    coefficients = (2.0, 4.0, 16.0)
    method = irpe.METHOD[name.upper()]
    ids, count = irpe.get_bucket_ids_2d(method, 4, 3, skip, *coefficients, dtype=dtype)
    assert ids.dtype == dtype and torch.equal(ids.long(), bucket_map(name, 4, 3, skip, 2.0))
    assert count == buckets_of(name, 2.0) + skip
    assert irpe.get_num_buckets(method, *coefficients) == buckets_of(name, 2.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bucket_ids_are_the_callers_own(dtype):
    def ids():
        return irpe.get_bucket_ids_2d(irpe.METHOD.PRODUCT, 4, 3, 1, 2.0, 4.0, 16.0, dtype)[0]

    expected = ids().clone()
    ids().zero_()
    assert expected.any() and torch.equal(ids(), expected)


def test_cross_has_no_single_map():
    with pytest.raises(ValueError, match="CROSS_ROWS"):
        irpe.get_bucket_ids_2d(irpe.METHOD.CROSS, 3, 3, 0, 2.0, 4.0, 16.0)


def test_names_and_numbers():
    numbers = {"EUCLIDEAN": 0, "QUANT": 1, "PRODUCT": 3, "CROSS": 4, "CROSS_ROWS": 41, "CROSS_COLS": 42}
    assert all(getattr(irpe.METHOD, name) == number for name, number in numbers.items())
    assert irpe.piecewise_index(torch.arange(6), 1.9, 3.8, 15.2, torch.int32).tolist() == [0, 1, 2, 2, 3, 3]
    single = irpe.get_single_rpe_config(ratio=2.0, skip=1)
    assert (single.method, single.num_buckets) == (irpe.METHOD.PRODUCT, 82)


def test_index_function():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    index = torch.randint(7, (5, 6), dtype=torch.int32)
    y = irpe.RPEIndexFunction.apply(x, index)
    offset = torch.arange(0, 35, 7)[:, None]
    expected = x.flatten(2)[:, :, (index + offset).flatten()].view(2, 3, 5, 6)
    close(y, expected)
    dy = torch.randn_like(y)
    close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])
    assert torch.autograd.gradcheck(lambda x: irpe.RPEIndexFunction.apply(x, index), x)


def test_official_imports_find_it():
    script = """
from natrpb.compat import irpe
irpe.install()
from irpe import build_rpe, get_rpe_config
from rpe_ops.rpe_index import RPEIndexFunction
import torch
rpe_k = build_rpe(get_rpe_config(method="euc", ratio=20, skip=1), head_dim=4, num_heads=2)[1]
print(rpe_k(torch.randn(1, 2, 10, 4)).shape, RPEIndexFunction.apply.__name__)
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[0] == "torch.Size([1, 2, 10, 10]) apply"

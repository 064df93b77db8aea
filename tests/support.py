"""What several test files need: whether the compiled ops are there, and the rule for errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import natrpb

from .cases import CASES

COMPILED = bool(getattr(natrpb, "info", dict)().get("compiled", False))
needs_compiled = pytest.mark.skipif(not COMPILED, reason="natrpb was built without its compiled ops")

ON_CUDA_KERNELS = "NATRPB_LIBRARY" in os.environ or torch.get_default_device().type == "cuda"

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Plain PyTorch, the yardstick, has no fast fp16 products on a CPU: large cases run in the other three dtypes.
CASES_BY_DTYPE = [
    pytest.param(case, dtype, id=f"{case}-{dtype_id(dtype)}")
    for case in CASES
    for dtype in DTYPES
    if dtype != torch.float16 or case.size * case.head_dim < 1e5
]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Asserts equal shapes and values up to `tolerance`, absolute and relative; NaN equals NaN."""
    torch.testing.assert_close(
        actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True, check_dtype=False, check_stride=False
    )


def rounding(dtype: torch.dtype) -> float:
    """What rounding may change, absolute and relative, where kernels may choose among their paths by the values they meet."""
    return 1e-6 if dtype.itemsize > 2 else 4 * torch.finfo(dtype).eps


def at_most_twice_the_error(name: str, ours: Tensor, plain: Tensor, exact: Tensor, floor: int | None = None) -> None:
    """Asserts that `ours` errs at most twice as much as the plain PyTorch expression of the same dtype.

    A floor comes on top, in units in the last place of the largest exact value, because `plain` may be exact by luck:
    1 for 16-bit types, where rounding the result is all that may differ, 8 where every sum rounds on its own.

    Args:
        ours, plain: results in the same dtype.
        exact: the fp64 result for the same (already rounded) inputs.
        floor: another one, in the same units.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{name}: {ours.dtype}, expected {plain.dtype}"
    if not exact.numel():
        return
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    if floor is None:
        floor = 1 if ours.dtype.itemsize == 2 else 8
    allowed += floor * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def run_with_isa(isa: str, script: str) -> str:
    """What a Python process prints whose kernels use `isa`; the choice is made once per process."""
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"NATRPB_ISA": isa},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()

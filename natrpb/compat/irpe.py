"""Drop-in for the modules `irpe` and `rpe_ops.rpe_index` of the official iRPE code (https://github.com/microsoft/Cream, MIT).

    from natrpb.compat import irpe
    irpe.install()          # before the official models are imported: `from irpe import build_rpe` then finds this module

The modules compute what the official ones do, with compiled lookups on every device, gradients equal at every call, and
without easydict. Attention that is fused as a whole is `natrpb.iRPEAttention`.
"""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor

from ..functional import rpe_index
from ..irpe import Method as METHOD
from ..irpe import Term, as_method, term_maps
from ..irpe import piecewise_index as _piecewise_index
from ..modules import build_rpe, get_rpe_config, iRPE, iRPE_Cross
from ..modules.irpe import get_single_rpe_config

__all__ = [
    "METHOD",
    "RPEIndexFunction",
    "build_rpe",
    "get_bucket_ids_2d",
    "get_num_buckets",
    "get_rpe_config",
    "get_single_rpe_config",
    "iRPE",
    "iRPE_Cross",
    "install",
    "piecewise_index",
]


class RPEIndexFunction:
    """`natrpb.rpe_index` under the official op's name; differentiable to any order, in all float types."""

    @staticmethod
    def apply(input: Tensor, index: Tensor) -> Tensor:
        """input [B, h, Nq, C], index int [Nq, Nk] -> [B, h, Nq, Nk]."""
        return rpe_index(input, index)


def piecewise_index(relative_position: Tensor, alpha: float, beta: float, gamma: float, dtype: torch.dtype) -> Tensor:
    """`natrpb.irpe.piecewise_index`, in an integer dtype of choice."""
    return _piecewise_index(relative_position, alpha, beta, gamma).to(dtype)


def get_num_buckets(method: METHOD | str | int, alpha: float, beta: float, gamma: float) -> int:
    """Buckets of one table, without that of skipped tokens."""
    return Term(as_method(method), alpha, beta, gamma).num_buckets(0)


def get_bucket_ids_2d(
    method: METHOD | str | int,
    height: int,
    width: int,
    skip: int,
    alpha: float,
    beta: float,
    gamma: float,
    dtype: torch.dtype = torch.long,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """The bucket of every pair, [skip + height * width] twice, the caller's own; and how many buckets there are.

    For cross name one table.
    """
    method = as_method(method)
    if method == METHOD.CROSS:
        raise ValueError("method cross has two tables: ask for CROSS_ROWS and CROSS_COLS")
    term = Term(method, alpha, beta, gamma)
    ids = term_maps((term,), height, width, skip, torch.device(device))[0]
    return ids.to(dtype, copy=True), term.num_buckets(skip)


def install() -> None:
    """Makes `import irpe` and `from rpe_ops.rpe_index import RPEIndexFunction` find this module."""
    package = types.ModuleType("rpe_ops")
    package.rpe_index = types.ModuleType("rpe_ops.rpe_index")
    package.rpe_index.RPEIndexFunction = RPEIndexFunction
    sys.modules |= {"irpe": sys.modules[__name__], "rpe_ops": package, "rpe_ops.rpe_index": package.rpe_index}

"""Settings and fixtures of all tests: one torch thread per pytest worker, reproducible draws, poisoned memory."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic
from hypothesis import settings

settings.register_profile("natrpb", derandomize=True, deadline=None, database=None)
settings.load_profile("natrpb")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def _define_torchvision_operators() -> torch.library.Library | None:
    """Lets a torchvision built for CUDA be imported beside a CPU torch, where its operator library cannot load.

    Importing timm needs torchvision's Python part only, but that part insists on two operators being defined.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    try:
        for path in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_torchvision_operators = _define_torchvision_operators()  # kept: definitions die with their library object


@pytest.fixture(autouse=True)
def seeded():
    """Makes every test draw the same numbers, alone or in a crowd."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills what `torch.empty` returns with NaN, so that a result left unwritten, or read too early, shows itself."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Tables and masks of the official NAT and Swin code, by name."""

    def number(item):
        return [number(x) for x in item] if isinstance(item, list) else float(item)

    tables = json.loads(Path(__file__).with_name("golden.json").read_text())
    return {name: torch.tensor(number(table)) for name, table in tables.items()}

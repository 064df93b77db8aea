"""Lets timm be imported beside any torch, for the tests and the benchmarks."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch


@functools.cache  # kept: definitions die with their library object
def define_torchvision_operators() -> torch.library.Library | None:
    """What timm needs of torchvision is its Python part, which insists on two operators being defined.

    Those of a torchvision built for CUDA do not load beside a CPU torch; their schemas then stand in for them.
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

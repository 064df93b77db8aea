"""timm, a peer that is imported where it is asked for, beside any torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from .harness import Unavailable


@functools.cache
def _define_torchvision_operators() -> torch.library.Library | None:
    """What timm needs of torchvision is its Python part, which insists on two operators being defined.

    Those of a torchvision built for CUDA do not load beside a CPU torch; their schemas then stand in for them. Returns what
    keeps these alive.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
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


def timm_module(name: str = "timm") -> ModuleType:
    """timm, or a module of it; raises `Unavailable` where it does not import."""
    _define_torchvision_operators()
    try:
        return importlib.import_module(name)
    except Exception as failure:
        raise Unavailable(f"timm does not import ({type(failure).__name__})") from None

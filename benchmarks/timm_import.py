"""timm, a peer that is imported where it is asked for, beside any torch."""

from __future__ import annotations

import importlib
from types import ModuleType

from tests.torchvision_operators import define_torchvision_operators

from .harness import Unavailable


def timm_module(name: str = "timm") -> ModuleType:
    """timm, or a module of it; raises `Unavailable` where it does not import."""
    define_torchvision_operators()
    try:
        return importlib.import_module(name)
    except Exception as failure:
        raise Unavailable(f"timm does not import ({type(failure).__name__})") from None

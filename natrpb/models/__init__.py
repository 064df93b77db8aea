"""Models: NAT, DiNAT, DiNAT_s and their isotropic variants, Swin v1 and v2, DeiT with iRPE; one family per file."""

import sys

from ._base import Pyramid
from ._checkpoint import load_weights
from ._registry import create_model, list_models, register_model
from ._timm import register_with_timm
from .deit_irpe import DeiT
from .dinat_s import DiNAT_s
from .isotropic import IsotropicNAT
from .nat import NAT
from .swin import Swin, SwinBlock, UnfoldMerging
from .swin_v2 import SwinV2, SwinV2Block

if "timm" in sys.modules:
    register_with_timm()

__all__ = [
    "NAT",
    "DeiT",
    "DiNAT_s",
    "IsotropicNAT",
    "Pyramid",
    "Swin",
    "SwinBlock",
    "SwinV2",
    "SwinV2Block",
    "UnfoldMerging",
    "create_model",
    "list_models",
    "load_weights",
    "register_model",
    "register_with_timm",
]

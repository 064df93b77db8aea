"""Local attention with learned relative position bias for PyTorch, fused forward and backward."""

from . import compat, convert, explain, models, modules, rpb
from ._ext import info
from .functional import na1d, na1d_av, na1d_qk, na2d, na2d_av, na2d_qk, na3d, na3d_av, na3d_qk, window_attention
from .models import create_model, list_models
from .modules import (
    ContinuousPositionBias,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    WindowAttention,
    WindowAttentionV2,
)

__version__ = "0.1.0"

__all__ = [
    "ContinuousPositionBias",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "WindowAttention",
    "WindowAttentionV2",
    "compat",
    "convert",
    "create_model",
    "explain",
    "info",
    "list_models",
    "models",
    "modules",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "rpb",
    "window_attention",
]

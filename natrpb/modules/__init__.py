"""Attention modules: parameters, initialisation and layout around the functional ops."""

from .irpe import build_rpe, get_rpe_config, iRPE, iRPE_Cross, parse_rpe_config
from .irpe_attention import RPEMultiheadAttention, iRPEAttention
from .neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .window import ContinuousPositionBias, WindowAttention, WindowAttentionV2

__all__ = [
    "ContinuousPositionBias",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "RPEMultiheadAttention",
    "WindowAttention",
    "WindowAttentionV2",
    "build_rpe",
    "get_rpe_config",
    "iRPE",
    "iRPEAttention",
    "iRPE_Cross",
    "parse_rpe_config",
]

"""Attention modules: parameters, initialisation and layout around the functional ops."""

from .neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .window import ContinuousPositionBias, WindowAttention, WindowAttentionV2

__all__ = [
    "ContinuousPositionBias",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "WindowAttention",
    "WindowAttentionV2",
]

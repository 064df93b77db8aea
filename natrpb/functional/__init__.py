"""The public stateless API.

This layer checks arguments and composes; the arithmetic is in `natrpb.ops` (compiled) or `natrpb.reference` (plain PyTorch).
"""

from .neighborhood import na1d, na1d_av, na1d_qk, na2d, na2d_av, na2d_qk, na3d, na3d_av, na3d_qk
from .window import window_attention

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "window_attention",
]

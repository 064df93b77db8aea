"""The public stateless API.

This layer checks arguments and composes; the arithmetic is in `natrpb.ops` (compiled) or `natrpb.reference` (plain PyTorch).
"""

from .irpe import irpe_attention, rpe_index
from .neighborhood import (
    na1d,
    na1d_av,
    na1d_qk,
    na1d_qkvpacked,
    na2d,
    na2d_av,
    na2d_qk,
    na2d_qkvpacked,
    na3d,
    na3d_av,
    na3d_qk,
    na3d_qkvpacked,
)
from .relative import axial_attention, huang_attention, sasa_attention, shaw_attention, transformer_xl_attention
from .window import crop_from_windows, pad_to_windows, window_attention, window_attention_qkvpacked

__all__ = [
    "axial_attention",
    "crop_from_windows",
    "huang_attention",
    "irpe_attention",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qkvpacked",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qkvpacked",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qkvpacked",
    "pad_to_windows",
    "rpe_index",
    "sasa_attention",
    "shaw_attention",
    "transformer_xl_attention",
    "window_attention",
    "window_attention_qkvpacked",
]

"""Ops with autograd, fakes, autocast and vmap: one file per op family."""

from .irpe import irpe_attention, rpe_index, rpe_index_transposed
from .local_attention import local_attention, local_av, local_av_transposed, local_bias_grad, local_qk

__all__ = [
    "irpe_attention",
    "local_attention",
    "local_av",
    "local_av_transposed",
    "local_bias_grad",
    "local_qk",
    "rpe_index",
    "rpe_index_transposed",
]

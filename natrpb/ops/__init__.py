"""Ops with autograd, fakes, autocast and vmap: one file per op family."""

from .irpe import irpe_attention, rpe_index, rpe_index_transposed
from .l2_normalize import l2_normalize
from .local_attention import local_attention, local_attention_qkvpacked
from .unfused import local_av, local_av_transposed, local_bias_grad, local_qk

__all__ = [
    "irpe_attention",
    "l2_normalize",
    "local_attention",
    "local_attention_qkvpacked",
    "local_av",
    "local_av_transposed",
    "local_bias_grad",
    "local_qk",
    "rpe_index",
    "rpe_index_transposed",
]

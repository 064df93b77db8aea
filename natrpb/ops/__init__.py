"""Ops with autograd, fakes, autocast and vmap: one file per op family."""

from .local_attention import local_attention, local_av, local_av_transposed, local_bias_grad, local_qk

__all__ = ["local_attention", "local_av", "local_av_transposed", "local_bias_grad", "local_qk"]

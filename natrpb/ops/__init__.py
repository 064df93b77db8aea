"""Ops with autograd, fakes, autocast and vmap: one file per op family."""

from .local_attention import local_attention, local_av, local_qk

__all__ = ["local_attention", "local_av", "local_qk"]

"""Local attention (neighborhood, causal, windowed), fused and unfused."""

from ..reference import local_attention, local_av, local_qk

__all__ = ["local_attention", "local_av", "local_qk"]

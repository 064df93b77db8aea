"""State dicts of other sources, brought to the key names of the official NAT and DiNAT checkpoints and back."""

from .huggingface import detect_format, from_huggingface, to_huggingface, to_official

__all__ = ["detect_format", "from_huggingface", "to_huggingface", "to_official"]

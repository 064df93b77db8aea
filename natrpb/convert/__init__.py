"""State dicts of other sources, brought to the key names of the official checkpoints and back.

The functions here are for NAT and DiNAT, but that `detect_format` and `to_official` know Swin too; `natrpb.convert.swin` has
the rest for Swin v1 and v2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import huggingface, swin
from .huggingface import from_huggingface, to_huggingface
from .swin import conv_to_linear, linear_to_conv

__all__ = [
    "conv_to_linear",
    "detect_format",
    "from_huggingface",
    "linear_to_conv",
    "swin",
    "to_huggingface",
    "to_official",
]


def detect_format(state_dict: Mapping[str, Tensor]) -> str:
    """Tells whose key names a state dict has: "official", "huggingface", and for Swin also "timm" or "torchvision".

    Raises:
        ValueError: none of them.
    """
    state_dict = _unwrapped(state_dict)
    return (swin if swin.is_swin(state_dict) else huggingface).detect_format(state_dict)


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A NAT, DiNAT or Swin state dict in official key names, whichever of the known formats it came in.

    What wrappers put before all keys is taken off: "module." of DistributedDataParallel and AveragedModel, "_orig_mod." of
    torch.compile.
    """
    state_dict = _unwrapped(state_dict)
    return (swin if swin.is_swin(state_dict) else huggingface).to_official(state_dict)


def _unwrapped(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    keys = [key for key in state_dict if key != "n_averaged"]
    for wrapper in ("module.", "_orig_mod."):
        if keys and all(key.startswith(wrapper) for key in keys):
            return _unwrapped({key.removeprefix(wrapper): state_dict[key] for key in keys})
    return state_dict

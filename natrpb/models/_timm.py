"""Makes the models known to timm (https://github.com/huggingface/pytorch-image-models), under the prefix `natrpb_`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ._registry import create_model, list_models, model_entry

PREFIX = "natrpb_"

default_cfgs: dict[str, dict] = {}  # timm looks here for what is known of the weights


def register_with_timm() -> list[str]:
    """Registers every model with timm, so that `timm.create_model("natrpb_nat_tiny")` builds `nat_tiny`.

    Importing natrpb does this by itself when timm was imported before; it never imports timm. Safe to call again.

    Returns:
        The names under which timm knows the models.

    Raises:
        ImportError: timm is not installed.
    """
    import timm.models

    names = [PREFIX + name for name in list_models()]
    for name in names:
        if not timm.models.is_model(name):
            default_cfgs[name] = model_entry(name.removeprefix(PREFIX)).pretrained_cfg()
            timm.models.register_model(_entrypoint(name))
    return names


def _entrypoint(timm_name: str) -> Callable[..., nn.Module]:
    name = timm_name.removeprefix(PREFIX)

    def build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **overrides) -> nn.Module:
        if pretrained and (pretrained_cfg or pretrained_cfg_overlay or cache_dir):
            raise ValueError(
                f"{timm_name} takes neither pretrained_cfg nor cache_dir; "
                f"natrpb.create_model({name!r}, pretrained='path/to/file') loads other weights"
            )
        return create_model(name, pretrained=pretrained, **overrides)

    build.__name__ = build.__qualname__ = timm_name
    build.__doc__ = model_entry(name).build.__doc__
    return build

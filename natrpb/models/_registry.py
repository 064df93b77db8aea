"""Names of the models, where their published weights are, and `create_model`."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from ..convert import to_official
from ._checkpoint import download, download_from_hub, load_weights, read_checkpoint

Build = TypeVar("Build", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class ModelEntry:
    """One registered model."""

    build: Callable[..., nn.Module]  # takes overrides of the constructor's arguments; weights are fresh
    url: str | None  # the authors' file
    hf_id: str | None  # the same weights on the Hugging Face hub
    input_size: int  # image side of the published accuracy
    num_classes: int | None  # of the published head; None where it is not documented
    crop_pct: float  # share of the image's side that the published accuracy looks at

    def pretrained_cfg(self) -> dict:
        """What is known of the published weights, under timm's names."""
        cfg = {
            "url": self.url,
            "hf_hub_id": self.hf_id,
            "input_size": (3, self.input_size, self.input_size),
            "crop_pct": self.crop_pct,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": "head",
        }
        if self.num_classes is not None:
            cfg["num_classes"] = self.num_classes
        return cfg


_models: dict[str, ModelEntry] = {}


def register_model(
    *,
    url: str | None = None,
    hf_id: str | None = None,
    input_size: int = 224,
    num_classes: int | None = 1000,
    crop_pct: float | None = None,
) -> Callable[[Build], Build]:
    """Decorator that registers a function under its name; it takes overrides and returns a model with fresh weights.

    Args:
        url: official weights.
        hf_id: the same weights on the Hugging Face hub.
        input_size: image side at which the published accuracy was measured.
        num_classes: classes of the published head, None where it is not documented.
        crop_pct: share of the resized image's side that was cropped for it; default 0.875, 1 for sides above 224.

    Raises:
        ValueError: the name is taken.
    """

    def register(build: Build) -> Build:
        name = build.__name__
        if name in _models:
            raise ValueError(f"a model named {name} is already registered")
        crop = crop_pct if crop_pct is not None else 1.0 if input_size > 224 else 0.875
        _models[name] = ModelEntry(build, url, hf_id, input_size, num_classes, crop)
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell pattern such as "dinat_*", sorted."""
    return sorted(fnmatch.filter(_models, pattern))


def model_entry(name: str) -> ModelEntry:
    """The entry of a registered model; ValueError, with the nearest names, where there is none."""
    if name not in _models:
        near = difflib.get_close_matches(name, _models, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "list_models() names them all"
        raise ValueError(f"there is no model named {name!r}; {hint}")
    return _models[name]


def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    num_classes: int | None = None,
    features_only: bool = False,
    **overrides,
) -> nn.Module:
    """Builds a model by name, for images of any size.

    Args:
        name: see `list_models`.
        pretrained: True downloads the authors' file into torch.hub's cache; "hf" takes the copy on the Hugging Face hub
            (needs `huggingface_hub`); any other string or a Path is a local file, .pth, .bin or .safetensors, in
            official or Hugging Face keys, for Swin also timm's or torchvision's. The authors publish no hashes: a file
            is accepted when all its keys and shapes fit the model, and nothing is loaded otherwise.
        num_classes: outputs of the head, 0 for none; default those of the published head, which is loaded then: 1000, or
            21841 for the "*_22k" of Swin. For the "*_21k" of DiNAT they are not documented, and the default is what the
            loaded weights have, 1000 without weights. Where the weights have another number than num_classes the head
            starts fresh, with a warning.
        features_only: return a list of maps [B, C_i, H_i, W_i], one per stage, instead of logits.
        **overrides: constructor arguments of the family, e.g. kernel_size, for Swin window_size (bias tables of loaded
            weights are resized; Swin v2 asks its MLP), dilations, depths, drop_path_rate, in_chans, rel_pos_bias,
            out_indices. `img_size` is accepted and ignored.

    Returns:
        The model in training mode, fp32 parameters unless the default dtype is another.

    Raises:
        ValueError: no such model, or weights that do not fit it.
        FileNotFoundError: no such local file.
        RuntimeError: the weights cannot be downloaded or read.
        TypeError: unknown overrides.
    """
    if not isinstance(pretrained, bool | str | Path):
        raise TypeError(f"pretrained must be a bool, 'hf' or the path of a file, got {type(pretrained).__name__}")
    entry = model_entry(name)
    overrides.pop("img_size", None)
    if isinstance(pretrained, str | Path) and pretrained != "hf":
        pretrained = Path(pretrained).expanduser()
        if not pretrained.is_file():
            raise FileNotFoundError(f"pretrained must be a bool, 'hf' or the path of a file, there is no {pretrained}")
    classes = entry.num_classes if num_classes is None else num_classes
    model = entry.build(num_classes=1000 if classes is None else classes, features_only=features_only, **overrides)
    model.pretrained_cfg = entry.pretrained_cfg()
    if pretrained is not False:
        if isinstance(pretrained, Path):
            path = pretrained
        elif pretrained == "hf":
            path = download_from_hub(name, entry.hf_id)
        else:
            path = download(name, entry.url)
        weights = to_official(read_checkpoint(path))
        if classes is None and not features_only and "head.weight" in weights:
            model.reset_classifier(len(weights["head.weight"]))
        load_weights(model, weights, source=str(path))
    return model

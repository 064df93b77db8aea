"""Key maps between official NAT and DiNAT checkpoints and Hugging Face's `NatForImageClassification` and relatives.

Both describe one model. They differ in names, in qkv (one fused projection here, three there) and in layer scale (two
vectors here, one [2, C] tensor there). The bare model and the backbone drop the `nat.` or `dinat.` prefix, and the
backbone adds one LayerNorm per stage, `hidden_states_norms.stage{i + 1}` for `norm{i}` here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_MODEL_NAMES = (  # official, Hugging Face
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "embeddings.norm."),
    ("norm.", "layernorm."),
)
_BLOCK_NAMES = (
    ("norm1.", "layernorm_before."),
    ("attn.rpb", "attention.self.rpb"),
    ("attn.proj.", "attention.output.dense."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
_QKV = ("query", "key", "value")
_GAMMAS = ("gamma1", "gamma2")

_OFFICIAL_BLOCK = re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)")
_HUGGINGFACE_BLOCK = re.compile(r"encoder\.levels\.(\d+)\.layers\.(\d+)\.(.+)")
_OFFICIAL_STAGE_NORM = re.compile(r"norm(\d+)\.(weight|bias)")
_HUGGINGFACE_STAGE_NORM = re.compile(r"hidden_states_norms\.stage([1-9]\d*)\.(weight|bias)")


def detect_format(state_dict: Mapping[str, Tensor]) -> str:
    """Tells whose key names a NAT-family state dict has.

    Returns:
        "official" or "huggingface".

    Raises:
        ValueError: neither.
    """
    if any("embeddings.patch_embeddings.projection." in key for key in state_dict):
        return "huggingface"
    if any(key.startswith("patch_embed.proj.") for key in state_dict):
        return "official"
    raise ValueError(
        "state_dict has neither official keys (patch_embed.proj...) nor Hugging Face's "
        f"(embeddings.patch_embeddings.projection...), got {_some(state_dict)}"
    )


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in official key names, whichever of the known formats it came in; see `detect_format`."""
    if detect_format(state_dict) == "huggingface":
        return from_huggingface(state_dict)
    return dict(state_dict)


def from_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official key names for a Hugging Face NAT or DiNAT state dict: classifier, bare model or backbone.

    Args:
        state_dict: e.g. `dinat.encoder.levels.0.layers.0.attention.self.query.weight` [C, C].

    Returns:
        e.g. `levels.0.blocks.0.attn.qkv.weight` [3 C, C]; tensors are shared but for qkv and layer scale.

    Raises:
        ValueError: keys that belong to no such model, or parts of a qkv that are missing; nothing is dropped.
    """
    official: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}  # by official key: the parts of a fused qkv tensor
    unknown = []
    for key, tensor in state_dict.items():
        bare = re.sub(r"^(nat|dinat)\.", "", key)
        if block := _HUGGINGFACE_BLOCK.fullmatch(bare):
            stage, index, name = block.groups()
            prefix = f"levels.{stage}.blocks.{index}."
            if part := re.fullmatch(r"attention\.self\.(query|key|value)\.(weight|bias)", name):
                thirds.setdefault(f"{prefix}attn.qkv.{part[2]}", {})[part[1]] = tensor
            elif name == "layer_scale_parameters":
                if tensor.dim() != 2 or tensor.shape[0] != 2:
                    raise ValueError(f"{key} must have shape [2, C], got {list(tensor.shape)}")
                official.update({prefix + gamma: row.clone() for gamma, row in zip(_GAMMAS, tensor, strict=True)})
            elif renamed := _renamed(name, [(theirs, ours) for ours, theirs in _BLOCK_NAMES]):
                official[prefix + renamed] = tensor
            else:
                unknown.append(key)
        elif downsample := re.fullmatch(r"encoder\.(levels\.\d+\.downsample\..+)", bare):
            official[downsample[1]] = tensor
        elif norm := _HUGGINGFACE_STAGE_NORM.fullmatch(bare):
            official[f"norm{int(norm[1]) - 1}.{norm[2]}"] = tensor
        elif key.startswith("classifier."):
            official[key.replace("classifier.", "head.", 1)] = tensor
        elif renamed := _renamed(bare, [(theirs, ours) for ours, theirs in _MODEL_NAMES]):
            official[renamed] = tensor
        else:
            unknown.append(key)
    _refuse(unknown, "Hugging Face NAT or DiNAT model")
    for key, parts in thirds.items():
        if missing := [part for part in _QKV if part not in parts]:
            raise ValueError(f"{key} needs query, key and value, {' and '.join(missing)} missing")
        official[key] = torch.cat([parts[part] for part in _QKV])
    return official


def to_huggingface(state_dict: Mapping[str, Tensor], model_type: str | None = "dinat") -> dict[str, Tensor]:
    """Hugging Face's key names for an official NAT or DiNAT state dict; the inverse of `from_huggingface`.

    Args:
        state_dict: official keys; DiNAT_s and isotropic models have no counterpart.
        model_type: "nat" or "dinat" for the classifiers, whose keys begin with it; None for the bare model and
            the backbone.

    Returns:
        New dict; tensors are shared but for q, k, v and layer scale.

    Raises:
        ValueError: another model_type, keys that belong to no such model, or one layer scale without the other.
    """
    if model_type not in ("nat", "dinat", None):
        raise ValueError(f"model_type must be 'nat', 'dinat' or None, got {model_type!r}")
    root = f"{model_type}." if model_type else ""
    converted: dict[str, Tensor] = {}
    gammas: dict[str, dict[str, Tensor]] = {}  # by Hugging Face key
    unknown = []
    for key, tensor in state_dict.items():
        if block := _OFFICIAL_BLOCK.fullmatch(key):
            stage, index, name = block.groups()
            prefix = f"{root}encoder.levels.{stage}.layers.{index}."
            if fused := re.fullmatch(r"attn\.qkv\.(weight|bias)", name):
                for part, third in zip(_QKV, tensor.chunk(3), strict=True):
                    converted[f"{prefix}attention.self.{part}.{fused[1]}"] = third.clone()
            elif name in _GAMMAS:
                gammas.setdefault(f"{prefix}layer_scale_parameters", {})[name] = tensor
            elif renamed := _renamed(name, _BLOCK_NAMES):
                converted[prefix + renamed] = tensor
            else:
                unknown.append(key)
        elif re.fullmatch(r"levels\.\d+\.downsample\..+", key):
            converted[f"{root}encoder.{key}"] = tensor
        elif norm := _OFFICIAL_STAGE_NORM.fullmatch(key):
            converted[f"hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"] = tensor
        elif key.startswith("head."):
            converted[key.replace("head.", "classifier.", 1)] = tensor
        elif renamed := _renamed(key, _MODEL_NAMES):
            converted[root + renamed] = tensor
        else:
            unknown.append(key)
    _refuse(unknown, "official NAT or DiNAT model")
    for key, pair in gammas.items():
        if len(pair) != 2:
            raise ValueError(f"{key} needs gamma1 and gamma2, got {next(iter(pair))} only")
        converted[key] = torch.stack([pair[gamma] for gamma in _GAMMAS])
    return converted


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def _refuse(unknown: list[str], what: str) -> None:
    if unknown:
        raise ValueError(f"state_dict holds {len(unknown)} keys that no {what} has: {_some(unknown)}")


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "") or "no keys"

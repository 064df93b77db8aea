"""Key maps between official Swin (v1 and v2) checkpoints and those of timm, Hugging Face and torchvision.

All describe one model: they differ in names; in where the patch merging stands (timm: at the start of the next stage); in
qkv (fused, or three layers at Hugging Face; v2's key has no bias: two vectors here and at timm, a fused bias with unused
middle third at torchvision); and in which derived buffers they store. Those are dropped on the way here and, where strict
loading asks for them (torchvision), made on the way back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .. import rpb
from .huggingface import _refuse

_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_QKV = ("query", "key", "value")
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")

# Names within a block: official, theirs.
_TORCHVISION = (("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.3."))
_HUB = (  # files on the hub, transformers before 5, and v2 everywhere
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc2.", "output.dense."),
    ("attn.cpb_mlp.", "attention.self.continuous_position_bias_mlp."),
    ("attn.logit_scale", "attention.self.logit_scale"),
    ("attn.relative_position_bias_table", "attention.self.relative_position_bias_table"),
)
_TRANSFORMERS_5 = (  # v1 in memory
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
    ("attn.proj.", "attention.o_proj."),
    ("attn.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
)
_HUGGINGFACE_MODEL = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "embeddings.norm."),
    ("norm.", "layernorm."),
)


def is_swin(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is some Swin's: it has a Swin bias table or a logit scale."""
    return any(key.endswith(("relative_position_bias_table", ".logit_scale")) for key in state_dict)


def detect_format(state_dict: Mapping[str, Tensor]) -> str:
    """Tells whose key names a Swin state dict has.

    Returns:
        "official", "timm", "huggingface" or "torchvision".

    Raises:
        ValueError: none of them.
    """
    if any(key.startswith("features.0.0.") for key in state_dict):
        return "torchvision"
    if any("embeddings.patch_embeddings.projection." in key for key in state_dict):
        return "huggingface"
    if not any(key.startswith("patch_embed.proj.") for key in state_dict):
        first = ", ".join(list(state_dict)[:3])
        raise ValueError(f"state_dict is no Swin's: no key is patch_embed.proj or another library's name for it, first {first}")
    if any(re.match(r"layers_\d+\.", key) for key in state_dict):
        return "timm"  # with features_only
    merges = {int(key.split(".")[1]) for key in state_dict if re.match(r"layers\.\d+\.downsample\.", key)}
    if "head.fc.weight" in state_dict or (merges and 0 not in merges):
        return "timm"
    return "official"


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin state dict in official key names without derived buffers, whichever format it came in; see `detect_format`."""
    convert = {"timm": from_timm, "huggingface": from_huggingface, "torchvision": from_torchvision}.get(
        detect_format(state_dict), _without_buffers
    )
    return convert(state_dict)


def from_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official key names for the state dict of a timm Swin or Swin v2, features_only or not; tensors are shared."""
    stages = {re.sub(r"^layers_(\d+)\.", r"layers.\1.", key): tensor for key, tensor in _without_buffers(state_dict).items()}
    return {re.sub(r"^head\.fc\.", "head.", _moved_merge(key, -1)): tensor for key, tensor in stages.items()}


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's key names for an official Swin or Swin v2 state dict; tensors are shared."""
    return {
        re.sub(r"^head\.", "head.fc.", _moved_merge(key, 1)): tensor for key, tensor in _without_buffers(state_dict).items()
    }


def _moved_merge(key: str, by: int) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + by}.downsample.", key)


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official key names for a torchvision Swin or Swin v2 state dict.

    Raises:
        ValueError: keys that belong to no such model.
    """
    official: dict[str, Tensor] = {}
    unknown = []
    cosine = any(key.endswith(".logit_scale") for key in state_dict)
    for key, tensor in _without_buffers(state_dict).items():
        layer = re.fullmatch(r"features\.(\d+)\.(.+)", key)
        if not layer:
            official[key] = tensor  # norm., head.
            continue
        index, name = int(layer[1]), layer[2]
        stage, odd = divmod(index - 1, 2)
        block = re.fullmatch(r"(\d+)\.(.+)", name)
        if index == 0 and name.startswith(("0.", "2.")):
            official[("patch_embed.proj." if name[0] == "0" else "patch_embed.norm.") + name[2:]] = tensor
        elif odd and index:
            official[f"layers.{stage}.downsample.{name}"] = tensor
        elif block and index:
            prefix, name = f"layers.{stage}.blocks.{block[1]}.", _renamed(block[2], _TORCHVISION, back=True)
            if cosine and name == "attn.qkv.bias":
                third = tensor.shape[0] // 3
                official[prefix + "attn.q_bias"] = tensor[:third].clone()
                official[prefix + "attn.v_bias"] = tensor[2 * third :].clone()
            else:
                official[prefix + name] = tensor
        else:
            unknown.append(key)
    _refuse(unknown, "torchvision Swin")
    return official


def to_torchvision(state_dict: Mapping[str, Tensor], window_size: int | tuple[int, int] | None = None) -> dict[str, Tensor]:
    """torchvision's key names, and the buffers that it stores, for an official Swin or Swin v2 state dict.

    Args:
        state_dict: official keys.
        window_size: W, one or (rows, columns), of all stages as torchvision has it; needed for v2 and for v1 with windows
            that are not square.

    Raises:
        ValueError: v2 without window_size, or tables of another window.
    """
    converted: dict[str, Tensor] = {}
    state_dict = _without_buffers(state_dict)
    if window_size is None:
        rows = {tensor.shape[0] for key, tensor in state_dict.items() if key.endswith("relative_position_bias_table")}
        if len(rows) != 1:
            raise ValueError("window_size is needed: the state dict has no bias tables, or tables of several windows")
        window_size = (math.isqrt(rows.pop()) + 1) // 2
    entries = math.prod(rpb.log_spaced_coords(window_size).shape[:-1])
    for key, tensor in state_dict.items():
        if key.endswith("relative_position_bias_table") and tensor.shape[0] != entries:
            raise ValueError(f"window_size {window_size} has tables of {entries} rows, {key} has {tensor.shape[0]}")
    for key, tensor in state_dict.items():
        block = _BLOCK.fullmatch(key)
        merge = re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", key)
        if block:
            prefix, name = f"features.{2 * int(block[1]) + 1}.{block[2]}.", block[3]
            if name == "attn.q_bias":
                value = state_dict[key.removesuffix("q_bias") + "v_bias"]
                converted[prefix + "attn.qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), value])
            elif name == "attn.logit_scale":
                coords = rpb.log_spaced_coords(window_size)
                converted[prefix + "attn.relative_coords_table"] = coords[None].to(tensor)
            if name not in ("attn.q_bias", "attn.v_bias"):
                converted[prefix + _renamed(name, _TORCHVISION)] = tensor
            if name == "attn.proj.weight":
                index = rpb.swin_index(window_size).flatten()
                converted[prefix + "attn.relative_position_index"] = index.to(tensor.device)
        elif merge:
            converted[f"features.{2 * int(merge[1]) + 2}.{merge[2]}"] = tensor
        else:
            key = key.replace("patch_embed.proj.", "features.0.0.").replace("patch_embed.norm.", "features.0.2.")
            converted[key] = tensor
    return converted


def from_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official key names for a Hugging Face Swin or Swin v2 state dict: classifier, bare model or backbone.

    Args:
        state_dict: as files on the hub name the tensors, or as transformers 5 does in memory.

    Returns:
        New dict; tensors are shared but for qkv.

    Raises:
        ValueError: keys that belong to no such model, or parts of a qkv that are missing; nothing is dropped but buffers.
    """
    official: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}  # by official prefix and weight or bias
    unknown = []
    for key, tensor in _without_buffers(state_dict).items():
        bare = re.sub(r"^swin(v2)?\.", "", key).removeprefix("encoder.")
        block = _BLOCK.fullmatch(bare)
        stage_norm = re.fullmatch(r"hidden_states_norms\.stage([1-9]\d*)\.(weight|bias)", bare)
        if block:
            prefix, name = f"layers.{block[1]}.blocks.{block[2]}.", block[3]
            part = re.fullmatch(r"attention\.(?:self\.(query|key|value)|([qkv])_proj)\.(weight|bias)", name)
            if part:
                which = part[1] or _QKV["qkv".index(part[2])]
                thirds.setdefault(f"{prefix}attn.qkv.{part[3]}", {})[which] = tensor
                continue
            renamed = _renamed(name, _TRANSFORMERS_5, back=True, strict=True)
            renamed = renamed or _renamed(name, _HUB, back=True, strict=True)
            if renamed:
                official[prefix + renamed] = tensor
            else:
                unknown.append(key)
        elif re.match(r"layers\.\d+\.downsample\.", bare):
            official[bare] = tensor
        elif stage_norm:
            official[f"norm{int(stage_norm[1]) - 1}.{stage_norm[2]}"] = tensor
        elif bare.startswith("classifier."):
            official[bare.replace("classifier.", "head.", 1)] = tensor
        elif renamed := _renamed(bare, _HUGGINGFACE_MODEL, back=True, strict=True):
            official[renamed] = tensor
        else:
            unknown.append(key)
    _refuse(unknown, "Hugging Face Swin")
    for key, parts in thirds.items():
        if key.endswith(".bias") and set(parts) == {"query", "value"}:  # v2
            official[key.replace("qkv.bias", "q_bias")] = parts["query"]
            official[key.replace("qkv.bias", "v_bias")] = parts["value"]
            continue
        if missing := [part for part in _QKV if part not in parts]:
            raise ValueError(f"{key} needs query, key and value, {' and '.join(missing)} missing")
        official[key] = torch.cat([parts[part] for part in _QKV])
    return official


def to_huggingface(
    state_dict: Mapping[str, Tensor], classifier: bool = True, transformers_version: int = 5
) -> dict[str, Tensor]:
    """Hugging Face's key names for an official Swin or Swin v2 state dict; the inverse of `from_huggingface`.

    Args:
        state_dict: official keys.
        classifier: whether to name them as the classifiers do, whose keys begin with "swin." or "swinv2."; otherwise as
            the bare models. `SwinBackbone` of transformers 5 has the classifiers' keys and a final norm: strict=False.
        transformers_version: 5 for v1's names in the memory of transformers 5, 4 for those of files on the hub and of
            earlier versions. v2 has one set of names.

    Returns:
        New dict; tensors are shared but for q, k and v.
    """
    cosine = any(key.endswith(".logit_scale") for key in state_dict)
    names = _TRANSFORMERS_5 if transformers_version >= 5 and not cosine else _HUB
    parts = [f"attention.{x[0]}_proj" if names is _TRANSFORMERS_5 else f"attention.self.{x}" for x in _QKV]
    root = ("swinv2." if cosine else "swin.") if classifier else ""
    converted: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in _without_buffers(state_dict).items():
        if block := _BLOCK.fullmatch(key):
            prefix, name = f"{root}encoder.layers.{block[1]}.blocks.{block[2]}.", block[3]
            if fused := re.fullmatch(r"attn\.qkv\.(weight|bias)", name):
                for part, third in zip(parts, tensor.chunk(3), strict=True):
                    converted[f"{prefix}{part}.{fused[1]}"] = third.clone()
            elif name in ("attn.q_bias", "attn.v_bias"):
                converted[f"{prefix}{parts['qkv'.index(name[5])]}.bias"] = tensor
            elif renamed := _renamed(name, names, strict=True):
                converted[prefix + renamed] = tensor
            else:
                unknown.append(key)
        elif re.match(r"layers\.\d+\.downsample\.", key):
            converted[f"{root}encoder.{key}"] = tensor
        elif norm := re.fullmatch(r"norm(\d+)\.(weight|bias)", key):
            converted[f"hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"] = tensor
        elif key.startswith("head."):
            converted[key.replace("head.", "classifier.", 1)] = tensor
        elif renamed := _renamed(key, _HUGGINGFACE_MODEL, strict=True):
            converted[root + renamed] = tensor
        else:
            unknown.append(key)
    _refuse(unknown, "official Swin")
    return converted


def linear_to_conv(weight: Tensor, patch_size: int, order: str = "unfold") -> Tensor:
    """The convolution of size and stride P that equals a linear layer on P x P patches.

    Args:
        weight: [out, in * P * P].
        patch_size: P.
        order: of the linear layer's input: "unfold" for (channel, row, column), `torch.nn.functional.unfold`'s; "merging"
            for (column, row, channel), that of Swin's patch merging (whose norm between the two has to be the identity).

    Returns:
        [out, in, P, P].
    """
    if order not in ("unfold", "merging"):
        raise ValueError(f"order must be 'unfold' or 'merging', got {order!r}")
    if order == "unfold":
        return weight.unflatten(1, (-1, patch_size, patch_size))
    return weight.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 2, 1)


def conv_to_linear(weight: Tensor, order: str = "unfold") -> Tensor:
    """The inverse of `linear_to_conv`: [out, in, P, P] -> [out, in * P * P]."""
    if order not in ("unfold", "merging"):
        raise ValueError(f"order must be 'unfold' or 'merging', got {order!r}")
    return (weight if order == "unfold" else weight.permute(0, 3, 2, 1)).flatten(1)


def _without_buffers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith(_BUFFERS)}


def _renamed(name: str, pairs: Iterable[tuple[str, str]], back: bool = False, strict: bool = False) -> str:
    """`name` with the first prefix that fits replaced, ours by theirs or back; where none fits, name, or "" if strict."""
    for ours, theirs in pairs:
        old, new = (theirs, ours) if back else (ours, theirs)
        if name.startswith(old):
            return new + name[len(old) :]
    return "" if strict else name

"""Published weights: download, read, fit to a model, load all or nothing."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from .. import rpb
from ..convert import to_official
from ._layers import resize_position_embedding

_SWIN_TABLE = ".relative_position_bias_table"
_INDEX = ".relative_position_index"  # stored by the official ViT-rpb, here nothing is looked up in it
_POSITIONS = "pos_embed"
_WAY_OUT = "download it elsewhere and pass pretrained='path/to/file'"


def download(name: str, url: str | None) -> Path:
    """The official file of a model in torch.hub's cache, downloaded if it is not there.

    Raises:
        RuntimeError: no official file, or no way to it; the message names the URL and the way out.
    """
    if url is None:
        raise RuntimeError(f"no official weights of {name} are known; pass pretrained='path/to/file'")
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise RuntimeError(f"could not download {url} ({error}); {_WAY_OUT}, or try pretrained='hf'") from error
    return path


def download_from_hub(name: str, hf_id: str | None) -> Path:
    """A model's file from the Hugging Face hub, kept in its own cache.

    Raises:
        RuntimeError: no such repository is known, `huggingface_hub` is not installed, or there is no way to it.
    """
    if hf_id is None:
        raise RuntimeError(f"no weights of {name} on the Hugging Face hub are known; try pretrained=True")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise RuntimeError(f"pretrained='hf' needs the package huggingface_hub: {error}") from error
    try:
        return Path(hf_hub_download(hf_id, "pytorch_model.bin"))
    except OSError as error:
        where = f"https://huggingface.co/{hf_id}"
        raise RuntimeError(f"could not download {where} ({error}); {_WAY_OUT}, or try pretrained=True") from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: .safetensors, or anything that torch.load reads without running code.

    Args:
        path: a plain state dict, or one under the first of the keys "state_dict", "model", "state_dict_ema" and "model_ema"
            that is there, beside which there may be numbers, also NumPy's, strings and an argparse.Namespace.

    Raises:
        RuntimeError: unreadable, damaged, not a state dict, or with Python objects of another kind.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        content = read(path)
    except ImportError as error:
        raise RuntimeError(f"reading {path} needs the package safetensors: {error}") from error
    except Exception as error:  # damaged files reach the readers' every corner: no list of types is complete
        if foreign := _foreign_object(error):
            raise RuntimeError(
                f"{path} holds other Python objects beside tensors ({foreign}), which may run code when they are read; if you "
                "trust the file, read it with torch.load(..., weights_only=False) and torch.save its state dict alone"
            ) from error
        raise RuntimeError(f"{path} is damaged or no checkpoint; if it was downloaded, delete it ({error})") from error
    if isinstance(content, Mapping):
        for wrapper in ("state_dict", "model", "state_dict_ema", "model_ema"):
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
        if content and all(isinstance(tensor, Tensor) for tensor in content.values()):
            return dict(content)
    raise RuntimeError(f"{path} holds no state dict, a mapping from names to tensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> object:
    with torch.serialization.safe_globals(_harmless_objects()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _foreign_object(error: Exception) -> str | None:
    """The class or function that torch.load refuses to take from an otherwise readable file."""
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found[1] if found else None


def _harmless_objects() -> list:
    """What training scripts store beside weights and what runs no code: their arguments, and accuracies as NumPy's numbers."""
    try:
        import numpy
    except ImportError:
        return [argparse.Namespace]
    scalar = numpy.float64().__reduce__()[0]
    types = {type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code not in "OV"}  # all but objects and records
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # before NumPy 2, and since
    return [argparse.Namespace, numpy.dtype, *types, *scalars]


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "state_dict") -> None:
    """Loads official weights, or those of another library, into a model of this package, all or nothing.

    Bias tables of another kernel or window size, and DeiT's position embedding of another grid, are resized by bicubic
    interpolation, as the authors do; a head for another number of classes is left out and the model's own stays: both
    with a warning. A `features_only` model takes a classifier's weights without its final norm and head, and a backbone's
    without the norms of stages that it does not return; its own LayerNorms stay unless the weights hold them.

    Args:
        model: as `create_model` builds it.
        state_dict: keys of any format that `natrpb.convert.detect_format` knows.
        source: name of the weights in messages.

    Raises:
        ValueError: keys are missing or too many, or shapes differ; the model is unchanged.
    """
    own = model.state_dict()
    given = to_official(state_dict)
    given = {key: given[key] for key in given if not key.endswith(_INDEX)}
    weights = {key: _fit_table(key, tensor, model, own) for key, tensor in given.items()}
    resized = [key for key in weights if weights[key].shape != given[key].shape]
    fresh_head = False
    if model.features_only:
        unused = ["norm.", "head.", *(f"norm{i}." for i in range(model.num_stages) if f"norm{i}.weight" not in own)]
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith(tuple(unused))}
        weights = {key: tensor for key, tensor in own.items() if key.startswith("norm")} | weights
    elif model.num_classes == 0:
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith("head.")}
    elif "head.weight" in weights and weights["head.weight"].shape[0] != model.num_classes:
        fresh_head = True
        weights |= {key: own[key] for key in ("head.weight", "head.bias")}

    problems = []
    if missing := sorted(own.keys() - weights.keys()):
        problems.append(f"{len(missing)} keys are missing: {_some(missing)}")
    if unexpected := sorted(weights.keys() - own.keys()):
        problems.append(f"{len(unexpected)} keys are not the model's: {_some(unexpected)}")
    if differing := [key for key in own if key in weights and own[key].shape != weights[key].shape]:
        shapes = [f"{key} {list(weights[key].shape)}, expected {list(own[key].shape)}" for key in differing]
        problems.append(f"{len(shapes)} shapes differ: {_some(shapes)}")
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}, nothing was loaded; {'; '.join(problems)}")

    model.load_state_dict(weights)
    if resized:
        warnings.warn(f"{source}: {_resizing(resized, given, weights, model)}", stacklevel=3)
    if fresh_head:
        classes = given["head.weight"].shape[0]
        warnings.warn(
            f"{source} has {classes} classes, the model {model.num_classes}: its head starts fresh; "
            f"num_classes={classes} keeps the trained one",
            stacklevel=3,
        )


def _fit_table(key: str, tensor: Tensor, model: nn.Module, own: Mapping[str, Tensor]) -> Tensor:
    """A bias table or position embedding at the size of the model's own; every other tensor as it is."""
    target = own.get(key)
    if target is None or target.dim() != tensor.dim() or target.shape == tensor.shape:
        return tensor
    if key.endswith(".rpb") and target.shape[0] == tensor.shape[0]:
        return rpb.resize(tensor, [(side + 1) // 2 for side in target.shape[1:]])
    if key.endswith(_SWIN_TABLE) and target.shape[1] == tensor.shape[1] and math.isqrt(len(tensor)) ** 2 == len(tensor):
        return rpb.resize_swin(tensor, model.get_submodule(key.removesuffix(_SWIN_TABLE)).window_size)
    if key == _POSITIONS and target.shape[2] == tensor.shape[2] and _grid_size(tensor) ** 2 == tensor.shape[1] - 1 > 0:
        return resize_position_embedding(tensor, _grid_size(target), _grid_size(target))
    return tensor


def _resizing(keys: list[str], given: Mapping[str, Tensor], weights: Mapping[str, Tensor], model: nn.Module) -> str:
    """What was done to the tensors that `_fit_table` changed: a model has bias tables or a position embedding."""
    if keys == [_POSITIONS]:
        before, after = (_grid_size(tensors[_POSITIONS]) for tensors in (given, weights))
        return f"position embedding resized, from {before} x {before} patches to {after} x {after}"
    before, after = (_kernel_size(keys[0], tables[keys[0]], model) for tables in (given, weights))
    return f"{len(keys)} bias tables resized, kernel size {before} to {after}"


def _grid_size(pos_embed: Tensor) -> int:
    """S of a position embedding [1, 1 + S^2, C]."""
    return math.isqrt(max(pos_embed.shape[1] - 1, 0))


def _kernel_size(key: str, table: Tensor, model: nn.Module) -> tuple[int, ...]:
    """K per axis of a table that was resized, or of the one that it was resized to; Swin's come from square windows."""
    if not key.endswith(_SWIN_TABLE):
        return tuple((side + 1) // 2 for side in table.shape[1:])
    window = model.get_submodule(key.removesuffix(_SWIN_TABLE)).window_size
    is_own = math.prod(2 * w - 1 for w in window) == len(table)
    return window if is_own else ((math.isqrt(len(table)) + 1) // 2,) * 2


def _some(items: list[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")

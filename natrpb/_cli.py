"""The command line: python -m natrpb info | explain | convert | classify.

A user's mistake ends in one sentence on stderr and exit code 2. Where the reader of the output has gone, as `head` does once it
has enough, a command ends without a word and with the exit code of a process that the broken pipe has ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import convert, explain
from ._ext import info
from .models import create_model, load_weights
from .models._checkpoint import download, download_from_hub, read_checkpoint
from .models._registry import model_entry
from .patterns import Pattern, neighborhood_pattern, window_pattern

_TORCH_SUFFIXES = (".pth", ".pt", ".bin")


class _Parser(argparse.ArgumentParser):
    """Ends a usage error in one sentence, without the usage text."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; argv as in `sys.argv[1:]`. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still buffered, at exit
        return 128 + signal.SIGPIPE
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"python -m natrpb {arguments.command}: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str:
    """An error's message on one line; the system's errors without their number."""
    system = isinstance(error, OSError) and error.filename is not None
    return f"{error.filename}: {error.strerror}" if system else " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m natrpb", description="Local attention with learned relative position bias.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | explain | convert | classify")

    sub = commands.add_parser("info", help="what this installation holds and uses")
    sub.set_defaults(run=_info)

    sub = commands.add_parser("explain", help="which keys a query sees, and each one's index into the bias table")
    sub.set_defaults(run=_explain)
    sub.add_argument("--size", type=int, nargs="+", required=True, help="lengths of the map's axes, one to three")
    kind = sub.add_mutually_exclusive_group(required=True)
    kind.add_argument("--kernel-size", type=int, nargs="+", metavar="K", help="neighborhood: one per axis or one for all")
    kind.add_argument("--window", type=int, nargs="+", metavar="W", help="windows, as in Swin")
    sub.add_argument("--dilation", type=int, nargs="+", metavar="D", help="of a neighborhood, default 1")
    sub.add_argument("--stride", type=int, nargs="+", metavar="S", help="of a neighborhood, default 1")
    sub.add_argument("--causal", type=int, nargs="*", metavar="AXIS", help="causal axes; without a value, all of them")
    sub.add_argument("--shift", type=int, nargs="+", metavar="S", help="of windows, default 0")
    sub.add_argument("--query", type=int, nargs="+", metavar="I", help="position, default the middle of the map")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (.png, .svg, .pdf) instead of text")

    sub = commands.add_parser(
        "convert", help="checkpoints between the key names of official code, Hugging Face, timm, torchvision"
    )
    sub.set_defaults(run=_convert)
    sub.add_argument("input", type=Path, metavar="IN", help=".pth, .pt, .bin or .safetensors, any known keys")
    sub.add_argument("output", type=Path, metavar="OUT", help="its suffix tells the format: .safetensors, else torch.save")
    formats = ("official", "huggingface", "timm", "torchvision")
    sub.add_argument("--to", choices=formats, required=True, help="timm and torchvision have Swin only, torchvision here v1")
    sub.add_argument(
        "--model-type",
        choices=("nat", "dinat", "none"),
        default="dinat",
        help="of NAT and DiNAT, first part of Hugging Face's keys; none for bare model and backbone (default %(default)s)",
    )
    sub.add_argument("--force", action="store_true", help="overwrite OUT")

    sub = commands.add_parser("classify", help="the most likely classes of an image")
    sub.set_defaults(run=_classify)
    sub.add_argument("image", type=Path, metavar="IMAGE")
    sub.add_argument("--model", default="nat_tiny", help="see natrpb.list_models() (default %(default)s)")
    sub.add_argument(
        "--weights",
        default="official",
        help="a file; 'official' downloads the authors', 'hf' Hugging Face's copy (default %(default)s)",
    )
    sub.add_argument("--labels", type=Path, metavar="FILE", help="text, one class name per line; none are bundled")
    sub.add_argument("--top", type=int, default=5, help="classes to print (default %(default)s)")
    return parser


def _info(arguments: argparse.Namespace) -> None:
    rows = {}
    for name, value in info().items():
        if isinstance(value, dict):
            rows.update({f"{name} {key}": item for key, item in value.items()})
        else:
            rows[name] = value
    width = max(map(len, rows))
    for name, value in rows.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:{width}}  {'none' if text == '' else text}")


def _explain(arguments: argparse.Namespace) -> None:
    pattern = _pattern(arguments)
    size = tuple(arguments.size)
    query = tuple(length // 2 for length in size) if arguments.query is None else tuple(arguments.query)
    if len(query) != len(size):
        raise ValueError(f"--query needs one coordinate per axis of --size, {len(size)}, got {len(query)}")
    if arguments.plot is None:
        print(explain.explain_text(pattern, size, query))
    else:
        figure = explain.neighborhood_figure(pattern, size, query)
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.plot, dpi=110)
        print(f"wrote {arguments.plot}")


def _pattern(arguments: argparse.Namespace) -> Pattern:
    ndim = len(arguments.size)
    if ndim > 3:
        raise ValueError(f"--size takes one to three lengths, got {ndim}")
    if min(arguments.size) < 1:
        raise ValueError(f"--size needs lengths of at least 1, got {min(arguments.size)}")

    def one_or_all(name: str, default: int) -> tuple[int, ...]:
        given = getattr(arguments, name.replace("-", "_"))
        given = [default] if given is None else given
        if len(given) not in (1, ndim):
            raise ValueError(f"--{name} takes one value or one per axis of --size, {ndim}, got {len(given)}")
        return tuple(given) * (ndim // len(given))

    if arguments.window is not None:
        for name in ("dilation", "stride", "causal"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} belongs to --kernel-size, windows have none")
        return window_pattern(ndim, one_or_all("window", 1), one_or_all("shift", 0))
    if arguments.shift is not None:
        raise ValueError("--shift belongs to --window, neighborhoods have none")
    causal = [] if arguments.causal is None else arguments.causal or range(ndim)
    if any(not 0 <= axis < ndim for axis in causal):
        raise ValueError(f"--causal takes axes from 0 to {ndim - 1}, got {list(causal)}")
    return neighborhood_pattern(
        ndim,
        one_or_all("kernel-size", 1),
        one_or_all("stride", 1),
        one_or_all("dilation", 1),
        tuple(axis in causal for axis in range(ndim)),
    )


def _convert(arguments: argparse.Namespace) -> None:
    source, target = arguments.input, arguments.output
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    if target.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise ValueError(f"OUT must end in .safetensors, {', '.join(_TORCH_SUFFIXES)}, got {target.name}")
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists, --force overwrites it")
    state_dict = convert.to_official(read_checkpoint(source))
    if arguments.to != "official" and convert.swin.is_swin(state_dict):
        state_dict = getattr(convert.swin, f"to_{arguments.to}")(state_dict)
    elif arguments.to == "huggingface":
        model_type = None if arguments.model_type == "none" else arguments.model_type
        state_dict = convert.to_huggingface(state_dict, model_type)
    elif arguments.to != "official":
        raise ValueError(f"--to {arguments.to} is for Swin, {source} is another model's")
    _write_checkpoint(state_dict, target)
    print(f"wrote {target}: {len(state_dict)} tensors, {arguments.to} keys")


def _write_checkpoint(state_dict: dict[str, Tensor], target: Path) -> None:
    """Writes all or nothing: a temporary file beside the target takes its place once it is complete."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        if target.suffix == ".safetensors":
            temporary.write_bytes(_as_safetensors(state_dict))
        else:
            with temporary.open("wb") as file:
                torch.save(state_dict, file)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _as_safetensors(state_dict: dict[str, Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(f"writing .safetensors needs safetensors (pip install safetensors): {error}") from error
    return save({key: tensor.contiguous() for key, tensor in state_dict.items()}, metadata={"format": "pt"})


def _classify(arguments: argparse.Namespace) -> None:
    entry = model_entry(arguments.model)
    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    labels = arguments.labels.read_text().splitlines() if arguments.labels else None
    cfg = entry.pretrained_cfg()
    image = _read_image(arguments.image, cfg)

    if arguments.weights == "official":
        path = download(arguments.model, entry.url)
    elif arguments.weights == "hf":
        path = download_from_hub(arguments.model, entry.hf_id)
    else:
        path = Path(arguments.weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"--weights must be a file, 'official' or 'hf', there is no {path}")
    state_dict = convert.to_official(read_checkpoint(path))
    if "head.weight" not in state_dict:
        raise ValueError(f"{path} holds no classifier: it has no head.weight")
    classes = state_dict["head.weight"].shape[0]
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{arguments.labels} must have one line per class, {classes}, got {len(labels)}")
    model = create_model(arguments.model, num_classes=classes).eval()
    load_weights(model, state_dict, source=str(path))

    with torch.inference_mode():
        probabilities = model(image).softmax(-1)[0]
    best = probabilities.topk(min(arguments.top, classes))
    if labels is None:
        print("class names are not bundled: these are class indices; --labels FILE gives names, one per line")
    for probability, index in zip(best.values.tolist(), best.indices.tolist()):
        print(f"{probability:7.2%}  {index:5d}" + (f"  {labels[index]}" if labels is not None else ""))


def _read_image(path: Path, cfg: dict) -> Tensor:
    """An image as the published accuracies were measured: shorter side resized, centre cropped, normalised; [1, 3, S, S]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"reading images needs pillow (pip install pillow): {error}") from error
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = cfg["input_size"][-1]
    zoom = round(side / cfg["crop_pct"]) / min(image.size)
    image = image.resize([max(round(length * zoom), side) for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return ((pixels - mean) / std)[None]

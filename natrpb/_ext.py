"""Finds and loads the compiled parts, and reports what runs where.

NATRPB_LIBRARY names another op library to load instead of the installed _C.so; CUDA kernels are then looked for beside it.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(os.environ.get("NATRPB_LIBRARY") or Path(__file__).with_name("_C.so"))
_CUDA_LIBRARY = _LIBRARY.with_name("_C_cuda.so")
_warned: set[str] = set()


def _load_library() -> str | None:
    """Loads the op library; returns why not, or None."""
    if not _LIBRARY.exists():
        return f"natrpb was installed without its compiled library ({_LIBRARY.name} is missing)"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the compiled library did not load: {error}"
    return None


def _load_core():
    try:
        return importlib.import_module("natrpb._core")
    except ImportError:
        return None


def _check_isa() -> None:
    """Warns of an instruction set that NATRPB_ISA asks for in vain."""
    wanted = os.environ.get("NATRPB_ISA")
    if core and wanted and wanted != core.isa():
        names = ", ".join(core.isa_names())
        what = f"NATRPB_ISA must be one of {names} on this machine, got {wanted!r}; natrpb uses {core.isa()}"
        warnings.warn(what, RuntimeWarning, stacklevel=_stacklevel())


def _stacklevel() -> int:
    """For a warning from the function that asks: the level of the nearest caller outside of this package and torch.

    NB: `warnings` does not count importlib's frames either.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("natrpb", "torch", "importlib"):
            break
        level, frame = level + (package != "importlib"), frame.f_back
    return level


def _load_cuda_library() -> str | None:
    """Loads the CUDA kernels of the ops; returns why not, or None."""
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not _CUDA_LIBRARY.exists():
        built = core.build_info()["cuda_reason"] if core else ""
        return f"natrpb was installed without its CUDA kernels ({built or _CUDA_LIBRARY.name + ' is missing'})"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return f"the CUDA kernels did not load: {error}"
    return None


reason = _load_library()
core = _load_core()
_check_isa()
cuda_reason = _load_cuda_library()
compiled_ops = {
    device: frozenset(
        name.removeprefix("natrpb::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(device.upper())
        if name.startswith("natrpb::")
    )
    for device in ("cpu", "cuda")
}  # by device type, the ops that have kernels there


def cuda_architectures() -> list[str]:
    """What the CUDA kernels were compiled for: sm_90 is a binary, compute_90 is PTX, which the driver compiles on loading."""
    return core.build_info()["cuda_architectures"].split() if core else []


def is_served(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a GPU of this compute capability runs code compiled for one of `architectures`.

    A binary runs on its own major version from its minor version on, PTX on every later GPU; the arch-specific kinds (sm_90a)
    on exactly their own.
    """
    for architecture in architectures:
        kind, digits, suffix = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", architecture).groups()
        version = (int(digits[:-1]), int(digits[-1]))
        exact = capability == version
        later = version <= capability and (kind == "compute" or version[0] == capability[0])
        if exact or (later and not suffix):
            return True
    return False


@torch.compiler.assume_constant_result
def _cuda_gap(index: int | None) -> str | None:
    """Why the CUDA kernels do not serve the GPU of this index, or None."""
    return _find_cuda_gap(index) if torch.cuda.is_available() else None  # fake tensors need no GPU


@functools.cache
def _find_cuda_gap(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if is_served(capability, cuda_architectures()):
        return None
    return (
        f"the CUDA kernels were compiled for {' '.join(cuda_architectures())}, which does not serve "
        f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]} "
        f"(build with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]})"
    )


def runs_compiled(device: torch.device, op: str) -> bool:
    """Whether compiled kernels of `op` serve tensors of this device; where not, says so once."""
    kind = device.type
    gap = None
    if op in compiled_ops.get(kind, ()):
        gap = _cuda_gap(device.index) if kind == "cuda" else None
        if gap is None:
            return True
    elif kind == "meta" and reason is None:
        return True
    why = gap or reason or (cuda_reason if kind == "cuda" else None)
    what = f"{op} on {kind}" if why is None else kind
    return _runs_on_reference(what, why or f"there are no kernels of {op} for {kind!r} tensors")


@torch.compiler.assume_constant_result  # a compiler cannot follow a warning
def _runs_on_reference(what: str, why: str) -> bool:
    """Says so once for each `what`; False."""
    if what not in _warned:
        _warned.add(what)
        sentence = "natrpb runs on the plain PyTorch reference, which is slow and stores every attention weight"
        warnings.warn(f"{sentence}: {why}. See natrpb.info().", RuntimeWarning, stacklevel=_stacklevel())
    return False


def _cuda_info() -> dict:
    available = cuda_reason is None and torch.cuda.is_available()
    gaps = [_cuda_gap(i) for i in range(torch.cuda.device_count())] if available else []
    return {
        "loaded": cuda_reason is None,
        "reason": cuda_reason or "; ".join(filter(None, gaps)) or (None if available else "torch finds no GPU"),
        "library": str(_CUDA_LIBRARY) if cuda_reason is None else None,
        "architectures": cuda_architectures(),
        "gpus": [f"{torch.cuda.get_device_name(i)}: {'no kernels' if gap else 'served'}" for i, gap in enumerate(gaps)],
    }


def info() -> dict:
    """What this installation holds and uses.

    Returns:
        A dict: version, torch, compiled (whether the compiled ops are loaded), reason (why not, or None), library (path),
        isa (instruction set in use) and isa_available, threads, devices (with compiled kernels), fallbacks (device types, or
        ops on one, that ran on the plain PyTorch reference so far), cuda (a dict: loaded, whether the CUDA kernels are; reason,
        why they are not or do not serve a GPU, or None; library; architectures they were compiled for; gpus), build (compiler
        and torch of the build, nvcc, and why there is no CUDA part).
    """
    from . import __version__

    devices = ["cpu"] if reason is None else []
    if cuda_reason is None and torch.cuda.is_available():
        devices.append("cuda")
    return {
        "version": __version__,
        "torch": torch.__version__,
        "compiled": reason is None,
        "reason": reason,
        "library": str(_LIBRARY) if reason is None else None,
        "isa": core.isa() if core else None,
        "isa_available": core.isa_names() if core else [],
        "threads": torch.get_num_threads(),
        "devices": devices,
        "fallbacks": sorted(_warned),
        "cuda": _cuda_info(),
        "build": core.build_info() if core else None,
    }

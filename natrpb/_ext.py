"""Finds and loads the compiled parts, and reports what runs where."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "_C.so"
_warned: set[str] = set()


def _load_library() -> str | None:
    """Loads the op library; returns why not, or None."""
    if not _LIBRARY.exists():
        return "natrpb was installed without its compiled library (_C.so is missing)"
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


reason = _load_library()
core = _load_core()
compiled_devices = () if reason else ("cpu", "meta")


def runs_compiled(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors of this device; where not, says so once."""
    if device.type in compiled_devices:
        return True
    if device.type not in _warned:
        _warned.add(device.type)
        why = reason or f"this build has no kernels for {device.type!r} tensors"
        warnings.warn(
            f"natrpb runs on the plain PyTorch reference, which is slow and stores every attention weight: {why}. "
            "See natrpb.info().",
            RuntimeWarning,
            stacklevel=4,
        )
    return False


def info() -> dict:
    """What this installation holds and uses.

    Returns:
        A dict: version, torch, compiled (whether the compiled ops are loaded), reason (why not, or None), library (path),
        isa (instruction set in use) and isa_available, threads, devices (with compiled kernels), fallbacks (device types
        that ran on the plain PyTorch reference so far), build (compiler and torch of the build).
    """
    from . import __version__

    return {
        "version": __version__,
        "torch": torch.__version__,
        "compiled": reason is None,
        "reason": reason,
        "library": str(_LIBRARY) if reason is None else None,
        "isa": core.isa() if core else None,
        "isa_available": core.isa_names() if core else [],
        "threads": torch.get_num_threads(),
        "devices": [device for device in compiled_devices if device != "meta"],
        "fallbacks": sorted(_warned),
        "build": core.build_info() if core else None,
    }

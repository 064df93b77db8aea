"""Builds the two compiled parts: the operator library natrpb/_C.so and the pybind11 module natrpb._core.

Environment:
    NATRPB_BUILD=0   install the Python part only; every op then runs on the plain-PyTorch reference.
    NATRPB_DEBUG=1   -O1 with debug symbols, not stripped.
    MAX_JOBS, CXX    parallel compilations and compiler, as for every torch extension.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
OPERATORS = "natrpb._C"  # loaded with torch.ops.load_library, never imported
CORE = "natrpb._core"


def sources(*groups: str) -> list[str]:
    """The lines of csrc/sources.txt that belong to `groups`, in order."""
    entries = [line.split(": ", 1) for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    return [entry[1] for entry in entries if entry[0] in groups]


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "natrpb/__init__.py").read_text(), re.MULTILINE).group(1)


def extension(name: str, groups: tuple[str, ...], **options) -> Extension:
    """A C++ extension from groups of csrc/sources.txt, with the flags that all of them share."""
    debug = os.environ.get("NATRPB_DEBUG", "0") != "0"
    options["include_dirs"] = [str(ROOT / "csrc/include"), str(ROOT / "csrc"), *options["include_dirs"]]
    return Extension(
        name,
        sources(*groups),
        language="c++",
        extra_compile_args=["-std=c++17", *sources("flag"), *(["-O1", "-g", "-UNDEBUG"] if debug else ["-O3", "-g0"])],
        extra_link_args=[] if debug else ["-Wl,--strip-all"],
        **options,
    )


def operators() -> Extension:
    """The op library. It links libtorch_cpu alone and holds to torch's stable ABI: one build serves torch >= 2.11."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return extension(
        OPERATORS,
        ("base", "cpu", "torch"),
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # 2.11
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
    )


def core() -> Extension:
    """The torch-free look into the compiled core: geometry, CPU features, build information."""
    import pybind11
    import torch

    return extension(
        CORE,
        ("base", "python"),
        define_macros=[("NATRPB_VERSION", f'"{version()}"'), ("NATRPB_BUILD_TORCH", f'"{torch.__version__}"')],
        include_dirs=[pybind11.get_include()],
    )


def compiled() -> dict:
    """The arguments of setup() that add the compiled part."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit(
            f"Python.h not found in {sysconfig.get_path('include')}: install Python's development headers "
            "(python3-dev on Debian and Ubuntu), or set NATRPB_BUILD=0 for an install without compiled ops"
        )
    import torch
    from torch.utils.cpp_extension import BuildExtension

    # A ninja installed beside this Python counts even where its environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    class Build(BuildExtension):
        def build_extension(self, ext):
            # Installers hand over a fresh temporary folder each time. A fixed one lets ninja rebuild only what changed,
            # and one for each extension keeps apart the objects of sources that several of them share.
            environment = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / environment / ext.name)
            super().build_extension(ext)

        def get_ext_filename(self, ext_name):
            filename = super().get_ext_filename(ext_name)
            if ext_name.rpartition(".")[2] == OPERATORS.rpartition(".")[2]:  # no Python in it, hence no Python tag
                return filename.removesuffix(sysconfig.get_config_var("EXT_SUFFIX")) + ".so"
            return filename

    return {"ext_modules": [operators(), core()], "cmdclass": {"build_ext": Build}}


setup(**({} if os.environ.get("NATRPB_BUILD") == "0" else compiled()))

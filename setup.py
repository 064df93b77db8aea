"""Builds the compiled parts: the operator libraries natrpb/_C.so and, where there is nvcc, natrpb/_C_cuda.so, and the pybind11
module natrpb._core.

Environment:
    NATRPB_BUILD=0          install the Python part only; every op then runs on the plain-PyTorch reference.
    NATRPB_CUDA=0 or 1      leave the CUDA kernels out, or end with an error if there is no nvcc. Otherwise they are built if
                            nvcc is found, also beside a torch without CUDA.
    CUDA_HOME               the CUDA toolkit; without it that of the nvcc on PATH.
    TORCH_CUDA_ARCH_LIST    architectures, as in 8.0;9.0+PTX; without it those of the GPUs that torch sees, or else what nvcc
                            knows of 8.0, 9.0, 10.0 and 12.0, with PTX. What is older than 8.0 is left out.
    NATRPB_DEBUG=1          -O1 with debug symbols, not stripped.
    MAX_JOBS, CXX           parallel compilations and compiler, as for every torch extension.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
OPERATORS = "natrpb._C"  # loaded with torch.ops.load_library, never imported
CUDA_OPERATORS = "natrpb._C_cuda"  # the same
CORE = "natrpb._core"
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # torch 2.11
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
OLDEST_NVCC = (12, 4)


def sources(*groups: str) -> list[str]:
    """The lines of csrc/sources.txt that belong to `groups`, in order."""
    entries = [line.split(": ", 1) for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    return [entry[1] for entry in entries if entry[0] in groups]


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "natrpb/__init__.py").read_text(), re.MULTILINE).group(1)


def extension(name: str, groups: tuple[str, ...], **options) -> Extension:
    """A C++ extension from groups of csrc/sources.txt, with the flags that all of them share."""
    debug = os.environ.get("NATRPB_DEBUG", "0") != "0"
    optimise = ["-O1", "-g", "-UNDEBUG"] if debug else ["-O3", "-g0"]
    options["include_dirs"] = [str(ROOT / "csrc/include"), str(ROOT / "csrc"), *options["include_dirs"]]
    return Extension(
        name,
        sources(*groups),
        language="c++",
        extra_compile_args={
            "cxx": ["-std=c++17", *sources("flag"), *optimise],
            "nvcc": ["-std=c++17", "-O3", "-Xfatbin=-compress-all", "-Xcompiler=-fvisibility=hidden", *options.pop("nvcc", ())],
        },
        extra_link_args=[*options.pop("link", ()), *([] if debug else ["-Wl,--strip-all"])],
        **options,
    )


def operators() -> Extension:
    """The op library. It links libtorch_cpu alone and holds to torch's stable ABI: one build serves torch >= 2.11."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return extension(
        OPERATORS,
        ("base", "cpu", "schema", "torch_cpu"),
        define_macros=[STABLE_ABI],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
    )


def cuda_operators(cuda: Cuda) -> Extension:
    """The CUDA kernels of the ops, loaded beside the op library, which holds their schemas.

    CUDA's runtime is linked statically: it needs no runtime library of the version that nvcc has, whichever torch has loaded,
    and works on the contexts and streams of the driver, which both share.
    """
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    return extension(
        CUDA_OPERATORS,
        ("cuda", "torch_cuda"),
        define_macros=[STABLE_ABI],
        include_dirs=[*include_paths(), str(cuda.home / "include")],
        library_dirs=[*library_paths(), *(str(cuda.home / folder) for folder in ("lib64", "lib"))],
        libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
        # libtorch leads to libtorch_cuda where torch has CUDA. The linker would drop it: a CPU torch resolves nothing by it.
        link=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
        nvcc=[*cuda.gencode, *([] if torch.version.cuda else ["-MMD"])],
    )


def core(cuda: Cuda) -> Extension:
    """The torch-free look into the compiled core: geometry, CPU features, build information."""
    import pybind11
    import torch

    texts = {
        "NATRPB_VERSION": version(),
        "NATRPB_BUILD_TORCH": torch.__version__,
        "NATRPB_BUILD_NVCC": cuda.version,
        "NATRPB_BUILD_CUDA": " ".join(cuda.architectures),
        "NATRPB_BUILD_CUDA_REASON": cuda.reason,
    }
    return extension(
        CORE,
        ("base", "python"),
        define_macros=[(name, f'"{text}"') for name, text in texts.items()],
        include_dirs=[pybind11.get_include()],
    )


@dataclass
class Cuda:
    """The CUDA part of this build, or why there is none."""

    reason: str = ""
    home: Path | None = None
    version: str = ""
    gencode: list[str] = field(default_factory=list)

    @property
    def architectures(self) -> list[str]:
        """sm_90 for a binary, compute_90 for PTX, lowest first."""
        codes = [flag.rpartition("code=")[2] for flag in self.gencode]
        return sorted(codes, key=lambda code: (int(re.sub(r"\D", "", code)), code))


def nvcc_output(nvcc: str, *arguments: str) -> str:
    result = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return result.stdout


def find_cuda() -> Cuda:
    """The toolkit and the architectures to build for."""
    import torch
    from torch.utils import cpp_extension

    wanted = os.environ.get("NATRPB_CUDA", "auto")
    if wanted == "0":
        return Cuda(reason="built with NATRPB_CUDA=0")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        reason = f"no nvcc at build: neither in CUDA_HOME ({home or 'not set'}) nor on PATH"
        if wanted == "1":
            raise SystemExit(f"NATRPB_CUDA=1, but {reason}")
        return Cuda(reason=reason)
    if not home:  # NB: the nvcc on PATH may be a script that calls another
        home = re.search(r"^#\$ TOP=(.+)$", nvcc_output(nvcc, "-dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE).group(1)
    release = re.search(r"release (\d+\.\d+)", nvcc_output(nvcc, "--version")).group(1)
    reason = ""
    if tuple(map(int, release.split("."))) < OLDEST_NVCC:
        reason = f"nvcc at build was of CUDA {release}, the kernels need {'.'.join(map(str, OLDEST_NVCC))}"
    elif wanted != "1" and torch.version.cuda and torch.version.cuda.split(".")[0] != release.split(".")[0]:
        reason = f"nvcc at build was of CUDA {release}, torch of CUDA {torch.version.cuda}"
    else:
        if torch.cuda.device_count() == 0 and os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() in ("", "native"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(nvcc)
        # A torch without CUDA looks for no toolkit of its own.
        cpp_extension.CUDA_HOME = str(Path(home).resolve())
        gencode = [flag for flag in cpp_extension._get_cuda_arch_flags() if is_supported(flag)]
        if not gencode:
            reason = "no architecture to build for has the compute capability 8.0 that the kernels need"
    if reason and wanted == "1":
        raise SystemExit(f"NATRPB_CUDA=1, but {reason}")
    return Cuda(reason=reason) if reason else Cuda(home=Path(home).resolve(), version=release, gencode=gencode)


def default_architectures(nvcc: str) -> str:
    """Those of `DEFAULT_ARCHITECTURES` that this nvcc knows, the last with PTX."""
    known = set(re.findall(r"compute_(\d+)", nvcc_output(nvcc, "--list-gpu-arch")))
    return ";".join(name for name in DEFAULT_ARCHITECTURES if name.replace(".", "") in known) + "+PTX"


def is_supported(flag: str) -> bool:
    """Whether an nvcc flag asks for code of compute capability 8.0 or later."""
    return int(re.search(r"code=(?:sm|compute)_(\d+)", flag).group(1)) >= 80


def remove_outdated(build: Path) -> None:
    """Removes CUDA objects that are older than a file they include.

    torch's ninja rules track these files themselves, but only in a torch with CUDA: for the others nvcc writes x.d beside x.o.
    """
    for listing in build.rglob("*.d"):
        compiled = listing.with_suffix(".o")
        if listing.name.endswith(".o.d") or not compiled.exists():
            continue
        included = map(Path, listing.read_text().replace("\\\n", " ").partition(":")[2].split())
        if any(not path.exists() or path.stat().st_mtime > compiled.stat().st_mtime for path in included):
            compiled.unlink()


def compiled() -> dict:
    """The arguments of setup() that add the compiled part."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit(
            f"Python.h not found in {sysconfig.get_path('include')}: install Python's development headers "
            "(python3-dev on Debian and Ubuntu), or set NATRPB_BUILD=0 for an install without compiled ops"
        )
    import torch
    from torch.utils.cpp_extension import BuildExtension

    cuda = find_cuda()

    # A ninja installed beside this Python counts even where its environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    class Build(BuildExtension):
        def build_extension(self, ext):
            # Installers hand over a fresh temporary folder each time. A fixed one lets ninja rebuild only what changed,
            # and one for each extension keeps apart the objects of sources that several of them share.
            environment = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / environment / ext.name)
            remove_outdated(Path(self.build_temp))
            super().build_extension(ext)

        def swig_sources(self, sources, ext):  # the one hook between sorting the sources by name and compiling them
            return sorted(super().swig_sources(sources, ext), key=ext.sources.index)

        def run(self):
            super().run()
            if not cuda.home and (self.inplace or self.editable_mode):
                (ROOT / "natrpb/_C_cuda.so").unlink(missing_ok=True)  # of an earlier build, for other schemas perhaps

        def get_ext_filename(self, ext_name):
            filename = super().get_ext_filename(ext_name)
            if not ext_name.endswith(CORE.rpartition(".")[2]):  # no Python in it, hence no Python tag
                return filename.removesuffix(sysconfig.get_config_var("EXT_SUFFIX")) + ".so"
            return filename

    extensions = [operators(), core(cuda), *([cuda_operators(cuda)] if cuda.home else [])]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


# The license stands here since setuptools before 77, which Python 3.11 still brings, refuse its newer form in pyproject.toml.
setup(license="MIT", license_files=["LICENSE"], **({} if os.environ.get("NATRPB_BUILD") == "0" else compiled()))

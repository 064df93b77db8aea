"""What nvcc made of the CUDA kernels, read from the library that ships.

python -m tests.cuda_report [LIBRARY]      registers of every kernel, as a table in Markdown
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import natrpb

LIBRARY = Path(natrpb.__file__).with_name("_C_cuda.so")
TENSOR_CORE = {"HMMA", "LDSM", "LDGSTS"}  # products, ldmatrix, cp.async


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    architecture: str
    symbol: str
    name: str  # demangled, with template arguments, without parameters
    registers: int
    stack: int  # bytes of local memory per thread: spills, and arrays that did not fit registers

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether it is one of the matrix kernels of csrc/cuda/local_attention_mma*."""
        return "::mma::" in self.name and "prepare" not in self.name


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: from the CUDA toolkit, or from NVIDIA's Python packages."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    packages = importlib.util.find_spec("nvidia")
    for location in packages.submodule_search_locations if packages else []:
        folders += sorted(Path(location).glob("cu*/bin"))
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def cuobjdump(*arguments: str) -> str:
    command = tool("cuobjdump")
    if command is None:
        raise FileNotFoundError("cuobjdump is neither in CUDA_HOME nor on PATH, nor installed as nvidia-cuda-cuobjdump")
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(command).parent), os.environ.get("PATH", "")])}
    return subprocess.run([command, *arguments], capture_output=True, text=True, check=True, env=environment).stdout


def images(library: Path = LIBRARY) -> set[str]:
    """What the library holds: sm_90 for a binary, compute_90 for PTX."""
    binaries = re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf", str(library)))
    ptx = re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("--list-ptx", str(library)))
    return {*binaries, *(f"compute_{digits}" for digits in ptx)}


def demangled(names: list[str]) -> list[str]:
    """C++ names without their parameters; as they are where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return names
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [
        re.sub(r"^void |\((?!anonymous).*$", "", line).replace("(anonymous namespace)::", "") for line in output.splitlines()
    ]


def kernels(library: Path = LIBRARY) -> list[Kernel]:
    """Every kernel of the library for every architecture."""
    found = []
    for block in cuobjdump("--dump-resource-usage", str(library)).split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\w+)", block)[1]
        for symbol, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", block):
            found.append((architecture, symbol, int(registers), int(stack)))
    names = demangled([symbol for _, symbol, *_ in found])
    return [Kernel(architecture, symbol, name, *rest) for (architecture, symbol, *rest), name in zip(found, names, strict=True)]


def opcodes(architecture: str, chosen: list[Kernel], library: Path = LIBRARY) -> dict[str, set[str]]:
    """The opcodes, without modifiers, of the chosen kernels as compiled for one architecture, by symbol."""
    symbols = ",".join(kernel.symbol for kernel in chosen)
    listing = cuobjdump("--dump-sass", "--gpu-architecture", architecture, "--function", symbols, str(library))
    blocks = listing.split("Function : ")[1:]
    return {block.split(maxsplit=1)[0]: set(re.findall(r"\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", block)) for block in blocks}


def main() -> None:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    architectures = sorted((name for name in images(library) if name.startswith("sm_")), key=lambda name: (len(name), name))
    table: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels(library):
        table.setdefault(kernel.name, {})[kernel.architecture] = kernel
    print("registers per thread (and bytes of local memory, where there is any) by architecture\n")
    print(f"| kernel | {' | '.join(architectures)} |")
    print(f"|---|{'---|' * len(architectures)}")
    for name, row in sorted(table.items()):
        cells = (
            f"{kernel.registers}{f' ({kernel.stack} B)' if kernel.stack else ''}" for kernel in map(row.get, architectures)
        )
        print(f"| `{name.removeprefix('natrpb::cuda::')}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

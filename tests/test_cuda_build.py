"""The CUDA part as built: architectures, no spills, tensor-core instructions, loading beside a CPU torch; needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import natrpb
from natrpb import _ext

from .cuda_report import LIBRARY, TENSOR_CORE, Kernel, images, kernels, opcodes, tool

ROOT = Path(__file__).resolve().parents[1]
MUST_BUILD = os.environ.get("NATRPB_CUDA") == "1"  # `make test`
built = pytest.mark.skipif(not LIBRARY.exists() and not MUST_BUILD, reason="natrpb was built without CUDA kernels")
disassembled = pytest.mark.skipif(tool("cuobjdump") is None and not MUST_BUILD, reason="cuobjdump is not installed")


def python(script: str, **environment: str) -> str:
    """What a Python process prints."""
    process = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    return kernels()


def _binaries() -> tuple[str, ...]:
    return tuple(name for name in _ext.cuda_architectures() if name.startswith("sm_"))


def _ids(kernels: list[Kernel]) -> str:
    return "\n".join(f"{kernel.architecture} {kernel.name}" for kernel in kernels)


@built
@disassembled
class TestMachineCode:
    def test_holds_the_architectures_that_info_names(self):
        assert images() == set(_ext.cuda_architectures())
        if MUST_BUILD:
            assert images() == {"sm_80", "sm_90", "sm_100", "sm_120", "compute_120"}

    def test_every_architecture_has_the_same_kernels(self, compiled):
        names = {architecture: {k.name for k in compiled if k.architecture == architecture} for architecture in _binaries()}
        assert all(names[architecture] == names[_binaries()[0]] for architecture in names)

    def test_nothing_spills(self, compiled):
        spilled = [kernel for kernel in compiled if kernel.stack]
        assert compiled and not spilled, f"local memory in\n{_ids(spilled)}"

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
    def test_matrix_kernels_use_tensor_cores(self, compiled, architecture):
        if architecture not in _binaries() and not MUST_BUILD:
            pytest.skip(f"not built for {architecture}")
        matrix = [kernel for kernel in compiled if kernel.uses_tensor_cores and kernel.architecture == architecture]
        for storage in ("__half", "__nv_bfloat16"):
            assert any(storage in kernel.name for kernel in matrix)
        found = opcodes(architecture, matrix)
        plain = [kernel for kernel in matrix if not found[kernel.symbol] >= TENSOR_CORE]
        assert not plain, f"not all of {', '.join(TENSOR_CORE)} in\n{_ids(plain)}"

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
    def test_irpe_attention_of_16_bits_uses_tensor_cores(self, compiled, architecture):
        if architecture not in _binaries() and not MUST_BUILD:
            pytest.skip(f"not built for {architecture}")
        attend = [k for k in compiled if "irpe::attend<__" in k.name and k.architecture == architecture]
        assert len(attend) == 6  # two types, three passes
        found = opcodes(architecture, attend)
        plain = [kernel for kernel in attend if not found[kernel.symbol] >= {"HMMA", "LDSM"}]
        assert not plain, f"no tensor cores in\n{_ids(plain)}"


@built
def test_loads_beside_any_torch():
    """Under a torch without CUDA the stream function is missing, and nothing else may be."""
    ops = sorted(_ext.compiled_ops["cpu"])
    assert {"local_attention_forward", "irpe_attention_backward", "rpe_index"} <= set(ops)
    script = (
        "import torch, natrpb\n"
        f"torch.ops.load_library({str(LIBRARY)!r})\n"
        f"print(all(torch._C._dispatch_has_kernel_for_dispatch_key('natrpb::' + name, 'CUDA') for name in {ops}))"
    )
    assert python(script) == "True"


def test_info_says_what_there_is_of_cuda():
    info = natrpb.info()
    assert info["cuda"]["loaded"] is (info["cuda"]["library"] is not None)
    assert ("cuda" in info["devices"]) is (info["cuda"]["loaded"] and torch.cuda.is_available())
    if torch.version.cuda is None and info["compiled"]:
        assert info["cuda"]["reason"] == "this torch was built without CUDA"
    if info["build"] and "NATRPB_LIBRARY" not in os.environ:
        assert bool(info["cuda"]["architectures"]) is LIBRARY.exists()
        assert bool(info["build"]["cuda_reason"]) is not LIBRARY.exists()


@pytest.mark.parametrize(
    "capability, architectures, served",
    [
        ((8, 0), "sm_80", True),
        ((8, 9), "sm_80", True),
        ((8, 0), "sm_89", False),
        ((9, 0), "sm_80", False),
        ((9, 0), "sm_80 compute_80", True),
        ((7, 5), "sm_80 compute_80", False),
        ((10, 3), "sm_80 sm_90 sm_100 sm_120 compute_120", True),
        ((11, 0), "sm_80 sm_90 sm_100 sm_120 compute_120", False),
        ((12, 1), "sm_80 sm_90 sm_100 sm_120 compute_120", True),
        ((13, 0), "sm_80 sm_90 sm_100 sm_120 compute_120", True),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a compute_90a", False),
        ((9, 0), "", False),
    ],
    ids=str,
)
def test_which_gpus_a_build_serves(capability, architectures, served):
    assert _ext.is_served(capability, architectures.split()) is served


def test_another_library_can_be_named(tmp_path):
    missing = tmp_path / "other.so"
    script = "import natrpb; print(natrpb.info()['reason'], natrpb.info()['devices'])"
    assert python(script, NATRPB_LIBRARY=str(missing)).startswith("natrpb was installed without its compiled library (other.so")
    if _ext.reason is None:
        script = "import natrpb; print(natrpb.info()['library'])"
        copy = tmp_path / "_C.so"
        copy.write_bytes(Path(natrpb.info()["library"]).read_bytes())
        assert python(script, NATRPB_LIBRARY=str(copy)) == str(copy)


FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.0" ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
esac
"""


FIND_CUDA = """
import os, setuptools
setuptools.setup = lambda **_: None
import setup
for must in ("auto", "1"):
    os.environ["NATRPB_CUDA"] = must
    try:
        cuda = setup.find_cuda()
        print(cuda.reason or " ".join(cuda.architectures))
    except SystemExit as end:
        print(end)
"""


@pytest.mark.parametrize(
    ("release", "asked", "expected"),
    [
        ("12.4", None, "sm_80 compute_90 sm_90"),
        ("12.4", "", "sm_80 compute_90 sm_90"),
        ("12.4", "native", "sm_80 compute_90 sm_90"),
        ("12.4", "7.5;8.6", "sm_86"),
        ("12.4", "7.0;7.5+PTX", "no architecture to build for has the compute capability 8.0 that the kernels need"),
        ("11.8", None, "nvcc at build was of CUDA 11.8, the kernels need 12.4"),
    ],
    ids=str,
)
def test_what_is_built_beside_a_torch_without_cuda(release, asked, expected, tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("the torch here has CUDA, of a version of its own")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(release=release))
    nvcc.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment |= {"CUDA_HOME": str(tmp_path), "NATRPB_BUILD": "0"}
    if asked is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = asked
    process = subprocess.run([sys.executable, "-c", FIND_CUDA], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found, must = process.stdout.splitlines()
    assert found == expected
    assert must == (expected if expected.startswith("sm_") else f"NATRPB_CUDA=1, but {expected}")


@pytest.mark.parametrize("home", ["", "/nowhere"], ids=["no-home", "empty-home"])
def test_build_that_must_have_cuda_ends_without_nvcc(home):
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    environment |= {"NATRPB_CUDA": "1", "PATH": "/nowhere"} | ({"CUDA_HOME": home} if home else {})
    process = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode != 0
    assert f"NATRPB_CUDA=1, but no nvcc at build: neither in CUDA_HOME ({home or 'not set'}) nor on PATH" in process.stderr

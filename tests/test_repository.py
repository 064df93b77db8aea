"""The walls between the layers, and what must agree across files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import natrpb

ROOT = Path(__file__).resolve().parents[1]
NATIVE_SUFFIXES = {".h", ".inl", ".cpp", ".cu", ".cuh"}
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in NATIVE_SUFFIXES)
PYTHON = sorted(
    path
    for folder in ("natrpb", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip
MAX_LINES = 520


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_comments(path: Path) -> str:
    """C++ source without comments and without the contents of string literals, keeping the lines."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
    keep_lines = lambda match: '""' if match[0][0] == '"' else "\n" * match[0].count("\n")  # noqa: E731
    return token.sub(keep_lines, path.read_text())


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(group: str) -> list[str]:
    return re.findall(rf"^{group}: (.+)$", (ROOT / "csrc/sources.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", NATIVE, ids=name)
class TestNativeFile:
    def test_includes_stay_in_their_layer(self, path: Path):
        layer = path.relative_to(ROOT / "csrc").parts[0]
        for header in includes(path):
            if header.startswith(("torch/", "ATen/", "c10/", "caffe2/")):
                assert layer == "torch", f"{header}: torch headers belong in csrc/torch"
                stable = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")
                own = (ROOT / "csrc" / header).exists()
                assert own or header.startswith(stable), f"{header} is outside torch's stable ABI"
            if header.startswith(("pybind11/", "Python.h")):
                assert layer == "python", f"{header}: Python belongs in csrc/python"
            if header.startswith("cuda"):
                assert layer == "cuda", f"{header}: CUDA headers belong in csrc/cuda"

    def test_neither_prints_nor_exits(self, path: Path):
        code = without_comments(path)
        found = re.findall(r"\b(?:exit|_Exit|quick_exit|abort|terminate|f?printf|puts|putchar|assert)\s*\(", code)
        found += re.findall(r"\bstd::(?:cout|cerr|clog)\b|#\s*include\s*<iostream>", code)
        assert not found, "library code returns a status and says nothing"

    def test_launches_no_kernel_by_syntax(self, path: Path):
        assert "<<<" not in without_comments(path)

    def test_names_no_instruction_set_in_flags(self, path: Path):
        assert "-march=" not in path.read_text()


@pytest.mark.parametrize("path", NATIVE + PYTHON, ids=name)
def test_file_stays_readable(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_every_source_is_listed_once():
    groups = ("base", "cpu", "cuda", "schema", "torch_cpu", "torch_cuda", "python")
    listed = [path for group in groups for path in sources(group)]
    present = [name(path) for path in NATIVE if path.suffix in {".cpp", ".cu"}]
    assert sorted(listed) == sorted(present)


def test_every_cpp_test_is_run():
    lists = "".join((ROOT / folder / "CMakeLists.txt").read_text() for folder in (".", "tests/emulator"))
    assert {path.stem for path in (ROOT / "tests/cpp").glob("test_*.cpp")} <= set(re.findall(r"\btest_\w+", lists))


def test_flags_hold_for_every_machine():
    assert not [flag for flag in sources("flag") if flag.startswith(("-m", "-ffast-math", "-Ofast"))]


def test_versions_agree():
    assert re.search(rf"^## {re.escape(natrpb.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    build = natrpb.info()["build"]
    assert build is None or build["version"] == natrpb.__version__


def test_requirements_are_pinned():
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or re.match(r"[\w-]+==[\w.]+(; .+)?$", line), line

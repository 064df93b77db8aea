"""Settings and fixtures of all tests: one torch thread per pytest worker, reproducible draws, poisoned memory, and where the
ops run: the CPU kernels, the emulator, or a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic
from hypothesis import settings

from .torchvision_operators import define_torchvision_operators

settings.register_profile("natrpb", derandomize=True, deadline=None, database=None)
settings.load_profile("natrpb")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# What a case may cost in the emulator, in multiply-adds of its forward: a second or two.
EMULATED_WORK = 8e6


def pytest_addoption(parser):
    parser.addoption(
        "--emulator",
        metavar="LIBRARY",
        help="run the ops on the CUDA kernels compiled for the CPU (_C_emulator.so); skips what costs too much there",
    )
    parser.addoption("--device", help="where tests draw their tensors, as in cuda; refused where no kernels serve it")


def pytest_configure(config):
    config.addinivalue_line("markers", "not_emulated(reason): skipped where the ops run on the emulated CUDA kernels")
    config.addinivalue_line("markers", "not_on_cuda(reason): skipped where --device puts the tensors on a GPU")
    if config.getoption("--emulator"):
        library = Path(config.getoption("--emulator")).resolve(strict=True)
        os.environ["NATRPB_LIBRARY"] = str(library)  # read when natrpb is imported
    if config.getoption("--device"):
        _draw_tensors_on(torch.device(config.getoption("--device")))


def _draw_tensors_on(device: torch.device) -> None:
    """Makes `device` the one that tensors are made on where a test names none."""
    if device.type == "cuda":
        # NB: torch's deterministic mode, which poisons memory, refuses cuBLAS without this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        import natrpb

        if reason := natrpb.info()["cuda"]["reason"]:
            raise pytest.UsageError(f"--device {device}: {reason}")
    torch.set_default_device(device)


def pytest_report_header(config):
    lines = []
    if "NATRPB_LIBRARY" in os.environ:
        lines.append(f"ops: {os.environ['NATRPB_LIBRARY']}")
    if config.getoption("--device"):
        device = torch.get_default_device()
        lines.append(f"tensors on {device}" + (f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""))
    return lines


def pytest_collection_modifyitems(config, items):
    if torch.get_default_device().type == "cuda":
        for item in items:
            for marker in item.iter_markers("not_on_cuda"):
                item.add_marker(pytest.mark.skip(reason=f"not on a GPU: {marker.args[0]}"))
    if not config.getoption("--emulator"):
        return
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if case is not None and case.size * (case.head_dim + (case.value_dim or case.head_dim)) > EMULATED_WORK:
            item.add_marker(pytest.mark.skip(reason="not emulated: the case is too large"))
        for marker in item.iter_markers("not_emulated"):
            item.add_marker(pytest.mark.skip(reason=f"not emulated: {marker.args[0]}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Ends a process whose GPU has failed: every later call would fail as well, and tell nothing. xdist starts another."""
    yield
    failure = call.excinfo and call.excinfo.value
    if not isinstance(failure, RuntimeError) or "CUDA error" not in str(failure):
        return
    print(f"{item.nodeid}: {call.excinfo.getrepr(style='short')}", file=sys.__stderr__, flush=True)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)
    pytest.exit("the GPU has failed", returncode=3)


define_torchvision_operators()


@pytest.fixture(autouse=True)
def seeded():
    """Makes every test draw the same numbers, alone or in a crowd."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills what `torch.empty` returns with NaN, so that a result left unwritten, or read too early, shows itself."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Tables and masks of the official NAT and Swin code, by name."""

    def number(item):
        return [number(x) for x in item] if isinstance(item, list) else float(item)

    tables = json.loads(Path(__file__).with_name("golden.json").read_text())
    return {name: torch.tensor(number(table)) for name, table in tables.items()}

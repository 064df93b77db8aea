"""An installation without the compiled library works on the reference, and says so once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import natrpb
from natrpb import _ext

PACKAGE = Path(natrpb.__file__).parent
SCRIPT = """
import json, sys, warnings
import torch

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import natrpb

    inputs = torch.load(sys.argv[1])
    query, key, value, rpb = (x.requires_grad_() for x in inputs)
    for _ in range(2):
        out = natrpb.na2d(query, key, value, 3, dilation=2, rpb=rpb)
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value, rpb))
    scores = natrpb.na2d_qk(query.movedim(-2, 1), key.movedim(-2, 1), 3, rpb=rpb)
    natrpb.create_model("nat_mini", depths=(1, 1, 1, 1))(torch.randn(1, 3, 32, 32))

torch.save([out.detach(), *gradients, scores.detach()], sys.argv[2])
ours = [str(w.message) for w in said if "natrpb" in str(w.message)]
assert all(w.filename == "<string>" for w in said if "natrpb" in str(w.message)), "a warning names its caller"
print(json.dumps({"warnings": ours, "info": natrpb.info()}))
"""


def results_of(inputs) -> list[torch.Tensor]:
    query, key, value, rpb = (x.clone().requires_grad_() for x in inputs)
    out = natrpb.na2d(query, key, value, 3, dilation=2, rpb=rpb)
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value, rpb))
    scores = natrpb.na2d_qk(query.movedim(-2, 1), key.movedim(-2, 1), 3, rpb=rpb)
    return [out.detach(), *gradients, scores.detach()]


@pytest.mark.parametrize("library", [None, b"this is no shared library"], ids=["missing", "damaged"])
def test_reference_serves_where_the_library_does_not(library, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "natrpb", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (tmp_path / "natrpb" / "_C.so").write_bytes(library)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 7, 8, 2, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    inputs.append(torch.randn(2, 5, 5, dtype=torch.float64, generator=generator))
    torch.save(inputs, tmp_path / "inputs.pt")

    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt")]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)

    assert len(report["warnings"]) == 1 and "reference" in report["warnings"][0]
    assert report["info"]["compiled"] is False and report["info"]["devices"] == []
    assert report["info"]["fallbacks"] == ["cpu"]
    assert ("missing" if library is None else "did not load") in report["info"]["reason"]
    for theirs, ours in zip(torch.load(tmp_path / "results.pt"), results_of(inputs)):
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


def test_a_compiled_call_falls_back_too(monkeypatch):
    monkeypatch.setattr(_ext, "compiled_ops", {})
    monkeypatch.setattr(_ext, "_warned", set())
    torch._dynamo.reset()
    attention = natrpb.NeighborhoodAttention2D(8, 2, 3)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 5, 6, 8)
    with pytest.warns(RuntimeWarning, match="runs on the plain PyTorch reference"):
        out = compiled(x)
    torch.testing.assert_close(out, attention(x))
    torch._dynamo.reset()


@pytest.mark.skipif(os.environ.get("NATRPB_CUDA") != "1", reason="make test alone insists on what was compiled")
def test_compiled_ops_are_what_is_tested():
    """Otherwise most tests would compare the reference with itself, and the others skip."""
    assert natrpb.info()["compiled"], natrpb.info()["reason"]


def test_info_names_what_runs():
    info = natrpb.info()
    assert info["version"] == natrpb.__version__ and info["torch"] == torch.__version__
    if info["compiled"]:
        assert info["reason"] is None and info["isa"] in info["isa_available"] and "cpu" in info["devices"]


def test_an_op_without_kernels_falls_back_alone(monkeypatch):
    monkeypatch.setattr(_ext, "cuda_reason", None)
    monkeypatch.setattr(_ext, "compiled_ops", {"cuda": frozenset({"local_qk"})})
    monkeypatch.setattr(_ext, "_cuda_gap", lambda index: None)
    monkeypatch.setattr(_ext, "_warned", set())
    device = torch.device("cuda")
    assert _ext.runs_compiled(device, "local_qk")
    with pytest.warns(RuntimeWarning, match="there are no kernels of rpe_index for 'cuda' tensors"):
        assert not _ext.runs_compiled(device, "rpe_index")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _ext.runs_compiled(device, "rpe_index"), "said once"
    assert natrpb.info()["fallbacks"] == ["rpe_index on cuda"]


def test_a_gpu_that_the_kernels_do_not_serve_falls_back(monkeypatch):
    gap = "the CUDA kernels were compiled for sm_80, which does not serve this GPU"
    monkeypatch.setattr(_ext, "cuda_reason", None)
    monkeypatch.setattr(_ext, "compiled_ops", {"cuda": frozenset({"local_qk"})})
    monkeypatch.setattr(_ext, "_cuda_gap", lambda index: gap)
    monkeypatch.setattr(_ext, "_warned", set())
    with pytest.warns(RuntimeWarning, match=gap):
        assert not _ext.runs_compiled(torch.device("cuda"), "local_qk")

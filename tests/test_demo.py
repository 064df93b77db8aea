"""The demo, shortened: it runs, says what it measured, repeats itself, and leaves the pictures and the model that it names."""

from __future__ import annotations

import json
import re
import runpy
import struct
import sys

import pytest
import torch
from safetensors import safe_open

from natrpb.models import NAT

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

from examples import digits  # noqa: E402  (it exits where a package is missing)


@pytest.fixture(autouse=True)
def one_thread():
    """Two spinning threads are far slower than one as soon as another process wants a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


def test_the_short_demo_learns_and_leaves_its_results(capsys, tmp_path):
    digits.main(["--quick", "--out", str(tmp_path / "new" / "folder")])
    out = tmp_path / "new" / "folder"
    said = capsys.readouterr().out
    reached = float(re.search(r"held-out accuracy\s+([\d.]+)%", said)[1])
    assert reached > 20, "ten classes, a few steps"
    switched_off = float(re.search(r"RPB switched off \(tables zeroed\)\s+([\d.]+)%", said)[1])
    assert re.search(r"a model trained without RPB from the start\s+[\d.]+%", said)
    assert re.search(r"forward .* times faster\n +training step .* times faster", said) or "runs on the reference here" in said

    for picture in ("bias_tables.png", "attention.png", "denoised.png"):
        assert picture in said
        assert (out / picture).stat().st_size > 20_000 and min(png_size(out / picture)) > 250

    # The model comes back from its file, and is as good as the demo said.
    with safe_open(out / "digits_nat.safetensors", "pt") as file:
        facts, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    model = NAT(**json.loads(facts["natrpb.models.NAT"])).eval()
    model.load_state_dict(weights)
    data = digits.read_digits()
    assert digits.accuracy(model, data) * 100 == pytest.approx(reached, abs=0.01)
    assert digits.accuracy(digits.without_bias(model), data) * 100 == pytest.approx(switched_off, abs=0.01)


def test_a_seed_decides_everything():
    data = digits.Digits(*(tensor[:64] for tensor in digits.read_digits()))
    first, again, other = (digits.train_on_digits(data, epochs=2, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_held_out_quarter_is_stratified_and_apart():
    data = digits.read_digits()
    assert (len(data.labels), len(data.held_out_labels)) == (1347, 450)
    shares = data.held_out_labels.bincount() / torch.cat([data.labels, data.held_out_labels]).bincount()
    assert (shares - 0.25).abs().max() < 0.01


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_a_missing_package_is_named(monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"The demo needs .* \(.*{package}.*\): run it by `make demo`"):
        runpy.run_path(digits.__file__)


def test_refuses_no_epochs(capsys):
    with pytest.raises(SystemExit):
        digits.main(["--epochs", "0"])
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err

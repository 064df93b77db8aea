"""The demo, shortened: it runs, says what it measured, and leaves the pictures and the model that it names."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_the_short_demo_learns_and_leaves_its_results(capsys, tmp_path):
    from examples.digits import main

    main(["--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert float(re.search(r"held-out accuracy\s+([\d.]+)%", said)[1]) > 15, "ten classes, a few steps"
    assert re.search(r"RPB switched off \(tables zeroed\)\s+[\d.]+%", said)
    assert re.search(r"training step .* times faster", said)
    for picture in ("bias_tables.png", "attention.png", "denoised.png"):
        assert picture in said
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and (tmp_path / picture).stat().st_size > 20_000
    weights = load_file(tmp_path / "digits_nat.safetensors")
    assert any(name.endswith("attn.rpb") and table.abs().max() > 0 for name, table in weights.items())

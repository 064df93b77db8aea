"""The fine-tuning example, shortened: its splits share no digit, it reports both of them, and it leaves its picture."""

from __future__ import annotations

import re
import sys

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

from examples import finetune_swin  # noqa: E402

pytestmark = pytest.mark.not_on_cuda("draws its own tensors")


@pytest.fixture(autouse=True)
def one_thread():
    """Two spinning threads are far slower than one as soon as another process wants a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_splits_share_no_digit():
    splits = finetune_swin.digits()
    assert [len(part.labels) for part in splits] == [1317, 240, 240]
    seen = [{image.numpy().tobytes() for image in part.images} for part in splits]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert all(torch.bincount(part.labels).min() >= 23 for part in splits)
    for one, again in zip(splits, finetune_swin.digits()):
        assert torch.equal(one.images, again.images) and torch.equal(one.labels, again.labels)


@pytest.mark.filterwarnings("ignore:.*bias tables resized")
def test_the_shortened_example_runs_and_leaves_its_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_swin", "--epochs", "2", "--tune-epochs", "1", "--out", str(tmp_path)])
    finetune_swin.main()
    lines = re.findall(r"^(16x16|24x24).*?([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert [side for side, *_ in lines] == ["16x16", "24x24", "24x24"]
    assert all(float(share) > 12 for _, *shares in lines for share in shares)  # ten classes
    assert (tmp_path / "swin_window4.pth").exists() and (tmp_path / "finetune_swin.png").stat().st_size > 20_000

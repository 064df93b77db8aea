"""The command line: what it prints and writes, and that every mistake ends in one sentence and exit code 2."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import natrpb
from natrpb._cli import main


def fails(capsys, *argv: str) -> str:
    """Runs a command that must fail; its sentence."""
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and said and "\n" not in said and "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = natrpb.create_model("nat_mini", num_classes=7)
    path = tmp_path_factory.mktemp("weights") / "nat.pth"
    torch.save(model.state_dict(), path)
    return path


def test_info_as_a_command():
    run = subprocess.run([sys.executable, "-m", "natrpb", "info"], capture_output=True, text=True, check=True)
    said = dict(line.split(None, 1) for line in run.stdout.splitlines())
    assert said["version"] == natrpb.__version__ and said["compiled"] == str(natrpb.info()["compiled"])


def test_explain_prints_keys_and_indices(capsys):
    assert main(["explain", "--size", "5", "--kernel-size", "3", "--query", "0"]) == 0
    said = capsys.readouterr().out
    assert "sees 3 keys" in said and "[2]" in said and said.splitlines()[-1].split() == ["[2]", "3", "4", ".", "."]


@pytest.mark.parametrize("side", ["5", "300"], ids=["buffered", "long"])
def test_ends_quietly_when_its_reader_has_gone(side):
    command = [sys.executable, "-m", "natrpb", "explain", "--size", side, side, "--kernel-size", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_explain_writes_a_picture(capsys, tmp_path):
    picture = tmp_path / "new" / "window.png"
    argv = ["explain", "--size", "9", "9", "--window", "4", "--shift", "2", "--query", "0", "8", "--plot", str(picture)]
    assert main(argv) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--size", "5", "--kernel-size", "7"], "kernel_size"),
        (["--size", "5", "--kernel-size", "3", "--query", "5"], "query"),
        (["--size", "5", "--kernel-size", "3", "--query", "1", "1"], "--query"),
        (["--size", "5", "--kernel-size", "3", "--shift", "1"], "--shift"),
        (["--size", "5", "--window", "3", "--shift", "3"], "shift_size"),
        (["--size", "0", "--window", "3"], "--size"),
        (["--size", "5", "5", "5", "5", "--window", "3"], "--size"),
        (["--size", "5", "--kernel-size", "3", "--causal", "1"], "--causal"),
        (["--size", "five", "--window", "3"], "five"),
        (["--size", "5"], "--kernel-size"),
    ],
)
def test_explain_names_what_is_wrong(capsys, argv, named):
    assert named in fails(capsys, "explain", *argv)


def test_convert_there_and_back(capsys, checkpoint, tmp_path):
    there, back = tmp_path / "hf.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(checkpoint), str(there), "--to", "huggingface", "--model-type", "nat"]) == 0
    assert any(key.startswith("nat.encoder.levels.0.") for key in load_file(there))
    assert main(["convert", str(there), str(back), "--to", "official"]) == 0
    original, returned = torch.load(checkpoint), torch.load(back)
    assert original.keys() == returned.keys()
    assert all(torch.equal(original[key], returned[key]) for key in original)


def test_convert_writes_swin_for_other_libraries(capsys, tmp_path):
    swin = natrpb.create_model("swin_tiny_patch4_window7_224", depths=(2, 1), num_heads=(1, 2), embed_dim=16, window_size=4)
    source = tmp_path / "swin.pth"
    torch.save(swin.state_dict(), source)
    for library in ("timm", "torchvision", "huggingface"):
        there, back = tmp_path / f"{library}.pth", tmp_path / f"{library}-back.pth"
        assert main(["convert", str(source), str(there), "--to", library]) == 0
        assert main(["convert", str(there), str(back), "--to", "official"]) == 0
        found = torch.load(back)
        assert found.keys() == swin.state_dict().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in swin.state_dict().items())


def test_convert_overwrites_only_when_told(capsys, checkpoint, tmp_path):
    target = tmp_path / "there.pth"
    target.write_bytes(b"precious")
    assert "--force" in fails(capsys, "convert", str(checkpoint), str(target), "--to", "huggingface")
    assert target.read_bytes() == b"precious"
    assert main(["convert", str(checkpoint), str(target), "--to", "huggingface", "--force"]) == 0
    assert len(torch.load(target)) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"], "nothing else is left behind"


def test_convert_names_what_is_wrong(capsys, tmp_path):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    assert "no file" in fails(capsys, "convert", str(tmp_path / "none.pth"), str(tmp_path / "o.pth"), "--to", "official")
    assert "broken.pth" in fails(capsys, "convert", str(broken), str(tmp_path / "o.pth"), "--to", "official")
    assert "OUT" in fails(capsys, "convert", str(broken), str(tmp_path / "o.txt"), "--to", "official")
    assert not (tmp_path / "o.pth").exists()


def test_classify_prints_the_likeliest_classes(capsys, checkpoint, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    photograph = tmp_path / "photograph.png"
    image_module.new("RGB", (300, 240), (200, 40, 90)).save(photograph)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"class {i}" for i in range(7)))
    argv = ["classify", str(photograph), "--model", "nat_mini", "--weights", str(checkpoint)]

    assert main([*argv, "--top", "3", "--labels", str(labels)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    shares = [float(line.split("%")[0]) for line in lines]
    assert len(lines) == 3 and shares == sorted(shares, reverse=True) and all("class " in line for line in lines)

    assert main(argv) == 0
    assert "not bundled" in capsys.readouterr().out
    labels.write_text("too few")
    assert "labels.txt" in fails(capsys, *argv, "--labels", str(labels))
    assert "nat_mini" in fails(capsys, *argv[:2], "--model", "nat_mimi")
    assert "--weights" in fails(capsys, *argv[:4], "--weights", str(tmp_path / "none.pth"))
    assert "no_such.png" in fails(capsys, "classify", str(tmp_path / "no_such.png"))

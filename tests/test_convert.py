"""Hugging Face and official state dicts, and weights from files, the hub and the authors' server."""

from __future__ import annotations

import argparse
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn

from natrpb import rpb
from natrpb.convert import detect_format, from_huggingface, to_huggingface, to_official
from natrpb.models import create_model, list_models, load_weights
from natrpb.models._registry import model_entry

SMALL = dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, dilations=(3, 1, 1, 1), layer_scale=0.1)
HUGGINGFACE_MODELS = [name for name in list_models() if name.startswith(("nat_", "dinat_")) and "isotropic" not in name]
HUGGINGFACE_MODELS = [name for name in HUGGINGFACE_MODELS if not name.startswith("dinat_s_")]


def small_model(seed: int = 0, **overrides) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("dinat_mini", **({"num_classes": 10} | SMALL | overrides)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_names_of_hugging_face():
    """Keys of `DinatForImageClassification` in transformers 4.48."""
    converted = to_huggingface(small_model().state_dict())
    layer = "dinat.encoder.levels.0.layers.1."
    assert {key.removeprefix(layer): tuple(converted[key].shape) for key in converted if key.startswith(layer)} == {
        "layer_scale_parameters": (2, 16),
        "layernorm_before.weight": (16,),
        "layernorm_before.bias": (16,),
        "attention.self.rpb": (1, 5, 5),
        **{f"attention.self.{part}.weight": (16, 16) for part in ("query", "key", "value")},
        **{f"attention.self.{part}.bias": (16,) for part in ("query", "key", "value")},
        "attention.output.dense.weight": (16, 16),
        "attention.output.dense.bias": (16,),
        "layernorm_after.weight": (16,),
        "layernorm_after.bias": (16,),
        "intermediate.dense.weight": (48, 16),
        "intermediate.dense.bias": (48,),
        "output.dense.weight": (16, 48),
        "output.dense.bias": (16,),
    }
    assert {key for key in converted if ".layers." not in key} == {
        *(f"dinat.embeddings.patch_embeddings.projection.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
        "dinat.embeddings.norm.weight",
        "dinat.embeddings.norm.bias",
        *(f"dinat.encoder.levels.{i}.downsample.reduction.weight" for i in (0, 1, 2)),
        *(f"dinat.encoder.levels.{i}.downsample.norm.{part}" for i in (0, 1, 2) for part in ("weight", "bias")),
        "dinat.layernorm.weight",
        "dinat.layernorm.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_values_keep_their_places():
    official = small_model().state_dict()
    converted = to_huggingface(official, "nat")
    layer, block = "nat.encoder.levels.2.layers.0.", "levels.2.blocks.0."
    assert torch.equal(converted[layer + "attention.self.key.weight"], official[block + "attn.qkv.weight"][64:128])
    assert torch.equal(converted[layer + "attention.self.value.bias"], official[block + "attn.qkv.bias"][128:])
    assert torch.equal(converted[layer + "layer_scale_parameters"][1], official[block + "gamma2"])
    assert torch.equal(converted[layer + "layernorm_after.bias"], official[block + "norm2.bias"])


@pytest.mark.parametrize("model_type", ["nat", "dinat", None])
def test_round_trip_is_exact(model_type):
    official = small_model().state_dict()
    converted = to_huggingface(official, model_type)
    assert_same(from_huggingface(converted), official)
    assert_same(to_huggingface(from_huggingface(converted), model_type), converted)


@pytest.mark.parametrize("name", HUGGINGFACE_MODELS)
def test_every_model_converts(name):
    with torch.device("meta"):
        official = create_model(name).state_dict()
    back = from_huggingface(to_huggingface(official))
    assert {key: tensor.shape for key, tensor in back.items()} == {k: t.shape for k, t in official.items()}


def test_backbones_convert_with_their_stage_norms():
    official = small_model(features_only=True, out_indices=(0, 3)).state_dict()
    converted = to_huggingface(official, None)
    assert {key for key in converted if key.startswith("hidden")} == {
        f"hidden_states_norms.stage{i}.{part}" for i in (1, 4) for part in ("weight", "bias")
    }
    assert_same(from_huggingface(converted), official)


def test_format_is_recognised():
    official = small_model().state_dict()
    for model_type in ("nat", "dinat", None):
        converted = to_huggingface(official, model_type)
        assert detect_format(converted) == "huggingface"
        assert_same(to_official(converted), official)
    assert detect_format(official) == "official"
    assert_same(to_official(official), official)
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        detect_format({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no keys"):
        detect_format({})


@pytest.mark.parametrize(
    "key",
    [
        "dinat.pooler.weight",
        "dinat.encoder.levels.0.layers.0.attention.self.relative_position_index",
        "hidden_states_norms.stem.weight",
        "levels.0.blocks.0.norm1.weight",
    ],
)
def test_unknown_hugging_face_keys_are_named(key):
    converted = to_huggingface(small_model().state_dict())
    with pytest.raises(ValueError, match=f"1 keys .*{key}"):
        from_huggingface(converted | {key: torch.zeros(1)})


@pytest.mark.parametrize("key", ["levels.0.blocks.0.attn.mask", "layers.0.blocks.0.norm1.weight", "pos_embed"])
def test_unknown_official_keys_are_named(key):
    with pytest.raises(ValueError, match=f"1 keys .*{key}"):
        to_huggingface(small_model().state_dict() | {key: torch.zeros(1)})


def test_other_families_have_no_counterpart():
    with torch.device("meta"):
        state_dict = create_model("dinat_s_tiny").state_dict()
    with pytest.raises(ValueError, match="keys that no official NAT or DiNAT model has"):
        to_huggingface(state_dict)


def test_parts_that_are_missing_are_named():
    converted = to_huggingface(small_model().state_dict())
    layer = "dinat.encoder.levels.0.layers.0."
    without_key = {key: tensor for key, tensor in converted.items() if key != layer + "attention.self.key.bias"}
    with pytest.raises(ValueError, match=r"levels\.0\.blocks\.0\.attn\.qkv\.bias needs .*, key missing"):
        from_huggingface(without_key)
    with pytest.raises(ValueError, match=r"layer_scale_parameters must have shape \[2, C\], got \[3, 16\]"):
        from_huggingface(converted | {layer + "layer_scale_parameters": torch.zeros(3, 16)})
    official = small_model().state_dict()
    del official["levels.0.blocks.0.gamma2"]
    with pytest.raises(ValueError, match="got gamma1 only"):
        to_huggingface(official)


def test_model_type_is_checked():
    with pytest.raises(ValueError, match="model_type must be"):
        to_huggingface({}, "swin")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return small_model(seed=1)


def write(path: Path, state_dict: dict) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state_dict, path)
    else:
        torch.save(state_dict, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("layout", ["official", "nat", "dinat"])
def test_local_files(trained, tmp_path, suffix, layout):
    weights = trained.state_dict()
    path = write(tmp_path / f"weights{suffix}", weights if layout == "official" else to_huggingface(weights, layout))
    x = torch.randn(1, 3, 40, 32)
    for pretrained in (path, str(path)):
        model = create_model("dinat_mini", pretrained=pretrained, num_classes=10, **SMALL).eval()
        assert torch.equal(model(x), trained(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_keys_is_taken_off(trained, prefix):
    wrapped = {"n_averaged": torch.tensor(3)} | {prefix + key: tensor for key, tensor in trained.state_dict().items()}
    assert detect_format(wrapped) == "official"
    assert_same(to_official(wrapped), trained.state_dict())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_training_checkpoints(trained, tmp_path, wrapper):
    path = write(tmp_path / "checkpoint.pth", {wrapper: trained.state_dict(), "epoch": 3})
    model = create_model("dinat_mini", pretrained=path, num_classes=10, **SMALL)
    assert_same(model.state_dict(), trained.state_dict())


def test_another_kernel_size_resizes_the_tables(trained):
    model = small_model(kernel_size=5)
    with pytest.warns(UserWarning, match=r"5 bias tables resized, kernel size \(3, 3\) to \(5, 5\)"):
        load_weights(model, trained.state_dict())
    for key, tensor in trained.state_dict().items():
        expected = rpb.resize(tensor, 5) if key.endswith("rpb") else tensor
        assert torch.equal(model.state_dict()[key], expected), key


def test_another_number_of_classes_starts_a_fresh_head(trained):
    model = small_model(num_classes=4)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="weights has 10 classes, the model 4"):
        load_weights(model, trained.state_dict(), "weights")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] if key.startswith("head.") else trained.state_dict()[key]), key


def test_models_without_a_head(trained, recwarn):
    x = torch.randn(1, 3, 32, 32)
    model = small_model(num_classes=0)
    load_weights(model, trained.state_dict())
    assert torch.equal(model(x), trained.forward_head(trained.forward_features(x), pre_logits=True))
    backbone = small_model(features_only=True, out_indices=(1, 3))
    before = snapshot(backbone)
    load_weights(backbone, trained.state_dict())
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[key] if key.startswith("norm") else trained.state_dict()[key]), key
    load_weights(small_model(features_only=True, out_indices=(1, 3)), snapshot(backbone))
    assert not recwarn.list


def test_stage_norms_in_the_weights_are_loaded():
    backbone, other = (small_model(seed, features_only=True) for seed in (1, 2))
    load_weights(other, to_huggingface(backbone.state_dict(), None))
    assert_same(other.state_dict(), backbone.state_dict())


@pytest.mark.parametrize("options", [dict(out_indices=(1, 2)), dict(out_norms=False)], ids=str)
def test_stage_norms_that_the_model_does_not_have_are_left_out(options):
    backbone, other = small_model(1, features_only=True), small_model(2, features_only=True, **options)
    load_weights(other, backbone.state_dict())
    assert_same(other.state_dict(), {key: backbone.state_dict()[key] for key in other.state_dict()})
    with pytest.raises(ValueError, match=r"1 keys are not the model's: norm4\.weight"):
        load_weights(other, backbone.state_dict() | {"norm4.weight": torch.zeros(1)})


def test_a_head_of_undocumented_size_is_loaded(tmp_path):
    options = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=(1, 1))
    trained = create_model("dinat_large_21k", num_classes=7, **options)
    for path in (tmp_path / "official.pth", tmp_path / "huggingface.pth"):
        torch.save(trained.state_dict() if path.stem == "official" else to_huggingface(trained.state_dict()), path)
        model = create_model("dinat_large_21k", pretrained=path, **options)
        assert model.num_classes == 7
        assert_same(model.state_dict(), trained.state_dict())
    with pytest.warns(UserWarning, match="7 classes, the model 3"):
        assert create_model("dinat_large_21k", pretrained=path, num_classes=3, **options).num_classes == 3
    assert create_model("dinat_large_21k", pretrained=path, features_only=True, **options).num_classes == 0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda w: w.pop("levels.1.blocks.0.mlp.fc1.bias"),
            r"1 keys are missing: levels\.1\.blocks\.0\.mlp\.fc1\.bias",
        ),
        (lambda w: w.pop("head.bias"), r"1 keys are missing: head\.bias"),
        (lambda w: w.update({"levels.9.x": torch.zeros(1)}), r"1 keys are not the model's: levels\.9\.x"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), r"1 shapes differ: norm\.bias \[3\], expected \[128\]"),
        (
            lambda w: w.update({"levels.1.blocks.0.attn.rpb": torch.zeros(3, 5, 5)}),
            r"rpb \[3, 5, 5\], expected \[2, 5, 5\]",
        ),
    ],
    ids=["missing", "half-a-head", "unexpected", "shape", "table-heads"],
)
def test_weights_that_do_not_fit_change_nothing(trained, spoil, message):
    weights = snapshot(trained)
    spoil(weights)
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"does not fit NAT, nothing was loaded; .*{message}"):
        load_weights(model, weights)
    assert_same(model.state_dict(), before)


def test_weights_of_another_model_change_nothing(trained):
    model = create_model("dinat_s_tiny", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=10)
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not fit DiNAT_s"):
        load_weights(model, trained.state_dict())
    assert_same(model.state_dict(), before)


def test_a_model_without_tables_refuses_weights_with_tables(trained):
    with pytest.raises(ValueError, match=r"5 keys are not the model's: .*rpb"):
        load_weights(small_model(rel_pos_bias=False), trained.state_dict())


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights", bytes(range(256)) * 8, "truncated", {"epoch": 3}, [1, 2]],
    ids=["empty", "text", "bytes", "truncated", "no-tensors", "list"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(trained, tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    if content == "truncated":
        write(path, trained.state_dict())
        path.write_bytes(path.read_bytes()[:5000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RuntimeError, match=r"weights\.(pth|safetensors) (is damaged|holds no state dict)"):
        create_model("dinat_mini", pretrained=path, **SMALL)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_numbers_and_arguments_beside_the_weights(trained, tmp_path, zipped):
    numpy = pytest.importorskip("numpy")
    beside = {"best_acc1": numpy.float64(83.2), "loss": numpy.float32(1), "epoch": numpy.int64(3), "ema": numpy.bool_(True)}
    beside |= {"args": argparse.Namespace(lr=1e-3), "name": "dinat", "split": numpy.str_("val")}
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": trained.state_dict()} | beside, path, _use_new_zipfile_serialization=zipped)
    assert_same(create_model("dinat_mini", pretrained=path, num_classes=10, **SMALL).state_dict(), trained.state_dict())


class Trap:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("other, named", [(Trap(), "exec"), (Path("x"), "pathlib")], ids=["code", "path"])
def test_other_objects_beside_the_weights_are_named(trained, tmp_path, other, named, zipped):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": trained.state_dict(), "other": other}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match=rf"other Python objects beside tensors \(.*{named}.*trust") as raised:
        create_model("dinat_mini", pretrained=path, **SMALL)
    assert "damaged" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing\.pth"):
        create_model("dinat_mini", pretrained=tmp_path / "nothing.pth")


def test_the_official_file_is_downloaded_once(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def download(url, path, **_):
        asked.append(url)
        torch.save(trained.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        model = create_model("dinat_mini", pretrained=True, num_classes=10, **SMALL)
        assert_same(model.state_dict(), trained.state_dict())
    assert asked == ["https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth"]
    assert (tmp_path / "checkpoints" / "dinat_mini_in1k_224.pth").is_file()


def test_offline_the_message_names_the_url_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(RuntimeError, match=r"https://shi-labs\.com/.*dinat_mini_in1k_224\.pth.*pretrained='path"):
        create_model("dinat_mini", pretrained=True, **SMALL)


def test_the_copy_on_the_hub(trained, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    path = write(tmp_path / "pytorch_model.bin", to_huggingface(trained.state_dict()))
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *asked: {("shi-labs/dinat-mini-in1k-224", "pytorch_model.bin"): path}[asked]
    )
    model = create_model("dinat_mini", pretrained="hf", num_classes=10, **SMALL)
    assert_same(model.state_dict(), trained.state_dict())


def test_offline_or_without_a_copy_the_hub_says_so(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_):
        raise hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(RuntimeError, match=r"https://huggingface\.co/shi-labs/dinat-mini-in1k-224.*pretrained='path"):
        create_model("dinat_mini", pretrained="hf", **SMALL)
    with pytest.raises(RuntimeError, match="no weights of dinat_s_tiny on the Hugging Face hub are known"):
        create_model("dinat_s_tiny", pretrained="hf", embed_dim=16, num_heads=(1, 1, 1, 1))


def test_every_model_has_its_own_official_file():
    names = [name for name in list_models() if not name.startswith(("deit", "swin"))]
    urls = [model_entry(name).url for name in names]
    assert len(set(urls)) == len(urls)
    assert all(url.startswith("https://shi-labs.com/projects/") and url.endswith(".pth") for url in urls)
    ids = [model_entry(name).hf_id for name in names if model_entry(name).hf_id]
    assert len(set(ids)) == len(ids) == 11

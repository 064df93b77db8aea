"""NAT, DiNAT, DiNAT_s and isotropic models: configurations, keys, shapes, features, training, timm."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from natrpb.models import NAT, create_model, list_models, load_weights, register_model, register_with_timm
from natrpb.models._layers import DropPath
from natrpb.modules import NeighborhoodAttention2D

from .support import close

PARAMETERS = {  # of the authors' models, counted from their code
    "dinat_base": 89_769_652,
    "dinat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_large": 200_943_514,
    "dinat_large_21k": 200_943_514,
    "dinat_large_21k_11x11": 201_144_250,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_mini": 19_984_174,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_21k": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "dinat_s_small": 49_606_258,
    "dinat_s_tiny": 28_288_354,
    "dinat_small": 50_719_681,
    "dinat_tiny": 27_901_582,
    "nat_base": 89_769_652,
    "nat_isotropic_base": 86_465_800,
    "nat_isotropic_small": 21_999_736,
    "nat_mini": 19_984_174,
    "nat_small": 50_743_297,
    "nat_tiny": 27_901_582,
    "vitrpb_base": 86_627_080,
    "vitrpb_small": 22_080_376,
}
DEEP_AT_224 = [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
DILATIONS = {
    "nat_tiny": [[1] * 3, [1] * 4, [1] * 18, [1] * 5],
    "dinat_mini": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5],
    "dinat_tiny": DEEP_AT_224,
    "dinat_small": DEEP_AT_224,
    "dinat_base": DEEP_AT_224,
    "dinat_large": DEEP_AT_224,
    "dinat_large_21k": DEEP_AT_224,
    "dinat_large_384_11x11": DEEP_AT_224,
    "dinat_large_384": [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5],
    "dinat_s_tiny": [[1, 8], [1, 4], [1, 2] * 3, [1, 1]],
    "dinat_s_base": [[1, 8], [1, 4], [1, 2] * 9, [1, 1]],
    "dinat_s_large_384": [[1, 13], [1, 6], [1, 3] * 9, [1, 1]],
    "nat_isotropic_small": [[1] * 12],
    "dinat_isotropic_base": [[1, 2] * 6],
    "vitrpb_small": [[1] * 12],
}
SMALL = {  # every family at a size that tests can run
    "dinat_mini": dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, dilations=(3, 2, 1, 1)),
    "nat_small": dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=3),
    "dinat_s_tiny": dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3),
    "dinat_isotropic_small": dict(embed_dim=32, depth=2, num_heads=2, kernel_size=3),
}
EACH_FAMILY = pytest.mark.parametrize("name", SMALL)


def small_model(name: str, **overrides) -> nn.Module:
    return create_model(name, **({"num_classes": 10} | SMALL[name] | overrides)).eval()


def meta_model(name: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def attentions(model: nn.Module) -> list[NeighborhoodAttention2D]:
    return [module for module in model.modules() if isinstance(module, NeighborhoodAttention2D)]


def test_every_model_is_counted():
    assert [name for name in list_models() if not name.startswith(("deit", "swin"))] == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(parameter.numel() for parameter in meta_model(name).parameters()) == PARAMETERS[name]


def test_list_models_takes_a_pattern():
    assert list_models("nat_*y") == ["nat_tiny"]
    assert list_models("resnet*") == []


@pytest.mark.parametrize("name", DILATIONS)
def test_dilations(name):
    flat = [dilation for stage in DILATIONS[name] for dilation in stage]
    assert [attention.dilation for attention in attentions(meta_model(name))] == [(d, d) for d in flat]


@pytest.mark.parametrize("name", PARAMETERS)
def test_heads_of_32_channels_and_kernel_size(name):
    kernel_size = 11 if "11x11" in name else 14 if name.startswith("vit") else 7
    for attention in attentions(meta_model(name)):
        assert attention.head_dim == 32
        assert attention.kernel_size == (kernel_size, kernel_size)
        assert attention.rpb.shape == (attention.num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1)


def test_which_models_scale_their_layers():
    scaled = {name for name in PARAMETERS if any(key.endswith("gamma1") for key in meta_model(name).state_dict())}
    assert scaled == {"nat_small", "nat_base", "dinat_base"}
    assert torch.equal(small_model("nat_small").levels[0].blocks[0].gamma2, torch.full((16,), 1e-5))


def test_state_dict_keys_of_nat():
    keys = {f"patch_embed.proj.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}
    keys |= {f"{norm}.{part}" for norm in ("patch_embed.norm", "norm", "head") for part in ("weight", "bias")}
    for level, depth in enumerate((3, 4, 18, 5)):
        for block in range(depth):
            prefix = f"levels.{level}.blocks.{block}."
            layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            keys |= {f"{prefix}{layer}.{part}" for layer in layers for part in ("weight", "bias")}
            keys |= {prefix + "attn.rpb", prefix + "gamma1", prefix + "gamma2"}
        if level < 3:
            keys |= {f"levels.{level}.downsample.{part}" for part in ("reduction.weight", "norm.weight", "norm.bias")}
    state_dict = meta_model("nat_base").state_dict()
    assert set(state_dict) == keys
    assert state_dict["patch_embed.proj.0.weight"].shape == (64, 3, 3, 3)
    assert state_dict["levels.1.blocks.0.attn.qkv.weight"].shape == (768, 256)
    assert state_dict["levels.2.downsample.reduction.weight"].shape == (1024, 512, 3, 3)
    assert keys - set(meta_model("dinat_large").state_dict()) == {key for key in keys if "gamma" in key}


def test_state_dict_keys_of_dinat_s_and_isotropic():
    state_dict = meta_model("dinat_s_tiny").state_dict()
    block = {
        *(f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")),
        *(f"attn.{layer}.{part}" for layer in ("qkv", "proj") for part in ("weight", "bias")),
        *(f"mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")),
        "attn.rpb",
    }
    prefix = "layers.2.blocks.5."
    assert {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)} == block
    assert state_dict["patch_embed.proj.weight"].shape == (96, 3, 4, 4)
    assert state_dict["layers.0.downsample.reduction.weight"].shape == (192, 384)
    assert state_dict["layers.0.downsample.norm.weight"].shape == (384,)
    assert {key.split(".")[0] for key in state_dict} == {"patch_embed", "layers", "norm", "head"}
    isotropic = meta_model("nat_isotropic_small").state_dict()
    assert {key.removeprefix("layers.11.") for key in isotropic if key.startswith("layers.11.")} == block
    assert isotropic["patch_embed.proj.weight"].shape == (384, 3, 16, 16)


def test_patch_merging_keeps_the_checkpoints_order():
    merge = small_model("dinat_s_tiny").layers[0].downsample
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    x = torch.arange(6.0).reshape(1, 2, 3, 1)
    assert merge(x).tolist() == [[[[0, 3, 1, 4], [2, 5, 0, 0]]]]


def test_drop_path_grows_linearly():
    model = small_model("dinat_mini", drop_path_rate=0.4)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    branch = DropPath(0.25)
    out = branch(torch.ones(4000, 2, 3))
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.75]))
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert abs(out.mean() - 1) < 0.05
    assert torch.equal(branch.eval()(torch.ones(5, 1)), torch.ones(5, 1))
    with pytest.raises(ValueError, match="drop_prob"):
        DropPath(1.0)


@EACH_FAMILY
@pytest.mark.parametrize("size", [(64, 64), (36, 52), (33, 17), (8, 8), (1, 1)], ids="{0[0]}x{0[1]}".format)
def test_any_image_size(name, size):
    model = small_model(name)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model(x)
    reduction = 16 if "isotropic" in name else 32
    assert features.shape == (2, -(-size[0] // reduction), -(-size[1] // reduction), model.num_features)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert torch.equal(model.forward_head(features), logits)


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_published_configuration_runs(name):
    with torch.no_grad():
        assert create_model(name).eval()(torch.randn(1, 3, 32, 48)).shape == (1, 1000)


SMALL_VIT = dict(embed_dim=32, depth=2, num_heads=2, num_classes=10, drop_path_rate=0.0)


def test_vitrpb_is_global_attention():
    """The map of a 224x224 image, and the index table as the authors make it: of query minus key, both axes reversed."""
    model = create_model("vitrpb_small", **SMALL_VIT).double()
    for attention in attentions(model):
        nn.init.normal_(attention.rpb)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(14), torch.arange(14))
    index = ((places[:, None] - places + 13) @ torch.tensor([27, 1])).flip(0, 1)
    x = model.patch_embed(images).flatten(1, 2)
    for block in model.layers:
        attn = block.attn
        query, key, value = attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT * 16**-0.5 + attn.rpb.flatten(1)[:, index]
        x = x + attn.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    close(model(images), model.head(model.norm(x).mean(1)))


def test_vitrpb_takes_the_authors_keys():
    """Their state dict stores an index table per block."""
    trained, model = (create_model("vitrpb_small", **SMALL_VIT) for _ in range(2))
    indices = {f"layers.{i}.attn.relative_position_index": torch.zeros(196, 196, dtype=torch.int64) for i in range(2)}
    load_weights(model, trained.state_dict() | indices)
    assert all(torch.equal(tensor, trained.state_dict()[key]) for key, tensor in model.state_dict().items())


@EACH_FAMILY
def test_feature_maps(name):
    model = small_model(name, features_only=True)
    maps = model(torch.randn(2, 3, 64, 36))
    assert [info["index"] for info in model.feature_info] == list(range(len(maps)))
    for info, features in zip(model.feature_info, maps):
        size = [-(-side // info["reduction"]) for side in (64, 36)]
        assert features.shape == (2, info["num_chs"], *size)
        assert features.is_contiguous()


def test_feature_maps_are_the_classifiers_stages():
    classifier = small_model("dinat_mini")
    backbone = small_model("dinat_mini", features_only=True)
    assert set(backbone.state_dict()) - set(classifier.state_dict()) == {
        f"norm{i}.{part}" for i in range(4) for part in ("weight", "bias")
    }
    weights = classifier.state_dict()
    weights |= {f"norm{i}.{part}": backbone.state_dict()[f"norm{i}.{part}"] for i in (0, 1, 2) for part in ("weight", "bias")}
    weights |= {"norm3.weight": weights["norm.weight"], "norm3.bias": weights["norm.bias"]}
    backbone.load_state_dict({key: weights[key] for key in backbone.state_dict()})
    x = torch.randn(1, 3, 40, 64)
    assert torch.equal(backbone(x)[3], classifier.forward_features(x).permute(0, 3, 1, 2))
    with pytest.raises(RuntimeError, match="features_only"):
        backbone.forward_features(x)


def test_feature_maps_of_some_stages_without_norms():
    model = small_model("nat_small", features_only=True, out_indices=(2, 0), out_norms=False)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [features.shape for features in maps] == [(1, 16, 16, 16), (1, 64, 4, 4)]
    assert not any(key.startswith("norm") for key in model.state_dict())


@pytest.mark.parametrize("out_indices", [(4,), (-1,), ()], ids=str)
def test_stages_that_do_not_exist(out_indices):
    with pytest.raises(ValueError, match="out_indices"):
        small_model("nat_small", features_only=True, out_indices=out_indices)


@EACH_FAMILY
def test_feature_maps_have_no_classifier(name):
    model = small_model(name, features_only=True)
    with pytest.raises(AttributeError, match="features_only model returns maps, it has no classifier"):
        model.get_classifier()
    with pytest.raises(AttributeError, match="no classifier"):
        model.reset_classifier(3)
    assert model.num_classes == 0 and not any(key.startswith("head") for key in model.state_dict())


def test_out_indices_need_features_only():
    with pytest.raises(ValueError, match="features_only"):
        small_model("nat_small", out_indices=(0,))


def test_overrides():
    model = small_model("nat_small", kernel_size=(5, 3), in_chans=1, rel_pos_bias=True, img_size=999)
    assert model.levels[0].blocks[0].attn.rpb.shape == (1, 9, 5)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    assert not any("rpb" in key for key in small_model("nat_small", rel_pos_bias=False).state_dict())
    dilated = small_model("nat_small", dilations=[[3], [2], [1, 2], [1]])
    assert [attention.dilation[0] for attention in attentions(dilated)] == [3, 2, 1, 2, 1]


def test_dilations_of_numpy():
    numpy = pytest.importorskip("numpy")
    model = small_model("nat_small", dilations=[numpy.int64(2), numpy.int32(1), numpy.array([1, 3]), [numpy.int64(2)]])
    assert [attention.dilation for attention in attentions(model)] == [(1, 1), (1, 1), (1, 1), (3, 3), (2, 2)]
    model = small_model("dinat_isotropic_small", dilations=numpy.int64(3))
    assert [attention.dilation for attention in attentions(model)] == [(1, 1), (3, 3)]


def test_default_number_of_classes_is_the_published_one():
    assert meta_model("swin_tiny_patch4_window7_224_22k").num_classes == 21841
    assert meta_model("swin_tiny_patch4_window7_224_22k", num_classes=5).num_classes == 5
    for name in list_models():
        model = meta_model(name)
        assert model.num_classes == model.head.out_features == model.pretrained_cfg.get("num_classes", 1000)
    assert small_model("nat_small", num_classes=None).num_classes == 1000


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        (dict(depth=3), TypeError, "depth"),
        (dict(dilations=(1, 2)), ValueError, "dilations must have one entry per stage"),
        (dict(dilations=(1, 1, (1, 2, 1), 1)), ValueError, "one per block"),
        (dict(num_heads=(1, 2)), ValueError, "num_heads must have one entry per stage"),
        (dict(num_classes=-1), ValueError, "num_classes"),
        (dict(pretrained=1.5), TypeError, "pretrained"),
    ],
    ids=["unknown", "stages", "blocks", "heads", "classes", "pretrained"],
)
def test_overrides_that_do_not_fit(overrides, error, message):
    with pytest.raises(error, match=message):
        small_model("nat_small", **overrides)


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="nat_tiny"):
        create_model("nat_tinny")
    with pytest.raises(ValueError, match="list_models"):
        create_model("resnet50")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="nat_mini is already registered"):

        @register_model()
        def nat_mini(**overrides):
            return NAT(**overrides)


@EACH_FAMILY
def test_classifier_can_be_replaced(name):
    model = small_model(name, num_classes=0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, model.num_features)
    model.reset_classifier(4)
    assert model.get_classifier().out_features == model.num_classes == 4
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    pooled = model.forward_head(model.forward_features(torch.randn(1, 3, 32, 32)), pre_logits=True)
    assert pooled.shape == (1, model.num_features)
    model.double().reset_classifier(3)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1)


@EACH_FAMILY
def test_no_weight_decay_on_bias_tables(name):
    model = small_model(name)
    parameters = dict(model.named_parameters())
    assert {id(parameters[key]) for key in model.no_weight_decay()} == {id(a.rpb) for a in attentions(model)}


def test_initial_weights():
    model = small_model("dinat_mini")
    assert abs(model.levels[3].blocks[0].mlp.fc1.weight.std() - 0.02) < 2e-3
    assert not model.levels[0].blocks[0].attn.qkv.bias.any()
    assert abs(model.levels[3].blocks[0].attn.rpb.std() - 0.02) < 5e-3


@EACH_FAMILY
def test_training_lowers_the_loss(name):
    model = small_model(name, drop_path_rate=0.0, **({"layer_scale": 0.1} if name == "nat_small" else {})).train()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(attention.rpb.grad.any() for attention in attentions(model))
    assert losses[-1] < 0.8 * losses[0]


def test_drop_rates_reach_every_layer():
    model = small_model("nat_small", drop_rate=0.1, attn_drop_rate=0.2)
    assert {attention.attn_drop for attention in attentions(model)} == {0.2}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}


@pytest.fixture(scope="module")
def timm():
    """timm with our models; it is optional, and may be installed without the torchvision that it needs."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    register_with_timm()
    return timm


def test_timm_builds_our_models(timm):
    assert [f"natrpb_{name}" for name in list_models()] == sorted(timm.list_models("natrpb_*"))
    model = timm.create_model("natrpb_nat_small", num_classes=7, drop_path_rate=None, **SMALL["nat_small"])
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 224, 224)
    assert timm.models.get_pretrained_cfg("natrpb_dinat_large_384").input_size == (3, 384, 384)
    maps = timm.create_model("natrpb_nat_small", features_only=True, **SMALL["nat_small"])(torch.randn(1, 3, 32, 32))
    assert [features.shape[1] for features in maps] == [16, 32, 64, 128]


def test_timm_is_registered_once(timm, recwarn):
    register_with_timm()
    assert not recwarn.list


def test_timm_weights_of_others_are_refused(timm):
    with pytest.raises(ValueError, match="pretrained_cfg"):
        timm.create_model("natrpb_nat_small", pretrained=True, pretrained_cfg={"file": "x"}, **SMALL["nat_small"])


def test_importing_our_models_waits_for_timm():
    script = """
import importlib, sys, types
import natrpb.models
assert "timm" not in sys.modules
registered = []
timm = types.ModuleType("timm")
timm.models = types.ModuleType("timm.models")
timm.models.is_model = lambda name: False
timm.models.register_model = lambda build: registered.append(build.__name__)
sys.modules.update({"timm": timm, "timm.models": timm.models})
importlib.reload(natrpb.models)
print(*registered)
"""
    names = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert names == [f"natrpb_{name}" for name in list_models()]

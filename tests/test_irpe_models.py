"""DeiT with iRPE: published sizes, keys, features, other image sizes, checkpoints, training."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from natrpb import create_model, get_rpe_config, iRPEAttention, list_models
from natrpb.models import DeiT, load_weights
from natrpb.models._layers import DropPath
from natrpb.models._registry import model_entry

from .support import close

PARAMETERS = {
    "deit_tiny_patch16_224_ctx_product_50_shared_k": 5_755_816,
    "deit_small_patch16_224_ctx_euc_20_shared_k": 22_113_640,
    "deit_small_patch16_224_ctx_quant_51_shared_k": 22_153_576,
    "deit_small_patch16_224_ctx_cross_56_shared_k": 22_176_616,
    "deit_small_patch16_224_ctx_product_50_shared_k": 22_089_064,
    "deit_small_patch16_224_ctx_product_50_shared_qk": 22_127_464,
    "deit_small_patch16_224_ctx_product_50_shared_qkv": 22_165_864,
    "deit_base_patch16_224_ctx_product_50_shared_k": 86_606_056,
    "deit_base_patch16_224_ctx_product_50_shared_qkv": 86_682_856,
}
PUBLISHED = {  # million parameters, as the model zoo lists them
    "deit_tiny_patch16_224_ctx_product_50_shared_k": 5.76,
    "deit_small_patch16_224_ctx_product_50_shared_k": 22.09,
    "deit_small_patch16_224_ctx_product_50_shared_qk": 22.13,
    "deit_small_patch16_224_ctx_product_50_shared_qkv": 22.17,
    "deit_base_patch16_224_ctx_product_50_shared_k": 86.61,
    "deit_base_patch16_224_ctx_product_50_shared_qkv": 86.68,
}
TINY, SMALL_QKV = "deit_tiny_patch16_224_ctx_product_50_shared_k", "deit_small_patch16_224_ctx_product_50_shared_qkv"
SMALL = dict(embed_dim=24, depth=2, num_heads=3, grid_size=4, num_classes=10)


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name)


def small_model(name: str = SMALL_QKV, **overrides) -> DeiT:
    model = create_model(name, **(SMALL | overrides)).eval()
    for key, parameter in model.named_parameters():
        if "lookup_table" in key:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_every_model_is_counted():
    assert list_models("deit_*") == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    count = sum(parameter.numel() for parameter in meta_model(name).parameters())
    assert count == PARAMETERS[name]
    if name in PUBLISHED:
        assert round(count / 1e6, 2) == PUBLISHED[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_weights_are_named_like_their_model(name):
    url = model_entry(name).url
    assert (url is not None) == (name in PUBLISHED)
    assert url is None or url.endswith(f"/{name}.pth")


@pytest.mark.parametrize("name", PARAMETERS)
def test_state_dict_keys(name):
    state_dict = meta_model(name).state_dict()
    keys = {"cls_token", "pos_embed"} | {
        f"{x}.{part}" for x in ("patch_embed.proj", "norm", "head") for part in ("weight", "bias")
    }
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    tables = ("rp_rows.", "rp_cols.") if "cross" in name else ("",)
    for block in range(12):
        keys |= {f"blocks.{block}.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        on = name.rsplit("_", 1)[1]
        keys |= {f"blocks.{block}.attn.rpe_{letter}.{table}lookup_table_weight" for letter in on for table in tables}
    assert set(state_dict) == keys
    dim = state_dict["cls_token"].shape[-1]
    assert state_dict["pos_embed"].shape == (1, 197, dim)
    assert state_dict["patch_embed.proj.weight"].shape == (dim, 3, 16, 16)
    buckets = {"product": 50, "euc": 82, "quant": 134, "cross": 82}
    count = next(number for method, number in buckets.items() if method in name)
    for key, tensor in state_dict.items():
        if "lookup_table_weight" in key:
            assert tensor.shape == ((1, count, 64) if "rpe_v" in key else (1, 64, count))


def test_published_configuration_runs():
    with torch.no_grad():
        assert create_model(TINY).eval()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["euc_20", "quant_51", "cross_56", "product_50"])
def test_blocks_by_definition(name):
    """The model is the official one's sequence of operations, with the unfused encodings."""
    model = small_model(f"deit_small_patch16_224_ctx_{name}_shared_k").double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], 1) + model.pos_embed
    for block in model.blocks:
        attn = block.attn
        query, key, value = attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2) + attn.rpe_k(query)) * 8**-0.5
        x = x + attn.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    close(model(images), model.head(model.norm(x)[:, 0]))


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 17), (1, 1)], ids="{0[0]}x{0[1]}".format)
def test_any_image_size(size):
    model = small_model()
    x = torch.randn(2, 3, *size)
    features = model.forward_features(x)
    patches = -(-size[0] // 16) * -(-size[1] // 16)
    assert features.shape == (2, 1 + patches, 24)
    logits = model(x)
    assert logits.shape == (2, 10) and logits.isfinite().all()
    assert torch.equal(model.forward_head(features), logits)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])


def test_position_embedding_is_resized_for_the_map_only():
    model = small_model()
    assert model._position_embedding(4, 4) is model.pos_embed
    resized = model._position_embedding(3, 6)
    assert resized.shape == (1, 19, 24)
    assert torch.equal(resized[:, 0], model.pos_embed[:, 0])
    grid = model.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (3, 6), mode="bicubic")
    close(resized[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 18, 24))


def test_feature_maps():
    model, classifier = small_model(features_only=True), small_model()
    weights = classifier.state_dict()
    norm = {f"norm0.{part}": weights[f"norm.{part}"] for part in ("weight", "bias")}
    model.load_state_dict({key: (weights | norm)[key] for key in model.state_dict()})
    x = torch.randn(2, 3, 64, 48)
    (features,) = model(x)
    assert features.shape == (2, 24, 4, 3) and features.is_contiguous()
    close(features, classifier.forward_features(x)[:, 1:].unflatten(1, (4, 3)).permute(0, 3, 1, 2), 1e-6)
    assert model.feature_info == [{"index": 0, "num_chs": 24, "reduction": 16}]
    with pytest.raises(RuntimeError, match="features_only"):
        model.forward_features(x)


def test_loads_the_authors_format(tmp_path):
    """Weights under "model", beside the arguments of the training script."""
    model = small_model()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "epoch": 299, "args": argparse.Namespace(lr=5e-4, model=SMALL_QKV)}, path)
    loaded = create_model(SMALL_QKV, pretrained=path, **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    with pytest.warns(UserWarning, match="10 classes, the model 3"):
        assert create_model(SMALL_QKV, pretrained=path, **(SMALL | dict(num_classes=3))).head.out_features == 3
    with pytest.raises(ValueError, match="keys are missing"):
        create_model("deit_small_patch16_224_ctx_cross_56_shared_k", pretrained=path, **SMALL)


def test_weights_of_another_grid(tmp_path):
    """The stored position embedding is resized as the authors fine-tune: bicubically, but for the classification token."""
    trained = small_model()
    torch.save({"model": trained.state_dict()}, tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"position embedding resized, from 4 x 4 patches to 6 x 6"):
        model = create_model(SMALL_QKV, pretrained=tmp_path / "weights.pth", **(SMALL | dict(grid_size=6))).eval()
    close(model.pos_embed, trained._position_embedding(6, 6), 1e-6)
    x = torch.randn(1, 3, 96, 96)
    close(model(x), trained(x), 1e-5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for entries in (1, 18):  # no grid; two tokens before it
        weights = trained.state_dict() | {"pos_embed": torch.zeros(1, entries, 24)}
        with pytest.raises(ValueError, match=rf"pos_embed \[1, {entries}, 24\], expected \[1, 37, 24\]"):
            load_weights(model, weights)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_half_precision_weights_of_another_grid():
    trained, model = small_model(), small_model(grid_size=6)
    with pytest.warns(UserWarning, match="resized"):
        load_weights(model, {key: tensor.half() for key, tensor in trained.state_dict().items()})
    close(model.pos_embed, trained._position_embedding(6, 6), 1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict):
    model = small_model(depth=1)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},), strict=strict)
    for count in (1, 5):
        x = torch.randn(count, 3, 64, 64)
        close(program.module()(x), model(x), 1e-6)


def test_overrides():
    config = get_rpe_config(2.0, "cross", "bias", False, 1, "qk")
    model = small_model(rpe_config=config, in_chans=1, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3, img_size=999)
    assert model.blocks[1].attn.rpe_q.rp_cols.lookup_table_bias.shape == (3, 10)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    assert [module.drop_prob for module in model.modules() if isinstance(module, DropPath)] == pytest.approx([0, 0.3])
    assert {module.attn_drop for module in model.modules() if isinstance(module, iRPEAttention)} == {0.2}
    plain = small_model(rpe_config=None)
    assert not any("rpe" in key for key in plain.state_dict())
    assert plain.no_weight_decay() == {"cls_token", "pos_embed"}


def test_initial_weights():
    model = create_model(SMALL_QKV, **(SMALL | dict(embed_dim=96)))
    assert abs(model.pos_embed.std() - 0.02) < 2e-3 and abs(model.blocks[0].mlp.fc1.weight.std() - 0.02) < 2e-3
    assert not model.blocks[0].attn.qkv.bias.any()
    assert not model.blocks[0].attn.rpe_v.lookup_table_weight.any()


def test_training_lowers_the_loss():
    model = create_model(SMALL_QKV, **SMALL, drop_path_rate=0.0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.any() for key, parameter in model.named_parameters() if "lookup_table" in key)
    assert losses[-1] < 0.8 * losses[0]

"""Swin v1 and v2 models: configurations, keys, parity with timm, other windows, and the small variants of tutorials."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natrpb import rpb
from natrpb.convert import conv_to_linear, linear_to_conv, swin
from natrpb.models import SwinBlock, SwinV2Block, UnfoldMerging, create_model, list_models, load_weights
from natrpb.models._registry import model_entry
from natrpb.models.dinat_s import PatchMerging
from natrpb.models.swin_v2 import PatchMergingV2
from natrpb.modules import WindowAttention

from .support import close

PARAMETERS = {  # of the authors' models with 1000 classes, counted from timm's instances
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_base_patch4_window12_384_22k": 87_903_584,
    "swin_base_patch4_window12_384_22kto1k": 87_903_584,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window7_224_22k": 87_768_224,
    "swin_base_patch4_window7_224_22kto1k": 87_768_224,
    "swin_large_patch4_window12_384_22k": 196_735_516,
    "swin_large_patch4_window12_384_22kto1k": 196_735_516,
    "swin_large_patch4_window7_224_22k": 196_532_476,
    "swin_large_patch4_window7_224_22kto1k": 196_532_476,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_small_patch4_window7_224_22k": 49_606_258,
    "swin_small_patch4_window7_224_22kto1k_finetune": 49_606_258,
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_tiny_patch4_window7_224_22k": 28_288_354,
    "swin_tiny_patch4_window7_224_22kto1k_finetune": 28_288_354,
    "swinv2_base_patch4_window12_192_22k": 87_918_816,
    "swinv2_base_patch4_window12to16_192to256_22kto1k_ft": 87_918_816,
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": 87_918_816,
    "swinv2_base_patch4_window16_256": 87_918_816,
    "swinv2_base_patch4_window8_256": 87_918_816,
    "swinv2_large_patch4_window12_192_22k": 196_739_932,
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft": 196_739_932,
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": 196_739_932,
    "swinv2_small_patch4_window16_256": 49_728_418,
    "swinv2_small_patch4_window8_256": 49_728_418,
    "swinv2_tiny_patch4_window16_256": 28_347_154,
    "swinv2_tiny_patch4_window8_256": 28_347_154,
}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_patch4_window8_256"
EACH_VERSION = pytest.mark.parametrize("name", [V1, V2])
SMALL = dict(embed_dim=16, depths=(2, 3, 1), num_heads=(2, 2, 4), window_size=4, num_classes=10, drop_path_rate=0.0)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draws every parameter, norms around 1, so that nothing is zero or equal by initialisation."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            with torch.no_grad():
                parameter.add_(1)


def small_model(name: str, **overrides) -> nn.Module:
    model = create_model(name, **(SMALL | overrides))
    randomise(model)
    return model.eval()


def meta_model(name: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def attentions(model: nn.Module) -> list[WindowAttention]:
    return [module for module in model.modules() if isinstance(module, WindowAttention)]


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", exc_type=ImportError)


def test_every_model_is_counted():
    assert list_models("swin*") == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(parameter.numel() for parameter in meta_model(name, num_classes=1000).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("swin_")])
def test_drop_rates_of_v1(name):
    """Those of the authors' configuration files."""
    small = 0.1 if "_22k" in name else 0.2, 0.2 if "_22k" in name else 0.3
    rates = dict(zip(("tiny", "small", "base", "large"), (*small, 0.2 if "_22k" in name else 0.5, 0.2)))
    assert meta_model(name).layers[-1].blocks[-1].drop_path.drop_prob == rates[name.split("_")[1]]


@pytest.mark.parametrize(
    "name, windows",
    [
        (V1, [7, 7, 7, 7]),
        ("swin_base_patch4_window12_384", [12, 12, 12, 12]),
        ("swinv2_small_patch4_window16_256", [16, 16, 16, 8]),
        ("swinv2_large_patch4_window12_192_22k", [12, 12, 12, 6]),
        ("swinv2_base_patch4_window12to24_192to384_22kto1k_ft", [24, 24, 24, 12]),
    ],
)
def test_windows_shifts_and_heads(name, windows):
    model = meta_model(name)
    for stage, window in zip(model.layers, windows):
        for i, block in enumerate(stage.blocks):
            assert block.attn.window_size == (window, window)
            assert block.attn.shift_size == (i % 2 * (window // 2),) * 2
            assert block.attn.head_dim == 32


@pytest.mark.parametrize("name", PARAMETERS)
def test_keys_and_shapes_are_timms(timm, name):
    """timm differs from the official keys in two places, which `natrpb.convert.swin` maps."""
    theirs = name.replace("_22kto1k", "").replace("_finetune", "").replace("_22k", "").replace("_ft", "")
    theirs = theirs.replace("patch4_", "") if theirs.startswith("swinv2") else theirs
    with torch.device("meta"):
        expected = timm.create_model(theirs, num_classes=7).state_dict()
    given = swin.to_timm(meta_model(name, num_classes=7).state_dict())
    assert {key: x.shape for key, x in given.items()} == {key: x.shape for key, x in expected.items()}


def test_what_is_known_of_published_weights():
    config = model_entry("swinv2_tiny_patch4_window16_256").pretrained_cfg()
    assert config["input_size"] == (3, 256, 256) and config["crop_pct"] == 0.875
    assert model_entry("swin_base_patch4_window12_384").pretrained_cfg()["crop_pct"] == 1.0
    assert model_entry("swin_large_patch4_window7_224_22k").num_classes == 21841
    urls = {model_entry(name).url for name in PARAMETERS}
    assert len(urls) == len(PARAMETERS)
    assert all(model_entry(name).url.endswith(f"/{name}.pth") for name in PARAMETERS)
    assert all(url.startswith("https://github.com/SwinTransformer/storage/releases/download/v") for url in urls)
    ids = [model_entry(name).hf_id for name in PARAMETERS if model_entry(name).hf_id]
    assert len(set(ids)) == len(ids) == 22


# Image sizes: every map divided by its windows; none divided; non-square windows.
TIMM_CASES = [((64, 32), 4), ((60, 44), 4), ((44, 100), (3, 5))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("size, window", TIMM_CASES, ids=str)
@EACH_VERSION
def test_equals_timm_with_every_gradient(timm, name, size, window, dtype, tolerance):
    module = timm.models.swin_transformer.SwinTransformer if name == V1 else timm.models.swin_transformer_v2.SwinTransformerV2
    options = SMALL | dict(window_size=window)
    theirs = module(img_size=size, **options).eval()
    randomise(theirs)
    windows = [stage.blocks[0].window_size for stage in theirs.layers]  # timm shrinks windows to small maps
    own_offsets = {} if name == V1 else dict(pretrained_window_sizes=0)
    ours = create_model(name, padding="roll_then_pad", **(options | own_offsets | dict(window_size=windows))).eval()
    load_weights(ours, theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = torch.randn(2, 3, *size, dtype=dtype)
    out, expected = ours(x), theirs(x)
    close(out, expected, tolerance)
    (out.square().sum() / out.detach().square().sum()).backward()
    (expected.square().sum() / expected.detach().square().sum()).backward()
    gradients = swin.to_timm({key: parameter.grad for key, parameter in ours.named_parameters()})
    for key, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        close(gradients[key] / scale, parameter.grad / scale, tolerance)


@EACH_VERSION
@pytest.mark.parametrize("padding", ["cut", "pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize("size", [(64, 64), (36, 52), (33, 17), (8, 8), (1, 1)], ids="{0[0]}x{0[1]}".format)
def test_any_image_size(name, size, padding):
    model = small_model(name, padding=padding)
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, *size))
    assert features.shape == (2, -(-size[0] // 16), -(-size[1] // 16), 64)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", [V1, "swinv2_tiny_patch4_window16_256"])
def test_published_configuration_runs(name):
    with torch.no_grad():
        assert create_model(name).eval()(torch.randn(1, 3, 64, 48)).shape == (1, 1000)


@EACH_VERSION
def test_feature_maps(name):
    model = small_model(name, features_only=True, out_indices=(0, 2))
    maps = model(torch.randn(2, 3, 64, 36))
    assert [tuple(features.shape) for features in maps] == [(2, 16, 16, 9), (2, 64, 4, 3)]
    assert {key for key in model.state_dict() if key.startswith("norm")} == {
        f"norm{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }


@EACH_VERSION
def test_no_weight_decay(name):
    model = small_model(name)
    free = model.no_weight_decay()
    per_block = 1 if name == V1 else 4
    assert len(free) == per_block * sum(SMALL["depths"])
    assert all(key in dict(model.named_parameters()) for key in free)


def test_blocks_of_v2_start_as_the_identity():
    model = create_model(V2, **SMALL).eval()
    x = torch.randn(1, 8, 8, 16)
    assert torch.equal(model.layers[0](x), x)


@EACH_VERSION
def test_training_lowers_the_loss(name):
    model = create_model(name, **SMALL).train()
    images, labels = torch.randn(8, 3, 32, 48), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_another_window_resizes_the_tables_of_v1(tmp_path):
    trained = small_model(V1)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"6 bias tables resized, kernel size \(4, 4\) to \(5, 6\)"):
        model = create_model(V1, pretrained=tmp_path / "weights.pth", **(SMALL | dict(window_size=(5, 6))))
    key = "layers.1.blocks.2.attn.relative_position_bias_table"
    table = trained.state_dict()[key]
    expected = F.interpolate(table.t().reshape(1, -1, 7, 7), size=(9, 11), mode="bicubic").flatten(2)[0].t()
    close(model.state_dict()[key], expected, 1e-6)
    assert torch.equal(model.state_dict()["head.weight"], trained.state_dict()["head.weight"])


def test_tables_of_another_number_of_heads_are_refused():
    with pytest.raises(ValueError, match="relative_position_bias_table"):
        load_weights(small_model(V1, num_heads=(4, 2, 4)), small_model(V1).state_dict())


def test_another_window_asks_the_mlp_of_v2(tmp_path):
    published = create_model(V2, num_classes=10, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    options = dict(num_classes=10, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    model = create_model(V2, pretrained=tmp_path / "weights.pth", window_size=12, **options)
    attention, before = attentions(model)[0], attentions(published)[0]
    close(attention.cpb_mlp.coords, rpb.log_spaced_coords(12, 8), 1e-6)
    close(attention.cpb_mlp()[:, 4:-4, 4:-4], before.cpb_mlp(), 1e-5)
    own = create_model(V2, window_size=12, pretrained_window_sizes=0, **options)
    close(attentions(own)[0].cpb_mlp.coords, rpb.log_spaced_coords(12), 1e-6)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(num_heads=(1, 2)), "num_heads must have one entry per stage"),
        (dict(window_size=(4, 4, 4, 4)), "window_size must have one entry per stage of depths, 3, got 4"),
        (dict(padding="same"), "padding must be one of"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
@EACH_VERSION
def test_overrides_that_do_not_fit(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        small_model(name, **overrides)


TWO_STAGES = dict(embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=10)


@pytest.mark.parametrize(
    "given, windows",
    [
        (8, [(8, 8), (8, 8)]),
        ((8, 8), [(8, 8), (8, 8)]),
        (((8, 8), (4, 4)), [(8, 8), (4, 4)]),
        (((8, 4), (8, 4)), [(8, 4), (8, 4)]),
        ((8, (4, 6)), [(8, 8), (4, 6)]),
        (torch.tensor(8), [(8, 8), (8, 8)]),
    ],
    ids=str,
)
@EACH_VERSION
def test_windows_of_two_stages(name, given, windows):
    assert [a.window_size for a in attentions(create_model(name, window_size=given, **TWO_STAGES))] == windows


@EACH_VERSION
def test_windows_that_could_mean_two_things_are_refused(name):
    with pytest.raises(ValueError, match=r"window_size \(8, 4\) is ambiguous for two stages: write \(\(8, 8\), \(4, 4\)\)"):
        create_model(name, window_size=(8, 4), **TWO_STAGES)
    if name == V2:
        with pytest.raises(ValueError, match=r"pretrained_window_sizes \(6, 12\) is ambiguous"):
            create_model(name, pretrained_window_sizes=(6, 12), **TWO_STAGES)


def test_three_forms_of_patch_embedding_are_one():
    """Convolution, unfolding with a linear layer, and F.unfold itself."""
    images = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    conv = nn.Conv2d(3, 8, kernel_size=4, stride=4).double()
    linear = UnfoldMerging(3, 8, 4).double()
    linear.linear.load_state_dict({"weight": conv_to_linear(conv.weight), "bias": conv.bias})
    expected = conv(images).permute(0, 2, 3, 1)
    close(linear(images.permute(0, 2, 3, 1)), expected)
    unfolded = F.unfold(images, kernel_size=4, stride=4).mT.unflatten(1, (3, 5))
    close(linear.linear(unfolded), expected)
    assert torch.equal(linear_to_conv(linear.linear.weight, 4), conv.weight)


@pytest.mark.parametrize("kind", [PatchMerging, PatchMergingV2])
def test_official_merging_is_a_convolution_but_for_its_norm(kind):
    x = torch.randn(2, 6, 8, 5, dtype=torch.float64)
    merge = kind(5).double()
    norm, merge.norm = merge.norm, nn.Identity()
    weight = linear_to_conv(merge.reduction.weight, 2, "merging")
    assert torch.equal(conv_to_linear(weight, "merging"), merge.reduction.weight)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2).permute(0, 2, 3, 1)
    close(merge(x), convolved)
    unfold = UnfoldMerging(5, 10, 2, bias=False).double()
    unfold.linear.weight = nn.Parameter(conv_to_linear(weight))
    close(unfold(x), convolved)
    merge.norm = norm
    if kind is PatchMergingV2:  # here the norm comes last, and follows in every form
        close(merge(x), norm(convolved))


@pytest.mark.parametrize("order", ["columns", ""])
def test_patch_orders_that_do_not_exist(order):
    with pytest.raises(ValueError, match="order must be"):
        linear_to_conv(torch.zeros(2, 12), 2, order)
    with pytest.raises(ValueError, match="order must be"):
        conv_to_linear(torch.zeros(2, 3, 2, 2), order)


# The small Swin of tutorials: hidden_dim, layers, heads and downscaling_factors; no norm in the merging, which opens every
# stage; one bias table, indexed by key minus query, for all heads, or a bias of every pair; one temperature in v2.


class PlainBlock(nn.Module):
    """Roll, partition, mask, attention, reverse, roll, written out."""

    def __init__(self, dim: int, heads: int, head_dim: int, window: int, shift: int, relative: bool, tau: float | None) -> None:
        super().__init__()
        self.heads, self.window, self.shift, self.tau = heads, window, shift, tau
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)
        self.pos_embedding = nn.Parameter(torch.randn((2 * window - 1,) * 2 if relative else (window**2,) * 2))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attention(self, x: Tensor) -> Tensor:
        (batch, height, width, _), w, s = x.shape, self.window, self.shift
        rows, columns = height // w, width // w
        x = x.roll((-s, -s), (1, 2))
        x = x.reshape(batch, rows, w, columns, w, -1).transpose(2, 3).reshape(batch, rows, columns, w * w, -1)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(4, 0, 1, 2, 5, 3, 6)
        if self.tau is None:
            dots = q @ k.mT * q.shape[-1] ** -0.5
        else:
            dots = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT / self.tau
        places = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij"), -1).reshape(-1, 2)
        relative = places[None] - places[:, None] + w - 1  # key minus query
        table = self.pos_embedding
        dots = dots + (table[relative[..., 0], relative[..., 1]] if len(table) == 2 * w - 1 else table)
        if s:
            wrapped = places >= w - s
            for axis, last in ((0, dots[:, -1]), (1, dots[:, :, -1])):
                last.masked_fill_(wrapped[:, None, axis] != wrapped[None, :, axis], float("-inf"))
        out = (dots.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
        out = self.to_out(out).reshape(batch, rows, columns, w, w, -1).transpose(2, 3).reshape(batch, height, width, -1)
        return out.roll((s, s), (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.tau is None:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.norm1(self.attention(x))
        return x + self.norm2(self.mlp(x))


def plain_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain block's weights in the keys of SwinBlock."""
    names = {"to_qkv": "attn.qkv", "to_out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    ours = {}
    for key, tensor in state.items():
        module, _, part = key.rpartition(".")
        if key != "pos_embedding":
            ours[f"{names.get(module, module)}.{part}"] = tensor
        elif len(tensor) % 2 and math.isqrt(len(tensor)) ** 2 != len(tensor):
            ours["attn.relative_position_bias_table"] = rpb.nat_to_swin(tensor[None])
        else:
            ours["attn.position_bias"] = tensor
    return ours


@pytest.mark.parametrize("tau", [None, 0.05], ids=["v1", "v2"])
@pytest.mark.parametrize("relative", [True, False], ids=["table", "pairs"])
def test_small_swin_of_tutorials(relative, tau):
    hidden_dim, layers, heads, factors, window, head_dim = 8, (2, 2), (2, 3), (2, 3), 4, 6
    plain, ours, channels = nn.ModuleList(), nn.ModuleList(), 3
    for i, (depth, h, factor) in enumerate(zip(layers, heads, factors)):
        dim = hidden_dim * 2**i
        merge = nn.Conv2d(channels, dim, factor, factor)
        blocks = [PlainBlock(dim, h, head_dim, window, j % 2 * 2, relative, tau) for j in range(depth)]
        plain.append(nn.ModuleList([merge, *blocks]))
        unfold = UnfoldMerging(channels, dim, factor)
        unfold.linear.load_state_dict({"weight": conv_to_linear(merge.weight), "bias": merge.bias})
        stage = [unfold]
        for block in blocks:
            attention = WindowAttention(
                dim, window, h, block.shift, head_dim=head_dim, qkv_bias=False, tau=tau,
                position_bias="shared_table" if relative else "dense",
            )  # fmt: skip
            mine = (SwinBlock if tau is None else SwinV2Block)(attention)
            mine.load_state_dict(plain_to_ours(block.state_dict()))
            stage.append(mine)
        ours.append(nn.Sequential(*stage))
        channels = dim
    plain, ours = plain.double(), ours.double()
    images = torch.randn(2, 3, 48, 72, dtype=torch.float64)
    expected, out = images.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1)
    for (merge, *blocks), stage in zip(plain, ours):
        expected = merge(expected.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for block in blocks:
            expected = block(expected)
        out = stage(out)
    close(out, expected)
    weights = torch.randn(out.shape, dtype=out.dtype)
    (out * weights).sum().backward(), (expected * weights).sum().backward()
    for (_, *blocks), (_, *mine) in zip(plain, ours):
        for block, our_block in zip(blocks, mine):
            converted = plain_to_ours({key: parameter.grad for key, parameter in block.named_parameters()})
            for key, parameter in our_block.named_parameters():
                close(parameter.grad, converted[key], 1e-8)

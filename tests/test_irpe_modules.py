"""iRPE modules against the definition written out: every method and mode, unfused and within attention, masks, dropout."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import natrpb
from natrpb import RPEMultiheadAttention, build_rpe, get_rpe_config, iRPE, iRPE_Cross, iRPEAttention
from natrpb.modules import parse_rpe_config
from natrpb.modules.irpe import map_size

from .irpe_dense import bucket_map, dense_attention, tables_of
from .support import close

RATIOS = {"product": 1.9, "euclidean": 2.5, "quantization": 3.0, "cross": 2.0}
METHOD = pytest.mark.parametrize("method", RATIOS)
CONTEXTUAL_ON = ["q", "k", "v", "qk", "qv", "kv", "qkv"]
BIAS_ON = ["q", "k", "qk"]
MODES = [pytest.param(mode, on, id=f"{mode}-{on}") for mode, ons in (("ctx", CONTEXTUAL_ON), ("bias", BIAS_ON)) for on in ons]
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])


def with_random_tables(module: nn.Module) -> nn.Module:
    """The module in fp64 with tables that are not zero."""
    module = module.double()
    for name, parameter in module.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, std=0.5)
    return module


def encoding_tables(module: nn.Module, letter: str, method: str, height: int, width: int, skip: int, ratio: float):
    """[(table, map)] of one encoding, found in the module by their official names."""
    found = dict(module.named_parameters())
    pairs = []
    for prefix, table in tables_of(method):
        for kind in ("weight", "bias"):
            parameter = found.get(f"rpe_{letter}.{prefix}lookup_table_{kind}")
            if parameter is not None:
                pairs.append((parameter, bucket_map(table, height, width, skip, ratio)))
    return pairs


def dense_deit(module: iRPEAttention, x: Tensor, method: str, height: int, width: int, skip: int, ratio: float) -> Tensor:
    """What `iRPEAttention` computes, from gathered encodings."""
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    encodings = [encoding_tables(module, letter, method, height, width, skip, ratio) for letter in "qkv"]
    out = dense_attention(*qkv, *encodings, module.scale)
    return module.proj(out.transpose(1, 2).flatten(2))


@METHOD
@SHARED
@pytest.mark.parametrize("mode, on", MODES)
def test_attention_and_gradients_by_definition(method, mode, on, shared):
    ratio, (height, width, skip) = RATIOS[method], (4, 5, 1)
    exact = with_random_tables(iRPEAttention(12, 3, True, rpe_config=get_rpe_config(ratio, method, mode, shared, skip, on)))
    x = torch.randn(2, skip + height * width, 12, dtype=torch.float64)
    expected = dense_deit(exact, x.requires_grad_(), method, height, width, skip, ratio)
    dout = torch.randn_like(expected)
    leaves = [x, *exact.parameters()]
    gradients = torch.autograd.grad(expected, leaves, dout)
    assert all(gradient.any() for gradient in gradients)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        module = copy.deepcopy(exact).to(dtype)
        own = x.detach().to(dtype).requires_grad_()
        out = module(own, height, width)
        assert out.dtype == dtype
        close(out.double(), expected, tolerance)
        found = torch.autograd.grad(out, [own, *module.parameters()], dout.to(dtype))
        for gradient, wanted in zip(found, gradients):
            close(gradient.double() / wanted.abs().max(), wanted / wanted.abs().max(), tolerance)


@METHOD
@pytest.mark.parametrize("mode, on", [("ctx", "qkv"), ("bias", "qk")], ids=["ctx", "bias"])
def test_gradcheck(method, mode, on):
    module = with_random_tables(iRPEAttention(4, 2, rpe_config=get_rpe_config(RATIOS[method], method, mode, False, 1, on)))
    names, parameters = zip(*module.named_parameters())

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,), {"height": 2, "width": 3})

    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@METHOD
@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("sides", [(1, 1), (3, 4), (5, 2)], ids="{0[0]}x{0[1]}".format)
def test_skipped_tokens_and_sides(method, skip, sides):
    module = with_random_tables(iRPEAttention(8, 2, rpe_config=get_rpe_config(RATIOS[method], method, skip=skip, rpe_on="qkv")))
    x = torch.randn(2, skip + sides[0] * sides[1], 8, dtype=torch.float64)
    close(module(x, *sides), dense_deit(module, x, method, *sides, skip, RATIOS[method]))


@METHOD
@SHARED
@pytest.mark.parametrize("mode, on", MODES)
def test_unfused_modules_as_the_official_attention_calls_them(method, mode, on, shared):
    attention = with_random_tables(iRPEAttention(8, 2, rpe_config=get_rpe_config(RATIOS[method], method, mode, shared, 1, on)))
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    query, key, value = attention.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    query = query * attention.scale
    scores = query @ key.transpose(-1, -2)
    if attention.rpe_k is not None:
        scores = scores + attention.rpe_k(query)
    if attention.rpe_q is not None:
        scores = scores + attention.rpe_q(key * attention.scale).transpose(2, 3)
    weights = scores.softmax(-1)
    out = weights @ value
    if attention.rpe_v is not None:
        out = out + attention.rpe_v(weights)
    close(attention.proj(out.transpose(1, 2).flatten(2)), attention(x))


def test_shapes_of_unfused_modules():
    x = torch.randn(2, 4, 10, 6)
    rpe_q, rpe_k, rpe_v = build_rpe(get_rpe_config(skip=1, rpe_on="qkv"), 6, 4)
    assert rpe_q(x).shape == rpe_k(x, height=3, width=3).shape == (2, 4, 10, 10)
    assert rpe_v(torch.rand(2, 4, 10, 10)).shape == (2, 4, 10, 6)
    bias = build_rpe(get_rpe_config(mode="bias", shared_head=False, skip=0), 6, 4)[1]
    assert bias(torch.randn(2, 4, 15, 6), 3, 5).shape == (1, 4, 15, 15)


@METHOD
def test_encoding_of_nothing_changes_nothing(method):
    """Tables start at zero: the attention is that of scaled_dot_product_attention."""
    module = iRPEAttention(8, 2, rpe_config=get_rpe_config(RATIOS[method], method, skip=1, rpe_on="qkv")).double()
    assert not any(p.any() for name, p in module.named_parameters() if "lookup_table" in name)
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    close(module(x), module.proj(out.transpose(1, 2).flatten(2)))


def test_state_dict_keys_and_shapes():
    def shapes(**config) -> dict:
        module = iRPEAttention(12, 3, rpe_config=get_rpe_config(**config))
        return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if "rpe" in key}

    assert shapes(skip=1, rpe_on="qkv") == {
        "rpe_q.lookup_table_weight": (1, 4, 50),
        "rpe_k.lookup_table_weight": (1, 4, 50),
        "rpe_v.lookup_table_weight": (1, 50, 4),
    }
    assert shapes(ratio=2.0, mode="bias", shared_head=False) == {"rpe_k.lookup_table_bias": (3, 81)}
    assert shapes(ratio=20, method="cross", skip=1, rpe_on="kv", shared_head=False) == {
        "rpe_k.rp_rows.lookup_table_weight": (3, 4, 82),
        "rpe_k.rp_cols.lookup_table_weight": (3, 4, 82),
        "rpe_v.rp_rows.lookup_table_weight": (3, 82, 4),
        "rpe_v.rp_cols.lookup_table_weight": (3, 82, 4),
    }
    module = iRPEAttention(12, 3, rpe_config=get_rpe_config(skip=1))
    module(torch.randn(1, 10, 12))
    assert set(module.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias", "rpe_k.lookup_table_weight"}
    torch.save(module, buffer := io.BytesIO())
    assert buffer.tell()


def test_configs():
    config = get_rpe_config(ratio=2.5, method="quant", mode="ctx", shared_head=False, skip=2, rpe_on="qv")
    assert config.rpe_k is None
    assert config.rpe_q == config.rpe_v
    single = config.rpe_q
    assert (single.shared_head, single.mode, int(single.method), single.num_buckets) == (False, "contextual", 1, 12)
    assert (single.alpha, single.beta, single.gamma) == (2.5, 5, 20)
    assert get_rpe_config().rpe_k.num_buckets == 49 and get_rpe_config().rpe_q is None
    assert parse_rpe_config("rpe-2.0-product-ctx-1-k") == get_rpe_config(2.0, "product", "ctx", True, 0, "k")
    assert parse_rpe_config("rpe-20-cross-bias-0-qk", skip=1) == get_rpe_config(20, "cross", "bias", False, 1, "qk")
    assert parse_rpe_config("") is None
    assert build_rpe(None, 4, 2) == [None, None, None]


def test_configs_of_other_classes():
    """Any object with the official attributes will do, and each encoding may have its own."""
    bias, contextual = get_rpe_config(mode="bias", skip=1).rpe_k, get_rpe_config(2.0, "cross", shared_head=False, skip=1).rpe_k
    config = SimpleNamespace(rpe_q=SimpleNamespace(**vars(bias)), rpe_k=SimpleNamespace(**vars(contextual)), rpe_v=None)
    module = with_random_tables(iRPEAttention(8, 2, rpe_config=config))
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    rpe_q = encoding_tables(module, "q", "product", 3, 4, 1, 1.9)
    rpe_k = encoding_tables(module, "k", "cross", 3, 4, 1, 2.0)
    out = dense_attention(query, key, value, rpe_q, rpe_k, [], module.scale)
    close(module(x, 3, 4), module.proj(out.transpose(1, 2).flatten(2)))


def test_bias_tables_of_different_sharing():
    config = SimpleNamespace(
        rpe_q=get_rpe_config(mode="bias", shared_head=True).rpe_k,
        rpe_k=get_rpe_config(mode="bias", shared_head=False).rpe_k,
        rpe_v=None,
    )
    module = with_random_tables(iRPEAttention(8, 2, rpe_config=config))
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    close(module(x), dense_deit(module, x, "product", 3, 3, 0, 1.9))


def test_initializer():
    config = get_rpe_config(skip=1).rpe_k
    encoding = iRPE(4, 2, "contextual", "product", initializer=nn.init.ones_, rpe_config=config)
    assert (encoding.lookup_table_weight == 1).all() and encoding.lookup_table_weight.requires_grad
    nn.init.zeros_(encoding.lookup_table_weight)
    encoding.reset_parameters()
    assert (encoding.lookup_table_weight == 1).all()
    assert encoding.num_buckets == 50


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: get_rpe_config(method="circle"), "method must be one of"),
        (lambda: get_rpe_config(mode="rotary"), "mode must be one of"),
        (lambda: get_rpe_config(rpe_on="kx"), "rpe_on must hold the letters"),
        (lambda: get_rpe_config(ratio=-1), "ratio must be"),
        (lambda: parse_rpe_config("rpe-2.0-product-ctx-1"), "text must be rpe-ratio"),
        (lambda: parse_rpe_config("rpe-two-product-ctx-1-k"), "text must be rpe-ratio"),
        (lambda: parse_rpe_config("spe-2.0-product-ctx-1-k"), "must begin with rpe"),
        (lambda: build_rpe(get_rpe_config(mode="bias", rpe_on="v"), 4, 2), "mode must be 'contextual' on values"),
        (lambda: iRPE(4, 2, None, "product", rpe_config=get_rpe_config().rpe_k), "mode must be one of"),
        (lambda: iRPE(4, 2, "bias", "product"), "rpe_config must be given"),
        (lambda: iRPE(4, 2, "bias", "cross", rpe_config=get_rpe_config().rpe_k), "use iRPE_Cross"),
        (lambda: iRPE_Cross("product", head_dim=4), "method must be cross"),
        (lambda: iRPEAttention(7, 2), "dim must be a positive multiple of num_heads"),
        (lambda: iRPEAttention(8, 2, attn_drop=1.5), "attn_drop must be between 0 and 1"),
        (lambda: RPEMultiheadAttention(7, 2), "embed_dim must be a positive multiple"),
    ],
)
def test_bad_construction_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "skip, shape, sides, message",
    [
        (1, (2, 9, 8), (), "num_buckets must be 49 for a sequence with 0 skipped tokens, got 50"),
        (0, (2, 10, 8), (), "num_buckets must be 50 for a sequence with 1 skipped tokens, got 49"),
        (0, (2, 12, 8), (5, 3), r"height \* width must be at most"),
        (0, (2, 12, 8), (3, None), "given together"),
        (0, (2, 12, 7), (3, 4), r"x must have shape \[B, L, 8\]"),
        (0, (12, 8), (3, 4), r"x must have shape \[B, L, 8\]"),
    ],
)
def test_bad_inputs_are_named(skip, shape, sides, message):
    module = iRPEAttention(8, 2, rpe_config=get_rpe_config(skip=skip))
    with pytest.raises(ValueError, match=message):
        module(torch.randn(shape), *sides)


class TestDropout:
    def module(self, p: float) -> iRPEAttention:
        return with_random_tables(
            iRPEAttention(8, 2, attn_drop=p, rpe_config=get_rpe_config(2.0, "cross", skip=1, rpe_on="qkv"))
        )

    def test_none_in_evaluation(self):
        module, x = self.module(0.5).eval(), torch.randn(2, 10, 8, dtype=torch.float64)
        close(module(x), dense_deit(module, x, "cross", 3, 3, 1, 2.0))

    def test_keeps_the_mean(self):
        module, x = self.module(0.3), torch.randn(1, 10, 8, dtype=torch.float64)
        mean = torch.stack([module(x) for _ in range(3000)]).mean(0)
        close(mean, module.eval()(x), 0.06)

    def test_of_everything_leaves_the_projections_bias(self):
        module = self.module(1.0)
        close(module(torch.randn(1, 10, 8, dtype=torch.float64)), module.proj.bias.expand(1, 10, 8))

    def test_falls_before_both_sums_of_the_values(self):
        """The weights that come back give the output: one drawing for values and their encodings."""
        query, key, value = torch.randn(3, 2, 12, 2, 4, dtype=torch.float64)
        table = torch.randn(1, 49, 4, dtype=torch.float64)
        index = natrpb.irpe.bucket_ids("product", 3, 4, device=table.device)
        out, weights = natrpb.irpe_attention(
            query, key, value, value_table=table, value_index=index, dropout_p=0.5, return_weights=True
        )  # fmt: skip
        assert 0.3 < (weights == 0).double().mean() < 0.7
        expected = torch.einsum("bhij,bjhd->bihd", weights, value)
        close(out, expected + torch.einsum("bhij,ijd->bihd", weights, table[0, index.long()]))


class TestMasks:
    def call(self, **options):
        query, key, value = (torch.randn(2, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
        index = natrpb.irpe.bucket_ids("product", 2, 3, device=query.device)
        tables = dict(
            key_table=torch.randn(1, 4, 49, dtype=torch.float64, requires_grad=True),
            query_table=torch.randn(2, 4, 49, dtype=torch.float64, requires_grad=True),
            bias_table=torch.randn(2, 49, dtype=torch.float64, requires_grad=True),
            value_table=torch.randn(2, 49, 4, dtype=torch.float64, requires_grad=True),
        )
        maps = {name.replace("table", "index"): index for name in tables}
        return (query, key, value, *tables.values()), natrpb.irpe_attention(query, key, value, **tables, **maps, **options)

    @pytest.mark.parametrize("dropout_p", [0.0, 1e-12], ids=["fused", "unfused"])
    def test_a_query_without_keys_gets_zeros_and_gives_none(self, dropout_p):
        pattern = torch.zeros(6, 6, dtype=torch.bool)
        pattern[2] = True
        leaves, (out, lse) = self.call(attn_mask=pattern, dropout_p=dropout_p, return_lse=True)
        assert not out[:, 2].any() and (lse[:, 2] == -torch.inf).all()
        assert out[:, 3].all() and lse[:, 3].isfinite().all()
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[0][:, 2].any()

    @pytest.mark.parametrize("dropout_p", [0.0, 1e-12], ids=["fused", "unfused"])
    def test_padding_is_not_read(self, dropout_p):
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        torch.manual_seed(1)
        leaves, expected = self.call(key_padding_mask=padding, dropout_p=dropout_p)
        wanted = torch.autograd.grad(expected.sum(), leaves)
        query, key, value, *tables = (x.detach().clone() for x in leaves)
        key[1, 4:] = value[1, 4:] = torch.nan
        leaves = [x.requires_grad_() for x in (query, key, value, *tables)]
        names, index = ("key", "query", "bias", "value"), natrpb.irpe.bucket_ids("product", 2, 3, device=query.device)
        encodings = {f"{n}_table": t for n, t in zip(names, tables)} | {f"{n}_index": index for n in names}
        out = natrpb.irpe_attention(query, key, value, **encodings, key_padding_mask=padding, dropout_p=dropout_p)
        close(out, expected)
        for gradient, without in zip(torch.autograd.grad(out.sum(), leaves), wanted):
            close(gradient, without)

    def test_weights_are_those_of_the_output(self):
        pattern = torch.rand(6, 6) < 0.3
        leaves, (out, lse, weights) = self.call(attn_mask=pattern, return_lse=True, return_weights=True)
        value, value_table = leaves[2], leaves[-1]
        index = natrpb.irpe.bucket_ids("product", 2, 3, device=value.device)
        expected = torch.einsum("bhij,bjhd->bihd", weights, value)
        close(out, expected + torch.einsum("bhij,hijd->bihd", weights, value_table[:, index.long()]))
        assert not weights[:, :, pattern].any()
        close(weights.sum(-1), torch.ones(2, 2, 6))
        assert lse.shape == (2, 6, 2)


def test_half_precision_and_autocast():
    module = with_random_tables(iRPEAttention(16, 2, rpe_config=get_rpe_config(skip=1, rpe_on="qkv"))).float()
    x = torch.randn(2, 17, 16)
    expected = module(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 0.05)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in module.parameters())
    close(module.bfloat16()(x.bfloat16()).float(), expected, 0.05)


@pytest.mark.parametrize("mode, on", [("ctx", "qkv"), ("bias", "qk")], ids=["ctx", "bias"])
def test_compiles_to_one_graph(mode, on):
    module = with_random_tables(iRPEAttention(8, 2, rpe_config=get_rpe_config(2.0, "cross", mode, skip=1, rpe_on=on)))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for sides in ((3, 4), (4, 2)):
        x = torch.randn(2, 1 + sides[0] * sides[1], 8, dtype=torch.float64, requires_grad=True)
        out, expected = compiled(x, *sides), module(x, *sides)
        close(out, expected)
        close(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exports(strict):
    module = with_random_tables(iRPEAttention(8, 2, rpe_config=get_rpe_config(skip=1, rpe_on="qkv"))).eval()
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    exported = torch.export.export(module, (x,), strict=strict)
    close(exported.module()(x), module(x))


class TestUnknownLengths:
    """Graphs whose sequence length, and with it the map, is a symbol."""

    CONFIGS = {  # and the skipped tokens
        "none": (None, 0),
        "ctx": (get_rpe_config(rpe_on="qkv"), 0),
        "ctx-skip": (get_rpe_config(2.0, "cross", skip=1, rpe_on="qkv"), 1),
        "bias": (get_rpe_config(mode="bias", shared_head=False, skip=1, rpe_on="qk"), 1),
    }

    @pytest.mark.parametrize("config, skip", CONFIGS.values(), ids=CONFIGS)
    def test_compile_to_one_graph(self, config, skip):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        module = with_random_tables(iRPEAttention(16, 2, rpe_config=config))
        compiled = torch.compile(module, backend=graphs, fullgraph=True)
        for side in (3, 5, 4, 7):
            x = torch.randn(2, skip + side**2, 16, dtype=torch.float64, requires_grad=True)
            out, expected = compiled(x), module(x)
            close(out, expected)
            close(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
        assert graphs.frame_count == 2  # one for the first length, one for all others

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
    @pytest.mark.parametrize("name", ["ctx", "ctx-skip", "bias"])
    def test_unfused_encodings_export(self, name, strict):
        config, skip = self.CONFIGS[name]
        encoding = with_random_tables(iRPEAttention(16, 2, rpe_config=config)).rpe_k
        x = torch.randn(2, 2, skip + 9, 8, dtype=torch.float64)
        program = torch.export.export(encoding, (x,), dynamic_shapes=({2: torch.export.Dim.AUTO},), strict=strict)
        for side in (3, 5):
            x = torch.randn(2, 2, skip + side**2, 8, dtype=torch.float64)
            close(program.module()(x), encoding(x))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 8, 9, 10, 2**40 - 1, 2**40])
def test_the_default_map_is_the_largest_square(length):
    side = math.isqrt(length)
    assert map_size(length, None, None) == (side, side, length - side**2)


def test_without_encodings_there_is_no_map():
    x = torch.randn(2, 5, 8)
    module = iRPEAttention(8, 2)
    assert torch.equal(module(x, 3, 3), module(x))

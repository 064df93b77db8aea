"""Windowed attention: against a dense plain version and Swin's roll and mask, derivatives, layouts, modules, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from natrpb import rpb
from natrpb.functional import window_attention, window_attention_qkvpacked
from natrpb.functional.window import crop_from_windows, fit_shift, pad_to_windows
from natrpb.modules import ContinuousPositionBias, WindowAttention, WindowAttentionV2

from .support import at_most_twice_the_error, close, dtype_id, needs_compiled

SHAPES = [  # map, window, shift
    ((8,), 4, 2),
    ((11,), 4, 3),
    ((8, 12), 4, 0),
    ((8, 12), 4, 2),
    ((9, 11), 4, 2),
    ((7, 13), (3, 5), (1, 4)),
    ((5, 6), 8, 0),
    ((5, 6), 8, 3),
    ((1, 7), (2, 3), (1, 0)),
    ((4, 6, 6), (2, 3, 3), (1, 1, 2)),
    ((3, 5, 7), 3, (0, 2, 1)),
]
EACH_SHAPE = pytest.mark.parametrize(
    "spatial, window, shift", SHAPES, ids=["-".join(str(x).replace(" ", "") for x in shape) for shape in SHAPES]
)


def spread(size, ndim: int) -> tuple[int, ...]:
    return (size,) * ndim if isinstance(size, int) else size


def inputs(spatial, window, heads: int = 2, head_dim: int = 4, batch: int = 2, dtype=torch.float64) -> list[Tensor]:
    """query, key, value and a table in Swin's layout, leaves that require gradients."""
    entries = math.prod(2 * w - 1 for w in spread(window, len(spatial)))
    tensors = [torch.randn(batch, *spatial, heads, head_dim, dtype=torch.float64) for _ in range(3)]
    tensors.append(torch.randn(entries, heads, dtype=torch.float64))
    return [x.to(dtype).requires_grad_() for x in tensors]


def dense(query, key, value, window, shift, table=None, scale=None, logit_scale=None):
    """Attention over the whole map, with all pairs of different windows masked, as plainly as it can be said."""
    spatial, head_dim = query.shape[1:-2], query.shape[-1]
    window, shift = spread(window, len(spatial)), spread(shift, len(spatial))
    places = torch.tensor(list(itertools.product(*map(range, spatial))))  # [N, axes]
    blocks = torch.div(places - torch.tensor(shift), torch.tensor(window), rounding_mode="floor")
    together = (blocks[:, None] == blocks[None]).all(-1)
    query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, h, N, d]
    if logit_scale is None:
        scores = query @ key.mT * (head_dim**-0.5 if scale is None else scale)
    else:
        query, key = (nn.functional.normalize(x, dim=-1) for x in (query, key))
        scores = query @ key.mT * logit_scale.reshape(-1, 1, 1).clamp(max=math.log(100)).exp()
    if table is not None:
        offset = places[:, None] - places[None] + torch.tensor(window) - 1
        index = torch.zeros(offset.shape[:2], dtype=torch.int64)
        for axis, w in enumerate(window):
            index = index * (2 * w - 1) + offset[..., axis]
        scores = scores + table[index.masked_fill(~together, 0)].permute(2, 0, 1)
    scores = scores.masked_fill(~together, float("-inf"))
    out = (scores.softmax(-1) @ value).transpose(1, 2).unflatten(1, spatial)
    return out, scores.logsumexp(-1).transpose(1, 2).unflatten(1, spatial)


def gradients(outputs, leaves) -> list[Tensor]:
    torch.manual_seed(1)
    return torch.autograd.grad(sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs), leaves)


@pytest.mark.parametrize("version", [1, 2])
@EACH_SHAPE
def test_equals_dense_attention_within_blocks(spatial, window, shift, version):
    leaves = inputs(spatial, window)
    logit_scale = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True) if version == 2 else None
    leaves += [logit_scale] if version == 2 else []
    *tensors, table = leaves[:4]
    ours = window_attention(*tensors, window, shift, table, logit_scale=logit_scale, return_lse=True)
    plain = dense(*tensors, window, shift, table, logit_scale=logit_scale)
    for mine, theirs in zip([*ours, *gradients(ours, leaves)], [*plain, *gradients(plain, leaves)]):
        close(mine, theirs)


@pytest.mark.parametrize("window, shift", [((4, 4), (2, 2)), ((4, 3), (1, 2)), ((2, 6), (0, 3))], ids=str)
def test_equals_roll_partition_mask_and_reverse(window, shift):
    """Liu et al. 2021, section 3.2: cyclic shift, then windows in which tokens of different regions do not see each other."""
    (height, width), batch, dim = (8, 12), 2, 4
    *tensors, table = inputs((height, width), window, head_dim=dim, batch=batch)
    counts = height // window[0], width // window[1]

    def windows(x: Tensor) -> Tensor:  # [B, H, W, ...] -> [B, windows, N, ...]
        x = x.roll((-shift[0], -shift[1]), (1, 2)).unflatten(2, (counts[1], window[1])).unflatten(1, (counts[0], window[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    before = [torch.arange(side) < s for side, s in zip((height, width), shift)]
    region = before[0][:, None].long() * 2 + before[1].long()
    region = windows(region[None, ..., None].expand(batch, -1, -1, 1))[..., 0]
    query, key, value = (windows(x).transpose(2, 3) for x in tensors)  # [B, windows, h, N, d]
    scores = query @ key.mT * dim**-0.5 + table[rpb.swin_index(window)].permute(2, 0, 1)
    scores = scores.masked_fill((region[:, :, :, None] != region[:, :, None])[:, :, None], float("-inf"))
    out = (scores.softmax(-1) @ value).transpose(2, 3).unflatten(2, window).unflatten(1, counts)
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(shift, (1, 2))
    close(window_attention(*tensors, window, shift, table), out)


@EACH_SHAPE
def test_table_layouts_and_conventions(spatial, window, shift):
    *tensors, table = inputs(spatial, window)
    expected = window_attention(*tensors, window, shift, table)
    grid = rpb.swin_to_nat(table, spread(window, len(spatial)))
    assert torch.equal(window_attention(*tensors, window, shift, grid, convention="nat"), expected)
    if len(spatial) > 1:
        flipped = grid.flip(tuple(range(1, grid.dim())))
        assert torch.equal(window_attention(*tensors, window, shift, flipped), expected)
        swapped = flipped.flip(tuple(range(1, grid.dim()))).flatten(1).t()
        assert torch.equal(window_attention(*tensors, window, shift, swapped, convention="nat"), expected)


def test_on_one_axis_the_convention_tells_the_layout():
    """Both have rank two there: the wrong one is refused by name."""
    x = torch.zeros(1, 8, 2, 4)
    for convention, right, wrong in (("swin", [7, 2], [2, 7]), ("nat", [2, 7], [7, 2])):
        window_attention(x, x, x, 4, rpb=torch.zeros(right), convention=convention)
        with pytest.raises(ValueError) as refused:
            window_attention(x, x, x, 4, rpb=torch.zeros(wrong), convention=convention)
        said = str(refused.value)
        assert f"shape {right}" in said and f"in convention '{convention}'" in said and said.endswith(f"got {wrong}")


@EACH_SHAPE
def test_dense_bias_of_a_table_is_the_table(spatial, window, shift):
    *tensors, table = inputs(spatial, window)
    sides = spread(window, len(spatial))
    pairs = rpb.dense_bias(rpb.swin_to_nat(table, sides), sides)
    ours = window_attention(*tensors, window, shift, dense_bias=pairs, return_lse=True)
    plain = window_attention(*tensors, window, shift, table, return_lse=True)
    leaves = [*tensors, table]
    for mine, theirs in zip([*ours, *gradients(ours, leaves)], [*plain, *gradients(plain, leaves)]):
        close(mine, theirs)


def test_dropout_keeps_the_mean_and_lse():
    *tensors, table = inputs((6, 5), 3, head_dim=2, batch=200)
    ones = torch.ones_like(tensors[2])
    out, lse = window_attention(*tensors[:2], ones, 3, 1, table, dropout_p=0.5, return_lse=True)
    assert abs(out.mean() - 1) < 0.05 and out.std() > 0.1
    close(lse, window_attention(*tensors, 3, 1, table, return_lse=True)[1])
    assert not window_attention(*tensors, 3, 1, table, dropout_p=1.0).any()


@pytest.mark.not_emulated("takes minutes; test_local_attention_gradients has windows too")
@pytest.mark.parametrize(
    "spatial, window, shift",
    [((5,), 3, 1), ((3, 5), (2, 3), (1, 2)), ((4, 4), 2, 0), ((2, 3, 3), (2, 2, 2), (0, 1, 1))],
    ids=str,
)
def test_derivatives_of_first_and_second_order(spatial, window, shift):
    query, key, value, table = inputs(spatial, window, heads=2, head_dim=2, batch=1)
    logit_scale = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)

    def v1(*leaves):
        return window_attention(*leaves[:3], window, shift, leaves[3], return_lse=True)

    def v2(*leaves):
        return window_attention(*leaves[:3], window, shift, leaves[3], logit_scale=leaves[4], return_lse=True)

    for call, leaves in ((v1, (query, key, value, table)), (v2, (query, key, value, table, logit_scale))):
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


def test_logit_scale_is_clamped_and_its_gradient_with_it():
    query, key, value, table = inputs((4, 4), 2, heads=3)
    logit_scale = torch.tensor([1.0, math.log(100) + 0.1, 9.0], dtype=torch.float64, requires_grad=True)
    out = window_attention(query, key, value, 2, 1, table, logit_scale=logit_scale)
    gradient = gradients([out], [logit_scale])[0]
    assert gradient[0] != 0 and not gradient[1:].any()
    top = torch.tensor([1.0, math.log(100), math.log(100)], dtype=torch.float64)
    assert torch.equal(window_attention(query, key, value, 2, 1, table, logit_scale=top), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_zero_vectors_make_no_nan(dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs((5, 6), 3)]
    with torch.no_grad():
        leaves[0][:, 0], leaves[1][:, :, 1] = 0, 0
        leaves[1][:, 2, 2] = torch.finfo(dtype).max / 4 if dtype == torch.float16 else 1e3
    logit_scale = torch.full((2, 1, 1), 2.0, requires_grad=True)
    query, key, value, table = leaves
    outputs = window_attention(query, key, value, 3, 1, table, logit_scale=logit_scale, return_lse=True)
    for x in [*outputs, *torch.autograd.grad(outputs[0].float().sum(), [*leaves, logit_scale])]:
        assert x.isfinite().all()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_errs_at_most_twice_as_much_as_plain_pytorch(dtype, version):
    *tensors, table = (x.detach() for x in inputs((9, 11), 4, head_dim=16, dtype=dtype))
    logit_scale = torch.tensor([2.3, 3.0]) if version == 2 else None
    ours = window_attention(*tensors, 4, 2, table, logit_scale=logit_scale)
    cast = None if logit_scale is None else logit_scale.to(dtype)
    plain = dense(*tensors, 4, 2, table, logit_scale=cast)[0]
    wide = None if logit_scale is None else logit_scale.double()
    exact = dense(*(x.double() for x in tensors), 4, 2, table.double(), logit_scale=wide)[0]
    at_most_twice_the_error("out", ours, plain, exact)


def test_grouped_heads_and_other_value_width():
    query = torch.randn(1, 5, 6, 4, 3, dtype=torch.float64)
    key, value = torch.randn(1, 5, 6, 2, 3, dtype=torch.float64), torch.randn(1, 5, 6, 2, 7, dtype=torch.float64)
    out = window_attention(query, key, value, 3, 1)
    close(out, dense(query, key.repeat_interleave(2, -2), value.repeat_interleave(2, -2), 3, 1)[0])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(query=torch.zeros(2, 4, 4)), ValueError, "query must have shape"),
        (dict(query=None), TypeError, "query must be a tensor"),
        (dict(key=torch.zeros(2, 4, 5, 2, 4)), ValueError, "key must have query's shape"),
        (dict(value=torch.zeros(2, 4, 4, 3, 4)), ValueError, "value must have key's shape"),
        (dict(window_size=(2, 2, 2)), ValueError, "window_size must be one int or 2"),
        (dict(window_size=0), ValueError, "window_size must be at least 1"),
        (dict(shift_size=2), ValueError, "shift_size must be between 0 and window_size - 1"),
        (dict(rpb=torch.zeros(8, 2)), ValueError, r"rpb must have shape \[9, 2\] .* or \[2, 3, 3\]"),
        (dict(rpb=torch.zeros(9, 2, dtype=torch.int64)), TypeError, "rpb must be a floating-point tensor"),
        (dict(convention="tf"), ValueError, "convention must be"),
        (dict(scale=float("nan")), ValueError, "scale must be a finite number"),
        (dict(scale=10**400), ValueError, "scale must be a finite number"),
        (dict(logit_scale=torch.zeros(3)), ValueError, r"logit_scale must have shape \[2\] or"),
        (dict(logit_scale=1.0), TypeError, "logit_scale must be a floating-point tensor"),
        (dict(logit_scale=torch.zeros(2), scale=1.0), ValueError, "exclude each other"),
        (dict(dense_bias=torch.zeros(2, 4, 5)), ValueError, r"dense_bias must have shape \[2, 4, 4\]"),
        (dict(dropout_p=2), ValueError, "dropout_p must be"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_wrong_arguments(changes, error, message):
    arguments = dict(query=torch.zeros(2, 4, 4, 2, 4), key=torch.zeros(2, 4, 4, 2, 4), value=torch.zeros(2, 4, 4, 2, 4))
    with pytest.raises(error, match=message):
        window_attention(**(arguments | dict(window_size=2) | changes))


@pytest.mark.parametrize("padding", ["cut", "pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize("spatial", [(8, 12), (9, 10), (3, 13)], ids=str)
def test_cropping_undoes_padding(spatial, padding):
    x = torch.randn(2, *spatial, 3)
    padded = pad_to_windows(x, (4, 5), (2, 3), padding)
    assert torch.equal(crop_from_windows(padded, spatial, (4, 5), (2, 3), padding), x)
    if padding != "cut":
        assert padded.shape[1] % 4 == 0 and padded.shape[2] % 5 == 0
        assert (padded == 0).all(-1).sum() == padded[..., 0].numel() - x[..., 0].numel()


def test_small_maps_are_not_shifted():
    assert fit_shift((4, 4), (2, 2), (4, 5)) == (0, 2)
    assert fit_shift((4, 4), (2, 2), (4, 5), "map") == (0, 0)
    assert fit_shift((4, 4), (2, 2), (6, 5), "map") == (2, 2)
    assert fit_shift((4, 4), (2, 2), (4, 5), "shift") == (2, 2)
    with pytest.raises(ValueError, match="small_maps must be one of"):
        fit_shift((4, 4), (2, 2), (4, 5), "none")
    attention = WindowAttention(8, 4, 2, shift_size=2)
    still = WindowAttention(8, 4, 2)
    still.load_state_dict(attention.state_dict())
    x = torch.randn(1, 3, 4, 8)
    assert torch.equal(attention(x), still(x))


def test_state_dict_keys():
    linear = {"qkv.weight", "proj.weight", "proj.bias"}
    assert set(WindowAttention(8, 4, 2).state_dict()) == linear | {"qkv.bias", "relative_position_bias_table"}
    mlp = {f"cpb_mlp.{key}" for key in ("0.weight", "0.bias", "2.weight")}
    assert set(WindowAttentionV2(8, 4, 2).state_dict()) == linear | mlp | {"logit_scale", "q_bias", "v_bias"}
    assert set(WindowAttentionV2(8, 4, 2, qkv_bias=False).state_dict()) == linear | mlp | {"logit_scale"}
    assert WindowAttention(8, (2, 3, 4), 2).relative_position_bias_table.shape == (3 * 5 * 7, 2)
    assert WindowAttention(8, 4, 2, position_bias="shared_table").relative_position_bias_table.shape == (49, 1)
    assert WindowAttention(8, 4, 2, position_bias="dense").position_bias.shape == (16, 16)
    assert set(WindowAttention(8, 4, 2, position_bias="none", qkv_bias=False).state_dict()) == linear


def test_initial_values():
    attention = WindowAttentionV2(64, 4, 2)
    assert torch.equal(attention.logit_scale, torch.full((2, 1, 1), math.log(10)))
    assert not attention.q_bias.any() and not attention.v_bias.any()
    table = WindowAttention(64, 12, 8).relative_position_bias_table
    assert abs(table.std() - 0.02) < 1e-3


def module_as_dense(attention: WindowAttention, x: Tensor, **scores) -> Tensor:
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    return attention.proj(dense(*qkv.unbind(-3), attention.window_size, attention.shift_size, **scores)[0].flatten(-2))


def test_module_variants():
    x = torch.randn(2, 7, 9, 8, dtype=torch.float64)
    shared = WindowAttention(8, (3, 4), 2, (1, 2), position_bias="shared_table", head_dim=6).double()
    close(shared(x), module_as_dense(shared, x, table=shared.relative_position_bias_table.expand(-1, 2)))
    cosine = WindowAttention(8, (3, 4), 2, (1, 2), tau=0.05).double()
    logit_scale = torch.full((2,), -math.log(0.05), dtype=torch.float64)
    close(cosine(x), module_as_dense(cosine, x, table=cosine.relative_position_bias_table, logit_scale=logit_scale))
    none = WindowAttention(8, (3, 4), 2, (1, 2), position_bias="none", qk_scale=0.7).double()
    close(none(x), module_as_dense(none, x, scale=0.7))
    pairs = WindowAttention(8, (3, 4), 2, (1, 2), position_bias="dense").double()
    tabled = WindowAttention(8, (3, 4), 2, (1, 2), position_bias="shared_table").double()
    tabled.load_state_dict(pairs.state_dict(), strict=False)
    with torch.no_grad():
        index = rpb.swin_index((3, 4))
        pairs.position_bias.copy_(tabled.relative_position_bias_table[index, 0])
    close(pairs(x), tabled(x))
    pairs(x).sum().backward()
    assert pairs.position_bias.grad.any()


def test_one_and_three_axes():
    line = WindowAttention(8, (4,), 2, (2,)).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    close(line(x), module_as_dense(line, x, table=line.relative_position_bias_table))
    for window, heads, spatial in (((2, 3, 2), 2, (4, 5, 3)), ((4,), 2, (11,)), ((2,), 3, (11,))):  # the last: a square table
        shift = tuple(w // 2 for w in window)
        attention = WindowAttentionV2(12, window, heads, shift).double()
        with torch.no_grad():
            attention.q_bias.normal_(), attention.v_bias.normal_()
        x = torch.randn(1, *spatial, 12, dtype=torch.float64)
        biases = torch.cat([attention.q_bias, torch.zeros(12), attention.v_bias])
        qkv = (attention.qkv(x) + biases).unflatten(-1, (3, heads, 12 // heads)).unbind(-3)
        table = attention.cpb_mlp().flatten(1).t()
        plain = dense(*qkv, window, shift, table, logit_scale=attention.logit_scale)[0]
        close(attention(x), attention.proj(plain.flatten(-2)))


def test_continuous_position_bias(golden):
    mlp = ContinuousPositionBias(2, 3)
    close(mlp.coords, golden["swinv2_log_spaced_coords_window2x2"][0], 1e-4)  # four decimals
    with torch.no_grad():
        mlp[2].weight.mul_(10)
    table = mlp()
    assert table.shape == (3, 3, 3) and (table > 0).all() and (table < 16).all()
    close(table[1, 0, 2], 16 * torch.sigmoid(mlp[2](torch.relu(mlp[0](mlp.coords[0, 2])))[1]), 1e-6)
    larger = ContinuousPositionBias((8, 12), 3, pretrained_window_size=(4, 8))
    close(larger.coords, rpb.log_spaced_coords((8, 12), (4, 8)))
    assert larger.coords[-1, 0, 0] > 1 and not larger.state_dict().keys() & {"coords"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=9), "dim must be a positive multiple"),
        (dict(attn_drop=2), "attn_drop"),
        (dict(padding="same"), "padding must be one of"),
        (dict(small_maps="same"), "small_maps must be one of"),
        (dict(position_bias="mlp"), "position_bias must be one of"),
        (dict(tau=0.0), "tau must be positive"),
        (dict(shift_size=4), "shift_size"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_wrong_module_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(**(dict(dim=8, window_size=4, num_heads=2) | arguments))


def test_wrong_module_input():
    with pytest.raises(ValueError, match=r"x must have shape \[B, 2 spatial axes, 8\]"):
        WindowAttention(8, 4, 2)(torch.zeros(2, 16, 8))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"qk_scale": 0.5, "tau": 0.1}, "qk_scale and tau exclude each other"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"head_dim": -1}, "head_dim must be at least 1, got -1"),
    ],
    ids=str,
)
def test_module_arguments_that_do_not_fit(arguments, match):
    with pytest.raises(ValueError, match=match):
        WindowAttention(8, 4, 2, **arguments)


@pytest.mark.parametrize("kind", [WindowAttention, WindowAttentionV2])
def test_official_buffers_are_passed_over(kind):
    attention, state = kind(8, 4, 2), kind(8, 4, 2).state_dict()
    official = state | {"relative_position_index": torch.zeros(16, 16), "relative_coords_table": torch.zeros(1, 7, 7, 2)}
    attention.load_state_dict(official)
    assert all(torch.equal(value, state[name]) for name, value in attention.state_dict().items())
    assert "relative_position_index" in official
    with pytest.raises(RuntimeError, match="Unexpected key"):
        attention.load_state_dict(state | {"relative_index": torch.zeros(1)})


def test_offsets_are_made_where_the_weights_come_to():
    trained = WindowAttentionV2(8, 4, 2)
    expected = trained.cpb_mlp.coords
    with torch.device("meta"):
        emptied, assigned, fresh = (WindowAttentionV2(8, 4, 2) for _ in range(3))
    emptied.to_empty(device=expected.device).load_state_dict(trained.state_dict())
    assigned.load_state_dict(trained.state_dict(), assign=True)
    fresh.to_empty(device=expected.device)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for attention in (emptied, assigned, fresh):
        assert torch.equal(attention.cpb_mlp.coords, expected)
    x = torch.randn(1, 8, 8, 8)
    assert torch.equal(emptied(x), trained(x)) and torch.equal(assigned(x), trained(x))


@pytest.mark.parametrize("kind", [WindowAttention, WindowAttentionV2])
def test_autocast(kind):
    attention = kind(32, 4, 2, shift_size=2)
    if kind is WindowAttention:
        torch.nn.init.normal_(attention.relative_position_bias_table)  # so that it matters
    x = torch.randn(2, 9, 11, 32)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    close(out.float(), attention(x), 0.05)
    out.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in attention.parameters())


@needs_compiled
@pytest.mark.not_emulated("the bound is for the CPU kernels' workspace")
@pytest.mark.not_on_cuda("counts the CPU's memory; test_cuda.py counts the GPU's")
@pytest.mark.parametrize("kind", [WindowAttention, WindowAttentionV2])
def test_training_holds_no_scores_masks_or_rolled_maps(kind):
    attention = kind(24, 12, 8, shift_size=6)
    x = torch.randn(1, 48, 48, 24, requires_grad=True)
    attention(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        attention(x).sum().backward()
    events = profiled.profiler.kineto_results.events()
    scores = 4 * 8 * 48 * 48 * 144
    assert max(event.nbytes() for event in events if event.name() == "[memory]") < scores / 8
    assert "aten::roll" not in {event.name() for event in events}


@pytest.mark.not_on_cuda("calls no kernel, and timm has its own mind about devices")
@pytest.mark.parametrize("old, new", [((7, 7), (12, 12)), ((7, 7), (5, 5)), ((4, 7), (6, 9)), ((3, 5), (2, 9))], ids=str)
def test_resizing_tables_as_timm_does(old, new):
    layers = pytest.importorskip("timm.layers", exc_type=ImportError)
    table, rows = torch.randn(math.prod(2 * w - 1 for w in old), 3), math.prod(2 * w - 1 for w in new)
    geometric = layers.resize_rel_pos_bias_table(table, new, (rows, 3), old_window_size=old)
    close(rpb.resize_swin(table, new, old, "geometric"), geometric, 1e-5)
    if old[0] == old[1]:
        simple = layers.resize_rel_pos_bias_table_simple(table, new, (rows, 3))
        close(rpb.resize_swin(table, new), simple, 1e-5)


@pytest.mark.parametrize("old, new", [((7, 7), (12, 12)), ((12, 12), (24, 24)), ((7, 7), (5, 5)), ((3, 5), (4, 9))], ids=str)
def test_cubic_geometric_resizing_is_the_bicubic_spline_over_that_grid(old, new):
    """As SimMIM's code resizes; the spline through a grid is SciPy's."""
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn(2, *(2 * w - 1 for w in old), dtype=torch.float64)
    ours = rpb.resize(table, new, "geometric_cubic")
    known, wanted = [], []
    for before, after in zip(old, new):
        low, high = 1.01, 1.5
        while high - low > 1e-6:
            ratio = (low + high) / 2
            low, high = (low, ratio) if (ratio ** (before - 1) - 1) / (ratio - 1) > after - 1 else (ratio, high)
        steps = torch.cumsum(ratio ** torch.arange(before - 1, dtype=torch.float64), 0)
        known.append(torch.cat([-steps.flip(0), torch.zeros(1), steps]).cpu().numpy())
        wanted.append(torch.arange(1 - after, after, dtype=torch.float64).cpu().numpy())
    for head, resized in zip(table, ours):
        spline = interpolate.RectBivariateSpline(*known, head.cpu().numpy(), s=0)
        close(resized, torch.tensor(spline(*wanted)), 1e-8)


def test_geometric_resizing_keeps_constants_centre_and_untouched_axes():
    table = torch.randn(2, 13, 9, dtype=torch.float64, requires_grad=True)
    larger = rpb.resize(table, (7, 8), "geometric")
    assert larger.shape == (2, 13, 15)
    close(larger[:, :, 7], table[:, :, 4])
    close(larger[:, :, 8], table[:, :, 5])
    close(rpb.resize(torch.ones(1, 13, 13), 12, "geometric"), torch.ones(1, 23, 23), 1e-6)
    assert torch.autograd.gradcheck(lambda t: rpb.resize(t, (3, 6), "geometric"), table)
    with pytest.raises(ValueError, match="align_corners"):
        rpb.resize(table, 9, "geometric", align_corners=True)
    larger = rpb.resize(table, (7, 8), "geometric_cubic")
    close(larger[:, :, 7:9], table[:, :, 4:6])
    close(rpb.resize(torch.ones(1, 13, 13), 12, "geometric_cubic"), torch.ones(1, 23, 23), 1e-6)
    with pytest.raises(ValueError, match="at least 5 entries per axis"):
        rpb.resize(torch.ones(1, 3, 3), 3, "geometric_cubic")


@pytest.mark.parametrize("packed", [False, True], ids=["slices", "packed"])
@pytest.mark.parametrize("shift", [0, 2, 5, 500], ids=str)
def test_a_window_far_beyond_the_map_costs_no_more_than_the_map(shift, packed):
    """64 M entries and 1 M scores per query otherwise; the gradient of what no pair uses is zero."""
    qkv = torch.randn(1, 5, 3, 3, 2, 4, dtype=torch.float64)
    table = torch.randn(2, 2047, 9, dtype=torch.float64, requires_grad=True)
    small = table.detach()[:, 1024 - 8 : 1024 + 7].clone().requires_grad_()
    results = []
    for size, shifted, bias in ((1024, shift, table), (8, shift if shift < 5 else 0, small)):
        pattern = ((size, 5), (shifted, 0), bias)
        if packed:
            out = window_attention_qkvpacked(qkv, *pattern, convention="nat")
        else:
            out = window_attention(*qkv.unbind(-3), *pattern, convention="nat")
        results.append((out, *torch.autograd.grad(out.square().sum(), bias)))
    (ours, gradient), (expected, expected_gradient) = results
    close(ours, expected)
    close(gradient[:, 1024 - 8 : 1024 + 7], expected_gradient)
    assert gradient.count_nonzero() == expected_gradient.count_nonzero()


def test_a_window_beyond_all_memory_is_refused():
    x = torch.zeros(1, 4, 4, 1, 2)
    with pytest.raises(ValueError, match="window_size must span at most 2147483648 positions"):
        window_attention(x, x, x, window_size=10**6)

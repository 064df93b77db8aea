"""The public functions of relative position encodings: transforms, memory, autocast, and what they say on bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import natrpb
from natrpb import functional, get_rpe_config, iRPEAttention

from .support import close, needs_compiled

B, N, H, D, C = 2, 6, 2, 4, 49
NAMES = ("query", "key", "value", "key_table", "query_table", "bias_table", "value_table")


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = [(B, N, H, D), (B, N, H, D), (B, N, H, 3), (1, D, C), (H, D, C), (1, C), (H, C, 3)]
    return {name: torch.randn(shape, dtype=dtype) for name, shape in zip(NAMES, shapes)}


def attend(*given: Tensor, **options):
    index = natrpb.irpe.bucket_ids("product", 2, 3, device=given[0].device)
    maps = {name: index for name in ("key_index", "query_index", "bias_index", "value_index")}
    return natrpb.irpe_attention(**dict(zip(NAMES, given)), **maps, **options)


def both(*given: Tensor):
    return attend(*given, return_lse=True)


def unfused(*given: Tensor):
    return attend(*given, return_lse=True, return_weights=True)[:2]


@pytest.fixture
def leaves() -> list[Tensor]:
    return [x.requires_grad_() for x in tensors().values()]


@pytest.mark.not_emulated("takes long; test_irpe_ops.py has first derivatives, second ones come from rpe_index")
def test_gradients_to_second_order(leaves):
    assert torch.autograd.gradcheck(both, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(both, leaves, fast_mode=True)


def test_gradients_of_each_result_alone(leaves):
    for i in range(2):
        ours = torch.autograd.grad(both(*leaves)[i].square().sum(), leaves, allow_unused=True, materialize_grads=True)
        plain = torch.autograd.grad(unfused(*leaves)[i].square().sum(), leaves, allow_unused=True, materialize_grads=True)
        for gradient, wanted in zip(ours, plain):
            close(gradient, wanted)


def test_gradients_of_some_inputs(leaves):
    expected = torch.autograd.grad(attend(*leaves).sum(), leaves)
    for i, wanted in enumerate(expected):
        given = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        close(torch.autograd.grad(attend(*given).sum(), given[i])[0], wanted)


def test_functional_transforms(leaves):
    given = [x.detach() for x in leaves]
    expected = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    found = torch.func.grad(lambda *x: attend(*x).square().sum(), tuple(range(7)))(*given)
    for gradient, wanted in zip(found, expected):
        close(gradient, wanted)
    directions = [torch.randn_like(x) for x in given]
    _, forward = torch.func.jvp(attend, tuple(given), tuple(directions))
    _, slow = torch.func.jvp(lambda *x: unfused(*x)[0], tuple(given), tuple(directions))
    close(forward, slow)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, directions)]
        close(forward_ad.unpack_dual(attend(*duals)).tangent, slow)


def test_batched_gradients(leaves):
    dout = torch.randn(3, B, N, H, 3, dtype=torch.float64)
    out = attend(*leaves)
    together = torch.autograd.grad(out, leaves, dout, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for batched, alone in zip(together, torch.autograd.grad(out, leaves, dout[i], retain_graph=True)):
            close(batched[i], alone)


def test_vmap():
    given = [torch.stack([x, x.flip(0), 2 * x]) for x in tensors().values()]
    out = torch.vmap(attend)(*given)
    for i in range(3):
        close(out[i], attend(*(x[i] for x in given)))


def test_checkpointing(leaves):
    expected = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    out = checkpoint(attend, *leaves, use_reentrant=False)
    for gradient, wanted in zip(torch.autograd.grad(out.square().sum(), leaves), expected):
        close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_in_another_dtype(dtype):
    given = tensors()
    out = attend(*(x.to(dtype) if name in NAMES[:3] else x for name, x in given.items()))
    assert out.dtype == dtype
    exact = attend(*given.values())
    close(out.double() / exact.abs().max(), exact / exact.abs().max(), 4 * torch.finfo(dtype).eps)


def test_autocast_casts_what_it_multiplies():
    given = [x.requires_grad_() for x in tensors(torch.float32).values()]
    with torch.autocast(given[0].device.type, dtype=torch.bfloat16):
        out, lse = both(*given)
        double = attend(*(x.double() for x in given))
    assert (out.dtype, lse.dtype, double.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    close(out.double(), double, 0.15)
    gradients = torch.autograd.grad(out.float().sum(), given)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def pairs(*given: Tensor) -> tuple[Tensor, Tensor]:
    """scores [B, h, N, N] and value encodings [h, N, N, Dv] of the arguments of `attend`, written out in fp64."""
    query, key, _, key_table, query_table, bias_table, value_table = (x.double() for x in given)
    index = natrpb.irpe.bucket_ids("product", 2, 3, device=query.device).long()
    key_vectors, query_vectors = (table.expand(H, -1, -1)[..., index] for table in (key_table, query_table))  # [h, D, N, N]
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    scores = scores + torch.einsum("bihd,hdij->bhij", query, key_vectors)
    scores = scores + torch.einsum("bjhd,hdij->bhij", key, query_vectors)
    return D**-0.5 * scores + bias_table[:, index], value_table.expand(H, -1, -1)[:, index]


def dense(*given: Tensor, added: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and weights in fp64."""
    scores, vectors = pairs(*given)
    scores = scores + added
    weights = scores.softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, given[2].double()) + torch.einsum("bhij,hijd->bihd", weights, vectors)
    return out, scores.logsumexp(-1).transpose(1, 2), weights


@pytest.mark.parametrize("shape", [(N, N), (B, H, N, N), (1, H, N, N), (B, 1, N, N)], ids=str)
def test_masks_on_pairs(leaves, shape):
    """Numbers are added to the scores, -inf excludes as True does; the mask has a gradient."""
    numbers = torch.randn(shape, dtype=torch.float64)
    numbers[..., 1:3].masked_fill_(torch.rand(*shape[:-1], 2) < 0.5, -torch.inf)
    numbers.requires_grad_()
    found = attend(*leaves, attn_mask=numbers, return_lse=True, return_weights=True)
    expected = dense(*leaves, added=numbers)
    given = [torch.randn_like(x) for x in expected]
    for ours, wanted in zip(found, expected):
        close(ours, wanted)
    inputs = [*leaves, numbers]
    for ours, wanted in zip(torch.autograd.grad(found, inputs, given), torch.autograd.grad(expected, inputs, given)):
        close(ours, wanted)
    infinite = torch.zeros_like(numbers).masked_fill(numbers.isinf(), -torch.inf)
    out = attend(*leaves, attn_mask=infinite.float())
    close(attend(*leaves, attn_mask=numbers.isinf()), out)
    close(out, dense(*leaves, added=infinite)[0])


class TestUnfused:
    """Weights and dropout need scores for every pair: they may exceed what fp16 holds, and bf16 has 8 bits."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("autocast", [False, True])
    def test_scores_are_not_rounded(self, dtype, autocast):
        given = [x.to(dtype) for x in tensors().values()]
        given[0][..., 0], given[1][..., 0] = 32, 16  # scores of about 256, where bf16 has steps of 2
        exact = dense(*given)
        arguments = [x.float() for x in given] if autocast else given
        with torch.autocast(given[0].device.type, dtype=dtype, enabled=autocast and dtype != torch.float32):
            out, lse, weights = attend(*arguments, return_lse=True, return_weights=True)
        assert (out.dtype, lse.dtype, weights.dtype) == (dtype, torch.float32, dtype)
        tolerance = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
        for ours, wanted in zip((out, lse, weights), exact):
            close(ours.double(), wanted, tolerance)

    @pytest.mark.parametrize("options", [{"return_weights": True}, {"dropout_p": 1e-12}], ids=["weights", "dropout"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_scores_beyond_fp16(self, options, autocast):
        given = [x.half() for x in tensors().values()]
        given[0], given[1] = 300 * given[0], 300 * given[1]
        assert pairs(*given)[0].abs().max() > torch.finfo(torch.float16).max
        leaves = [(x.float() if autocast else x).requires_grad_() for x in given]
        with torch.autocast(given[0].device.type, dtype=torch.float16, enabled=autocast):
            out, lse, *_ = attend(*leaves, return_lse=True, **options)
        exact, exact_lse, _ = dense(*given)
        close(out.double(), exact, 0.01)
        close(lse.double(), exact_lse, 1e-5)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_unfused_attention_exports_for_any_length(strict):
    class Weights(nn.Module):
        def forward(self, query, table, index):
            return natrpb.irpe_attention(query, query, query, bias_table=table, bias_index=index, return_weights=True)

    def inputs(length: int):
        query, table = torch.randn(B, length, H, D, dtype=torch.float64), torch.randn(1, C, dtype=torch.float64)
        return query, table, torch.randint(C, (length, length))

    length = torch.export.Dim("length", min=2, max=1000)
    shapes = {1: length}, None, {0: length, 1: length}
    program = torch.export.export(Weights(), inputs(6), dynamic_shapes=shapes, strict=strict)
    other = inputs(9)
    for found, expected in zip(program.module()(*other), Weights()(*other)):
        close(found, expected)


def test_keys_of_another_length():
    """Nq and Nk may differ: the last queries of a sequence see all its keys."""
    given = list(tensors().values())
    index = natrpb.irpe.bucket_ids("product", 2, 3, device=given[0].device)
    maps = [index, index.t(), index, index]
    interleaved = [item for pair in zip(given[3:], maps) for item in pair]
    full = natrpb.irpe_attention(*given[:3], *interleaved)
    interleaved = [item for pair in zip(given[3:], (x[4:] for x in maps)) for item in pair]
    close(natrpb.irpe_attention(given[0][:, 4:], *given[1:3], *interleaved), full[:, 4:])


def test_without_any_encoding_it_is_plain_attention():
    query, key, value = torch.randn(3, B, N, H, D, dtype=torch.float64)
    expected = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=0.3)
    close(natrpb.irpe_attention(query, key, value, scale=0.3), expected.transpose(1, 2))


def test_empty_batch():
    given = tensors()
    sequences = [given[name][:0].requires_grad_() for name in NAMES[:3]]
    tables = [given[name].requires_grad_() for name in NAMES[3:]]
    out = attend(*sequences, *tables)
    assert out.shape == (0, N, H, 3)
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), tables))


class SDPAttention(iRPEAttention):
    """The same module on torch's own attention, without encodings."""

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def kept_for_backward(module: nn.Module, x: Tensor) -> int:
    """Bytes of all memory that autograd holds after a forward pass, without the parameters'."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    for parameter in module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@needs_compiled
@pytest.mark.not_emulated("takes a minute, and autograd keeps the same on every device")
@pytest.mark.parametrize("on, share", [("k", 1.04), ("qk", 1.04), ("qkv", 1.19)])
def test_attention_keeps_little_more_than_without_encodings(on, share):
    """DeiT-S: per token 5 * 384 numbers without encodings, and 6 * 50 binned weights for those on values."""
    x = torch.randn(8, 197, 384, requires_grad=True)
    plain = kept_for_backward(SDPAttention(384, 6), x)
    encoded = iRPEAttention(384, 6, rpe_config=get_rpe_config(skip=1, rpe_on=on))
    assert kept_for_backward(encoded, x) <= share * plain


@needs_compiled
@pytest.mark.not_emulated("takes a minute")
@pytest.mark.not_on_cuda("counts the CPU's memory; test_cuda.py counts the GPU's")
def test_training_allocates_nothing_of_the_size_of_the_weights():
    from .test_memory import largest_allocation

    module = iRPEAttention(32, 4, rpe_config=get_rpe_config(skip=0, rpe_on="qkv"))
    x = torch.randn(2, 20 * 22, 32)

    def train():
        module(x, 20, 22).square().mean().backward()

    train()
    assert largest_allocation(train) < 4 * 2 * 4 * 440**2


INDEX = torch.zeros(N, N, dtype=torch.int32)
QUERY = torch.zeros(B, N, H, D)
BAD = {
    "query-rank": ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, Nq, h, D\]"),
    "query-type": ({"query": QUERY.int()}, TypeError, "query must be float64"),
    "key-batch": ({"key": QUERY[:1]}, ValueError, "key must have query's shape but for Nk"),
    "key-dtype": ({"key": QUERY.double()}, TypeError, "key must have query's dtype"),
    "value-length": ({"value": QUERY[:, 1:]}, ValueError, "value must have key's shape"),
    "no-channels": ({"value": QUERY[..., :0]}, ValueError, r"head_dim\) must hold at least 1"),
    "table-alone": ({"key_table": torch.zeros(1, D, C)}, ValueError, "key_table and key_index must be given together"),
    "index-alone": ({"value_index": INDEX}, ValueError, "value_table and value_index must be given together"),
    "table-shape": (
        {"key_table": torch.zeros(1, C, D), "key_index": INDEX},
        ValueError,
        r"key_table must have shape \[2 or 1, 4, C\]",
    ),
    "table-heads": ({"query_table": torch.zeros(3, D, C), "query_index": INDEX}, ValueError, r"must have shape \[2 or 1"),
    "bias-rank": ({"bias_table": torch.zeros(C), "bias_index": INDEX}, ValueError, r"bias_table must have shape \[2 or 1, C\]"),
    "value-table": (
        {"value_table": torch.zeros(1, D, C), "value_index": INDEX},
        ValueError,
        r"value_table must have shape \[2 or 1, C, 4\]",
    ),
    "table-type": ({"bias_table": torch.zeros(1, C).int(), "bias_index": INDEX}, TypeError, "bias_table must be a floating"),
    "table-device": (
        {"bias_table": torch.zeros(1, C, device="meta"), "bias_index": INDEX},
        ValueError,
        "bias_table must be on query's device",
    ),
    "index-type": ({"bias_table": torch.zeros(1, C), "bias_index": INDEX.float()}, TypeError, "bias_index must be an int32"),
    "index-shape": ({"bias_table": torch.zeros(1, C), "bias_index": INDEX[1:]}, ValueError, "bias_index must have shape"),
    "no-terms": ({"bias_table": torch.zeros(1, C), "bias_index": INDEX.expand(0, N, N)}, ValueError, "bias_index must have"),
    "padding-shape": ({"key_padding_mask": torch.zeros(N, B).bool()}, ValueError, r"key_padding_mask must have shape \[2, 6\]"),
    "mask-type": (
        {"attn_mask": torch.zeros(N, N).int()},
        TypeError,
        "attn_mask must be a bool or floating-point tensor or None",
    ),
    "mask-shape": (
        {"attn_mask": torch.zeros(N, B).bool()},
        ValueError,
        r"attn_mask must have shape \[6, 6\] or \[2 or 1, 2 or 1, 6, 6\], got \[6, 2\]",
    ),
    "mask-rank": ({"attn_mask": torch.zeros(B, N, N)}, ValueError, r"attn_mask must have shape .*, got \[2, 6, 6\]"),
    "mask-heads": ({"attn_mask": torch.zeros(B, 3, N, N)}, ValueError, r"attn_mask must have shape .*, got \[2, 3, 6, 6\]"),
    "mask-device": ({"attn_mask": torch.zeros(N, N, device="meta").bool()}, ValueError, "attn_mask must be on query's device"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p must be a number between 0 and 1"),
}


@pytest.mark.not_emulated("calls no kernel")
@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_arguments_of_the_attention_are_named(change, error, message):
    with pytest.raises(error, match=message):
        natrpb.irpe_attention(**({"query": QUERY, "key": QUERY, "value": QUERY} | change))


@pytest.mark.not_emulated("calls no kernel")
@pytest.mark.parametrize(
    "x, index, error, message",
    [
        (QUERY[0], INDEX, ValueError, r"x must have shape \[B, h, Nq, C\]"),
        (QUERY.int(), INDEX, TypeError, "x must be float64"),
        (QUERY, INDEX.float(), TypeError, "index must be an int32 or int64 tensor"),
        (QUERY, INDEX, ValueError, r"index must have shape \[2, Nk\]"),
        (QUERY, INDEX[:2].to("meta"), ValueError, "index must be on x's device"),
    ],
)
def test_bad_arguments_of_the_lookup_are_named(x, index, error, message):
    with pytest.raises(error, match=message):
        functional.rpe_index(x, index)


@needs_compiled
@pytest.mark.not_emulated("CUDA kernels answer with NaN; test_irpe_ops_torch.py has them")
@pytest.mark.not_on_cuda("CUDA kernels answer with NaN; test_irpe_ops_torch.py has them")
@pytest.mark.parametrize("wrong", [-1, C])
def test_entries_outside_of_the_table_are_refused(wrong):
    index = INDEX.clone()
    index[2, 3] = wrong
    with pytest.raises(RuntimeError, match=f"key_index must hold numbers from 0 to {C - 1}, got {wrong}"):
        natrpb.irpe_attention(QUERY, QUERY, QUERY, torch.zeros(1, D, C), index)
    with pytest.raises(RuntimeError, match=f"index must hold numbers from 0 to {C - 1}, got {wrong}"):
        natrpb.rpe_index(torch.zeros(1, 1, N, C), index)

"""The ops inside PyTorch's machinery: opcheck, torch.compile, export, vmap, torch.func, forward mode, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad

import natrpb
from natrpb import ops, reference

from .cases import SMALL, Case
from .support import close, dtype_id, needs_compiled

FEATURES = {
    "plain": {},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "causal": {"is_causal": (True, False)},
    "even": {"kernel_size": (4, 2)},
}


def schema_calls(case: Case, dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments of every op of the library for one case, requiring grad where the op can give one."""
    query, key, value, rpb, pattern, scale = case.inputs(dtype, requires_grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rpb = None if rpb is None else rpb.detach().to(wide).requires_grad_()
    out, lse = reference.local_attention(query, key, value, rpb, pattern, scale)
    dout, dlse = (torch.randn_like(x).requires_grad_() for x in (out, lse))
    first = [x.detach().movedim(-2, 1).contiguous().requires_grad_() for x in (query, key, value)]
    attn = torch.randn(*first[0].shape[:-1], pattern.num_slots).to(dtype).requires_grad_()
    lists = [list(numbers) for numbers in pattern]
    results = (out.detach(), lse.detach())
    return {
        "local_attention_forward": (query, key, value, rpb, *lists, scale),
        "local_attention_backward": (dout, dlse, query, key, value, rpb, *results, *lists, scale, rpb is not None),
        "local_qk": (*first[:2], rpb, *lists, 0.0),
        "local_av": (attn, first[2], *lists),
        "local_av_transposed": (attn, first[0], *lists),
        "local_bias_grad": (attn, *lists),
    }


OPS = ["local_attention_forward", "local_attention_backward", "local_qk", "local_av", "local_av_transposed"]


@needs_compiled
@pytest.mark.parametrize("name", [*OPS, "local_bias_grad"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case, name):
    torch.library.opcheck(getattr(torch.ops.natrpb, name).default, schema_calls(case, torch.float64)[name])


@needs_compiled
def test_opcheck_of_the_backward_beside_a_table_that_does_not_learn():
    *args, _ = schema_calls(SMALL[0], torch.float64)["local_attention_backward"]
    torch.library.opcheck(torch.ops.natrpb.local_attention_backward.default, (*args, False))


@needs_compiled
@pytest.mark.parametrize("name", [*OPS, "local_bias_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_opcheck_of_schema_and_fake_in_every_dtype(dtype, name):
    torch.library.opcheck(
        getattr(torch.ops.natrpb, name).default,
        schema_calls(SMALL[3], dtype)[name],
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_compiled
@pytest.mark.parametrize("layout", ["heads-first", "fused-qkv"])
def test_fakes_have_the_strides_of_the_results(layout):
    """A fake that promises other strides than the kernel returns breaks compiled programs silently."""
    from .layouts import LAYOUTS

    inputs = LAYOUTS[layout](Case((7, 9), (3, 4), batch=2).inputs())
    fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs[:4]]
    results = ops.local_attention(*inputs)
    for real, fake in zip(results, ops.local_attention(*fakes, *inputs[4:])):
        assert real.shape == fake.shape and real.dtype == fake.dtype and real.stride() == fake.stride()


def model(query, key, value, rpb):
    """A call with work around it, so that the graph holds more than the op."""
    out, lse = natrpb.na2d(query * 2, key + 1, value, 3, dilation=(1, 2), rpb=rpb, return_lse=True)
    return out.relu().sum() + lse.sin().sum()


def value_and_grads(function, inputs) -> list[torch.Tensor]:
    leaves = inputs.cast(inputs.query.dtype).tensors()
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_model_trains_in_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for spatial, batch in (((7, 9), 2), ((8, 11), 3)):
        inputs = Case(spatial, 3, batch=batch).inputs(requires_grad=True)
        for ours, eager in zip(value_and_grads(compiled, inputs), value_and_grads(model, inputs)):
            close(ours, eager)


MODULES = {
    "neighborhood": lambda: natrpb.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True),
    "window": lambda: natrpb.WindowAttention(16, 4, 2, shift_size=2),
    "window-v2": lambda: natrpb.WindowAttentionV2(16, 4, 2),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_modules_train_in_one_graph_of_any_size(name):
    torch._dynamo.reset()
    module = MODULES[name]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 9, 11, 16), (2, 8, 13, 16)):
        x = torch.randn(shape)
        results = []
        for function in (compiled, module):
            out = function(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()), allow_unused=True)])
        for ours, eager in zip(*results):
            close(ours, eager, 1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_learn_can_be_traced(name):
    module, x = MODULES[name](), torch.randn(1, 8, 8, 16)
    traced = torch.jit.trace(module, x)
    assert "natrpb::local_attention" in str(traced.inlined_graph)
    close(traced(x), module(x), 0.0)


def test_a_compiled_scale_may_change():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, scale: natrpb.na2d(x, x, x, 3, scale=scale), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 6, 7, 2, 8)
    for scale in (0.3, 0.7, 0.9):
        close(compiled(x, scale), natrpb.na2d(x, x, x, 3, scale=scale), 1e-6)


def test_dynamic_shapes_compile_once():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    # NB: sizes that are equal in the first call are taken to be equal always, so all of them differ here.
    for spatial, batch in (((7, 9), 3), ((9, 11), 4), ((12, 10), 5)):
        inputs = Case(spatial, 3, batch=batch).inputs()
        close(compiled(*inputs[:4]), model(*inputs[:4]))
    assert len(graphs) == 1


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_compiled_call_equals_eager(features):
    torch._dynamo.reset()
    arguments = {"kernel_size": 3} | features
    inputs = Case((9, 8), **arguments).inputs(requires_grad=True)

    def call(query, key, value, rpb):
        return natrpb.na2d(query, key, value, rpb=rpb, **arguments).sin().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(value_and_grads(compiled, inputs), value_and_grads(call, inputs)):
        close(ours, eager)


def test_compiled_unfused_ops_equal_eager():
    torch._dynamo.reset()

    def call(query, key, value, rpb):
        weights = natrpb.na2d_qk(query, key, 3, is_causal=(True, False), rpb=rpb).softmax(-1)
        return natrpb.na2d_av(weights, value, 3, is_causal=(True, False)).sin().sum()

    inputs = Case((6, 7), 3).inputs(requires_grad=True)
    first = inputs._replace(**{n: getattr(inputs, n).detach().movedim(-2, 1) for n in ("query", "key", "value")})
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x in first.tensors():
        x.requires_grad_()
    for ours, eager in zip(value_and_grads(compiled, first), value_and_grads(call, first)):
        close(ours, eager)


class Attention(torch.nn.Module):
    """A module around one call, for export."""

    def __init__(self):
        super().__init__()
        self.rpb = torch.nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, query, key, value):
        return natrpb.na2d(query, key, value, 3, rpb=self.rpb)


def test_export_with_dynamic_batch_and_size():
    module = Attention()
    inputs = Case((6, 7), 3, batch=2).inputs(torch.float32)[:3]
    sizes = {
        0: torch.export.Dim("batch", min=1),
        1: torch.export.Dim("height", min=3),
        2: torch.export.Dim("width", min=3),
    }
    program = torch.export.export(module, inputs, dynamic_shapes=(sizes,) * 3)
    other = Case((9, 5), 3, batch=4).inputs(torch.float32)[:3]
    for example in (inputs, other):
        close(program.module()(*example), module(*example), 1e-6)


@needs_compiled
def test_exported_graph_holds_the_fused_op():
    inputs = Case((6, 7), 3, batch=2).inputs(torch.float32)[:3]
    graph = torch.export.export(Attention(), inputs).graph
    targets = [node.target for node in graph.nodes]
    assert torch.ops.natrpb.local_attention_forward.default in targets


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, 0, 0, None), (None, 1, 2, 0), (3, None, None, None)], ids=str)
@pytest.mark.parametrize("case", [Case((6, 7), (3, 4), batch=2, value_dim=5), Case((9,), 3, is_causal=True)], ids=str)
def test_vmap_equals_a_loop(case, in_dims):
    inputs = case.inputs()
    stacked = []
    for x, dim in zip(inputs[:4], in_dims):
        stacked.append(x if dim is None else torch.stack([x, x.flip(-1), x * 0.5], dim=dim))

    def call(query, key, value, rpb):
        return ops.local_attention(query, key, value, rpb, inputs.pattern, inputs.scale)

    mapped = torch.vmap(call, in_dims)(*stacked)
    for i in range(3):
        alone = [x if dim is None else x.select(dim, i) for x, dim in zip(stacked, in_dims)]
        for ours, expected in zip(mapped, call(*alone)):
            close(ours[i], expected)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_func_transforms_equal_autograd(case):
    inputs = case.inputs(requires_grad=True)
    tensors = tuple(x.detach() for x in inputs.tensors())
    positions = tuple(range(len(tensors)))

    def loss(*x):
        rpb = x[3] if case.rpb else None
        out, lse = ops.local_attention(*x[:3], rpb, inputs.pattern, inputs.scale)
        return out.sin().sum() + lse.cos().sum()

    expected = torch.autograd.grad(loss(*inputs.tensors()), inputs.tensors())
    for ours, exact in zip(torch.func.grad(loss, positions)(*tensors), expected):
        close(ours, exact)
    tangents = tuple(torch.randn_like(x) for x in tensors)
    directional = sum((t * g).sum() for t, g in zip(tangents, expected))
    close(torch.func.jvp(loss, tensors, tangents)[1], directional)


def test_gradients_per_sample():
    inputs = Case((6, 5), 3, batch=4).inputs()

    def loss(rpb, query, key, value):
        return natrpb.na2d(query[None], key[None], value[None], 3, rpb=rpb).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0, 0))(inputs.rpb, *inputs[:3])
    for i in range(4):
        alone = torch.func.grad(loss)(inputs.rpb, *(x[i] for x in inputs[:3]))
        close(per_sample[i], alone)


NESTED = {
    "reverse-reverse": lambda loss, x, t: torch.func.grad(lambda y: (torch.func.grad(loss)(y) * t).sum())(x),
    "forward-reverse": lambda loss, x, t: torch.func.jvp(torch.func.grad(loss), (x,), (t,))[1],
    "forward-forward": lambda loss, x, t: torch.func.jvp(lambda y: torch.func.jvp(loss, (y,), (t,))[1], (x,), (t,))[1],
    "reverse-forward": lambda loss, x, t: torch.func.grad(lambda y: torch.func.jvp(loss, (y,), (t,))[1])(x),
}


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("argument", range(4), ids=("query", "key", "value", "rpb"))
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[5]], ids=str)
def test_nested_func_transforms_equal_the_reference(case, argument, nested):
    inputs = case.inputs()
    tangent = torch.randn_like(inputs[argument])
    results = []
    for op in (ops.local_attention, reference.local_attention):

        def loss(x, op=op):
            out, lse = op(*inputs[:argument], x, *inputs[argument + 1 :])
            return out.sin().sum() + lse.sin().sum()

        results.append(nested(loss, inputs[argument], tangent))
    close(*results)


def test_hessian_of_the_table_is_symmetric():
    inputs = Case((4, 3), 3, heads=1, head_dim=2).inputs()

    def loss(rpb):
        return natrpb.na2d(*inputs[:3], 3, rpb=rpb).sin().sum()

    hessian = torch.func.hessian(loss)(inputs.rpb).reshape(25, 25)
    close(hessian, hessian.mT)
    close(hessian, torch.autograd.functional.hessian(loss, inputs.rpb).reshape(25, 25))
    assert hessian.abs().max() > 1e-3


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_mode_equals_the_reference(case):
    inputs = case.inputs()
    tangents = [torch.randn_like(x) for x in inputs.tensors()]
    results = []
    for op in (ops.local_attention, reference.local_attention):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs.tensors(), tangents)]
            results.append(
                [forward_ad.unpack_dual(y).tangent for y in op(*duals[:3], duals[3] if case.rpb else None, *inputs[4:])]
            )
    for ours, exact in zip(*results):
        close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_equals_casting_by_hand(dtype):
    inputs = Case((6, 7), 3).inputs(torch.float32, requires_grad=True)
    by_hand = inputs.cast(torch.float32)
    with torch.autocast(inputs.query.device.type, dtype):
        out, lse = natrpb.na2d(*inputs[:3], 3, rpb=inputs.rpb, return_lse=True)
    cast = [x.to(dtype) for x in by_hand[:3]]
    expected, expected_lse = natrpb.na2d(*cast, 3, rpb=by_hand.rpb, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, expected, 0.0)
    close(lse, expected_lse, 0.0)
    (out.float().sum() + lse.sum()).backward()
    (expected.float().sum() + expected_lse.sum()).backward()
    for ours, other in zip(inputs.tensors(), by_hand.tensors()):
        assert ours.grad.dtype == torch.float32
        close(ours.grad, other.grad, 0.0)


def test_autocast_joins_mixed_dtypes():
    query, key, value, rpb, *_ = Case((6, 7), 3).inputs(torch.float32)
    with torch.autocast(query.device.type, torch.bfloat16):
        out = natrpb.na2d(query.bfloat16(), key, value.half(), 3, rpb=rpb)
    assert out.dtype == torch.bfloat16


def test_autocast_of_the_unfused_ops():
    inputs = Case((6, 7), 3).inputs(torch.float32)
    query, key, value = (x.movedim(-2, 1) for x in inputs[:3])
    with torch.autocast(query.device.type, torch.bfloat16):
        scores = natrpb.na2d_qk(query, key, 3, rpb=inputs.rpb)
        out = natrpb.na2d_av(scores.softmax(-1), value, 3)
    assert scores.dtype == out.dtype == torch.bfloat16
    close(scores, natrpb.na2d_qk(query.bfloat16(), key.bfloat16(), 3, rpb=inputs.rpb), 0.0)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-12], ids=["fused", "unfused"])
def test_autocast_of_additional_keys_equals_casting_by_hand(dropout_p):
    query, key, value, rpb, *_ = Case((6, 7), 3).inputs(torch.float32)
    tokens = 3 * torch.randn(2, 1, 4, 2, 8)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = tokens.to(dtype)
        with torch.autocast(query.device.type, torch.bfloat16, enabled=dtype == torch.float32):
            results.append(
                natrpb.na2d(
                    *(x.to(dtype) for x in (query, key, value)), 3, rpb=rpb, return_lse=True,
                    additional_keys=keys, additional_values=values, dropout_p=dropout_p,
                )
            )  # fmt: skip
    (out, lse), (expected, expected_lse) = results
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    close(out, expected, 0.0)
    close(lse, expected_lse, 0.0)


def test_autocast_leaves_float64_alone():
    inputs = Case((6, 7), 3).inputs()
    with torch.autocast(inputs.query.device.type, torch.bfloat16):
        out = natrpb.na2d(*inputs[:3], 3, rpb=inputs.rpb)
    assert out.dtype == torch.float64
    close(out, natrpb.na2d(*inputs[:3], 3, rpb=inputs.rpb), 0.0)


def test_checkpointing_recomputes_the_same():
    inputs = Case((6, 7), 3).inputs(requires_grad=True)
    plain = value_and_grads(model, inputs)
    recomputed = value_and_grads(lambda *x: torch.utils.checkpoint.checkpoint(model, *x, use_reentrant=False), inputs)
    for ours, expected in zip(recomputed, plain):
        close(ours, expected, 0.0)

"""Query, key and value in one tensor [B, *, 3, h, D]: the results of its slices, the gradient in one piece."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import natrpb
from natrpb import _ext, ops, reference

from .cases import CASES, SMALL, Case
from .support import CASES_BY_DTYPE, DTYPES, at_most_twice_the_error, close, dtype_id, needs_compiled

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SQUARE = [case for case in SMALL if case.value_dim is None]
TINY = [
    Case((5,), 3, heads=1, head_dim=2),
    Case((5,), 2, dilation=2, is_causal=True, heads=2, head_dim=1),
    Case((3, 4), (2, 3), stride=(2, 1), heads=1, head_dim=2),
    Case((4, 3), 2, shift=1, heads=1, head_dim=2),
    Case((3, 3), 3, heads=1, head_dim=2, rpb=False),
]


def packed(case: Case, dtype: torch.dtype = torch.float64, requires_grad: bool = True):
    """qkv [B, *, 3, h, D] and the table or None, as leaves; the pattern and the scale."""
    query, key, value, rpb, pattern, scale = case.inputs(dtype)
    qkv = torch.stack([query, key, value], -3)
    return (
        *(None if x is None else x.detach().requires_grad_(requires_grad) for x in (qkv, rpb)),
        pattern,
        scale,
    )


def leaves(inputs) -> list[torch.Tensor]:
    return [x for x in inputs[:2] if x is not None]


def of_slices(op):
    """The op on three slices as a function of qkv."""
    return lambda qkv, *rest: op(*qkv.unbind(-3), *rest)


def attention_of(inputs):
    """The op as a function of its tensors alone."""
    _, rpb, *rest = inputs
    return lambda qkv, *table: ops.local_attention_qkvpacked(qkv, table[0] if table else rpb, *rest)


def gradients(op, inputs, dout, dlse) -> list[torch.Tensor]:
    out, lse = op(*inputs)
    return list(torch.autograd.grad((out, lse), leaves(inputs), (dout.to(out.dtype), dlse.to(lse.dtype))))


def cotangents(case: Case, dtype: torch.dtype):
    lead = (case.batch, *case.spatial, case.heads)
    return torch.randn(*lead, case.head_dim, dtype=torch.float64).to(dtype), torch.randn(*lead, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [case for case in CASES if case.value_dim is None][::2], ids=str)
def test_output_is_that_of_the_slices(case, dtype):
    inputs = packed(case, dtype, requires_grad=False)
    for ours, expected in zip(ops.local_attention_qkvpacked(*inputs), of_slices(ops.local_attention)(*inputs)):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("case", "dtype"), [given for given in CASES_BY_DTYPE if given.values[0].value_dim is None][::5])
def test_gradients_match_the_reference(case, dtype):
    inputs = packed(case, dtype)
    qkv, rpb, *rest = inputs
    dout, dlse = cotangents(case, dtype)
    ours = gradients(ops.local_attention_qkvpacked, inputs, dout, dlse)
    exact_inputs = [None if x is None else x.detach().double().requires_grad_() for x in (qkv, rpb)]
    exact = gradients(of_slices(reference.local_attention), (*exact_inputs, *rest), dout, dlse)
    assert ours[0].is_contiguous()
    if dtype == torch.float64:
        for one, other in zip(ours, exact):
            close(one, other)
        return
    plain = gradients(of_slices(reference.local_attention), inputs, dout, dlse)
    thirds = zip(("query", "key", "value"), *(x[0].unbind(-3) for x in (ours, plain, exact)))
    for name, *results in [*thirds, *((("rpb", ours[1], plain[1], exact[1]),) if case.rpb else ())]:
        at_most_twice_the_error(f"d{name}", *results)


def memory_layouts(qkv: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in other strides."""
    wide = qkv.new_full((*qkv.shape[:-1], 2 * qkv.shape[-1]), float("nan"))
    return {
        "thirds-first": qkv.movedim(-3, 0).contiguous().movedim(0, -3),
        "heads-first": qkv.movedim((-3, -2), (0, 2)).contiguous().movedim((0, 2), (-3, -2)),
        "per-head": qkv.transpose(-2, -3).contiguous().transpose(-2, -3),
        "every-other-channel": wide[..., ::2].copy_(qkv),
        "unaligned": qkv.new_full((qkv.numel() + 1,), float("nan"))[1:].view(qkv.shape).copy_(qkv),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", memory_layouts(torch.zeros(1, 1, 3, 1, 1)))
@pytest.mark.parametrize("case", [Case((7, 9), (3, 4), batch=2), Case((15, 8), 7, shift=3, heads=3, head_dim=16)], ids=str)
def test_memory_layout_does_not_matter(case, layout, dtype):
    qkv, *rest = packed(case, dtype)
    dout, dlse = cotangents(case, dtype)
    expected = gradients(ops.local_attention_qkvpacked, (qkv, *rest), dout, dlse)
    other = memory_layouts(qkv.detach())[layout].requires_grad_()
    assert other.stride() != qkv.stride() or layout == "unaligned"
    for ours, one in zip(gradients(ops.local_attention_qkvpacked, (other, *rest), dout, dlse), expected):
        close(ours, one, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype])


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck_with_forward_mode_and_vmap(case):
    inputs = packed(case)
    assert gradcheck(
        attention_of(inputs),
        leaves(inputs),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradgradcheck(case):
    inputs = packed(case)
    assert gradgradcheck(attention_of(inputs), leaves(inputs))


@pytest.mark.parametrize("case", [case for case in TINY if case.rpb], ids=str)
def test_gradgradcheck_beside_a_table_that_does_not_learn(case):
    qkv, rpb, *rest = packed(case)
    assert gradgradcheck(lambda qkv: ops.local_attention_qkvpacked(qkv, rpb.detach(), *rest), (qkv,))


@pytest.mark.parametrize("case", SQUARE, ids=str)
def test_second_gradients_where_only_a_part_came_in(case):
    """Of dqkv's three parts one alone enters the loss, and of the table's gradient nothing."""
    results = []
    for op in (ops.local_attention_qkvpacked, of_slices(reference.local_attention)):
        inputs = packed(case)
        out, lse = op(*inputs)
        dqkv, *_ = torch.autograd.grad(out.sin().sum() + lse.sum(), leaves(inputs), create_graph=True)
        loss = dqkv.select(-3, 1).cos().sum()
        results.append(torch.autograd.grad(loss, leaves(inputs)))
        torch.manual_seed(0)
    for ours, exact in zip(*results):
        close(ours, exact)


@pytest.mark.parametrize("used", ["out", "lse"])
@pytest.mark.parametrize("wanted", ["qkv", "rpb", "qkv+rpb"])
@pytest.mark.parametrize("case", [case for case in SQUARE if case.rpb], ids=str)
def test_gradients_come_only_where_asked_for(case, wanted, used):
    results = []
    for op in (ops.local_attention_qkvpacked, of_slices(reference.local_attention)):
        torch.manual_seed(0)
        inputs = packed(case, requires_grad=False)
        for name, x in zip(("qkv", "rpb"), inputs):
            x.requires_grad_(name in wanted)
        op(*inputs)[("out", "lse").index(used)].sin().sum().backward()
        results.append([x.grad for x in leaves(inputs)])
    for name, ours, exact in zip(("qkv", "rpb"), *results):
        if name in wanted:
            close(ours, exact)
        else:
            assert ours is None


COPIES = {"aten::stack", "aten::cat", "aten::copy_", "aten::clone", "aten::add_"}


def copies_in(call) -> set[str]:
    """Which of torch's ops that write tensors once more run during a call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {event.name for event in profiled.events()} & COPIES


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_gradient_is_written_in_one_piece(dtype):
    case = Case((14, 14), 7, shift=3, heads=3, head_dim=32)
    qkv, rpb, *rest = packed(case, dtype)
    rpb = rpb.detach().float().requires_grad_()
    dout = torch.randn_like(qkv.select(-3, 0))
    out = ops.local_attention_qkvpacked(qkv, rpb, *rest)[0]
    assert not copies_in(lambda: torch.autograd.grad(out, (qkv, rpb), dout))
    out = of_slices(ops.local_attention)(qkv, rpb, *rest)[0]
    assert "aten::stack" in copies_in(lambda: torch.autograd.grad(out, (qkv, rpb), dout)), "the measure sees a copy"


@needs_compiled
@pytest.mark.parametrize(
    "module",
    [
        natrpb.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True),
        natrpb.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True),
        natrpb.NeighborhoodAttention3D(8, 2, 3, rel_pos_bias=True),
        natrpb.WindowAttention(8, 3, 2, shift_size=1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_train_on_the_packed_op(module):
    axes = getattr(module, "ndim", 2)
    module = module.to(torch.get_default_device())
    loss = module(torch.randn(1, *(7,) * axes, 8)).square().sum()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss.backward()
    names = {event.name for event in profiled.events()}
    assert "natrpb::local_attention_qkvpacked_backward" in names and "aten::stack" not in names


SHARED = {"rpb": True, "scale": 0.3, "return_lse": True}
NEIGHBORHOODS = {
    "plain": {},
    "bias-and-lse": SHARED,
    "stride-dilation-causal": {"stride": 2, "dilation": 2, "is_causal": True},
    "dropout": {"dropout_p": 0.3, "rpb": True},
    "additional-tokens": {"additional": True} | SHARED,
}


@pytest.mark.parametrize("options", NEIGHBORHOODS.values(), ids=NEIGHBORHOODS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_neighborhood_functions_equal_those_of_three_tensors(ndim, options):
    case = Case((9, 8, 7)[:ndim], 3, batch=2)
    qkv, rpb, *_ = packed(case)
    options = {"kernel_size": 3} | options
    tensors = [qkv]
    if options.pop("rpb", False):
        options["rpb"] = rpb
        tensors.append(rpb)
    if options.pop("additional", False):
        tokens = torch.randn(2, 2, 4, 2, 8, dtype=torch.float64)
        options |= {"additional_keys": tokens[0], "additional_values": tokens[1]}
    results = []
    for function, given in ((f"na{ndim}d_qkvpacked", (qkv,)), (f"na{ndim}d", qkv.unbind(-3))):
        torch.manual_seed(1)
        found = getattr(natrpb, function)(*given, **options)
        found = found if isinstance(found, tuple) else (found,)
        results.append([*found, *torch.autograd.grad(sum(x.sin().sum() for x in found), tensors)])
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)


WINDOWS = {
    "plain": {},
    "bias-and-lse": SHARED,
    "nat-convention": {"convention": "nat", "rpb": True, "shift_size": (1, 2)},
    "cosine": {"logit_scale": torch.tensor([1.0, 2.0]), "shift_size": 1},
    "dense-bias": {"dense_bias": torch.linspace(-1, 1, 2 * 12 * 12).view(2, 12, 12)},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_window_function_equals_that_of_three_tensors(options):
    case = Case((7, 9), (3, 4), shift=0, batch=2)
    qkv, rpb, *_ = packed(case)
    options = {name: x.to(qkv) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    options |= {"window_size": (3, 4)} | ({"rpb": rpb} if options.get("rpb") else {})
    tensors = [qkv, rpb] if "rpb" in options else [qkv]
    results = []
    for function, given in ((natrpb.window_attention_qkvpacked, (qkv,)), (natrpb.window_attention, qkv.unbind(-3))):
        torch.manual_seed(1)
        found = function(*given, **options)
        found = found if isinstance(found, tuple) else (found,)
        results.append([*found, *torch.autograd.grad(sum(x.sin().sum() for x in found), tensors)])
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)


def test_window_function_takes_swins_table():
    qkv = torch.randn(1, 6, 6, 3, 2, 4)
    table = torch.randn(25, 2)
    ours = natrpb.window_attention_qkvpacked(qkv, 3, 1, table)
    assert torch.equal(ours, natrpb.window_attention(*qkv.unbind(-3), 3, 1, table))


def wrong(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape or (1, 6, 7, 3, 2, 4), dtype=dtype)


ERRORS = {
    "not-a-tensor": ({"qkv": [1.0]}, TypeError, "qkv must be a tensor .*, got list"),
    "rank": ({"qkv": wrong(1, 6, 7, 2, 4)}, ValueError, r"qkv must have shape \[B, .*3, heads, D\], got"),
    "no-axis": ({"qkv": wrong(1)}, ValueError, r"qkv must have shape \[B, .*3, heads, D\], got"),
    "two-thirds": ({"qkv": wrong(1, 6, 7, 2, 2, 4)}, ValueError, r"qkv must have shape .* got \[1, 6, 7, 2, 2, 4\]"),
    "integer": ({"qkv": wrong(dtype=torch.int64)}, TypeError, "qkv must be float64, float32, bfloat16 or float16"),
    "head-dim": ({"qkv": wrong(1, 6, 7, 3, 2, 0)}, ValueError, r"head_dim\) must hold at least 1"),
    "heads": ({"rpb": wrong(3, 5, 5)}, ValueError, "rpb must have shape"),
    "device": ({"rpb": wrong(2, 5, 5).to("meta")}, ValueError, "rpb must be on the other tensors' device, .*, got meta"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
    "dropout": ({"dropout_p": "much"}, ValueError, "dropout_p must be a number between 0 and 1"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("function", [natrpb.na2d_qkvpacked, natrpb.window_attention_qkvpacked], ids=["na2d", "window"])
def test_bad_input_is_named(function, change, error, message):
    arguments = {"qkv": wrong()} | change
    with pytest.raises(error, match=message):
        function(arguments.pop("qkv"), 3, **arguments)


def test_neighborhoods_must_fit_and_tokens_must_come_together():
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed"):
        natrpb.na2d_qkvpacked(wrong(), 7)
    with pytest.raises(ValueError, match="additional_keys and additional_values must be given together"):
        natrpb.na2d_qkvpacked(wrong(), 3, additional_values=wrong(1, 2, 2, 4))
    with pytest.raises(ValueError, match="scale and logit_scale exclude each other"):
        natrpb.window_attention_qkvpacked(wrong(), 3, scale=0.5, logit_scale=torch.ones(2))


@needs_compiled
def test_the_op_itself_names_a_wrong_shape():
    lists = [[3, 3], [1, 1], [1, 1], [0, 0], [0, 0]]
    for shape in ((1, 6, 7, 2, 4), (1, 6, 7, 2, 2, 4), (1, 6, 3, 2, 4)):
        with pytest.raises(RuntimeError, match=r"qkv must have shape \[B, 2 spatial axes, 3, heads, D\], got"):
            torch.ops.natrpb.local_attention_qkvpacked_forward(wrong(*shape), None, *lists, 1.0)


def schema_calls(case: Case, dtype: torch.dtype, needs_drpb: bool = True) -> dict[str, tuple]:
    qkv, rpb, pattern, scale = packed(case, dtype)
    rpb = None if rpb is None else rpb.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    out, lse = reference.local_attention(*qkv.detach().unbind(-3), rpb, pattern, scale)
    dout, dlse = (torch.randn_like(x).requires_grad_() for x in (out, lse))
    lists = [list(numbers) for numbers in pattern]
    results = (out.detach(), lse.detach())
    return {
        "forward": (qkv, rpb, *lists, scale),
        "backward": (dout, dlse, qkv, rpb, *results, *lists, scale, needs_drpb and rpb is not None),
    }


@needs_compiled
@pytest.mark.not_emulated("schema, fake and autograd are the same there")
@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("case", [SQUARE[0], SQUARE[-1]], ids=str)
def test_opcheck(case, name):
    op = getattr(torch.ops.natrpb, f"local_attention_qkvpacked_{name}").default
    torch.library.opcheck(op, schema_calls(case, torch.float64)[name])
    static = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, schema_calls(case, torch.float64, needs_drpb=False)[name], test_utils=static)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.library.opcheck(op, schema_calls(case, dtype)[name], test_utils=static)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_model_trains_in_one_graph(dynamic):
    torch._dynamo.reset()

    def model(qkv, rpb):
        out, lse = natrpb.na2d_qkvpacked(qkv * 2, 3, dilation=(1, 2), rpb=rpb, return_lse=True)
        return out.relu().sum() + lse.sin().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for spatial, batch in (((7, 9), 2), ((8, 11), 4)):
        inputs = packed(Case(spatial, 3, batch=batch))[:2]
        for ours, eager in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, model))):
            close(ours, eager)


@needs_compiled
def test_an_exported_module_holds_the_op():
    module = natrpb.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, 6, 7, 8)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("height", min=3)}
    program = torch.export.export(module.to(x.device), (x,), dynamic_shapes=(sizes,))
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.natrpb.local_attention_qkvpacked_forward.default in targets
    other = torch.randn(3, 5, 7, 8)
    close(program.module()(other), module(other), 1e-6)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (3, 2), (None, 0)], ids=str)
@pytest.mark.parametrize("case", [Case((6, 7), (3, 4), batch=2), Case((9, 8), 3, shift=1)], ids=str)
def test_vmap_equals_a_loop(case, in_dims):
    qkv, rpb, *rest = packed(case, requires_grad=False)
    stacked = [x if dim is None else torch.stack([x, x.flip(-1), x * 0.5], dim=dim) for x, dim in zip((qkv, rpb), in_dims)]
    mapped = torch.vmap(lambda *x: ops.local_attention_qkvpacked(*x, *rest), in_dims)(*stacked)
    for i in range(3):
        alone = [x if dim is None else x.select(dim, i) for x, dim in zip(stacked, in_dims)]
        for ours, expected in zip(mapped, ops.local_attention_qkvpacked(*alone, *rest)):
            close(ours[i], expected)


@pytest.mark.parametrize(("outer", "inner"), [*itertools.product(("grad", "jvp"), repeat=2)], ids="-".join)
@pytest.mark.parametrize("argument", [0, 1], ids=("qkv", "rpb"))
@pytest.mark.parametrize("case", [SQUARE[0], SQUARE[4]], ids=str)
def test_nested_func_transforms_equal_the_reference(case, argument, outer, inner):
    inputs = packed(case, requires_grad=False)
    tangent = torch.randn_like(inputs[argument])
    derivatives = {
        "grad": lambda f: lambda x: (torch.func.grad(f)(x) * tangent).sum(),
        "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (tangent,))[1],
    }
    results = []
    for op in (ops.local_attention_qkvpacked, of_slices(reference.local_attention)):

        def loss(x, op=op):
            out, lse = op(*inputs[:argument], x, *inputs[argument + 1 :])
            return out.sin().sum() + lse.sin().sum()

        results.append(derivatives[outer](derivatives[inner](loss))(inputs[argument]))
    close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_equals_casting_by_hand(dtype):
    qkv, rpb, *_ = packed(Case((6, 7), 3), torch.float32)
    with torch.autocast(qkv.device.type, dtype):
        out, lse = natrpb.na2d_qkvpacked(qkv, 3, rpb=rpb, return_lse=True)
    expected, expected_lse = natrpb.na2d_qkvpacked(qkv.to(dtype), 3, rpb=rpb, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, expected, 0.0)
    close(lse, expected_lse, 0.0)
    gradients = (torch.autograd.grad(x.float().sum() + y.sum(), (qkv, rpb)) for x, y in ((out, lse), (expected, expected_lse)))
    for ours, other in zip(*gradients):
        assert ours.dtype == torch.float32
        close(ours, other, 0.0)


def test_the_reference_serves_where_the_kernels_do_not(monkeypatch):
    inputs = packed(SQUARE[0])
    dout, dlse = cotangents(SQUARE[0], torch.float64)
    expected = gradients(ops.local_attention_qkvpacked, inputs, dout, dlse)
    asked = []
    monkeypatch.setattr(_ext, "runs_compiled", lambda device, op: asked.append(op))
    for ours, exact in zip(gradients(ops.local_attention_qkvpacked, inputs, dout, dlse), expected):
        close(ours, exact)
    assert asked == ["local_attention_qkvpacked_forward"]

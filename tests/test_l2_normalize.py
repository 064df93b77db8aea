"""Rows of unit length: results and gradients against the reference, derivatives of any order, layouts, odd values, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from natrpb import ops, reference

from .support import DTYPES, at_most_twice_the_error, close, dtype_id, needs_compiled

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# [B, *, h, D]: one row, prime sizes, channels below, at and past the widths of vectors and warps, more rows than an item takes.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 7, 3, 32),
    (1, 131, 2, 5),
    (3, 4, 5, 1, 24),
    (2, 3, 4, 5, 2, 17),
    (1, 9, 4, 64),
    (2, 11, 3, 33),
    (1, 6, 2, 300),
    (1, 40, 30, 2, 16),
    (0, 4, 4, 2, 8),
    (2, 0, 3, 8),
]


def shape_id(shape) -> str:
    return "x".join(map(str, shape))


def problem(shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, factor and a gradient of the result; factor in the dtype that the op computes in."""
    x, dout = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    factor = torch.rand(shape[-2], dtype=torch.float64 if dtype == torch.float64 else torch.float32) * 50
    return x.requires_grad_(), factor.requires_grad_(), dout


def train(function, x: Tensor, factor: Tensor, dout: Tensor) -> list[Tensor]:
    """The result, and the gradients of x and factor."""
    out = function(x, factor)
    return [out.detach(), *torch.autograd.grad(out, (x, factor), dout)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_results_and_gradients_match_the_reference(shape, dtype):
    x, factor, dout = problem(shape, dtype)
    ours = train(ops.l2_normalize, x, factor, dout)
    plain = train(reference.l2_normalize, x, factor, dout)
    wide = [t.detach().double() for t in (x, factor, dout)]
    exact = train(reference.l2_normalize, wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2])
    for name, *results in zip(("out", "dx", "dfactor"), ours, plain, exact, strict=True):
        if dtype == torch.float64:
            close(results[0], results[2])
        else:
            at_most_twice_the_error(name, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_the_definition(dtype):
    x, factor, _ = problem((2, 5, 3, 20), dtype)
    expected = torch.nn.functional.normalize(x.detach().double(), dim=-1)
    eps = max(torch.finfo(dtype).eps, 1e-12)
    close(ops.l2_normalize(x).double(), expected, eps)
    close(ops.l2_normalize(x, factor).double(), expected * factor.detach().double()[:, None], 50 * eps)


def test_derivatives():
    for shape in ((2, 3, 2, 2, 5), (1, 4, 3, 1)):
        x, factor, _ = problem(shape)
        options = dict(check_forward_ad=True, check_batched_grad=True)
        assert gradcheck(ops.l2_normalize, (x, factor), **options)
        assert gradcheck(ops.l2_normalize, (x,), **options)
        assert gradgradcheck(ops.l2_normalize, (x, factor), check_fwd_over_rev=True, check_rev_over_rev=True)
        assert gradgradcheck(ops.l2_normalize, (x,), check_fwd_over_rev=True, check_rev_over_rev=True)


@needs_compiled
def test_third_derivatives():
    x, factor, dout = problem((1, 2, 2, 3))

    def first(x: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.l2_normalize(x, factor), (x, factor), dout, create_graph=True)

    assert gradgradcheck(first, (x, factor))


@pytest.mark.parametrize("function", [ops.l2_normalize, reference.l2_normalize], ids=["op", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_of_zeros_stay_so_and_have_no_gradient(function, dtype):
    x, factor, dout = problem((2, 70, 3, 24), dtype)
    zero = torch.rand(x.shape[:-1]) < 0.3
    with torch.no_grad():
        x.masked_fill_(zero[..., None], 0)
    out = function(x, factor)
    dx, dfactor = torch.autograd.grad(out, (x, factor), dout, create_graph=True)
    assert not out[zero].any() and not dx[zero].any() and (out[~zero] != 0).any(-1).all()
    dout = dout.masked_fill(zero[..., None], 0)
    close(dfactor, torch.autograd.grad(function(x, factor), factor, dout)[0], 0.0)
    second = torch.autograd.grad(dx.float().square().sum() + dfactor.sum(), (x, factor))
    assert all(gradient.isfinite().all() for gradient in (dx, dfactor, *second)) and not second[0][zero].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_stays_within_its_row(dtype):
    x, factor, _ = problem((1, 9, 3, 40), dtype)
    clean = ops.l2_normalize(x, factor).detach()
    with torch.no_grad():
        x[0, 4, 1, 7] = math.nan
    out = ops.l2_normalize(x, factor).detach()
    assert out[0, 4, 1].isnan().all()
    out[0, 4, 1] = clean[0, 4, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_small_and_large_numbers(dtype):
    """Far from what the squares of 16-bit numbers could hold."""
    x, factor, _ = problem((1, 5, 2, 24), dtype)
    small, large = {torch.float16: (-20, 10)}.get(dtype, (-40, 50))
    expected = ops.l2_normalize(x, factor).detach().double()
    for exponent in (small, large):
        scaled = (x.detach().double() * 2.0**exponent).to(dtype)
        exact = reference.l2_normalize(scaled.double(), factor.detach())
        close(ops.l2_normalize(scaled, factor).detach().double(), exact, 50 * max(torch.finfo(dtype).eps, 1e-12))
        if exponent == large:
            close(exact, expected, 200 * max(torch.finfo(dtype).eps, 1e-12))


LAYOUTS = {
    "fused-qkv": lambda x: torch.stack([x, x + 1, x - 1], -3).unbind(-3)[0],
    "heads-first": lambda x: x.movedim(-2, 1).contiguous().movedim(1, -2),
    "axes-swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "inside-larger-map": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1, 1, 2, 2, 1))[:, 2:-1, 1:-2, :-1],
    "every-other-channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda x: x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x),
    "one-row-expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_does_not_matter(layout, dtype):
    """Up to the last bit: sums of an unaligned row run in another order on a GPU."""
    x, factor, dout = problem((2, 5, 7, 3, 24), dtype)
    expected = train(ops.l2_normalize, x, factor, layout(dout).contiguous())
    if layout is LAYOUTS["one-row-expanded"]:
        expected = train(ops.l2_normalize, layout(x.detach()).contiguous().requires_grad_(), factor, layout(dout).contiguous())
    strided = layout(x.detach()).requires_grad_()
    for ours, other in zip(train(ops.l2_normalize, strided, factor, layout(dout)), expected, strict=True):
        close(ours.double(), other.double(), 20 * torch.finfo(dtype).eps)


@needs_compiled
@pytest.mark.not_on_cuda("counts the CPU's memory")
@pytest.mark.parametrize("layout", ["fused-qkv", "heads-first", "unaligned"])
def test_layouts_of_models_are_read_in_place(layout):
    x, factor, dout = (t.detach() for t in problem((4, 14, 14, 3, 32), torch.float32))
    x, dout = LAYOUTS[layout](x), LAYOUTS[layout](dout)
    x.requires_grad_()
    train(ops.l2_normalize, x, factor.requires_grad_(), dout)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        train(ops.l2_normalize, x, factor, dout)
    names = {event.key for event in profiled.key_averages()}
    assert "natrpb::l2_normalize" in names and not names & {"aten::copy_", "aten::clone"}


def schema_calls(dtype: torch.dtype, with_factor: bool = True) -> dict[str, tuple]:
    x, factor, dout = problem((2, 35, 3, 20), dtype)
    factor = factor if with_factor else None
    return {"l2_normalize": (x, factor), "l2_normalize_backward": (dout.requires_grad_(), x, factor)}


@needs_compiled
@pytest.mark.parametrize("with_factor", [True, False], ids=["factor", "no-factor"])
@pytest.mark.parametrize("name", ["l2_normalize", "l2_normalize_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_opcheck(dtype, name, with_factor):
    tests = ("test_schema", "test_faketensor")
    if dtype == torch.float64:
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    call = schema_calls(dtype, with_factor)[name]
    torch.library.opcheck(getattr(torch.ops.natrpb, name).default, call, test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_function_trains_in_one_graph(dynamic):
    torch._dynamo.reset()

    def loss(x: Tensor, factor: Tensor) -> Tensor:
        return (ops.l2_normalize(2 * x, factor) * ops.l2_normalize(x.cos())).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 5, 7, 3, 8), (1, 6, 3, 2, 8)):
        x, factor, _ = problem(shape)
        expected = torch.autograd.grad(loss(x, factor), (x, factor))
        for ours, eager in zip(torch.autograd.grad(compiled(x, factor), (x, factor)), expected):
            close(ours, eager)


def test_vmap_and_functional_transforms():
    x, factor, _ = (t.detach() for t in problem((2, 3, 4, 2, 5)))
    many = torch.stack([x, x.cos(), x.sin()]), torch.stack([factor, factor.cos(), factor.sin()])
    for dims in ((0, 0), (0, None), (None, 0)):
        mapped = [t if dim == 0 else t[0] for t, dim in zip(many, dims)]
        ours = torch.vmap(ops.l2_normalize, dims)(*mapped)
        for i in range(3):
            close(ours[i], ops.l2_normalize(*(t[i] if dim == 0 else t for t, dim in zip(mapped, dims))))

    def scalar(x: Tensor, factor: Tensor) -> Tensor:
        return ops.l2_normalize(x, factor).sin().sum()

    leaves = x.clone().requires_grad_(), factor.clone().requires_grad_()
    expected = torch.autograd.grad(scalar(*leaves), leaves)
    for one, other in zip(torch.func.grad(scalar, argnums=(0, 1))(x, factor), expected):
        close(one, other)
    small = x[:1, :1, :1]
    expected = torch.autograd.functional.hessian(lambda x: scalar(x, factor), small)
    close(torch.func.hessian(lambda x: scalar(x, factor))(small), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_leaves_it_as_it_is(dtype):
    x, factor, _ = problem((2, 5, 3, 8), torch.float32)
    with torch.autocast(x.device.type, dtype=dtype):
        out = ops.l2_normalize(x, factor)
    assert torch.equal(out, ops.l2_normalize(x, factor))


def test_factor_may_have_any_float_dtype():
    x, factor, _ = problem((2, 5, 3, 8), torch.bfloat16)
    wide = factor.detach().double().requires_grad_()
    out = ops.l2_normalize(x, wide)
    assert torch.equal(out, ops.l2_normalize(x, factor))
    assert torch.autograd.grad(out.float().sum(), wide)[0].dtype == torch.float64


@needs_compiled
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), None), r"x must have shape \[B, N, h, D\], got \[2, 3, 4\]"),
        ((torch.zeros(2, 3, 4, 5).int(), None), "x must be float64, float32, bfloat16 or float16"),
        ((torch.zeros(2, 3, 4, 5), torch.zeros(3)), r"factor must have shape \[4\], got \[3\]"),
        ((torch.zeros(2, 3, 4, 5), torch.zeros(4).double()), "factor must be float32, or float64 for a float64 x"),
    ],
    ids=["shape", "dtype", "factor-shape", "factor-dtype"],
)
def test_names_what_does_not_fit(arguments, message):
    arguments = [None if x is None else x.to(torch.get_default_device()) for x in arguments]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.natrpb.l2_normalize(*arguments)


@needs_compiled
def test_names_a_gradient_that_does_not_fit():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match=r"dout must have x's shape \[2, 3, 4, 5\], got \[2, 3, 4, 4\]"):
        torch.ops.natrpb.l2_normalize_backward(x[..., :-1], x, None)
    with pytest.raises(RuntimeError, match="dout must be float32 like x"):
        torch.ops.natrpb.l2_normalize_backward(x.double(), x, None)

"""What only a GPU can show: streams, devices, CUDA graphs, repeatable bits, huge tensors and grids, memory, precision.

Results on a GPU are compared with the reference by the other files, run with --device cuda.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import natrpb
from natrpb import ops, reference

from .cases import Case, Inputs
from .support import at_most_twice_the_error, close, dtype_id

REASON = natrpb.info()["cuda"]["reason"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no kernels on a GPU: {REASON}")

LARGER = [
    Case((56, 56), 7, batch=4, heads=2, head_dim=32),
    Case((28, 28), 13, batch=4, heads=4, head_dim=32),
    Case((40, 37), 7, dilation=3, batch=2, heads=3, head_dim=64),
    Case((41, 40), 6, stride=(2, 1), is_causal=(True, False), batch=2, head_dim=24),
    Case((700,), 31, dilation=3, batch=2, heads=2, head_dim=16),
    Case((10, 14, 13), (3, 5, 4), batch=2, heads=2, head_dim=32),
    Case((56, 56), 7, shift=3, batch=2, heads=3, head_dim=32),
    Case((47, 30), 12, shift=6, batch=2, heads=4, head_dim=32),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GIB = 1 << 30


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Draws on the GPU, and lets an error of a kernel end the test that launched it."""
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()


def train(inputs: Inputs, dout: torch.Tensor, dlse: torch.Tensor) -> list[torch.Tensor]:
    """Output, lse and all gradients."""
    out, lse = ops.local_attention(*inputs)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs.tensors(), (dout, dlse))]


def problem(case: Case, dtype: torch.dtype) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    inputs = case.inputs(dtype, requires_grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return inputs, torch.randn_like(inputs.value).detach(), torch.randn(inputs.value.shape[:-1], dtype=wide)


def same_bits(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


def needs_memory(size: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of the GPU's memory, {free / GIB:.0f} are free")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_larger_cases_match_the_reference(case, dtype):
    """Many tiles on every axis, where the other files have few."""
    inputs, dout, dlse = problem(case, dtype)
    ours = train(inputs, dout, dlse)
    exact, plain = (
        [*results, *torch.autograd.grad(results, leaves.tensors(), (dout.to(results[0].dtype), dlse.to(results[1].dtype)))]
        for leaves in (inputs.cast(torch.float64), inputs)
        for results in (reference.local_attention(*leaves),)
    )
    names = ("out", "lse", "dquery", "dkey", "dvalue", "drpb")
    for name, *results in zip(names, ours, plain, exact, strict=True):
        if dtype == torch.float64:
            close(results[0], results[2])
        else:
            at_most_twice_the_error(name, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_running_again_gives_the_same_bits(case, dtype):
    """Also while another stream keeps some of the multiprocessors, so that blocks start in other orders."""
    inputs, dout, dlse = problem(case, dtype)
    first = train(inputs, dout, dlse)
    noise, other = torch.randn(1024, 1024), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(other):
            for _ in range(4):
                noise = (noise @ noise).sin()
        assert same_bits(train(inputs, dout, dlse), first)
    torch.cuda.current_stream().wait_stream(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_kernels_run_on_the_current_stream(dtype):
    """On any other stream they would read the inputs before these are there."""
    inputs, dout, dlse = problem(LARGER[0], dtype)
    expected = train(inputs, dout, dlse)
    late = inputs.cast(dtype)
    with torch.no_grad():
        for x in late.tensors():
            x.zero_()
    slow = torch.randn(4096, 4096)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(50):
            slow = (slow @ slow).sin()
        with torch.no_grad():
            for x, y in zip(late.tensors(), inputs.tensors()):
                x.copy_(y)
        ours = train(late, dout, dlse)
    side.synchronize()
    assert same_bits(ours, expected)


def test_streams_do_not_share_scratch_memory():
    problems = [problem(case, torch.bfloat16) for case in LARGER[:4]]
    expected = [train(*each) for each in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = [[] for _ in problems]
    for _ in range(5):
        for stream, each, found in zip(streams, problems, results):
            with torch.cuda.stream(stream):
                found.append(train(*each))
    torch.cuda.synchronize()
    for found, first in zip(results, expected):
        assert all(same_bits(each, first) for each in found)


def test_nothing_waits_for_the_gpu():
    inputs, dout, dlse = problem(LARGER[0], torch.bfloat16)
    train(inputs, dout, dlse)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(inputs, dout, dlse)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_captured_graph_equals_eager(case, dtype):
    static, dout, dlse = problem(case, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants everything to have run before, on another stream
        for _ in range(3):
            train(static, dout, dlse)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = train(static, dout, dlse)
    for _ in range(3):
        fresh = problem(case, dtype)
        with torch.no_grad():
            for x, y in zip([*static.tensors(), dout, dlse], [*fresh[0].tensors(), *fresh[1:]]):
                x.copy_(y)
        for x in results:
            x.fill_(float("nan"))
        graph.replay()
        assert same_bits(results, train(*fresh))


def with_lse(query, key, value, rpb):
    out, lse = natrpb.na2d(query * 2, key + 1, value, 7, rpb=rpb, return_lse=True)
    return out.relu().sum() + lse.sin().sum()


def windowed(query, key, value, rpb):
    return natrpb.window_attention(query, key, value, 4, 2, rpb, convention="nat").relu().sum()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function, kernel_size", [(with_lse, 7), (windowed, 4)], ids=["na2d", "window"])
def test_compiled_model_trains_in_one_graph(function, kernel_size, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for spatial, batch in (((14, 16), 2), ((15, 17), 3)):
        case = Case(spatial, kernel_size, batch=batch, head_dim=32)
        results = []
        for call in (compiled, function):
            torch.manual_seed(0)
            leaves = case.inputs(torch.float32, requires_grad=True).tensors()
            value = call(*leaves)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for ours, eager in zip(*results):
            close(ours, eager, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_equals_casting_by_hand(dtype):
    inputs = LARGER[0].inputs(torch.float32, requires_grad=True)
    with torch.autocast("cuda", dtype):
        out, lse = natrpb.na2d(*inputs[:3], 7, rpb=inputs.rpb, return_lse=True)
    by_hand = inputs.cast(torch.float32)
    expected = natrpb.na2d(*(x.to(dtype) for x in by_hand[:3]), 7, rpb=by_hand.rpb, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert same_bits([out, lse], list(expected))
    dout = torch.randn_like(out)
    ours, theirs = (
        torch.autograd.grad(result, leaves.tensors(), dout) for result, leaves in ((out, inputs), (expected[0], by_hand))
    )
    assert all(x.dtype == torch.float32 for x in ours) and same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["key", "value", "rpb"])
def test_tensors_on_several_devices_are_refused(name):
    inputs = Case((9, 8), 3).inputs(torch.float32)
    elsewhere = inputs._replace(**{name: getattr(inputs, name).cpu()})
    with pytest.raises(ValueError, match=rf"{name} must be on query's device, cuda:\d, got cpu"):
        natrpb.na2d(*elsewhere[:3], 3, rpb=elsewhere.rpb)
    with pytest.raises(RuntimeError, match=rf"{name} must be on cuda:\d like the other tensors, got another device"):
        torch.ops.natrpb.local_attention_forward(*elsewhere[:4], *elsewhere.pattern, elsewhere.scale)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    inputs, dout, dlse = problem(LARGER[0], torch.bfloat16)
    expected = train(inputs, dout, dlse)
    moved = Inputs(*(x.detach().to("cuda:1").requires_grad_() for x in inputs[:4]), *inputs[4:])
    with torch.cuda.device(0):
        ours = train(moved, dout.to("cuda:1"), dlse.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in ours)
    assert same_bits([x.to("cuda:0") for x in ours], expected)
    with pytest.raises(RuntimeError, match=r"key must be on cuda:0 like the other tensors, got cuda:1"):
        torch.ops.natrpb.local_attention_forward(inputs.query, moved.key, *inputs[2:4], *inputs.pattern, inputs.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", [Case((5, 6), 3, batch=40000, head_dim=8), Case((4,), 2, shift=1, batch=70000)], ids=str)
def test_more_blocks_than_the_second_axis_of_a_grid_holds(case, dtype):
    """batch * heads above 65535; every sample alone gives the same bits, and the table's gradient is the sum of its parts."""
    needs_memory(4 * GIB)
    inputs, dout, dlse = problem(case, dtype)
    ours = train(inputs, dout, dlse)
    parts = []
    for first in range(0, case.batch, 10000):
        part = slice(first, first + 10000)
        leaves = [x.detach()[part].requires_grad_() for x in inputs[:3]]
        parts.append(train(Inputs(*leaves, *inputs[3:]), dout[part], dlse[part]))
    assert same_bits(ours[:5], [torch.cat(each) for each in list(zip(*parts))[:5]])
    tables = torch.stack([part[5] for part in parts]).double()
    allowed = 2 * torch.finfo(dtype).eps * tables.abs().sum(0) + 1e-4 * tables.sum(0).abs().max()
    assert ((ours[5].double() - tables.sum(0)).abs() <= allowed).all()


ROWS, COLUMNS = 24, 64  # of the corner that is compared; queries a radius away from its cut edges see what they see in the map
MARGIN = 4


def corner(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The last, or first, rows and columns of a map [1, H, W, ...]."""
    return x[:, -ROWS:, -COLUMNS:] if at_end else x[:, :ROWS, :COLUMNS]


def inner(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """What of a corner does not feel its cut edges."""
    return x[:, MARGIN:, MARGIN:] if at_end else x[:, :-MARGIN, :-MARGIN]


@pytest.mark.parametrize("at_end", [False, True], ids=["start", "end"])
def test_tensors_of_more_than_two_to_the_31_elements(at_end):
    """Offsets beyond 32 bits: both corners of a map, forward and backward, against the same corner as a map of its own."""
    case = Case((8200, 8192), 7, heads=1, head_dim=32)
    needs_memory(44 * GIB)
    query, key, value = (torch.randn(1, *case.spatial, 1, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    assert query.numel() > 1 << 31
    rpb = (torch.randn(1, 13, 13) / 2).requires_grad_()
    dout = torch.zeros_like(value).detach()
    inner(corner(dout, at_end), at_end).normal_()
    out, lse = ops.local_attention(query, key, value, rpb, case.pattern, 32**-0.5)
    gradients = torch.autograd.grad(out, (query, key, value, rpb), dout)
    small = Inputs(*(corner(x.detach(), at_end).requires_grad_() for x in (query, key, value)), rpb, case.pattern, 32**-0.5)
    results = []
    for op, leaves in ((ops, small), (reference, small), (reference, small.cast(torch.float64))):
        small_out, small_lse = op.local_attention(*leaves)
        dsmall = corner(dout, at_end).to(small_out.dtype)
        given = torch.autograd.grad(small_out, leaves.tensors(), dsmall)
        results.append([*(inner(x, at_end) for x in (small_out, small_lse)), *given])
    ours = [inner(corner(x, at_end), at_end) for x in (out, lse)] + [corner(x, at_end) for x in gradients[:3]] + [gradients[3]]
    for name, *each in zip(("out", "lse", "dquery", "dkey", "dvalue", "drpb"), ours, results[1], results[2], strict=True):
        at_most_twice_the_error(name, *each)
    for whole, part in zip(gradients[:3], ours[2:5]):
        assert whole.count_nonzero() == part.count_nonzero(), "zero outside the corner"


def test_strides_beyond_two_to_the_31():
    """Slices of one fused projection, each of them small enough, all together not."""
    needs_memory(12 * GIB)
    case = Case((4800, 4800), 7, heads=1, head_dim=32)
    qkv = torch.randn(1, *case.spatial, 3, 1, 32, dtype=torch.bfloat16)
    assert qkv.numel() > 1 << 31 > qkv.numel() // 3
    rpb = torch.randn(1, 13, 13) / 2
    out = natrpb.na2d(*qkv.unbind(-3), 7, rpb=rpb)
    small = [corner(x, True) for x in qkv.unbind(-3)]
    expected = reference.local_attention(*small, rpb, case.pattern, 32**-0.5)[0]
    exact = reference.local_attention(*(x.double() for x in small), rpb.double(), case.pattern, 32**-0.5)[0]
    at_most_twice_the_error("out", *(inner(x, True) for x in (corner(out, True), expected, exact)))


def growth(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes by which the GPU's memory grows during a training step, and those of its results."""
    inputs, dout, dlse = problem(case, dtype)
    train(inputs, dout, dlse)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = train(inputs, dout, dlse)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, sum(x.numel() * x.element_size() for x in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    "case",
    [
        Case((64, 64), 13, batch=32, heads=4, head_dim=32),
        Case((64, 64), 7, dilation=4, batch=32, heads=4, head_dim=16),
        Case((64, 64), 16, shift=8, batch=32, heads=4, head_dim=32),
    ],
    ids=str,
)
def test_training_step_holds_no_tensor_of_the_size_of_the_weights(case, dtype):
    """Scratch memory may have a size of its own, but what more samples add to the peak are their results."""
    needs_memory(4 * GIB)
    small, small_results = growth(case, dtype)
    large, large_results = growth(replace(case, batch=2 * case.batch), dtype)
    added, weights = large - small - (large_results - small_results), case.size * dtype.itemsize
    assert large >= large_results and added < weights / 4, f"{added / 1e6:.0f} MB beside the results"


def test_fp32_is_not_rounded_to_tf32():
    assert not torch.backends.cuda.matmul.allow_tf32
    inputs, dout, dlse = problem(Case((28, 28), 7, heads=4, head_dim=64), torch.float32)
    exact = train(inputs.cast(torch.float64), dout.double(), dlse.double())
    for ours, wide in zip(train(inputs, dout, dlse), exact, strict=True):
        assert (ours.double() - wide).abs().max() < 2e-5 * wide.abs().max()

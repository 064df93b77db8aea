"""What only a GPU can show of the irpe ops: streams, CUDA graphs, repeatable bits, huge tensors and grids, memory.

Results on a GPU are compared with the reference by the other files, run with --device cuda.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import natrpb
from natrpb import ops, reference_irpe

from .irpe_cases import IrpeCase, IrpeInputs
from .support import DTYPES, at_most_twice_the_error, close, dtype_id
from .test_cuda import GIB, needs_memory, same_bits

REASON = natrpb.info()["cuda"]["reason"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no kernels on a GPU: {REASON}")

LARGER = [
    IrpeCase(197, 197, "kqv", 50, batch=8, heads=6, head_dim=64),
    IrpeCase(480, 480, "kqv", 82, terms=2, padding=True, heads=8, head_dim=32),
    IrpeCase(333, 257, "kqtv", 170, mask=True, heads=3, head_dim=24, value_dim=40),
    IrpeCase(130, 200, "kqtv", 600, batch=3, heads=1, head_dim=136),
    IrpeCase(1025, 1025, "t", 133, batch=2, heads=4, head_dim=64),
]


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Draws on the GPU, and lets an error of a kernel end the test that launched it."""
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()


class Problem:
    """A case's inputs, gradients of its results, and an rpe_index of the same sizes."""

    def __init__(self, case: IrpeCase, dtype: torch.dtype) -> None:
        self.inputs = case.inputs(dtype, requires_grad=True)
        outputs = [x for x in ops.irpe_attention(*self.inputs) if x is not None]
        self.douts = [torch.randn_like(x) for x in outputs]
        self.rows = torch.randn(case.batch, case.heads, case.queries, case.buckets).to(dtype)
        self.pairs = torch.randn(case.batch, case.heads, case.queries, case.keys).to(dtype)
        self.index = torch.randint(0, case.buckets, (case.queries, case.keys), dtype=torch.int32)

    def tensors(self) -> list[Tensor]:
        return [*self.inputs.floats().values(), *self.douts, self.rows, self.pairs]

    def train(self) -> list[Tensor]:
        """Results, gradients, and both directions of rpe_index."""
        outputs = [x for x in ops.irpe_attention(*self.inputs) if x is not None]
        gradients = torch.autograd.grad(outputs, list(self.inputs.floats().values()), self.douts)
        lookups = ops.rpe_index(self.rows, self.index), ops.rpe_index_transposed(self.pairs, self.index, self.rows.shape[-1])
        return [*(x.detach() for x in outputs), *gradients, *lookups]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_larger_cases_match_the_reference(case, dtype):
    problem = Problem(case, dtype)
    ours = problem.train()
    finite = [x.masked_fill(x == -math.inf, 0) for x in ours]  # the lse of queries without keys

    def by_reference(inputs: IrpeInputs) -> list[Tensor]:
        outputs = [x for x in reference_irpe.irpe_attention(*inputs) if x is not None]
        outputs = [x.masked_fill(x == -math.inf, 0) for x in outputs]
        given = [dx.to(x.dtype) for x, dx in zip(outputs, problem.douts)]
        gradients = torch.autograd.grad(outputs, list(inputs.floats().values()), given)
        return [*(x.detach() for x in outputs), *gradients]

    exact, plain = by_reference(problem.inputs.cast(torch.float64)), by_reference(problem.inputs)
    for i, results in enumerate(zip(finite, plain, exact)):
        if dtype == torch.float64:
            close(results[0], results[2])
        else:
            at_most_twice_the_error(f"result {i}", *results, floor=2 if dtype.itemsize == 2 else None)
    assert torch.equal(ours[-2], reference_irpe.rpe_index(problem.rows, problem.index))
    summed = reference_irpe.rpe_index_transposed(problem.pairs.double(), problem.index, case.buckets)
    plain_sum = reference_irpe.rpe_index_transposed(problem.pairs, problem.index, case.buckets)
    at_most_twice_the_error("rpe_index_transposed", ours[-1], plain_sum, summed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_running_again_gives_the_same_bits(case, dtype):
    """Also while another stream keeps some of the multiprocessors, so that blocks start in other orders."""
    problem = Problem(case, dtype)
    first = problem.train()
    noise, other = torch.randn(1024, 1024), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(other):
            for _ in range(4):
                noise = (noise @ noise).sin()
        assert same_bits(problem.train(), first)
    torch.cuda.current_stream().wait_stream(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_kernels_run_on_the_current_stream(dtype):
    """On any other stream they would read the inputs before these are there."""
    problem = Problem(LARGER[0], dtype)
    expected = problem.train()
    kept = [x.detach().clone() for x in problem.tensors()]
    with torch.no_grad():
        for x in problem.tensors():
            x.zero_()
    slow, side = torch.randn(4096, 4096), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(50):
            slow = (slow @ slow).sin()
        with torch.no_grad():
            for x, y in zip(problem.tensors(), kept):
                x.copy_(y)
        ours = problem.train()
    side.synchronize()
    assert same_bits(ours, expected)


def test_nothing_waits_for_the_gpu():
    problem = Problem(LARGER[0], torch.float16)
    problem.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_captured_graph_equals_eager(case, dtype):
    static = Problem(case, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants everything to have run before, on another stream
        for _ in range(3):
            static.train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = static.train()
    for _ in range(3):
        with torch.no_grad():
            for x in static.tensors():
                x.normal_()
        for x in results:
            x.fill_(float("nan"))
        graph.replay()
        assert same_bits(results, static.train())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_more_blocks_than_the_second_axis_of_a_grid_holds(dtype):
    """batch * heads above 65535; every part of the batch alone gives the same bits."""
    case = IrpeCase(5, 6, "kqv", 7, batch=40000, heads=2)
    needs_memory(2 * GIB)
    problem = Problem(case, dtype)
    ours = problem.train()
    parts = []
    for first in range(0, case.batch, 10000):
        part = slice(first, first + 10000)
        sliced = {name: x.detach()[part].requires_grad_() for name, x in problem.inputs.floats().items()}
        alone = Problem(replace(case, batch=10000), dtype)
        alone.inputs = problem.inputs._replace(**sliced)
        alone.douts = [x[part] for x in problem.douts]
        alone.rows, alone.pairs, alone.index = problem.rows[part], problem.pairs[part], problem.index
        parts.append(alone.train())
    assert same_bits(ours, [torch.cat(each) for each in zip(*parts)])


def test_lookups_of_more_than_two_to_the_31_elements():
    needs_memory(16 * GIB)
    x = torch.randn(2, 260, 2050, 20, dtype=torch.float16)
    index = torch.randint(0, 20, (2050, 2050), dtype=torch.int32)
    y = ops.rpe_index(x, index)
    assert y.numel() > 1 << 31
    assert torch.equal(y[-1:, -2:], ops.rpe_index(x[-1:, -2:], index))
    summed = ops.rpe_index_transposed(y, index, 20)
    assert torch.equal(summed[-1:, -2:], ops.rpe_index_transposed(y[-1:, -2:], index, 20))


def test_attention_of_more_than_two_to_the_31_elements():
    """Slices of one fused projection; the last samples alone give the same bits."""
    needs_memory(40 * GIB)
    batch, positions, heads, head_dim = 9500, 197, 6, 64
    qkv = torch.randn(batch, positions, 3, heads, head_dim, dtype=torch.float16)
    assert qkv.numel() > 1 << 31
    rows = torch.randn(batch, heads, positions, 50, dtype=torch.float16)
    index = torch.randint(0, 50, (positions, positions), dtype=torch.int32)
    dout = torch.randn(batch, positions, heads, head_dim, dtype=torch.float16)

    def train(part: slice) -> list[Tensor]:
        leaves = [x[part].requires_grad_() for x in (*qkv.unbind(2), rows)]
        out, lse, _ = ops.irpe_attention(*leaves, index, scale=head_dim**-0.5)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout[part])]

    assert same_bits([x[-3:] for x in train(slice(None))], train(slice(-3, None)))


def growth(case: IrpeCase, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes by which the GPU's memory grows during a training step of the attention, and those of its results."""
    problem = Problem(case, dtype)
    del problem.pairs

    def train() -> list[Tensor]:
        outputs = [x for x in ops.irpe_attention(*problem.inputs) if x is not None]
        return [*outputs, *torch.autograd.grad(outputs, list(problem.inputs.floats().values()), problem.douts)]

    train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = train()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, sum(x.numel() * x.element_size() for x in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_training_step_holds_no_tensor_of_the_size_of_the_weights(dtype):
    """Scratch memory may have a size of its own, but what more samples add to the peak are their results."""
    case = IrpeCase(1025, 1025, "kqtv", 50, batch=8, heads=6, head_dim=32)
    needs_memory(4 * GIB)
    small, small_results = growth(case, dtype)
    large, large_results = growth(replace(case, batch=2 * case.batch), dtype)
    added, weights = large - small - (large_results - small_results), case.size * dtype.itemsize
    assert large >= large_results and added < weights / 4, f"{added / 1e6:.0f} MB beside the results"

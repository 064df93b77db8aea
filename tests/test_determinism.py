"""The same bits at any number of threads, run after run, and in every instruction set's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

import natrpb
from natrpb import ops

from .cases import CASES, Case
from .support import COMPILED, dtype_id, needs_compiled, run_with_isa

pytestmark = needs_compiled

# Enough work that several threads share it, beside the ugly shapes.
LARGER = [
    Case((40, 40), 7, batch=3, heads=3, head_dim=32),
    Case((700,), 13, dilation=3, batch=2, heads=2, head_dim=16),
    Case((12, 14, 13), 3, is_causal=(True, False, False), heads=2, head_dim=16),
    Case((35, 42), 7, shift=3, batch=2, heads=3, head_dim=32),
]
SOME = [*CASES[::4], *LARGER]


@pytest.fixture
def threads():
    """Sets torch's number of threads; the old one comes back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, lse, all gradients, the unfused ops' results, rows of unit length and their gradients."""
    torch.manual_seed(0)
    inputs = case.inputs(dtype, requires_grad=True)
    out, lse = ops.local_attention(*inputs)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    results = [out, lse, *torch.autograd.grad((out, lse), inputs.tensors(), (dout, dlse))]
    query, key, value = (x.detach().movedim(-2, 1) for x in inputs[:3])
    scores = ops.local_qk(query, key, inputs.rpb, inputs.pattern).detach()
    weights = scores.softmax(-1)
    results += [
        scores,
        ops.local_av(weights, value, inputs.pattern),
        ops.local_av_transposed(weights, query, inputs.pattern),
        ops.local_bias_grad(weights, inputs.pattern),
    ]
    factor = torch.rand(case.heads, dtype=lse.dtype, requires_grad=True)
    unit = ops.l2_normalize(inputs.query, factor)
    return [*results, unit, *torch.autograd.grad(unit, (inputs.query, factor), torch.randn_like(unit))]


@pytest.mark.not_emulated("the emulator runs on one thread")
@pytest.mark.not_on_cuda("the GPU's threads are not torch's")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_number_of_threads_does_not_change_a_bit(case, dtype, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(bits(case, dtype))
    for one, *others in zip(*results):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_running_again_gives_the_same_bits(case, threads):
    threads(2)
    first = bits(case, torch.float32)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, bits(case, torch.float32)))


@pytest.mark.not_emulated("only the CPU kernels keep scratch memory from call to call")
@pytest.mark.not_on_cuda("only the CPU kernels keep scratch memory from call to call")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kernel_size", range(2, 11))
def test_what_earlier_calls_left_in_scratch_memory_does_not_matter(kernel_size, dtype, threads):
    threads(1)  # whose scratch memory is the one that the earlier calls had
    for length in range(max(16, kernel_size), 39, 3):
        case = Case((length, length), kernel_size, head_dim=32)
        first = bits(case, dtype)
        inputs = case.inputs(dtype)
        leaves = [torch.full_like(x, math.nan, requires_grad=True) for x in inputs.tensors()]
        out, _ = ops.local_attention(*leaves, inputs.pattern, inputs.scale)
        torch.autograd.grad(out, leaves, torch.full_like(out, math.nan))
        assert all(torch.equal(one, other) for one, other in zip(first, bits(case, dtype), strict=True)), str(case)


def test_samples_of_a_batch_do_not_depend_on_each_other():
    inputs = LARGER[0].inputs(torch.float32)
    out, lse = ops.local_attention(*inputs)
    for sample in range(3):
        alone = [x[sample : sample + 1] for x in inputs[:3]]
        out_alone, lse_alone = ops.local_attention(*alone, *inputs[3:])
        assert torch.equal(out[sample], out_alone[0]) and torch.equal(lse[sample], lse_alone[0])


def test_deterministic_mode_of_torch_is_accepted():
    torch.use_deterministic_algorithms(True)
    try:
        bits(SOME[0], torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


def cpu_only(test):
    reason = "instruction sets are the CPU kernels'"
    return pytest.mark.not_emulated(reason)(pytest.mark.not_on_cuda(reason)(test))


INSTRUCTION_SETS = natrpb.info()["isa_available"] if COMPILED else []
EVERY_OTHER = CASES[1::2]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def save_results(path: str) -> None:
    """Writes the results of many cases in all dtypes, for comparison with another process."""
    torch.save([bits(case, dtype) for dtype in TOLERANCE for case in EVERY_OTHER], path)


@cpu_only
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_of_this_machine_gives_the_same_results(isa, tmp_path):
    """Up to rounding, and relative to the largest entry."""
    if isa == natrpb.info()["isa"]:
        pytest.skip("the instruction set of this very process")
    path = tmp_path / "results.pt"
    assert run_with_isa(isa, f"from tests.test_determinism import save_results as s; s({str(path)!r})") == ""
    theirs = iter(torch.load(path))
    for dtype, tolerance in TOLERANCE.items():
        for case in EVERY_OTHER:
            for ours, other in zip(bits(case, dtype), next(theirs), strict=True):
                assert torch.equal(ours.isinf(), other.isinf())
                ours, other = (x.double().masked_fill(x.isinf(), 0) for x in (ours, other))
                if ours.numel():
                    error = (ours - other).abs().max() / ours.abs().max().clamp(min=1)
                    assert error <= tolerance, f"{case} {dtype}: {error:.1e}"


@cpu_only
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_instruction_set_is_chosen_by_the_environment(isa):
    assert run_with_isa(isa, "import natrpb; print(natrpb.info()['isa'])") == isa


@cpu_only
@pytest.mark.skipif(not INSTRUCTION_SETS, reason="natrpb was built without its compiled ops")
def test_unknown_instruction_set_in_the_environment_is_passed_over_and_named():
    script = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import natrpb
(warning,) = [w for w in said if "NATRPB_ISA" in str(w.message)]
assert "got 'no-such-set'" in str(warning.message) and warning.filename == "<string>"
print(natrpb.info()["isa"])
"""
    assert run_with_isa("no-such-set", script) in INSTRUCTION_SETS

"""The fused op never stores the attention weights: no allocation of their size, and no growth of the process by it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from natrpb import ops

from .cases import NAT_STAGES, Case
from .support import needs_compiled

pytestmark = [needs_compiled, pytest.mark.not_on_cuda("counts the CPU's memory; test_cuda.py counts the GPU's")]

# Every tensor of these calls is smaller than a single [B, h, *, T] of weights would be.
CASES = [
    NAT_STAGES[0],
    Case((56, 56), 7, shift=3, heads=3, head_dim=32),
    Case((40, 40), 13, heads=4, head_dim=8),
    Case((48, 47), 7, dilation=3, heads=4, head_dim=8),
    Case((47, 48), 11, is_causal=(True, False), stride=(1, 3), heads=3, head_dim=8),
    Case((3000,), 255, heads=2, head_dim=16),
    Case((10, 12, 11), 5, heads=3, head_dim=8),
    Case((48, 48), 12, shift=6, heads=4, head_dim=8),
]


def largest_allocation(call) -> int:
    """Bytes of the largest block that torch's allocator hands out during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def test_the_measure_sees_the_weights_of_the_unfused_op():
    case = CASES[0]
    query = torch.randn(case.batch, case.heads, *case.spatial, case.head_dim)
    assert largest_allocation(lambda: ops.local_qk(query, query, None, case.pattern)) == 4 * case.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_allocate_nothing_of_the_size_of_the_weights(case, dtype):
    inputs = case.inputs(dtype, requires_grad=True)
    assert max(x.numel() for x in inputs.tensors()) < case.size, "the case tells them apart"

    def train():
        out, lse = ops.local_attention(*inputs)
        (out.float().sum() + lse.sum()).backward()

    train()
    assert largest_allocation(train) < 4 * case.size


SCRIPT = """
import resource, sys, torch
from natrpb import na2d

def step(side):
    query, key, value = (torch.zeros(1, side, side, 4, 8, requires_grad=True) for _ in range(3))
    rpb = torch.zeros(4, 25, 25, requires_grad=True)
    na2d(query, key, value, 13, rpb=rpb).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

step(16)
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts kilobytes on Linux only")
def test_process_grows_by_less_than_the_weights():
    side = 128
    script = subprocess.run([sys.executable, "-c", SCRIPT, str(side)], capture_output=True, text=True, check=True)
    grown = int(script.stdout) * 1024
    tensors = 12 * 4 * math.prod((side, side, 4, 8))  # query, key, value, out, their gradients, and room to spare
    weights = 4 * math.prod((side, side, 4, 13, 13))
    assert tensors < weights
    assert grown < tensors + weights / 4

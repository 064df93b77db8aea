"""The benchmarks of image relative position encoding: every contender passes the check that precedes timing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_cases, gpu_launch
from benchmarks.harness import OURS
from benchmarks.irpe import attention_problem, bucket_map, index_backward_problem, index_problem, model_problem

from .support import needs_compiled
from .test_benchmarks import measured

pytestmark = needs_compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("problem", "peers"),
    [
        pytest.param(lambda dtype: index_problem(2, dtype, False, side=4), ["indexing"], id="forward"),
        pytest.param(lambda dtype: index_problem(2, dtype, True, side=4), ["indexing"], id="both"),
        pytest.param(lambda dtype: index_backward_problem(2, dtype, side=4), ["indexing", "scatter_add"], id="backward"),
        pytest.param(
            lambda dtype: attention_problem(2, dtype, False, side=4), ["indexing", "SDPA without encoding"], id="attention"
        ),
        pytest.param(
            lambda dtype: attention_problem(2, dtype, True, side=4), ["indexing", "SDPA without encoding"], id="training"
        ),
    ],
)
def test_contenders_agree(problem, peers, dtype):
    line = measured(problem(dtype))
    assert not line.refused
    assert set(line.timings) <= {OURS, *peers} and (dtype != torch.float32 or not line.absent)


@pytest.mark.parametrize("mode", gpu_cases.TENSORS)
def test_problems_of_a_gpu(mode):
    problem = gpu_cases.irpe_attention(torch.float32, mode, batch=2, side=4)
    line = measured(problem)
    assert not line.refused and not line.absent
    forward = gpu_cases.irpe_attention(torch.float32, gpu_cases.FORWARD, batch=2, side=4)
    both = gpu_cases.irpe_attention(torch.float32, gpu_cases.TRAINING, batch=2, side=4)
    assert problem.flops == {"forward": forward.flops, "backward": both.flops - forward.flops}.get(mode, both.flops)
    tensors, lse = {"forward": (4, 0), "backward": (8, 1), "forward+backward": (12, 2)}[mode]
    assert problem.bytes == 2 * 17 * 6 * 4 * (64 * tensors + lse)


def test_cases_for_sanitizers_have_every_feature():
    cases = gpu_launch.small_irpe_cases()
    assert {letter for case in cases for letter in case.on} == set("kqtv")
    assert any(case.terms and case.padding and case.mask for case in cases)
    assert any(case.buckets > 512 for case in cases) and any(case.value_dim > 64 for case in cases)


def test_a_whole_model():
    line = measured(model_problem(1, True, depth=2, embed_dim=384, num_classes=10))
    assert not line.refused and not line.absent
    assert 0 < line.attention_share < 1


def test_map_is_that_of_the_published_models():
    index, buckets = bucket_map()
    assert index.shape == (197, 197) and index.dtype == torch.int32 and buckets == 50
    assert (index[0] == 49).all() and (index[:, 0] == 49).all() and index[1:, 1:].max() == 48 and index[1, 1] == 24

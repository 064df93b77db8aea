"""What the ops of the library say of tensors that do not fit each other; the functions above them check most of it first."""

from __future__ import annotations

import pytest
import torch

from natrpb import ops

from .cases import Case
from .support import close, needs_compiled

pytestmark = needs_compiled

CASE = Case((7, 9), (3, 4), batch=2, value_dim=5)
NAMES = ("dout", "dlse", "query", "key", "value", "rpb", "out", "lse")


def call(wrong: str, change, needs_drpb: bool = True) -> tuple[torch.Tensor, ...]:
    """The backward of CASE with one of its tensors changed, on the same numbers in every call."""
    torch.manual_seed(0)
    inputs = CASE.inputs(torch.float32)
    out, lse = ops.local_attention(*inputs)
    tensors = dict(zip(NAMES, (out.clone(), lse.clone(), *inputs[:4], out, lse)))
    tensors[wrong] = change(tensors[wrong])
    return torch.ops.natrpb.local_attention_backward(*tensors.values(), *inputs.pattern, inputs.scale, needs_drpb)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "query"])
def test_names_the_tensor_of_another_shape(name):
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        call(name, lambda x: x[:, :-1])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "query"])
def test_names_the_tensor_of_another_dtype(name):
    with pytest.raises(RuntimeError, match=rf"\b{name} must be float32"):
        call(name, torch.Tensor.double)


def test_says_what_came():
    with pytest.raises(RuntimeError, match=r"out must have shape \[2, 7, 9, 2, 5\], got \[2, 7, 9, 2, 4\]"):
        call("out", lambda x: x[..., :-1])
    with pytest.raises(RuntimeError, match="query must be float64, float32, bfloat16 or float16"):
        call("query", torch.Tensor.int)


def test_the_tables_gradient_is_formed_where_it_is_needed():
    *gradients, drpb = call("rpb", lambda x: x, needs_drpb=False)
    assert drpb.shape == (0,)
    for ours, beside_drpb in zip(gradients, call("rpb", lambda x: x)):
        close(ours, beside_drpb, 1e-5)
    *gradients, drpb = call("rpb", lambda x: None, needs_drpb=False)
    assert drpb.shape == (0,) and all(x.isfinite().all() for x in gradients)
    with pytest.raises(RuntimeError, match="needs_drpb must be false without rpb, got true"):
        call("rpb", lambda x: None)


@pytest.mark.parametrize(("kernel_size", "dilation", "kind"), [(2, 2**62, 0), (8, 2**63 - 8, 1), (2, 2**63 - 1, 2)], ids=str)
def test_dilations_whose_products_overflow(kernel_size, dilation, kind):
    x = torch.randn(1, 8, 1, 16)
    with pytest.raises(RuntimeError, match=f"dilation must be at most 2147483648, got {dilation} on axis 0"):
        torch.ops.natrpb.local_attention_forward(x, x, x, None, [kernel_size], [1], [dilation], [kind], [0], 1.0)

"""Forward mode of every op, alone and nested with itself and reverse mode, eager and compiled, against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from natrpb import ops, reference, reference_irpe

from .cases import Case
from .irpe_cases import IrpeCase
from .support import close, needs_compiled

ATTENTION = {
    "attention": Case((5,), 3, heads=2, head_dim=2),
    "attention-causal": Case((4, 3), (3, 2), is_causal=(True, False), heads=1, head_dim=2, value_dim=3),
    "attention-window": Case((4, 3), 2, shift=1, heads=1, head_dim=3, rpb=False),
}
IRPE = {
    "irpe": IrpeCase(3, 4, "kqtv", 3, heads=1, head_dim=2, batch=1),
    "irpe-masked": IrpeCase(4, 5, "kqv", 3, terms=2, padding=True, mask=True, heads=1, head_dim=2, value_dim=1),
}
CALLS = [*ATTENTION, *IRPE, "qk", "av", "av_transposed", "bias_grad", "l2_normalize", "rpe_index", "rpe_index_transposed"]

# Which mode each derivative takes, the first one innermost.
ORDERS = ["".join(modes) for count in (1, 2, 3) for modes in itertools.product("fr", repeat=count)]

Function = Callable[..., Tensor]


def call(name: str) -> tuple[list[Tensor], Function, Function]:
    """Tensors, and a scalar function of them on the ops and on the reference."""
    if name in ATTENTION:
        *tensors, pattern, scale = ATTENTION[name].inputs()

        def run(module, query, key, value, rpb=None):
            return module.local_attention(query, key, value, rpb, pattern, scale)
    elif name in IRPE:
        inputs = IRPE[name].inputs()
        tensors = inputs.floats().values()

        def run(module, *given):
            module = reference_irpe if module is reference else module
            results = module.irpe_attention(*inputs._replace(**dict(zip(inputs.floats(), given))))
            return [x.masked_fill(x.isinf(), 0) for x in results if x is not None]  # lse without keys
    elif name.startswith("rpe_index"):
        index = torch.randint(0, 3, (4, 5), dtype=torch.int32)
        tensors = [torch.randn(2, 2, 4, 3 if name == "rpe_index" else 5, dtype=torch.float64)]
        sizes = (3,) if name == "rpe_index_transposed" else ()

        def run(module, x):
            module = reference_irpe if module is reference else module
            return [getattr(module, name)(x, index, *sizes)]
    elif name == "l2_normalize":
        tensors = [torch.randn(2, 3, 2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)]

        def run(module, x, factor):
            return [module.l2_normalize(x, factor)]
    else:
        case = Case((4, 3), (2, 3), stride=(2, 1), heads=1, head_dim=2)
        inputs = case.inputs()
        query, key, value = (x.movedim(-2, 1) for x in inputs[:3])
        attn = torch.randn(*query.shape[:-1], case.pattern.num_slots, dtype=torch.float64)
        tensors = {"qk": [query, key, inputs.rpb], "av": [attn, value], "av_transposed": [attn, query], "bias_grad": [attn]}[
            name
        ]

        def run(module, *given):
            return [getattr(module, f"local_{name}")(*given, case.pattern)]

    def on(module) -> Function:
        return lambda *x: sum(y.sin().sum() for y in run(module, *x))

    return [x for x in tensors if x is not None], on(ops), on(reference)


def along(function: Function, mode: str, direction: Sequence[Tensor]) -> Function:
    """The directional derivative by forward (f) or reverse (r) mode, a function of the same tensors."""
    if mode == "f":
        return lambda *x: torch.func.jvp(function, x, tuple(direction))[1]

    def derivative(*x: Tensor) -> Tensor:
        gradients = torch.func.grad(function, tuple(range(len(x))))(*x)
        return sum((g * t).sum() for g, t in zip(gradients, direction))

    return derivative


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CALLS)
def test_nested_modes(name, order):
    tensors, ours, exact = call(name)
    for mode in order:
        direction = [torch.randn_like(x) for x in tensors]
        ours, exact = (along(function, mode, direction) for function in (ours, exact))
    expected = exact(*tensors)
    assert expected.abs() > 1e-3
    close(ours(*tensors), expected)


@pytest.mark.parametrize("name", CALLS)
def test_hessian_by_forward_over_forward(name):
    tensors, ours, exact = call(name)
    for one, other in itertools.product(range(len(tensors)), repeat=2):
        found, expected = (torch.func.jacfwd(torch.func.jacfwd(f, one), other)(*tensors) for f in (ours, exact))
        close(found, expected)


@needs_compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["f", "ff", "fr"])
@pytest.mark.parametrize("name", ["attention", "irpe", "l2_normalize"])
def test_compiled(name, order, backend):
    torch._dynamo.reset()
    tensors, ours, exact = call(name)
    for mode in order:
        direction = [torch.randn_like(x) for x in tensors]
        ours, exact = (along(function, mode, direction) for function in (ours, exact))
    close(torch.compile(ours, backend=backend)(*tensors), exact(*tensors))


@needs_compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["attention", "irpe", "l2_normalize"])
def test_compiled_dual_numbers(name, backend):
    torch._dynamo.reset()
    tensors, ours, exact = call(name)
    direction = [torch.randn_like(x) for x in tensors]

    def derivative(tensors, direction):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, direction)]
            return forward_ad.unpack_dual(ours(*duals)).tangent

    found = torch.compile(derivative, backend=backend)(tensors, direction)
    close(found, along(exact, "f", direction)(*tensors))

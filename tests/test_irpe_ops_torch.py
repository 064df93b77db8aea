"""The irpe ops inside PyTorch's machinery, their memory, their determinism, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import natrpb
from natrpb import ops, reference_irpe

from .irpe_cases import CASES, LARGE, SMALL, IrpeCase, IrpeInputs
from .support import COMPILED, close, dtype_id, needs_compiled, run_with_isa

MEDIUM = IrpeCase(19, 21, "kqtv", 11, padding=True, mask=True, batch=3, heads=2)


def schema_calls(case: IrpeCase, dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments of every op of the library for one case, requiring grad where the op can give one."""
    inputs = case.inputs(dtype, requires_grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = None if inputs.table is None else inputs.table.detach().to(wide).requires_grad_()
    floats = (*inputs[:4], inputs.key_rows, table)
    rest = (inputs.index_k, inputs.index_q, inputs.index_t, *inputs[9:])
    out, lse, binned = (None if x is None else x.detach() for x in reference_irpe.irpe_attention(*inputs))
    lse = lse.masked_fill(lse.isinf(), 0)
    dout, dlse = (torch.randn_like(x).requires_grad_() for x in (out, lse))
    dbinned = None if binned is None else torch.randn_like(binned).requires_grad_()
    binned = out.new_empty(0) if binned is None else binned
    index = torch.randint(0, case.buckets, (case.queries, case.keys), dtype=torch.int32)
    x = torch.randn(case.batch, case.heads, case.queries, case.buckets).to(dtype).requires_grad_()
    y = torch.randn(case.batch, case.heads, case.queries, case.keys).to(dtype).requires_grad_()
    return {
        "irpe_attention_forward": (*floats, *rest),
        "irpe_attention_backward": (dout, dlse, dbinned, *floats, out, lse, binned, *rest),
        "rpe_index": (x, index),
        "rpe_index_transposed": (y, index, case.buckets),
    }


OPS = ["irpe_attention_forward", "irpe_attention_backward", "rpe_index", "rpe_index_transposed"]


@needs_compiled
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case, name):
    calls = schema_calls(IrpeCase(**{**vars(case), "mask": False, "padding": False}), torch.float64)
    torch.library.opcheck(getattr(torch.ops.natrpb, name).default, calls[name])


@needs_compiled
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_opcheck_of_schema_and_fake_in_every_dtype(dtype, name):
    torch.library.opcheck(
        getattr(torch.ops.natrpb, name).default,
        schema_calls(IrpeCase(19, 21), dtype)[name],
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_compiled
@pytest.mark.parametrize("name", OPS)
def test_fakes_have_the_strides_of_the_results(name):
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in schema_calls(MEDIUM, torch.float32)[name]]
    op = getattr(torch.ops.natrpb, name)
    fakes = op(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
    actual = op(*arguments)
    for real, fake in zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, fakes)), strict=True):
        assert real.shape == fake.shape and real.dtype == fake.dtype and real.stride() == fake.stride()


def loss(inputs: IrpeInputs) -> Tensor:
    out, lse, binned = ops.irpe_attention(*inputs._replace(query=inputs.query * 2))
    return out.relu().sum() + lse.clamp(min=-9).sin().sum() + (0 if binned is None else binned.cos().sum())


def value_and_grads(function, inputs: IrpeInputs) -> list[Tensor]:
    leaves = inputs.cast(inputs.query.dtype)
    result = function(leaves)
    return [result.detach(), *torch.autograd.grad(result, list(leaves.floats().values()))]


@pytest.mark.not_emulated("torch.compile sees schemas and fakes, the same on every device")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_function_trains_in_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for case in (MEDIUM, IrpeCase(23, 17, "kqtv", 5, padding=True, mask=True, batch=2, heads=3)):
        inputs = case.inputs(requires_grad=True)
        for ours, eager in zip(value_and_grads(compiled, inputs), value_and_grads(loss, inputs)):
            close(ours, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_equals_casting_by_hand(dtype):
    inputs = MEDIUM.inputs(torch.float32)
    with torch.autocast(inputs.query.device.type, dtype=dtype):
        out, lse, binned = ops.irpe_attention(*inputs)
        assert ops.rpe_index(inputs.query_rows, inputs.index_k).dtype == torch.float32
    cast = inputs._replace(**{name: x.to(dtype) for name, x in inputs.floats().items() if name != "table"})
    assert out.dtype == binned.dtype == dtype and lse.dtype == torch.float32
    for one, other in zip((out, lse, binned), ops.irpe_attention(*cast)):
        assert torch.equal(one, other)
    inputs = MEDIUM.inputs(torch.float64)
    with torch.autocast(inputs.query.device.type, dtype=dtype):
        assert ops.irpe_attention(*inputs)[0].dtype == torch.float64


def test_vmap_over_any_of_the_floats():
    inputs = MEDIUM.inputs()
    names = list(inputs.floats())
    for mapped in ([0], [3, 4], [5], range(6)):
        stacked = {names[i]: torch.stack([getattr(inputs, names[i]), getattr(inputs, names[i]).cos()]) for i in mapped}
        ours = torch.vmap(lambda d: ops.irpe_attention(*inputs._replace(**d)))(stacked)
        for i in range(2):
            alone = ops.irpe_attention(*inputs._replace(**{name: x[i] for name, x in stacked.items()}))
            for one, other in zip(ours, alone):
                close(one[i], other)


def test_vmap_over_maps_is_refused():
    inputs = MEDIUM.inputs()
    maps = inputs.index_k.expand(2, -1, -1)
    with pytest.raises(ValueError, match="must be mapped over its first 6 arguments only"):
        torch.vmap(lambda index: ops.irpe_attention(*inputs._replace(index_k=index))[0])(maps)


def test_functional_transforms_agree_with_autograd():
    inputs = SMALL[0].inputs()

    def scalar(query: Tensor, rows: Tensor) -> Tensor:
        out, lse, binned = ops.irpe_attention(*inputs._replace(query=query, query_rows=rows))
        return out.sin().sum() + lse.sum() + binned.cos().sum()

    leaves = inputs.query.clone().requires_grad_(), inputs.query_rows.clone().requires_grad_()
    expected = torch.autograd.grad(scalar(*leaves), leaves)
    found = torch.func.grad(scalar, argnums=(0, 1))(*(x.detach() for x in leaves))
    for one, other in zip(found, expected):
        close(one, other)
    hessian = torch.func.hessian(scalar)(inputs.query, inputs.query_rows)
    rows = torch.autograd.functional.hessian(lambda q: scalar(q, inputs.query_rows), inputs.query)
    close(hessian, rows, 1e-9)


def largest_allocation(call) -> int:
    """Bytes of the largest block that torch's allocator hands out during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


@needs_compiled
@pytest.mark.not_emulated("takes minutes")
@pytest.mark.not_on_cuda("counts the CPU's memory; test_cuda.py counts the GPU's")
@pytest.mark.parametrize("batch", [1, 8], ids=lambda batch: f"B{batch}")
def test_nothing_of_the_size_of_the_weights_is_allocated(batch):
    """With a batch of one, a (batch, head) is cut into blocks whose parts of dkey and dvalue wait in a workspace."""
    case = IrpeCase(1000, 900, "kqtv", 12, batch=batch, heads=2, head_dim=8)
    inputs = case.inputs(torch.float32, requires_grad=True)
    weights = 4 * case.batch * case.heads * case.queries * case.keys

    def train():
        out, lse, binned = ops.irpe_attention(*inputs)
        torch.autograd.backward((out, lse, binned), [torch.ones_like(x) for x in (out, lse, binned)])

    train()
    assert largest_allocation(train) < weights / 4


@pytest.fixture
def threads():
    """Sets torch's number of threads; the old one comes back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(case: IrpeCase, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of the attention, and of both directions of rpe_index."""
    torch.manual_seed(0)
    inputs = case.inputs(dtype, requires_grad=True)
    outputs = [x.masked_fill(x.isinf(), 0) for x in ops.irpe_attention(*inputs) if x is not None]
    grads = torch.autograd.grad(outputs, list(inputs.floats().values()), [torch.randn_like(x) for x in outputs])
    x, y = (torch.randn(case.batch, case.heads, case.queries, n).to(dtype) for n in (case.buckets, case.keys))
    index = torch.randint(0, case.buckets, (case.queries, case.keys), dtype=torch.int32)
    return [*outputs, *grads, ops.rpe_index(x, index), ops.rpe_index_transposed(y, index, case.buckets)]


@needs_compiled
@pytest.mark.not_emulated("the emulator runs on one thread")
@pytest.mark.not_on_cuda("the GPU's threads are not torch's")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", [*LARGE, MEDIUM], ids=str)
def test_number_of_threads_does_not_change_a_bit(case, dtype, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(bits(case, dtype))
    for one, *others in zip(*found):
        assert all(torch.equal(one, other) for other in others)


@needs_compiled
def test_running_again_gives_the_same_bits(threads):
    threads(2)
    first = bits(LARGE[1], torch.float32)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, bits(LARGE[1], torch.float32)))


SOME = [*CASES[::3], MEDIUM]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
INSTRUCTION_SETS = natrpb.info()["isa_available"] if COMPILED else []


def save_results(path: str) -> None:
    """Writes the results of some cases in all dtypes, for comparison with another process."""
    torch.save([bits(case, dtype) for dtype in TOLERANCE for case in SOME], path)


@pytest.mark.not_emulated("instruction sets are the CPU kernels'")
@pytest.mark.not_on_cuda("instruction sets are the CPU kernels'")
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_of_this_machine_gives_the_same_results(isa, tmp_path):
    """Up to rounding, and relative to the largest entry."""
    if isa == natrpb.info()["isa"]:
        pytest.skip("the instruction set of this very process")
    path = tmp_path / "results.pt"
    script = f"from tests.test_irpe_ops_torch import save_results as s; s({str(path)!r})"
    assert run_with_isa(isa, script) == ""
    theirs = iter(torch.load(path))
    for dtype, tolerance in TOLERANCE.items():
        for case in SOME:
            for ours, other in zip(bits(case, dtype), next(theirs), strict=True):
                if ours.numel():
                    error = (ours.double() - other.double()).abs().max() / ours.double().abs().max().clamp(min=1)
                    assert error <= tolerance, f"{case} {dtype}: {error:.1e}"


ON_CUDA_KERNELS = torch.get_default_device().type == "cuda" or "emulator" in (natrpb.info()["library"] or "")


@needs_compiled
class TestEntriesOutOfRange:
    """Read or written by nowhere: CPU kernels refuse them, CUDA kernels, which cannot without waiting for the GPU, give NaN."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_buckets": 4}, "value_index must hold numbers from 0 to 3, got"),
            ({"index_q": lambda x: x - 20}, "query_index must hold numbers from 0 to 10, got -"),
            ({"index_k": lambda x: x.long() + 11}, "key_index must hold numbers from 0 to 10, got"),
            ({"index_t": lambda x: x + (1 << 30)}, "bias_index must hold numbers from 0 to 10, got"),
            pytest.param(
                {"index_k": lambda x: x.long() + (1 << 32)},
                "key_index must hold numbers from 0 to 10, got 42949",
                marks=pytest.mark.not_emulated("int64 maps are narrowed before kernels of a GPU, not before these"),
            ),
        ],
        ids=["v", "q", "k", "t", "long"],
    )
    def test_attention(self, change, message):
        inputs = MEDIUM.inputs(torch.float32, requires_grad=True)
        inputs = inputs._replace(**{name: x(getattr(inputs, name)) if callable(x) else x for name, x in change.items()})
        if not ON_CUDA_KERNELS:
            with pytest.raises(RuntimeError, match=message):
                ops.irpe_attention(*inputs)
            return
        out, _, binned = ops.irpe_attention(*inputs)
        assert (out if "num_buckets" not in change else binned).isnan().any()
        gradients = torch.autograd.grad((out, binned), list(inputs.floats().values()), (out.detach(), binned.detach()))
        assert any(gradient.isnan().any() for gradient in gradients)

    def test_rpe_index(self):
        x, y, index = torch.randn(2, 2, 4, 5), torch.randn(2, 2, 4, 6), torch.zeros(4, 6, dtype=torch.int32)
        index[1, 2], index[3, 4] = 5, -1
        if not ON_CUDA_KERNELS:
            for call in (lambda: ops.rpe_index(x, index), lambda: ops.rpe_index_transposed(y, index, 5)):
                with pytest.raises(RuntimeError, match="index must hold numbers from 0 to 4, got 5"):
                    call()
            return
        spread = ops.rpe_index(x, index)
        assert spread[:, :, 1, 2].isnan().all() and spread[:, :, 3, 4].isnan().all()
        assert spread.isnan().sum() == 8
        summed = ops.rpe_index_transposed(y, index, 5)
        assert summed[:, :, [1, 3]].isnan().any(-1).all() and not summed[:, :, [0, 2]].isnan().any()


@needs_compiled
class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"index_k": None}, "query_rows and index_k must be given together"),
            ({"key_rows": None}, "key_rows and index_q must be given together"),
            ({"index_t": None}, "table and index_t must be given together"),
            ({"num_buckets": 0}, "num_buckets must be positive, got 0"),
            ({"index_k": lambda x: x.float()}, "index_k must be int32 or int64"),
            ({"index_k": lambda x: x[:, :-1]}, r"index_k must have shape \[19, 21\], got \[19, 20\]"),
            ({"index_v": lambda x: x.expand(2, 3, -1, -1)}, r"index_v must have shape \[19, 21\]"),
            ({"query_rows": lambda x: x[:, :, :-1]}, r"query_rows must have shape \[3, 2, 19, 11\], got \[3, 2, 18, 11\]"),
            ({"key_rows": lambda x: x.double()}, "key_rows must have query's dtype"),
            ({"value": lambda x: x[:, :-1]}, r"value must have shape \[3, 21, 2, 8\], got \[3, 20, 2, 8\]"),
            ({"key": lambda x: x[..., :-1]}, r"key must have shape \[3, 21, 2, 8\], got \[3, 21, 2, 7\]"),
            ({"query": lambda x: x[0]}, r"query must have shape \[B, N, h, D\], got \[19, 2, 8\]"),
            ({"query": lambda x: x.int()}, "query must be float64, float32, bfloat16 or float16"),
            ({"table": lambda x: x[:1]}, r"table must have shape \[2, 11\], got \[1, 11\]"),
            ({"key_padding_mask": lambda x: x.int()}, "key_padding_mask must be bool"),
            ({"attn_mask": lambda x: x[:1]}, r"attn_mask must have shape \[19, 21\], got \[1, 21\]"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_attention(self, change, message):
        inputs = MEDIUM.inputs(torch.float32)
        change = {name: x(getattr(inputs, name)) if callable(x) else x for name, x in change.items()}
        with pytest.raises(RuntimeError, match=message):
            ops.irpe_attention(*inputs._replace(**change))

    def test_rpe_index(self):
        x, index = torch.randn(2, 2, 4, 5), torch.zeros(4, 6, dtype=torch.int32)
        for wrong, message in (
            ((x[0], index), r"x must have shape \[B, h, Nq, C\], got \[2, 4, 5\]"),
            ((x, index[0]), r"index must have shape \[Nq, Nk\], got \[6\]"),
            ((x, index[:3]), r"index must have shape \[4, 6\], got \[3, 6\]"),
            ((x.int(), index), "x must be float64, float32, bfloat16 or float16"),
        ):
            with pytest.raises(RuntimeError, match=message):
                ops.rpe_index(*wrong)
        y = torch.randn(2, 2, 4, 6)
        with pytest.raises(RuntimeError, match="num_buckets must not be negative, got -1"):
            ops.rpe_index_transposed(y, index, -1)
        with pytest.raises(RuntimeError, match=r"y must have shape \[B, h, Nq, Nk\]"):
            ops.rpe_index_transposed(y[0], index, 3)
        for terms in (0, 2):
            with pytest.raises(RuntimeError, match=rf"index must have shape \[Nq, Nk\], got \[{terms}, 4, 6\]"):
                ops.rpe_index_transposed(y, index.expand(terms, 4, 6), 3)

"""Random shapes against full score matrices, and random arguments against silence, crashes and wrong results."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import natrpb
from natrpb import ops, reference, rpb
from natrpb.patterns import CAUSAL, NEIGHBORHOOD, WINDOW, Pattern

from . import bruteforce
from .support import close, needs_compiled

many = settings(
    max_examples=600 if torch.get_default_device().type == "cpu" else 150,  # a GPU waits for the CPU in every small call
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def axes(draw, longest: int = 9, kinds=(NEIGHBORHOOD, CAUSAL, WINDOW)) -> tuple[int, tuple[int, int, int, int, int]]:
    """A length and the (kernel_size, stride, dilation, kind, shift) of one axis that fits it."""
    length = draw(st.integers(1, longest))
    kind = draw(st.sampled_from(kinds))
    if kind == WINDOW:
        window = draw(st.integers(1, length + 2))
        return length, (window, 1, 1, kind, draw(st.integers(0, window - 1)))
    kernel_size = draw(st.integers(1, length))
    dilation = draw(st.integers(1, length // kernel_size))
    return length, (kernel_size, draw(st.integers(1, kernel_size)), dilation, kind, 0)


@st.composite
def calls(draw):
    """Spatial shape, pattern, and the sizes of a fused call small enough for full score matrices."""
    kinds = draw(st.sampled_from([(NEIGHBORHOOD, CAUSAL, WINDOW), (WINDOW,)]))  # windows alone have kernels of their own
    per_axis = [draw(axes(longest, kinds)) for longest in draw(st.sampled_from([(40,), (9, 20), (20, 9), (5, 5, 5)]))]
    spatial = tuple(length for length, _ in per_axis)
    pattern = Pattern(*zip(*(axis for _, axis in per_axis)))
    sizes = {
        "batch": draw(st.integers(0, 2)),
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 16, 17, 32])),
        "value_dim": draw(st.sampled_from([1, 2, 3, 5, 8, 16, 31, 32])),
        "rpb": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.0, 0.3, -0.7, 1.0])),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }
    return spatial, pattern, sizes


@pytest.mark.not_emulated("calls no kernel")
@many
@given(axis=axes(longest=120))
def test_reference_and_enumeration_agree_on_long_axes(axis):
    length, numbers = axis
    keys, _, valid = reference.axis_keys(length, *numbers)
    for row, real, expected in zip(keys.tolist(), valid.tolist(), bruteforce.neighborhoods(length, *numbers)):
        assert tuple(key for key, here in zip(row, real) if here) == expected


@pytest.mark.not_emulated("calls no kernel")
@needs_compiled
@many
@given(axis=axes(longest=120))
def test_compiled_geometry_and_enumeration_agree_on_long_axes(axis):
    from natrpb import _core

    length, numbers = axis
    compiled = _core.Axis(length, *numbers)
    neighborhoods = bruteforce.neighborhoods(length, *numbers)
    seen_by: list[list[int]] = [[] for _ in range(length)]
    for query, expected in enumerate(neighborhoods):
        assert compiled.keys(query) == (expected[0], expected[-1], numbers[2])
        for key in expected:
            seen_by[key].append(query)
    for key, queries in enumerate(seen_by):
        first, last, step = compiled.queries(key)
        assert list(range(first, last + 1, step)) == queries


@many
@given(call=calls())
def test_output_lse_and_gradients_match_full_score_matrices(call):
    spatial, pattern, sizes = call
    torch.manual_seed(sizes["seed"])
    lead = (sizes["batch"], *spatial, sizes["heads"])

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    leaves = [leaf(*lead, sizes["head_dim"]), leaf(*lead, sizes["head_dim"]), leaf(*lead, sizes["value_dim"])]
    if sizes["rpb"]:
        leaves.append(leaf(sizes["heads"], *pattern.rpb_shape))
    table = leaves[3] if sizes["rpb"] else None
    weights = torch.randn(*lead, sizes["value_dim"], dtype=torch.float64), torch.randn(*lead, dtype=torch.float64)
    results = []
    for op in (ops.local_attention, bruteforce.dense_attention):
        out, lse = op(*leaves[:3], table, pattern, sizes["scale"])
        loss = (out * weights[0]).sum() + (lse * weights[1]).sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for ours, exact in zip(*results):
        close(ours, exact, 1e-9)


ODD_NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 10**30]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.sampled_from(["3", "", b"3", 1j, [], {}, object(), torch.tensor(3), torch.zeros(2, 2)]),
)
ODD_SIZES = st.one_of(ODD_NUMBERS, st.lists(ODD_NUMBERS, max_size=4), st.lists(st.integers(1, 4), max_size=4).map(tuple))
ODD_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


@st.composite
def odd_tensors(draw):
    """A tensor of any small shape, dtype, layout and device, or something that is none."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from([None, 3, "tensor", [1.0, 2.0], torch.Size((2, 3))]))
    shape = draw(st.lists(st.integers(0, 5), max_size=7))
    tensor = torch.ones(shape, dtype=draw(st.sampled_from(ODD_DTYPES)), device=draw(st.sampled_from(["cpu", "meta"])))
    change = draw(st.sampled_from(["none", "sparse", "transposed", "nan"]))
    if change == "sparse" and tensor.device.type == "cpu":
        return tensor.to_sparse()
    if change == "transposed" and tensor.dim() > 1:
        return tensor.transpose(draw(st.integers(0, tensor.dim() - 1)), -1)
    if change == "nan" and tensor.is_floating_point():
        return tensor.fill_(math.nan)
    return tensor


def almost(tensor: torch.Tensor):
    """A good tensor with one size, its dtype, its device or its layout changed."""
    at = st.integers(0, tensor.dim() - 1)
    return st.one_of(
        st.tuples(at, st.integers(0, 9)).map(
            lambda c: tensor.new_ones([*tensor.shape[: c[0]], c[1], *tensor.shape[c[0] + 1 :]])
        ),
        st.sampled_from(ODD_DTYPES).map(tensor.to),
        at.map(lambda dim: tensor.transpose(dim, -1)),
        at.map(lambda dim: tensor.select(dim, 0) if tensor.shape[dim] else tensor[None]),
        st.sampled_from([tensor.to("meta"), tensor.to_sparse(), tensor * math.nan, tensor * math.inf]),
        odd_tensors(),
    )


@st.composite
def odd_calls(draw, functions):
    """One of three functions (1-D, 2-D, 3-D), arguments of a good call with up to three of them spoilt, and which."""
    ndim = draw(st.integers(1, 3))
    batch, kernel_size, dilation = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    longest = kernel_size * dilation
    spatial = draw(st.lists(st.integers(longest, longest + 2), min_size=ndim, max_size=ndim))
    last, first = torch.ones(batch, *spatial, 2, 3), torch.ones(batch, 2, *spatial, 3)
    good = {
        "query": last,
        "key": last,
        "value": last[..., :2],
        "attn": torch.ones(*first.shape[:-1], kernel_size**ndim),
        "kernel_size": kernel_size,
        "stride": draw(st.integers(1, kernel_size)),
        "dilation": dilation,
        "is_causal": draw(st.booleans()),
        "rpb": torch.ones(2, *[2 * kernel_size - 1] * ndim),
        "scale": 0.5,
        "additional_keys": torch.ones(batch, 2, 2, 3),
        "additional_values": torch.ones(batch, 2, 2, 2),
        "dropout_p": 0.0,
        "return_lse": True,
    }
    function = functions[ndim - 1]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    if "return_lse" not in names:
        good |= {"query": first, "key": first, "value": first}
    arguments = {name: good[name] for name in names}
    spoilt = draw(st.sets(st.sampled_from(names), max_size=3))
    for name in spoilt:
        arguments[name] = draw(almost(good[name]) if isinstance(good[name], torch.Tensor) else ODD_SIZES)
    return function, arguments, spoilt


def outcome(function, arguments):
    """The call's result, or None after an error that says something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            sentence = str(error)
            assert len(sentence) > 10, f"{type(error).__name__} says nothing: {sentence!r}"
            assert "Traceback" not in sentence and "INTERNAL ASSERT" not in sentence, sentence
            assert any(name in sentence for name in (*arguments, "head_dim")), f"no argument is named: {sentence}"
            return None


@many
@given(call=odd_calls((natrpb.na1d, natrpb.na2d, natrpb.na3d)))
def test_fused_op_answers_or_says_what_is_wrong(call):
    function, arguments, spoilt = call
    result = outcome(function, arguments)
    if result is None:
        assert spoilt, "a good call failed"
        return
    out, lse = result if arguments["return_lse"] else (result, None)
    query, value = arguments["query"], arguments["value"]
    assert out.shape == (*query.shape[:-1], value.shape[-1]) and out.dtype == query.dtype
    assert lse is None or lse.shape == query.shape[:-1]
    overflows = isinstance(arguments["scale"], float) and abs(arguments["scale"]) > 1e37  # scores are three times the scale
    if not spoilt - {"kernel_size", "stride", "dilation", "is_causal", "scale"} and not overflows:
        close(out, torch.ones_like(out), 1e-5)  # every value is 1, so every average is


@many
@given(
    call=st.one_of(
        odd_calls((natrpb.na1d_qk, natrpb.na2d_qk, natrpb.na3d_qk)),
        odd_calls((natrpb.na1d_av, natrpb.na2d_av, natrpb.na3d_av)),
    )
)
def test_unfused_ops_answer_or_say_what_is_wrong(call):
    function, arguments, spoilt = call
    result = outcome(function, arguments)
    if result is None:
        assert spoilt, "a good call failed"
        return
    tensor = arguments.get("query", arguments.get("value"))
    assert result.shape[:-1] == tensor.shape[:-1] and result.dtype == tensor.dtype


@pytest.mark.not_emulated("calls no kernel")
@pytest.mark.parametrize(
    "function",
    [
        rpb.nat_index,
        rpb.swin_index,
        rpb.swin_to_nat,
        rpb.nat_to_swin,
        rpb.dense_bias,
        rpb.resize,
        rpb.log_spaced_coords,
    ],
    ids=lambda function: function.__name__,
)
@settings(many, max_examples=100)
@given(data=st.data())
def test_table_functions_answer_or_say_what_is_wrong(function, data):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    required = len(names) - len(function.__defaults__ or ())
    arguments = {}
    for position, name in enumerate(names):
        if position >= required and data.draw(st.booleans()):
            continue
        tensors = name in ("table", "rpb")
        arguments[name] = data.draw(odd_tensors() if tensors else st.one_of(st.integers(1, 5), small(ODD_SIZES)))
    outcome(function, arguments)


def small(strategy):
    """Leaves out sizes for which a right answer would not fit into memory."""

    def fits(drawn) -> bool:
        items = drawn if isinstance(drawn, list | tuple) else [drawn]
        return len(items) <= 3 and not any(isinstance(item, int) and item > 7 for item in items)

    return strategy.filter(fits)

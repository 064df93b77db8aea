"""Problems from cases: inputs, the exact answer, the work they need at least, and the contenders."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import natrpb
from natrpb import ops, reference
from tests.cases import Case

from . import flex, peers, windows
from .harness import AS_IS, OURS, TOLERANCE, Contender, Layout, Problem, Tensors, autograd_results


def _pack_projection(tensors: Tensors) -> Tensors:
    """query, key and value as slices of one [B, *, 3, h, d], as a projection leaves them."""
    qkv = torch.stack([tensors["query"], tensors["key"], tensors["value"]], dim=-3)
    return tensors | dict(zip(("query", "key", "value"), qkv.unbind(-3)))


PACKED = Layout(_pack_projection, dict)


def in_fp32(ours: Contender) -> Contender:
    """The same on fp32 tensors: what storing half the bytes gains."""
    layout = Layout(lambda tensors: ours.layout.pack({name: x.float() for name, x in tensors.items()}), ours.layout.unpack)
    return replace(ours, name="in fp32", layout=layout)


def useful_flops(pairs: int, head_dim: int, train: bool) -> int:
    """Of `pairs` (query, key) pairs: 4 d for scores and weighted sums, and in the backward pass five such products of 2 d."""
    return pairs * head_dim * (14 if train else 4)


def attention_bytes(elements: int, itemsize: int, train: bool) -> int:
    """query, key, value read and out written; backward reads those three and dout, and writes three gradients."""
    return elements * itemsize * (11 if train else 4)


def pairs_of(case: Case) -> int:
    """(query, key) pairs of all heads and the whole batch; a causal or cut-off window has fewer than its slots."""
    valid = peers.pattern_index(case.pattern, case.spatial, torch.device("cpu"))[2]
    return case.batch * case.heads * int(valid.sum())


EXACT_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}  # of the keys that the reference gathers at a time


def exact_attention(case: Case) -> Callable[[Tensors, Tensor | None], Tensors]:
    """The reference in fp64, a few samples, or heads of one, at a time to bound its memory."""

    def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None) -> Tensor:
        return reference.local_attention(query, key, value, rpb, case.pattern, case.head_dim**-0.5)[0]

    def exact(tensors: Tensors, dout: Tensor | None) -> Tensors:
        run, value = autograd_results(attend), tensors["value"]
        results = {"out": torch.empty_like(value)}
        if dout is not None:
            results |= {name: torch.zeros_like(x) for name, x in tensors.items()}
        each = torch.Size(case.spatial).numel() * case.pattern.num_slots * case.head_dim  # elements of one head of a sample
        at_once = max(1, EXACT_ELEMENTS[value.device.type] // each)
        heads = min(case.heads, at_once)
        samples = max(1, at_once // case.heads)
        for b in range(0, case.batch, samples):
            for h in range(0, case.heads, heads):

                def part(name: str, x: Tensor, b: int = b, h: int = h) -> Tensor:
                    return x[h : h + heads] if name == "rpb" else x[b : b + samples, ..., h : h + heads, :]

                here = run({name: part(name, x) for name, x in tensors.items()}, None if dout is None else part("dout", dout))
                for name, x in here.items():
                    part(name, results[name]).add_(x) if name == "rpb" else part(name, results[name]).copy_(x)
        return results

    return exact


def neighborhood_problem(case: Case, dtype: torch.dtype, train: bool, wanted: Iterable[str]) -> Problem:
    query, key, value, rpb, _, _ = case.inputs(dtype)
    available = {
        "gather": lambda: peers.gather(case),
        "unfold": lambda: peers.unfold(case),
        "SDPA": lambda: peers.sdpa(case, train),
        "torch.compile": lambda: peers.compiled_gather(case),
        "FlexAttention": lambda: flex.neighborhood(case, train),
        "NATTEN": lambda: peers.natten(case),
    }
    attend = getattr(natrpb, f"na{case.ndim}d")
    arguments = dict(kernel_size=case.kernel_size, dilation=case.dilation, is_causal=case.is_causal)
    ours = Contender(OURS, lambda: functools.partial(attend, **arguments), AS_IS)
    available["in fp32"] = lambda: in_fp32(ours)
    return Problem(
        tensors=dict(query=query, key=key, value=value, rpb=rpb),
        dout=torch.randn_like(value) if train else None,
        exact=exact_attention(case),
        contenders=[ours, *(available[name]() for name in wanted)],
        flops=useful_flops(pairs_of(case), case.head_dim, train),
        bytes=attention_bytes(query.numel(), dtype.itemsize, train),
        tolerance=TOLERANCE[dtype],
    )


def projected_problem(case: Case, dtype: torch.dtype, train: bool) -> Problem:
    """From what a projection leaves, in training to its gradient."""
    query, key, value, rpb, _, _ = case.inputs(dtype)
    peers_of_windows = [] if case.shift is None else windows.projected_window_peers(case, dtype, train)
    return Problem(
        tensors=dict(query=query, key=key, value=value, rpb=rpb),
        dout=torch.randn_like(value) if train else None,
        exact=exact_attention(case),
        contenders=[*windows.packed_and_sliced(case), *peers_of_windows],
        flops=useful_flops(pairs_of(case), case.head_dim, train),
        bytes=attention_bytes(query.numel(), dtype.itemsize, train),
        tolerance=TOLERANCE[dtype],
    )


def window_problem(case: Case, dtype: torch.dtype, train: bool) -> Problem:
    query, key, value, rpb, _, _ = case.inputs(dtype)
    ours = Contender(OURS, lambda: windows.fused_attend(case), PACKED)
    return Problem(
        tensors=dict(query=query, key=key, value=value, rpb=rpb),
        dout=torch.randn_like(value) if train else None,
        exact=exact_attention(case),
        contenders=[ours, *windows.window_peers(case, dtype, train), *([in_fp32(ours)] if dtype == torch.bfloat16 else [])],
        flops=useful_flops(pairs_of(case), case.head_dim, train),
        bytes=attention_bytes(query.numel(), dtype.itemsize, train),
        tolerance=TOLERANCE[dtype],
    )


def cosine_problem(case: Case, dtype: torch.dtype, train: bool) -> Problem:
    """Windows with Swin v2's cosine scores, on slices of a projection; normalising counts as no useful work."""
    query, key, value, rpb, pattern, _ = case.inputs(dtype)
    swin = windows.Swin(case, dtype, train)
    swin.scale = 1.0
    attend = functools.partial(
        natrpb.window_attention, window_size=pattern.kernel_size, shift_size=pattern.shift, convention="nat"
    )

    def normalized(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor, logit_scale: Tensor) -> Tensor:
            factor = logit_scale.clamp(max=math.log(100)).exp()
            return attend(F.normalize(query, dim=-1) * factor[:, None], F.normalize(key, dim=-1), value, rpb)

        return run

    return Problem(
        tensors=dict(query=query, key=key, value=value, rpb=rpb, logit_scale=torch.rand(case.heads, dtype=dtype) + 2),
        dout=torch.randn_like(value) if train else None,
        exact=autograd_results(normalized(lambda *tensors: reference.local_attention(*tensors, pattern, 1.0)[0])),
        contenders=[
            Contender(OURS, lambda: attend, PACKED),
            Contender("normalised by torch", lambda: normalized(lambda *x: ops.local_attention(*x, pattern, 1.0)[0]), PACKED),
            Contender("Swin's path", lambda: normalized(swin.around(swin.attend)), swin.layout()),
        ],
        flops=useful_flops(pairs_of(case), case.head_dim, train),
        bytes=attention_bytes(query.numel(), dtype.itemsize, train),
        tolerance=5 * TOLERANCE[dtype],
    )


def block_problem(case: Case, dtype: torch.dtype, train: bool, compiled: bool = False) -> Problem:
    channels = case.heads * case.head_dim
    x = torch.randn(case.batch, *case.spatial, channels, dtype=dtype)
    tensors = dict(
        x=x,
        qkv_weight=torch.randn(3 * channels, channels, dtype=dtype) / channels**0.5,
        qkv_bias=torch.randn(3 * channels, dtype=dtype),
        proj_weight=torch.randn(channels, channels, dtype=dtype) / channels**0.5,
        proj_bias=torch.randn(channels, dtype=dtype),
        rpb=torch.randn(case.heads, *case.pattern.rpb_shape, dtype=dtype) / 2,
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        return reference.local_attention(query, key, value, rpb, case.pattern, case.head_dim**-0.5)[0]

    projections = 8 * channels * x.numel() * (3 if train else 1)
    return Problem(
        tensors=tensors,
        dout=torch.randn_like(x) if train else None,
        exact=autograd_results(windows.block(windows.of_slices(attend), case.heads)),
        contenders=windows.block_contenders(case, dtype, train, compiled),
        flops=useful_flops(pairs_of(case), case.head_dim, train) + projections,
        bytes=(5 if train else 2) * x.numel() * dtype.itemsize,  # x, out; dout, x, dx
        tolerance=5 * TOLERANCE[dtype],
    )


def unfused_problem(case: Case, dtype: torch.dtype, train: bool, which: str) -> Problem:
    """`local_qk` or `local_av` alone, heads-first, with the attention weights in memory."""
    query, key, value, rpb, pattern, _ = case.inputs(dtype)
    query, key, value = (x.movedim(-2, 1).contiguous() for x in (query, key, value))
    weights = torch.randn(*query.shape[:-1], pattern.num_slots, dtype=dtype).softmax(-1)
    dense, sparse = query.numel() * dtype.itemsize, weights.numel() * dtype.itemsize

    def natten() -> Callable[..., Tensor]:
        function = peers.natten_functions(case)[0 if which == "qk" else 1]
        return functools.partial(function, kernel_size=pattern.kernel_size, dilation=pattern.dilation)

    def qk_gather(query: Tensor, key: Tensor, rpb: Tensor) -> Tensor:
        return peers.gathered_scores(query, key, rpb, pattern).unflatten(2, case.spatial)

    def av_gather(attn: Tensor, value: Tensor) -> Tensor:
        return peers.gathered_sums(attn.flatten(2, -2), value, pattern)

    forward_bytes = 2 * dense + sparse
    if which == "qk":
        backward_bytes = 4 * dense + sparse  # query, key, dattn in; dquery, dkey out
        tensors, dout = dict(query=query, key=key, rpb=rpb), torch.randn_like(weights)
        own, plain = functools.partial(ops.local_qk, pattern=pattern), qk_gather
        exact = autograd_results(functools.partial(reference.local_qk, pattern=pattern))
    else:
        backward_bytes = 3 * dense + 2 * sparse  # attn, value, dout in; dattn, dvalue out
        tensors, dout = dict(attn=weights, value=value), torch.randn_like(value)
        own, plain = functools.partial(ops.local_av, pattern=pattern), av_gather
        exact = autograd_results(functools.partial(reference.local_av, pattern=pattern))
    return Problem(
        tensors=tensors,
        dout=dout if train else None,
        exact=exact,
        contenders=[Contender(OURS, lambda: own), Contender("gather", lambda: plain), Contender("NATTEN", natten)],
        flops=2 * pairs_of(case) * case.head_dim * (3 if train else 1),
        bytes=forward_bytes + (backward_bytes if train else 0),
        tolerance=TOLERANCE[dtype],
    )

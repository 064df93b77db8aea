"""The encodings before iRPE, each against its paper's formula written out with an encoding vector per pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import natrpb
from natrpb import irpe

from .support import close

B, H, D, DV = 2, 3, 4, 5


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def vectors(length: int, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    keys = length if keys is None else keys
    return draw(B, length, H, D), draw(B, keys, H, D), draw(B, keys, H, DV)


def per_pair(table: Tensor, queries: int, keys: int, start: int = 0) -> Tensor:
    """table [h or 1, D, 2 k + 1] -> the vector of every pair, [h, Nq, Nk, D], by clipped key minus query."""
    reach = table.shape[-1] // 2
    columns = [[max(-reach, min(reach, j - i - start)) + reach for j in range(keys)] for i in range(queries)]
    return table.expand(H, -1, -1)[:, :, torch.tensor(columns)].permute(0, 2, 3, 1)


def check(out: Tensor, leaves: list[Tensor], scores: Tensor, value: Tensor, extra: Tensor | None, excluded=None) -> None:
    """Compares with softmax(scores) [B, h, Nq, Nk] over value and a vector per pair [h, Nq, Nk, Dv]; and gradients."""
    if excluded is not None:
        scores = scores.masked_fill(excluded, float("-inf"))
    weights = scores.softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, value)
    if extra is not None:
        expected = expected + torch.einsum("bhij,hijd->bihd", weights, extra)
    close(out, expected.reshape(out.shape))
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, leaves, dout.reshape(expected.shape))):
        assert wanted.any()
        close(gradient, wanted)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])
@pytest.mark.parametrize("reach", [1, 3, 20])
def test_shaw(reach, shared, masked):
    heads = 1 if shared else H
    query, key, value = vectors(9)
    key_table, value_table = draw(heads, D, 2 * reach + 1), draw(heads, 5, DV)
    masks, excluded = {}, None
    if masked:
        pattern = torch.ones(9, 9, dtype=torch.bool).triu(1)
        padding = torch.zeros(B, 9, dtype=torch.bool)
        padding[1, 5:] = True
        masks, excluded = dict(attn_mask=pattern, key_padding_mask=padding), pattern | padding[:, None, None]
    out = natrpb.shaw_attention(query, key, value, key_table, value_table, **masks)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) + torch.einsum("bihd,hijd->bhij", query, per_pair(key_table, 9, 9))
    extra = per_pair(value_table.transpose(1, 2), 9, 9)
    check(out, [query, key, value, key_table, value_table], scores / D**0.5, value, extra, excluded)


def test_shaw_on_keys_only():
    query, key, value = vectors(6)
    table = draw(1, D, 7)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) + torch.einsum("bihd,hijd->bhij", query, per_pair(table, 6, 6))
    out = natrpb.shaw_attention(query, key, value, table, scale=0.3)
    check(out, [query, key, value, table], 0.3 * scores, value, None)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])
def test_huang(shared):
    query, key, value = vectors(7)
    table = draw(1 if shared else H, D, 5)
    a = per_pair(table, 7, 7)
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    scores = scores + torch.einsum("bihd,hijd->bhij", query, a) + torch.einsum("bjhd,hijd->bhij", key, a)
    check(natrpb.huang_attention(query, key, value, table), [query, key, value, table], scores / D**0.5, value, None)


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_transformer_xl(memory, scale):
    keys = 5 + memory
    query, key, value = vectors(5, keys)
    weight, u, v = draw(H * D, 6), draw(H, D), draw(H, D)
    table = (weight @ irpe.sinusoids(keys - 1, 6, device=weight.device).double()).unflatten(0, (H, D))
    causal = torch.arange(keys) > torch.arange(memory, keys)[:, None]
    out = natrpb.transformer_xl_attention(query, key, value, table, u, v, attn_mask=causal, scale=scale)
    scores = torch.zeros(B, H, 5, keys, dtype=torch.float64)
    for i, j in itertools.product(range(5), range(keys)):
        r = (weight @ irpe.sinusoids(keys - 1, 6, device=weight.device).double()[:, keys - 1 - (memory + i - j)]).unflatten(
            0, (H, D)
        )
        term = ((query[:, i] + u) * key[:, j]).sum(-1) + ((query[:, i] + v) * r).sum(-1)
        scores = scores + torch.nn.functional.pad(term[..., None, None], (j, keys - 1 - j, i, 4 - i))
    factor = D**-0.5 if scale is None else scale
    check(out, [query, key, value, weight, u, v], factor * scores, value, None, causal)


@pytest.mark.parametrize("kernel_size", [None, 3])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])
def test_sasa(kernel_size, shared):
    height, width = 3, 5
    query, key, value = vectors(height * width)
    rows, cols = draw(1 if shared else H, D // 2, 2 * height - 1), draw(H, D // 2, 5)
    maps = (x.unflatten(1, (height, width)) for x in (query, key, value))
    padding = torch.zeros(B, height, width, dtype=torch.bool)
    padding[0, :, 4] = True
    out = natrpb.sasa_attention(*maps, rows, cols, kernel_size, key_padding_mask=padding, scale=1.0)
    places = list(itertools.product(range(height), range(width)))
    reach = 2 if kernel_size is None else 1
    vector = torch.zeros(H, 15, 15, D, dtype=torch.float64)
    excluded = torch.zeros(15, 15, dtype=torch.bool)
    for (i, (qr, qc)), (j, (kr, kc)) in itertools.product(enumerate(places), repeat=2):
        r = rows.expand(H, -1, -1)[..., kr - qr + height - 1]
        c = cols[..., max(-2, min(2, kc - qc)) + 2]
        vector = vector.index_put((torch.arange(H), torch.tensor(i), torch.tensor(j)), torch.cat([r, c], -1))
        excluded[i, j] = kernel_size is not None and max(abs(kr - qr), abs(kc - qc)) > reach
    scores = torch.einsum("bihd,bjhd->bhij", query, key) + torch.einsum("bihd,hijd->bhij", query, vector)
    check(out, [query, key, value, rows, cols], scores, value, None, excluded | padding.flatten(1)[:, None, None])


@pytest.mark.parametrize("span", [None, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_axial(axis, span):
    sides = (4, 6)
    query, key, value = draw(B, *sides, H, D), draw(B, *sides, H, D), draw(B, *sides, H, DV)
    r_q, r_k, r_v = draw(1, D, 11), draw(H, D, 5), draw(H, 7, DV)
    padding = torch.zeros(B, *sides, dtype=torch.bool)
    padding[1, 1, 2] = True
    out = natrpb.axial_attention(query, key, value, axis, r_q, r_k, r_v, span, padding)
    length = sides[axis]
    results = []
    excluded = torch.zeros(length, length, dtype=torch.bool)
    if span:
        excluded = (torch.arange(length)[:, None] - torch.arange(length)).abs() > span // 2
    for line in range(sides[1 - axis]):
        q, k, v, pad = (x.select(2 - axis, line) for x in (query, key, value, padding))
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        scores = scores + torch.einsum("bihd,hijd->bhij", q, per_pair(r_q, length, length))
        scores = scores + torch.einsum("bjhd,hijd->bhij", k, per_pair(r_k, length, length))
        weights = (scores / D**0.5).masked_fill(excluded | pad[:, None, None], float("-inf")).softmax(-1)
        moved = per_pair(r_v.transpose(1, 2), length, length)
        results.append(torch.einsum("bhij,bjhd->bihd", weights, v) + torch.einsum("bhij,hijd->bihd", weights, moved))
    expected = torch.stack(results, 2 - axis)
    close(out, expected)
    leaves, dout = [query, key, value, r_q, r_k, r_v], torch.randn_like(out)
    for gradient, wanted in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout)):
        close(gradient, wanted)


def test_dropout_and_weights_come_through():
    query, key, value = vectors(6)
    table, value_table = draw(1, D, 5), draw(1, 5, DV)
    out, lse, weights = natrpb.shaw_attention(
        query, key, value, table, value_table, dropout_p=0.5, return_lse=True, return_weights=True
    )  # fmt: skip
    assert (weights == 0).any() and lse.shape == (B, 6, H)
    expected = torch.einsum("bhij,bjhd->bihd", weights, value)
    close(out, expected + torch.einsum("bhij,hijd->bihd", weights, per_pair(value_table.transpose(1, 2), 6, 6)))
    maps = (x.unflatten(1, (2, 3)) for x in (query, key, value))
    out, weights = natrpb.sasa_attention(*maps, draw(1, 2, 3), draw(1, 2, 3), return_weights=True)
    assert out.shape == (B, 2, 3, H, DV) and weights.shape == (B, H, 6, 6)
    maps = (x.unflatten(1, (2, 3)) for x in (query, key, value))
    assert natrpb.axial_attention(*maps, 0, dropout_p=1.0).eq(0).all()


def test_empty_batch():
    query = torch.zeros(0, 2, 3, H, D)
    assert natrpb.axial_attention(query, query, query, 1, torch.zeros(1, D, 5)).shape == query.shape
    assert natrpb.sasa_attention(query, query, query, torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).shape == query.shape
    flat = query.flatten(1, 2)
    assert natrpb.shaw_attention(flat, flat, flat, torch.zeros(1, D, 3), torch.zeros(1, 3, D)).shape == flat.shape


@pytest.mark.parametrize("kernel_size", [None, 3])
@pytest.mark.parametrize("shape", [(6, 6), (B, H, 6, 6)], ids=["pairs", "by-head"])
def test_sasa_with_masks_on_pairs(shape, kernel_size):
    query, key, value = (draw(B, 2, 3, H, d) for d in (D, D, DV))
    tables = draw(1, D // 2, 3), draw(1, D // 2, 5)
    excluded = torch.rand(shape) < 0.3
    excluded[..., range(6), range(6)] = False
    flat = [x.flatten(1, 2) for x in (query, key, value)]
    index = irpe.clipped_map_offsets(2, 3, 1, 2, device=query.device)
    halves = [torch.nn.functional.pad(t, p) for t, p in zip(tables, ((0, 0, 0, D // 2), (0, 0, D // 2, 0)))]
    far = (torch.arange(6) % 3 - (torch.arange(6) % 3)[:, None]).abs() > (1 if kernel_size else 9)
    expected = natrpb.irpe_attention(*flat, torch.cat(halves, -1), index, attn_mask=excluded | far)
    for mask in (excluded, torch.zeros(shape).masked_fill(excluded, -torch.inf)):
        out = natrpb.sasa_attention(query, key, value, *tables, kernel_size, mask)
        close(out.flatten(1, 2), expected)


@pytest.mark.parametrize("form", ["fp16", "wide-table", "autocast"])
def test_transformer_xl_in_fp16(form):
    """The products with u and v exceed what fp16 holds; a table may be wider than queries."""
    sequences = [x.detach().half() for x in vectors(6)]
    table, u, v = (300 * draw(*shape).detach().half() for shape in ((H, D, 7), (H, D), (H, D)))
    assert ((v - u)[:, None].double() @ table.double()).abs().max() > torch.finfo(torch.float16).max
    expected = natrpb.transformer_xl_attention(*(x.double() for x in (*sequences, table, u, v)), scale=1e-4)
    given = [*sequences, table.float() if form == "wide-table" else table, u, v]
    if form == "autocast":
        given = [x.float() for x in given]
    with torch.autocast(u.device.type, dtype=torch.float16, enabled=form == "autocast"):
        out = natrpb.transformer_xl_attention(*given, scale=1e-4)
    assert out.dtype == torch.float16
    close(out.double(), expected, 0.01)


SEQUENCE = torch.zeros(B, 6, H, D)
MAP = torch.zeros(B, 2, 3, H, D)
ROW = torch.zeros(3)
BAD = {
    "even-table": (lambda: natrpb.shaw_attention(*[SEQUENCE] * 3, torch.zeros(1, D, 4)), "key_table must have an odd number"),
    "even-value-table": (
        lambda: natrpb.shaw_attention(*[SEQUENCE] * 3, torch.zeros(1, D, 3), torch.zeros(1, 4, D)),
        "value_table must have an odd number",
    ),
    "heads": (lambda: natrpb.huang_attention(*[SEQUENCE] * 3, torch.zeros(2, D, 3)), r"must have shape \[3 or 1, 4, C\]"),
    "sasa-rank": (lambda: natrpb.sasa_attention(*[SEQUENCE] * 3, *[torch.zeros(1, 2, 3)] * 2), r"\[B, H, W, h, D\]"),
    "sasa-halves": (lambda: natrpb.sasa_attention(*[MAP] * 3, *[torch.zeros(1, 4, 3)] * 2), "row_table must have shape"),
    "sasa-kernel": (lambda: natrpb.sasa_attention(*[MAP] * 3, *[torch.zeros(1, 2, 3)] * 2, 4), "kernel_size must be odd"),
    "axis": (lambda: natrpb.axial_attention(*[MAP] * 3, 2), "axis must be 0"),
    "span": (lambda: natrpb.axial_attention(*[MAP] * 3, 1, span=2), "span must be odd"),
    "span-type": (lambda: natrpb.axial_attention(*[MAP] * 3, 1, span="3"), "span must be odd and positive, got '3'"),
    "shaw-query-rank": (lambda: natrpb.shaw_attention(*[ROW] * 4), r"query must have shape \[B, N, h, D\], got \[3\]"),
    "shaw-key-rank": (lambda: natrpb.shaw_attention(SEQUENCE, *[ROW] * 3), r"key must have shape \[B, N, h, D\], got \[3\]"),
    "shaw-value-rank": (
        lambda: natrpb.shaw_attention(SEQUENCE, SEQUENCE, ROW, torch.zeros(1, D, 3)),
        r"value must have shape \[B, Nk, h, Dv\], got \[3\]",
    ),
    "shaw-table-rank": (
        lambda: natrpb.shaw_attention(*[SEQUENCE] * 3, ROW),
        r"key_table must have shape \[h or 1, D, 2 k \+ 1\], got \[3\]",
    ),
    "shaw-value-table-rank": (
        lambda: natrpb.shaw_attention(*[SEQUENCE] * 3, torch.zeros(1, D, 3), ROW),
        r"value_table must have shape \[h or 1, 2 k \+ 1, Dv\], got \[3\]",
    ),
    "huang-table-rank": (lambda: natrpb.huang_attention(*[SEQUENCE] * 3, ROW), r"table must have shape \[h or 1, D, 2 k"),
    "xl-u": (
        lambda: natrpb.transformer_xl_attention(*[SEQUENCE] * 3, torch.zeros(H, D, 3), ROW, torch.zeros(H, D)),
        r"u must have shape \[h, D\], got \[3\]",
    ),
    "xl-v": (
        lambda: natrpb.transformer_xl_attention(*[SEQUENCE] * 3, torch.zeros(H, D, 3), torch.zeros(H, D), torch.zeros(D, H)),
        r"v must have shape \[3, 4\] \(h, D\), got \[4, 3\]",
    ),
    "xl-table": (
        lambda: natrpb.transformer_xl_attention(*[SEQUENCE] * 3, torch.zeros(2, D, 3), *[torch.zeros(H, D)] * 2),
        r"table must have shape \[3 or 1, 4, 2 k \+ 1\], got \[2, 4, 3\]",
    ),
    "xl-scale": (
        lambda: natrpb.transformer_xl_attention(*[SEQUENCE] * 3, torch.zeros(H, D, 3), *[torch.zeros(H, D)] * 2, scale="1"),
        "scale must be a finite number or None, got '1'",
    ),
    "sasa-key": (
        lambda: natrpb.sasa_attention(MAP, MAP.transpose(1, 2), MAP, *[torch.zeros(1, 2, 3)] * 2),
        r"key must have query's shape but for the last axis, \[2, 2, 3, 3, 4\], got \[2, 3, 2, 3, 4\]",
    ),
    "sasa-heads": (
        lambda: natrpb.sasa_attention(*[MAP] * 3, torch.zeros(2, 2, 3), torch.zeros(1, 2, 3)),
        r"row_table must have shape \[3 or 1, 4 / 2, 2 k \+ 1\], got \[2, 2, 3\]",
    ),
    "sasa-kernel-type": (
        lambda: natrpb.sasa_attention(*[MAP] * 3, *[torch.zeros(1, 2, 3)] * 2, "3"),
        "kernel_size must be odd and positive, got '3'",
    ),
    "sasa-mask": (
        lambda: natrpb.sasa_attention(*[MAP] * 3, *[torch.zeros(1, 2, 3)] * 2, 3, torch.zeros(6).bool()),
        r"attn_mask must have shape \[6, 6\] or \[2 or 1, 3 or 1, 6, 6\], got \[6\]",
    ),
    "sasa-padding": (
        lambda: natrpb.sasa_attention(*[MAP] * 3, *[torch.zeros(1, 2, 3)] * 2, key_padding_mask=torch.zeros(B, 3, 2).bool()),
        r"key_padding_mask must have shape \[2, 2, 3\], got \[2, 3, 2\]",
    ),
    "axial-query": (lambda: natrpb.axial_attention(*[ROW] * 3, 1), r"query must have shape \[B, H, W, h, D\], got \[3\]"),
    "axial-value": (
        lambda: natrpb.axial_attention(MAP, MAP, SEQUENCE, 1),
        r"value must have shape \[B, H, W, h, D\], got \[2, 6, 3, 4\]",
    ),
}
BAD_TYPES = {
    "shaw": (lambda: natrpb.shaw_attention(1, 2, 3, 4), r"query must be a tensor \[B, N, h, D\], got int"),
    "shaw-key": (lambda: natrpb.shaw_attention(SEQUENCE, 2, 3, 4), r"key must be a tensor \[B, N, h, D\], got int"),
    "shaw-table": (lambda: natrpb.shaw_attention(*[SEQUENCE] * 3, 4), r"key_table must be a tensor \[h or 1, D, 2 k"),
    "shaw-value": (
        lambda: natrpb.shaw_attention(SEQUENCE, SEQUENCE, 3, torch.zeros(1, D, 3)),
        r"value must be a tensor \[B, Nk, h, Dv\], got int",
    ),
    "shaw-value-table": (
        lambda: natrpb.shaw_attention(*[SEQUENCE] * 3, torch.zeros(1, D, 3), 5),
        r"value_table must be a tensor \[h or 1, 2 k \+ 1, Dv\], got int",
    ),
    "huang": (lambda: natrpb.huang_attention(1, 2, 3, 4), "query must be a tensor"),
    "xl": (lambda: natrpb.transformer_xl_attention(1, 2, 3, 4, 5, 6), "query must be a tensor"),
    "xl-u": (
        lambda: natrpb.transformer_xl_attention(*[SEQUENCE] * 3, torch.zeros(H, D, 3), 5, 6),
        r"u must be a tensor \[h, D\], got int",
    ),
    "sasa": (lambda: natrpb.sasa_attention(1, 2, 3, 4, 5), r"query must be a tensor \[B, H, W, h, D\], got int"),
    "sasa-table": (
        lambda: natrpb.sasa_attention(*[MAP] * 3, 4, 5),
        r"row_table must be a tensor \[3 or 1, 4 / 2, 2 k \+ 1\], got int",
    ),
    "sasa-mask": (
        lambda: natrpb.sasa_attention(*[MAP] * 3, *[torch.zeros(1, 2, 3)] * 2, 3, 1),
        "attn_mask must be a bool or floating-point tensor or None, got int",
    ),
    "axial": (lambda: natrpb.axial_attention(1, 2, 3, 0), r"query must be a tensor \[B, H, W, h, D\], got int"),
    "axial-key": (lambda: natrpb.axial_attention(MAP, 2, 3, 0), r"key must be a tensor \[B, H, W, h, D\], got int"),
    "axial-table": (lambda: natrpb.axial_attention(*[MAP] * 3, 0, 5), "key_table must be a tensor"),
    "axial-padding": (
        lambda: natrpb.axial_attention(*[MAP] * 3, 0, key_padding_mask=1),
        "key_padding_mask must be a bool tensor or None, got int",
    ),
}


@pytest.mark.not_emulated("calls no kernel")
@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.not_emulated("calls no kernel")
@pytest.mark.parametrize("call, message", BAD_TYPES.values(), ids=BAD_TYPES)
def test_bad_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()

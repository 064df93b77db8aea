"""Drop-in for NATTEN (https://github.com/SHI-Labs/NATTEN, MIT): modules and ops of versions 0.14 to 0.21 on this library's.

    from natrpb.compat import natten
    natten.install("0.17.5")    # before others import natten: `import natten` and `import natten.functional` find this

The modules and the fused and unfused ops of all those versions are there, whichever version is installed, and compute what
they did in the version that last had them: on every device, in every float type, with the bias trained fused, differentiable
to any order. The version settles what versions disagree about: order and defaults of the arguments of modules, of `na1d`,
`na2d`, `na3d` and, before 0.17, of `na3d_qk` and `na3d_av`. What steered NATTEN's kernels does nothing: backends and tiles
are accepted, and the version's switches remember what they were set to. A pickled module comes back as of its version, without
`install`. Not there are `attention`, variable lengths, autograd classes and counting of flops.

The ops and modules in this module itself are those of 0.17.5, the last version with a bias.
"""

from __future__ import annotations

import enum
import re
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from importlib.machinery import ModuleSpec

import torch
from torch import Tensor

from .. import _ext, functional, modules
from ..functional._checks import check_tensor

DEFAULT_VERSION = "0.17.5"

_OPS = (functional.na1d, functional.na2d, functional.na3d)
_MODULES = (modules.NeighborhoodAttention1D, modules.NeighborhoodAttention2D, modules.NeighborhoodAttention3D)


# ---- fused, heads-last: [B, *, heads, D] ----


@cache
def _op_of_0_17(attend: Callable) -> Callable:
    def op(
        query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None,
        additional_keys=None, additional_values=None, xformers_kwargs=None,
        *, stride=1, dropout_p=0.0, return_lse=False,
    ):  # fmt: skip
        return attend(
            query, key, value, kernel_size, stride, dilation, is_causal, rpb, scale,
            additional_keys, additional_values, dropout_p, return_lse,
        )  # fmt: skip

    return _named(op, attend)


@cache
def _op_of_0_20(attend: Callable) -> Callable:
    def op(
        query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
        additional_keys=None, additional_values=None, attention_kwargs=None, backend=None,
        q_tile_shape=None, kv_tile_shape=None, backward_q_tile_shape=None, backward_kv_tile_shape=None,
        backward_kv_splits=None, backward_use_pt_reduction=False, run_persistent_kernel=True,
        kernel_schedule=None, torch_compile=False, return_lse=False, *, rpb=None, dropout_p=0.0,
    ):  # fmt: skip
        return attend(
            query, key, value, kernel_size, stride, dilation, is_causal, rpb, scale,
            additional_keys, additional_values, dropout_p, return_lse,
        )  # fmt: skip

    return _named(op, attend, "0_20")


def _named(made, like, version: str = ""):
    """`made` under the name of what it stands for.

    Its qualified name is one of this module's, for pickle looks there; what is not of 0.17 has its version in it.
    """
    made.__name__, made.__module__ = like.__name__, __name__
    made.__qualname__ = f"_{like.__name__}_of_{version}" if version else like.__name__
    made.__doc__ = f"`natrpb.{like.__name__}`, with the arguments of a version of NATTEN."
    globals()[made.__qualname__] = made
    return made


def neighborhood_attention_generic(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    """`na1d`, `na2d` or `na3d` of 0.20, by the number of query's axes."""
    if not isinstance(query, Tensor) or not 4 <= query.dim() <= 6:
        got = list(query.shape) if isinstance(query, Tensor) else type(query).__name__
        raise ValueError(f"query must have shape [B, 1 to 3 spatial axes, heads, D], got {got}")
    return _op_of_0_20(_OPS[query.dim() - 4])(query, key, value, *args, **kwargs)


def merge_attentions(
    outputs: list[Tensor], lse_tensors: list[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attentions over parts of them.

    Args:
        outputs: of each part, [B, *, heads, D].
        lse_tensors: of each part, [B, *, heads], as `return_lse=True` gives them.

    Returns:
        out in the outputs' dtype and lse.

    Raises:
        ValueError: fewer than two parts, not one lse for every output, or shapes that do not fit each other.
    """
    if len(outputs) != len(lse_tensors) or len(outputs) < 2:
        raise ValueError(
            f"outputs and lse_tensors must be lists of one length, at least 2, got {len(outputs)} and {len(lse_tensors)}"
        )
    for name, given, shape in (("outputs", outputs, outputs[0].shape), ("lse_tensors", lse_tensors, outputs[0].shape[:-1])):
        for i, x in enumerate(given):
            if x.shape != shape:
                raise ValueError(f"{name}[{i}] must have shape {list(shape)}, got {list(x.shape)}")
    shares = torch.stack(list(lse_tensors))
    out = (torch.stack(list(outputs)) * shares.softmax(0)[..., None]).sum(0)
    return out.to(outputs[0].dtype), shares.logsumexp(0)


# ---- unfused, heads-first: [B, heads, *, D]; no scale is applied ----


def _check_additional(name: str, given, like: Tensor) -> None:
    check_tensor(name, given, 4, "[B, heads, T, D]")
    batch, heads, head_dim = like.shape[0], like.shape[1], like.shape[-1]
    if given.shape[:2] != (batch, heads) or given.shape[-1] != head_dim:
        raise ValueError(f"{name} must have shape [{batch}, {heads}, T, {head_dim}], got {list(given.shape)}")


def _qk(scores: Callable) -> Callable:
    """`scores`, followed by one score per additional key [B, heads, T, D]."""

    def op(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None) -> Tensor:
        attn = scores(query, key, kernel_size, dilation, is_causal, rpb)
        if additional_keys is None:
            return attn
        _check_additional("additional_keys", additional_keys, query)
        return torch.cat([attn, torch.einsum("bh...d,bhtd->bh...t", query, additional_keys.to(query.dtype))], dim=-1)

    return _named(op, scores)


def _av(sums: Callable) -> Callable:
    """`sums`; attn's last weights are those of additional values [B, heads, T, D]."""

    def op(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False) -> Tensor:
        if additional_values is None:
            return sums(attn, value, kernel_size, dilation, is_causal)
        _check_additional("additional_values", additional_values, value)
        slots = attn.shape[-1] - additional_values.shape[2]
        extra = torch.einsum("bh...t,bhtd->bh...d", attn[..., slots:].to(value.dtype), additional_values.to(value.dtype))
        return sums(attn[..., :slots], value, kernel_size, dilation, is_causal) + extra

    return _named(op, sums)


na1d_qk, na2d_qk, na3d_qk = map(_qk, (functional.na1d_qk, functional.na2d_qk, functional.na3d_qk))
na1d_av, na2d_av, na3d_av = map(_av, (functional.na1d_av, functional.na2d_av, functional.na3d_av))


def na1d_qk_with_bias(query, key, bias, kernel_size, dilation, additional_keys=None) -> Tensor:
    """`na1d_qk` of 0.15."""
    return na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_qk_with_bias(query, key, bias, kernel_size, dilation, additional_keys=None) -> Tensor:
    """`na2d_qk` of 0.15."""
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na3d_qk_with_bias(query, key, bias, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys=None) -> Tensor:
    """`na3d_qk` of 0.15: the first axis has sizes of its own."""
    sizes, steps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_qk(query, key, sizes, steps, additional_keys, rpb=bias)


def _sizes(rpb, kernel_size, dilation) -> tuple:
    """kernel_size and dilation; with one of them alone, which up to 0.14.4 was the dilation, K from rpb's size."""
    if dilation is not None:
        return kernel_size, dilation
    if not isinstance(rpb, Tensor):
        raise TypeError(f"rpb must be a tensor where the kernel size is not given, got {type(rpb).__name__}")
    return (rpb.shape[-1] + 1) // 2, kernel_size


def natten1dqkrpb(query, key, rpb, kernel_size, dilation=None) -> Tensor:
    """See `natten2dqkrpb`."""
    return na1d_qk(query, key, *_sizes(rpb, kernel_size, dilation), rpb=rpb)


def natten2dqkrpb(query, key, rpb, kernel_size, dilation=None) -> Tensor:
    """Scores with bias, [B, heads, H, W, K * K].

    With a fourth argument alone, which up to 0.14.4 was the dilation, rpb's size says what K is.
    """
    return na2d_qk(query, key, *_sizes(rpb, kernel_size, dilation), rpb=rpb)


def natten3dqkrpb(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation) -> Tensor:
    """Scores with bias, [B, heads, D0, H, W, K_d * K * K]."""
    return na3d_qk_with_bias(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation)


natten1dqk, natten2dqk = na1d_qk, na2d_qk


def natten3dqk(query, key, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys=None) -> Tensor:
    """Scores without bias, [B, heads, D0, H, W, K_d * K * K]; `na3d_qk` of 0.15."""
    return na3d_qk_with_bias(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys)


def natten1dav(attn, value, kernel_size, dilation=None) -> Tensor:
    """See `natten2dav`."""
    if dilation is None:
        kernel_size, dilation = attn.shape[-1], kernel_size
    return na1d_av(attn, value, kernel_size, dilation)


def natten2dav(attn, value, kernel_size, dilation=None) -> Tensor:
    """Weighted sums of values, [B, heads, H, W, D].

    With a third argument alone, which up to 0.14.4 was the dilation, the number of weights says what K is.
    """
    if dilation is None:
        kernel_size, dilation = round(attn.shape[-1] ** 0.5), kernel_size
    return na2d_av(attn, value, kernel_size, dilation)


def natten3dav(attn, value, kernel_size_d, kernel_size, dilation_d, dilation, additional_values=None) -> Tensor:
    """Weighted sums of values, [B, heads, D0, H, W, D]; `na3d_av` of 0.15."""
    sizes, steps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_av(attn, value, sizes, steps, additional_values)


# ---- modules ----


@cache
def _module_of_0_14_5(base: type) -> type:
    class Module(base):
        def __init__(
            self, dim, num_heads, kernel_size, dilation=1, bias=True, qkv_bias=True, qk_scale=None, attn_drop=0.0,
            proj_drop=0.0,
        ) -> None:  # fmt: skip
            super().__init__(
                dim, num_heads, kernel_size, dilation=dilation or 1, rel_pos_bias=bias, qkv_bias=qkv_bias,
                qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=proj_drop, pad_small_inputs=True,
            )  # fmt: skip

    return _named(Module, base, "0_14_5")


@cache
def _module_of_0_14_0(base: type) -> type:
    class Module(_module_of_0_14_5(base)):
        def __init__(
            self, dim, kernel_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0, dilation=None
        ) -> None:  # fmt: skip
            super().__init__(dim, num_heads, kernel_size, dilation, True, qkv_bias, qk_scale, attn_drop, proj_drop)

    return _named(Module, base, "0_14_0")


@cache
def _volume_module_of_0_15(base: type) -> type:
    class Module(_module_of_0_14_5(base)):
        def __init__(
            self, dim, num_heads, kernel_size, kernel_size_d=None, dilation=1, dilation_d=None, bias=True, qkv_bias=True,
            qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        ) -> None:  # fmt: skip
            sizes = (kernel_size_d or kernel_size, kernel_size, kernel_size)
            steps = (dilation_d or dilation or 1, dilation or 1, dilation or 1)
            super().__init__(dim, num_heads, sizes, steps, bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    return _named(Module, base, "0_15")


@cache
def _module_of_0_17(base: type) -> type:
    class Module(base):
        def __init__(
            self, dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False, qkv_bias=True,
            qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_experimental_ops=False,
        ) -> None:  # fmt: skip
            super().__init__(
                dim, num_heads, kernel_size, dilation=dilation, is_causal=is_causal, rel_pos_bias=rel_pos_bias,
                qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=proj_drop,
            )  # fmt: skip

    return _named(Module, base)


@cache
def _module_of_0_20(base: type) -> type:
    class Module(base):
        def __init__(
            self, embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False, qkv_bias=True, qk_scale=None,
            proj_drop=0.0, *, rel_pos_bias=False, attn_drop=0.0,
        ) -> None:  # fmt: skip
            super().__init__(
                embed_dim, num_heads, kernel_size, stride, dilation, is_causal, rel_pos_bias=rel_pos_bias,
                qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=proj_drop,
            )  # fmt: skip

    return _named(Module, base, "0_20")


# ---- switches ----


class _Switch:
    """Of NATTEN's kernels: nothing here depends on it, but whoever asks hears what it was set to."""

    def __init__(self, on: bool = False) -> None:
        self.on = on

    def use(self, mode: bool = True) -> bool:
        """Turns it on or off; whether it is on."""
        self.on = bool(mode)
        return self.on

    def is_on(self) -> bool:
        """Whether it is on."""
        return self.on


# Attention is fused and deterministic here, and at first these two say so.
_fused_na, _deterministic, _kv_parallelism, _flex, _flex_alone = (_Switch(on) for on in (True, True, False, False, False))
_tf32, _gemm_na, _tiled_na, _flex_compile, _flex_compile_backprop = (_Switch() for _ in range(5))
_tuned_forward, _tuned_backward, _thorough_forward, _thorough_backward = (_Switch() for _ in range(4))


def use_fused_na(mode=True, kv_parallel=True, use_flex_attention=False, force_flex_attention=False) -> None:
    """Turns four switches; with `mode=False` all of them off."""
    given = (True, kv_parallel, use_flex_attention, force_flex_attention)
    for switch, on in zip((_fused_na, _kv_parallelism, _flex, _flex_alone), given):
        switch.use(mode and on)


def use_autotuner(
    forward_pass=None, backward_pass=None, thorough_mode_forward=None, thorough_mode_backward=None,
    warmup_steps_forward=None, warmup_steps_backward=None, steps_forward=None, steps_backward=None,
) -> None:  # fmt: skip
    """Turns four switches, but those left at None."""
    given = (forward_pass, backward_pass, thorough_mode_forward, thorough_mode_backward)
    for switch, on in zip((_tuned_forward, _tuned_backward, _thorough_forward, _thorough_backward), given):
        switch.use(switch.on if on is None else on)


def is_autotuner_enabled() -> bool:
    """Whether it is on in the forward or in the backward pass."""
    return _tuned_forward.on or _tuned_backward.on


def allow_flex_compile(mode=True, backprop=False) -> None:
    """Turns two switches; with `mode=False` both off."""
    _flex_compile.use(mode)
    _flex_compile_backprop.use(mode and backprop)


class MemoryUsagePreference(enum.Enum):
    """How much memory NATTEN's backward pass was to take for its speed."""

    Default, Strict, Unrestricted = range(3)

    def is_set(self) -> bool:
        """Whether it is the one that was last set."""
        return self is _memory_usage


_memory_usage = MemoryUsagePreference.Default


def set_memory_usage_preference(pref: str = "default") -> None:
    """Sets it to "default", "strict" or "unrestricted"."""
    global _memory_usage
    if pref not in ("default", "strict", "unrestricted"):
        raise ValueError(f"pref must be 'default', 'strict' or 'unrestricted', got {pref!r}")
    _memory_usage = MemoryUsagePreference[pref.capitalize()]


def get_memory_usage_preference() -> MemoryUsagePreference:
    """The one that was last set."""
    return _memory_usage


is_memory_usage_default, is_memory_usage_strict, is_memory_usage_unrestricted = (one.is_set for one in MemoryUsagePreference)
use_fna, is_fna_enabled, is_fused_na_enabled = use_fused_na, _fused_na.is_on, _fused_na.is_on
use_flex_attention, should_use_flex_attention = partial(use_fused_na, use_flex_attention=True), _flex.is_on
force_flex_attention, should_force_flex_attention = partial(use_flex_attention, force_flex_attention=True), _flex_alone.is_on
use_deterministic_algorithms, are_deterministic_algorithms_enabled = _deterministic.use, _deterministic.is_on
use_kv_parallelism_in_fused_na, is_kv_parallelism_in_fused_na_enabled = _kv_parallelism.use, _kv_parallelism.is_on
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled = _tf32.use, _tf32.is_on
use_gemm_na, is_gemm_na_enabled = _gemm_na.use, _gemm_na.is_on
use_tiled_na, is_tiled_na_enabled = _tiled_na.use, _tiled_na.is_on
enable_tf32, enable_gemm_na, enable_tiled_na = _tf32.use, _gemm_na.use, _tiled_na.use
disable_tf32, disable_gemm_na, disable_tiled_na = (partial(switch.use, False) for switch in (_tf32, _gemm_na, _tiled_na))
disable_autotuner = partial(use_autotuner, False, False, False, False)
is_autotuner_enabled_for_forward, is_autotuner_enabled_for_backward = _tuned_forward.is_on, _tuned_backward.is_on
is_autotuner_thorough_for_forward, is_autotuner_thorough_for_backward = _thorough_forward.is_on, _thorough_backward.is_on
disable_flex_compile, is_flex_compile_allowed = partial(allow_flex_compile, False), _flex_compile.is_on
allow_flex_compile_backprop, is_flex_compile_backprop_allowed = _flex_compile_backprop.use, _flex_compile_backprop.is_on
disable_flex_compile_backprop = partial(allow_flex_compile_backprop, False)
HAS_LIBNATTEN = True


def has_cuda() -> bool:
    """Whether the CUDA kernels are loaded and there is a GPU for them."""
    return "cuda" in _ext.info()["devices"]


def _always(device_index=None) -> bool:
    """True: of this library that is always so."""
    return True


def _never(device_index=None) -> bool:
    """False: NATTEN's unfused kernels by matrix products, with TF32 for fp32, have no counterpart here."""
    return False


has_fna = has_fused_na = has_half = has_bfloat = _always
has_gemm = has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = _never


# ---- versions ----

na1d, na2d, na3d = map(_op_of_0_17, _OPS)
NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D = map(_module_of_0_17, _MODULES)


def _made(make_op: Callable, make_module: Callable) -> dict[str, object]:
    return {like.__name__: make_op(like) for like in _OPS} | {like.__name__: make_module(like) for like in _MODULES}


# From which version on: how ops and modules take their arguments, on three axes otherwise in 0.15 and 0.16, and submodules.
# NB: by `context` the official NAT code tells that it has 0.17 or a later one.
_IN_VOLUMES = {
    "na3d_qk": natten3dqk,
    "na3d_av": natten3dav,
    "NeighborhoodAttention3D": _volume_module_of_0_15(modules.NeighborhoodAttention3D),
}
_EPOCHS = (
    ((0, 14, 0), _made(_op_of_0_17, _module_of_0_14_0) | _IN_VOLUMES, ("functional",)),
    ((0, 14, 5), _made(_op_of_0_17, _module_of_0_14_5) | _IN_VOLUMES, ("functional",)),
    ((0, 17, 0), _made(_op_of_0_17, _module_of_0_17), ("functional", "context")),
    ((0, 20, 0), _made(_op_of_0_20, _module_of_0_20), ("functional", "context")),
)

# From which version on and before which one there are these names.
_SWITCHES = {
    ((0, 15, 0), (0, 20, 0)): """
        has_cuda has_half has_bfloat has_gemm has_tf32_gemm has_fp32_gemm has_fp64_gemm
        enable_tf32 disable_tf32 enable_gemm_na disable_gemm_na enable_tiled_na disable_tiled_na""",
    ((0, 17, 0), (0, 20, 0)): """
        has_fna has_fused_na use_fna is_fna_enabled use_fused_na is_fused_na_enabled
        use_tf32_in_gemm_na is_tf32_in_gemm_na_enabled use_gemm_na is_gemm_na_enabled use_tiled_na is_tiled_na_enabled
        use_autotuner disable_autotuner is_autotuner_enabled is_autotuner_enabled_for_forward
        is_autotuner_enabled_for_backward is_autotuner_thorough_for_forward is_autotuner_thorough_for_backward""",
    ((0, 17, 5), (0, 20, 0)): """
        use_flex_attention should_use_flex_attention force_flex_attention should_force_flex_attention""",
    ((0, 17, 0), (0, 22, 0)): """
        use_deterministic_algorithms are_deterministic_algorithms_enabled
        use_kv_parallelism_in_fused_na is_kv_parallelism_in_fused_na_enabled
        MemoryUsagePreference set_memory_usage_preference get_memory_usage_preference
        is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted""",
    ((0, 20, 0), (0, 22, 0)): """
        HAS_LIBNATTEN allow_flex_compile disable_flex_compile is_flex_compile_allowed
        allow_flex_compile_backprop disable_flex_compile_backprop is_flex_compile_backprop_allowed""",
}


def _release(version: str) -> tuple[int, ...]:
    """Its three numbers, by PEP 440: a missing patch is 0, and a local part, +torch260cu126, tells no versions apart."""
    form = r"(\d+)\.(\d+)(?:\.(\d+))?(?:\+[a-z0-9]+(?:[._-][a-z0-9]+)*)?"
    found = re.fullmatch(form, version, re.ASCII | re.IGNORECASE) if isinstance(version, str) else None
    release = tuple(int(part or 0) for part in found.groups()) if found else ()
    if not (0, 14, 0) <= release < (0, 22, 0):
        raise ValueError(f"version must be one of NATTEN's from 0.14.0 to 0.21, as in {DEFAULT_VERSION!r}, got {version!r}")
    return release


def _surface(version: str) -> tuple[dict[str, object], tuple[str, ...]]:
    """All public names as `version` has them, and its submodules."""
    release = _release(version)
    names = {name: value for name, value in globals().items() if getattr(value, "__module__", None) == __name__}
    names = {name: value for name, value in names.items() if not name.startswith("_") and value is not install}
    for (first, end), switches in _SWITCHES.items():
        for name in switches.split():
            names.pop(name, None)
            if first <= release < end:
                names[name] = globals()[name]
    _, made, submodules = [epoch for epoch in _EPOCHS if epoch[0] <= release][-1]
    return names | made, submodules


def install(version: str = DEFAULT_VERSION) -> None:
    """Makes `import natten` and `import natten.functional` find these names, as that version of NATTEN has them.

    Call it before anything imports natten, transformers' DiNAT included: who did so earlier keeps what it found. The files of
    a real natten, if there is one, are left alone; this process no longer finds them.

    Args:
        version: which NATTEN to be, as in "0.14.6", "0.21" (0.21.0) or "0.17.5+torch260cu126"; also `natten.__version__`.

    Raises:
        ValueError: not a release from 0.14.0 to 0.21.
    """
    names, submodules = _surface(version)
    package, *parts = (types.ModuleType(name, __doc__) for name in ("natten", *(f"natten.{part}" for part in submodules)))
    for module in (package, *parts):
        module.__spec__ = ModuleSpec(module.__name__, loader=None, origin=__file__, is_package=module is package)
        vars(module).update(names)
    package.__path__ = []
    package.__version__ = version
    vars(package).update(zip(submodules, parts, strict=True))
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        del sys.modules[name]
    sys.modules |= {module.__name__: module for module in (package, *parts)}

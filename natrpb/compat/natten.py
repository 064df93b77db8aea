"""Drop-in for NATTEN (https://github.com/SHI-Labs/NATTEN, MIT): modules and ops of versions 0.14 to 0.21 on this library's.

    from natrpb.compat import natten
    natten.install("0.17.5")    # before others import natten: `import natten` and `import natten.functional` find this

The modules, the fused and unfused ops and the usual switches of all those versions are there, whichever version is installed,
and compute what they did in the version that last had them: on every device, in every float type, with the bias trained fused,
differentiable to any order. The version settles what versions disagree about: order and defaults of the arguments of modules,
of `na1d`, `na2d`, `na3d` and, before 0.17, of `na3d_qk` and `na3d_av`. What steered NATTEN's kernels (backends, tiles,
switches) is accepted and does nothing. Not there are `attention`, variable lengths, autograd classes and counting of flops.

The names in this module itself are those of 0.17.5, the last version with a bias.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import torch
from torch import Tensor

from .. import _ext, functional, modules
from ..functional._checks import check_tensor

DEFAULT_VERSION = "0.17.5"

_OPS = (functional.na1d, functional.na2d, functional.na3d)
_MODULES = (modules.NeighborhoodAttention1D, modules.NeighborhoodAttention2D, modules.NeighborhoodAttention3D)


# ---- fused, heads-last: [B, *, heads, D] ----


@functools.cache
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


@functools.cache
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

    return _named(op, attend)


def _named(made, like):
    """`made` under the name of what it stands for."""
    made.__name__, made.__qualname__, made.__module__ = like.__name__, like.__name__, __name__
    made.__doc__ = f"`natrpb.{like.__name__}`, with the arguments of a version of NATTEN."
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


def _scores(op: Callable, query, key, kernel_size, dilation, additional_keys, is_causal, rpb) -> Tensor:
    """[B, heads, *, slots], followed by one score per additional key [B, heads, T, D]."""
    scores = op(query, key, kernel_size, dilation, is_causal, rpb)
    if additional_keys is None:
        return scores
    _check_additional("additional_keys", additional_keys, query)
    return torch.cat([scores, torch.einsum("bh...d,bhtd->bh...t", query, additional_keys.to(query.dtype))], dim=-1)


def _check_additional(name: str, given, like: Tensor) -> None:
    check_tensor(name, given, 4, "[B, heads, T, D]")
    batch, heads, head_dim = like.shape[0], like.shape[1], like.shape[-1]
    if given.shape[:2] != (batch, heads) or given.shape[-1] != head_dim:
        raise ValueError(f"{name} must have shape [{batch}, {heads}, T, {head_dim}], got {list(given.shape)}")


def _sums(op: Callable, attn, value, kernel_size, dilation, additional_values, is_causal) -> Tensor:
    if additional_values is None:
        return op(attn, value, kernel_size, dilation, is_causal)
    _check_additional("additional_values", additional_values, value)
    slots = attn.shape[-1] - additional_values.shape[2]
    extra = torch.einsum("bh...t,bhtd->bh...d", attn[..., slots:].to(value.dtype), additional_values.to(value.dtype))
    return op(attn[..., :slots], value, kernel_size, dilation, is_causal) + extra


def na1d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None) -> Tensor:
    """See `na2d_qk`."""
    return _scores(functional.na1d_qk, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na2d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None) -> Tensor:
    """`natrpb.na2d_qk`; the scores of additional keys [B, heads, T, D] follow those of the neighborhood."""
    return _scores(functional.na2d_qk, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na3d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None) -> Tensor:
    """See `na2d_qk`."""
    return _scores(functional.na3d_qk, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na1d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False) -> Tensor:
    """See `na2d_av`."""
    return _sums(functional.na1d_av, attn, value, kernel_size, dilation, additional_values, is_causal)


def na2d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False) -> Tensor:
    """`natrpb.na2d_av`; attn's last weights are those of additional values [B, heads, T, D]."""
    return _sums(functional.na2d_av, attn, value, kernel_size, dilation, additional_values, is_causal)


def na3d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False) -> Tensor:
    """See `na2d_av`."""
    return _sums(functional.na3d_av, attn, value, kernel_size, dilation, additional_values, is_causal)


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
    kernel_size, dilation = _sizes(rpb, kernel_size, dilation)
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(query, key, rpb, kernel_size, dilation=None) -> Tensor:
    """Scores with bias, [B, heads, H, W, K * K].

    With a fourth argument alone, which up to 0.14.4 was the dilation, rpb's size says what K is.
    """
    kernel_size, dilation = _sizes(rpb, kernel_size, dilation)
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten3dqkrpb(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation) -> Tensor:
    """Scores with bias, [B, heads, D0, H, W, K_d * K * K]."""
    return na3d_qk_with_bias(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation)


def natten1dqk(query, key, kernel_size, dilation) -> Tensor:
    """Scores without bias, [B, heads, L, K]."""
    return na1d_qk(query, key, kernel_size, dilation)


def natten2dqk(query, key, kernel_size, dilation) -> Tensor:
    """Scores without bias, [B, heads, H, W, K * K]."""
    return na2d_qk(query, key, kernel_size, dilation)


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


@functools.cache
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

    return _named(Module, base)


@functools.cache
def _module_of_0_14_0(base: type) -> type:
    class Module(_module_of_0_14_5(base)):
        def __init__(
            self, dim, kernel_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0, dilation=None
        ) -> None:  # fmt: skip
            super().__init__(dim, num_heads, kernel_size, dilation, True, qkv_bias, qk_scale, attn_drop, proj_drop)

    return _named(Module, base)


@functools.cache
def _volume_module_of_0_15(base: type) -> type:
    class Module(_module_of_0_14_5(base)):
        def __init__(
            self, dim, num_heads, kernel_size, kernel_size_d=None, dilation=1, dilation_d=None, bias=True, qkv_bias=True,
            qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        ) -> None:  # fmt: skip
            sizes = (kernel_size_d or kernel_size, kernel_size, kernel_size)
            steps = (dilation_d or dilation or 1, dilation or 1, dilation or 1)
            super().__init__(dim, num_heads, sizes, steps, bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    return _named(Module, base)


@functools.cache
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


@functools.cache
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

    return _named(Module, base)


# ---- switches ----

HAS_LIBNATTEN = True


def _ignore(*args, **kwargs) -> None:
    """Steered NATTEN's kernels; here attention is always fused and deterministic."""


use_fna = use_fused_na = use_kv_parallelism_in_fused_na = use_deterministic_algorithms = _ignore
use_autotuner = disable_autotuner = set_memory_usage_preference = _ignore
use_gemm_na = use_tiled_na = use_tf32_in_gemm_na = _ignore


def _yes() -> bool:
    """True: of this library that is always so."""
    return True


is_fna_enabled = is_fused_na_enabled = are_deterministic_algorithms_enabled = _yes
has_fna = has_fused_na = has_half = has_bfloat = _yes


def has_cuda() -> bool:
    """Whether the CUDA kernels are loaded and there is a GPU for them."""
    return "cuda" in _ext.info()["devices"]


# ---- versions ----

# From which version on: how ops and modules take their arguments, what takes others on three axes (0.15 and 0.16), submodules.
# NB: by `context` the official NAT code tells that it has 0.17 or a later one.
_IN_VOLUMES = {
    "na3d_qk": natten3dqk,
    "na3d_av": natten3dav,
    "NeighborhoodAttention3D": _volume_module_of_0_15(modules.NeighborhoodAttention3D),
}
_EPOCHS = (
    ((0, 14, 0), _op_of_0_17, _module_of_0_14_0, _IN_VOLUMES, ("functional",)),
    ((0, 14, 5), _op_of_0_17, _module_of_0_14_5, _IN_VOLUMES, ("functional",)),
    ((0, 17, 0), _op_of_0_17, _module_of_0_17, {}, ("functional", "context")),
    ((0, 20, 0), _op_of_0_20, _module_of_0_20, {}, ("functional", "context")),
)

na1d, na2d, na3d = map(_op_of_0_17, _OPS)
NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D = map(_module_of_0_17, _MODULES)


def _surface(version: str) -> tuple[dict[str, object], tuple[str, ...]]:
    """All public names as `version` has them, and its submodules."""
    parts = str(version).split(".")
    release = tuple(map(int, parts)) if len(parts) == 3 and all(part.isdigit() for part in parts) else ()
    if not (0, 14, 0) <= release < (0, 22, 0):
        raise ValueError(f"version must be one of NATTEN's from 0.14.0 to 0.21, as in {DEFAULT_VERSION!r}, got {version!r}")
    names = {name: value for name, value in globals().items() if getattr(value, "__module__", None) == __name__}
    names = {name: value for name, value in names.items() if not name.startswith("_") and value is not install}
    names["HAS_LIBNATTEN"] = HAS_LIBNATTEN
    _, make_op, make_module, others, submodules = [epoch for epoch in _EPOCHS if epoch[0] <= release][-1]
    names |= {like.__name__: make_op(like) for like in _OPS} | {like.__name__: make_module(like) for like in _MODULES}
    return names | others, submodules


def install(version: str = DEFAULT_VERSION) -> None:
    """Makes `import natten` and `import natten.functional` find these names, as that version of NATTEN has them.

    Call it before anything imports natten, transformers' DiNAT included: who did so earlier keeps what it found. The files of
    a real natten, if there is one, are left alone; this process no longer finds them.

    Args:
        version: which NATTEN to be, as in "0.14.6" or "0.21.0"; also `natten.__version__`.

    Raises:
        ValueError: not a version from 0.14.0 to 0.21.
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

"""Gives a compiled op its Python side: autograd (both modes), autocast and vmap, at the op's own dispatch keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_library = torch.library.Library("natrpb", "IMPL")

# NB: asked once and here, since torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = tuple(device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device))

_functions: dict[str, type[_SingleLevelFunction]] = {}  # of each differentiable op


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device."""
    return device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def call_op(name: str, *args):
    """Calls `natrpb::name`, in plain eager code without the way through the dispatcher to its autograd kernel and back.

    That kernel is Python and costs more than all checks. Autocast comes before it, hence not past it.
    """
    op = getattr(torch.ops.natrpb, name).default
    if _is_transformed():
        return op(*args)
    if not _requires_grad(args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    if autocasts(args[0].device):
        return op(*args)
    return _functions[name].apply(*args)


def _requires_grad(args: Sequence) -> bool:
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, Tensor) and a.requires_grad:
                return True
    return False


def _is_transformed() -> bool:
    """Whether a transform of torch.func, a compiler or forward mode may have to see an op."""
    transformed = torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling() or torch._C._is_tracing()
    return transformed or forward_ad._current_level >= 0


def _has_tangent(args: Sequence) -> bool:
    """NB: a compiled program enters its dual levels below Python, where `_current_level` does not see them."""
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None for a in args)


def register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """Differentiates `natrpb::name` by an autograd function, whose `forward` must call `below_autograd(name, ...)`."""
    op = getattr(torch.ops.natrpb, name).default
    single_level = _functions[name] = _single_level(function)

    def autograd(keyset, *args):
        if _is_transformed() or _requires_grad(args) or _has_tangent(args):
            with enable_single_level_autograd_function():
                return single_level.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def _single_level(function: type[torch.autograd.Function]) -> type[_SingleLevelFunction]:
    """The function for one level of torch.func's transforms, with a `jvp` that outer forward modes (jvp of jvp) differentiate.

    NB: a transform has already peeled off its level when it comes to an op's autograd key; torch.autograd.Function.apply
    would start the transforms again.

    NB: torch calls `Function.jvp` with all tangents hidden, lest the saved tensors' own enter the formula. That also hides
    those of outer levels, and their derivative would be lost without an error. So here tangents stay visible, and only this
    level's are taken off the saved tensors.
    """

    def jvp(ctx, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):
            saved = tuple(None if x is None else forward_ad.unpack_dual(x, level=0).primal for x in ctx.saved_tensors)
            return function.jvp(SimpleNamespace(**vars(ctx), saved_tensors=saved), *tangents)

    rules = {name: staticmethod(getattr(function, name)) for name in ("forward", "setup_context", "backward")}
    return type(function.__name__, (_SingleLevelFunction,), rules | {"jvp": staticmethod(jvp)})


def below_autograd(name: str, *args):
    """Calls `natrpb::name` past its autograd kernel.

    NB: `Function.forward` runs with both grad modes off, but under nested transforms of torch.func the op goes on to the next
    level's autograd from here, and that level must record it.
    """
    op = getattr(torch.ops.natrpb, name).default
    with torch._C._AutoDispatchBelowAutograd():
        if not _is_transformed():
            return op(*args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op(*args)


def register_autocast(name: str, casts: Sequence[int]) -> None:
    """Under autocast, casts the tensors at positions `casts` to the autocast dtype (float64 stays, as torch's own rule)."""
    op = getattr(torch.ops.natrpb, name).default
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"

        def autocast(*args, device=device, key=key):
            dtype = torch.get_autocast_dtype(device)
            args = list(args)
            for i in casts:
                if args[i] is not None and args[i].dtype != torch.float64:
                    args[i] = args[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(*args)

        _library.impl(name, autocast, key)


def register_vmap(name: str, head_axes: Sequence[int], out_head_axes: Sequence[int | None]) -> None:
    """Vectorises `natrpb::name` by folding the mapped dimension into the heads, which never meet in these ops.

    Args:
        head_axes: for every leading tensor argument, the axis that holds its heads (negative: from the end). Other tensors,
            which all heads share, cannot be mapped.
        out_head_axes: the same for every output.
    """
    op = getattr(torch.ops.natrpb, name).default

    def fold(x: Tensor | None, dim: int | None, axis: int, size: int) -> Tensor | None:
        if x is None:
            return None
        x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        axis = axis % (x.dim() - 1)
        return x.movedim(0, axis).flatten(axis, axis + 1)

    def unfold(x: Tensor, axis: int, size: int) -> Tensor:
        axis = axis % x.dim()
        return x.unflatten(axis, (size, x.shape[axis] // size)).movedim(axis, 0)

    def vmap(info, in_dims, *args):
        size = info.batch_size
        count = len(head_axes)
        if any(isinstance(dim, int) for dim in in_dims[count:]):
            raise ValueError(f"natrpb::{name} must be mapped over its first {count} arguments only, got in_dims {in_dims}")
        folded = [fold(x, d, axis, size) for x, d, axis in zip(args[:count], in_dims[:count], head_axes)]
        outputs = op(*folded, *args[count:])
        if isinstance(outputs, Tensor):
            return unfold(outputs, out_head_axes[0], size), 0
        return tuple(unfold(x, axis, size) for x, axis in zip(outputs, out_head_axes)), tuple(0 for _ in outputs)

    torch.library.register_vmap(f"natrpb::{name}", vmap, lib=_library)


def register_fake(name: str, fake: Callable) -> None:
    torch.library.register_fake(f"natrpb::{name}", fake, lib=_library)

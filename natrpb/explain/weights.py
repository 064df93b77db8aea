"""Attention weights of a trained module: the fused op never forms them, the unfused one does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from ..patterns import neighborhood_pattern, per_axis

_ATTENTION = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)


def attention_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Runs a model once and keeps what went into its neighborhood attentions.

    Args:
        model: any module; its training mode is not touched.
        x: its input.

    Returns:
        By module name, in order of execution: [B, *spatial, C], without gradients.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _, args, kwargs: inputs.update({name: (args[0] if args else kwargs["x"]).detach()})

    hooks = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, _ATTENTION)
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@torch.no_grad()
def attention_weights(module: nn.Module, x: Tensor, query: Sequence[int]) -> Tensor:
    """What one query of a neighborhood attention looks at, by head: softmax(scale * <query, key> + rpb) on a dense map.

    Args:
        module: NeighborhoodAttention1D, 2D or 3D.
        x: [B, *spatial, C], the module's input; see `attention_inputs`.
        query: a position, one coordinate per axis.

    Returns:
        [B, heads, *spatial], fp32 (fp64 for fp64): the weight of every key, zero for those that the query does not see. The
        weights sum to one, but for what falls on the zeros that `pad_small_inputs` appends.

    Raises:
        TypeError: another module.
        ValueError: x of the wrong shape, or the query outside of the map.
    """
    if not isinstance(module, _ATTENTION):
        raise TypeError(f"module must be a NeighborhoodAttention1D, 2D or 3D, got {type(module).__name__}")
    if x.dim() != module.ndim + 2 or x.shape[-1] != module.embed_dim:
        raise ValueError(f"x must have shape [B, {module.ndim} spatial axes, {module.embed_dim}], got {list(x.shape)}")
    spatial = tuple(x.shape[1:-1])
    query = per_axis("query", query, module.ndim)
    if not all(0 <= position < length for position, length in zip(query, spatial)):
        raise ValueError(f"query must lie in the map of {spatial}, got {query}")
    if module.pad_small_inputs:
        x = module._pad(x)
    pattern = neighborhood_pattern(module.ndim, module.kernel_size, module.stride, module.dilation, module.is_causal)
    padded = tuple(x.shape[1:-1])

    # qkv[b, *, 3, h, d] -> q, k: [B, h, *, d]
    q, k, _ = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dim)).movedim(-2, 1).unbind(-2)
    scores = ops.local_qk(q * module.scale, k, module.rpb, pattern)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = scores[(..., *query, slice(None))].softmax(-1, dtype=wide)  # [B, h, T]

    row = torch.arange(math.prod(padded)).view(padded)[query]
    keys, _, valid = (index[row] for index in reference.pattern_index(pattern, padded, x.device))
    dense = weights.new_zeros(*weights.shape[:2], math.prod(padded))
    dense[..., keys[valid]] = weights[..., valid]
    return dense.unflatten(-1, padded)[(..., *(slice(length) for length in spatial))]

"""``nn.MultiheadAttention`` with projections that are modules, so that they can be captured."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MultiheadAttention", "expose_projections"]

_log = logging.getLogger("locoprop_torch")

_PACKED = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}
_PARAMETERS = _PACKED | {"out_proj.weight", "out_proj.bias"}
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


class MultiheadAttention(nn.Module):
    """What ``attention`` computes, with its projections as modules: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    ``torch.nn``'s own module keeps the first three in one parameter and calls none of the four. Arguments and results
    of ``forward`` are the same; the parameters are copies, frozen where the originals are.

    Args:
        attention: with or without biases, any ``kdim`` and ``vdim``.

    Raises:
        TypeError: it is no ``nn.MultiheadAttention``, or has a ``forward`` of its own.
        ValueError: it has ``add_bias_kv`` or ``add_zero_attn``, or other parameters, those of pruning for instance.
    """

    # nn.TransformerEncoder asks for these before it takes a fast path that calls no modules; so it takes none.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"attention must be a torch.nn.MultiheadAttention, got {type(attention).__name__}")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("attention must have neither add_bias_kv nor add_zero_attn")
        if _has_own_forward(attention):
            raise TypeError(f"attention must have the forward of torch.nn, got {type(attention).__name__} with another")
        others = sorted({name for name, _ in attention.named_parameters()} - _PARAMETERS)
        if others:
            raise ValueError(
                f"attention must have no parameters but those of torch.nn, got {', '.join(others)}: "
                "prune or parametrise q_proj, k_proj, v_proj and out_proj afterwards"
            )
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        packed, bias = attention.in_proj_weight, attention.in_proj_bias
        weights = (
            [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
            if packed is None
            else _thirds(packed)
        )
        biases = [None] * 3 if bias is None else _thirds(bias)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal, which is only a hint about it")
        batched = query.dim() == 3
        inputs = [self._batch_first(x, batched) for x in (query, key, value)]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in zip(projections, inputs, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), weights
        return y if self.batch_first else y.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to be added to the scores ``[batch, heads, L, S]``."""
        mask = None if attn_mask is None else _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is None:
            return mask
        padding = _additive(key_padding_mask, q.dtype)
        padding = padding[:, None, None] if padding.dim() == 2 else padding
        return padding if mask is None else mask + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)


def _has_own_forward(attention: nn.MultiheadAttention) -> bool:
    return type(attention).forward is not nn.MultiheadAttention.forward or "forward" in vars(attention)


def _thirds(parameter: Tensor) -> list[Tensor]:
    return [part.requires_grad_(parameter.requires_grad) for part in parameter.detach().chunk(3)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def expose_projections(model: nn.Module) -> Any:
    """Replace every ``nn.MultiheadAttention`` in ``model`` by a :class:`MultiheadAttention`, in place.

    Do it before building optimisers: the projections are new parameters, with the same values. Hooks on the modules go
    with them. One with a ``forward`` of its own stays, which is logged at level WARNING. An ``nn.TransformerEncoder``
    then has no fast path, whose outputs are zero where the input is padding.

    Returns:
        ``model``; its replacement where it is an ``nn.MultiheadAttention`` itself.

    Raises:
        ValueError: see :class:`MultiheadAttention`.
    """
    # A module that is used twice stays one module.
    replaced: dict[nn.Module, nn.Module] = {}
    kept: list[str] = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            if _has_own_forward(module):
                kept.append(type(module).__name__)
            else:
                replaced[module] = _exposed(module)
    if kept:
        _log.warning(
            "expose_projections leaves these modules as they are, since their forward is not that of "
            "torch.nn.MultiheadAttention: %s",
            ", ".join(sorted(set(kept))),
        )
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replaced:
                setattr(module, name, replaced[child])
    for module in model.modules():
        # Its constructor has chosen nested tensors, which only the fast path of torch.nn's attention takes.
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, MultiheadAttention) for m in module.modules()
        ):
            module.use_nested_tensor = False
    return replaced.get(model, model)


def _exposed(attention: nn.MultiheadAttention) -> MultiheadAttention:
    exposed = MultiheadAttention(attention)
    # The dictionaries themselves, which the handles of the hooks refer to.
    vars(exposed).update({name: vars(attention)[name] for name in _HOOKS})
    return exposed

"""``nn.MultiheadAttention`` with projections that are modules, so that they can be captured."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MultiheadAttention", "expose_projections"]


class MultiheadAttention(nn.Module):
    """What ``attention`` computes, with its projections as modules: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    ``torch.nn``'s own module keeps the first three in one parameter and calls none of the four. Arguments and results
    of ``forward`` are the same; the parameters are copies.

    Args:
        attention: with or without biases, any ``kdim`` and ``vdim``.

    Raises:
        TypeError: it is no ``nn.MultiheadAttention``.
        ValueError: it has ``add_bias_kv`` or ``add_zero_attn``.
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
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        packed = attention.in_proj_weight
        weights = (
            [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
            if packed is None
            else packed.detach().chunk(3)
        )
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, requires_grad=(weight if packed is None else packed).requires_grad)
            for weight, bias in zip(weights, biases, strict=True)
        )
        out = attention.out_proj
        self.out_proj = _linear(out.weight, out.bias, requires_grad=out.weight.requires_grad)
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


def _linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad)
    return layer


def expose_projections(model: nn.Module, _replaced: dict[nn.Module, nn.Module] | None = None) -> Any:
    """Replace every ``nn.MultiheadAttention`` in ``model`` by a :class:`MultiheadAttention`, in place.

    Do it before building optimisers: the projections are new parameters, with the same values.

    Returns:
        ``model``; its replacement where it is an ``nn.MultiheadAttention`` itself.
    """
    # The same dictionary all the way down, so that a module that is used twice stays one module.
    replaced = {} if _replaced is None else _replaced
    if isinstance(model, nn.MultiheadAttention):
        if model not in replaced:
            replaced[model] = MultiheadAttention(model)
        return replaced[model]
    for name, child in list(model._modules.items()):
        if child is not None:
            setattr(model, name, expose_projections(child, replaced))
    return model

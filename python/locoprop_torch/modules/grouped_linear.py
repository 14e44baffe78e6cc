"""Linear layers side by side, as one module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["GroupedLinear"]


class GroupedLinear(nn.Module):
    """``G`` linear layers side by side, as in mixtures of experts and block MLPs: ``y[g] = x[g] W[g]ᵀ + b[g]``.

    Args:
        groups: ``G``.
        in_features: ``K``.
        out_features: ``N``.
        bias: whether there is a bias.
        device: where the parameters are made; ``None`` for torch's default device.
        dtype: of the parameters; ``None`` for torch's default dtype.

    Shapes: input ``[G, ..., K]``, output ``[G, ..., N]``, weight ``[G, N, K]``, bias ``[G, N]``.
    """

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(groups, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``: uniform within ``±1/√K``."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[G, ..., K]`` to ``[G, ..., N]``."""
        if x.dim() < 2 or x.shape[0] != self.groups or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [{self.groups}, ..., {self.in_features}], got {list(x.shape)}")
        rows = x.reshape(self.groups, -1, self.in_features)
        if self.bias is None:
            y = torch.bmm(rows, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.mT)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

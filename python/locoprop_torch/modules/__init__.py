"""Modules for users' models, which LocoProp can train."""

from locoprop_torch.modules.attention import MultiheadAttention, expose_projections
from locoprop_torch.modules.grouped_linear import GroupedLinear

__all__ = ["GroupedLinear", "MultiheadAttention", "expose_projections"]

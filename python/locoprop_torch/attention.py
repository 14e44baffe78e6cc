"""The former place of :mod:`locoprop_torch.modules.attention`, which pickled models and users' imports name."""

from locoprop_torch.modules.attention import MultiheadAttention, expose_projections

__all__ = ["MultiheadAttention", "expose_projections"]

"""LocoProp for PyTorch models: an optimiser that captures layers with hooks and hands them to ``locoprop_kernels``."""

from locoprop_kernels import __version__
from locoprop_torch.modules import GroupedLinear, expose_projections
from locoprop_torch.optimizer import LocoProp

__all__ = ["GroupedLinear", "LocoProp", "__version__", "expose_projections"]

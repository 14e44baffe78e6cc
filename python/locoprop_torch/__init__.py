"""LocoProp for PyTorch models: an optimiser that captures layers with hooks and hands them to ``locoprop_kernels``."""

from locoprop_kernels import __version__
from locoprop_torch.local_losses import log_local_losses
from locoprop_torch.modules import GroupedLinear, expose_projections
from locoprop_torch.optimizer import LocoProp
from locoprop_torch.presets import presets
from locoprop_torch.unit import PerExample

__all__ = [
    "GroupedLinear",
    "LocoProp",
    "PerExample",
    "__version__",
    "expose_projections",
    "log_local_losses",
    "presets",
]

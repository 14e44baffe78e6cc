"""``python -m locoprop_torch.demo``: LocoProp against first-order optimisers on a deep autoencoder."""

from locoprop_torch.demo.command import main
from locoprop_torch.demo.data import curves_tensors
from locoprop_torch.demo.experiments import CURVES, FILES

__all__ = ["CURVES", "FILES", "curves_tensors", "main"]

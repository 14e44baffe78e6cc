"""The default rule, and settings of others by name, for ``LocoProp(model, **presets["notebook"])``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from locoprop_kernels import rules

__all__ = ["DEFAULT_RULE", "presets"]

#: With 0.999 mean squares lag behind: the first local step on a batch with large gradients moves weights by several
#: learning rates, and the others go on from there. With 0.95 they follow in a few steps (``bench/results/defaults``).
DEFAULT_RULE = rules.Adam(betas=(0.9, 0.95))

#: ``"notebook"``: the paper's official notebook, for its deep autoencoder on batches of 1000; it warms ``lr`` up over 5
#: epochs and then lets it fall linearly over 95. ``"package"``: the defaults of the PyPI package ``locoprop`` 0.1.0.
presets: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "notebook": {
            "lr": 1e-5,
            "activation_lr": 10.0,
            "local_iterations": 10,
            "rule": rules.RMSprop(alpha=0.9, momentum=0.999, eps=1e-5, flavor="tensorflow"),
            "reduction": "sum",
            "rows": None,
        },
        "package": {
            "lr": 2e-5,
            "activation_lr": 10.0,
            "local_iterations": 10,
            "rule": rules.RMSprop(alpha=0.9, momentum=0.999, eps=1e-6),
            "reduction": "mean",
            "rows": None,
        },
    }
)

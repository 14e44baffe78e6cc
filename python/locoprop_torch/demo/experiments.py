"""The demo's experiments: the network, and how each optimiser trains it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from locoprop_kernels import rules
from locoprop_torch.optimizer import LocoProp

__all__ = ["CURVES", "FILES", "METHODS", "Experiment", "autoencoder"]

METHODS = {
    "locoprop-m": "LocoProp-M",
    "locoprop-rows": "LocoProp-M, 32 rows",
    "locoprop-s": "LocoProp-S",
    "rmsprop": "RMSProp",
    "adam": "Adam",
}


@dataclass(frozen=True)
class Experiment:
    """Everything but the data, the device and the seed.

    Attributes:
        encoder: widths from the image to the code; the decoder mirrors them.
        batch_size: images a batch; the last batch of an epoch may be smaller.
        epochs: passes of LocoProp over the train images.
        baseline_epochs: passes of RMSProp and Adam.
        seconds: in place of both, how long every method trains, to the end of an epoch.
        hyperparameters: by method; keyword arguments of ``LocoProp`` (without the rule) or ``torch.optim``.
        rule: LocoProp's local rule.
        backend: of LocoProp.
        compute_dtype: of LocoProp; the model itself is float32.
    """

    encoder: tuple[int, ...]
    batch_size: int
    epochs: int
    baseline_epochs: int
    hyperparameters: dict[str, dict[str, Any]]
    rule: rules.Rule
    backend: str = "auto"
    compute_dtype: torch.dtype = torch.float32
    seconds: float | None = None

    def optimizer(self, method: str, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser called ``method`` (a key of :data:`METHODS`) for ``model``."""
        options = self.hyperparameters[method]
        if method == "adam":
            return torch.optim.Adam(model.parameters(), **options)
        if method == "rmsprop":
            return torch.optim.RMSprop(model.parameters(), **options)
        return LocoProp(
            model,
            rule=self.rule,
            local_loss="squared" if method == "locoprop-s" else "matching",
            # The sigmoid itself is inside the loss, where it cannot be found.
            transfers={"logits": "sigmoid"},
            reduction="sum",
            backend=self.backend,
            compute_dtype=self.compute_dtype,
            rows=32 if method == "locoprop-rows" else None,
            **options,
        )

    def epochs_of(self, method: str) -> int:
        return self.epochs if method.startswith("locoprop") else self.baseline_epochs


def autoencoder(encoder: Sequence[int], seed: int) -> nn.Sequential:
    """Tanh layers around an identity code, ending in logits; glorot uniform weights from ``seed``, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    widths = [*encoder, *reversed(encoder[:-1])]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False), start=1):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        if i == len(widths) - 1:
            layers["logits"] = linear
        elif i == len(encoder) - 1:
            layers["code"] = linear
        else:
            layers[f"linear{i}"], layers[f"tanh{i}"] = linear, nn.Tanh()
    return nn.Sequential(layers)


# Best of nine trials for each method on another seed: bench/results/demo_tuning.json.
CURVES = Experiment(
    encoder=(784, 400, 200, 100, 12),
    batch_size=200,
    epochs=20,
    baseline_epochs=20,
    hyperparameters={
        "locoprop-m": {"lr": 5e-5, "activation_lr": 5.0, "local_iterations": 5},
        "locoprop-rows": {"lr": 5e-5, "activation_lr": 5.0, "local_iterations": 5},
        "locoprop-s": {"lr": 1e-4, "activation_lr": 20.0, "local_iterations": 5},
        "rmsprop": {"lr": 1e-3, "alpha": 0.9, "momentum": 0.5},
        "adam": {"lr": 3e-3, "betas": (0.5, 0.999)},
    },
    rule=rules.RMSprop(alpha=0.9, momentum=0.99, eps=1e-5, flavor="tensorflow"),
)
# The paper's network and its official notebook's hyper-parameters. Nothing is tuned on the files: RMSProp and Adam
# have common values.
FILES = Experiment(
    encoder=(784, 1000, 500, 250, 30),
    batch_size=1000,
    epochs=2,
    baseline_epochs=2,
    hyperparameters={
        "locoprop-m": {"lr": 1e-5, "activation_lr": 10.0, "local_iterations": 10},
        "locoprop-rows": {"lr": 1e-5, "activation_lr": 10.0, "local_iterations": 10},
        "locoprop-s": {"lr": 1e-5, "activation_lr": 10.0, "local_iterations": 10},
        "rmsprop": {"lr": 3e-4, "alpha": 0.9, "momentum": 0.9},
        "adam": {"lr": 1e-3},
    },
    rule=rules.RMSprop(alpha=0.9, momentum=0.999, eps=1e-5, flavor="tensorflow"),
)

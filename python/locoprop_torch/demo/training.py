"""The demo's experiment: a deep autoencoder that several optimisers train from one start on the same batches."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locoprop_kernels import rules
from locoprop_torch.optimizer import LocoProp

__all__ = ["METHODS", "Experiment", "History", "autoencoder", "entropy", "train", "warm_up"]

METHODS = {"locoprop-m": "LocoProp-M", "locoprop-s": "LocoProp-S", "rmsprop": "RMSProp", "adam": "Adam"}


@dataclass(frozen=True)
class Experiment:
    """Everything but the data, the device and the seed.

    Attributes:
        encoder: widths from the image to the code; the decoder mirrors them.
        batch_size: images a batch; the last batch of an epoch may be smaller.
        epochs: passes of LocoProp over the train images.
        baseline_epochs: passes of RMSProp and Adam.
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
            local_loss="matching" if method == "locoprop-m" else "squared",
            transfers={"logits": "sigmoid"},  # the sigmoid itself is inside the loss
            reduction="sum",
            backend=self.backend,
            compute_dtype=self.compute_dtype,
            **options,
        )

    def epochs_of(self, method: str) -> int:
        return self.epochs if method.startswith("locoprop") else self.baseline_epochs


@dataclass
class History:
    """One entry an epoch: mean train loss of its batches, test loss after it, and training seconds up to its end."""

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


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


def reconstruction_loss(model: nn.Module, images: Tensor) -> Tensor:
    """Cross entropy between pixels and their reconstruction, summed over pixels, averaged over images (nats)."""
    return F.binary_cross_entropy_with_logits(model(images), images, reduction="sum") / len(images)


def entropy(images: Tensor) -> float:
    """Lower bound of :func:`reconstruction_loss`: what a perfect reconstruction of grey pixels costs (nats)."""
    p = images.double()
    return float(-(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum(1).mean())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = reconstruction_loss(model, images)
    loss.backward()
    optimizer.step()
    return loss.detach()


def warm_up(experiment: Experiment, method: str, images: Tensor) -> LocoProp | None:
    """One step on a throw-away model: kernels get compiled, and settings that cannot work raise before time is spent.

    Returns:
        The optimiser if it is LocoProp, for its report of what ran.
    """
    model = autoencoder(experiment.encoder, seed=0).to(images.device)
    optimizer = experiment.optimizer(method, model)
    _step(model, optimizer, images[: experiment.batch_size])
    return optimizer if isinstance(optimizer, LocoProp) else None


def train(
    experiment: Experiment,
    method: str,
    images: Tensor,
    test_images: Tensor,
    seed: int,
    progress: Callable[[float], object] = lambda epochs: None,
) -> History:
    """Train one model.

    Args:
        experiment: network, schedule and hyper-parameters.
        method: key of :data:`METHODS`.
        images: train images ``[count, pixels]`` in [0, 1] on the device to train on.
        test_images: likewise.
        seed: of the weights and of the batches: the same for every method.
        progress: called after every batch with its share of an epoch.
    """
    model = autoencoder(experiment.encoder, seed).to(images.device)
    optimizer = experiment.optimizer(method, model)
    shuffle = torch.Generator().manual_seed(seed)
    history = History()
    seconds = 0.0
    for _ in range(experiment.epochs_of(method)):
        order = torch.randperm(len(images), generator=shuffle).to(images.device)
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        start = time.perf_counter()
        for first in range(0, len(images), experiment.batch_size):
            batch = images[order[first : first + experiment.batch_size]]
            total += _step(model, optimizer, batch).double() * len(batch)
            progress(len(batch) / len(images))
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)
        seconds += time.perf_counter() - start
        history.train_loss.append(total.item() / len(images))
        history.test_loss.append(_evaluate(model, test_images, experiment.batch_size))
        history.seconds.append(seconds)
    return history


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor, batch_size: int) -> float:
    batches = images.split(batch_size)
    return sum(reconstruction_loss(model, batch).item() * len(batch) for batch in batches) / len(images)

"""Training of the demo's models: every optimiser begins at the same weights and sees the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locoprop_torch.demo.experiments import Experiment, autoencoder
from locoprop_torch.optimizer import LocoProp

__all__ = ["History", "entropy", "train", "warm_up"]


@dataclass
class History:
    """One entry an epoch: mean train loss of its batches, test loss after it, and training seconds up to its end."""

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


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
        method: key of :data:`~locoprop_torch.demo.experiments.METHODS`.
        images: train images ``[count, pixels]`` in [0, 1] on the device to train on.
        test_images: likewise.
        seed: of the weights and of the batches: the same for every method.
        progress: called after every batch with its share of an epoch, or with its seconds where those are given.
    """
    model = autoencoder(experiment.encoder, seed).to(images.device)
    optimizer = experiment.optimizer(method, model)
    shuffle = torch.Generator().manual_seed(seed)
    history = History()
    seconds = 0.0
    while not _finished(experiment, method, history):
        order = torch.randperm(len(images), generator=shuffle).to(images.device)
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        start = time.perf_counter()
        for first in range(0, len(images), experiment.batch_size):
            batch = images[order[first : first + experiment.batch_size]]
            before = time.perf_counter()
            total += _step(model, optimizer, batch).double() * len(batch)
            progress(len(batch) / len(images) if experiment.seconds is None else time.perf_counter() - before)
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)
        seconds += time.perf_counter() - start
        history.train_loss.append(total.item() / len(images))
        history.test_loss.append(_evaluate(model, test_images, experiment.batch_size))
        history.seconds.append(seconds)
    return history


def _finished(experiment: Experiment, method: str, history: History) -> bool:
    if experiment.seconds is None:
        return len(history.seconds) == experiment.epochs_of(method)
    return bool(history.seconds) and history.seconds[-1] >= experiment.seconds


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor, batch_size: int) -> float:
    batches = images.split(batch_size)
    return sum(reconstruction_loss(model, batch).item() * len(batch) for batch in batches) / len(images)

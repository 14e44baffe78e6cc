"""Who takes part: the optimisers, their values to choose from, and the network that they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.autoencoder.tasks import order
from locoprop_torch import LocoProp
from locoprop_torch.demo.experiments import FILES, METHODS, autoencoder
from locoprop_torch.demo.training import reconstruction_loss

__all__ = ["CONTESTANTS", "PAPER", "QUICK", "Contestant", "Problem", "Setting"]


@dataclass(frozen=True)
class Setting:
    """What all contestants share.

    Attributes:
        encoder: widths from the image to the code; the decoder mirrors them.
        batch_size: images a step.
        seconds: after how many the losses are compared, in rising order.
        judged: of these, the time after which the values of each contestant are chosen.
        every: steps between two evaluations; losses in between are interpolated.
        evaluated: how many of the train images, and of the test images, losses are taken on.
        rounds: steps of each contestant that are timed.
    """

    encoder: tuple[int, ...]
    batch_size: int
    seconds: tuple[float, ...]
    judged: float
    every: int
    evaluated: int
    rounds: int


PAPER = Setting(FILES.encoder, FILES.batch_size, (60.0, 120.0, 300.0, 600.0), 120.0, 200, 10_000, 21)
#: Seconds: what the tests run.
QUICK = Setting((784, 16, 8), 50, (0.02, 0.05), 0.02, 2, 100, 3)


@dataclass(frozen=True)
class Contestant:
    """An optimiser.

    Attributes:
        label: what reports call it.
        first_order: whether LocoProp is compared with it.
        make: makes it for a model, from values.
        grid: the values to choose from.
    """

    label: str
    first_order: bool
    make: Callable[..., Optimizer]
    grid: tuple[dict[str, Any], ...]


def _adam(model: nn.Module, **values: Any) -> Optimizer:
    return torch.optim.Adam(model.parameters(), fused=True, **values)


def _rmsprop(model: nn.Module, **values: Any) -> Optimizer:
    return torch.optim.RMSprop(model.parameters(), alpha=0.9, momentum=0.9, **values)


def _notebook(method: str) -> Contestant:
    """A method of the demo with the notebook's values."""

    def make(model: nn.Module, **values: Any) -> Optimizer:
        return replace(FILES, hyperparameters={method: values}).optimizer(method, model)

    return Contestant(METHODS[method], False, make, (FILES.hyperparameters[method],))


def _defaults(model: nn.Module, **values: Any) -> Optimizer:
    # The sigmoid itself is inside the loss, where it cannot be found.
    return LocoProp(model, transfers={"logits": "sigmoid"}, **values)


_order = lru_cache(maxsize=2)(order)
CONTESTANTS = {
    "locoprop": _notebook("locoprop-rows"),
    "rmsprop": Contestant("RMSProp, momentum 0.9", True, _rmsprop, ({"lr": 1e-4}, {"lr": 3e-5}, {"lr": 3e-4})),
    "adam": Contestant("Adam", True, _adam, ({"lr": 1e-3}, {"lr": 3e-4}, {"lr": 3e-3})),
    "defaults": Contestant("LocoProp(model)", False, _defaults, ({},)),
    "all-rows": replace(_notebook("locoprop-m"), label="LocoProp-M, all rows"),
}


@dataclass(frozen=True)
class Problem:
    """The network and its images.

    Attributes:
        setting: network and batches.
        images: train images ``[count, 784]`` in [0, 1].
        test_images: likewise.
        data: what the images are called.
    """

    setting: Setting
    images: Tensor
    test_images: Tensor
    data: str

    def network(self, seed: int) -> nn.Module:
        return autoencoder(self.setting.encoder, seed)

    def batch(self, seed: int, step: int) -> Tensor:
        """The images of a step, counted from 0: the same for every contestant."""
        per_epoch = max(1, len(self.images) // self.setting.batch_size)
        epoch, number = divmod(step, per_epoch)
        places = _order(len(self.images), seed, epoch)
        return self.images[places[number * self.setting.batch_size :][: self.setting.batch_size]]

    def step(self, model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
        optimizer.zero_grad()
        reconstruction_loss(model, batch).backward()
        optimizer.step()

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict[str, float]:
        """Losses on the first of the train and of the test images."""
        found = {}
        for name, images in (("train_loss", self.images), ("test_loss", self.test_images)):
            parts = images[: self.setting.evaluated].split(self.setting.batch_size)
            total = sum(reconstruction_loss(model, part).item() * len(part) for part in parts)
            found[name] = total / min(len(images), self.setting.evaluated)
        return found

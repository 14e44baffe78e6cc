"""The study's settings: data, network, loss, batch and number of epochs.

The epochs were chosen by Adam's defaults alone, three seeds, before anything else ran: so many that its test loss ends
near the lowest that it ever reaches. A setting where everybody overfits would show a faster optimiser as a worse one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bench.defaults.data import CONTEXT, NEEDS_FILE
from bench.defaults.models import (
    GPT,
    Pooled,
    Recurrent,
    SetOfRows,
    Upsampling,
    autoencoder,
    convnet,
    mlp,
    residual,
)

__all__ = ["TASKS", "Task"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A setting.

    Attributes:
        name: of the setting.
        data: a key of :data:`bench.defaults.data.SETS`.
        model: makes the network; torch's global generator has the seed.
        loss: of outputs and targets.
        batch: examples a batch; the rest of an epoch is left out.
        epochs: passes over the train examples.
        terms_per_example: how many terms of one example the loss averages over: tokens, outputs; 1 if it sums them.
        summed: whether the loss is a sum over the batch.
        transfers: for ``LocoProp``.
    """

    name: str
    data: str
    model: Callable[[], nn.Module]
    loss: Loss
    batch: int
    epochs: int
    terms_per_example: int = 1
    summed: bool = False
    transfers: Mapping[str, str] = field(default_factory=dict)

    @property
    def terms(self) -> int:
        """How many terms the loss averages over in a batch; 1 if it is a sum."""
        return 1 if self.summed else self.batch * self.terms_per_example

    @property
    def needs_file(self) -> bool:
        return self.data in NEEDS_FILE


def _tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.flatten())


def _summed_over_pixels(logits: Tensor, images: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


_SUM = partial(F.cross_entropy, reduction="sum")
_TASKS = [
    Task("digits-tanh-b32", "digits", partial(mlp, (64, 64, 10), nn.Tanh), F.cross_entropy, 32, 12),
    Task("digits-relu-b128", "digits", partial(mlp, (64, 128, 64, 10), nn.ReLU), F.cross_entropy, 128, 40),
    Task("digits-gelu-sum", "digits", partial(mlp, (64, 64, 64, 10), nn.GELU), _SUM, 64, 20, summed=True),
    Task("digits-norm-silu", "digits", partial(mlp, (64, 64, 64, 10), nn.SiLU, True), F.cross_entropy, 64, 15),
    Task("digits-residual", "digits", partial(residual, 64, 32, 3, 10), F.cross_entropy, 64, 15),
    Task("digits-deep-tanh", "digits", partial(mlp, (64, *[48] * 7, 10), nn.Tanh), F.cross_entropy, 64, 20),
    Task("digits-recurrent", "digits", partial(Recurrent, 8, 64, 10), F.cross_entropy, 64, 15),
    Task("digits-convnet", "digits", partial(convnet, 8, (16, 32), 10, False), F.cross_entropy, 64, 20),
    Task("digits-pooled", "digits", partial(Pooled, 8, (24, 24), 10, False, nn.Tanh), F.cross_entropy, 64, 30),
    Task("digits-pooled-norm", "digits", partial(Pooled, 8, (16, 16, 16), 10, True, nn.ReLU), F.cross_entropy, 64, 15),
    Task("digits-set", "digits", partial(SetOfRows, 8, 64, 10), F.cross_entropy, 64, 25),
    Task("digits-upsampling", "digits-images", partial(Upsampling, 8, (48, 8), 16), F.mse_loss, 64, 25, 64),
    Task("mnist-relu-b32", "mnist", partial(mlp, (784, 100, 10), nn.ReLU), F.cross_entropy, 32, 2),
    Task("mnist-relu-b128", "mnist", partial(mlp, (784, 128, 64, 10), nn.ReLU), F.cross_entropy, 128, 6),
    Task("mnist-tanh-b1000", "mnist", partial(mlp, (784, 200, 10), nn.Tanh), F.cross_entropy, 1000, 25),
    Task(
        "mnist-softmax-b128",
        "mnist",
        partial(mlp, (784, 100, 10), nn.Tanh),
        F.cross_entropy,
        128,
        6,
        transfers={"2": "softmax"},
    ),
    Task("mnist-convnet-norm", "mnist", partial(convnet, 28, (8, 16), 10, True), F.cross_entropy, 64, 2),
    Task("mnist-pooled-norm", "mnist", partial(Pooled, 28, (8, 8, 16, 16), 10, True, nn.ReLU), F.cross_entropy, 64, 3),
    Task(
        "mnist-ae-sigmoid",
        "mnist-images",
        partial(autoencoder, (784, 64, 24), nn.ReLU, nn.Sigmoid),
        F.mse_loss,
        100,
        5,
        784,
    ),
    Task("curves-ae-sum", "curves", partial(autoencoder, (784, 100, 50, 16), nn.ReLU), _summed_over_pixels, 100, 15),
    Task("curves-ae-mean", "curves", partial(autoencoder, (784, 100, 32), nn.Tanh), F.mse_loss, 100, 15, 784),
    Task("text-gpt", "text", partial(GPT, 32, 4, 2), _tokens, 8, 1, CONTEXT),
    Task("diabetes-mse", "diabetes", partial(mlp, (10, 32, 32, 1), nn.ReLU), F.mse_loss, 32, 15),
    Task("diabetes-raw-mse", "diabetes-raw", partial(mlp, (10, 64, 64, 1), nn.ReLU), F.mse_loss, 32, 40),
    Task("friedman-mse", "friedman", partial(mlp, (10, 64, 64, 1), nn.Tanh), F.mse_loss, 64, 20),
    Task("friedman-l1", "friedman", partial(mlp, (10, 64, 64, 1), nn.ReLU), F.l1_loss, 64, 20),
    Task("cancer-bce", "cancer", partial(mlp, (30, 32, 1), nn.ReLU), F.binary_cross_entropy_with_logits, 32, 15),
]
TASKS = {task.name: task for task in _TASKS}

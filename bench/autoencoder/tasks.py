"""The autoencoder as a task: Bernoulli cross-entropy of images and their reconstructions."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.autoencoder import networks
from bench.autoencoder.data import Images
from bench.autoencoder.protocol import Protocol
from locoprop_torch.demo.data import SIDE

__all__ = ["SAMPLES", "Autoencoder", "as_images", "as_text", "order"]

#: How many test images the report shows.
SAMPLES = 10

# How many images at once are reconstructed to measure a loss.
_CHUNK = 5000


def order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's examples: ``[count]``, from the seed and the epoch alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def as_text(images: Tensor) -> str:
    """Images ``[count, 784]`` in [0, 1] as bytes in base 64."""
    return base64.b64encode((255 * images).round().to(torch.uint8).cpu().numpy().tobytes()).decode()


def as_images(text: str) -> np.ndarray:
    """``[count, 28, 28]`` uint8 from :func:`as_text`."""
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(-1, SIDE, SIDE)


@dataclass(frozen=True)
class Autoencoder:
    """The deep autoencoder on images, see :class:`bench.autoencoder.runs.Task`.

    Attributes:
        images: on the device.
        protocol: has network and batch size.
        encoder: widths, from the protocol unless they are scaled.
        activation: a key of :data:`bench.autoencoder.networks.ACTIVATIONS`.
    """

    images: Images
    protocol: Protocol
    encoder: tuple[int, ...]
    activation: str = "tanh"

    @property
    def device(self) -> torch.device:
        return self.images.train.device

    def facts(self) -> dict[str, Any]:
        return {
            "data": self.images.name,
            "digest": self.images.digest,
            "encoder": list(self.encoder),
            "activation": self.activation,
            "batch_size": self.protocol.batch_size,
        }

    def network(self, seed: int) -> nn.Module:
        return networks.autoencoder(self.encoder, self.activation, seed)

    def steps(self) -> int:
        return -(-len(self.images.train) // self.protocol.batch_size)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        places = order(len(self.images.train), seed, epoch).to(self.device)
        for part in places.split(self.protocol.batch_size):
            yield (batch := self.images.train[part]), batch

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy in nats, summed over pixels, averaged over images."""
        return F.binary_cross_entropy_with_logits(model(x), y, reduction="sum") / len(x)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Train and test loss, and the reconstruction error: squared, summed over pixels, averaged over images."""
        train_loss, train_error = self._measure(model, self.images.train)
        test_loss, test_error = self._measure(model, self.images.test)
        return {
            "train_loss": train_loss,
            "test_loss": test_loss,
            "train_error": train_error,
            "test_error": test_error,
        }

    @torch.no_grad()
    def samples(self, model: nn.Module) -> str:
        """Reconstructions of the first test images."""
        return as_text(model(self.images.test[:SAMPLES]).sigmoid())

    def _measure(self, model: nn.Module, images: Tensor) -> tuple[float, float]:
        loss = error = 0.0
        for part in images.split(_CHUNK):
            logits = model(part)
            loss += F.binary_cross_entropy_with_logits(logits, part, reduction="sum").item()
            error += (logits.sigmoid() - part).square().sum().item()
        return loss / len(images), error / len(images)

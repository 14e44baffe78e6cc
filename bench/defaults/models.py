"""The study's networks, with torch's own initial weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.autoencoder.networks import Block
from bench.defaults.data import ALPHABET, CONTEXT

__all__ = ["GPT", "Pooled", "Recurrent", "SetOfRows", "Upsampling", "autoencoder", "convnet", "mlp", "residual"]

Activation = Callable[[], nn.Module]


def mlp(widths: Sequence[int], activation: Activation, norm: bool = False) -> nn.Sequential:
    """Linear layers with an activation after all but the last; ``norm`` puts a LayerNorm before each activation."""
    modules: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        modules.append(nn.Linear(inputs, outputs))
        if i < len(widths) - 2:
            modules += [nn.LayerNorm(outputs), activation()] if norm else [activation()]
    return nn.Sequential(*modules)


def autoencoder(widths: Sequence[int], activation: Activation, last: Activation | None = None) -> nn.Sequential:
    """From the first width to the last, the code, and back; the code has no activation."""
    modules: list[nn.Module] = []
    for half in (list(widths), list(widths)[::-1]):
        modules += mlp(half, activation)
    return nn.Sequential(*modules, *([last()] if last else []))


def convnet(side: int, channels: Sequence[int], classes: int, norm: bool) -> nn.Sequential:
    """Convolutions 3x3 of stride 2 with ReLU, with BatchNorm if ``norm``, and a linear layer, for flat images."""
    modules: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    for inputs, outputs in pairwise([1, *channels]):
        modules.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))
        modules += [nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [nn.ReLU()]
        side = (side + 1) // 2
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels[-1] * side * side, classes))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def residual(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """Residual blocks of LayerNorm, linear, SiLU and linear."""
    blocks = (_Residual(width) for _ in range(depth))
    return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.LayerNorm(width), nn.Linear(width, outputs))


class Pooled(nn.Sequential):
    """Convolutions 3x3 whose positions are averaged at the end, for flat images; many have a pooling between them."""

    def __init__(self, side: int, channels: Sequence[int], classes: int, norm: bool, activation: Activation) -> None:
        modules: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
        for i, (inputs, outputs) in enumerate(pairwise([1, *channels])):
            modules.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            modules += [nn.BatchNorm2d(outputs), activation()] if norm else [activation()]
            if len(channels) > 2 and i == len(channels) // 2 - 1:
                modules.append(nn.MaxPool2d(2))
        super().__init__(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


class Upsampling(nn.Module):
    """An autoencoder of flat images: linear layers to the code, convolutions 3x3 on enlarged images from it."""

    def __init__(self, side: int, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.encoder = mlp([side**2, *widths], nn.Tanh)
        self.start = nn.Sequential(nn.Linear(widths[-1], channels * (side // 4) ** 2), nn.ReLU())
        self.first, self.last = (nn.Conv2d(channels, outputs, 3, padding=1) for outputs in (channels, 1))
        self.shape = (channels, side // 4, side // 4)

    def forward(self, images: Tensor) -> Tensor:
        """``[examples, side²]`` to the same."""
        x = self.start(self.encoder(images)).unflatten(1, self.shape)
        x = F.relu(self.first(F.interpolate(x, scale_factor=2)))
        return torch.sigmoid(self.last(F.interpolate(x, scale_factor=2))).flatten(1)


class SetOfRows(nn.Module):
    """Linear layers on each row of an image and its number, whose mean further linear layers read."""

    def __init__(self, side: int, width: int, classes: int) -> None:
        super().__init__()
        self.side = side
        self.each = nn.Sequential(mlp((side + 1, width, width), nn.ReLU), nn.ReLU())
        self.all = mlp((width, width, classes), nn.ReLU)

    def forward(self, images: Tensor) -> Tensor:
        """``[examples, side²]`` to ``[examples, classes]``."""
        rows = images.unflatten(1, (self.side, self.side))
        places = torch.linspace(0, 1, self.side).view(1, -1, 1).expand(len(rows), -1, 1)
        return self.all(self.each(torch.cat([rows, places], 2)).mean(1))


class Recurrent(nn.Module):
    """One linear layer that is applied once to each row of an image, and a readout: a plain recurrent network."""

    def __init__(self, side: int, width: int, classes: int) -> None:
        super().__init__()
        self.side, self.width = side, width
        self.cell, self.readout = nn.Linear(side + width, width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``[examples, side²]`` to ``[examples, classes]``."""
        h = images.new_zeros(len(images), self.width)
        for row in images.unflatten(1, (self.side, self.side)).unbind(1):
            h = torch.tanh(self.cell(torch.cat([row, h], 1)))
        return self.readout(h)


class GPT(nn.Module):
    """A character GPT; returns ``[tokens of all windows, characters]``."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(len(ALPHABET), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)

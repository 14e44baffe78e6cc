"""The networks of the experiments: the paper's autoencoder, a small convnet, a small GPT on characters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locoprop_torch.demo.experiments import autoencoder as tanh_autoencoder

__all__ = ["ACTIVATIONS", "GPT", "Block", "autoencoder", "convnet", "scaled"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def scaled(encoder: Sequence[int], width: float, depth: int) -> tuple[int, ...]:
    """``encoder`` with its hidden layers ``width`` times as wide and ``depth`` times each; image and code stay.

    Raises:
        ValueError: ``width`` or ``depth`` is too small for a layer.
    """
    if width <= 0 or depth < 1:
        raise ValueError(f"width must be > 0 and depth >= 1, got width={width} and depth={depth}")
    hidden = [max(1, round(units * width)) for units in encoder[1:-1] for _ in range(depth)]
    return (encoder[0], *hidden, encoder[-1])


def autoencoder(encoder: Sequence[int], activation: str, seed: int) -> nn.Sequential:
    """The demo's autoencoder (glorot uniform weights, identity code, logits) with another activation function."""
    model = tanh_autoencoder(encoder, seed)
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Tanh):
            setattr(model, name, ACTIVATIONS[activation]())
    return model


def convnet(seed: int, classes: int = 10) -> nn.Sequential:
    """Three convolutions with ReLU and a linear layer, for images ``[B, 784]``; torch's own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, classes),
        )


class Block(nn.Module):
    """A block of a decoder: causal attention and an MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder on characters: logits ``[batch, length, vocabulary]`` of the next, from indices ``[batch, length]``.

    Args:
        vocabulary: number of characters.
        context: the longest input.
        seed: of the weights.
        width: of the residual stream.
        heads: of each attention.
        depth: number of blocks.
    """

    def __init__(
        self, vocabulary: int, context: int, seed: int, width: int = 64, heads: int = 4, depth: int = 2
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))

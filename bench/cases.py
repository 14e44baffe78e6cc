"""What is measured: networks and single layers, with their necessary work and an estimate of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from locoprop_kernels.sampling import count_sets, set_size

__all__ = ["Case", "Convolution", "Layer", "all_cases", "select"]

PAPER_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


@dataclass(frozen=True)
class Convolution:
    """A square convolution of square images, in networks only (``scope="step"``)."""

    channels: int
    side: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1

    @property
    def positions(self) -> int:
        """Positions of the output."""
        return ((self.side + 2 * self.padding - self.kernel) // self.stride + 1) ** 2


@dataclass(frozen=True)
class Layer:
    """``B`` examples, ``K`` inputs, ``N`` outputs and the transfer function.

    A convolution counts as a linear layer on its patches: ``B`` = examples × positions, ``K`` = channels × kernel².
    """

    batch: int
    inputs: int
    outputs: int
    transfer: str
    convolution: Convolution | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one product ``X Wᵀ``."""
        return self.batch * self.inputs * self.outputs

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(N, K)``, or ``(N, C, kernel, kernel)`` of a convolution."""
        c = self.convolution
        return (self.outputs, self.inputs) if c is None else (self.outputs, c.channels, c.kernel, c.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(B, K)``, or ``(examples, C, side, side)`` of a convolution."""
        c = self.convolution
        return (self.batch, self.inputs) if c is None else (self.batch // c.positions, c.channels, c.side, c.side)


@dataclass(frozen=True)
class Case:
    """One piece of work for all contestants.

    Attributes:
        name: what ``--case`` matches.
        family: what the case belongs to, for tables and plots.
        layers: the layers; a chain if ``scope`` is ``"step"``, unrelated ones if ``"local"``.
        iterations: ``T``.
        scope: ``"step"``: forward, backward and local loops; ``"local"``: the local loops alone.
        loss: ``"matching"`` (LocoProp-M) or ``"squared"`` (LocoProp-S).
        quick: part of ``--quick``.
        rows: rows of the batch in each local step; ``None`` for all.
    """

    name: str
    family: str
    layers: tuple[Layer, ...]
    iterations: int = 10
    scope: str = "step"
    loss: str = "matching"
    quick: bool = False
    rows: int | None = None

    def local_flops(self) -> int:
        """Products of the local loops in increment form; with the squared loss the cheaper of product and Gram form."""
        return sum(self._layer_flops(layer) for layer in self.layers)

    def _layer_flops(self, layer: Layer) -> int:
        return self._gram_flops(layer) if self.takes_gram(layer) else self._product_flops(layer)

    def takes_gram(self, layer: Layer) -> bool:
        """Whether ``layer`` has a Gram form, which only the identity has, and that form needs fewer products."""
        if self.local_batch(layer) < layer.batch:
            return False
        identity = self.loss == "squared" or layer.transfer == "identity"
        return identity and self._gram_flops(layer) < self._product_flops(layer)

    def local_batch(self, layer: Layer) -> int:
        """Rows of a layer's batch in a local step, at most."""
        return set_size(layer.batch, count_sets(layer.batch, self.rows), 0)

    def _product_flops(self, layer: Layer) -> int:
        return 4 * self.local_batch(layer) * layer.inputs * layer.outputs * (self.iterations - 1)

    def _gram_flops(self, layer: Layer) -> int:
        return 2 * layer.inputs**2 * (layer.batch + layer.outputs * (self.iterations - 1))

    def training_flops(self) -> int:
        """Forward and backward pass: three products a layer, two in the first."""
        return 2 * (3 * sum(layer.macs for layer in self.layers) - self.layers[0].macs) if self.scope == "step" else 0

    def flops(self) -> int:
        """All necessary products."""
        return self.local_flops() + self.training_flops()

    def bytes(self, operand_bytes: int = 4) -> int:
        """Least traffic of the local loops with the main memory: every tensor once, if the rest stays in caches."""
        weights = sum((layer.inputs + 1) * layer.outputs for layer in self.layers)
        inputs = sum(math.prod(layer.input_shape) for layer in self.layers)
        outputs = sum(layer.batch * layer.outputs for layer in self.layers)
        activations = operand_bytes * inputs + 4 * outputs
        # Each weight's gradient is read; the weight and its two slots of state are read and written.
        return activations + weights * 4 * (1 + 2 + 2 * 2)

    def memory(self) -> int:
        """Peak of the hungriest contestant (textbook form, or the check in float64), in bytes."""
        activations = [layer.batch * (layer.inputs + 6 * layer.outputs) for layer in self.layers]
        weights = sum(layer.inputs * layer.outputs for layer in self.layers)
        kept = sum(layer.batch * (layer.inputs + layer.outputs) for layer in self.layers)
        return 8 * (max(activations) + kept) + 4 * 40 * weights

    def sizes(self) -> list[tuple[int, int, int]]:
        """``(B, K, N)`` of each layer."""
        return [(layer.batch, layer.inputs, layer.outputs) for layer in self.layers]


def network(name: str, widths: Sequence[int], batch: int, family: str, **options: Any) -> Case:
    """An autoencoder like the paper's: tanh, an identity code in the middle, sigmoid outputs."""
    count = len(widths) - 1
    transfers = ["tanh"] * count
    transfers[count // 2 - 1] = "identity"
    transfers[-1] = "sigmoid"
    layers = [Layer(batch, k, n, f) for (k, n), f in zip(pairwise(widths), transfers, strict=True)]
    return Case(name, family, tuple(layers), **options)


def convnet(name: str, examples: int, side: int, channels: Sequence[int], classes: int, **options: Any) -> Case:
    """An image classifier: 3x3 convolutions, all but the first of stride 2, then a linear layer; tanh in between."""
    layers = []
    for i, (c, n) in enumerate(pairwise(channels)):
        convolution = Convolution(c, side, stride=1 if i == 0 else 2)
        positions = convolution.positions
        layers.append(Layer(examples * positions, c * convolution.kernel**2, n, "tanh", convolution))
        side = math.isqrt(positions)
    layers.append(Layer(examples, channels[-1] * side**2, classes, "sigmoid"))
    return Case(name, "convnet", tuple(layers), **options)


def _wide(factor: int) -> tuple[int, ...]:
    return (784, *(factor * width for width in PAPER_WIDTHS[1:-1]), 784)


def _deep(extra: int) -> tuple[int, ...]:
    """The paper's network with ``extra`` more layers of 500 units on each side of the code."""
    return (784, 1000, 500, *[500] * extra, 250, 30, 250, *[500] * extra, 500, 1000, 784)


def _gpt_block(tokens: int, iterations: int, loss: str) -> Case:
    width = 768
    shapes = [
        (width, 3 * width, "identity"),
        (width, width, "identity"),
        (width, 4 * width, "squared_relu"),
        (4 * width, width, "identity"),
    ]
    letter = "m" if loss == "matching" else "s"
    return Case(
        f"gpt-block-{letter}-{tokens // 1024}k",
        "gpt",
        tuple(Layer(tokens, k, n, f) for k, n, f in shapes),
        iterations,
        scope="local",
        loss=loss,
    )


def all_cases() -> list[Case]:
    """Every case, whatever the machine."""
    paper = network("paper", PAPER_WIDTHS, 1000, "paper", quick=True)
    cases = [
        paper,
        replace(paper, name="paper-local", scope="local", quick=True),
        replace(paper, name="paper-s", loss="squared", quick=True),
        replace(paper, name="paper-rows", family="rows", rows=32, quick=False),
        replace(paper, name="paper-rows-local", family="rows", rows=32, scope="local", quick=False),
    ]
    sizes = pairwise((784, 256, 256, 10))
    classifier = tuple(Layer(128, k, n, "tanh" if n > 10 else "sigmoid") for k, n in sizes)
    cases.append(Case("classifier-rows", "rows", classifier, rows=32))
    cases += [network(f"width-x{factor}", _wide(factor), 1000, "width") for factor in (2, 4)]
    cases += [network(f"depth-{8 + 2 * extra}", _deep(extra), 1000, "depth") for extra in (1, 2, 4)]
    cases += [replace(paper, name=f"T-{t}", family="iterations", iterations=t, quick=False) for t in (1, 2, 5, 20, 50)]
    cases += [network(f"batch-{b}", PAPER_WIDTHS, b, "batch") for b in (100, 300, 3000, 10_000, 65_536)]
    for size in (256, 512, 1024, 2048, 4096, 8192):
        for batch in (1000, 8192):
            layer = Layer(batch, size, size, "tanh")
            cases.append(Case(f"square-{size}-B{batch}", "square", (layer,), scope="local"))
    cases += [_gpt_block(tokens, 4, "matching") for tokens in (16 * 1024, 64 * 1024)]
    cases += [_gpt_block(tokens, 10, "squared") for tokens in (16 * 1024, 64 * 1024)]
    mlp = Layer(8192, 768, 3072, "squared_relu")
    cases.append(Case("gpt2-mlp-x12", "gpt", (mlp,) * 12, 4, scope="local"))
    tokens = Layer(64 * 1024, 768, 768, "tanh")
    cases.append(Case("tokens-64k-m", "tokens", (tokens,), scope="local"))
    cases.append(Case("tokens-64k-s", "tokens", (tokens,), scope="local", loss="squared"))
    cases.append(convnet("convnet-B128", 128, 32, (3, 32, 64, 128), 10))
    return cases


def select(patterns: Sequence[str], quick: bool) -> list[Case]:
    """Cases whose name or family is, or begins with, one of ``patterns``; all (or the quick ones) without patterns.

    Raises:
        ValueError: a pattern matches nothing.
    """
    cases = all_cases()
    if not patterns:
        return [case for case in cases if case.quick or not quick]
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in cases):
            raise ValueError(f"--case {pattern!r} matches none of {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(_matches(case, pattern) for pattern in patterns)]


def _matches(case: Case, pattern: str) -> bool:
    return pattern in (case.name, case.family) or (pattern.endswith("*") and case.name.startswith(pattern[:-1]))

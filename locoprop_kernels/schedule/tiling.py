"""What there is to do: the tiles of both phases, numbered by layer, n-block and column block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "IntArray",
    "Layer",
    "Tiles",
    "all_tiles",
    "block_of",
    "blocks",
    "check_sizes",
    "count_tiles",
    "first_blocks",
    "tiles_per_block",
]

Layer = tuple[int, int, int]
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels: rows of the weight, rows of the batch (activation), columns of the weight (update)."""

    n: int
    b: int
    k: int

    def __post_init__(self) -> None:
        for name in ("n", "b", "k"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"tile size {name} must be a positive integer, got {size!r}")


def count_tiles(layers: Sequence[Layer], tiles: Tiles) -> tuple[int, int]:
    """Number of activation tiles and of update tiles of a local step."""
    rows = [blocks(outputs, tiles.n) for _, _, outputs in layers]
    return (
        sum(n * blocks(batch, tiles.b) for n, (batch, _, _) in zip(rows, layers, strict=True)),
        sum(n * blocks(inputs, tiles.k) for n, (_, inputs, _) in zip(rows, layers, strict=True)),
    )


def check_sizes(layers: Sequence[Layer], programs: int) -> None:
    """Raise a ``ValueError`` that names what is not a size."""
    if not len(layers):
        raise ValueError("layers must have at least one entry, got none")
    for index, layer in enumerate(layers):
        if len(layer) != 3 or not all(isinstance(size, (int, np.integer)) and size > 0 for size in layer):
            raise ValueError(f"layers[{index}] must be (B, K, N), three positive integers, got {layer!r}")
    if isinstance(programs, bool) or not isinstance(programs, int) or programs < 1:
        raise ValueError(f"programs must be a positive integer, got {programs!r}")


def first_blocks(layers: Sequence[Layer], tiles: Tiles) -> IntArray:
    """``[layers + 1]``: number of n-blocks before each layer."""
    counts = [blocks(outputs, tiles.n) for _, _, outputs in layers]
    return np.cumsum([0, *counts]).astype(np.int32)


def all_tiles(layers: Sequence[Layer], tiles: Tiles) -> tuple[IntArray, IntArray]:
    """Every activation tile and every update tile, in lexicographic order."""
    batch, inputs, outputs = np.array(layers, np.int64).reshape(-1, 3).T
    rows = -(-outputs // tiles.n)
    return _grids(rows, -(-batch // tiles.b)), _grids(rows, -(-inputs // tiles.k))


def _grids(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> IntArray:
    """Layer, row and column of every place of a grid per layer; no loop over layers, of which groups make many."""
    counts = rows * columns
    layer = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([layer, place // columns[layer], place % columns[layer]], 1).astype(np.int32)


def block_of(rows: IntArray, first_block: IntArray) -> NDArray[np.int64]:
    """Index of each tile's n-block among all layers'."""
    return first_block[rows[:, 0]].astype(np.int64) + rows[:, 1]


def tiles_per_block(rows: IntArray, first_block: IntArray) -> IntArray:
    """``[n-blocks]``: how many of the tiles each n-block has."""
    return np.bincount(block_of(rows, first_block), minlength=int(first_block[-1])).astype(np.int32)


def blocks(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)

"""The programs of the rows driver, one for each n-block, and what a local step of theirs is predicted to take."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from locoprop_kernels.devices import H100, DeviceModel
from locoprop_kernels.schedule.costs import OPERAND_BYTES
from locoprop_kernels.schedule.tiling import IntArray, Layer, Tiles

__all__ = ["PASS_BYTES", "output_cost", "row_blocks", "rows_bytes", "rows_step"]

# Bytes of a weight in a local step: G_0, Δ and two slots in; Δ and the slots out.
PASS_BYTES = 28
# Guess: round trips to the cache of a local step before and after its pass over the weights: rate and bias, A0, the
# first tile.
_ROUND_TRIPS = 3


def row_blocks(layers: Sequence[Layer], tiles: Tiles) -> IntArray:
    """Layer and n-block of each program, ``[count, 2]``: the most expensive first, which the hardware starts in order.

    Args:
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
    """
    blocks, heights, inputs = _blocks(layers, tiles)
    return blocks[np.argsort(-heights * inputs, kind="stable")]


def _blocks(layers: Sequence[Layer], tiles: Tiles) -> tuple[IntArray, NDArray[np.int64], NDArray[np.int64]]:
    """Layer and n-block, rows and columns of every n-block."""
    _, inputs, outputs = np.array(layers, np.int64).reshape(-1, 3).T
    counts = -(-outputs // tiles.n)
    layer = np.repeat(np.arange(len(counts)), counts)
    block = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    heights = np.minimum(tiles.n, outputs[layer] - block * tiles.n)
    return np.stack([layer, block], 1).astype(np.int32), heights, inputs[layer]


def rows_bytes(layers: Sequence[Layer], tiles: Tiles) -> int:
    """Bytes that all programs move between multiprocessors and cache in a local step."""
    return int(_bytes(*_blocks(layers, tiles)[1:], tiles).sum())


def _bytes(heights: NDArray[np.int64], inputs: NDArray[np.int64], tiles: Tiles) -> NDArray[np.int64]:
    # X is read for this local step's gradient and for the next one's activations.
    return (PASS_BYTES * heights + 2 * OPERAND_BYTES * tiles.b) * inputs


def rows_step(layers: Sequence[Layer], tiles: Tiles, occupancy: int, stages: int, device: DeviceModel = H100) -> float:
    """Seconds of a local step, if everything is in the cache; the longest of three.

    What the cache gives to all multiprocessors together; what one multiprocessor is given and multiplies, which has
    the most to do; and the tiles of the longest queue of programs one after another, each at the latency of its loads
    as far as these are not under way already.

    Args:
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
        occupancy: programs that a multiprocessor holds at once.
        stages: tiles that are loaded at a time, with the one that is worked on.
        device: whose rates to assume.
    """
    _, heights, inputs = _blocks(layers, tiles)
    order = np.argsort(-heights * inputs, kind="stable")
    heights, inputs = heights[order], inputs[order]
    moved = _bytes(heights, inputs, tiles)
    products = 2 * tiles.n * tiles.b * inputs / device.macs_per_second
    steps = -(-inputs // tiles.k) / max(1, stages - 1)
    latency = (steps + _ROUND_TRIPS) * device.round_trip + products
    together = float(moved.sum()) / device.cache_bandwidth
    busiest = _longest_queue(moved / device.multiprocessor_bandwidth + products, device.multiprocessors)
    chain = _longest_queue(latency, device.multiprocessors * occupancy)
    return max(together, busiest, chain)


def output_cost(inputs: int, rows: int, iterations: int, device: DeviceModel = H100) -> float:
    """Predicted cost of one output in all local steps, in multiply-accumulates: the products, and the passes over it.

    Args:
        inputs: ``K``.
        rows: of the batch in a local step.
        iterations: ``T``; the first local step has no products.
        device: whose rates to assume.
    """
    return inputs * (2 * rows * (iterations - 1) + PASS_BYTES / device.bytes_per_mac * iterations)


def _longest_queue(costs: NDArray[np.float64], queues: int) -> float:
    """Of ``queues`` that take the costs in order, each the next one as soon as it is free."""
    if len(costs) <= queues:
        return float(costs.max())
    ends = [0.0] * queues
    for cost in costs.tolist():
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)

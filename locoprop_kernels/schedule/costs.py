"""What tiles, phases and local steps are predicted to cost on a device, in picoseconds.

A tile costs its product, its epilogue and what it waits for before and in between. A product takes as long as the
slowest of three: the matrix unit, the shared memory that it reads operands from, and their way from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from locoprop_kernels.devices import H100, DeviceModel
from locoprop_kernels.schedule.tiling import IntArray, Layer, Tiles, all_tiles, block_of, blocks

__all__ = [
    "ACTIVATION_BYTES",
    "OPERAND_BYTES",
    "UPDATE_BYTES",
    "CostArray",
    "lower_bound",
    "most_expensive_first",
    "most_expensive_tiles",
    "phase_bounds",
    "splits",
    "step_bound",
    "tile_costs",
]

CostArray = NDArray[np.int64]

# Bytes of an operand's element, taken to be 16-bit in every precision; in products, the device model's.
OPERAND_BYTES = 2
# Bytes of an activation in an epilogue: A0 in, E out.
ACTIVATION_BYTES = 6
# Bytes of a weight in an epilogue: G_0, Δ and two slots in; Δ, its 16-bit copy and the slots out.
UPDATE_BYTES = 30
# Bytes of an element of a partial product.
_PARTIAL_BYTES = 4
# Least rows of a split. Guess: below, storing partial products costs more than computing them.
_LEAST_ROWS = 1024
# Guess: of the shorter of an epilogue's instructions and its traffic, what the longer does not hide.
_NOT_HIDDEN = 0.35
# Guess: with two programs on a multiprocessor, the share of epilogues and latencies that the other's products hide.
_HIDDEN_BY_ANOTHER = 0.7
_PICOSECONDS = 1e12


def tile_costs(
    rows: IntArray,
    layers: Sequence[Layer],
    tiles: Tiles,
    phase: str,
    device: DeviceModel = H100,
    programs: int | None = None,
) -> CostArray:
    """Predicted cost of tiles, in picoseconds: product and epilogue, one after the other.

    A ragged tile takes as many instructions as a whole one (lanes are masked, not skipped), but its epilogue moves only
    what is there. With more programs than multiprocessors these share one, and each takes so much longer.

    Args:
        rows: ``[count, 3]``: layer, n-block, b-block or k-block.
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
        phase: ``"activation"`` or ``"update"``.
        device: whose rates to assume.
        programs: how many run at once; ``None`` for one on each multiprocessor.
    """
    product, epilogue, _ = _tile_work(rows, layers, tiles, phase, device)
    shared = max(1, (programs or 0) // device.multiprocessors)
    if shared > 1:
        epilogue *= 1 - _HIDDEN_BY_ANOTHER
    return np.rint(shared * (product + epilogue)).astype(np.int64)


def _tile_work(
    rows: IntArray, layers: Sequence[Layer], tiles: Tiles, phase: str, device: DeviceModel
) -> tuple[NDArray[np.float64], NDArray[np.float64], CostArray]:
    """Picoseconds of the products and of all else of each tile, and how many elements it writes."""
    batch, inputs, outputs = np.asarray(layers, np.int64).reshape(-1, 3)[rows[:, 0]].T
    if phase == "activation":
        columns, reduction, width, moved = batch, inputs, tiles.b, ACTIVATION_BYTES
    else:
        columns, reduction, width, moved = inputs, batch, tiles.k, UPDATE_BYTES
    height = np.minimum(tiles.n, outputs - rows[:, 1].astype(np.int64) * tiles.n)
    written = height * np.minimum(width, columns - rows[:, 2].astype(np.int64) * width)
    product = _PICOSECONDS * _product_step(tiles.n, width, device) * reduction
    issued = device.epilogues[phase]
    cycles = max(issued.instructions / device.issued_per_cycle, issued.special / device.special_per_cycle)
    computing = tiles.n * width * cycles / device.clock
    moving = moved * written / device.bytes_per_second
    epilogue = np.maximum(computing, moving) + _NOT_HIDDEN * np.minimum(computing, moving)
    return product, _PICOSECONDS * (epilogue + device.tile_latency), written


def _product_step(height: int, width: int, device: DeviceModel) -> float:
    """Seconds of a product's tile for each element of the reduction, if nothing else holds it up."""
    multiplying = height * width / device.macs_per_second
    # Into the shared memory, and out of it once for each instruction's rows, with both operands.
    rows = min(height, device.matrix_rows)
    shared = height + width + height / rows * (rows + width)
    reading = device.operand_bytes * shared / device.shared_bytes_per_cycle / device.clock
    loading = device.operand_bytes * (height + width) / device.bytes_per_second
    return max(multiplying, reading, loading)


def most_expensive_first(
    layers: Sequence[Layer], tiles: Tiles, device: DeviceModel = H100
) -> tuple[IntArray, IntArray]:
    """Tiles of both phases for launches of their own, whose queue is the hardware's: it takes them in order.

    Args:
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
        device: whose rates to assume.

    Returns:
        ``activation_tiles`` and ``update_tiles`` as in a :class:`Schedule`.
    """
    activation, update = all_tiles(layers, tiles)
    return (
        activation[np.argsort(-tile_costs(activation, layers, tiles, "activation", device), kind="stable")],
        update[np.argsort(-tile_costs(update, layers, tiles, "update", device), kind="stable")],
    )


def splits(layers: Sequence[Layer], tiles: Tiles, programs: int, device: DeviceModel = H100) -> tuple[int, ...]:
    """Into how many splits to cut the batch in the products of each layer's update tiles, in launches per phase.

    A layer of few tiles and many examples keeps most programs waiting; its products are then computed in splits, which
    the update adds up. Even shares of several sizes are tried.

    Args:
        layers: ``(B, K, N)`` of each layer.
        tiles: tile sizes.
        programs: how many programs run at once.
        device: whose rates to assume.

    Returns:
        The number of splits of each layer; 1 where cutting does not pay.
    """
    counts = [blocks(outputs, tiles.n) * blocks(inputs, tiles.k) for _, inputs, outputs in layers]
    share = max(1, int(sum(count * layer[0] for count, layer in zip(counts, layers, strict=True)) / programs))
    candidates = [(1,) * len(layers)]
    for factor in range(1, 9):
        even = [min(-(-factor * batch // share), batch // _LEAST_ROWS) for batch, _, _ in layers]
        candidates.append(tuple(max(1, part) for part in even))
    return min(candidates, key=lambda found: _update_bound(layers, tiles, programs, found, device))


def phase_bounds(layers: Sequence[Layer], tiles: Tiles, programs: int, device: DeviceModel = H100) -> tuple[int, int]:
    """Least cost of an activation phase and of an update phase, where all programs wait for each other in between."""
    rows, _ = all_tiles(layers, tiles)
    activation = lower_bound(tile_costs(rows, layers, tiles, "activation", device), programs)
    return activation, _update_bound(layers, tiles, programs, splits(layers, tiles, programs, device), device)


def _update_bound(
    layers: Sequence[Layer], tiles: Tiles, programs: int, found: tuple[int, ...], device: DeviceModel
) -> int:
    """Least cost of an update phase whose batches are cut into ``found`` splits."""
    rows = all_tiles(layers, tiles)[1]
    product, epilogue, written = _tile_work(rows, layers, tiles, "update", device)
    cut = np.array(found)[rows[:, 0]]
    whole = cut == 1
    stored = _PICOSECONDS * _PARTIAL_BYTES / device.bytes_per_second * written
    partial = product / cut + stored + _PICOSECONDS * device.tile_latency
    reduced = epilogue + stored * cut
    update = lower_bound(np.rint(np.where(whole, product + epilogue, reduced)).astype(np.int64), programs)
    if whole.all():
        return update
    partials = np.rint(np.repeat(partial[~whole], cut[~whole])).astype(np.int64)
    return update + lower_bound(partials, programs) + device.launch_cost


def lower_bound(costs: CostArray, programs: int) -> int:
    """No assignment of the tiles to ``programs`` queues has a shorter longest queue.

    The average, and for each ``j``: of the ``j·programs + 1`` most expensive tiles some queue holds ``j + 1``.
    """
    if not len(costs):
        return 0
    ranked = np.sort(costs)[::-1]
    total = np.concatenate([[0], np.cumsum(ranked)])
    # j·programs, with j = 0, 1, ...
    last = np.arange(0, len(ranked), programs)
    crowded = total[last + 1] - total[last - last // programs]
    return max(-(-int(total[-1]) // programs), int(crowded.max()))


def step_bound(
    activation_tiles: IntArray,
    activation_costs: CostArray,
    update_tiles: IntArray,
    update_costs: CostArray,
    first_block: IntArray,
    programs: int,
) -> int:
    """The queues' bound, and the time of an activation and an update tile of one n-block, which run in turn."""
    chain = most_expensive_tiles(activation_tiles, activation_costs, first_block) + most_expensive_tiles(
        update_tiles, update_costs, first_block
    )
    return max(lower_bound(np.concatenate([activation_costs, update_costs]), programs), int(chain.max()))


def most_expensive_tiles(rows: IntArray, costs: CostArray, first_block: IntArray) -> CostArray:
    """Cost of each n-block's most expensive tile."""
    highest = np.zeros(int(first_block[-1]), np.int64)
    np.maximum.at(highest, block_of(rows, first_block), costs)
    return highest

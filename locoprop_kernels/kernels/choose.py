"""The choice of a configuration and of a driver: pure functions of sizes and of what is assumed of the device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from locoprop_kernels import schedule
from locoprop_kernels.devices import DeviceModel
from locoprop_kernels.kernels.configs import Config

__all__ = ["Choice", "Layers", "choose", "gram_pays", "predicted"]

Layers = tuple[tuple[int, int, int], ...]


def predicted(config: Config, driver: str, layers: Layers, form: str, device: DeviceModel) -> float:
    """Cost of a local step in picoseconds, waits included; a pure function.

    Args:
        config: tile sizes.
        driver: ``"single"``, ``"grouped"`` or ``"rows"``.
        layers: ``(B, K, N)`` of each layer.
        form: ``"gram"`` has no activation phase.
        device: what is assumed of the device, with its number of multiprocessors.
    """
    if driver == "rows":
        return 1e12 * schedule.rows_step(layers, config.tiles, config.occupancy, config.stages, device)
    if driver == "single":
        plan = schedule.build(layers, config.tiles, device.multiprocessors * config.occupancy, device)
        return plan.makespan(3) / 3 + 2 * device.wait_cost
    activation, update = schedule.phase_bounds(layers, config.tiles, device.multiprocessors, device)
    if form == "gram":
        return max(update + device.launch_cost, device.host_launch_cost)
    return max(activation + update + 2 * device.launch_cost, 2 * device.host_launch_cost)


class Choice(NamedTuple):
    """How to run layers that share a launch.

    Attributes:
        config: tile sizes.
        programs: of the single launch; 0 for other drivers.
        splits: of the batch in the products of each layer's update tiles.
        driver: ``"single"``, ``"grouped"`` or ``"rows"``.
    """

    config: Config
    programs: int
    splits: tuple[int, ...]
    driver: str


def _best(
    found: tuple[Config, ...],
    layers: Layers,
    form: str,
    slots: int,
    device: DeviceModel,
    driver: str | None,
    for_rows: tuple[Config, ...] = (),
) -> tuple[float, str, Config]:
    """The lowest predicted cost of a local step, and the driver and configuration that have it."""
    if form != "product":
        driver = "grouped"
    options = [("rows", config) for config in for_rows]
    most = device.most_tiles_per_multiprocessor * device.multiprocessors
    for config in found:
        if not config.general and (form != "product" or slots > 2):
            continue
        few = driver == "single" or sum(schedule.count_tiles(layers, config.tiles)) <= most
        possible = [name for name in ("single", "grouped") if driver in (None, name) and config.driver in (None, name)]
        options += [(name, config) for name in possible if few or name == "grouped"]
    if not options:
        raise ValueError(f"found must hold a configuration that every kernel may use (driver=None), got {found}")
    costs = [predicted(config, name, layers, form, device) for name, config in options]
    best = costs.index(min(costs))
    return costs[best], *options[best]


@lru_cache(maxsize=1024)
def choose(
    found: tuple[Config, ...],
    layers: Layers,
    form: str,
    slots: int,
    device: DeviceModel,
    driver: str | None = None,
    for_rows: tuple[Config, ...] = (),
) -> Choice:
    """The configuration and driver with the lowest predicted cost; a pure function.

    Args:
        found: the configurations to choose from; the first of equals is taken.
        layers: ``(B, K, N)`` of each layer.
        form: ``"product"``, which has a single launch, or another.
        slots: tensors of the rule's state.
        device: what is assumed of the device, with its number of multiprocessors.
        driver: ``"single"`` or ``"grouped"`` to have only that of the two, where the form has both.
        for_rows: the configurations of the rows driver; none where it is not to be taken.
    """
    _, best, config = _best(found, layers, form, slots, device, driver, for_rows)
    whole = (1,) * len(layers)
    if best == "single":
        return Choice(config, device.multiprocessors * config.occupancy, whole, best)
    if best == "rows" or form == "gram":
        return Choice(config, 0, whole, best)
    return Choice(config, 0, schedule.splits(layers, config.tiles, device.multiprocessors, device), best)


@lru_cache(maxsize=1024)
def gram_pays(found: tuple[Config, ...], layers: Layers, iterations: int, slots: int, device: DeviceModel) -> bool:
    """Whether the Gram form of these layers is predicted to take less time, launches included; a pure function.

    A small layer with an identity transfer is better off in the launches of the others. Arguments as of
    :func:`choose`; ``iterations`` is ``T``.
    """
    grams = tuple((k, k, n) for _, k, n in layers)
    products = 1e12 * sum(b * k * k for b, k, _ in layers) / device.multiprocessors / device.macs_per_second
    gram, *_ = _best(found, grams, "gram", slots, device, None)
    product, *_ = _best(found, layers, "product", slots, device, None)
    return products + iterations * gram < (iterations - 1) * product

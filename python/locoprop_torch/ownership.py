"""Replicas that share the work: which process solves which outputs, and keeps the rule's state of them alone.

Every process has all weights and gradients, as under ``DistributedDataParallel``. With ``shard_state=True`` the outputs
of all layers, one after another, are cut into a part for each process, of the same predicted cost. Each process solves
the local problems of its part. Before anything is written all of them exchange their increments, once a step, and every
process adds those of the others to its weights. A layer whose outputs are not independent has one owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from locoprop_kernels import rules, schedule
from locoprop_kernels.problem import accumulation_dtype
from locoprop_torch.auxiliary import own_groups
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.layers import transfer_in_use
from locoprop_torch.layouts import laid_out, number_of_groups
from locoprop_torch.sharding import is_sharded
from locoprop_torch.step import Solved, shrink
from locoprop_torch.wire import Shape, Wire
from locoprop_torch.work import Place, trained

if TYPE_CHECKING:
    from locoprop_torch.optimizer import LocoProp

__all__ = ["Bounds", "Owners", "Received", "assign", "cut", "outputs_are_independent"]

Bounds = tuple[int, ...]
"""Where the outputs of a layer are cut: process ``p`` owns those from ``bounds[p]`` up to ``bounds[p + 1]``."""
# Parts of large layers begin at multiples of this many outputs, so that their memory is aligned.
_ALIGNED = 16
# Stands for the rows of a local step that takes all, as their number is another one in each step. Only the ratio of
# layers that differ in T depends on it.
_ALL_ROWS = 1024


def outputs_are_independent(optimizer: LocoProp, layer: CapturedLayer) -> bool:
    """Whether the local problem of a layer can be solved for each of its outputs alone."""
    group = _group(optimizer, layer)
    transfer = transfer_in_use(layer, group["transfer"], optimizer.local_loss)
    elementwise = transfer.elementwise and rules.is_elementwise(group["rule"])
    return elementwise and optimizer.regulariser is None and number_of_groups(layer.module) == 1


def _group(optimizer: LocoProp, layer: CapturedLayer) -> dict[str, Any]:
    """The parameter group that a layer takes its hyper-parameters from."""
    return next(g for g in own_groups(optimizer.param_groups) if any(p is layer.weight for p in g["params"]))


def cut(layers: Sequence[tuple[int, float, bool]], processes: int) -> list[Bounds]:
    """Give every process outputs of about the same cost; a pure function.

    Process ``p`` gets the outputs between ``p / processes`` and ``(p + 1) / processes`` of the whole cost, so it has
    parts of as few layers as can be.

    Args:
        layers: of each layer the number of outputs, the cost of one, and whether they may be parted.
        processes: how many there are.
    """
    share = sum(count * cost for count, cost, _ in layers) / processes
    found, before = [], 0.0
    for count, cost, parted in layers:
        if parted:
            step = _ALIGNED if count >= _ALIGNED * processes else 1
            places = [step * round((p * share - before) / cost / step) for p in range(processes)]
            found.append((*(min(max(place, 0), count) for place in places), count))
        else:
            owner = min(int((before + count * cost / 2) / share), processes - 1)
            found.append((*[0] * (owner + 1), *[count] * (processes - owner)))
        before += count * cost
    return found


class Owners:
    """Which process owns which outputs of each layer.

    Args:
        bounds: of each layer, by name.
        processes: how many there are.
    """

    def __init__(self, bounds: Mapping[str, Bounds], processes: int) -> None:
        self.bounds, self.processes = dict(bounds), processes

    @classmethod
    def wanted(cls, optimizer: LocoProp, processes: int) -> Owners:
        """The owners by predicted cost: a function of layers and settings, not of the batch, so that a resume has them
        again."""
        layers = {name: layer for name, layer in optimizer._layers.items() if not is_sharded(layer.weight)}
        rows = optimizer.rows or _ALL_ROWS
        described = []
        for layer in layers.values():
            iterations = _group(optimizer, layer)["local_iterations"]
            cost = schedule.output_cost(layer.weight[0].numel(), rows, iterations)
            described.append((len(layer.weight), cost, outputs_are_independent(optimizer, layer)))
        return cls(dict(zip(layers, cut(described, processes), strict=True)), processes)

    def share(self, name: str, rank: int) -> slice:
        """The outputs of a layer that a process owns."""
        return slice(*self.bounds[name][rank : rank + 2])

    # --- state

    def whole_state(self, wire: Wire, optimizer: LocoProp) -> dict[Tensor, dict[str, Tensor]]:
        """The rule's state of all outputs, on the host; all processes must come here.

        Raises:
            RuntimeError: they have not, within the timeout of the process group.
        """
        wire.meet(f"state {optimizer.rows_seed}")
        parameters = list(self._parameters(optimizer))
        mine = [_described(optimizer.state.get(p) or {}) for _, p in parameters]
        everything = wire.objects(mine)
        found: dict[Tensor, dict[str, Tensor]] = {}
        for index, (_, p) in enumerate(parameters):
            described = [some[index] for some in everything]
            slots = max((list(some) for some in described), key=len)
            if not slots:
                continue
            # One parameter at a time, as all state may be more than a device has room for.
            shapes = [list(some.values()) for some in described]
            parts = wire.tensors([(optimizer.state.get(p) or {})[slot] for slot in described[wire.rank]], shapes)
            parts = [tensors for tensors in parts if tensors]
            found[p] = {slot: _joined([some[i] for some in parts], p) for i, slot in enumerate(slots)}
        return found

    def keep_own(self, rank: int, optimizer: LocoProp, state: Mapping[Any, Mapping[str, Tensor]]) -> None:
        """Of a whole state keep what belongs to the outputs of this process."""
        for name, p in self._parameters(optimizer):
            slots, share = state.get(p) or {}, self.share(name, rank)
            mine = {s: value[share].clone() if value.dim() else value for s, value in slots.items()}
            if p in state:
                optimizer.state[p] = mine if share.start < share.stop else {}

    def _parameters(self, optimizer: LocoProp) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in optimizer._layers.items():
            if name in self.bounds:
                yield from ((name, p) for p in layer.parameters.values())

    def mark(self, optimizer: LocoProp) -> None:
        """Have an entry, maybe an empty one, for all state there is: what looks at it finds some in every process."""
        for name, p in self._parameters(optimizer):
            rule = _group(optimizer, optimizer._layers[name])["rule"]
            if p.grad is not None and (rule.slots or rule.counts_steps):
                optimizer.state.setdefault(p, {})

    # --- increments

    def exchange(self, wire: Wire, optimizer: LocoProp, where: Mapping[int, Place], solved: Solved) -> list[Received]:
        """Send the increments of this process, and receive those of the others.

        Args:
            wire: the processes.
            optimizer: the optimiser.
            where: the place of every parameter.
            solved: what this process has found; of parameters that are not in it zeros are sent.
        """
        own = {
            (work.layer.name, kind): getattr(problem, f"delta_{kind}")
            for call, report in zip(solved.calls, solved.reports, strict=True)
            for work, problem in zip(call.work, report.problems, strict=True)
            for kind in work.trained
        }
        parts = [list(self._trained(optimizer, where, rank)) for rank in range(wire.size)]
        shapes: list[list[Shape]] = [
            [(tuple(part.target.shape), accumulation_dtype(part.target.dtype)) for part in some] for some in parts
        ]
        mine = [
            own[part.key].to(dtype) if part.key in own else torch.zeros(size, dtype=dtype, device=part.target.device)
            for part, (size, dtype) in zip(parts[wire.rank], shapes[wire.rank], strict=True)
        ]
        found = wire.tensors(mine, shapes)
        return [
            part._replace(increment=tensor)
            for rank, (some, tensors) in enumerate(zip(parts, found, strict=True))
            for part, tensor in zip(some, tensors, strict=True)
            if rank != wire.rank
        ]

    def _trained(self, optimizer: LocoProp, where: Mapping[int, Place], rank: int) -> Iterator[Received]:
        """What a process trains in this step, without the increments."""
        for name, layer in optimizer._layers.items():
            found = trained(layer, where, {}) if name in self.bounds else {}
            share = self.share(name, rank) if found else slice(0, 0)
            if share.start == share.stop:
                continue
            for kind, part in found.items():
                target = layer.layout.view(kind, part.parameter.detach()[share])
                yield Received((name, kind), target, 1 - part.place.lr * part.place.group["weight_decay"])


class Received(NamedTuple):
    """An increment of another process.

    Attributes:
        key: layer and kind of the parameter.
        target: a view of the outputs that it belongs to, in the shape of a local problem.
        decay: what they are multiplied by before.
        increment: the increment.
    """

    key: tuple[str, str]
    target: Tensor
    decay: float
    increment: Tensor = torch.empty(0, device="cpu")

    def add(self, finite: Tensor) -> None:
        """What the owner's commit does, to the same bits."""
        shrink(self.target, self.decay, finite)
        if finite.device.type != "cpu":
            self.target.copy_(torch.where(finite, self.target + self.increment, self.target))
        elif finite:
            self.target.add_(self.increment)


def assign(optimizer: LocoProp, wire: Wire) -> Owners | None:
    """Say of each layer which outputs this process solves in a step, and hand state over where that is new.

    Raises:
        ValueError: the state is spread over another number of processes.
    """
    before: Owners | None = optimizer._owners
    now = Owners.wanted(optimizer, wire.size) if optimizer.shard_state else None
    if before is not None and before.processes != wire.size:
        raise ValueError(
            f"the optimiser's state is spread over {before.processes} processes, and now there are {wire.size}: load "
            "a checkpoint"
        )
    if (before and before.bounds) != (now and now.bounds):
        state = before.whole_state(wire, optimizer) if before is not None else dict(optimizer.state)
        if now is not None:
            now.keep_own(wire.rank, optimizer, state)
        else:
            optimizer.state.update(state)
        optimizer._owners = now
    for name, layer in optimizer._layers.items():
        layer.outputs = now.share(name, wire.rank) if now is not None and name in now.bounds else None
    return now


def _described(slots: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {slot: (tuple(value.shape), value.dtype) for slot, value in slots.items()}


def _joined(parts: Sequence[Tensor], parameter: Tensor) -> Tensor:
    """A slot of all outputs, on the host; a number of steps is the same in all parts."""
    if not parts[0].dim():
        return parts[0].cpu()
    return laid_out(torch.cat([part.cpu() for part in parts]), parameter)

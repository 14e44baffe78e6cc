"""Several processes that train one model, each on its part of the batch: which they are, and what a step asks of them.

A step under several processes is the step of one process on their batches, one after another:

* before it, they make sure that they agree (:mod:`locoprop_torch.agreement`);
* every layer's rows of all of them are gathered (:mod:`locoprop_torch.gathering`), and gradients are the same already;
* then each solves the local problems of all layers, and the step is committed if it is finite on all of them.

A process that cannot go on says so in the next exchange, and then all of them raise.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from locoprop_torch.agreement import agree, raise_alike
from locoprop_torch.checks import check_model
from locoprop_torch.gathering import GatheredRows, LocalRows
from locoprop_torch.ownership import Owners, Received, assign, outputs_are_independent
from locoprop_torch.sharding import group_of, is_sharded, is_tensor_parallel, leaves_none_out
from locoprop_torch.step import Solved
from locoprop_torch.wire import Wire
from locoprop_torch.work import Place

if TYPE_CHECKING:
    from locoprop_torch.optimizer import LocoProp

__all__ = ["Alone", "Processes", "gather_rows", "of", "refuse_join", "unwrapped", "whole_state"]

# Whether a model is tensor-parallel, and the DistributedDataParallel that it was last called in.
_parallel: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def gather_rows(model: nn.Module) -> bool:
    """Whether a step gathers the rows of several processes: to be asked in forward passes, where it notes what the
    model is wrapped in."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    # torch has no public way from a model to what wraps it.
    active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if active is not None:
        _wrappers[model] = weakref.ref(active)
    if model not in _parallel:
        _parallel[model] = is_tensor_parallel(model)
    return not _parallel[model]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where it is wrapped in ``DistributedDataParallel``: its layers have the same names then."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.parallel.DistributedDataParallel):
        return model
    _wrappers[inner.module] = weakref.ref(inner)
    return inner.module


def of(optimizer: LocoProp) -> Alone | Processes:
    """The processes that train the model of an optimiser.

    They are those of the ``DistributedDataParallel`` in which the model was called, or of the default process group.

    Raises:
        ValueError: the model is distributed in a way that is not supported, or its process group is gone or was never
            initialised.
    """
    model = optimizer.model
    reference = _wrappers.get(model) if _wrappers else None
    wrapper: Any = None if reference is None else reference()
    if not (dist.is_available() and dist.is_initialized()):
        if wrapper is not None:
            raise ValueError(
                "the process group of the model's DistributedDataParallel is not initialised: call "
                "torch.distributed.init_process_group(...) before the model is wrapped, and keep it until the last step"
            )
        if optimizer._owners is None:
            _refuse_strangers()
        return Alone()
    check_model(model)
    parameters = {f"{n}.{kind}": p for n, layer in optimizer._layers.items() for kind, p in layer.parameters.items()}
    group = group_of(parameters) or (dist.group.WORLD if wrapper is None else wrapper.process_group)
    if dist.get_world_size(group) == 1:
        return Alone()
    device = next(iter(optimizer._layers.values())).weight.device
    return Processes(group, device, wrapper, is_tensor_parallel(model))


def _refuse_strangers() -> None:
    """Refuse to train alone where a launcher has started several processes that do not know of each other.

    It tells them what ``init_process_group()`` reads: torchrun, Lightning and clusters do.

    Raises:
        ValueError: says what would work.
    """
    rank = os.environ.get("RANK")
    if rank is None or not dist.is_available():
        return
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1:
        raise ValueError(
            f"this is process {rank} of {size} (RANK and WORLD_SIZE in its environment), and their process group is "
            "not initialised, so each would train alone: call torch.distributed.init_process_group() and wrap the "
            "model in DistributedDataParallel, or use fully_shard; to train a model of its own in every process, set "
            'os.environ["WORLD_SIZE"] = "1"'
        )


def whole_state(optimizer: LocoProp) -> dict[Tensor, dict[str, Tensor]] | None:
    """The rule's state of all parameters, where it is spread over processes, all of which must come here.

    Returns:
        The state, on the host; ``None`` where this process has all of it.

    Raises:
        ValueError: the process group is gone.
        RuntimeError: the other processes have not come within its timeout.
    """
    if optimizer._owners is None:
        return None
    together = of(optimizer)
    if isinstance(together, Alone):
        raise ValueError(_GONE.format(optimizer._owners.processes))
    return optimizer._owners.whole_state(together.wire, optimizer)


def refuse_join(optimizer: LocoProp, **_: Any) -> NoReturn:
    """Refuse uneven inputs with ``torch.distributed.algorithms.Join``, which asks for it as ``join_hook``.

    Raises:
        ValueError: says what would work.
    """
    raise ValueError(
        "a step within DistributedDataParallel.join() or Join([...]) would wait for processes that have no more "
        "batches: give every process the same number of batches, smaller or empty ones (x[:0], y[:0]) where it has no "
        "more, and take the sum of the loss over examples, as the mean over none is not a number"
    )


_PARALLEL = (
    "tensor-parallel layers must have outputs in every process, and independent ones (an elementwise transfer "
    "function, no rule or regulariser of your own); DistributedDataParallel around them and shard_state=True are not "
    "supported, got layer {!r}: leave it out of the plan of parallelize_module, or use fully_shard"
)
_GONE = (
    "the optimiser's state is spread over {} processes (shard_state=True), whose process group is not initialised: "
    "save it before torch.distributed.destroy_process_group(), and load it to go on in one process"
)


class Alone:
    """One process: nothing to agree on."""

    def begin(self, optimizer: LocoProp, where: Callable[[], Mapping[int, Place]]) -> Mapping[int, Place]:
        """What ``where`` returns.

        Raises:
            ValueError: the optimiser's state is spread over processes that are gone.
        """
        if optimizer._owners is not None:
            raise ValueError(_GONE.format(optimizer._owners.processes))
        for layer in optimizer._layers.values():
            layer.outputs = None
        return where()

    def finish(self, solve: Callable[[], tuple[Solved, Tensor]]) -> tuple[Solved, Tensor]:
        """What ``solve`` returns."""
        return solve()

    def receive(self, finite: Tensor) -> None:
        """Nothing comes from others."""


class Processes:
    """The processes of one step.

    Args:
        group: their process group.
        device: of the parameters.
        wrapper: the model's ``DistributedDataParallel``, if it has one.
        same_batch: whether all of them have the same batch, as with tensor parallelism.
    """

    def __init__(self, group: Any, device: torch.device, wrapper: Any = None, same_batch: bool = False) -> None:
        self.wire = Wire(group, device)
        self.wrapper, self.same_batch = wrapper, same_batch
        self._rows: GatheredRows | None = None
        self._where: Mapping[int, Place] = {}
        self._owners: Owners | None = None
        self._received: list[Received] = []

    def begin(self, optimizer: LocoProp, where: Callable[[], Mapping[int, Place]]) -> Mapping[int, Place]:
        """Agree on the step, say which outputs are solved here, and give every layer the rows of all processes.

        Args:
            optimizer: the optimiser.
            where: checks what a process can alone, and returns the place of every parameter.

        Returns:
            What ``where`` returned.

        Raises:
            ValueError: on all processes alike: one of them cannot make the step, or they do not agree.
        """
        error: Exception | None = None
        self._optimizer = optimizer
        local = LocalRows()
        try:
            self._check(optimizer)
            self._where = where()
            local = LocalRows.counted(optimizer) if self.same_batch else LocalRows.of(optimizer)
        except Exception as raised:
            error = raised
        numbers = agree(self.wire, optimizer, local.numbers, error)
        self._owners = assign(optimizer, self.wire)
        if not self.same_batch:
            self._rows = GatheredRows(self.wire, optimizer, local, numbers)
        elif len({tuple(some) for some in numbers}) > 1:
            raise ValueError(
                "all processes of tensor-parallel layers must have the same batch, got other numbers of passes or rows "
                "in some of them"
            )
        return self._where

    def _check(self, optimizer: LocoProp) -> None:
        if self.wrapper is not None and self.wrapper._join_config.enable:
            refuse_join(optimizer)
        for name, layer in optimizer._layers.items():
            if layer.keep_gradients:
                raise ValueError(
                    f"under several processes only the target 'dual' is supported, layer {name!r} has another"
                )
            layer.whole = is_sharded(layer.weight) and not outputs_are_independent(optimizer, layer)
            others = self.wrapper is not None or optimizer.shard_state
            if self.same_batch and (layer.whole or others or not leaves_none_out(layer.weight)):
                raise ValueError(_PARALLEL.format(name))

    def finish(self, solve: Callable[[], tuple[Solved, Tensor]]) -> tuple[Solved, Tensor]:
        """Solve the local problems, and find out whether all processes may commit.

        Args:
            solve: returns the solution, and whether it may be committed as far as this process knows.

        Returns:
            The solution, and whether it may be committed: a bool tensor on the parameters' device.

        Raises:
            ValueError: on all processes alike, as far as they wait for the device: one of them could not.
        """
        error: Exception | None = None
        solved = Solved()
        flag = torch.tensor(0, device="cpu")
        try:
            solved, finite = solve()
            flag = 1 + finite.to(torch.int64)
        except Exception as raised:
            error = raised
        least = self.wire.least(flag)
        on_host = least.device.type == "cpu"
        if on_host and not least:
            self._put_back()
            raise_alike(self.wire, error)
        if self._owners is not None and not (on_host and least < 2):
            self._received = self._owners.exchange(self.wire, self._optimizer, self._where, solved)
        if error is not None:
            # The others do not wait for the device: they skip the step.
            self._put_back()
            raise error
        if self._rows is not None:
            self._rows.release()
        return solved, least == 2

    def _put_back(self) -> None:
        if self._rows is not None:
            self._rows.put_back()

    def receive(self, finite: Tensor) -> None:
        """Add the increments of the other processes where the whole step is ``finite``."""
        for part in self._received:
            part.add(finite)
        if self._owners is not None:
            self._owners.mark(self._optimizer)

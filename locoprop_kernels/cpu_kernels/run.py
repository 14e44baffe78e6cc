"""The host side of the CPU kernels: from local problems to what the kernel reads and writes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.cpu_kernels.functions import SOFTMAX, arguments_of
from locoprop_kernels.cpu_kernels.loop import BLOCK, local_steps
from locoprop_kernels.cpu_kernels.threads import run_all
from locoprop_kernels.cpu_kernels.tiles import ROWS
from locoprop_kernels.cpu_kernels.updates import factors, family_of
from locoprop_kernels.loop import count_steps
from locoprop_kernels.patches import Rows, one_after_another, several
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.sampling import set_size
from locoprop_kernels.scratch import take
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Increment
from locoprop_kernels.transfers import Transfer

__all__ = ["increments"]

# Outputs that a thread takes at a time: few enough that all threads have work to the end.
_TASK = 2 * BLOCK
# Numbers of a vector register: where rows are no multiple of it, what is left over takes as long as many whole ones.
_VECTOR = 16
# Rows of this length, or a multiple of it, share few places of a cache.
_CONFLICT = 512
_log = logging.getLogger("locoprop_kernels")
_NOTHING = np.empty(0, np.float32), np.empty((0, 0), np.float32)


def increments(problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings) -> list[Increment]:
    """Run all local iterations of some problems, by as many threads as torch uses.

    Args:
        problems: validated problems that :func:`locoprop_kernels.cpu_kernels.can_run`.
        olds: the rule's state in each before the loop.
        settings: the settings of the call.

    Returns:
        the increment of each.
    """
    if not local_steps.signatures:
        _log.info("loading the local loops for CPUs; the first process compiles them, for about ten seconds")
    works = [_Work(problem, old, settings) for problem, old in zip(problems, olds, strict=True)]
    tasks = [task for work in works for task in work.tasks()]
    found = run_all(_Task.run, tasks)
    for task, largest in zip(tasks, found, strict=True):
        increment = task.work.increment
        increment.largest = (increment.largest or 0.0) + largest
    for work in works:
        count_steps(work.increment, settings)
    return [work.increment for work in works]


class _Task(NamedTuple):
    """Some outputs of a problem, from the first to the one behind the last."""

    work: _Work
    first: int
    last: int

    def run(self) -> float:
        return float(local_steps(self.first, self.last, *self.work.arguments))


class _Work:
    """A problem as the kernel takes it: its arguments, and the increment that it writes to."""

    def __init__(self, problem: LocalProblem, old: State, settings: Settings) -> None:
        family = family_of(settings.rule)
        assert family is not None
        assert isinstance(problem.transfer, Transfer)
        transfer = arguments_of(problem.transfer)
        self.family, self.settings, self.old = family, settings, old
        self.outputs, self.whole = problem.weight.shape[0], transfer[0] == SOFTMAX
        self.scale = problem.scale(settings.reduction)
        self.increment = Increment({}, {})
        self.arguments = (
            self._rows(problem),
            self._parameter("weight", problem),
            self._parameter("bias", problem),
            (family.code, family.hyper),
            transfer,
            np.float32(settings.prox),
        )

    def _rows(self, problem: LocalProblem) -> tuple[Any, ...]:
        sets = self.settings.sets(problem)
        order = self.settings.set_order(sets)[: self.settings.iterations - 1]
        operands = self.settings.operands(problem)
        x = _located(problem.x, sets, order, operands, _VECTOR)
        a0 = _located(problem.preactivation, sets, order, torch.float32)
        scale, rounds = np.float32(self.scale * sets), operands is torch.bfloat16
        return x.memory, a0.memory, x.places, a0.places, x.counts, x.length, scale, rounds

    def _parameter(self, kind: str, problem: LocalProblem) -> tuple[Any, ...]:
        """A weight or a bias for the kernel, and memory for what is found."""
        if kind not in self.old:
            none = (_NOTHING[0], _NOTHING[0])
            return *none, np.empty(self.outputs, np.float32), none, none, np.zeros((0, 2), np.float32), np.float32(0.0)
        parameter, gradient = problem.trained()[kind]
        shape, old = parameter.shape, self.old[kind]
        delta = take(shape, torch.float32, parameter.device)
        state = {s: take(shape, torch.float32, v.device) if v.dim() else v.clone() for s, v in old.items()}
        self.increment.delta[kind], self.increment.state[kind] = delta, state
        self.increment.memory += [delta, *(value for value in state.values() if value.dim())]
        nothing = _NOTHING[len(shape) - 1]
        before, after = (
            tuple(_array(slots[slot]) if slot else nothing for slot in self.family.slots) for slots in (old, state)
        )
        rule = self.settings.rule
        rate, rates = problem.rate(kind), self.settings.rates
        if rate != 1:
            rates = tuple(lr * rate for lr in rates)
        own_factors = factors(rule, rates, int(old["step"]) if rule.counts_steps else 0)
        scale = np.float32(self.scale * problem.grad_scale)
        return _array(gradient), _array(parameter.detach()), _array(delta), before, after, own_factors, scale

    def tasks(self) -> list[_Task]:
        """What threads take one by one."""
        size = self.outputs if self.whole else _TASK
        return [_Task(self, first, min(first + size, self.outputs)) for first in range(0, self.outputs, size)]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.contiguous().numpy()


class _Located(NamedTuple):
    """Rows of the sets that local steps take.

    Attributes:
        memory: that they are in.
        places: where each row of each local step begins in it ``[T - 1, r]``.
        counts: how many of them count ``[T - 1]``.
        length: how long a row is.
    """

    memory: NDArray[np.float32]
    places: NDArray[np.int64]
    counts: NDArray[np.int64]
    length: int


def _located(
    rows: Tensor | Rows, sets: int, order: tuple[int, ...], rounding: torch.dtype, multiple: int = 1
) -> _Located:
    """Rows where they are, if that will do, or in a copy.

    Args:
        rows: all rows, or those that were chosen.
        sets: into how many sets they fall.
        order: the set of each local step.
        rounding: the dtype that they are rounded to; they are held in float32.
        multiple: what the length of a row must be a multiple of: there are zeros behind it where it is not.
    """
    batch, columns = rows.shape
    length = -(-columns // multiple) * multiple
    if multiple > 1 and length % _CONFLICT == 0:
        length += multiple
    numbers = None
    if not isinstance(rows, Tensor):
        numbers = tuple(dict.fromkeys(order))
        rows = one_after_another(rows, numbers, sets)
    elif length != columns or rounding is not torch.float32:  # of which only what is taken need be copied
        numbers = tuple(dict.fromkeys(order))
        rows = several(rows, numbers, sets)
    if rounding is not torch.float32:
        rows = rows.to(rounding)
    if length != columns:
        longer = torch.zeros(len(rows), length, dtype=torch.float32)
        longer[:, :columns] = rows
        rows = longer
    elif rows.dtype is not torch.float32 or rows.stride(1) != 1:
        rows = rows.to(torch.float32).contiguous()
    places, counts = _places(batch, sets, order, numbers)
    stride = rows.stride(0)
    memory = rows.detach().as_strided(((len(rows) - 1) * stride + length,), (1,)).numpy()
    return _Located(memory, places * stride, counts, length)


# All layers of a step with a batch of one size ask for the same.
@lru_cache(maxsize=8)
def _places(
    batch: int, sets: int, order: tuple[int, ...], numbers: tuple[int, ...] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which row is the ``r``-th of each local step ``[T - 1, r]``, and how many count; the others are again the first.

    Args:
        batch: how many rows there are.
        sets: into how many sets they fall.
        order: the set of each local step.
        numbers: the sets that are there, one behind the other; ``None`` where all rows are, as they are.
    """
    counts = np.array([set_size(batch, sets, number) for number in order], np.int64)
    row = np.arange(-(-int(counts.max()) // ROWS) * ROWS)
    row = np.where(row < counts[:, None], row, 0)
    if numbers is None:
        return np.array(order, np.int64)[:, None] + sets * row, counts
    starts = np.cumsum([0, *(set_size(batch, sets, number) for number in numbers[:-1])])
    start_of = dict(zip(numbers, starts.tolist(), strict=True))
    return np.array([start_of[number] for number in order], np.int64)[:, None] + row, counts

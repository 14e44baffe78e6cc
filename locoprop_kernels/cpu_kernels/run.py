"""The host side of the CPU kernels: from local problems to what kernels read and write, and threads that run them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.cpu_kernels.functions import CODES, SOFTMAX
from locoprop_kernels.cpu_kernels.loop import BLOCK, local_steps
from locoprop_kernels.cpu_kernels.threads import run_all
from locoprop_kernels.cpu_kernels.tiles import ROWS
from locoprop_kernels.cpu_kernels.updates import Family, family_of
from locoprop_kernels.patches import Rows
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
_NO_MATRIX, _NO_VECTOR = np.empty((0, 0), np.float32), np.empty(0, np.float32)


class _Work:
    """A problem as the kernel takes it."""

    def __init__(self, problem: LocalProblem, old: State, settings: Settings) -> None:
        family = family_of(settings.rule)
        assert family is not None
        assert isinstance(problem.transfer, Transfer)
        sets = settings.sets(problem)
        scale = problem.scale(settings.reduction)
        self.outputs = problem.weight.shape[0]
        self.whole = CODES[problem.transfer.name] == SOFTMAX
        self.increment = Increment({}, {})
        weight, bias = (self._parameter(kind, problem, old, settings, family, scale) for kind in ("weight", "bias"))
        order = settings.set_order(sets)[: settings.iterations - 1]
        x, places_x, counts, length = _located(problem.x, sets, order, _VECTOR)
        a0, places_a0, _, _ = _located(problem.preactivation, sets, order)
        parameters = (*problem.transfer.parameters, 0.0, 0.0)[:2]
        self.arguments = (
            (x, a0, places_x, places_a0, counts, length, np.float32(scale * sets)),
            weight,
            bias,
            (family.code, family.hyper),
            (CODES[problem.transfer.name], *(np.float32(value) for value in parameters)),
            np.float32(settings.prox),
        )

    def _parameter(
        self, kind: str, problem: LocalProblem, old: State, settings: Settings, family: Family, scale: float
    ) -> tuple[Any, ...]:
        """A weight or a bias for the kernel, and memory for what is found."""
        if kind not in old:
            delta = np.empty(self.outputs, np.float32)
            nothing = (_NO_VECTOR, _NO_VECTOR)
            return *nothing, delta, nothing, nothing, np.zeros((0, 2), np.float32), np.float32(0.0)
        parameter, gradient = problem.trained()[kind]
        shape, dtype, device = parameter.shape, parameter.dtype, parameter.device
        delta = take(shape, dtype, device)
        state = {slot: take(shape, dtype, device) if v.dim() else v.clone() for slot, v in old[kind].items()}
        self.increment.delta[kind], self.increment.state[kind] = delta, state
        self.increment.memory += [delta, *(value for value in state.values() if value.dim())]
        nothing = _NO_MATRIX if len(shape) == 2 else _NO_VECTOR
        before, after = (
            tuple(_array(slots[slot]) if slot else nothing for slot in family.slots) for slots in (old[kind], state)
        )
        steps = int(old[kind]["step"]) if settings.rule.counts_steps else 0
        rates = [lr * problem.rate(kind) for lr in settings.rates]
        return (
            _array(gradient),
            _array(parameter),
            _array(delta),
            before,
            after,
            family.factors(settings.rule, rates, steps),
            np.float32(scale * problem.grad_scale),
        )

    def tasks(self) -> list[tuple[_Work, int, int]]:
        """What threads take one by one."""
        size = self.outputs if self.whole else _TASK
        return [(self, start, min(start + size, self.outputs)) for start in range(0, self.outputs, size)]

    def run(self, first: int, last: int) -> float:
        """All local steps of some outputs."""
        return float(local_steps(first, last, *self.arguments))


def increments(
    problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings
) -> list[Increment]:
    """Run all local iterations of problems on few rows, by as many threads as torch uses.

    Args:
        problems: validated problems, that :func:`locoprop_kernels.cpu_kernels.can_run`.
        olds: the rule's state in each before the loop.
        settings: the settings of the call.

    Returns:
        the increment of each.
    """
    works = [_Work(problem, old, settings) for problem, old in zip(problems, olds, strict=True)]
    tasks = [task for work in works for task in work.tasks()]
    found = run_all(lambda task: task[0].run(*task[1:]), tasks)
    for work in works:
        work.increment.largest = sum(value for (of, *_), value in zip(tasks, found, strict=True) if of is work)
        if settings.rule.counts_steps:
            for slots in work.increment.state.values():
                slots["step"] += settings.iterations
    return [work.increment for work in works]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().contiguous().numpy()


def _located(
    rows: Tensor | Rows, sets: int, order: tuple[int, ...], multiple: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], int]:
    """Rows of some sets, in place where that will do.

    Args:
        rows: all rows, or those that were chosen.
        sets: into how many sets they fall.
        order: the set of each local step.
        multiple: what a row's length is to be a multiple of; zeros are put behind it otherwise.

    Returns:
        their memory, where each row of each local step begins in it ``[T - 1, r]``, how many count, and how long a row
        is.
    """
    batch, columns = rows.shape
    numbers = None
    if not isinstance(rows, Tensor):
        numbers = tuple(dict.fromkeys(order))
        rows = _one_behind_the_other([rows.every(number, sets) for number in numbers])
    rows = rows.detach()
    places, counts = _places(batch, sets, order, numbers)
    length = -(-columns // multiple) * multiple
    if length % _CONFLICT == 0 and multiple > 1:
        length += multiple
    if length != columns:
        longer = torch.zeros(len(rows), length, dtype=torch.float32)
        longer[:, :columns] = rows
        rows = longer
    elif rows.dtype is not torch.float32 or rows.stride(1) != 1:
        rows = rows.to(torch.float32).contiguous()
    stride = rows.stride(0)
    memory = rows.as_strided(((len(rows) - 1) * stride + length,), (1,)).numpy()
    return memory, places * stride, counts, length


# All layers of a step with a batch of one size ask for the same.
@lru_cache(maxsize=8)
def _places(
    batch: int, sets: int, order: tuple[int, ...], numbers: tuple[int, ...] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which row is the ``r``-th of each local step ``[T - 1, r]``, and how many count; others are again the first.

    Args:
        batch: how many rows there are.
        sets: into how many sets they fall.
        order: the set of each local step.
        numbers: the sets that are there, one behind the other; ``None`` where all rows are, as they are.
    """
    counts = np.array([set_size(batch, sets, number) for number in order], np.int64)
    width = -(-max(counts.tolist(), default=1) // ROWS) * ROWS
    row = np.arange(width)
    row = np.where(row < counts[:, None], row, 0)
    if numbers is None:
        return np.array(order, np.int64)[:, None] + sets * row, counts
    starts, start = {}, 0
    for number in numbers:
        starts[number] = start
        start += set_size(batch, sets, number)
    return np.array([starts[number] for number in order], np.int64)[:, None] + row, counts


def _one_behind_the_other(parts: Sequence[Tensor]) -> Tensor:
    """Matrices ``[r_i, K]`` as one; without a copy if they lie so in memory, as rows that were kept together do."""
    first, place, rows = parts[0], parts[0].storage_offset(), 0
    for part in parts:
        follows = (
            part.storage_offset() == place and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        )
        if not part.is_contiguous() or not follows:
            return torch.cat(list(parts))
        place, rows = place + part.numel(), rows + part.shape[0]
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))

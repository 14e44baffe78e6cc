"""The host side of the CPU kernels: from local problems to the table that kernels work from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.cpu_kernels.functions import SOFTMAX, arguments_of
from locoprop_kernels.cpu_kernels.loop import BLOCK
from locoprop_kernels.cpu_kernels.table import CALL, PARAMETER, PROBLEM, TASK
from locoprop_kernels.cpu_kernels.tasks import entry
from locoprop_kernels.cpu_kernels.threads import run_all
from locoprop_kernels.cpu_kernels.updates import Family, factors, family_of
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
# What a task returns that has not been run to its end.
_UNDONE = -1.0


def increments(problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings) -> list[Increment]:
    """Run all local iterations of some problems, by as many threads as torch uses.

    Args:
        problems: validated problems that :func:`locoprop_kernels.cpu_kernels.can_run`.
        olds: the rule's state in each before the loop.
        settings: the settings of the call.

    Returns:
        the increment of each.

    Raises:
        MemoryError: a thread had none for its work.
    """
    table = _Table(problems, olds, settings)
    tasks = _tasks(tuple((problem.weight.shape, _is_softmax(problem)) for problem in problems))
    results = np.full(len(tasks), _UNDONE, np.float32)
    number = np.zeros(1, np.int64)
    call = np.array(
        (
            _address(number),
            len(tasks),
            len(problems),
            _address(table.problems),
            _address(table.parameters),
            _address(tasks),
            _address(results),
        ),
        CALL,
    )
    run_all(entry(), _address(call), len(tasks))
    if (results == _UNDONE).any():
        raise MemoryError("there was no memory for the local loops on the CPU")
    # A sum of the sums of the tasks of each problem; one that is not a number stays that.
    largest = np.bincount(tasks["problem"], results)
    for own, increment in zip(largest.tolist(), table.increments, strict=True):
        increment.largest = own
        count_steps(increment, settings)
    return table.increments


def _is_softmax(problem: LocalProblem) -> bool:
    assert isinstance(problem.transfer, Transfer)
    return arguments_of(problem.transfer)[0] == SOFTMAX


def _address(array: NDArray[np.generic]) -> int:
    return array.ctypes.data


@lru_cache(maxsize=64)
def _tasks(problems: tuple[tuple[tuple[int, int], bool], ...]) -> NDArray[np.void]:
    """What threads take one by one, the largest first.

    Args:
        problems: for each its ``(N, K)``, and whether one thread must take all outputs.
    """
    found = []
    for number, ((outputs, inputs), whole) in enumerate(problems):
        size = outputs if whole else _TASK
        for first in range(0, outputs, size):
            last = min(first + size, outputs)
            found.append(((last - first) * inputs, (number, first, last)))
    found.sort(key=lambda one: -one[0])
    return np.array([task for _, task in found], TASK)


class _Table:
    """Problems as kernels take them.

    Attributes:
        problems: a row for each, see :data:`~locoprop_kernels.cpu_kernels.table.PROBLEM`.
        parameters: two for each, see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        increments: what the kernels write to.
    """

    def __init__(self, problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings) -> None:
        self.settings = settings
        family = family_of(settings.rule)
        assert family is not None
        self._family: Family = family
        self.increments = [Increment({}, {}) for _ in problems]
        # What has an address in the table must live as long.
        self._held: list[Tensor | NDArray[np.generic]] = []
        self.problems = np.array([self._problem(problem) for problem in problems], PROBLEM)
        self.parameters = np.array(
            [
                [self._parameter(kind, problem, old, increment) for kind in ("weight", "bias")]
                for problem, old, increment in zip(problems, olds, self.increments, strict=True)
            ],
            PARAMETER,
        )

    def _problem(self, problem: LocalProblem) -> tuple[float, ...]:
        assert isinstance(problem.transfer, Transfer)
        settings = self.settings
        sets, operands = settings.sets(problem), settings.operands(problem)
        order = settings.set_order(sets)[: settings.iterations - 1]
        x = _located(problem.x, sets, order, operands, _VECTOR)
        a0 = _located(problem.preactivation, sets, order, torch.float32)
        self._held += [x.rows, a0.rows, x.which.memory, a0.which.memory]
        return (
            *problem.weight.shape,
            settings.iterations,
            *(x.rows.data_ptr(), x.length, x.rows.stride(0), x.which.firsts, x.which.step),
            *(a0.rows.data_ptr(), a0.rows.stride(0), a0.which.firsts, a0.which.step),
            *(x.which.counts, x.which.most),
            *arguments_of(problem.transfer),
            *(self._family.code, _address(self._family.hyper)),
            operands is torch.bfloat16,
            problem.scale(settings.reduction) * sets,
            settings.prox,
        )

    def _parameter(self, kind: str, problem: LocalProblem, old: State, increment: Increment) -> tuple[float, ...]:
        """A weight or a bias for the kernels, and memory for what is found."""
        if kind not in old:
            return (0,) * len(PARAMETER)
        parameter, gradient = problem.trained()[kind]
        slots = old[kind]
        delta = take(parameter.shape, torch.float32, parameter.device)
        state = {s: take(v.shape, torch.float32, v.device) if v.dim() else v.clone() for s, v in slots.items()}
        increment.delta[kind], increment.state[kind] = delta, state
        increment.memory += [delta, *(value for value in state.values() if value.dim())]
        rates, rate = self.settings.rates, problem.rate(kind)
        if rate != 1:
            rates = tuple(lr * rate for lr in rates)
        rule = self.settings.rule
        of_steps = factors(rule, rates, int(slots["step"]) if rule.counts_steps else 0)
        self._held.append(of_steps)
        return (
            self._data(gradient),
            self._data(parameter),
            delta.data_ptr(),
            *(self._data(slots[slot]) if slot else 0 for slot in self._family.slots),
            *(state[slot].data_ptr() if slot else 0 for slot in self._family.slots),
            _address(of_steps),
            problem.scale(self.settings.reduction) * problem.grad_scale,
        )

    def _data(self, tensor: Tensor) -> int:
        """The address of a contiguous tensor, or of a copy that is contiguous."""
        if not tensor.is_contiguous():
            tensor = tensor.detach().contiguous()
            self._held.append(tensor)
        return tensor.data_ptr()


class _Which(NamedTuple):
    """Which rows local steps take.

    Attributes:
        firsts: address of the first row of each local step but the first ``[T - 1]``.
        step: how many rows further the next one is.
        counts: address of how many each takes ``[T - 1]``.
        most: the most that one takes.
        memory: what the addresses are of.
    """

    firsts: int
    step: int
    counts: int
    most: int
    memory: NDArray[np.int64]


class _Located(NamedTuple):
    """Rows in float32, each of them contiguous.

    Attributes:
        rows: all of them, or those that are taken.
        length: how long a row is, with zeros behind it.
        which: which of them are taken.
    """

    rows: Tensor
    length: int
    which: _Which


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
    return _Located(rows, length, _which(batch, sets, order, numbers))


# All layers of a step with a batch of one size ask for the same.
@lru_cache(maxsize=8)
def _which(batch: int, sets: int, order: tuple[int, ...], numbers: tuple[int, ...] | None) -> _Which:
    """Which rows local steps take.

    Args:
        batch: how many rows there are.
        sets: into how many sets they fall.
        order: the set of each local step.
        numbers: the sets that are there, one behind the other; ``None`` where all rows are, as they are.
    """
    sizes = {number: set_size(batch, sets, number) for number in order}
    firsts, step = {number: number for number in sizes}, sets
    if numbers is not None:
        first, step = 0, 1
        for number in numbers:
            firsts[number] = first
            first += sizes[number]
    memory = np.array([[firsts[number] for number in order], [sizes[number] for number in order]], np.int64)
    address = _address(memory)
    return _Which(address, step, address + memory.strides[0], max(sizes.values()), memory)

"""The host side of the CPU kernels: from local problems to the table that kernels work from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locoprop_kernels.cpu_kernels.functions import SOFTMAX, arguments_of
from locoprop_kernels.cpu_kernels.loop import BLOCK
from locoprop_kernels.cpu_kernels.rows import VECTOR, located
from locoprop_kernels.cpu_kernels.table import CALL, PARAMETER, PROBLEM, TASK
from locoprop_kernels.cpu_kernels.tasks import entry
from locoprop_kernels.cpu_kernels.threads import run_all
from locoprop_kernels.cpu_kernels.updates import Family, factors, family_of
from locoprop_kernels.cpu_kernels.vectors import NUMBER
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.scratch import give_back, take
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Increment
from locoprop_kernels.transfers import Transfer

__all__ = ["Compiled"]

# Outputs that a thread takes at a time: few enough that all threads have work to the end.
_TASK = 2 * BLOCK
# What a task returns that has not been run to its end.
_UNDONE = -1.0
_LARGEST = float(np.finfo(np.float32).max)
# A parameter that is not trained.
_NONE = (0,) * len(PARAMETER.fields or ())


class Compiled:
    """Problems that the kernels have solved.

    Args:
        problems: validated problems that :func:`locoprop_kernels.cpu_kernels.can_run`.
        olds: the rule's state in each before the loop.
        settings: the settings of the call.
        found: what has been found out about these problems, see :class:`locoprop_kernels.checked.Checked`.

    Attributes:
        finite: whether it is certain that a commit would write finite numbers only.

    Raises:
        MemoryError: a thread had none for its work.
    """

    def __init__(
        self, problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings, found: dict[Any, Any]
    ) -> None:
        self._table = _Table(problems, *_owns(problems, olds, settings, found), settings)
        self._problems, self._olds, self._iterations = problems, olds, settings.iterations
        # The problems whose increments somebody else may hold.
        self._lent: set[int] = set()
        # The sum of all absolute values, or more; NaN where one is not a number.
        self.finite = bool(self._table.run(commits=False).sum() < _LARGEST)

    def increment(self, place: int) -> Increment:
        """What was found for the problem of a number; it may be held after the commit."""
        self._lent.add(place)
        return self.found(place)

    def found(self, place: int) -> Increment:
        """The same, until the commit."""
        increment = Increment({}, {})
        for kind, old in self._olds[place].items():
            views = self._table.views(place, kind)
            increment.delta[kind] = views.pop("")
            steps = {"step": old["step"] + self._iterations} if "step" in old else {}
            increment.state[kind] = {**views, **steps}
        return increment

    def commit(self) -> dict[int, Increment]:
        """Apply increments and new state, and let go of their memory.

        Returns:
            what is left to apply, by the number of the problem: where parameters or state are not contiguous.
        """
        table = self._table
        left = {place: self.increment(place) for place in table.scattered}
        if left:
            table.parameters.reshape(-1, 2)[table.scattered] = 0
        written, steps = [], []
        for place, (problem, olds) in enumerate(zip(self._problems, self._olds, strict=True)):
            for kind, old in olds.items() if place not in left else ():
                stored = problem.state.setdefault(kind, {})
                if stored is not old:
                    stored.update(old)
                written += [getattr(problem, kind), *old.values()]
                if "step" in old:
                    steps.append(old["step"])
        table.run(commits=True)
        # PyTorch does not know what kernels write to: graphs that have saved a parameter must not be used any more.
        torch.autograd.graph.increment_version(written)
        if steps:
            torch._foreach_add_(steps, self._iterations)
        give_back(*(block for place, block in enumerate(table.blocks) if place not in self._lent))
        return left


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


@lru_cache(maxsize=64)
def _tasks(problems: tuple[tuple[tuple[int, int], bool], ...]) -> tuple[NDArray[Any], int]:
    """What threads take one by one, the largest first, and its address.

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
    tasks = np.array([task for _, task in found], TASK)
    return tasks, _address(tasks)


class _Layout(NamedTuple):
    """Where increment and new state of a problem are in a block of memory.

    Attributes:
        size: numbers of the block.
        starts: by kind and slot, the first number of the slot; that of the increment by ``""``.
    """

    size: int
    starts: dict[str, dict[str, int]]


@lru_cache(maxsize=256)
def _layout(shape: tuple[int, int], kinds: tuple[str, ...], slots: tuple[str, ...]) -> _Layout:
    size, starts = 0, {}
    for kind in kinds:
        numbers = shape[0] * (shape[1] if kind == "weight" else 1)
        aligned = -(-numbers // VECTOR) * VECTOR
        starts[kind] = {slot: size + number * aligned for number, slot in enumerate(slots)}
        size += len(slots) * aligned
    return _Layout(size, starts)


class _Part(NamedTuple):
    """A weight or a bias that is trained.

    Attributes:
        kind: ``"weight"`` or ``"bias"``.
        parameter: the parameter.
        slots: the rule's two slots before the loop; ``None`` for one that the rule does not have.
        step: the number of steps before the loop, for rules that count them.
        places: where in the problem's block of memory, in bytes, the increment and the two slots after the loop are.
    """

    kind: str
    parameter: Tensor
    slots: tuple[Tensor | None, ...]
    step: Tensor | None
    places: tuple[int, ...]


class _Own(NamedTuple):
    """What a problem has of its own, so that it is the same whenever the problem comes again.

    Attributes:
        layout: of its block of memory.
        shape: ``(N, K)``.
        function: of its transfer function, see :func:`locoprop_kernels.cpu_kernels.functions.arguments_of`.
        parts: its weight and its bias, ``None`` where that is not trained.
        contiguous: whether parameters and state are: otherwise what kernels read is a copy.
    """

    layout: _Layout
    shape: tuple[int, int]
    function: tuple[int, np.float32, np.float32]
    parts: tuple[_Part | None, ...]
    contiguous: bool

    @classmethod
    def of(cls, problem: LocalProblem, old: State, family: Family) -> _Own:
        assert isinstance(problem.transfer, Transfer)
        shape = problem.weight.shape[0], problem.weight.shape[1]
        layout = _layout(shape, tuple(old), ("", *filter(None, family.slots)))
        parts: list[_Part | None] = []
        contiguous = True
        for kind in ("weight", "bias"):
            if kind not in old:
                parts.append(None)
                continue
            parameter, slots, starts = getattr(problem, kind), old[kind], layout.starts[kind]
            places = tuple(NUMBER * starts[slot] if slot in starts else 0 for slot in ("", *family.slots))
            two = tuple(slots[slot] if slot else None for slot in family.slots)
            parts.append(_Part(kind, parameter, two, slots.get("step"), places))
            contiguous = contiguous and all(tensor.is_contiguous() for tensor in (parameter, *slots.values()))
        return cls(layout, shape, arguments_of(problem.transfer), tuple(parts), contiguous)


def _owns(
    problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings, found: dict[Any, Any]
) -> tuple[Family, list[_Own]]:
    """The rule's family, and what each problem has of its own; found once for problems that come again."""
    key = _Own, tuple(map(id, problems))
    known: tuple[Family, list[_Own]] | None = found.get(key)
    if known is None:
        family = family_of(settings.rule)
        assert family is not None
        known = family, [_Own.of(problem, old, family) for problem, old in zip(problems, olds, strict=True)]
        found[key] = known
    return known


class _Table:
    """Problems as kernels take them.

    Attributes:
        problems: a row for each, see :data:`~locoprop_kernels.cpu_kernels.table.PROBLEM`.
        parameters: two for each, see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        blocks: memory for the increment and the new state of each.
        scattered: the numbers of those whose parameters or state are not contiguous: what kernels read is a copy.
    """

    def __init__(
        self, problems: Sequence[LocalProblem], family: Family, owns: Sequence[_Own], settings: Settings
    ) -> None:
        self._settings, self._family, self._owns = settings, family, owns
        device = problems[0].weight.device
        self.blocks = [take((own.layout.size,), torch.float32, device) for own in owns]
        self.scattered = [place for place, own in enumerate(owns) if not own.contiguous]
        # What has an address in the table must live as long.
        self._held: list[Tensor | NDArray[Any]] = []
        rows, parameters = [], []
        for problem, own, block in zip(problems, owns, self.blocks, strict=True):
            rows.append(self._problem(problem, own))
            address, scale = block.data_ptr(), problem.scale(settings.reduction) * problem.grad_scale
            parameters += [self._parameter(part, problem, address, scale) if part else _NONE for part in own.parts]
        self.problems, self.parameters = np.array(rows, PROBLEM), np.array(parameters, PARAMETER)
        self._tasks, tasks = _tasks(tuple([(own.shape, own.function[0] == SOFTMAX) for own in owns]))
        self._results, self._number = np.empty(len(self._tasks), np.float32), np.zeros(1, np.int64)
        arrays = self._number, self.problems, self.parameters, self._results
        number, *tables, results = [_address(array) for array in arrays]
        self._call = np.array((number, len(self._tasks), len(problems), *tables, tasks, results, False), CALL)

    def run(self, commits: bool) -> NDArray[np.float32]:
        """Run all tasks: the local loops, or the commit; what each has returned.

        Raises:
            MemoryError: a thread had none for its work.
        """
        self._results.fill(_UNDONE)
        self._number[0], self._call["commits"] = 0, commits
        run_all(entry(), _address(self._call), len(self._tasks))
        if (self._results == _UNDONE).any():
            raise MemoryError("there was no memory for the local loops on the CPU")
        return self._results

    def views(self, place: int, kind: str) -> dict[str, Tensor]:
        """The new state of a parameter by slot, and by ``""`` its increment."""
        own, block = self._owns[place], self.blocks[place]
        shape = own.shape[: 2 if kind == "weight" else 1]
        stride = (*shape[1:], 1)
        return {slot: block.as_strided(shape, stride, at) for slot, at in own.layout.starts[kind].items()}

    def _problem(self, problem: LocalProblem, own: _Own) -> tuple[Any, ...]:
        """A problem for the kernels."""
        settings = self._settings
        sets, operands = settings.sets(problem), settings.operands(problem)
        order = settings.set_order(sets)[: settings.iterations - 1]
        x = located(problem.x, sets, order, operands, VECTOR)
        a0 = located(problem.preactivation, sets, order, torch.float32)
        self._held += [x.rows, a0.rows, x.which.memory, a0.which.memory]
        return (
            *own.shape,
            settings.iterations,
            *(x.rows.data_ptr(), x.length, x.rows.stride(0), x.which.firsts, x.which.step),
            *(a0.rows.data_ptr(), a0.rows.stride(0), a0.which.firsts, a0.which.step),
            *(x.which.counts, x.which.most),
            *own.function,
            *(self._family.code, self._family.hyper_address),
            operands is torch.bfloat16,
            problem.scale(settings.reduction) * sets,
            settings.prox,
        )

    def _parameter(self, part: _Part, problem: LocalProblem, address: int, scale: float) -> tuple[float, ...]:
        """A weight or a bias for the kernels, whose increment and new state go into memory at ``address``."""
        settings = self._settings
        gradient = problem.grad_weight if part.kind == "weight" else problem.grad_bias
        assert gradient is not None
        rates, rate = settings.rates, problem.rate(part.kind)
        if rate != 1:
            rates = tuple([lr * rate for lr in rates])
        of_steps, of_steps_address = factors(settings.rule, rates, 0 if part.step is None else int(part.step))
        self._held.append(of_steps)
        delta, squares, buffer = part.places
        old_squares, old_buffer = part.slots
        return (
            self._data(gradient),
            self._data(part.parameter),
            address + delta,
            0 if old_squares is None else self._data(old_squares),
            0 if old_buffer is None else self._data(old_buffer),
            0 if old_squares is None else address + squares,
            0 if old_buffer is None else address + buffer,
            of_steps_address,
            scale,
        )

    def _data(self, tensor: Tensor) -> int:
        """The address of a contiguous tensor, or of a copy that is contiguous."""
        if not tensor.is_contiguous():
            tensor = tensor.detach().contiguous()
            self._held.append(tensor)
        return tensor.data_ptr()

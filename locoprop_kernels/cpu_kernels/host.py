"""The host side of the table that kernels work from: what is in it, and calls that run its tasks."""

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
from locoprop_kernels.cpu_kernels.table import CALL, COMMIT, LOCAL_STEPS, PARAMETER, PROBLEM, TASK
from locoprop_kernels.cpu_kernels.tasks import entry
from locoprop_kernels.cpu_kernels.threads import run_all
from locoprop_kernels.cpu_kernels.updates import Family, factors
from locoprop_kernels.cpu_kernels.vectors import NUMBER
from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.scratch import take
from locoprop_kernels.settings import Settings
from locoprop_kernels.transfers import Transfer

__all__ = ["Own", "Table", "Tasks"]

# Outputs that a thread takes at a time: few enough that all threads have work to the end.
_TASK = 2 * BLOCK
# What a task returns that has not been run to its end.
_UNDONE = -1.0
_FIELDS = tuple(PROBLEM.names or ())
# Rows that are not taken, and memory that there is not yet.
_NO_ROWS = (0,) * (_FIELDS.index("function") - _FIELDS.index("x"))
_NO_BLOCK = torch.empty(0, device="cpu")


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


class Tasks(NamedTuple):
    """What threads take one by one, the largest first.

    Attributes:
        array: a row for each, see :data:`~locoprop_kernels.cpu_kernels.table.TASK`.
        address: where they are.
    """

    array: NDArray[Any]
    address: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, problems: tuple[tuple[int, int, int, int], ...]) -> Tasks:
        """Some outputs of each problem, of which its number, ``N``, ``K`` and the outputs of a task are given."""
        found = []
        for number, outputs, inputs, size in problems:
            for first in range(0, outputs, size):
                last = min(first + size, outputs)
                found.append(((last - first) * inputs, (number, first, last)))
        found.sort(key=lambda one: -one[0])
        array = np.array([task for _, task in found], TASK)
        return cls(array, _address(array))


@lru_cache(maxsize=64)
def _tasks_of(problems: tuple[tuple[tuple[int, int], bool, bool], ...]) -> tuple[Tasks, Tasks]:
    """The tasks of local loops and those of a commit.

    Args:
        problems: for each its ``(N, K)``, whether one thread must take all outputs, and whether it has a local loop
            that is compiled as a whole.
    """
    sizes = [(i, *shape, shape[0] if whole else _TASK) for i, (shape, whole, _) in enumerate(problems)]
    loops = [size for size, (*_, compiled) in zip(sizes, problems, strict=True) if compiled]
    return Tasks.of(tuple(loops)), Tasks.of(tuple(sizes))


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


class Own(NamedTuple):
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
    def of(cls, problem: LocalProblem, old: State, family: Family) -> Own:
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


class Table:
    """Problems as kernels take them.

    Args:
        problems: validated problems.
        family: of the rule.
        owns: what each problem has of its own.
        settings: the settings of the call.
        whole: whether the local loop of each is compiled as a whole; else its products are made elsewhere.

    Attributes:
        problems: a row for each, see :data:`~locoprop_kernels.cpu_kernels.table.PROBLEM`.
        parameters: two for each, see :data:`~locoprop_kernels.cpu_kernels.table.PARAMETER`.
        blocks: memory for the increment and the new state of each, once it is laid out.
        scattered: the numbers of those whose parameters or state are not contiguous: what kernels read is a copy.
    """

    def __init__(
        self,
        problems: Sequence[LocalProblem],
        family: Family,
        owns: Sequence[Own],
        settings: Settings,
        whole: Sequence[bool],
    ) -> None:
        self._given, self._settings, self._family, self._owns, self._whole = problems, settings, family, owns, whole
        self.blocks: list[Tensor] = [_NO_BLOCK] * len(owns)
        self.scattered = [place for place, own in enumerate(owns) if not own.contiguous]
        # What has an address in the table must live as long.
        self._held: list[Tensor | NDArray[Any]] = []
        self.problems, self.parameters = np.zeros(len(owns), PROBLEM), np.zeros((len(owns), 2), PARAMETER)
        for place, loops in enumerate(whole):
            if loops:
                self.lay_out(place)
        softmax = [own.function[0] == SOFTMAX for own in owns]
        self._loops, self._commits = _tasks_of(tuple(zip([own.shape for own in owns], softmax, whole, strict=True)))
        self._number = np.zeros(1, np.int64)
        self._addresses = [_address(array) for array in (self.problems, self.parameters)]

    def lay_out(self, place: int) -> None:
        """Write a problem's rows of the table, and take memory for it.

        Others that need more beside it, and let go of it, have this done when it is their turn.
        """
        problem, own = self._given[place], self._owns[place]
        block = self.blocks[place] = take((own.layout.size,), torch.float32, problem.weight.device)
        address, scale = block.data_ptr(), problem.scale(self._settings.reduction) * problem.grad_scale
        self.problems[place] = self._problem(problem, own, self._whole[place])
        for number, part in enumerate(own.parts):
            if part is not None:
                self.parameters[place, number] = self._parameter(part, problem, address, scale)

    def local_steps(self) -> float:
        """Run all local loops that are compiled as a whole; see :meth:`run`."""
        return self.run(LOCAL_STEPS, self._loops)

    def commit(self) -> None:
        """Apply increments and new state of all problems."""
        self.run(COMMIT, self._commits)

    def run(self, work: int, tasks: Tasks, phase: int = 0) -> float:
        """Run tasks, and return the sum of what each has returned.

        Args:
            work: what they do.
            tasks: the tasks.
            phase: address of the phase that they are part of.

        Raises:
            MemoryError: a thread had none for its work.
        """
        count = len(tasks.array)
        results = np.full(count, _UNDONE, np.float32)
        self._number[0] = 0
        call = np.array(
            (
                *(_address(self._number), count, len(self.problems), *self._addresses),
                *(tasks.address, _address(results), work, phase),
            ),
            CALL,
        )
        run_all(entry(), _address(call), count)
        if (results == _UNDONE).any():
            raise MemoryError("there was no memory for the local loops on the CPU")
        return float(results.sum())

    def function(self, place: int) -> int:
        """The code of a problem's transfer function."""
        return self._owns[place].function[0]

    def views(self, place: int, kind: str) -> dict[str, Tensor]:
        """The new state of a parameter by slot, and by ``""`` its increment."""
        own, block = self._owns[place], self.blocks[place]
        shape = own.shape[: 2 if kind == "weight" else 1]
        stride = (*shape[1:], 1)
        return {slot: block.as_strided(shape, stride, at) for slot, at in own.layout.starts[kind].items()}

    def _problem(self, problem: LocalProblem, own: Own, loops: bool) -> tuple[Any, ...]:
        """A problem for the kernels."""
        settings = self._settings
        sets, operands = settings.sets(problem), settings.operands(problem)
        return (
            *own.shape,
            settings.iterations,
            *(self._rows(problem, sets, operands) if loops else _NO_ROWS),
            *own.function,
            *(self._family.code, self._family.hyper_address),
            operands is torch.bfloat16,
            problem.scale(settings.reduction) * sets,
            settings.prox,
        )

    def _rows(self, problem: LocalProblem, sets: int, operands: torch.dtype) -> tuple[int, ...]:
        """Which rows of the batch its local steps take, and where they are."""
        order = self._settings.set_order(sets)[: self._settings.iterations - 1]
        x = located(problem.x, sets, order, operands, VECTOR)
        a0 = located(problem.preactivation, sets, order, torch.float32)
        self._held += [x.rows, a0.rows, x.which.memory, a0.which.memory]
        return (
            *(x.rows.data_ptr(), x.length, x.rows.stride(0), x.which.firsts, x.which.step),
            *(a0.rows.data_ptr(), a0.rows.stride(0), a0.which.firsts, a0.which.step),
            *(x.which.counts, x.which.most),
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

"""Local loops on few rows: a part of the weights at a time, which stays in the caches for all local steps.

A part is a block of a layer's outputs, or all of several small layers, for which one call of torch updates them all.
Everything that a part begins with is written just before its local steps, and looked at right after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from locoprop_kernels.few_rows import BLOCK, FewRowsForm, blocks_of_outputs
from locoprop_kernels.folding import allocated, begin, can_fold, unfolded
from locoprop_kernels.loop import Loop, beginning, count_steps, run
from locoprop_kernels.problem import LocalProblem, State, of_outputs
from locoprop_kernels.scratch import give_back
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Increment

__all__ = ["few_rows_loops", "together"]


class _Layer:
    """A problem whose local loop takes a block of outputs at a time.

    Args:
        problem: a validated problem.
        old: the rule's state before the loop.
        settings: the settings of the call.
    """

    def __init__(self, problem: LocalProblem, old: State, settings: Settings) -> None:
        self.problem, self.old, self.settings = problem, old, settings
        self.fold = can_fold(problem, old, settings)
        self.scale = problem.scale(settings.reduction) * problem.grad_scale
        self.form = FewRowsForm(problem, settings, self.fold)
        self.blocks = blocks_of_outputs(problem, settings)
        self.start: dict[str, Tensor] = {}
        if self.fold:
            self.increment = allocated(problem, old)
        else:
            self.start, self.increment = beginning(problem, old, self.scale)

    def loop(self, some: slice) -> Loop:
        """The loop of some outputs, ready to run."""
        part = Increment(
            {kind: of_outputs(kind, value, some) for kind, value in self.increment.delta.items()},
            {
                kind: {slot: of_outputs(kind, value, some) for slot, value in slots.items()}
                for kind, slots in self.increment.state.items()
            },
        )
        if self.fold:
            start = begin(self.problem, self.old, self.scale, some, part)
        else:
            start = {kind: of_outputs(kind, value, some) for kind, value in self.start.items()}
        alone = len(self.blocks) == 1
        problem, form = (self.problem, self.form) if alone else (self.problem.outputs(some), self.form.outputs(some))
        return Loop(problem, self.settings, form, start, part)

    def end(self, loop: Loop) -> None:
        """A loop of this problem has run: see how large its numbers are, and let go of its memory."""
        if self.problem.weight.is_cpu:
            written = [*loop.delta.values(), *(value for slots in loop.state.values() for value in slots.values())]
            largest = sum(_largest(value) for value in written if value.dim())
            self.increment.largest = (self.increment.largest or 0.0) + largest
        assert isinstance(loop.form, FewRowsForm)
        loop.form.release()
        if self.fold:
            give_back(*loop.start.values())

    def result(self) -> Increment:
        """The increment, once all loops have run."""
        if self.increment.largest is not None:
            self.increment.largest += sum(_largest(parameter) for parameter, _ in self.problem.trained().values())
        self.form.release()
        give_back(*self.start.values())
        count_steps(self.increment, self.settings)
        return unfolded(self.increment) if self.fold else self.increment


def few_rows_loops(
    problems: Sequence[LocalProblem], olds: Sequence[State], settings: Settings
) -> list[tuple[Increment, Tensor | None]]:
    """Run all local iterations of problems on few rows: of one, or of several small ones side by side.

    Args:
        problems: validated problems; only one alone may have more than one block of outputs.
        olds: the rule's state in each before the loop.
        settings: the settings of the call.

    Returns:
        the increment of each, and its trace if it is asked for.
    """
    layers = [_Layer(problem, old, settings) for problem, old in zip(problems, olds, strict=True)]
    traces: list[list[Tensor | None]] = [[] for _ in layers]
    for blocks in zip(*(layer.blocks for layer in layers), strict=True):
        loops = [layer.loop(some) for layer, some in zip(layers, blocks, strict=True)]
        for own, layer, loop, trace in zip(traces, layers, loops, run(loops, settings), strict=True):
            own.append(trace)
            layer.end(loop)
    return [
        (layer.result(), torch.stack([one for one in own if one is not None]).sum(0) if settings.trace else None)
        for layer, own in zip(layers, traces, strict=True)
    ]


def together(problems: Sequence[LocalProblem], states: Sequence[State], settings: Settings) -> Iterator[list[int]]:
    """Which problems are solved side by side: neighbours on few rows that fit into a part; others are alone."""
    some: list[int] = []
    weights = 0
    for i, (problem, old) in enumerate(zip(problems, states, strict=True)):
        size = problem.weight.numel()
        small = settings.iterations + settings.trace > 1 and settings.sets(problem) > 1 and problem.weight.is_cpu
        small = small and can_fold(problem, old, settings) and len(blocks_of_outputs(problem, settings)) == 1
        if some and not (small and weights + size <= BLOCK):
            yield some
            some, weights = [], 0
        some.append(i)
        weights = weights + size if small else BLOCK
    if some:
        yield some


def _largest(tensor: Tensor) -> float:
    """The greatest absolute value, or more; NaN if there is one."""
    least, most = torch.aminmax(tensor)
    return abs(float(least)) + abs(float(most))

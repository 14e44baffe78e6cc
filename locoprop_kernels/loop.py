"""The local loop: gradients from a form, updates by a rule; of one problem, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locoprop_kernels import rules
from locoprop_kernels.form import Form
from locoprop_kernels.problem import LocalProblem, State, accumulation_dtype
from locoprop_kernels.scratch import copy_of, take
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Increment

__all__ = ["Loop", "beginning", "count_steps", "masked", "run"]


class Loop:
    """The local loop of one problem, or of some of its outputs.

    Args:
        problem: a validated problem; it is read, and nothing that belongs to it is written.
        settings: the settings of the call.
        form: of the local gradient; ``None`` where a single local step needs none.
        start: ``G_0`` and ``g_0``, scaled.
        increment: zeros and the rule's state before the loop; written to.
    """

    def __init__(
        self,
        problem: LocalProblem,
        settings: Settings,
        form: Form | None,
        start: dict[str, Tensor],
        increment: Increment,
    ) -> None:
        self.problem, self.settings, self.form = problem, settings, form
        self.scale = problem.scale(settings.reduction)
        self.delta, self.state = increment.delta, increment.state
        if rules.is_elementwise(settings.rule):
            _without_denormals_(self.state)
        self.frozen = {name: ~mask for name in self.delta if (mask := problem.mask(name)) is not None}
        self.start = masked(start, self.frozen)
        counts = settings.rule.counts_steps
        self.steps = {name: int(self.state[name]["step"]) if counts else 0 for name in self.delta}

    def gradient(self, t: int) -> dict[str, Tensor]:
        """The gradient of the local objective in local step ``t``, zero where a mask is false."""
        grads, prox, regulariser = self.start, self.settings.prox, self.settings.regulariser
        if t > 0:
            assert self.form is not None
            grads = self.form.gradient(self.delta, t, self.start, self.scale)
            if prox:
                for name, grad in grads.items():
                    grad.add_(self.delta[name], alpha=prox)
        if regulariser is not None:
            grads = {
                name: grad + regulariser.gradient(getattr(self.problem, name), self.delta[name])
                for name, grad in grads.items()
            }
        return masked(grads, self.frozen)

    def objective(self, t: int) -> Tensor:
        """The local objective before local step ``t``, relative to its value at the start."""
        assert self.form is not None
        value = self.form.divergence(self.delta, t) * self.scale
        for name, d in self.delta.items():
            half_prox = self.settings.prox / 2
            value = value + (d.double() * self.start[name]).sum() + d.double().square().sum() * half_prox
            if self.settings.regulariser is not None:
                value = value + self.settings.regulariser.increase(getattr(self.problem, name), d)
        return value


def _without_denormals_(state: State) -> None:
    """Zeros in place of numbers that are not above the least normal one, in place, on a CPU.

    Without a gradient decays end there, not at zero: ``0.9 m`` is rounded to ``m``. Increments made of it are such
    numbers too, and slow products down, on some processors by a factor of a hundred.
    """
    for slots in state.values():
        for value in slots.values():
            if value.is_cpu and value.is_floating_point():
                torch.hardshrink(value, torch.finfo(value.dtype).tiny, out=value)


class _Alike(NamedTuple):
    """Tensors that are updated at one learning rate and with one number of steps.

    Attributes:
        places: of each, the number of its loop and its name there.
        deltas: the increments.
        states: the rule's state of each.
    """

    places: list[tuple[int, str]]
    deltas: list[Tensor]
    states: list[dict[str, Tensor]]


def _alike(loops: Sequence[Loop]) -> dict[tuple[float, int], _Alike]:
    """All tensors of some loops, by the factor of their learning rate and the number of steps so far."""
    found: dict[tuple[float, int], _Alike] = {}
    for number, loop in enumerate(loops):
        for name, delta in loop.delta.items():
            some = found.setdefault((loop.problem.rate(name), loop.steps[name]), _Alike([], [], []))
            some.places.append((number, name))
            some.deltas.append(delta)
            some.states.append(loop.state[name])
    return found


def run(loops: Sequence[Loop], settings: Settings) -> list[Tensor | None]:
    """All local iterations of some loops, each of them in one local step after another; their traces, if asked for."""
    groups = _alike(loops)
    values: list[list[Tensor]] = [[] for _ in loops]
    for t, lr in enumerate(settings.rates):
        if settings.trace:
            for own, loop in zip(values, loops, strict=True):
                own.append(loop.objective(t))
        grads = [loop.gradient(t) for loop in loops]
        for (rate, steps), some in groups.items():
            own_grads = [grads[number][name] for number, name in some.places]
            settings.rule.update_all_(some.deltas, own_grads, some.states, lr * rate, steps + t + 1)
        for loop in loops:
            masked(loop.delta, loop.frozen)  # momentum of earlier steps may move what has no gradient
    if not settings.trace:
        return [None] * len(loops)
    return [torch.stack([*own, loop.objective(settings.iterations)]) for own, loop in zip(values, loops, strict=True)]


def beginning(problem: LocalProblem, old: State, scale: float) -> tuple[dict[str, Tensor], Increment]:
    """The scaled gradients at the start, and an increment of zeros with a copy of the state."""
    accumulate = accumulation_dtype(problem.weight.dtype)
    start, delta = {}, {}
    for name, (_, grad) in problem.trained().items():
        start[name] = take(grad.shape, accumulate, grad.device).copy_(grad).mul_(scale)
        delta[name] = take(grad.shape, accumulate, grad.device).zero_()
    state = {name: {slot: copy_of(value) for slot, value in slots.items()} for name, slots in old.items()}
    memory = [*delta.values(), *(value for slots in state.values() for value in slots.values() if value.dim())]
    return start, Increment(delta, state, memory)


def count_steps(increment: Increment, settings: Settings) -> None:
    """Add the local steps of a call to the rule's own counters, if it has them."""
    if settings.rule.counts_steps:
        for slots in increment.state.values():
            slots["step"] += settings.iterations


def masked(values: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values``, set to zero where ``frozen`` is true; in place."""
    for name, where in frozen.items():
        values[name].masked_fill_(where, 0)
    return values

"""What solving the local problems of a step gives, whichever backend did it; nothing of it is applied yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from locoprop_kernels.problem import LocalProblem, State

__all__ = ["Decision", "Increment", "Solution", "apply", "lying"]


@dataclass(frozen=True)
class Decision:
    """How a problem is solved: decided once, from sizes, settings and device, and shown in reports.

    Attributes:
        form: which formula: ``"product"`` (any transfer function), ``"gram"`` (the identity, through ``XᵀX``),
            ``"softmax"``; ``"rule"`` where there is a gradient alone, and ``"none"`` where there is nothing to do.
        driver: how it is launched: ``"single"`` (one launch for all local steps), ``"grouped"`` (one for each phase of
            a local step), ``"rows"`` (one launch, whose programs have an n-block each); on a CPU ``"numba"`` (one
            compiled function for all local steps) or ``"phases"`` (PyTorch's products, a compiled phase after each);
            the form's name where PyTorch does it, call by call.
        config: tile sizes and launch options, for kernels.
        programs: programs of the single launch; 0 for other drivers.
        splits: into how many splits the batch is cut in the products of update tiles.
        rows: rows of the batch in a local step, at most; ``None`` for all.
        together: number of the set of problems of the step that are launched together.
    """

    form: str
    driver: str
    config: Any = None
    programs: int = 0
    splits: int = 1
    rows: int | None = None
    together: int = 0

    def __str__(self) -> str:
        parts = [f"{self.form} form" if self.form in ("product", "gram", "softmax") else self.form]
        if self.rows is not None:
            parts.append(f"{self.rows} rows in a local step")
        if self.programs:
            parts.append(f"single launch of {self.programs} program{'s' if self.programs > 1 else ''}")
        elif self.driver == "rows":
            parts.append("one launch, a program for each n-block")
        elif self.driver == "numba":
            parts.append("compiled by numba")
        elif self.driver == "phases":
            parts.append("phases compiled by numba")
        elif self.config is not None:
            parts.append("a launch for each phase")
        if self.config is not None:
            parts.append(str(self.config))
        if self.splits > 1:
            parts.append(f"products in {self.splits} splits of the batch")
        return ", ".join(parts)


@dataclass(eq=False)
class Increment:
    """What the local loop of one problem found.

    Attributes:
        delta: ``{"weight": Δ, "bias": δ}``, without what is frozen; float32 (float64 for float64 parameters).
        state: the rule's state after the loop, in the form of ``LocalProblem.state``.
        memory: what the tensors are views of, where it came from :mod:`locoprop_kernels.scratch`.
        largest: no number that a commit would write is larger than this; ``None`` where that is not known, NaN where
            there is one.
    """

    delta: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    memory: list[Tensor] = field(default_factory=list)
    largest: float | None = None


class Solution(Protocol):
    """Solved local problems. Each backend has its own, and commits it itself."""

    @property
    def finite(self) -> Tensor:
        """Whether a commit would write finite numbers only: a bool tensor ``[]`` on the problems' device."""

    @property
    def decisions(self) -> Sequence[Decision]:
        """How each problem was solved."""

    @property
    def traces(self) -> Sequence[Tensor | None]:
        """Local objective of each problem before every local step and at the end, ``[T + 1]``; ``None`` unless asked
        for."""

    def increment(self, index: int) -> Increment:
        """What was found for a problem; formed when it is asked for."""

    def commit(self, ok: Tensor, moved: Collection[int] = ()) -> None:
        """Apply increments and new state where the bool tensor ``ok`` ``[]`` is true.

        Args:
            ok: on the problems' device, where it may stay.
            moved: the problems whose parameters or state lie elsewhere than when they were solved, see :func:`lying`.
        """


def lying(problem: LocalProblem, state: State) -> list[tuple[Any, ...]]:
    """Where and how the parameters of a problem and its state lie in memory, which users may change.

    ``module.to(...)`` and ``parameter.data = ...`` do.
    """
    tensors = [one for name, slots in state.items() for one in (getattr(problem, name), *slots.values())]
    return [(one.data_ptr(), one.dtype, one.device, one.shape, one.stride()) for one in tensors]


@torch.no_grad()
def apply(found: Iterable[tuple[LocalProblem, State, Increment]], ok: Tensor) -> None:
    """Apply increments and new state in PyTorch where the bool ``ok`` is true; on a GPU the host does not wait for it.

    Args:
        found: problems, their state before the loop, and what was found for them.
        ok: on the problems' device; on a CPU it must be true.
    """
    on_host = ok.device.type == "cpu"
    # Pairs of what is written and what is added to it, or copied.
    added: tuple[list[Tensor], list[Tensor]] = ([], [])
    copied: tuple[list[Tensor], list[Tensor]] = ([], [])
    for problem, before, increment in found:
        for name, delta in increment.delta.items():
            parameter = getattr(problem, name)
            to, value = (added, delta) if on_host else (copied, torch.where(ok, parameter + delta, parameter))
            to[0].append(parameter)
            to[1].append(value)
            stored, old = problem.state.setdefault(name, {}), before[name]
            for slot, new in increment.state[name].items():
                value = new if on_host else torch.where(ok, new, old[slot])
                if old[slot] is stored.get(slot):
                    copied[0].append(old[slot])
                    copied[1].append(value)
                else:
                    stored[slot] = value.clone(memory_format=torch.contiguous_format)
    # One call for all layers.
    if added[0]:
        torch._foreach_add_(*added)
    if copied[0]:
        torch._foreach_copy_(*copied)

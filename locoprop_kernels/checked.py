"""The checks of the problems of a call: in full for a problem of a new description, in short for others like it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from locoprop_kernels.problem import LocalProblem, State, rule_states
from locoprop_kernels.rules import Rule

__all__ = ["Checked", "check"]

_MOST_KINDS = 4096
# A number for every description of a problem that has been checked.
_kinds: dict[tuple[Any, ...], int] = {}
_numbers = itertools.count()


@dataclass(eq=False)
class Checked:
    """Problems that one call of a backend can solve.

    Attributes:
        problems: the problems.
        states: the rule's state in each of them.
        kind: for each problem a number that stands for its description, see :meth:`LocalProblem.described`: those with
            the same number are checked, decided and planned alike.
        found: what a backend has found out about the problems' own tensors, of which only the contents change as long
            as these problems come again; by anything that has a hash.
    """

    problems: list[LocalProblem]
    states: list[State]
    kind: tuple[int, ...]
    found: dict[Any, Any] = field(default_factory=dict)


def check(problems: Sequence[LocalProblem], rule: Rule) -> Checked:
    """Problems for one call of a backend, once everything about them has been checked.

    Raises:
        TypeError, ValueError: naming the problem, what was expected and what came.
    """
    if isinstance(problems, LocalProblem) or not hasattr(problems, "__iter__"):
        raise TypeError(f"problems must be a sequence of LocalProblem, got {type(problems).__name__}")
    problems = list(problems)
    if not problems:
        raise ValueError("problems must hold at least one LocalProblem, got none")
    for i, problem in enumerate(problems):
        if not isinstance(problem, LocalProblem):
            raise TypeError(f"problem {i} must be a LocalProblem, got {type(problem).__name__}")
    labels = [problem.name or f"problem {i}" for i, problem in enumerate(problems)]
    kind = tuple([_checked_kind(problem, label) for problem, label in zip(problems, labels, strict=True)])
    states = [rule_states(problem, rule, label) for problem, label in zip(problems, labels, strict=True)]
    device = problems[0].weight.device
    for problem, label in zip(problems, labels, strict=True):
        if problem.weight.device != device:
            raise ValueError(f"{label} must be on the device of problem 0, {device}, got {problem.weight.device}")
    written = [
        _memory_of(tensor)
        for problem, own in zip(problems, states, strict=True)
        for name, slots in own.items()
        for tensor in (getattr(problem, name), *slots.values())
    ]
    if len(set(written)) < len(written) or len({id(problem.state) for problem in problems}) < len(problems):
        _refuse_shared(problems, states, labels)
    return Checked(problems, states, kind)


def _checked_kind(problem: LocalProblem, label: str) -> int:
    """The number of a problem's description; where it is a new one, all checks of the problem are made."""
    described = problem.described()
    known = None if described is None else _kinds.get(described)
    if known is not None:
        problem.validate_numbers(label)
        return known
    problem.validate(label)
    number = next(_numbers)
    if described is not None:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        _kinds[described] = number
    return number


def _memory_of(tensor: Tensor) -> int:
    """What two tensors have in common that begin at one place in memory; meta tensors are in none."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def _refuse_shared(problems: Sequence[LocalProblem], states: Sequence[State], labels: Sequence[str]) -> None:
    """Say which memory, or which dictionary of state, a call would write to twice."""
    owners: dict[tuple[str, int], str] = {}
    for problem, own, label in zip(problems, states, labels, strict=True):
        found = [("state", ("dict", id(problem.state)))]
        for name, slots in own.items():
            found.append((name, ("memory", _memory_of(getattr(problem, name)))))
            found += [(f"state {slot!r} of {name}", ("memory", _memory_of(value))) for slot, value in slots.items()]
        for what, key in found:
            if key in owners:
                raise ValueError(
                    f"{label}: its {what} is also {owners[key]}; one problem must hold all rows of a tensor, "
                    "and have state of its own"
                )
            owners[key] = f"that of {label}" if what in ("weight", "bias", "state") else f"the {what} of {label}"

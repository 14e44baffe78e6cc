"""The checks of the problems of a call: in full for a problem of a new description, in short for others like it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from locoprop_kernels.problem import LocalProblem, State, rule_states
from locoprop_kernels.rules import Rule

__all__ = ["Checked", "CheckedProblem", "check", "check_problem", "together"]

_MOST_KINDS = 4096
# A number for every description of a problem that has been checked.
_kinds: dict[tuple[Any, ...], int] = {}
_numbers = itertools.count()


@dataclass(eq=False)
class CheckedProblem:
    """A problem about which everything has been checked that can be by itself.

    Attributes:
        problem: the problem.
        states: the rule's state in it.
        device: of its tensors.
        kind: a number that stands for its description, see :meth:`LocalProblem.described`: problems with the same
            number are checked, decided and planned alike.
    """

    problem: LocalProblem
    states: State
    device: torch.device
    kind: int


@dataclass(eq=False)
class Checked:
    """Problems that one call of a backend can solve.

    Attributes:
        problems: the problems.
        states: the rule's state in each of them.
        kind: of each problem, see :class:`CheckedProblem`.
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
    problems = list(problems)
    if not problems:
        raise ValueError("problems must hold at least one LocalProblem, got none")
    for i, problem in enumerate(problems):
        if not isinstance(problem, LocalProblem):
            raise TypeError(f"problem {i} must be a LocalProblem, got {type(problem).__name__}")
    return together([check_problem(problem, rule, _label(problem, i)) for i, problem in enumerate(problems)])


def check_problem(problem: LocalProblem, rule: Rule, label: str) -> CheckedProblem:
    """A problem by itself, once everything about it has been checked; ``label`` begins every message.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    described = problem.described()
    known = None if described is None else _kinds.get(described)
    if known is None:
        problem.validate(label)
        known = next(_numbers)
        if described is not None:
            if len(_kinds) >= _MOST_KINDS:
                _kinds.clear()
            _kinds[described] = known
    else:
        problem.validate_numbers(label)
    return CheckedProblem(problem, rule_states(problem, rule, label), problem.weight.device, known)


def together(checked: Sequence[CheckedProblem]) -> Checked:
    """Checked problems as one call.

    Raises:
        ValueError: they are on different devices, or train the same tensor.
    """
    problems, first = [one.problem for one in checked], checked[0].device
    for i, one in enumerate(checked):
        if one.device != first:
            raise ValueError(f"{_label(one.problem, i)} must be on the device of problem 0, {first}, got {one.device}")
    owners = [id(getattr(one.problem, name)) for one in checked for name in one.states]
    if len(set(owners)) < len(owners):
        _refuse_shared(problems)
    return Checked(problems, [one.states for one in checked], tuple([one.kind for one in checked]))


def _label(problem: LocalProblem, index: int) -> str:
    return problem.name or f"problem {index}"


def _refuse_shared(problems: Sequence[LocalProblem]) -> None:
    """Say which tensor two problems train."""
    owners: dict[int, str] = {}
    for i, problem in enumerate(problems):
        for name, (parameter, _) in problem.trained().items():
            label = _label(problem, i)
            other = owners.setdefault(id(parameter), label)
            if other != label:
                raise ValueError(
                    f"{label}: its {name} is also that of {other}; one problem must hold all rows of a tensor"
                )

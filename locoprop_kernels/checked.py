"""The checks of the problems of a call, made in full once for all steps of a training loop."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from locoprop_kernels.problem import LocalProblem, State, rule_states
from locoprop_kernels.rules import Rule

__all__ = ["Checked", "check"]

_MOST_KINDS = 1024
# The kind of a list of problems, by their descriptions.
_kinds: dict[tuple[Any, ...], int] = {}
_numbers = itertools.count()


@dataclass(eq=False)
class Checked:
    """Problems that one call of a backend can solve.

    Attributes:
        problems: the problems.
        states: the rule's state in each of them.
        kind: a number that stands for their descriptions, see :meth:`LocalProblem.described`: lists of problems with
            the same number are checked, decided and planned alike.
    """

    problems: list[LocalProblem]
    states: list[State]
    kind: int


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
    labels = [problem.name or f"problem {i}" for i, problem in enumerate(problems)]
    for problem, label in zip(problems, labels, strict=True):
        problem.validate_numbers(label)
    kind = _kind(problems, labels)
    states = [rule_states(problem, rule, label) for problem, label in zip(problems, labels, strict=True)]
    owners = [id(getattr(problem, name)) for problem, own in zip(problems, states, strict=True) for name in own]
    if len(set(owners)) < len(owners):
        _refuse_shared(problems, labels)
    return Checked(problems, states, kind)


def _kind(problems: list[LocalProblem], labels: list[str]) -> int:
    """The number of the problems' descriptions; where it is a new one, all checks are made."""
    described = tuple([problem.described() for problem in problems])
    known = _kinds.get(described)
    if known is not None:
        return known
    for problem, label in zip(problems, labels, strict=True):
        problem.validate(label)
        if problem.weight.device != problems[0].weight.device:
            raise ValueError(
                f"{label} must be on the device of problem 0, {problems[0].weight.device}, got {problem.weight.device}"
            )
    number = next(_numbers)
    if None not in described:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        _kinds[described] = number
    return number


def _refuse_shared(problems: list[LocalProblem], labels: list[str]) -> None:
    """Say which tensor two problems train."""
    owners: dict[int, str] = {}
    for problem, label in zip(problems, labels, strict=True):
        for name, (parameter, _) in problem.trained().items():
            other = owners.setdefault(id(parameter), label)
            if other != label:
                raise ValueError(
                    f"{label}: its {name} is also that of {other}; one problem must hold all rows of a tensor"
                )

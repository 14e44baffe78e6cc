"""Triton kernels. This package is the only one that imports Triton, and only when something is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from locoprop_kernels.problem import LocalProblem, State
from locoprop_kernels.reference import Increment
from locoprop_kernels.settings import Settings

__all__ = ["local_loops", "unsupported"]


def unsupported(problems: Sequence[LocalProblem], settings: Settings) -> str | None:
    """Why the Triton backend cannot run these problems, or ``None`` when it can."""
    from locoprop_kernels.kernels import drivers

    return drivers.unsupported(problems, settings)


def local_loops(
    problems: list[LocalProblem], settings: Settings, states: list[State], views: bool
) -> tuple[list[Increment], Tensor, Callable[[Tensor], None]]:
    """Run all local iterations of all problems; reads them, and writes nothing that belongs to them.

    Args:
        problems: validated problems.
        settings: the settings of the call.
        states: the rule's state in each of them.
        views: whether the increments are looked at.

    Returns:
        one increment per problem (without tensors unless ``views``), a bool ``[]`` on the device that says whether a
        commit would write finite numbers only, and a function that commits where such a bool is true.
    """
    from locoprop_kernels.kernels import drivers

    placed, bad = drivers.run(problems, settings, states)
    groups = list({id(group): group for group, _ in placed}.values())

    def commit(ok: Tensor) -> None:
        for group in groups:
            drivers.commit_group(group, ok)

    return [group.increment(index, views) for group, index in placed], bad[0] == 0, commit

"""The public function of the backend: all local iterations of all layers, as one transaction."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels import reference, rules
from locoprop_kernels.arguments import as_flag, check_choice
from locoprop_kernels.autocasting import without_autocast
from locoprop_kernels.checked import Checked, check
from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.regularisers import Regulariser
from locoprop_kernels.reports import ProblemReport, StepReport
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Solution

__all__ = ["BACKENDS", "ProblemReport", "StepReport", "local_steps_", "solve", "triton_unavailable"]

BACKENDS = ("auto", "triton", "reference")
_log = logging.getLogger("locoprop_kernels")
_logged_reasons: set[str] = set()


@lru_cache(maxsize=1)
def triton_unavailable() -> str | None:
    """Why the Triton backend cannot run at all in this process, or ``None`` when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    return None


def _choose_backend(backend: str, checked: Checked, settings: Settings) -> tuple[Any, str]:
    """The Triton backend's plan of the step, or ``None`` for the reference backend, and the reason.

    An explicit choice is taken or refused, never replaced.
    """
    if backend == "reference":
        return None, "asked for by name"
    device = checked.problems[0].weight.device
    reason = triton_unavailable()
    if reason is None and backend == "auto" and device.type != "cuda":
        reason = f"the tensors are on {device}"
    if reason is None:
        from locoprop_kernels import kernels

        plan = kernels.planned(checked, settings)
        if not isinstance(plan, str):
            return plan, "asked for by name" if backend == "triton" else "the tensors are on a GPU"
        reason = plan
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot run this step: {reason}; backend='reference' would work")
    if settings.compute_dtype == torch.float8_e4m3fn and device.type == "cuda":
        # The reference would only round to it, and be slower than in any other precision.
        raise ValueError(
            f"compute_dtype=torch.float8_e4m3fn cannot run on this GPU: {reason}; backend='reference' "
            "would work, which rounds operands alike and is slow"
        )
    if reason not in _logged_reasons:
        _logged_reasons.add(reason)
        _log.info("backend 'auto' takes the reference backend: %s", reason)
    return None, reason


@torch.no_grad()
@without_autocast()
def local_steps_(
    problems: Sequence[LocalProblem],
    rule: str | rules.Rule = "rmsprop",
    lr: Sequence[float] = (),
    prox: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    commit: bool = True,
    trace: bool = False,
    regulariser: Regulariser | Callable[[Tensor, Tensor], Tensor] | None = None,
    rows: int | None = None,
    rows_seed: int = 0,
) -> StepReport:
    """Run ``T = len(lr)`` local iterations of every problem, and update weights, biases and state in place.

    All or nothing: if the call raises, or any new weight or state would be non-finite, everything is as before.

    Args:
        problems: the layers' local problems, all on one device.
        rule: name of an update rule, or an instance from :mod:`locoprop_kernels.rules`.
        lr: learning rate of each local iteration, all ``>= 0``.
        prox: proximal coefficient ``λ >= 0``; acts on weight and bias.
        reduction: ``"sum"`` over the batch, or ``"mean"``: all but the proximal term is divided by ``B``.
        backend: ``"auto"`` (the reason is logged once), ``"triton"`` or ``"reference"``.
        compute_dtype: dtype of the operands of the matrix products (float64, float32, bfloat16, float16,
            float8_e4m3fn); ``None`` takes the parameters'. Sums, increments and state stay in float32 (float64 for
            float64 parameters). On GPUs float8 needs the Triton backend and compute capability 8.9, and is refused
            elsewhere; on few ``rows`` and in the Gram form bfloat16 takes its place.
        commit: ``False`` leaves everything as it was and puts the increments into the report.
        trace: also evaluate the local objectives, see :class:`ProblemReport`.
        regulariser: a regulariser beside the proximal term: a :class:`Regulariser`, or its gradient as a function.
        rows: how many rows of the batch a local step takes at most, other ones in each, to estimate how the gradient
            has changed since the first; ``None`` for all. See :mod:`locoprop_kernels.sampling`.
        rows_seed: an integer ``>= 0`` that says which; take another one in each step of training.

    Returns:
        A :class:`StepReport`: backend, drivers, whether the step was committed, traces, and with ``commit=False`` the
        increments (``report.commit_()`` applies them later).

    Raises:
        TypeError, ValueError: before anything is changed; naming the argument, what was expected and what came.
    """
    commit = as_flag("commit", commit)
    settings = Settings.checked(rule, lr, prox, reduction, compute_dtype, trace, regulariser, rows, rows_seed)
    checked = check(problems, settings.rule)
    report = solve(checked, settings, backend)
    if commit:
        report.commit_()
    else:
        report.postpone(checked.problems, checked.states)
    return report


def solve(checked: Checked, settings: Settings, backend: str, done: Callable[[int], None] | None = None) -> StepReport:
    """:func:`local_steps_` up to the commit, which ``report.commit_()`` is; to be called without gradients enabled.

    Args:
        checked: the layers' local problems.
        settings: the settings of the call.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.
        done: called with the index of each problem that is solved, where they are solved one after the other (by the
            reference backend): the caller may then let go of its rows and gradients.
    """
    check_choice("backend", backend, BACKENDS)
    names = [problem.name or f"problem {i}" for i, problem in enumerate(checked.problems)]
    rows = [problem.x.shape[-2] for problem in checked.problems]
    plan, reason = _choose_backend(backend, checked, settings)
    solution: Solution
    if plan is not None:
        from locoprop_kernels import kernels

        solution = kernels.solve(plan, checked, settings)
    else:
        # Asked for by name, the reference is PyTorch alone.
        compiled = backend == "auto"
        solution = reference.solve(checked, settings, done, compiled)
    return StepReport.of(solution, "reference" if plan is None else "triton", reason, names, rows)

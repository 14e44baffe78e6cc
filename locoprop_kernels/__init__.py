"""Compute backend of LocoProp: the local problems of all layers, solved together.

Start with :func:`local_steps_` and :class:`LocalProblem`. The algorithm is in :mod:`locoprop_kernels.reference`.
"""

from locoprop_kernels import rules, transfers
from locoprop_kernels.closed_form import closed_form
from locoprop_kernels.compiled import LocalSteps
from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.regularisers import Regulariser
from locoprop_kernels.steps import ProblemReport, StepReport, local_steps_
from locoprop_kernels.transfers import register_transfer

__all__ = [
    "LocalProblem",
    "LocalSteps",
    "ProblemReport",
    "Regulariser",
    "StepReport",
    "closed_form",
    "local_steps_",
    "register_transfer",
    "rules",
    "transfers",
]
__version__ = "0.1.0"

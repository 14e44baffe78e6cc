"""Kernels for CPUs that numba compiles, taken where it is installed: whole local loops, or what lies between products.

A local step on few rows costs little more than going through the weights, and for small layers than torch's calls.
Compiled, some outputs of a layer go through all their local steps at once: increments and state stay in a core's own
cache, gradients are never written to memory, and there is one call for all of it. A thread takes some outputs of some
layer after the other. With all rows of a large batch PyTorch's products take most of the time; what is between two of
them, five to ten calls of torch that go through memory, is one compiled phase.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache

import torch

from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.settings import Settings
from locoprop_kernels.transfers import Transfer

__all__ = ["PROCESS", "can_run", "can_run_phases", "version"]

#: The process that has imported the package: one that is forked later has none of its threads. The modules that need
#: this are imported at their first use, which may be in the forked one.
PROCESS = os.getpid()

# Weights of a softmax layer, of which one thread takes all outputs: more of them are better shared out, by PyTorch.
_ONE_THREAD = 2**17
_log = logging.getLogger("locoprop_kernels")


@lru_cache(maxsize=1)
def version() -> str | None:
    """The version of numba; ``None`` where there is none that works with the numpy there is, which is logged once."""
    if importlib.util.find_spec("numba") is None:
        _log.info("numba is not installed, so local loops on CPUs go through PyTorch (pip install numba)")
        return None
    try:
        import numba
    except Exception as error:  # a numpy that is too new for it, say
        _log.warning("numba cannot be imported, so local loops on CPUs go through PyTorch: %s", error)
        return None
    return str(numba.__version__)


def can_run(problem: LocalProblem, settings: Settings) -> bool:
    """Whether the kernels have what a local loop needs that is compiled as a whole.

    They take weights in float32 on a CPU, with operands in float32, or on few rows in bfloat16, at least two local
    steps, and a softmax layer of up to 2¹⁷ weights. They do not take masks, groups, frozen weights, a trace or a
    regulariser; nor transfer functions and rules of the user's own, transfer functions that are not in ``CODES`` of
    :mod:`~locoprop_kernels.cpu_kernels.functions`, centered RMSprop and TensorFlow's Adagrad. These go through PyTorch.
    """
    assert isinstance(problem.transfer, Transfer)
    operands = settings.operands(problem)  # bfloat16 is multiplied in float32: not where products are the cost
    return (
        (operands is torch.float32 or (operands is torch.bfloat16 and settings.sets(problem) > 1))
        and (problem.transfer.elementwise or problem.weight.numel() <= _ONE_THREAD)
        and _know(problem, settings)
    )


def can_run_phases(problem: LocalProblem, settings: Settings, form: str) -> bool:
    """Whether the kernels have what a local loop on all rows needs whose products are PyTorch's, in a form.

    They take what :func:`can_run` says, with operands in bfloat16 on all rows too, but no softmax.
    """
    assert isinstance(problem.transfer, Transfer)
    return (
        settings.operands(problem, form) in (torch.float32, torch.bfloat16)
        and problem.transfer.elementwise
        and _know(problem, settings)
    )


def _know(problem: LocalProblem, settings: Settings) -> bool:
    """Whether there are kernels for a problem, whatever multiplies."""
    if version() is None:
        return False
    from locoprop_kernels.cpu_kernels.functions import CODES
    from locoprop_kernels.cpu_kernels.updates import family_of

    assert isinstance(problem.transfer, Transfer)
    return (
        settings.iterations > 1
        and problem.weight.dtype is torch.float32
        and problem.weight.is_cpu
        and problem.weight.dim() == 2
        and problem.grad_weight is not None
        and problem.mask_weight is None
        and problem.mask_bias is None
        and settings.regulariser is None
        and not settings.trace
        and problem.transfer.name in CODES
        and family_of(settings.rule) is not None
    )

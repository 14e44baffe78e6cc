"""What the kernels run on, and whether they can."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from functools import lru_cache

import torch
from torch import Tensor

from locoprop_kernels.chosen import ChosenRows
from locoprop_kernels.kernels import commit
from locoprop_kernels.kernels.device import functions
from locoprop_kernels.kernels.device import rules as device_rules
from locoprop_kernels.patches import Rows, Stacked
from locoprop_kernels.problem import LocalProblem
from locoprop_kernels.rules import Rule
from locoprop_kernels.settings import Settings
from locoprop_kernels.transfers import Transfer

__all__ = [
    "float32_precision",
    "interpreted",
    "multiprocessors",
    "no_float8",
    "target_of",
    "unsupported",
    "unsupported_problem",
]

# Larger convolutions go to the reference, which holds 16 MiB of patches at a time.
_MOST_UNFOLDED_BYTES = 2**30


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return type(commit._commit_kernel).__name__ == "InterpretedFunction"


@lru_cache
def target_of(device: torch.device) -> str:
    """Name of the device's architecture in the table of configurations."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def float32_precision() -> str:
    """``"tf32"`` or ``"ieee"``, from torch's own setting for float32 products."""
    if torch.version.hip:
        return "ieee"
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if setting == "none":
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "ieee"


def no_float8(target: str) -> str | None:
    """Why the matrix units of a target do not take ``float8_e4m3fn``, or ``None`` if they do."""
    if target == "interpreter" or (target.startswith("sm_") and int(target.removeprefix("sm_")) >= 89):
        return None
    own = ", whose matrix units take float8_e4m3fnuz instead" if target == "gfx942" else ""
    return (
        f"compute_dtype=torch.float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or later, got {target}{own} "
        "(compute_dtype=torch.bfloat16 would work)"
    )


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def unsupported(device: torch.device, settings: Settings) -> str | None:
    """Why no problems with these settings can run on a device, or ``None``."""
    return _unsupported_device(device) or _unsupported_rule(settings.rule) or _unsupported_regulariser(settings)


def _unsupported_device(device: torch.device) -> str | None:
    if device.type == "cpu" and not interpreted():
        return "the tensors are on the CPU (move them to a GPU, or set TRITON_INTERPRET=1 to debug)"
    if device.type not in ("cpu", "cuda"):
        return f"device type {device.type!r} is not supported (CUDA and HIP devices are)"
    if device.type == "cuda" and interpreted():
        return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors"
    return None


def _unsupported_rule(rule: Rule) -> str | None:
    name = type(rule).__name__
    if device_rules.lookup(rule) is None:
        return f"{name} has no Triton function (give it an attribute triton_fn)"
    # Kernels are kept by the hyper-parameters that they were compiled with, so these must not change unnoticed.
    if not (is_dataclass(rule) and type(rule).__dataclass_params__.frozen):
        return f"{name} must be a frozen dataclass, whose fields its Triton function is compiled with"
    if any(not one.repr for one in fields(rule)):
        return f"{name} must show all its fields in its repr, by which compiled kernels are kept"
    if len(rule.slots) > device_rules.SLOTS:
        return f"{name} has {len(rule.slots)} slots of state, and the kernels have room for {device_rules.SLOTS}"
    return None


def _unsupported_regulariser(settings: Settings) -> str | None:
    if settings.regulariser is None:
        return None
    if settings.regulariser.triton_fn is None:
        return "the regulariser has no Triton function (give Regulariser a triton_fn)"
    if settings.trace:
        return "trace=True is not supported with a regulariser of the user's own"
    return None


def unsupported_problem(problem: LocalProblem, settings: Settings) -> str | None:
    """Why a problem cannot run with settings that are supported, or ``None``."""
    if (unfolded := _unfolded_bytes(problem.x)) > _MOST_UNFOLDED_BYTES:
        most, size = _MOST_UNFOLDED_BYTES >> 20, unfolded / 2**20
        return f"the kernels unfold patches whole, at most {most} MiB a layer; one takes {size:.0f} MiB"
    dtypes = (problem.weight.dtype, problem.x.dtype, problem.preactivation.dtype, settings.compute_dtype)
    if torch.float64 in dtypes:
        return "float64 is not supported (float32, bfloat16 and float16 are)"
    if settings.compute_dtype == torch.float8_e4m3fn and (reason := no_float8(target_of(problem.weight.device))):
        return reason
    assert isinstance(problem.transfer, Transfer)
    if problem.transfer.name != "softmax" and functions.lookup(problem.transfer) is None:
        return f"the transfer function {str(problem.transfer)!r} has no Triton function"
    return None


def _unfolded_bytes(x: Tensor | Rows) -> int:
    """Size of rows that are formed, and are larger than what they are formed from."""
    if isinstance(x, (Tensor, ChosenRows)):
        return 0
    if isinstance(x, Stacked):
        return sum(map(_unfolded_bytes, x.parts))
    return math.prod(x.shape) * x.dtype.itemsize

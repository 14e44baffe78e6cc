"""A layer's local problem, and the checks that every backend relies on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels.arguments import is_finite, is_number, shown
from locoprop_kernels.patches import Rows, described
from locoprop_kernels.rules import Rule
from locoprop_kernels.transfers import Transfer
from locoprop_kernels.transfers import get as get_transfer

__all__ = [
    "COMPUTE_DTYPES",
    "PARAMETER_DTYPES",
    "REDUCTIONS",
    "LocalProblem",
    "State",
    "accumulation_dtype",
    "initial_state",
    "of_outputs",
    "rule_states",
    "why_no_slot",
]

REDUCTIONS = ("mean", "sum")
State = dict[str, dict[str, Tensor]]
"""A rule's state in a problem: ``{"weight": {slot: tensor}, "bias": {slot: tensor}}``."""
_TENSORS = ("x", "preactivation", "weight", "bias", "grad_weight", "grad_bias", "mask_weight", "mask_bias")
PARAMETER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPUTE_DTYPES = (*PARAMETER_DTYPES, torch.float8_e4m3fn)


@dataclass(eq=False)
class LocalProblem:
    """The local problem of one layer: ``B`` examples, ``K`` inputs, ``N`` outputs.

    Minimise over ``W``, ``b`` the matching loss between ``f(X Wᵀ + b)`` and a target, plus the proximal term
    ``λ/2 (‖W - W_0‖² + ‖b - b_0‖²)``. The target enters through the gradient at the start, ``G_0``, alone.

    ``G`` layers of one shape that lie side by side, as the groups of a convolution do, are one problem too: every shape
    below then begins with ``G``, and products are batched.

    Attributes:
        x: input of the layer, ``[B, K]``; or :class:`locoprop_kernels.patches.Rows`, formed a chunk at a time.
        preactivation: ``A0 = X W_0ᵀ + b_0`` of the forward pass, ``[B, N]``, or rows likewise.
        weight: ``W``, ``[N, K]``; updated in place.
        bias: ``b``, ``[N]``, updated in place; or ``None``.
        grad_weight: ``G_0 = γ ∂L/∂W``, or what ``grad_scale`` makes that of, ``[N, K]``; ``None`` freezes the weight.
        grad_bias: ``g_0 = γ ∂L/∂b``, ``[N]``, likewise; ``None`` freezes the bias.
        transfer: name of ``f``, or a :class:`locoprop_kernels.transfers.Transfer`.
        state: the rule's state, ``{"weight": {slot: tensor}, "bias": {slot: tensor}}``; filled at the first step.
        name: what error messages call this problem; its place in the list where empty.
        examples: what ``reduction="mean"`` divides by; ``None`` for ``B``, the number of rows.
        mask_weight: bool ``[N, K]``; where it is false, gradient and increment are zero in every local step.
        mask_bias: bool ``[N]``, likewise.
        rate_weight: factor of the learning rates for the weight, ``>= 0``.
        rate_bias: factor of the learning rates for the bias, ``>= 0``.
        grad_scale: factor of both gradients, so that ``γ`` need not be multiplied in before.

    ``x`` and ``preactivation`` have the dtype of the weight, or bfloat16 / float16 as autocast leaves them.
    """

    x: Tensor | Rows
    preactivation: Tensor | Rows
    weight: Tensor
    bias: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    transfer: str | Transfer = "identity"
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    name: str = ""
    examples: int | None = None
    mask_weight: Tensor | None = None
    mask_bias: Tensor | None = None
    rate_weight: float = 1.0
    rate_bias: float = 1.0
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        self.transfer = get_transfer(self.transfer)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, K, N)``."""
        return self.x.shape[-2], self.x.shape[-1], self.weight.shape[-2]

    @property
    def groups(self) -> int | None:
        """``G``, or ``None`` where the shapes do not begin with it."""
        return self.weight.shape[0] if self.weight.dim() == 3 else None

    def group(self, index: int) -> LocalProblem:
        """The problem of one group, on views of this one's tensors."""

        def part(name: str) -> Any:
            value = getattr(self, name)
            return value.group(index) if isinstance(value, Rows) else None if value is None else value[index]

        return replace(self, **{name: part(name) for name in _TENSORS}, state={})

    def outputs(self, some: slice) -> LocalProblem:
        """The problem of some of the ``N`` outputs, on views of this one's parameters; ``x`` and ``A0`` are as here."""
        views: dict[str, Any] = {
            prefix + kind: None if (tensor := getattr(self, prefix + kind)) is None else of_outputs(kind, tensor, some)
            for kind in ("weight", "bias")
            for prefix in ("", "grad_", "mask_")
        }
        return replace(self, **views, state={})

    def scale(self, reduction: str) -> float:
        """Factor of the matching loss: one over the number of examples for ``"mean"``, 1 for ``"sum"``."""
        return 1.0 / (self.examples or self.shape[0]) if reduction == "mean" else 1.0

    def trained(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``{"weight": (W, G_0), "bias": (b, g_0)}`` without what is frozen."""
        found = {}
        if self.grad_weight is not None:
            found["weight"] = self.weight, self.grad_weight
        if self.bias is not None and self.grad_bias is not None:
            found["bias"] = self.bias, self.grad_bias
        return found

    def mask(self, name: str) -> Tensor | None:
        """The mask of ``"weight"`` or ``"bias"``."""
        return self.mask_weight if name == "weight" else self.mask_bias

    def rate(self, name: str) -> float:
        """The factor of the learning rates for ``"weight"`` or ``"bias"``."""
        return self.rate_weight if name == "weight" else self.rate_bias

    def validate(self, label: str) -> None:
        """Check shapes, dtypes and devices; ``label`` begins every message.

        Raises:
            TypeError: something that should be a tensor is not.
            ValueError: a shape, dtype, device or layout does not fit.
        """
        self._check_tensors(label)
        self.validate_numbers(label)

    def described(self) -> tuple[Any, ...] | None:
        """All that checks, decisions and plans depend on but numbers and addresses; ``None`` where a tensor is none.

        What has been found out for one problem holds for all others of the same description.
        """
        tensors = (
            self.weight, self.bias, self.grad_weight, self.grad_bias, self.mask_weight, self.mask_bias
        )  # fmt: skip
        try:
            return (
                described(self.x),
                described(self.preactivation),
                *[t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.layout) for t in tensors],
                *[t is not None and _is_locked(t) for t in tensors[:2]],
                self.transfer,
                self.transfer.triton_fn,  # type: ignore[union-attr]
                self.examples,
            )
        except (AttributeError, RuntimeError):
            return None

    def _check_tensors(self, label: str) -> None:
        tensors = self._tensors(label)
        if self.weight.dim() not in (2, 3) or len(self.x.shape) != self.weight.dim():
            raise ValueError(
                f"{label}: x must be [B, K] and weight [N, K], or [G, B, K] and [G, N, K], "
                f"got {list(self.x.shape)} and {list(self.weight.shape)}"
            )
        b, k, n = self.shape
        lead = list(self.weight.shape[:-2])
        matrix, vector = [*lead, n, k], [*lead, n]
        expected = {
            "x": [*lead, b, k],
            "preactivation": [*lead, b, n],
            "weight": matrix,
            "grad_weight": matrix,
            "mask_weight": matrix,
        }
        for name, tensor in tensors.items():
            want = expected.get(name, vector)
            if list(tensor.shape) != want:
                raise ValueError(
                    f"{label}: {name} must have shape {want} (B={b} rows of x, K={k}, N={n}), got {list(tensor.shape)}"
                )
            if tensor.device != self.weight.device:
                raise ValueError(
                    f"{label}: {name} must be on the weight's device {self.weight.device}, got {tensor.device}"
                )
            self._check_dtype(label, name, tensor.dtype)
        if self.weight.dtype not in PARAMETER_DTYPES:
            raise ValueError(f"{label}: weight must have one of the dtypes {PARAMETER_DTYPES}, got {self.weight.dtype}")
        if 0 in (b, k, n, *lead):
            raise ValueError(f"{label}: the batch and the layer must not be empty, got B={b}, K={k}, N={n}")
        if self.bias is None and (self.grad_bias is not None or self.mask_bias is not None):
            raise ValueError(
                f"{label}: {'mask' if self.grad_bias is None else 'grad'}_bias was given for a layer without bias"
            )
        trained = self.trained()
        if not trained:
            raise ValueError(f"{label}: grad_weight or grad_bias must be given, got neither")
        for name, (parameter, _) in trained.items():
            if fault := _why_not_written(parameter):
                raise ValueError(f"{label}: {name} {fault}")

    def validate_numbers(self, label: str) -> None:
        """Check what is not a tensor; see :meth:`validate`."""
        if self.examples is not None and (isinstance(self.examples, bool) or not isinstance(self.examples, Integral)):
            raise TypeError(f"{label}: examples must be an integer or None, got {shown(self.examples)}")
        if self.examples is not None and not (self.examples >= 1 and is_finite(self.examples)):
            raise ValueError(f"{label}: examples must be >= 1 and no larger than a float, got {shown(self.examples)}")
        for name in ("rate_weight", "rate_bias", "grad_scale"):
            value = getattr(self, name)
            if type(value) is float and 0 <= value < math.inf:
                continue
            if not is_number(value) or not is_finite(value) or (value < 0 and name != "grad_scale"):
                sign = "" if name == "grad_scale" else " >= 0"
                raise ValueError(f"{label}: {name} must be a finite number{sign}, got {shown(value)}")
        if not isinstance(self.state, dict):
            raise TypeError(f"{label}: state must be a dict, got {type(self.state).__name__}")

    def _tensors(self, label: str) -> dict[str, Tensor | Rows]:
        """What is given, by name."""
        tensors: dict[str, Tensor | Rows] = {}
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor is None and name not in _TENSORS[:3]:
                continue
            if name in ("x", "preactivation") and isinstance(tensor, Rows):
                tensors[name] = tensor
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.layout != torch.strided:
                raise ValueError(f"{label}: {name} must be a dense tensor, got layout {tensor.layout}")
            tensors[name] = tensor
        return tensors

    def _check_dtype(self, label: str, name: str, dtype: torch.dtype) -> None:
        if name.startswith("mask"):
            if dtype != torch.bool:
                raise ValueError(f"{label}: {name} must have dtype {torch.bool}, got {dtype}")
            return
        low_precision = name in ("x", "preactivation") and dtype in (torch.bfloat16, torch.float16)
        if dtype != self.weight.dtype and not low_precision:
            raise ValueError(f"{label}: {name} must have the weight's dtype {self.weight.dtype}, got {dtype}")


def of_outputs(kind: str, tensor: Tensor, some: slice) -> Tensor:
    """A view of what belongs to some outputs, of a tensor ``[.., N, K]`` of the weight or ``[.., N]`` of the bias.

    A number of steps, ``[]``, belongs to all of them.
    """
    if not tensor.dim():
        return tensor
    return tensor[..., some, :] if kind == "weight" else tensor[..., some]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of increments, gradients and rule state for parameters of ``dtype``: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def initial_state(rule: Rule, parameter: Tensor) -> dict[str, Tensor]:
    """The state that a rule starts with: a tensor per slot like ``parameter``, in the dtype of sums, and its step 0."""
    dtype = accumulation_dtype(parameter.dtype)
    state = {slot: torch.full_like(parameter, start, dtype=dtype) for slot, start in rule.slots.items()}
    if rule.counts_steps:
        state["step"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
    return state


def rule_states(problem: LocalProblem, rule: Rule, label: str) -> State:
    """The rule's state in a problem, created where there is none yet; never written to.

    State that was kept on another device or in another dtype (the model was moved) is converted.

    Raises:
        TypeError: an entry of the state is no tensor.
        ValueError: the state has other slots or shapes than ``rule`` needs, or cannot be written to.
    """
    slots = rule.slots
    wanted = {*slots, "step"} if rule.counts_steps else slots.keys()
    states: State = {}
    for name, (parameter, _) in problem.trained().items():
        stored = problem.state.get(name)
        if stored is not None and not isinstance(stored, dict):
            raise TypeError(f"{label}: state of {name} must be a dict, got {shown(stored)}")
        if not stored:
            states[name] = initial_state(rule, parameter)
            continue
        if stored.keys() != wanted:
            expected = ", ".join(sorted(wanted)) or "no entries"
            raise ValueError(f"{label}: state of {name} must have {expected} for {rule}, got {sorted(stored, key=str)}")
        dtype, device, shape = accumulation_dtype(parameter.dtype), parameter.device, parameter.shape
        own = stored
        for slot, value in stored.items():
            counts = slot == "step"
            if not isinstance(value, Tensor):
                raise TypeError(f"{label}: state {slot!r} of {name} must be a torch.Tensor, got {shown(value)}")
            fits = value.device == device and (counts or value.dtype is dtype)
            fault = why_no_slot(value, () if counts else shape, counts) or (fits and _why_not_written(value))
            if fault:
                raise ValueError(f"{label}: state {slot!r} of {name} {fault}")
            if not fits:
                own = {**own, slot: value.to(device=device, dtype=value.dtype if counts else dtype)}
        states[name] = own
    return states


def why_no_slot(value: Tensor, shape: tuple[int, ...], counts: bool) -> str | None:
    """Why a tensor cannot be one of a rule's state, or its number of steps (``counts``); ``None`` where it can."""
    if value.shape != shape:
        return f"must have shape {list(shape)}, got {list(value.shape)}"
    if value.layout is not torch.strided or value.is_complex():
        return f"must be dense and real, got layout {value.layout} of {value.dtype}"
    # On a GPU it would have to be waited for.
    if counts and value.is_cpu and not ((number := value.item()) >= 0 and number % 1 == 0):
        return f"must be a whole number >= 0, got {number}"
    return None


def _is_locked(tensor: Tensor) -> bool:
    """Whether torch lets nobody write to a tensor: one that was made in inference mode, outside of it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _why_not_written(tensor: Tensor) -> str | None:
    """Why a tensor cannot be updated in place, so that a commit would fail half way; ``None`` where it can."""
    if _is_locked(tensor):
        return "must not be a tensor that was made in inference mode, outside of it: clone it"
    if not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor) == 1:
        return f"must have memory of its own for each element, got strides {list(tensor.stride())}: clone it"
    return None

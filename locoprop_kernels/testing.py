"""The textbook form of LocoProp, as everyone writes it: an oracle that shares no arithmetic with the backends.

It forms the target, recomputes the pre-activation from the weights in every local iteration, and steps ``torch.optim``
(or, for the TensorFlow flavor, formulas written out from TensorFlow's documentation) on the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels import rules
from locoprop_kernels.transfers import Transfer
from locoprop_kernels.transfers import get as get_transfer

__all__ = ["TextbookLayer", "torch_optimizer"]


def torch_optimizer(rule: rules.Rule, parameters: list[Tensor], lr: float = 1.0) -> torch.optim.Optimizer:
    """The ``torch.optim`` optimiser that a rule of the torch flavor stands for.

    Raises:
        ValueError: there is none (TensorFlow flavor, or a custom rule).
    """
    if getattr(rule, "flavor", "torch") != "torch":
        raise ValueError(f"rule must have flavor 'torch', got {rule}")
    match rule:
        case rules.SGD(momentum, nesterov):
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov)
        case rules.RMSprop(alpha, momentum, eps, centered):
            return torch.optim.RMSprop(parameters, lr=lr, alpha=alpha, momentum=momentum, eps=eps, centered=centered)
        case rules.Adam(betas, eps):
            return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps)
        case rules.Adagrad(eps, start):
            return torch.optim.Adagrad(parameters, lr=lr, eps=eps, initial_accumulator_value=start)
    raise ValueError(f"rule must be one of the package's rules, got {rule}")


class _TensorFlowOptimizer:
    """TensorFlow 1's RMSProp, Adam and Adagrad, written out."""

    def __init__(self, rule: rules.Rule, parameters: list[Tensor]) -> None:
        self.rule, self.parameters, self.steps = rule, parameters, 0
        start = {rules.RMSprop: 1.0, rules.Adam: 0.0, rules.Adagrad: getattr(rule, "initial_accumulator_value", 0.0)}
        self.second = [torch.full_like(p, start[type(rule)]) for p in parameters]
        self.first = [torch.zeros_like(p) for p in parameters]
        self.mean = [torch.zeros_like(p) for p in parameters]

    def step(self, lr: float) -> None:
        self.steps += 1
        for p, second, first, mean in zip(self.parameters, self.second, self.first, self.mean, strict=True):
            g = p.grad
            assert g is not None
            match self.rule:
                case rules.RMSprop(alpha, momentum, eps, centered):
                    second += (1 - alpha) * (g**2 - second)
                    mean += (1 - alpha) * (g - mean)
                    variance = second - mean**2 if centered else second
                    first.copy_(momentum * first + lr * g / torch.sqrt(variance + eps))
                    p -= first
                case rules.Adam((beta1, beta2), eps):
                    first += (1 - beta1) * (g - first)
                    second += (1 - beta2) * (g**2 - second)
                    rate = lr * (1 - beta2**self.steps) ** 0.5 / (1 - beta1**self.steps)
                    p -= rate * first / (torch.sqrt(second) + eps)
                case rules.Adagrad():
                    second += g**2
                    p -= lr * torch.nan_to_num(g / torch.sqrt(second), nan=0.0)


@dataclass(eq=False)
class TextbookLayer:
    """A layer trained by ``G = (f(X Wᵀ + b) - Y)ᵀ X + λ (W - W_0)``; owns copies of its parameters.

    Args:
        weight: ``[N, K]``, copied.
        bias: ``[N]``, copied; or ``None``.
        transfer: the transfer function.
        rule: the local update rule; its state persists over calls of :meth:`step`.
        operands: dtype that the operands of every product are rounded to (products accumulate in the weight's dtype).
    """

    weight: Tensor
    bias: Tensor | None
    transfer: str | Transfer
    rule: rules.Rule
    operands: torch.dtype | None = None
    _optimizer: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().clone()
        self.bias = None if self.bias is None else self.bias.detach().clone()
        self.transfer = get_transfer(self.transfer)
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        if getattr(self.rule, "flavor", "torch") == "tensorflow":
            self._optimizer = _TensorFlowOptimizer(self.rule, parameters)
        else:
            self._optimizer = torch_optimizer(self.rule, parameters)

    def _round(self, tensor: Tensor) -> Tensor:
        return tensor if self.operands is None else tensor.to(self.operands).to(tensor.dtype)

    def preactivation(self, x: Tensor) -> Tensor:
        """``X Wᵀ + b``, ``[B, N]``, for ``x`` ``[B, K]``."""
        a = self._round(x) @ self._round(self.weight).t()
        return a if self.bias is None else a + self.bias

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor, lr: list[float], prox: float, reduction: str) -> None:
        """``len(lr)`` local iterations towards the post-activation ``target`` ``[B, N]``."""
        assert isinstance(self.transfer, Transfer)
        weight0 = self.weight.clone()
        bias0 = None if self.bias is None else self.bias.clone()
        scale = 1 / len(x) if reduction == "mean" else 1.0
        for rate in lr:
            difference = self.transfer(self.preactivation(x)) - target
            self.weight.grad = scale * self._round(difference).t() @ self._round(x) + prox * (self.weight - weight0)
            if self.bias is not None and bias0 is not None:
                self.bias.grad = scale * difference.sum(0) + prox * (self.bias - bias0)
            if isinstance(self._optimizer, _TensorFlowOptimizer):
                self._optimizer.step(rate)
            else:
                for group in self._optimizer.param_groups:
                    group["lr"] = rate
                self._optimizer.step()

"""The tensors of a case: the same start for all contestants, and what a step should do to it, in float64."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locoprop_kernels as lk
from bench import textbook
from bench.cases import Case
from locoprop_torch import LocoProp
from locoprop_torch.rates import local_rates

__all__ = ["LR", "Work"]

LR = 2e-5
_EXACT_CHECK_FLOPS = {"cpu": 5e11, "cuda": 2e14}


class _SquaredReLU(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return torch.relu(a).square()


_MODULES = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "squared_relu": _SquaredReLU}


class Work:
    """Parameters, inputs and targets of a case, from a fixed seed.

    Args:
        case: the case.
        device: where to put it.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        rand, randn = (partial(f, generator=generator, device=device) for f in (torch.rand, torch.randn))

        def uniform(*shape: int, bound: float) -> Tensor:
            return (2 * rand(*shape) - 1) * bound

        # Variance is kept from layer to layer: gradients of deep networks do not vanish in the rounding.
        self.parameters = [
            (uniform(*layer.weight_shape, bound=(3 / layer.inputs) ** 0.5), uniform(layer.outputs, bound=0.03))
            for layer in case.layers
        ]
        self.names = [layer.transfer for layer in case.layers]
        self.local_names = ["identity"] * len(self.names) if case.loss == "squared" else self.names
        iterations = case.iterations
        self.rates = local_rates(LR, iterations)
        first, last = case.layers[0], case.layers[-1]
        if case.scope == "step":
            self.x, self.y = rand(*first.input_shape), rand(last.batch, last.outputs)
        else:
            self.inputs = [randn(layer.batch, layer.inputs) for layer in case.layers]
            # Residuals that other weights would explain, as in a network: the step then depends smoothly on rounding.
            self.gradients = [
                x @ (2e-4 * randn(layer.outputs, layer.inputs)).t()
                for x, layer in zip(self.inputs, case.layers, strict=True)
            ]

    # --- networks

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """A fresh network with the start parameters; the last transfer function belongs to the loss."""
        modules: list[nn.Module] = []
        for layer, (weight, bias) in zip(self.case.layers, self.parameters, strict=True):
            if self.x.dim() == 4 and layer.convolution is None:
                modules.append(nn.Flatten())
            module: nn.Module
            if c := layer.convolution:
                sizes = (c.channels, layer.outputs, c.kernel, c.stride, c.padding)
                module = nn.Conv2d(*sizes, device=self.device, dtype=dtype)
            else:
                module = nn.Linear(layer.inputs, layer.outputs, device=self.device, dtype=dtype)
            module.load_state_dict({"weight": weight, "bias": bias})
            modules.append(module)
            if layer.transfer in _MODULES:
                modules.append(_MODULES[layer.transfer]())
        return nn.Sequential(*modules[:-1])

    @staticmethod
    def loss(output: Tensor, target: Tensor) -> Tensor:
        """BCE with logits, summed over outputs, mean over the batch."""
        return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(target)

    @staticmethod
    def trained(model: nn.Sequential) -> list[nn.Linear | nn.Conv2d]:
        """The layers with parameters."""
        return [module for module in model if isinstance(module, (nn.Linear, nn.Conv2d))]

    def optimizer(self, model: nn.Sequential, **options: Any) -> LocoProp:
        """LocoProp for ``model``, with the arithmetic of the other contestants."""
        trained = self.trained(model)
        names = [name for name, module in model.named_children() if module in trained]
        if self.x.dim() == 4:
            # The others divide a convolution's local gradient by the number of examples, "mean" by that of rows (all
            # positions of all examples). "sum" divides by nothing, and RMSprop does not see a factor c of the gradient
            # if ε has it too: g / (√v + ε) = c g / (√(c² v) + c ε).
            options |= {"reduction": "sum", "rule": lk.rules.RMSprop(eps=textbook.EPS * len(self.x))}
        return LocoProp(
            model,
            lr=LR,
            activation_lr=textbook.ACTIVATION_LR,
            local_iterations=self.case.iterations,
            rows=self.case.rows,
            transfers=dict(zip(names, self.local_names, strict=True)),
            **{"rule": lk.rules.RMSprop(eps=textbook.EPS), **options},
        )

    # --- single layers

    def problems(self, dtype: torch.dtype = torch.float32) -> list[lk.LocalProblem]:
        """Fresh local problems of the layers (``scope="local"``)."""
        found = []
        for i, (weight, bias) in enumerate(self.parameters):
            x, gradient = self.inputs[i].to(dtype), textbook.ACTIVATION_LR * self.gradients[i].to(dtype)
            weight, bias = weight.to(dtype, copy=True), bias.to(dtype, copy=True)
            found.append(
                lk.LocalProblem(
                    x=x,
                    preactivation=F.linear(x, weight, bias),
                    weight=weight,
                    bias=bias,
                    grad_weight=gradient.t() @ x,
                    grad_bias=gradient.sum(0),
                    transfer=self.local_names[i],
                )
            )
        return found

    # --- the check

    @cached_property
    def exact(self) -> bool:
        """Whether :attr:`truth` is in float64."""
        return self.case.flops() <= _EXACT_CHECK_FLOPS[self.device.type]

    @cached_property
    def truth(self) -> Tensor:
        """Change of all parameters in one step, flat: by the reference in float64, or float32 where that takes long."""
        dtype = torch.float64 if self.exact else torch.float32
        if self.case.scope == "local":
            problems = self.problems(dtype)
            lk.local_steps_(problems, lr=self.rates, rows=self.case.rows, backend="reference")
            changed = [(p.weight, p.bias) for p in problems]
        else:
            model = self.model(dtype)
            optimizer = self.optimizer(model, backend="reference")
            self.loss(model(self.x.to(dtype)), self.y.to(dtype)).backward()
            optimizer.step()
            changed = [(m.weight, m.bias) for m in self.trained(model)]
        return self.change(changed)

    def change(self, parameters: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Difference of ``parameters`` to the start, flat."""
        pieces = [
            (new.detach().double() - old.double()).flatten()
            for pair, start in zip(parameters, self.parameters, strict=True)
            for new, old in zip(pair, start, strict=True)
            if new is not None
        ]
        return torch.cat(pieces)

    def error(self, parameters: list[tuple[Tensor, Tensor | None]]) -> float:
        """Relative error of a step that led to ``parameters``."""
        return float((self.change(parameters) - self.truth).norm() / self.truth.norm())

"""LocoProp as everyone writes it in PyTorch: a target per layer, two products per local step, RMSprop on the weights.

Every function works on plain tensors, in place and without autograd, so that the same code runs eagerly, under
``torch.compile`` and in a CUDA graph. The backward pass is written out, since only gradients with respect to
pre-activations are needed: this is faster than what a user would write with autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

__all__ = ["LayerState", "LocalStep", "local_step", "training_step", "transfer"]

ALPHA, MOMENTUM, EPS = 0.9, 0.999, 1e-6
ACTIVATION_LR = 10.0


def transfer(name: str, a: Tensor) -> Tensor:
    """``f(a)``."""
    if name == "tanh":
        return torch.tanh(a)
    if name == "sigmoid":
        return torch.sigmoid(a)
    if name == "squared_relu":
        return torch.relu(a).square()
    assert name == "identity", name
    return a


def _derivative(name: str, output: Tensor) -> Tensor | float:
    """``f'`` at a hidden layer, from ``f(a)``."""
    return 1 - output.square() if name == "tanh" else 1.0


class LayerState(NamedTuple):
    """Weight, bias and RMSprop's state of one layer, all changed in place; ``steps``: stride and padding.

    A named tuple, which ``torch.compile`` takes apart into its tensors.
    """

    weight: Tensor
    bias: Tensor
    weight_square: Tensor
    weight_momentum: Tensor
    bias_square: Tensor
    bias_momentum: Tensor
    steps: tuple[int, int] = (1, 0)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, steps: tuple[int, int] = (1, 0)) -> LayerState:
        weight, bias = weight.detach().clone(), bias.detach().clone()
        w, b = torch.zeros_like(weight), torch.zeros_like(bias)
        return cls(weight, bias, w, w.clone(), b, b.clone(), steps)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(value for value in self if isinstance(value, Tensor))


def _mm(left: Tensor, right: Tensor, operands: torch.dtype) -> Tensor:
    if left.dtype == operands:
        return left @ right
    return (left.to(operands) @ right.to(operands)).to(left.dtype)


def _activation(x: Tensor, weight: Tensor, bias: Tensor, operands: torch.dtype, steps: tuple[int, int]) -> Tensor:
    if weight.dim() == 4 and x.dtype == operands:
        return F.conv2d(x, weight, bias, *steps)
    if weight.dim() == 4:
        return F.conv2d(x.to(operands), weight.to(operands), None, *steps).to(x.dtype) + bias[:, None, None]
    return _mm(x, weight.t(), operands) + bias


def _gradients(
    x: Tensor, difference: Tensor, weight: Tensor, operands: torch.dtype, steps: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    if weight.dim() == 4:
        grad = conv2d_weight(x.to(operands), weight.shape, difference.to(operands), *steps).to(x.dtype)
        return grad, difference.sum((0, 2, 3))
    return _mm(difference.t(), x, operands), difference.sum(0)


def _rmsprop_(value: Tensor, grad: Tensor, square: Tensor, momentum: Tensor, lr: Tensor) -> None:
    square.mul_(ALPHA).addcmul_(grad, grad, value=1 - ALPHA)
    momentum.mul_(MOMENTUM).addcdiv_(grad, square.sqrt().add_(EPS))
    value.sub_(momentum * lr)


def local_step(x: Tensor, target: Tensor, state: LayerState, lr: Tensor, name: str, operands: torch.dtype) -> None:
    """One local iteration of one layer, in place; ``lr`` is a tensor ``[]``."""
    a = _activation(x, state.weight, state.bias, operands, state.steps)
    difference = (transfer(name, a) - target) / x.shape[0]
    grad_weight, grad_bias = _gradients(x, difference, state.weight, operands, state.steps)
    _rmsprop_(state.weight, grad_weight, state.weight_square, state.weight_momentum, lr)
    _rmsprop_(state.bias, grad_bias, state.bias_square, state.bias_momentum, lr)


LocalStep = Callable[[Tensor, Tensor, LayerState, Tensor, str, torch.dtype], None]


def training_step(
    states: list[LayerState],
    names: list[str],
    targets_of: list[str],
    x: Tensor,
    y: Tensor,
    rates: Tensor,
    operands: torch.dtype,
    step: LocalStep = local_step,
) -> None:
    """Forward, backward and all local loops of a network; BCE with logits, summed over outputs, mean over the batch.

    Args:
        states: the layers.
        names: transfer function of each layer in the network.
        targets_of: transfer function of each local problem (the identity for LocoProp-S).
        x: inputs ``[B, K]``, or ``[B, C, side, side]`` of a convolution.
        y: targets ``[B, N]``.
        rates: learning rates ``[T]``.
        operands: dtype of the local products' operands.
        step: :func:`local_step` or a compiled form of it.
    """
    inputs, preactivations, outputs = [], [], []
    for state, name in zip(states, names, strict=True):
        if state.weight.dim() == 4:
            inputs.append(x)
            preactivations.append(F.conv2d(x, state.weight, state.bias, *state.steps))
        else:
            inputs.append(x.flatten(1))
            preactivations.append(F.linear(inputs[-1], state.weight, state.bias))
        x = transfer(name, preactivations[-1])
        outputs.append(x)
    grads = [(outputs[-1] - y) / y.shape[0]]
    for i in range(len(states) - 1, 0, -1):
        weight, output = states[i].weight, outputs[i - 1]
        if weight.dim() == 4:
            back = conv2d_input(inputs[i].shape, weight, grads[0], *states[i].steps)
        else:
            back = (grads[0] @ weight).view_as(output)
        grads.insert(0, back * _derivative(names[i - 1], output))
    for state, name, h, a, grad in zip(states, targets_of, inputs, preactivations, grads, strict=True):
        target = transfer(name, a) - ACTIVATION_LR * grad
        for rate in rates:
            step(h, target, state, rate, name, operands)

"""Drop-in for the PyPI package ``locoprop`` 0.1.0: the same classes, arguments, defaults and numbers.

Layers whose module is a linear or convolutional layer with a known activation, under SGD, RMSprop, Adam or Adagrad, run
through :func:`locoprop_kernels.local_steps_`: all layers in one call where ``correction=0``, else one call per layer.
All other modules, activations and optimisers run the same iteration in plain PyTorch.

What changes numbers is kept: the local gradient is divided by the number of examples (for convolutions, not by
positions); with ``momentum`` the running average is over ``∂L/∂A`` of successive batches; the correction changes the
input of the *next module of the Sequential*, so it has no effect through a pooling layer, and acts through
``nn.Flatten`` because that is a view.

What is plainly a bug is done right:

* frozen parameters stay frozen (the package sets ``requires_grad`` on everything);
* with ``momentum``, a batch of another size restarts the running average (the package crashes);
* a layer that the loss does not depend on is left alone (the package crashes);
* activations with ``inplace=True`` give the numbers of those without;
* a step that is not finite is not applied (through :func:`locoprop_kernels.local_steps_`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from locoprop_kernels import LocalProblem, StepReport, local_steps_, rules
from locoprop_kernels.rules import Rule
from locoprop_torch.functions import transfer_of
from locoprop_torch.layouts import laid_out, layout_of, number_of_groups
from locoprop_torch.problems import RuleState, give_parameter, problem_of
from locoprop_torch.rates import default_lr_decay, local_rates

__all__ = ["LocoLayer", "LocopropTrainer"]

_DEFAULT_HPARAMS = MappingProxyType({"lr": 2e-5, "eps": 1e-6, "momentum": 0.999, "alpha": 0.9})


class LocoLayer(nn.Module):
    """A module and the activation function that follows it.

    Args:
        module: maps inputs to pre-activations; it has the trained parameters.
        activation: module or function, applied to the pre-activation.
        implicit: ``forward`` returns the pre-activation, and the activation takes part in local steps only: for output
            layers whose activation is inside the loss function.
    """

    def __init__(self, module: nn.Module, activation: Callable[[Tensor], Tensor], implicit: bool = False) -> None:
        super().__init__()
        self.module: Any = module
        self.activation = activation
        self.implicit = implicit

    def forward(self, x: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """The layer's output for the input ``x``, or for the pre-activation ``hidden``.

        Raises:
            ValueError: both are missing.
        """
        if hidden is None:
            if x is None:
                raise ValueError("LocoLayer needs an input x or a pre-activation hidden, got neither")
            hidden = self.module(x)
        return hidden if self.implicit else self.activation(hidden)


def rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    """The update rule that does what ``optimizer`` does; ``None`` where there is none (weight decay, AMSGrad, ...)."""
    try:
        return _rule_of(optimizer)
    except ValueError:
        # torch takes some hyper-parameters that the rules refuse, such as alpha=1.
        return None


def _rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    if len(optimizer.param_groups) != 1:
        return None
    group = optimizer.param_groups[0]
    unsupported = ("weight_decay", "maximize", "dampening", "amsgrad", "lr_decay", "differentiable")
    if any(group.get(name) for name in unsupported):
        return None
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return rules.SGD(group["momentum"], group["nesterov"])
    if kind is torch.optim.RMSprop:
        return rules.RMSprop(group["alpha"], group["momentum"], group["eps"], group["centered"])
    if kind is torch.optim.Adam:
        return rules.Adam(group["betas"], group["eps"])
    if kind is torch.optim.Adagrad:
        return rules.Adagrad(group["eps"], group["initial_accumulator_value"])
    return None


@dataclass(eq=False)
class _Visit:
    """A trained layer in one forward pass."""

    place: int
    layer: LocoLayer
    optimizer: torch.optim.Optimizer
    hidden: Tensor
    overwritten: bool = False
    grad: Tensor | None = None

    def keep_grad(self, grad: Tensor) -> None:
        self.grad = grad


@dataclass(eq=False)
class _Work:
    """A layer's local problem, and how its state gets back into the torch optimiser."""

    optimizer: torch.optim.Optimizer
    rule: Rule
    rates: list[float]
    parameters: dict[str, nn.Parameter]
    problem: LocalProblem
    states: dict[str, RuleState]

    def store(self) -> None:
        """Put the rule's state into the optimiser in its own format, so that its checkpoints are as ever."""
        for kind, parameter in self.parameters.items():
            stored = self.optimizer.state[parameter]
            step = stored.get("step")
            self.states[kind].write_back(self.problem.state[kind])
            stored.update(self.states[kind].slots)
            if not isinstance(self.optimizer, torch.optim.SGD):
                start = torch.zeros((), device="cpu") if step is None else step
                stored["step"] = start + len(self.rates)


class LocopropTrainer:
    """Trains a Sequential of :class:`LocoLayer` modules with LocoProp; see the module for what differs from 0.1.0.

    Args:
        model: its trainable modules must be :class:`LocoLayer`; others are called, and not trained.
        loss_fn: ``(output of the model, ys) -> scalar loss``.
        optimizer_class: any ``torch.optim`` optimiser; one is made per layer, see :attr:`opts`.
        optimizer_hparams: its arguments.
        learning_rate: step size ``γ`` of the activation targets.
        local_iterations: ``T``.
        momentum: weight of the past in a running average of ``∂L/∂A``.
        correction: bound, per feature and in units of its root, of the correction of the next module's input.
        backend: of the local steps: ``"auto"``, ``"triton"`` or ``"reference"``.
        compute_dtype: dtype of the operands of the local products; ``None`` for the parameters'.

    Attributes:
        opts: the torch optimiser of each module, ``None`` where nothing is trained.
        last_reports: the :class:`locoprop_kernels.StepReport` of every call in the last step.
    """

    def __init__(
        self,
        model: nn.Sequential,
        loss_fn: Callable[[Tensor, Any], Tensor],
        optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop,
        optimizer_hparams: Mapping[str, Any] = _DEFAULT_HPARAMS,
        learning_rate: float = 10,
        local_iterations: int = 5,
        momentum: float = 0.0,
        correction: float = 0.1,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.learning_rate = learning_rate
        self.local_iterations = local_iterations
        self.momentum = momentum
        self.correction = correction
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.last_reports: list[StepReport] = []
        self.grads: list[Tensor | None] = []
        self.opts: list[torch.optim.Optimizer | None] = []
        for layer in model:
            trainable = any(p.requires_grad and p.numel() > 0 for p in layer.parameters())
            if trainable and not isinstance(layer, LocoLayer):
                warnings.warn(f"{layer} is trainable but not a LocoLayer: it will not be updated.", stacklevel=2)
            trained = trainable and isinstance(layer, LocoLayer)
            self.opts.append(optimizer_class(layer.parameters(), **optimizer_hparams) if trained else None)

    def step(self, xs: Tensor, ys: Any) -> Tensor:
        """One forward and one backward pass, then the local iterations of every layer.

        Args:
            xs: a batch of what the model's first module takes, ``[B, ...]``: its first dimension counts the examples.
            ys: what ``loss_fn`` takes beside the output of the model, of any type and shape.

        Returns:
            The loss before the update, as ``loss_fn`` has returned it: a scalar ``[]``.
        """
        self.last_reports = []
        sequential = self.correction > 0 or self._shares_parameters()
        anew = sequential or self.momentum > 0
        inputs, visits, loss = self._forward(xs, ys, without_weights=anew)
        self._average(visits)
        visits = [visit for visit in visits if visit.grad is not None]
        if self.local_iterations < 1:
            return loss
        if not sequential:
            self._together(inputs, visits, anew)
            return loss
        for visit in visits:
            self._together(inputs, [visit], anew=True)
            if self.correction > 0 and visit.place + 1 < len(inputs):
                self._correct(visit.layer, inputs[visit.place], inputs[visit.place + 1])
        return loss

    def _shares_parameters(self) -> bool:
        ids = [id(p) for layer in self.model for p in layer.parameters()]
        return len(set(ids)) < len(ids)

    @contextmanager
    def _frozen(self, freeze: bool) -> Iterator[None]:
        """Freeze the trained layers for a backward pass whose weight gradients nobody will look at."""
        trained = [layer for layer, opt in zip(self.model, self.opts, strict=True) if opt is not None]
        parameters = {p for layer in trained for p in layer.parameters() if p.requires_grad}
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(not freeze)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _forward(self, xs: Tensor, ys: Any, without_weights: bool) -> tuple[list[Tensor], list[_Visit], Tensor]:
        inputs: list[Tensor] = []
        visits: list[_Visit] = []
        current = xs
        with self._frozen(without_weights):
            for i, (layer, opt) in enumerate(zip(self.model, self.opts, strict=True)):
                inputs.append(current.detach())
                if opt is None or not isinstance(layer, LocoLayer):
                    current = layer(current)
                    continue
                hidden = layer.module(current).requires_grad_(True)
                visit = _Visit(i, layer, opt, hidden.detach())
                hidden.register_hook(visit.keep_grad)
                version = hidden._version
                current = layer(hidden=hidden.clone() if hidden.is_leaf else hidden)
                visit.overwritten = hidden._version != version
                visits.append(visit)
            loss = self.loss_fn(current, ys)
            loss.backward()
        return inputs, visits, loss

    def _average(self, visits: list[_Visit]) -> None:
        """Replace the gradients by their running average."""
        if self.momentum <= 0:
            return
        averages: list[Tensor | None] = [None] * len(self.opts)
        for visit in visits:
            old = self.grads[visit.place] if self.grads else None
            if visit.grad is not None and old is not None and old.shape == visit.grad.shape:
                visit.grad = (1 - self.momentum) * visit.grad + self.momentum * old
            averages[visit.place] = visit.grad
        self.grads = averages

    def _together(self, inputs: list[Tensor], visits: list[_Visit], anew: bool) -> None:
        """The local iterations of independent layers; ``anew`` computes pre-activations and gradients again."""
        batches: dict[tuple[Rule, tuple[float, ...]], list[_Work]] = {}
        for visit in visits:
            x = inputs[visit.place]
            work = self._work(visit, x, anew)
            if work is None:
                self._plain(visit, x)
            else:
                batches.setdefault((work.rule, tuple(work.rates)), []).append(work)
        for (rule, rates), works in batches.items():
            problems = [work.problem for work in works]
            report = local_steps_(problems, rule=rule, lr=rates, backend=self.backend, compute_dtype=self.compute_dtype)
            self.last_reports.append(report)
            for work in works:
                work.store()

    def _work(self, visit: _Visit, x: Tensor, anew: bool) -> _Work | None:
        """The layer's local problems; ``None`` where only plain PyTorch will do."""
        layer, module, grad = visit.layer, visit.layer.module, visit.grad
        rule, layout = rule_of(visit.optimizer), layout_of(module)
        if rule is None or layout is None or module._forward_hooks or module._forward_pre_hooks:
            return None
        transfer = transfer_of(layer.activation, layout.feature_dim, visit.hidden.dim())
        parameters = {kind: p for kind, p in module.named_parameters() if p.requires_grad}
        owned = {id(p) for group in visit.optimizer.param_groups for p in group["params"]}
        if transfer is None or not parameters or not owned >= {id(p) for p in parameters.values()}:
            return None
        if not transfer.elementwise and number_of_groups(module) > 1:
            return None
        assert grad is not None
        if anew:
            with torch.enable_grad():
                a = module(x)
            vjp = torch.autograd.grad(a, list(parameters.values()), self.learning_rate * grad)
            gradients = dict(zip(parameters, vjp, strict=True))
        else:
            with torch.no_grad():
                a = module(x) if visit.overwritten else visit.hidden
            gradients = {kind: self.learning_rate * p.grad for kind, p in parameters.items() if p.grad is not None}
        rows = layout.inputs(x), layout.outputs(a.detach())
        own = {"weight": module.weight, "bias": module.bias}
        problem = problem_of(layout, own, rows, transfer, f"module {visit.place}", examples=len(x))
        states = {}
        for kind, gradient in gradients.items():
            parameter, start = parameters[kind], layout.view(kind, laid_out(gradient, parameters[kind]))
            stored = self._stored(visit.optimizer, rule, parameter)
            states[kind] = give_parameter(problem, layout, kind, parameter, start, rule, stored)
        rates = local_rates(float(visit.optimizer.param_groups[0]["lr"]), self.local_iterations)
        return _Work(visit.optimizer, rule, rates, parameters, problem, states)

    @staticmethod
    def _stored(optimizer: torch.optim.Optimizer, rule: Rule, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The rule's state in a torch optimiser."""
        slots = {*rule.slots, *(["step"] if rule.counts_steps else [])}
        return {
            slot: value.to(torch.int64) if slot == "step" else value
            for slot, value in optimizer.state[parameter].items()
            if slot in slots and value is not None
        }

    def _plain(self, visit: _Visit, x: Tensor) -> None:
        """The local iterations of one layer as 0.1.0 writes them, for any module, activation and optimiser."""
        layer, optimizer = visit.layer, visit.optimizer
        assert visit.grad is not None

        def activate(a: Tensor) -> Tensor:
            with torch.no_grad():
                return layer.activation(a.detach().clone())

        with torch.no_grad():
            target = activate(layer.module(x)) - self.learning_rate * visit.grad
        group = optimizer.param_groups[0]
        lr = group["lr"]
        try:
            for j in range(self.local_iterations):
                group["lr"] = lr * default_lr_decay(j, self.local_iterations)
                optimizer.zero_grad()
                a = layer.module(x)
                a.backward((activate(a) - target) / len(x))
                optimizer.step()
        finally:
            group["lr"] = lr

    @torch.no_grad()
    def _correct(self, layer: LocoLayer, x: Tensor, following: Tensor) -> None:
        """Move the next module's input towards the updated layer's output, by a bounded amount; in place."""
        delta = layer(x) - following
        norm = delta.norm() + 1e-5
        following += norm.clamp(max=self.correction * delta.size(1) ** 0.5) * delta / norm

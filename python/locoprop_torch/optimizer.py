"""LocoProp as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from locoprop_kernels import LocalProblem, StepReport, rules, transfers
from locoprop_kernels.problem import COMPUTE_DTYPES, REDUCTIONS
from locoprop_kernels.regularisers import Regulariser, as_regulariser
from locoprop_kernels.steps import BACKENDS, pending_steps, triton_unavailable
from locoprop_kernels.transfers import Transfer
from locoprop_torch.capture import ActivationHook, Layer
from locoprop_torch.discovery import find_transfers
from locoprop_torch.layouts import join_state, number_of_groups, split_state, supported_modules, tied_layers
from locoprop_torch.targets import TARGETS, Target, starting_gradients

__all__ = ["LocoProp", "default_lr_decay"]

LOCAL_LOSSES = ("matching", "squared")


def default_lr_decay(t: int, iterations: int) -> float:
    """``max(1 - t/T, 0.25)``: the decay of the paper's experiments over the local iterations ``t = 0 .. T-1``."""
    return max(1 - t / iterations, 0.25)


def _check_number(name: str, value: Any, *, zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'>= 0' if zero else '> 0'}, got {value!r}")


def _check_hyperparameters(group: Mapping[str, Any], *, warm_up: bool) -> None:
    lr = float(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"]
    _check_number("lr", lr, zero=warm_up)
    _check_number("activation_lr", group["activation_lr"], zero=False)
    _check_number("prox", group["prox"], zero=True)
    _check_number("weight_decay", group["weight_decay"], zero=True)
    iterations = group["local_iterations"]
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"local_iterations must be an integer, got {iterations!r}")
    if iterations < 1:
        raise ValueError(f"local_iterations must be >= 1, got {iterations!r}")


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


class _SkipCounter:
    """Counts steps that were not committed, on their device, and warns about the first."""

    def __init__(self, total: int = 0) -> None:
        self._total = torch.tensor(total)
        self._seen = torch.tensor(total)
        self._start = total
        self._warned = False

    @property
    def total(self) -> int:
        return int(self._total)

    def count(self, finite: Tensor) -> None:
        if self._total.device != finite.device:
            self._total = self._total.to(finite.device)
            self._seen = torch.zeros_like(self._total, device="cpu", pin_memory=finite.is_cuda)
        self._total += ~finite
        # The host does not wait for a device, so there the warning may come a step late; the total is exact.
        self._seen.copy_(self._total, non_blocking=True)
        if not self._warned and int(self._seen) > self._start:
            self._warned = True
            warnings.warn(
                "LocoProp skipped a step: the loss, a gradient or a local loop was not finite. Weights and state are "
                "as before; further cases are only counted, in skipped_steps.",
                RuntimeWarning,
                stacklevel=5,
            )


class LocoProp(Optimizer):
    """LocoProp (Amid, Anil, Warmuth, AISTATS 2022): every layer solves a small convex problem of its own.

    After ``loss.backward()``, ``step()`` runs ``local_iterations`` steps of ``rule`` on each captured layer's local
    objective: the matching loss between its activation and the target ``f(A0) - activation_lr * ∂L/∂A0``, plus
    ``prox/2 ‖W - W_0‖²``. With ``local_iterations=1`` it is the rule itself on ``activation_lr * gradient``.

    A step is a transaction: if it raises, or if the loss, a gradient or a result is not finite, weights and state stay
    as they were. In the second case ``step`` warns once and counts it in :attr:`skipped_steps`.

    Args:
        model: its ``nn.Linear``, ``nn.Conv1d/2d/3d`` and :class:`GroupedLinear` layers are captured by forward hooks,
            and trained unless ``aux`` has their parameters. A convolution's examples are the positions of its output.
        lr: learning rate of the local rule, ``> 0`` (``param_groups[..]["lr"]``; a scheduler may set it to 0).
        activation_lr: ``γ``, step size of the activation targets, ``> 0``.
        local_iterations: ``T >= 1``.
        rule: ``"sgd"``, ``"momentum"``, ``"nesterov"``, ``"rmsprop"``, ``"adam"``, ``"adagrad"``, or an instance from
            :mod:`locoprop_kernels.rules`.
        local_loss: ``"matching"`` (LocoProp-M) or ``"squared"`` (LocoProp-S: every transfer counts as the identity).
        transfers: transfer functions by submodule name, overriding what is found in the model.
        prox: proximal coefficient ``λ >= 0``.
        reduction: ``"mean"`` or ``"sum"`` of the local loss over the rows (examples, tokens) of a layer's input.
        lr_decay: ``(t, T) -> factor`` of the learning rate; ``None`` for :func:`default_lr_decay`.
        aux: optimiser for the parameters that no captured layer owns. It steps and zeroes along with this one, and is
            part of its ``state_dict``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.
        compute_dtype: dtype of the operands of the local products; ``None`` for the parameters'.
        target: ``"dual"``, ``"primal"`` or a function, see :mod:`locoprop_torch.targets`; or one by submodule name.
        regulariser: a further regulariser, see :class:`locoprop_kernels.Regulariser`.
        weight_decay: decoupled weight decay ``>= 0``, as AdamW's: ``W`` is multiplied by ``1 - lr * weight_decay``.
        param_groups: groups with hyper-parameters of their own, as in torch: ``{"params": model.fc1.parameters(),
            "activation_lr": 1.0}``; ``lr``, ``activation_lr``, ``local_iterations``, ``prox``, ``rule``,
            ``transfer`` (over what ``transfers`` says) and ``weight_decay`` may be set. All parameters of a layer go
            into one group; those of no group form the first.
        trace: also evaluate every layer's local objective, into ``last_reports``; costs one more product a step.

    Attributes:
        last_reports: the :class:`locoprop_kernels.StepReport` of each parameter group at the last step.

    Raises:
        TypeError, ValueError: an argument is out of range, the model has no supported layer, or trainable parameters
            are in neither a captured layer nor ``aux``; the message names them.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-5,
        activation_lr: float = 10.0,
        local_iterations: int = 10,
        rule: str | rules.Rule = "rmsprop",
        local_loss: str = "matching",
        transfers: Mapping[str, str | Transfer] | None = None,
        prox: float = 0.0,
        reduction: str = "mean",
        lr_decay: Callable[[int, int], float] | None = None,
        aux: Optimizer | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        target: Target | Mapping[str, Target] = "dual",
        regulariser: Regulariser | Callable[[Tensor, Tensor], Tensor] | None = None,
        weight_decay: float = 0.0,
        param_groups: Iterable[dict[str, Any]] = (),
        trace: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if aux is not None and not isinstance(aux, Optimizer):
            raise TypeError(f"aux must be a torch.optim.Optimizer or None, got {type(aux).__name__}")
        _check_choice("local_loss", local_loss, LOCAL_LOSSES)
        _check_choice("reduction", reduction, REDUCTIONS)
        _check_choice("backend", backend, BACKENDS)
        _check_choice("compute_dtype", compute_dtype, (None, *COMPUTE_DTYPES))
        if lr_decay is not None and not callable(lr_decay):
            raise TypeError(f"lr_decay must be callable or None, got {type(lr_decay).__name__}")
        if backend == "triton" and (reason := triton_unavailable()):
            raise ValueError(f"backend 'triton' cannot run: {reason}; backend='reference' would work")
        defaults = {
            "lr": lr,
            "activation_lr": activation_lr,
            "local_iterations": local_iterations,
            "prox": prox,
            "rule": rules.get(rule),
            "weight_decay": weight_decay,
            "transfer": None,
        }
        _check_hyperparameters(defaults, warm_up=False)
        for choice in target.values() if isinstance(target, Mapping) else [target]:
            if not callable(choice):
                _check_choice("target", choice, TARGETS)
        if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "model must not contain DistributedDataParallel: local problems of several processes differ"
            )

        self.model = model
        self.local_loss = local_loss
        self.reduction = reduction
        self.lr_decay = lr_decay or default_lr_decay
        self.aux = aux
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.target = target
        self.regulariser = as_regulariser(regulariser)
        self.trace = trace
        self.last_reports: list[StepReport] = []
        self._skipped = _SkipCounter()
        self._transfers = dict(transfers or {})
        self._targets = dict(target) if isinstance(target, Mapping) else {}
        self._activation_handles: list[RemovableHandle] = []
        self._layers: dict[str, Layer] = {}
        self._attach()
        owned = {id(p): p for layer in self._layers.values() for p in layer.parameters.values()}
        self._check_coverage(owned)
        for layer in self._layers.values():
            self._transfer(layer, defaults)
        groups = [{**group, "params": _as_list(group["params"])} for group in param_groups]
        grouped = {id(p) for group in groups for p in group["params"]}
        rest = [p for key, p in owned.items() if key not in grouped]
        super().__init__([*([{"params": rest}] if rest else []), *groups], defaults)

    # --- layers and parameter groups

    def _attach(self) -> None:
        """Capture the supported layers of the model that are not captured yet and that ``aux`` leaves to us."""
        modules = {
            name: module for name, module in supported_modules(self.model).items() if not self._in_aux(name, module)
        }
        if not modules:
            raise ValueError(
                "model must have at least one supported layer (nn.Linear, nn.Conv1d/2d/3d, GroupedLinear) "
                f"whose parameters are not in aux; got {type(self.model).__name__} without one"
            )
        for argument, given in (("transfers", self._transfers), ("target", self._targets)):
            unknown = set(given) - set(modules)
            if unknown:
                raise ValueError(f"{argument} must name captured layers ({', '.join(modules)}); got {sorted(unknown)}")
        found = find_transfers(self.model, modules.values())
        chosen = {name: transfers.get(self._transfers.get(name, found[modules[name]])) for name in modules}
        for tied in tied_layers(modules):
            name = next(iter(tied))
            if name in self._layers:
                continue
            functions = {chosen[other] for other in tied}
            if len(functions) > 1:
                raise ValueError(
                    f"layers {', '.join(tied)} share their weight, so one transfer function must follow all of them, "
                    f"got {', '.join(sorted(map(str, functions)))}: set it for each of them in transfers"
                )
            transfer = functions.pop()
            self._layers[name] = Layer(tied, transfer, keep_gradients=self._target(name) != "dual")
        self._watch_activations()

    def _aux_ids(self) -> set[int]:
        return {id(p) for group in self.aux.param_groups for p in group["params"]} if self.aux is not None else set()

    def _in_aux(self, name: str, module: nn.Module) -> bool:
        aux_ids = self._aux_ids()
        inside = [id(p) in aux_ids for p in module.parameters(recurse=False)]
        if any(inside) and not all(inside):
            raise ValueError(f"aux must have all parameters of layer {name!r} or none, got only some")
        return any(inside)

    def _target(self, name: str) -> Target:
        return self._targets.get(name, "dual") if isinstance(self.target, Mapping) else self.target

    def _watch_activations(self) -> None:
        """For primal targets: hooks on the modules that the layers' outputs may go through next."""
        layers = [layer for name, layer in self._layers.items() if self._target(name) == "primal"]
        for handle in self._activation_handles:
            handle.remove()
        self._activation_handles = [
            module.register_forward_hook(ActivationHook(layers))
            for module in self.model.modules()
            if layers and not list(module.children()) and not list(module.parameters())
        ]

    def _check_coverage(self, owned: Mapping[int, Tensor]) -> None:
        covered = set(owned) | self._aux_ids()
        left = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in covered]
        if left:
            attention = any(isinstance(module, nn.MultiheadAttention) for module in self.model.modules())
            raise ValueError(
                "no captured layer owns these trainable parameters; give them to an optimiser and pass it as aux, "
                f"or freeze them: {', '.join(left)}"
                + ("; expose_projections(model) makes those of nn.MultiheadAttention layers" if attention else "")
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add layers that were put into the model later, all parameters of a layer in one group.

        Raises:
            ValueError: a parameter belongs to no supported layer of the model, or a layer's parameters are split.
        """
        params = param_group["params"]
        param_group["params"] = params = _as_list(params)
        ids = {id(p) for p in params}
        owned = {id(p) for layer in self._layers.values() for p in layer.parameters.values()}
        if not ids <= owned:
            self._attach()
            owned = {id(p) for layer in self._layers.values() for p in layer.parameters.values()}
        for p in params:
            if id(p) not in owned:
                shape = list(p.shape) if isinstance(p, Tensor) else p
                raise ValueError(
                    f"params must belong to supported layers of the model, got one of shape {shape} that does not"
                )
        for name, layer in self._layers.items():
            inside = [id(p) in ids for p in layer.parameters.values()]
            if any(inside) and not all(inside):
                raise ValueError(f"params must have all parameters of layer {name!r} or none, got only some")
        group = {**self.defaults, **param_group}
        param_group["rule"] = rules.get(group["rule"])
        if group["transfer"] is not None:
            param_group["transfer"] = transfers.get(group["transfer"])
        _check_hyperparameters(group, warm_up=False)
        super().add_param_group(param_group)

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the local iterations of all layers and step ``aux``.

        Args:
            closure: re-evaluates the model, calls ``backward`` and returns the loss; optional.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            ValueError: there is no captured forward and backward pass, or what was captured does not fit the parameters
                any more (changed shapes, replaced layers, inputs overwritten in place, mixed dtypes or devices, sparse
                gradients, empty batches). Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._problems()
        rates = [self._rates(group) for group, _ in work]
        self.last_reports = [
            pending_steps(
                [problem for problems in layers.values() for problem in problems],
                rule=group["rule"],
                lr=rate,
                prox=group["prox"],
                reduction=self.reduction,
                backend=self.backend,
                compute_dtype=self.compute_dtype,
                trace=self.trace,
                regulariser=self.regulariser,
                increments=False,
            )
            for (group, layers), rate in zip(work, rates, strict=True)
        ]
        finite = self._finite(loss)
        if self.aux is not None and finite:  # the host decides here: with aux, a step waits for the device
            self.aux.step()
        for (group, layers), report in zip(work, self.last_reports, strict=True):
            self._decay(group, layers, finite)
            report.commit_(finite)
            for layer, problems in layers.items():
                self._keep_state(layer, problems)
        self._forget()
        self._skipped.count(finite)
        return loss

    def _rates(self, group: dict[str, Any]) -> list[float]:
        _check_hyperparameters(group, warm_up=True)  # schedulers and users may have set them
        iterations = group["local_iterations"]
        return [float(group["lr"]) * self.lr_decay(t, iterations) for t in range(iterations)]

    def _decay(self, group: dict[str, Any], layers: Iterable[Layer], finite: Tensor) -> None:
        """Decoupled weight decay, as AdamW's: once a step, before the increment is added."""
        factor = 1 - float(group["lr"]) * group["weight_decay"]
        if factor == 1:
            return
        kept = torch.where(finite, torch.full((), factor, dtype=torch.float64, device=finite.device), 1.0)
        for layer in layers:
            for parameter in layer.trained.values():
                parameter.mul_(kept)

    def _keep_state(self, layer: Layer, problems: list[LocalProblem]) -> None:
        for kind, parameter in layer.trained.items():
            states = [problem.state[kind] for problem in problems if problem.state.get(kind)]
            if states:
                stored = self.state.get(parameter, {})
                self.state[parameter] = join_state(layer.layout.split(kind), parameter, stored, states)

    def _problems(self) -> list[tuple[dict[str, Any], dict[Layer, list[LocalProblem]]]]:
        """The local problems of the layers of every parameter group that has some."""
        groups = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        work: list[dict[Layer, list[LocalProblem]]] = [{} for _ in self.param_groups]
        for name, layer in self._layers.items():
            group = groups.get(id(layer.weight))
            self._check_unchanged(layer)
            trained = layer.trained
            if group is None or not trained:
                continue
            for kind, parameter in trained.items():
                assert parameter.grad is not None
                if parameter.grad.layout != torch.strided:
                    raise ValueError(
                        f"layer {name!r}: the gradient of its {kind} must be dense, got {parameter.grad.layout}"
                    )
            if not layer.passes:
                if not any(p.grad.any() for p in trained.values() if p.grad is not None):
                    continue  # zeroed in place and not reached by this backward pass
                raise ValueError(
                    f"layer {name!r} has a gradient but no captured forward pass: build the optimiser before the "
                    "forward pass, call the layer as a module, and do not call step() twice for one backward pass"
                )
            work[group][layer] = self._layer_problems(layer, self.param_groups[group])
        if not any(work):
            raise ValueError(
                "step() needs a forward and a backward pass through at least one captured layer since the last one"
            )
        return [(group, problems) for group, problems in zip(self.param_groups, work, strict=True) if problems]

    def _layer_problems(self, layer: Layer, hyperparameters: dict[str, Any]) -> list[LocalProblem]:
        """One local problem per group of the layer."""
        transfer = self._transfer(layer, hyperparameters)
        activation_lr = hyperparameters["activation_lr"]
        layout = layer.layout
        rows = layer.rows()
        weights = layout.weights(layer.weight)
        biases = [None] * len(weights) if layer.bias is None else layout.biases(layer.bias)
        problems = [
            LocalProblem(x, a, weight, bias, transfer=transfer, name=f"layer {layer.name!r}")
            for (x, a), weight, bias in zip(rows, weights, biases, strict=True)
        ]
        gradients = starting_gradients(layer, self._target(layer.name), transfer, [x for x, _ in rows], activation_lr)
        for kind, parts in gradients.items():
            parameter = layer.parameters[kind]
            states = split_state(layout.split(kind), parameter, self.state.get(parameter, {}))
            for problem, part, state in zip(problems, parts, states, strict=True):
                setattr(problem, f"grad_{kind}", part)
                if state:
                    problem.state[kind] = state
        return problems

    def _transfer(self, layer: Layer, hyperparameters: dict[str, Any]) -> Transfer:
        if self.local_loss == "squared":
            return transfers.get("identity")
        transfer = transfers.get(hyperparameters["transfer"] or layer.transfer)
        if not transfer.elementwise and number_of_groups(layer.modules[layer.name]) > 1:
            raise ValueError(
                f"layer {layer.name!r} has groups, so its transfer function must be elementwise, got {transfer}"
            )
        return transfer

    def _check_unchanged(self, layer: Layer) -> None:
        for name, captured in layer.modules.items():
            try:
                module = self.model.get_submodule(name)
            except AttributeError:
                module = None
            if module is not captured:
                raise ValueError(
                    f"layer {name!r} is no longer the module that the optimiser was built with: build a new optimiser"
                )
            for kind in ("weight", "bias"):
                if getattr(module, kind) is not getattr(layer, kind):
                    raise ValueError(
                        f"the {kind} of layer {name!r} is no longer the parameter that the optimiser was built with: "
                        "build a new optimiser"
                    )

    def _finite(self, loss: Any) -> Tensor:
        """Whether the whole step may be committed: a bool tensor on the parameters' device."""
        flags = [report.finite for report in self.last_reports]
        device = flags[0].device
        if isinstance(loss, (Tensor, float)):
            flags.append(torch.isfinite(torch.as_tensor(loss)).all())
        if self.aux is not None:
            grads = [p.grad for group in self.aux.param_groups for p in group["params"] if p.grad is not None]
            flags.extend(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all() for g in grads)
        return torch.stack([flag.to(device) for flag in flags]).all()

    @property
    def skipped_steps(self) -> int:
        """How many steps were not committed because something was not finite (waits for the device)."""
        return self._skipped.total

    def _forget(self) -> None:
        for layer in self._layers.values():
            layer.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those of ``aux`` too, and forget captured activations."""
        super().zero_grad(set_to_none)
        if self.aux is not None:
            self.aux.zero_grad(set_to_none)
        self._forget()

    # --- saving, loading, copying

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the rules as text, and ``aux``'s under ``"aux"``."""
        state = super().state_dict()
        state["param_groups"] = [
            {**group, "rule": repr(group["rule"]), "transfer": str(group["transfer"])}
            for group in state["param_groups"]
        ]
        state["skipped_steps"] = self.skipped_steps
        state["aux"] = None if self.aux is None else self.aux.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly from :meth:`state_dict`: hyper-parameters of the groups, state and ``aux``.

        Raises:
            ValueError: it is of an optimiser with other groups, other rules, or with ``aux`` where there is none.
        """
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):
            for saved, group in zip(groups, self.param_groups, strict=True):
                if saved.get("rule") != repr(group["rule"]):
                    raise ValueError(
                        f"state_dict must be of an optimiser with rule {group['rule']!r}, got {saved.get('rule')}"
                    )
        if (state_dict.get("aux") is None) != (self.aux is None):
            raise ValueError(f"state_dict must be of an optimiser {'without' if self.aux is None else 'with'} aux")
        kept = [{key: group[key] for key in ("rule", "transfer")} for group in self.param_groups]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        for group, own in zip(self.param_groups, kept, strict=True):
            group.update(own)
        # torch casts state to the parameters' dtype; ours stays in the dtype it was saved in, and is not shared.
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved_ids = [i for group in groups for i in group["params"]]
        self.state.clear()
        for parameter, i in zip(parameters, saved_ids, strict=True):
            if i in state_dict["state"]:
                slots = state_dict["state"][i].items()
                self.state[parameter] = {slot: value.detach().clone().to(parameter.device) for slot, value in slots}
        if self.aux is not None:
            self.aux.load_state_dict(state_dict["aux"])
        self._skipped = _SkipCounter(state_dict.get("skipped_steps", 0))
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "last_reports": [], "_activation_handles": []}
        state["_layers"] = [(list(layer.modules), layer.transfer) for layer in self._layers.values()]
        # torch's own __init__ and __setstate__ put these back
        return {
            k: v for k, v in state.items() if not k.endswith("_hooks") and k not in ("_zero_grad_profile_name", "step")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layers" in state:  # absent when torch's load_state_dict calls this
            self._layers = {}
            for names, transfer in state["_layers"]:
                modules = {name: self.model.get_submodule(name) for name in names}
                self._layers[names[0]] = Layer(modules, transfer, keep_gradients=self._target(names[0]) != "dual")
            self._watch_activations()

    def __repr__(self) -> str:
        width = max(map(len, self._layers))
        groups_of = {id(p): group for group in self.param_groups for p in group["params"]}
        lines = [super().__repr__(), f"local loss: {self.local_loss}; layers:"]
        for name, layer in self._layers.items():
            weights = layer.layout.weights(layer.weight)
            n, k = weights[0].shape
            count = f"{len(weights)} x " if len(weights) > 1 else ""
            transfer = self._transfer(layer, groups_of.get(id(layer.weight), self.defaults))
            tied = f"  (also {', '.join(list(layer.modules)[1:])})" if len(layer.modules) > 1 else ""
            lines.append(f"  {name:<{width}}  {count}{k} -> {n}  {transfer}{tied}")
        if self.aux is not None:
            lines.append(f"aux: {type(self.aux).__name__}")
        return "\n".join(lines)

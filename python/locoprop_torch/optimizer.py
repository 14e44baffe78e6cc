"""LocoProp as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locoprop_kernels import StepReport, rules, transfers
from locoprop_kernels.problem import COMPUTE_DTYPES, REDUCTIONS, shown
from locoprop_kernels.regularisers import Regulariser, as_regulariser
from locoprop_kernels.reports import nothing_done
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Decision
from locoprop_kernels.steps import BACKENDS, solve, triton_unavailable
from locoprop_kernels.transfers import Transfer
from locoprop_torch import checkpoints
from locoprop_torch.capture import ActivationHook, CapturedLayer
from locoprop_torch.checks import (
    as_list,
    check_choice,
    check_one_process,
    checked_hyperparameters,
    clean_name,
    is_compiled,
    is_named,
)
from locoprop_torch.discovery import find_transfers
from locoprop_torch.hooks import AttachedHook, attach
from locoprop_torch.layouts import number_of_groups, supported_modules, tied_layers
from locoprop_torch.masks import trained_parameters
from locoprop_torch.problems import LayerWork, layer_work
from locoprop_torch.targets import TARGETS, Target

__all__ = ["LocoProp", "default_lr_decay"]

LOCAL_LOSSES = ("matching", "squared")
_AUX: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {"adamw": torch.optim.AdamW}
# What the groups of a layer's weight and bias must agree in.
_SHARED = ("activation_lr", "local_iterations", "prox", "rule", "transfer")
_log = logging.getLogger("locoprop_torch")


def default_lr_decay(t: int, iterations: int) -> float:
    """``max(1 - t/T, 0.25)``: the decay of the paper's experiments over the local iterations ``t = 0 .. T-1``."""
    return max(1 - t / iterations, 0.25)


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


@dataclass(eq=False)
class _Call:
    """The layers of one call of the backend."""

    group: dict[str, Any]
    rates: list[float]
    with_rows: bool
    work: list[LayerWork] = field(default_factory=list)


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
        lr: learning rate of the local rule, ``>= 0`` (``param_groups[..]["lr"]``, for torch's schedulers).
        activation_lr: ``γ``, step size of the activation targets, ``> 0``.
        local_iterations: ``T >= 1``.
        rule: ``"sgd"``, ``"momentum"``, ``"nesterov"``, ``"rmsprop"``, ``"adam"``, ``"adagrad"``, or an instance from
            :mod:`locoprop_kernels.rules`.
        local_loss: ``"matching"`` (LocoProp-M) or ``"squared"`` (LocoProp-S: every transfer counts as the identity).
        transfers: transfer functions by submodule name, overriding what is found in the model.
        prox: proximal coefficient ``λ >= 0``.
        reduction: ``"mean"`` or ``"sum"`` of the local loss over the rows (examples, tokens) of a layer's input.
        lr_decay: ``(t, T) -> factor`` of the learning rate; ``None`` for :func:`default_lr_decay`.
        aux: for the parameters that no captured layer owns: an optimiser of the user's, ``"adamw"`` for
            ``torch.optim.AdamW`` with its defaults, or a function of those parameters that makes one. It steps along
            with this one. Its groups are among ``param_groups``, marked ``"aux": True``, and its state is in
            ``state_dict``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.
        compute_dtype: dtype of the operands of the local products; ``None`` for the parameters'.
        target: ``"dual"``, ``"primal"`` or a function, see :mod:`locoprop_torch.targets`; or one by submodule name.
        regulariser: a further regulariser, see :class:`locoprop_kernels.Regulariser`.
        weight_decay: decoupled weight decay ``>= 0``, as AdamW's: ``W`` is multiplied by ``1 - lr * weight_decay``.
        param_groups: groups with hyper-parameters of their own, as in torch: ``{"params": model.fc1.parameters(),
            "activation_lr": 1.0}``; ``lr``, ``activation_lr``, ``local_iterations``, ``prox``, ``rule``,
            ``transfer`` (over what ``transfers`` says) and ``weight_decay`` may be set. Weight and bias of a layer may
            be in two groups, which then differ in ``lr`` and ``weight_decay`` alone; those of no group form the first.
        masks: masks by parameter name, of the parameter's shape: where a mask is zero, the local steps leave the
            parameter as it is. The tensors are looked at anew in every step. Those of ``torch.nn.utils.prune`` and of
            parametrizations that multiply by zeros and ones are found without being named.
        trace: also evaluate every layer's local objective, into ``last_reports``; costs one more product a step.

    Attributes:
        last_reports: what the last step did: a :class:`locoprop_kernels.StepReport` for each parameter group, one more
            for layers with a gradient but no rows (``driver`` is ``"rule"``: the rule's own step on ``γ · grad``) and
            one for layers without a gradient (``"none"``). ``report.problems`` has an entry for each layer, by
            ``name``.

    Raises:
        TypeError, ValueError: an argument is out of range, the model has no supported layer, or trainable parameters
            are in neither a captured layer nor ``aux``; the message names them.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 2e-5,
        activation_lr: float = 10.0,
        local_iterations: int = 10,
        rule: str | rules.Rule = "rmsprop",
        local_loss: str = "matching",
        transfers: Mapping[str, str | Transfer] | None = None,
        prox: float = 0.0,
        reduction: str = "mean",
        lr_decay: Callable[[int, int], float] | None = None,
        aux: Optimizer | str | Callable[[list[nn.Parameter]], Optimizer] | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        target: Target | Mapping[str, Target] = "dual",
        regulariser: Regulariser | Callable[[Tensor, Tensor], Tensor] | None = None,
        weight_decay: float = 0.0,
        param_groups: Iterable[dict[str, Any]] = (),
        masks: Mapping[str, Tensor] | None = None,
        trace: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(aux, str):
            check_choice("aux", aux, tuple(_AUX))
        elif not (aux is None or isinstance(aux, Optimizer) or callable(aux)):
            raise TypeError(
                f"aux must be a torch.optim.Optimizer, 'adamw', a function of parameters or None, got {shown(aux)}"
            )
        check_choice("local_loss", local_loss, LOCAL_LOSSES)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, BACKENDS)
        check_choice("compute_dtype", compute_dtype, (None, *COMPUTE_DTYPES))
        if lr_decay is not None and not callable(lr_decay):
            raise TypeError(f"lr_decay must be callable or None, got {shown(lr_decay)}")
        if backend == "triton" and (reason := triton_unavailable()):
            raise ValueError(f"backend 'triton' cannot run: {reason}; backend='reference' would work")
        defaults: dict[str, Any] = {
            "lr": lr,
            "activation_lr": activation_lr,
            "local_iterations": local_iterations,
            "prox": prox,
            "rule": rules.get(rule),
            "weight_decay": weight_decay,
            "transfer": None,
        }
        defaults.update(checked_hyperparameters(defaults))
        for choice in target.values() if isinstance(target, Mapping) else [target]:
            if not callable(choice):
                check_choice("target", choice, TARGETS)
        check_one_process(model)

        self.model = model
        self.local_loss = local_loss
        self.reduction = reduction
        self.lr_decay = lr_decay or default_lr_decay
        self.aux: Optimizer | None = aux if isinstance(aux, Optimizer) else None
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.target = target
        self.regulariser = as_regulariser(regulariser)
        self.trace = trace
        self.last_reports: list[StepReport] = []
        self._skipped = _SkipCounter()
        self._transfers = {clean_name(name): transfer for name, transfer in (transfers or {}).items()}
        self._targets = {clean_name(name): t for name, t in target.items()} if isinstance(target, Mapping) else {}
        self._masks = self._checked_masks(masks or {})
        self._told: set[str] = set()  # layers whose gradients without rows were logged
        self._activation_handles: list[AttachedHook] = []
        self._layers: dict[str, CapturedLayer] = {}
        self._complete = False
        try:
            self._attach()
            owned = self._owned()
            if aux is not None and self.aux is None:
                self.aux = self._made_aux(aux, owned)
            self._check_coverage(owned)
            for layer in self._layers.values():
                self._transfer(layer, defaults)
            super().__init__(self._groups(owned, param_groups), defaults)
            self._complete = True
            self._link_aux()
        except BaseException:
            self._detach()
            raise

    def _groups(self, owned: Mapping[int, nn.Parameter], given: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parameter groups as torch wants them: the user's, before them one with what is in none of those."""
        groups = [{**group, "params": as_list(group["params"])} for group in given]
        named = any(is_named(group["params"]) for group in groups)
        grouped = {id(p[1] if isinstance(p, tuple) else p) for group in groups for p in group["params"]}
        rest = [p for key, p in owned.items() if key not in grouped]
        groups = [*([{"params": rest}] if rest else []), *groups]
        if named:  # all of them, or torch refuses
            names = {id(p): clean_name(name) for name, p in self.model.named_parameters()}
            for group in groups:
                group["params"] = [p if isinstance(p, tuple) else (names.get(id(p), ""), p) for p in group["params"]]
        return groups

    # --- layers and parameter groups

    def _attach(self) -> None:
        """Capture the supported layers of the model that are not captured yet and that ``aux`` leaves to us."""
        paths = {
            clean_name(path): path
            for path, module in supported_modules(self.model).items()
            if not self._in_aux(path, module)
        }
        modules: dict[str, Any] = {name: self.model.get_submodule(path) for name, path in paths.items()}
        if not modules:
            raise ValueError(
                "model must have at least one supported layer (nn.Linear, nn.Conv1d/2d/3d, GroupedLinear) "
                f"whose parameters are not in aux; got {type(self.model).__name__} without one"
            )
        for argument, given in (("transfers", self._transfers), ("target", self._targets)):
            unknown = set(given) - set(modules)
            if unknown:
                raise ValueError(f"{argument} must name captured layers ({', '.join(modules)}); got {sorted(unknown)}")
        unnamed = {name: module for name, module in modules.items() if name not in self._transfers}
        found = find_transfers(self.model, unnamed) if self.local_loss == "matching" else {}
        chosen = {name: transfers.get(transfer) for name, transfer in self._transfers.items()}
        chosen.update({name: found[name].transfer if name in found else transfers.get("identity") for name in unnamed})
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
            reasons = [found[other].reason for other in tied if other in found and found[other].reason]
            self._layers[name] = CapturedLayer(
                tied, paths, functions.pop(), self._target(name) != "dual", reasons[0] if reasons else None
            )
        self._watch_activations()

    def _detach(self) -> None:
        """Take all hooks off the model."""
        for layer in self._layers.values():
            layer.detach()
        for handle in self._activation_handles:
            handle.remove()

    def _made_aux(self, aux: Any, owned: Mapping[int, Tensor]) -> Optimizer | None:
        """The optimiser of the parameters that no captured layer owns; ``None`` if there are none."""
        left = [p for p in self.model.parameters() if id(p) not in owned]
        if not left:
            return None
        made = (_AUX[aux] if isinstance(aux, str) else aux)(left)
        if not isinstance(made, Optimizer):
            raise TypeError(f"aux must return a torch.optim.Optimizer, got {shown(made)}")
        if any(id(p) in owned for group in made.param_groups for p in group["params"]):
            raise ValueError("aux must return an optimiser of the parameters that it was given, got one with others")
        return made

    def _aux_ids(self) -> set[int]:
        return {id(p) for group in self.aux.param_groups for p in group["params"]} if self.aux is not None else set()

    def _in_aux(self, name: str, module: nn.Module) -> bool:
        aux_ids = self._aux_ids()
        inside = [id(found.parameter) in aux_ids for found in (trained_parameters(module) or {}).values()]
        if any(inside) and not all(inside):
            raise ValueError(f"aux must have all parameters of layer {name!r} or none, got only some")
        return any(inside)

    @property
    def _own_groups(self) -> list[dict[str, Any]]:
        """The parameter groups that are not those of ``aux``."""
        return [group for group in self.param_groups if not group.get("aux")]

    def _link_aux(self) -> None:
        """Show the groups of ``aux`` among ours: the same dictionaries, so that each sees what is set in the other."""
        if self.aux is None:
            return
        groups = [*self._own_groups, *self.aux.param_groups]
        if [id(group) for group in groups] != [id(group) for group in self.param_groups]:
            for group in self.aux.param_groups:
                group["aux"] = True
            self.param_groups[:] = groups

    def _target(self, name: str) -> Target:
        return self._targets.get(name, "dual") if isinstance(self.target, Mapping) else self.target

    def _watch_activations(self) -> None:
        """For primal targets: hooks on the modules that the layers' outputs may go through next."""
        layers = [layer for name, layer in self._layers.items() if self._target(name) == "primal"]
        for handle in self._activation_handles:
            handle.remove()
        self._activation_handles = [
            attach(module, ActivationHook(layers))
            for module in self.model.modules()
            # What comes out of a LogSoftmax is not the softmax that the layer's transfer function is.
            if layers and not list(module.children()) and not list(module.parameters())
            if not isinstance(module, nn.LogSoftmax)
        ]

    def _check_coverage(self, owned: Mapping[int, Tensor]) -> None:
        covered = set(owned) | self._aux_ids()
        left = [
            clean_name(name) for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in covered
        ]
        if left:
            attention = any(isinstance(module, nn.MultiheadAttention) for module in self.model.modules())
            raise ValueError(
                "no captured layer owns these trainable parameters; give them to an optimiser and pass it as aux "
                f"(aux='adamw' makes one), or freeze them: {', '.join(left)}"
                + ("; expose_projections(model) makes those of nn.MultiheadAttention layers" if attention else "")
            )

    def _checked_masks(self, masks: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The user's masks by ``id`` of the parameter."""
        parameters = {clean_name(name): p for name, p in self.model.named_parameters(remove_duplicate=False)}
        checked = {}
        for name, mask in masks.items():
            parameter = parameters.get(clean_name(name))
            if parameter is None:
                raise ValueError(f"masks must name parameters of the model ({', '.join(parameters)}); got {name!r}")
            if not isinstance(mask, Tensor):
                raise TypeError(f"mask of {name!r} must be a torch.Tensor, got {type(mask).__name__}")
            if mask.shape != parameter.shape:
                raise ValueError(f"mask of {name!r} must have shape {list(parameter.shape)}, got {list(mask.shape)}")
            checked[id(parameter)] = mask
        return checked

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add layers that were put into the model later, all parameters of a layer in one group.

        Parameters that no supported layer owns go to ``aux``, if there is one.

        Raises:
            ValueError: a parameter belongs neither to a supported layer of the model nor to ``aux``, or a layer's
                parameters are split.
        """
        params = as_list(param_group["params"])
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        ids = {id(p) for p in tensors}
        owned = self._owned()
        if not ids <= owned.keys():
            self._attach()
            owned = self._owned()
        if self.aux is not None and tensors and not ids & owned.keys():
            self.aux.add_param_group({**param_group, "params": params})
            self._link_aux()
            return
        for p in tensors:
            if id(p) not in owned:
                raise ValueError(f"params must belong to supported layers of the model, got {shown(p)} that does not")
        if self._complete:
            self._check_whole_layers(ids)
        group = {**self.defaults, **param_group, "params": params}
        group["rule"] = rules.get(group["rule"])
        if group["transfer"] is not None:
            group["transfer"] = transfers.get(group["transfer"])
        group.update(checked_hyperparameters(group))
        super().add_param_group(group)
        if self._complete:
            self._link_aux()

    def _check_whole_layers(self, ids: set[int]) -> None:
        for name, layer in self._layers.items():
            inside = [id(p) in ids for p in layer.parameters.values()]
            if any(inside) and not all(inside):
                raise ValueError(f"params must have all parameters of layer {name!r} or none, got only some")

    def _owned(self) -> dict[int, nn.Parameter]:
        """The parameters of captured layers, by ``id``."""
        return {id(p): p for layer in self._layers.values() for p in layer.parameters.values()}

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the local iterations of all layers and step ``aux``.

        As with torch's optimisers, parameters without a gradient stay as they are. A layer that has a gradient but no
        captured rows takes one step of the rule on ``γ · grad``. :attr:`last_reports` says what was done.

        Args:
            closure: re-evaluates the model, calls ``backward`` and returns the loss; optional.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            ValueError: what was captured does not fit the parameters any more (changed shapes, replaced layers, inputs
                overwritten in place, mixed dtypes or devices, sparse gradients), or several processes train. Nothing
                has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_one_process(self.model)
        self._link_aux()
        calls, idle = self._calls()
        if len(calls) > 1:  # each call checks its own problems, but the first should not run if the second cannot
            for work in (work for call in calls for work in call.work):
                work.problem.validate(work.problem.name)
        reports = [self._solve(call) for call in calls]
        finite = self._finite(reports, loss)
        if self.aux is not None and finite:  # the host decides here: with aux, a step waits for the device
            self.aux.step()
        self._decay(calls, finite)
        for call, report in zip(calls, reports, strict=True):
            report.commit_(finite)
            if finite.device.type != "cpu" or report.committed:  # elsewhere the host does not wait for the answer
                for work in call.work:
                    work.keep_state(self.state)
        self._forget(release=True)
        if calls or self.aux is not None:
            self._skipped.count(finite)
        self.last_reports = [*reports, *([nothing_done(idle, "no gradient")] if idle else [])]
        return loss

    def _solve(self, call: _Call) -> StepReport:
        """The local iterations of one call, up to the commit."""
        settings = Settings.checked(
            rule=call.group["rule"],
            lr=call.rates,
            prox=call.group["prox"],
            reduction=self.reduction,
            compute_dtype=self.compute_dtype,
            trace=self.trace and call.with_rows,
            regulariser=self.regulariser,
        )
        problems = [work.problem for work in call.work]
        report = solve(problems, settings, self.backend, done=lambda index: call.work[index].release())
        for work, problem in zip(call.work, report.problems, strict=True):
            problem.name, problem.rows = work.layer.name, work.rows
            if not call.with_rows:
                problem.decision = Decision("rule", "rule")
        return report

    def _decay(self, calls: Iterable[_Call], finite: Tensor) -> None:
        """Decoupled weight decay, as AdamW's: once a step, before the increment is added."""
        groups = {id(p): group for group in self._own_groups for p in group["params"]}
        for parameter in (p for call in calls for work in call.work for p in work.trained.values()):
            group = groups[id(parameter)]
            factor = 1 - float(group["lr"]) * group["weight_decay"]
            if factor != 1:
                kept = torch.full((), factor, dtype=torch.float64, device=finite.device)
                parameter.mul_(torch.where(finite, kept, 1.0))

    def _calls(self) -> tuple[list[_Call], list[str]]:
        """The calls of the backend that make this step, and the names of the layers that have no gradient."""
        own = self._own_groups
        for group in own:  # schedulers and users may have set them
            group.update(checked_hyperparameters(group))
        groups = {id(p): (index, group) for index, group in enumerate(own) for p in group["params"]}
        calls: dict[tuple[int, float, bool], _Call] = {}
        idle = []
        for name, layer in self._layers.items():
            masks = self._checked_layer(layer)
            trained = {kind: p for kind, p in layer.trained.items() if id(p) in groups}
            if not trained:
                idle.append(name)
                continue
            index, group = self._group_of(layer, trained, groups)
            rates = {kind: float(groups[id(p)][1]["lr"]) for kind, p in trained.items()}
            largest = max(rates.values())
            work = layer_work(
                layer,
                trained,
                self._transfer(layer, group),
                self._target(name),
                group["rule"],
                float(group["activation_lr"]),
                {kind: rate / largest if rate != largest else 1.0 for kind, rate in rates.items()},
                masks,
                self.state,
            )
            if not work.rows:
                self._tell_without_rows(work)
            key = (index, largest, work.rows > 0)
            if key not in calls:
                iterations = group["local_iterations"]
                decays = [self.lr_decay(t, iterations) for t in range(iterations if work.rows else 1)]
                calls[key] = _Call(group, [largest * decay for decay in decays], work.rows > 0)
            calls[key].work.append(work)
        return list(calls.values()), idle

    def _group_of(
        self, layer: CapturedLayer, trained: Mapping[str, Tensor], groups: Mapping[int, tuple[int, dict[str, Any]]]
    ) -> tuple[int, dict[str, Any]]:
        """The parameter group whose hyper-parameters a layer takes, and its index."""
        first, *others = (groups[id(p)] for p in trained.values())
        for _, other in others:
            different = [name for name in _SHARED if other[name] != first[1][name]]
            if different:
                raise ValueError(
                    f"the parameter groups of weight and bias of layer {layer.name!r} must agree in "
                    f"{', '.join(_SHARED)}; they differ in {', '.join(different)}"
                )
        for kind, parameter in trained.items():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"layer {layer.name!r}: the gradient of its {kind} must be dense, got {parameter.grad.layout}"
                )
        return first

    def _tell_without_rows(self, work: LayerWork) -> None:
        """Say once for each layer that its gradient came without rows, unless it is zero as for an unused expert."""
        name = work.layer.name
        if name in self._told or not any(bool(p.grad.any()) for p in work.trained.values() if p.grad is not None):
            return
        if not work.layer.called and is_compiled(self.model):
            raise ValueError(
                f"layer {name!r} has a gradient, but its hook has never run: the model was compiled and called before "
                "the optimiser was built. Build the optimiser first, or call torch._dynamo.reset() after it"
            )
        self._told.add(name)
        _log.warning(
            "layer %r has a gradient but no captured rows, so it takes one step of the rule on activation_lr * "
            "gradient. Its rows are captured when it is called as a module and loss.backward() adds to .grad",
            name,
        )

    def _transfer(self, layer: CapturedLayer, hyperparameters: Mapping[str, Any]) -> Transfer:
        if self.local_loss == "squared":
            return transfers.get("identity")
        transfer = transfers.get(hyperparameters["transfer"] or layer.transfer)
        if not transfer.elementwise and number_of_groups(layer.modules[layer.name]) > 1:
            raise ValueError(
                f"layer {layer.name!r} has groups, so its transfer function must be elementwise, got {transfer}"
            )
        return transfer

    def _checked_layer(self, layer: CapturedLayer) -> dict[str, list[Tensor]]:
        """The masks of a layer's parameters at present, by kind.

        Raises:
            ValueError: the model has another module or parameter in its place.
        """
        masks = {kind: [self._masks[id(p)]] for kind, p in layer.parameters.items() if id(p) in self._masks}
        for name, captured in layer.modules.items():
            try:
                module = self.model.get_submodule(layer.paths[name])
            except AttributeError:
                module = None
            if module is not captured:
                raise ValueError(
                    f"layer {name!r} is no longer the module that the optimiser was built with: build a new optimiser"
                )
            found = trained_parameters(layer.modules[name]) or {}
            for kind in ("weight", "bias"):
                if (found[kind].parameter if kind in found else None) is not layer.parameters.get(kind):
                    raise ValueError(
                        f"the {kind} of layer {name!r} is no longer the parameter that the optimiser was built with: "
                        "build a new optimiser"
                    )
                if kind in found and (mask := found[kind].mask) is not None:
                    masks.setdefault(kind, []).append(mask())
        return masks

    def _finite(self, reports: Iterable[StepReport], loss: Any) -> Tensor:
        """Whether the whole step may be committed: a bool tensor on the parameters' device."""
        flags = [report.finite for report in reports]
        if isinstance(loss, (Tensor, float)):
            flags.append(torch.isfinite(torch.as_tensor(loss)).all())
        if self.aux is not None:
            grads = [p.grad for group in self.aux.param_groups for p in group["params"] if p.grad is not None]
            flags.extend(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all() for g in grads)
        if not flags:
            return torch.tensor(True)
        return torch.stack([flag.to(flags[0].device) for flag in flags]).all()

    @property
    def skipped_steps(self) -> int:
        """How many steps were not committed because something was not finite (waits for the device)."""
        return self._skipped.total

    def _forget(self, release: bool = False) -> None:
        for layer in self._layers.values():
            layer.forget(release)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those of ``aux`` too, and forget captured activations."""
        self._link_aux()
        super().zero_grad(set_to_none)
        self._forget()

    # --- saving, loading, copying

    def state_dict(self) -> dict[str, Any]:
        """As torch's, ``aux``'s groups and state included.

        The groups also say, as text, what the state depends on: rule, transfer functions, ``local_loss``,
        ``reduction`` and ``lr_decay``. A resume with others is refused.
        """
        self._link_aux()
        return checkpoints.save(self, super().state_dict(), self._facts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly from :meth:`state_dict`: hyper-parameters of the groups, state and ``aux``.

        Raises:
            ValueError: it is of an optimiser with other groups, rules, transfer functions, ``local_loss``,
                ``reduction`` or ``lr_decay``, or with ``aux`` where there is none.
        """
        self._link_aux()
        checkpoints.check(self, state_dict, self._facts)
        groups, own = self.param_groups, self._own_groups
        kept = [{key: group[key] for key in ("rule", "transfer")} for group in own]
        self.param_groups = own
        try:
            super().load_state_dict(checkpoints.own_part(state_dict))
        except BaseException:
            self.param_groups = groups
            raise
        for group, values in zip(self.param_groups, kept, strict=True):
            group.update(values)
        checkpoints.restore_state(self, state_dict)
        self._link_aux()
        self._skipped = _SkipCounter(state_dict.get("skipped_steps", self.skipped_steps))
        self._forget(release=True)

    def _facts(self, group: Mapping[str, Any], iterations: int) -> dict[str, str]:
        """What the state of a group depends on and torch does not store, as text."""
        ids = {id(p) for p in group["params"]}
        layers = {name: layer for name, layer in self._layers.items() if id(layer.weight) in ids}
        return {
            "rule": repr(group["rule"]),
            "local_loss": self.local_loss,
            "reduction": self.reduction,
            "transfers": ", ".join(f"{name}: {self._transfer(layer, group)}" for name, layer in layers.items()),
            "lr_decay": " ".join(f"{self.lr_decay(t, iterations):.6g}" for t in range(min(iterations, 100))),
        }

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "last_reports": [], "_activation_handles": []}
        state["_layers"] = [
            (list(layer.modules), layer.paths, layer.transfer, layer.reason) for layer in self._layers.values()
        ]
        state["_masks"] = [
            (clean_name(name), self._masks[id(p)]) for name, p in self.model.named_parameters() if id(p) in self._masks
        ]
        # torch's own __init__ and __setstate__ put these back
        return {
            k: v for k, v in state.items() if not k.endswith("_hooks") and k not in ("_zero_grad_profile_name", "step")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layers" in state:  # absent when torch's load_state_dict calls this
            self._layers = {}
            self._masks = self._checked_masks(dict(state["_masks"]))
            for names, paths, transfer, reason in state["_layers"]:
                modules = {name: self.model.get_submodule(paths[name]) for name in names}
                keep = self._target(names[0]) != "dual"
                self._layers[names[0]] = CapturedLayer(modules, paths, transfer, keep, reason)
            self._watch_activations()

    def __repr__(self) -> str:
        width = max(map(len, self._layers))
        groups_of = {id(p): group for group in self.param_groups for p in group["params"]}
        lines = [super().__repr__(), f"local loss: {self.local_loss}; layers:"]
        for name, layer in self._layers.items():
            *groups, n, k = layer.layout.weight(layer.weight).shape
            count = f"{groups[0]} x " if groups else ""
            transfer = self._transfer(layer, groups_of.get(id(layer.weight), self.defaults))
            tied = f"  (also {', '.join(list(layer.modules)[1:])})" if len(layer.modules) > 1 else ""
            reason = f"  ({layer.reason})" if layer.reason else ""
            lines.append(f"  {name:<{width}}  {count}{k} -> {n}  {transfer}{tied}{reason}")
        if self.aux is not None:
            lines.append(f"aux: {type(self.aux).__name__}")
        return "\n".join(lines)

"""LocoProp as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locoprop_kernels import StepReport, rules, transfers
from locoprop_kernels.arguments import check_choice, shown
from locoprop_kernels.autocasting import without_autocast
from locoprop_kernels.regularisers import Regulariser, as_regulariser
from locoprop_kernels.reports import nothing_done
from locoprop_kernels.sampling import Sampling
from locoprop_kernels.settings import check_rows
from locoprop_kernels.transfers import Transfer
from locoprop_torch import checkpoints, processes
from locoprop_torch.auxiliary import (
    Aux,
    check_aux,
    check_coverage,
    complete_groups,
    frozen_outside,
    link_groups,
    link_state,
    made_aux,
    own_groups,
    tell_thawed,
    trained_ids,
)
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.checks import LOCAL_LOSSES, as_list, check_arguments, checked_hyperparameters
from locoprop_torch.layers import ModelLayers, table, transfer_in_use
from locoprop_torch.ownership import Owners
from locoprop_torch.presets import DEFAULT_RULE
from locoprop_torch.rates import default_lr_decay
from locoprop_torch.repeated import Preparation
from locoprop_torch.step import (
    SkipCounter,
    Solved,
    all_finite,
    check_capture,
    commit,
    decay_weights,
    sampling_ahead,
    solve,
)
from locoprop_torch.targets import Target, check_target
from locoprop_torch.unit import PER_EXAMPLE, PerExample
from locoprop_torch.work import Place, places

__all__ = ["LocoProp", "default_lr_decay"]


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
        activation_lr: ``γ``, step size of the activation targets: a number ``> 0``, or :class:`PerExample`, whose unit
            is found at the first step and depends neither on the batch nor on how the loss averages.
        local_iterations: ``T >= 1``.
        rule: ``"sgd"``, ``"momentum"``, ``"nesterov"``, ``"rmsprop"``, ``"adam"``, ``"adagrad"``, or an instance from
            :mod:`locoprop_kernels.rules`. The default is Adam whose mean squares have a short memory.
        local_loss: ``"matching"`` (LocoProp-M) or ``"squared"`` (LocoProp-S: every transfer counts as the identity).
        transfers: transfer functions by submodule name, overriding what is found in the model.
        prox: proximal coefficient ``λ >= 0``.
        reduction: ``"mean"`` or ``"sum"`` of the local loss over the rows (examples, tokens) of a layer's input.
        lr_decay: ``(t, T) -> factor`` of the learning rate; ``None`` for :func:`default_lr_decay`.
        aux: for the parameters that no captured layer owns: an optimiser of the user's, ``"adamw"`` for AdamW with its
            defaults, or a function of those parameters that makes one. It steps along with this one. Its groups are
            among ``param_groups``, marked ``"aux": True``, and its state is in ``state_dict``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.
        compute_dtype: dtype of the operands of the local products; ``None`` for the parameters'. With
            ``torch.float8_e4m3fn`` they carry scales; it is for ``rows=None``, on a GPU that multiplies it or on a CPU.
        target: ``"dual"``, ``"primal"`` or a function, see :mod:`locoprop_torch.targets`; or one by submodule name.
        regulariser: a further regulariser, see :class:`locoprop_kernels.Regulariser`.
        weight_decay: decoupled weight decay ``>= 0``, as AdamW's: ``W`` is multiplied by ``1 - lr * weight_decay``.
        param_groups: groups with hyper-parameters of their own, as in torch: ``{"params": model.fc1.parameters(),
            "activation_lr": 1.0}``; ``lr``, ``activation_lr``, ``local_iterations``, ``prox``, ``rule``,
            ``transfer`` (over what ``transfers`` says) and ``weight_decay`` may be set. Weight and bias of a layer may
            be in two groups, which then differ in ``lr`` and ``weight_decay`` alone; those of no group form the first.
        masks: by parameter name, of its shape, looked at anew in every step: where one is zero a parameter stays as it
            is. Those of ``torch.nn.utils.prune`` and of parametrizations that multiply by zeros and ones are found.
        trace: also evaluate every layer's local objective before each of the ``T`` local steps and at the end, into
            ``last_reports``. In the Triton kernels that costs one more product a step; through PyTorch ``T + 1`` more
            (``T`` with few rows), and on CPUs compiled loops do not take it.
        rows: how many rows of the batch a local step takes at most, other ones in each, to estimate how the gradient
            has changed; ``None`` for all, the published method. A row is an example, a token or an output position.
        shard_state: under ``DistributedDataParallel`` each process solves some outputs alone and keeps the rule's state
            of those; the others get the increments. ``state_dict()`` then gathers, so all processes have to call it.

    The defaults are for everybody (``bench/results/defaults``); :data:`locoprop_torch.presets` has the settings of the
    paper's notebook and of the PyPI package: ``LocoProp(model, **presets["notebook"])``.

    Attributes:
        rows_seed: says which rows the next step takes; counts the steps, and is in ``state_dict``.
        last_reports: what the last step did: a :class:`locoprop_kernels.StepReport` for each call of the backend
            (usually for each parameter group), one more for layers with a gradient but no rows (``driver`` is
            ``"rule"``: the rule's own step on ``γ · grad``) and one for layers without a gradient (``"none"``).
            ``report.problems`` has an entry for each layer, by ``name``; printed, a report has a line for each.

    Raises:
        TypeError, ValueError: an argument is out of range, the model has no supported layer, or trainable parameters
            are in neither a captured layer nor ``aux``; the message names them.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        activation_lr: float | PerExample = PER_EXAMPLE,
        local_iterations: int = 5,
        rule: str | rules.Rule = DEFAULT_RULE,
        local_loss: str = "matching",
        transfers: Mapping[str, str | Transfer] | None = None,
        prox: float = 0.0,
        reduction: str = "mean",
        lr_decay: Callable[[int, int], float] | None = None,
        aux: Aux = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        target: Target | Mapping[str, Target] = "dual",
        regulariser: Regulariser | Callable[[Tensor, Tensor], Tensor] | None = None,
        weight_decay: float = 0.0,
        param_groups: Iterable[dict[str, Any]] = (),
        masks: Mapping[str, Tensor] | None = None,
        trace: bool = False,
        rows: int | None = 64,
        shard_state: bool = False,
    ) -> None:
        check_rows(rows)
        check_arguments(model, local_loss, reduction, backend, compute_dtype, lr_decay, shard_state)
        check_aux(aux)
        check_target(target)
        defaults: dict[str, Any] = {
            "lr": lr,
            "activation_lr": activation_lr,
            "local_iterations": local_iterations,
            "prox": prox,
            "rule": rules.get(rule),
            "weight_decay": weight_decay,
            "transfer": None,
            "rows_seed": 0,
            "output_gradient": "",
        }
        defaults.update(checked_hyperparameters(defaults))
        self.model = model = processes.unwrapped(model)
        self.local_loss, self.reduction = local_loss, reduction
        self.lr_decay = lr_decay or default_lr_decay
        self.aux: Optimizer | None = aux if isinstance(aux, Optimizer) else None
        self.backend, self.compute_dtype, self.target = backend, compute_dtype, target
        self.regulariser = as_regulariser(regulariser)
        self.trace, self.rows, self.rows_seed, self.shard_state = trace, rows, 0, shard_state
        # Which process has the state of which outputs, once a step has spread it.
        self._owners: Owners | None = None
        self.last_reports: list[StepReport] = []
        self._preparation = Preparation()
        self._skipped = SkipCounter()
        # The layers whose gradients without rows were logged, and the parameters that nobody trains.
        self._told: set[str] = set()
        # Once it is true, a new group must have whole layers.
        self._complete = False
        self._model_layers = ModelLayers(model, transfers or {}, target, masks or {})
        try:
            self._build(aux, param_groups, defaults)
        except BaseException:
            self._model_layers.detach()
            raise

    def _build(self, aux: Aux, param_groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """Capture the layers, and make the parameter groups and ``aux``."""
        self._attach()
        owned = self._model_layers.owned()
        self.aux = made_aux(aux, self.model, owned)
        covered = owned.keys() | trained_ids(self.aux)
        check_coverage(self.model, covered)
        self._frozen = frozen_outside(self.model, covered)
        for layer in self._layers.values():
            transfer_in_use(layer, None, self.local_loss)
        super().__init__(complete_groups(self.model, owned, param_groups), defaults)
        self._complete = True
        link_groups(self.param_groups, self.aux)
        self._model_layers.sample_by(self._sampling)

    def _sampling(self) -> Sampling | None:
        """Which rows the next step takes, as far as that is known before it."""
        late = processes.gather_rows(self.model)
        if late or self.rows is None:
            return None
        return sampling_ahead(self.rows, self.rows_seed, own_groups(self.param_groups), self.trace)

    def _attach(self) -> None:
        """Capture the supported layers of the model that ``aux`` leaves to us."""
        self._model_layers.attach(trained_ids(self.aux), search=self.local_loss == "matching")

    @property
    def _layers(self) -> dict[str, CapturedLayer]:
        """The captured layers, by name."""
        return self._model_layers.captured

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
        owned = self._model_layers.owned()
        if not ids <= owned.keys():
            self._attach()
            owned = self._model_layers.owned()
        if self.aux is not None and tensors and not ids & owned.keys():
            self.aux.add_param_group({**param_group, "params": params})
            link_groups(self.param_groups, self.aux)
            return
        for p in tensors:
            if id(p) not in owned:
                raise ValueError(f"params must belong to supported layers of the model, got {shown(p)} that does not")
        if self._complete:
            self._model_layers.check_whole(ids)
        group = {**self.defaults, **param_group, "params": params}
        group["rule"] = rules.get(group["rule"])
        if group["transfer"] is not None:
            group["transfer"] = transfers.get(group["transfer"])
        group.update(checked_hyperparameters(group))
        super().add_param_group(group)
        self._model_layers.want_unit(own_groups(self.param_groups))
        if self._complete:
            link_groups(self.param_groups, self.aux)

    # --- the step: in a compiled function it runs as it is, between two graphs, as it reads what hooks have kept

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the local iterations of all layers and step ``aux``.

        As with torch's optimisers, parameters without a gradient stay as they are. A layer that has a gradient but no
        captured rows takes one step of the rule on ``γ · grad``. :attr:`last_reports` says what was done.

        Args:
            closure: re-evaluates the model, calls ``backward`` and returns the loss, which ``step`` then returns.

        Raises:
            ValueError: what was captured does not fit the parameters any more (changed shapes, replaced layers, inputs
                overwritten in place, mixed dtypes or devices, sparse gradients), or processes do not agree. Nothing
                has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_autocast():
            link_groups(self.param_groups, self.aux)
            check_choice("local_loss", self.local_loss, LOCAL_LOSSES)
            check_capture(self._model_layers, self.aux)
            tell_thawed(self._frozen, self.param_groups, self._told)
            own, together = own_groups(self.param_groups), processes.of(self)
            self._model_layers.want_unit(own)
            where = together.begin(self, lambda: places(own))
            solved, finite = together.finish(lambda: self._solved(where, loss))
            calls, reports = solved.calls, solved.reports
            if self.aux is not None and finite:  # which waits for the device
                self.aux.step()
                link_state(self.state, self.aux)
            if any(group["weight_decay"] for group in own):
                decay_weights(calls, finite)
            for call, report in zip(calls, reports, strict=True):
                commit(call, report, finite, self.state)
            together.receive(finite)
            self.rows_seed += 1
            self._model_layers.output_gradient.keep()
            self._model_layers.end_step()
        if calls or solved.elsewhere or self.aux is not None:
            self._skipped.count(finite)
        left = {"no gradient": solved.idle, "solved by other processes": solved.elsewhere}
        self.last_reports = [*reports, *(nothing_done(names, reason) for reason, names in left.items() if names)]
        return loss

    def _solved(self, where: Mapping[int, Place], loss: Any) -> tuple[Solved, Tensor]:
        """The calls of a step and what they have found, and whether all is finite."""
        solved = self._preparation.prepared(self, where)
        solved.reports += [solve(self, call) for call in solved.calls]
        return solved, all_finite(solved.reports, loss, self.aux)

    join_hook = processes.refuse_join

    @property
    def skipped_steps(self) -> int:
        """How many steps were not committed because something was not finite (waits for the device)."""
        return self._skipped.total

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those of ``aux`` too, and forget captured activations."""
        link_groups(self.param_groups, self.aux)
        super().zero_grad(set_to_none)
        self._model_layers.forget()

    @property
    def output_gradient(self) -> dict[str, Any]:
        """What ``1 per example`` was found to be, see :class:`PerExample`; empty before the first step."""
        return self._model_layers.output_gradient.state()

    # --- saving, loading, copying

    def state_dict(self) -> dict[str, Any]:
        """What torch's optimisers return, with the groups and the state of ``aux`` included.

        The groups also say, as text, what the state depends on: rule, transfer functions, ``local_loss``,
        ``reduction`` and ``lr_decay``. A resume with others is refused.
        """
        link_groups(self.param_groups, self.aux)
        return checkpoints.save(self, super().state_dict(), processes.whole_state(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly from :meth:`state_dict`.

        Raises:
            ValueError: it is of an optimiser with other groups, rules, transfer functions, ``local_loss``,
                ``reduction`` or ``lr_decay``, or with ``aux`` where there is none.
        """
        link_groups(self.param_groups, self.aux)
        checkpoints.check(self, state_dict)
        groups, self.param_groups = self.param_groups, own_groups(self.param_groups)
        kept = [{key: group[key] for key in ("rule", "transfer")} for group in self.param_groups]
        try:
            super().load_state_dict(checkpoints.own_part(state_dict))
        except BaseException:
            self.param_groups = groups
            raise
        for group, values in zip(self.param_groups, kept, strict=True):
            group.update(values)
        checkpoints.restore_state(self, state_dict)
        self._owners = None
        link_groups(self.param_groups, self.aux)
        self._skipped = SkipCounter(state_dict.get("skipped_steps", self.skipped_steps))
        self.rows_seed = checkpoints.rows_seed(state_dict, self.rows_seed)
        self._model_layers.output_gradient.load(checkpoints.output_gradient(state_dict))
        self._model_layers.end_step()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "last_reports": [], "_preparation": Preparation()}
        # torch's own __init__ and __setstate__ put these back.
        kept = [k for k in state if not k.endswith("_hooks") and k not in ("_zero_grad_profile_name", "step")]
        return {k: state[k] for k in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._model_layers.sample_by(self._sampling)

    def __repr__(self) -> str:
        transfers_of = {id(p): group["transfer"] for group in own_groups(self.param_groups) for p in group["params"]}
        layers = table(self._layers, transfers_of, self.local_loss)
        # Two entries of the groups are for checkpoints alone.
        hidden = ("    rows_seed:", "    output_gradient:")
        groups = [line for line in super().__repr__().splitlines() if not line.startswith(hidden)]
        lines = [*groups, f"local loss: {self.local_loss}; layers:", *layers]
        if self.output_gradient:
            lines.append(f"1 per example is an activation_lr of {self.output_gradient['rate']:g}")
        if self.aux is not None:
            lines.append(f"aux: {type(self.aux).__name__}")
        return "\n".join(lines)

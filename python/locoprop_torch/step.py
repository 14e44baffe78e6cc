"""The parts of a step: which layers make a call of the backend, the call itself, and its commit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locoprop_kernels import StepReport, checked, steps
from locoprop_kernels.checked import Checked
from locoprop_kernels.graphs import capturing
from locoprop_kernels.sampling import Sampling
from locoprop_kernels.settings import Settings, check_rows
from locoprop_kernels.solution import Decision
from locoprop_torch.checks import is_compiled
from locoprop_torch.layers import ModelLayers
from locoprop_torch.rates import local_rates
from locoprop_torch.sharding import own
from locoprop_torch.work import LayerWork, Place, layer_work, trained

if TYPE_CHECKING:
    from locoprop_torch.optimizer import LocoProp

__all__ = [
    "Call",
    "SkipCounter",
    "Solved",
    "all_finite",
    "calls_of",
    "check_capture",
    "commit",
    "decay_weights",
    "sampling_ahead",
    "shrink",
    "solve",
    "tell_without_rows",
]

_log = logging.getLogger("locoprop_torch")


@dataclass(eq=False)
class Call:
    """The layers of one call of the backend, which have these in common.

    Attributes:
        group: the parameter group.
        rates: the learning rate of each local iteration.
        with_rows: whether there are rows; without them it is the rule's own step on the gradient.
        work: the layers.
        checked: their problems, once they have been checked.
    """

    group: dict[str, Any]
    rates: list[float]
    with_rows: bool
    work: list[LayerWork] = field(default_factory=list)
    checked: Checked | None = None
    # What the latest settings were made from, and these.
    _settings: tuple[tuple[Any, ...], Settings] | None = None

    def settings(self, optimizer: LocoProp) -> Settings:
        """The settings of the call; those of the step before where they are the same."""
        group, (rows, seed) = self.group, self.rows_and_seed or (optimizer.rows, optimizer.rows_seed)
        given = (
            group["rule"],
            self.rates,
            group["prox"],
            optimizer.reduction,
            optimizer.compute_dtype,
            optimizer.trace and self.with_rows,
            optimizer.regulariser,
            rows,
        )
        if self._settings is None or self._settings[0] != given:
            self._settings = given, Settings.checked(*given)
        settings = self._settings[1]
        return settings if rows is None else settings.with_seed(seed)

    def look_up_rates(self, optimizer: LocoProp) -> None:
        """Take the learning rates of a step."""
        iterations = self.group["local_iterations"]
        steps = iterations if self.with_rows else 1
        self.rates = local_rates(self.work[0].lr, iterations, optimizer.lr_decay, steps)

    @property
    def rows_and_seed(self) -> tuple[int, int] | None:
        """``rows`` and the seed that the layers' rows were chosen by, whatever has been set since; ``None`` if not."""
        return next((work.sampling[:2] for work in self.work if work.sampling is not None), None)


def sampling_ahead(rows: int | None, seed: int, groups: Iterable[Mapping[str, Any]], trace: bool) -> Sampling | None:
    """Which rows the next step will take, as far as that is known before it; ``None`` for all.

    Args:
        rows: of the batch in a local step.
        seed: of the step.
        groups: the parameter groups of the captured layers.
        trace: whether the local objectives are evaluated.

    Raises:
        ValueError: ``rows`` is neither a positive integer nor ``None``.
    """
    if rows is None:
        return None
    check_rows(rows)
    most = max(int(group["local_iterations"]) for group in groups)
    # The first local step needs no rows, and the objective at the end does.
    return Sampling(rows, seed, max(most - 1 + trace, 1))


def calls_of(optimizer: LocoProp, where: Mapping[int, Place]) -> Solved:
    """The calls of the backend that make a step, checked and not solved yet, and the layers that are in none.

    Args:
        optimizer: the optimiser.
        where: the place of every parameter, by its ``id``.

    Raises:
        TypeError, ValueError: a layer cannot be trained as it is; none is, then.
    """
    calls: dict[tuple[int, float, bool], Call] = {}
    idle, elsewhere = [], []
    layers = optimizer._model_layers
    for name, layer in layers.captured.items():
        parts = trained(layer, where, layers.masks(layer))
        if not parts:
            idle.append(name)
            continue
        if layer.outputs and layer.outputs.start == layer.outputs.stop:
            elsewhere.append(name)
            continue
        place = next(iter(parts.values())).place
        activation_lr = layers.output_gradient.activation_lr(place.group["activation_lr"], layer)
        work = layer_work(layer, parts, optimizer.local_loss, layers.target(name), activation_lr, optimizer.state)
        if not work.rows:
            tell_without_rows(work, optimizer.model, optimizer._told)
        key = (place.number, work.lr, work.rows > 0)
        if key not in calls:
            calls[key] = Call(place.group, [], work.rows > 0)
        calls[key].work.append(work)
    for call in calls.values():
        call.look_up_rates(optimizer)
        problems = [work.problem for work in call.work]
        call.checked = checked.check(problems, call.group["rule"])
    return Solved(list(calls.values()), idle, elsewhere)


def check_capture(layers: ModelLayers, aux: Optimizer | None) -> None:
    """Refuse a step that a CUDA graph cannot hold, because the host waits for the device in it.

    Raises:
        RuntimeError: a graph is being captured, and there is an ``aux``, or the unit of ``γ`` is not known yet.
    """
    unknown = layers.output_gradient.wanted and layers.output_gradient.size is None
    if (aux is None and not unknown) or not capturing(next(iter(layers.captured.values())).weight.device):
        return
    if aux is not None:
        raise RuntimeError(
            "a step with aux cannot be captured in a CUDA graph, because the host decides whether aux steps: let an "
            "optimiser of its own train those parameters, and capture its step too"
        )
    raise RuntimeError(
        "the first step cannot be captured in a CUDA graph, because the host finds the unit of activation_lr in it: "
        "make it outside of the capture"
    )


def tell_without_rows(work: LayerWork, model: nn.Module, told: set[str]) -> None:
    """Say once for each layer that its gradient came without rows, unless it is zero as for an unused expert.

    Args:
        work: the layer in this step.
        model: the model.
        told: the layers that it was said of; this one is added.

    Raises:
        ValueError: the model was compiled and called before the optimiser was built.
    """
    name = work.layer.name
    # In the capture of a CUDA graph the gradient cannot be looked at.
    if name in told or capturing(work.problem.weight.device):
        return
    if not any(bool(own(part.gradient).any()) for part in work.trained.values()):
        return
    if not work.layer.called and is_compiled(model):
        raise ValueError(
            f"layer {name!r} has a gradient, but its hook has never run: the model was compiled and called before "
            "the optimiser was built. Build the optimiser first, or call torch._dynamo.reset() after it"
        )
    told.add(name)
    _log.warning(
        "layer %r has a gradient but no captured rows, so it takes one step of the rule on activation_lr * "
        "gradient. Its rows are captured when it is called as a module and loss.backward() adds to .grad",
        name,
    )


@dataclass(eq=False)
class Solved:
    """What a step has found, before its commit.

    Attributes:
        calls: the calls of the backend.
        idle: the layers that have no gradient.
        elsewhere: the layers that other processes solve.
        reports: of the calls.
    """

    calls: list[Call] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)


def solve(optimizer: LocoProp, call: Call) -> StepReport:
    """The local iterations of one call, up to the commit."""
    settings = call.settings(optimizer)
    assert call.checked is not None
    report = steps.solve(call.checked, settings, optimizer.backend, done=lambda index: call.work[index].release())
    for work, problem in zip(call.work, report.problems, strict=True):
        problem.name, problem.rows = work.layer.name, work.rows
        if not call.with_rows:
            problem.decision = Decision("rule", "rule")
    return report


def all_finite(reports: Iterable[StepReport], loss: Any, aux: Optimizer | None) -> Tensor:
    """Whether a whole step may be committed: a bool tensor on the parameters' device.

    Args:
        reports: of all calls.
        loss: what the closure returned; looked at where it is a tensor or a number.
        aux: the optimiser that steps along; its gradients must be finite too.
    """
    flags = [report.finite for report in reports]
    if isinstance(loss, (Tensor, float)):
        flags.append(torch.isfinite(loss if isinstance(loss, Tensor) else torch.tensor(loss, device="cpu")).all())
    if aux is not None:
        grads = [own(p.grad) for group in aux.param_groups for p in group["params"] if p.grad is not None]
        flags.extend(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all() for g in grads)
    if len(flags) == 1:
        return flags[0]
    if not flags:
        return torch.tensor(True, device="cpu")
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all()


def decay_weights(calls: Iterable[Call], finite: Tensor) -> None:
    """Decoupled weight decay, as AdamW's: once a step, before the increment is added, and only if it will be."""
    everything = [
        (work.problem, kind, part.place) for call in calls for work in call.work for kind, part in work.trained.items()
    ]
    for problem, kind, place in everything:
        mask = problem.mask(kind)
        # A view of the parameter, or what the parameter is written from.
        shrink(
            getattr(problem, kind),
            1 - place.lr * place.group["weight_decay"],
            finite if mask is None else finite & mask,
        )


def shrink(tensor: Tensor, factor: float, where: Tensor) -> None:
    """Multiply a tensor by a factor where the bool tensor ``where`` is true, which has its shape or ``[]``."""
    if factor != 1:
        kept = torch.full((), factor, dtype=torch.float64, device=where.device)
        tensor.mul_(torch.where(where, kept, 1.0))


def commit(call: Call, report: StepReport, finite: Tensor, state: dict[Any, Any]) -> None:
    """Apply the increments of a call and keep the rules' state, if the whole step is finite."""
    report.commit_(finite)
    # Only on a CPU is the answer there without waiting; elsewhere the new values are the old ones if it is no.
    written = finite.device.type != "cpu" or report.committed
    for work in call.work:
        if written:
            work.keep(state)
        work.release()


class SkipCounter:
    """Counts steps that were not committed, on their device, and warns about the first."""

    def __init__(self, total: int = 0) -> None:
        self._total = torch.tensor(total, device="cpu")
        self._seen = torch.tensor(total, device="cpu")
        self._start = total
        self._warned = False

    @property
    def total(self) -> int:
        """How many there were so far (waits for the device)."""
        return int(self._total)

    def count(self, finite: Tensor) -> None:
        """Count a step unless it is ``finite``; to be called by ``step`` itself, whose caller the warning points at."""
        if finite.device.type == "cpu" and finite:
            return
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
                stacklevel=6,
            )

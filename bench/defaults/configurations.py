"""What is compared: Adam with its defaults, ``LocoProp`` as the library has it, and ``LocoProp`` with chosen settings.

A configuration is a text, which is its name in results too: ``adam`` (the baseline), ``library``, or settings such as
``rule=adam,lr=1e-3,kappa=1,T=5,rows=32``. Settings that are not named have the values of :class:`Settings`; ``|``
separates alternatives: ``rule=adam,T=3|5,rows=16|32`` are four configurations.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from bench.defaults.tasks import Task
from locoprop_kernels import rules
from locoprop_torch import LocoProp

__all__ = ["BASELINE", "LIBRARY", "UNITS", "Settings", "expand", "library_name", "made"]

BASELINE, LIBRARY = "adam", "library"
UNITS = ("terms", "examples", "none", "max", "layers", "norm", "element", "peak")
_CHOICES = {
    "rule": ("adam", "rmsprop", "sgd"),
    "unit": UNITS,
    "decay": ("quarter", "constant", "zero", "half"),
    "reduction": ("mean", "sum"),
}
# Named even where they have their usual values.
_ALWAYS = ("rule", "lr", "kappa", "T", "rows")
_DECAYS = {
    "constant": lambda t, iterations: 1.0,
    "zero": lambda t, iterations: 1 - t / iterations,
    "half": lambda t, iterations: 1 - 0.5 * t / iterations,
}


@dataclass(frozen=True)
class Settings:
    """Settings of ``LocoProp``.

    Attributes:
        rule: local rule.
        lr: its learning rate.
        kappa: ``γ`` in multiples of the unit.
        unit: of ``γ``: the number of ``terms`` that the loss averages over, of ``examples`` in the batch, ``none``, or
            one over what is measured in the first step at the output layer: the root mean square over rows of the
            largest element of ``∂L/∂A0`` (``max``) or of its ``norm``, that over all elements (``element``), or the
            largest of all elements (``peak``); ``layers`` is ``max`` divided by the number of captured layers, all of
            which move at once.
        T: local iterations.
        rows: of a local step; 0 for all.
        decay: of the learning rate over the local iterations: to a ``quarter`` (the library's), ``half``, ``zero``.
        reduction: of the local loss.
        momentum: of RMSProp, or Adam's first ``beta``.
        beta2: Adam's second ``beta``.
        eps: of the rule.
    """

    rule: str = "adam"
    lr: float = 1e-3
    kappa: float = 1.0
    unit: str = "terms"
    T: int = 5
    rows: int = 32
    decay: str = "quarter"
    reduction: str = "mean"
    momentum: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    @classmethod
    def parsed(cls, text: str) -> Settings:
        """Settings from ``name=value,...``.

        Raises:
            ValueError: an unknown name, or a value that is none of those it may have; names it.
        """
        known = {name: type(value) for name, value in asdict(cls()).items()}
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if not equals or name not in known:
                raise ValueError(
                    f"a configuration must be {BASELINE}, {LIBRARY} or NAME=VALUE,... with names of "
                    f"{', '.join(known)}; got {part!r} in {text!r}"
                )
            if name in _CHOICES and value not in _CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}; got {value!r}")
            try:
                values[name] = known[name](value)
            except ValueError:
                raise ValueError(f"{name} must be of type {known[name].__name__}, got {value!r}") from None
        return cls(**values)

    @property
    def name(self) -> str:
        """The text that stands for these settings: without those that have their usual values."""
        usual, own = asdict(Settings()), asdict(self)
        shown = [name for name in own if name in _ALWAYS or own[name] != usual[name]]
        return ",".join(
            f"{name}={own[name]:g}" if isinstance(own[name], float) else f"{name}={own[name]}" for name in shown
        )

    def rule_instance(self) -> rules.Rule:
        """The local rule with its hyper-parameters."""
        if self.rule == "adam":
            return rules.Adam(betas=(self.momentum, self.beta2), eps=self.eps)
        if self.rule == "rmsprop":
            return rules.RMSprop(momentum=self.momentum, eps=self.eps)
        return rules.SGD(momentum=self.momentum)


def expand(texts: Sequence[str]) -> list[str]:
    """The names of all configurations that texts with alternatives stand for, in order, each once.

    Raises:
        ValueError: see :meth:`Settings.parsed`.
    """
    found: dict[str, None] = {}
    for text in texts:
        if text == BASELINE:
            found[text] = None
        elif text.partition(" ")[0] == LIBRARY:
            found[library_name()] = None
        else:
            parts = [
                [f"{part.partition('=')[0]}={value}" for value in part.partition("=")[2].split("|")]
                if "=" in part
                else [part]
                for part in text.split(",")
            ]
            for chosen in product(*parts):
                found[Settings.parsed(",".join(chosen)).name] = None
    return list(found)


def library_name() -> str:
    """``library``, and the defaults that ``LocoProp`` has at present: a changed default is another configuration."""
    parameters = inspect.signature(LocoProp).parameters
    names = ("rule", "lr", "activation_lr", "local_iterations", "rows", "lr_decay", "reduction")
    return f"{LIBRARY} " + ",".join(f"{name}={parameters[name].default}" for name in names)


def made(name: str, task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a configuration; ``γ`` of a measured unit is set in the first step, from ``kappa``."""
    if name == BASELINE:
        return torch.optim.Adam(model.parameters())
    if name.partition(" ")[0] == LIBRARY:
        return LocoProp(model, transfers=task.transfers, aux="adamw")
    settings = Settings.parsed(name)
    unit = {"terms": task.terms, "examples": task.batch}.get(settings.unit, 1)
    return LocoProp(
        model,
        lr=settings.lr,
        activation_lr=settings.kappa * unit,
        local_iterations=settings.T,
        rule=settings.rule_instance(),
        transfers=task.transfers,
        reduction=settings.reduction,
        lr_decay=_DECAYS.get(settings.decay),
        rows=settings.rows or None,
        aux="adamw",
    )


def unit_of(name: str) -> str:
    """The unit of ``γ`` of a configuration; ``"none"`` where there is nothing to measure."""
    return "none" if name == BASELINE or name.startswith(LIBRARY) else Settings.parsed(name).unit

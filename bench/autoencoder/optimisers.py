"""Every optimiser of the experiments, with the hyper-parameters that are searched for; none of the baselines is ours.

All have two hyper-parameters to search, SGD alone has one, on a logarithmic scale; ``forget`` is one minus the momentum
or ``β₁``. The search begins with the usual values. Everything else is fixed here, the same for every experiment.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bench.autoencoder.protocol import FULL, Protocol
from locoprop_kernels import rules
from locoprop_torch import LocoProp

__all__ = ["AUTOENCODER", "KINDS", "Contestant", "checked", "contestant_of", "notebook_rule"]

Values = dict[str, Any]
Range = tuple[float, float]
KINDS = ("first-order", "second-order", "LocoProp")


@dataclass(frozen=True)
class Contestant:
    """An optimiser and its search.

    Attributes:
        name: what the command line calls it.
        label: what reports call it.
        kind: one of :data:`KINDS`.
        make: makes the optimiser for a model from hyper-parameters and the protocol.
        space: lowest and highest value of each hyper-parameter to search, logarithmic.
        usual: where the search begins.
        library: module that must be there.
        usual_full: where the search of the full protocol begins, if that is elsewhere.
    """

    name: str
    label: str
    kind: str
    make: Callable[[nn.Module, Values, Protocol], Optimizer]
    space: dict[str, Range]
    usual: dict[str, float]
    library: str = "torch"
    usual_full: dict[str, float] | None = None

    def optimiser(self, model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
        return self.make(model, values, protocol)


def _external(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _sgd(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=values["lr"])


def _momentum(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=values["lr"], momentum=1 - values["forget"])


def _nesterov(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=values["lr"], momentum=1 - values["forget"], nesterov=True)


def _adagrad(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    start = values["accumulator"]
    return torch.optim.Adagrad(model.parameters(), lr=values["lr"], initial_accumulator_value=start)


def _rmsprop(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=values["lr"], alpha=0.9, momentum=1 - values["forget"])


def _adam(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=values["lr"], betas=(1 - values["forget"], 0.999))


def _shampoo(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    """Shampoo with RMSProp's step sizes grafted on, as Anil et al. (2020) do."""
    return _external("pytorch_optimizer", "ScalableShampoo")(
        model.parameters(),
        lr=values["lr"],
        betas=(1 - values["forget"], 0.999),
        moving_average_for_momentum=True,
        # LayerWiseGrafting.RMSPROP, which the library does not export.
        graft_type=3,
        start_preconditioning_step=protocol.interval,
        preconditioning_compute_steps=protocol.interval,
    )


def _soap(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return _external("pytorch_optimizer", "SOAP")(
        model.parameters(),
        lr=values["lr"],
        betas=(1 - values["forget"], 0.95),
        weight_decay=0.0,
        precondition_frequency=protocol.interval,
    )


def _kfac(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    """K-FAC without inverses: the step that singd documents as close to K-FAC's."""
    return _external("singd.optim.optimizer", "SINGD")(
        model,
        lr=values["lr"],
        damping=values["damping"],
        kfac_like=True,
        alpha1=0.0,
        lr_cov=0.01,
        normalize_lr_cov=True,
        T=2,
    )


def notebook_rule(protocol: Protocol) -> rules.Rule:
    """RMSProp as in the paper's notebook."""
    return rules.RMSprop(alpha=0.9, momentum=protocol.momentum, eps=1e-5, flavor="tensorflow")


def _locoprop(local_loss: str, rows: int | None = None) -> Callable[[nn.Module, Values, Protocol], Optimizer]:
    def make(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
        options = {key: value for key, value in values.items() if key not in ("lr", "gamma")}
        fixed = {
            "rule": notebook_rule(protocol),
            "local_iterations": 10,
            "local_loss": local_loss,
            "rows": rows,
            "prox": 0.0,
            "reduction": "sum",
            # The sigmoid itself is inside the loss, where it cannot be found.
            "transfers": {"logits": "sigmoid"},
        }
        return LocoProp(model, lr=values["lr"], activation_lr=values["gamma"], **{**fixed, **options})

    return make


_FORGET = (0.02, 0.5)
# The demo's values for a short run, the notebook's for a long one.
_DEMO_S, _DEMO_M, _NOTEBOOK = {"lr": 1e-4, "gamma": 20.0}, {"lr": 5e-5, "gamma": 5.0}, {"lr": 1e-5, "gamma": 10.0}
_LOCAL = {"lr": (5e-6, 5e-4), "gamma": (1.0, 100.0)}
_SOAP = {"lr": (1e-3, 1e-1), "forget": (0.02, 0.5)}

#: The contestants of the autoencoder, in the order of reports.
AUTOENCODER: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant("sgd", "SGD", "first-order", _sgd, {"lr": (1e-4, 1e-1)}, {"lr": 1e-2}),
        Contestant(
            "momentum",
            "momentum",
            "first-order",
            _momentum,
            {"lr": (1e-5, 1e-1), "forget": (0.01, 0.5)},
            {"lr": 1e-3, "forget": 0.1},
        ),
        Contestant(
            "nesterov",
            "Nesterov",
            "first-order",
            _nesterov,
            {"lr": (1e-5, 1e-1), "forget": (0.01, 0.5)},
            {"lr": 1e-3, "forget": 0.1},
        ),
        Contestant(
            "adagrad",
            "AdaGrad",
            "first-order",
            _adagrad,
            {"lr": (1e-3, 1e-1), "accumulator": (1e-8, 1.0)},
            {"lr": 1e-2, "accumulator": 1e-6},
        ),
        Contestant(
            "rmsprop",
            "RMSProp",
            "first-order",
            _rmsprop,
            {"lr": (3e-5, 1e-2), "forget": (0.05, 1.0)},
            {"lr": 3e-4, "forget": 0.1},
        ),
        Contestant(
            "adam",
            "Adam",
            "first-order",
            _adam,
            {"lr": (3e-4, 3e-2), "forget": _FORGET},
            {"lr": 3e-3, "forget": 0.1},
        ),
        Contestant(
            "shampoo",
            "Shampoo",
            "second-order",
            _shampoo,
            {"lr": (3e-4, 3e-2), "forget": _FORGET},
            {"lr": 3e-3, "forget": 0.1},
            "pytorch_optimizer",
        ),
        Contestant(
            "kfac",
            "K-FAC",
            "second-order",
            _kfac,
            {"lr": (1e-3, 3e-1), "damping": (1e-2, 10.0)},
            {"lr": 1e-2, "damping": 1.0},
            "singd",
        ),
        Contestant("soap", "SOAP", "second-order", _soap, _SOAP, {"lr": 3e-3, "forget": 0.05}, "pytorch_optimizer"),
        Contestant("locoprop-s", "LocoProp-S", "LocoProp", _locoprop("squared"), _LOCAL, _DEMO_S, usual_full=_NOTEBOOK),
        Contestant(
            "locoprop-m", "LocoProp-M", "LocoProp", _locoprop("matching"), _LOCAL, _DEMO_M, usual_full=_NOTEBOOK
        ),
        Contestant(
            "locoprop-m-rows32",
            "LocoProp-M, 32 rows",
            "LocoProp",
            _locoprop("matching", 32),
            _LOCAL,
            _DEMO_M,
            usual_full=_NOTEBOOK,
        ),
    )
}


def contestant_of(name: str, protocol: Protocol) -> Contestant:
    """A contestant of the autoencoder, with the usual values of this protocol."""
    one = AUTOENCODER[name]
    return replace(one, usual=one.usual_full) if one.usual_full and protocol is FULL else one


def checked(names: list[str] | None, protocol: Protocol) -> list[Contestant]:
    """The contestants of the autoencoder with these names; all if ``names`` is ``None``.

    Raises:
        ValueError: an unknown name, or one whose library is missing; says which there are, or how to install it.
    """
    for name in names or ():
        if name not in AUTOENCODER:
            raise ValueError(f"--optimisers must be among {', '.join(AUTOENCODER)}; got {name!r}")
    chosen = [contestant_of(name, protocol) for name in (names or AUTOENCODER)]
    missing = [contestant for contestant in chosen if importlib.util.find_spec(contestant.library) is None]
    if missing:
        labels = ", ".join(contestant.name for contestant in missing)
        libraries = ", ".join(sorted({contestant.library for contestant in missing}))
        raise ValueError(
            f"{labels} of --optimisers cannot run, as {libraries} is not installed: "
            'pip install -c constraints.txt -e ".[paper]"'
        )
    return chosen

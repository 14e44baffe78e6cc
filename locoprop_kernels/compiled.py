"""All local steps of some layers as one operator of torch, ``locoprop::local_steps_``, for functions that are compiled.

:func:`locoprop_kernels.local_steps_` takes Python objects, which no operator can. :class:`LocalSteps` turns those that
do not change from step to step into text, once, and hands the operator tensors, that text and the seed. So a compiled
graph has all that it needs in it, where the number of an object in a table would mean something in this process only.
The optimiser and :func:`locoprop_kernels.local_steps_` do not go through the operator, and do not pay for it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from locoprop_kernels import rules, transfers
from locoprop_kernels.arguments import check_choice
from locoprop_kernels.problem import LocalProblem, accumulation_dtype, initial_state
from locoprop_kernels.settings import Settings
from locoprop_kernels.steps import BACKENDS, local_steps_
from locoprop_kernels.transfers import Transfer

__all__ = ["LocalSteps"]

_RULES: dict[str, Any] = {rule.__name__: rule for rule in (rules.SGD, rules.RMSprop, rules.Adam, rules.Adagrad)}


class LocalSteps:
    """All local steps of some layers, as an operator that ``torch.compile(fullgraph=True)`` takes.

    Args:
        layers: the transfer function of each layer, in order.
        rule: name of an update rule, or an instance of one of :mod:`locoprop_kernels.rules`.
        prox: proximal coefficient ``λ >= 0``.
        reduction: ``"mean"`` or ``"sum"``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.
        compute_dtype: dtype of the products' operands; ``None`` for the parameters'.
        rows: rows of the batch in a local step; ``None`` for all.

    Raises:
        TypeError, ValueError: an argument is out of range, as for :func:`locoprop_kernels.local_steps_`; or the rule is
            one of your own, of which a compiled graph could keep no more than a name.
    """

    def __init__(
        self,
        layers: Sequence[str | Transfer],
        rule: str | rules.Rule = "rmsprop",
        prox: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        rows: int | None = None,
    ) -> None:
        rule = rules.get(rule)
        if type(rule) not in _RULES.values():
            raise ValueError(f"rule must be one of {', '.join(_RULES)} to be part of a compiled graph, got {rule!r}")
        check_choice("backend", backend, BACKENDS)
        settings = Settings.checked(rule, [0.0], prox, reduction, compute_dtype, False, None, rows)
        functions = [transfers.get(layer) for layer in layers]
        self.rule = rule
        self._recipe = json.dumps(
            {
                "transfers": [(function.name, function.parameters) for function in functions],
                "rule": (type(rule).__name__, asdict(rule)),  # type: ignore[call-overload]
                "prox": settings.prox,
                "reduction": reduction,
                "backend": backend,
                "compute_dtype": None if compute_dtype is None else str(compute_dtype).removeprefix("torch."),
                "rows": settings.rows,
            }
        )

    def initial_state(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The rule's state before the first step: its slots for each parameter, one after another."""
        return [value for p in parameters for value in initial_state(self.rule, p.detach()).values()]

    def __call__(
        self,
        x: list[Tensor],
        preactivation: list[Tensor],
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: list[Tensor],
        lr: Tensor,
        rows_seed: int = 0,
    ) -> Tensor:
        """Run ``T = len(lr)`` local steps, and update ``parameters`` and ``state`` in place: all of it or nothing.

        Args:
            x: the input of each layer, ``[B, K]``.
            preactivation: ``A0`` of each layer, ``[B, N]``.
            parameters: the weight ``[N, K]`` of each layer, followed by its bias ``[N]`` if it has one.
            gradients: ``γ`` times the gradient of each parameter.
            state: as :meth:`initial_state` has made it.
            lr: learning rate of each local step, ``[T]``; on the CPU, so that nobody waits for a device, and a tensor,
                so that a schedule does not compile anew.
            rows_seed: which rows the local steps take; another one in each step.

        Returns:
            Whether everything was finite, so that it was written: a bool tensor ``[]``.

        Raises:
            TypeError, ValueError: naming what does not fit, before anything is changed.
        """
        # No gradient goes through the local steps. Switched off, gradients would stay so if a compiled step raises.
        read = (_detached(tensors) for tensors in (x, preactivation, parameters, gradients))
        return _operator(*read, state, lr, rows_seed, self._recipe)


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


@torch.library.custom_op("locoprop::local_steps_", mutates_args=("parameters", "state"))
def _operator(
    x: list[Tensor],
    preactivation: list[Tensor],
    parameters: list[Tensor],
    gradients: list[Tensor],
    state: list[Tensor],
    lr: Tensor,
    rows_seed: int,
    recipe: str,
) -> Tensor:
    made = _read(recipe)
    rule, functions = made["rule"], made["transfers"]
    layers = _layers(parameters, gradients, state, rule)
    if not len(layers) == len(functions) == len(x) == len(preactivation):
        raise ValueError(
            f"x, preactivation and the weights in parameters must be those of {len(functions)} layers, "
            f"got {len(x)}, {len(preactivation)} and {len(layers)}"
        )
    problems = [
        LocalProblem(x=rows, preactivation=a, transfer=function, **layer)
        for rows, a, function, layer in zip(x, preactivation, functions, layers, strict=True)
    ]
    options = {name: made[name] for name in ("prox", "reduction", "backend", "compute_dtype", "rows")}
    return local_steps_(problems, rule, lr.tolist(), rows_seed=rows_seed, **options).finite.clone()


@_operator.register_fake
def _(x: list[Tensor], preactivation: list[Tensor], parameters: list[Tensor], *_: Any) -> Tensor:
    return parameters[0].new_empty((), dtype=torch.bool)


@lru_cache(maxsize=256)
def _read(recipe: str) -> dict[str, Any]:
    """What a text of :class:`LocalSteps` says."""
    made = json.loads(recipe)
    name, values = made["rule"]
    dtype = made["compute_dtype"]
    return {
        **made,
        "rule": _RULES[name](**values),
        "transfers": [Transfer(function, tuple(numbers)) for function, numbers in made["transfers"]],
        "compute_dtype": None if dtype is None else getattr(torch, dtype),
    }


def _layers(
    parameters: list[Tensor], gradients: list[Tensor], state: list[Tensor], rule: rules.Rule
) -> list[dict[str, Any]]:
    """The parameters, gradients and state of each layer, as arguments of a :class:`LocalProblem`."""
    slots = [*rule.slots, *(["step"] if rule.counts_steps else [])]
    if len(gradients) != len(parameters) or len(state) != len(slots) * len(parameters):
        raise ValueError(
            f"gradients and state must have {len(parameters)} and {len(slots) * len(parameters)} tensors for as many "
            f"parameters, got {len(gradients)} and {len(state)}"
        )
    values = iter(state)
    layers: list[dict[str, Any]] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        kind = "bias" if parameter.dim() == 1 else "weight"
        if kind == "weight":
            layers.append({"state": {}})
        elif not layers or "bias" in layers[-1]:
            raise ValueError("parameters must have a bias [N] only behind the weight [N, K] of its layer")
        layers[-1].update({kind: parameter, f"grad_{kind}": gradient})
        own = {slot: next(values) for slot in slots}
        for slot, value in own.items():
            _check_kept(slot, value, parameter)
        layers[-1]["state"][kind] = own
    return layers


def _check_kept(slot: str, value: Tensor, parameter: Tensor) -> None:
    """Check that a tensor of the state need not be converted, as then not itself would be updated."""
    dtype = value.dtype if slot == "step" else accumulation_dtype(parameter.dtype)
    if value.dtype is not dtype or value.device != parameter.device:
        raise ValueError(
            f"state must be as initial_state makes it: {slot!r} of a parameter of shape {list(parameter.shape)} "
            f"in {dtype} on {parameter.device}, got {value.dtype} on {value.device}"
        )

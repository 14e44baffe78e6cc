"""What processes must agree in before a step: settings, layers, hyper-parameters, weights and gradients.

They exchange a few numbers that stand for all of it. Only where these differ, or where a process has found an error,
texts are sent, so that all processes raise the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from locoprop_kernels import cpu_kernels, routes
from locoprop_kernels.problem import PARAMETER_DTYPES
from locoprop_torch import checkpoints
from locoprop_torch.auxiliary import own_groups
from locoprop_torch.sharding import is_sharded
from locoprop_torch.wire import Wire

if TYPE_CHECKING:
    from locoprop_torch.optimizer import LocoProp

__all__ = ["agree", "raise_alike"]

# So many elements of each tensor stand for it: replicas that have drifted apart differ nearly everywhere.
_SAMPLES = 1024


def agree(wire: Wire, optimizer: LocoProp, numbers: Sequence[int], error: Exception | None) -> list[list[int]]:
    """Make sure that all processes are about to make the same step.

    Args:
        wire: the processes.
        optimizer: the optimiser.
        numbers: what every process is to know of this one.
        error: what it has found.

    Returns:
        The ``numbers`` of every process.

    Raises:
        ValueError: on all processes alike.
    """
    facts: dict[str, str] = {}
    weights = gradients = torch.zeros((), dtype=torch.int64, device="cpu")
    if error is None:
        try:
            facts = _facts(optimizer)
            weights, gradients = _replica(optimizer)
        except Exception as raised:
            error = raised
    own = [int(error is not None), _digest(facts), _digest(numbers), len(numbers)]
    header = [*(torch.tensor(number, device=wire.device) for number in own), weights.to(wire.device), gradients]
    found = wire.numbers(torch.stack([number.to(wire.device) for number in header]))
    failed, settings, described, lengths, models, slopes = map(list, zip(*found, strict=True))
    if any(failed):
        raise_alike(wire, error)
    if len(set(settings)) > 1:
        _settle(wire, optimizer, facts)
    if len(set(models)) > 1:
        raise ValueError(
            "the weights differ between the processes: every process must start with the same ones and take part in "
            "every step, as in DistributedDataParallel, which sends those of process 0 to all; where processors or "
            "numbers of threads differ, so may the last bits of a step"
        )
    if len(set(slopes)) > 1:
        raise ValueError(
            "the gradients differ between the processes, so they were not averaged: wrap the model in "
            "DistributedDataParallel, call the wrapper, and let the last backward pass before a step be outside of "
            "no_sync(); to train another model in each process, wrap it with a process group that has this process "
            "alone"
        )
    if len(set(described)) == 1:
        return [list(numbers)] * wire.size
    padded = [*numbers, *([0] * (max(lengths) - len(numbers)))]
    return [some[:length] for some, length in zip(wire.numbers(padded), lengths, strict=True)]


def raise_alike(wire: Wire, error: Exception | None) -> NoReturn:
    """Raise on all processes what some of them have found; all of them must come here.

    Raises:
        ValueError: with the first message.
    """
    texts = wire.objects(None if error is None else f"{type(error).__name__}: {error}")
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
    raise ValueError(f"process {rank} of {wire.size} could not make the step: {text}") from error


def _settle(wire: Wire, optimizer: LocoProp, facts: Mapping[str, str]) -> None:
    """Refuse settings that differ; of routes that differ, take that of the first process."""
    everything = wire.objects(dict(facts))
    first = everything[0]
    for rank, other in enumerate(everything):
        for name in {**first, **other}:
            if name != "products" and first.get(name) != other.get(name):
                raise ValueError(
                    f"all processes must agree in {name}, got {first.get(name, 'nothing')} in process 0 and "
                    f"{other.get(name, 'nothing')} in process {rank}"
                )
    for operands, by in zip(_operands(optimizer), first["products"].split(), strict=True):
        routes.adopt(operands, by)


def _facts(optimizer: LocoProp) -> dict[str, str]:
    """What must be the same in all processes, as text."""
    names = ("local_loss", "reduction", "rows", "rows_seed", "compute_dtype", "trace", "backend", "shard_state")
    facts = {name: str(getattr(optimizer, name)) for name in names}
    facts["output_gradient"] = repr(optimizer.output_gradient)
    facts["layers"] = ", ".join(optimizer._layers)
    for name, layer in optimizer._layers.items():
        facts[f"layer {name!r}"] = "; ".join(_described(kind, p) for kind, p in layer.parameters.items())
    for i, group in enumerate(own_groups(optimizer.param_groups)):
        values = [f"{key}={float(group[key]):.17g}" for key in ("lr", "prox", "weight_decay")]
        values.append(f"activation_lr={group['activation_lr']!r}")
        values.append(f"local_iterations={group['local_iterations']}")
        own = checkpoints.facts(optimizer, group, group["local_iterations"])
        values += [f"{key}={own[key]}" for key in ("rule", "lr_decay", "transfers")]
        facts[f"parameter group {i}"] = ", ".join(values)
    facts["regulariser"] = "one" if optimizer.regulariser is not None else "none"
    facts["aux"] = "none" if optimizer.aux is None else f"{type(optimizer.aux).__name__} {_numbers(optimizer.aux)}"
    # Compiled loops have other last bits than PyTorch's.
    facts["numba"] = str(cpu_kernels.version())
    facts["products"] = " ".join(routes.route(operands) for operands in _operands(optimizer))
    return facts


def _described(kind: str, parameter: Tensor) -> str:
    gradient = parameter.grad if parameter.requires_grad else None
    brought = "" if gradient is None else f", with a gradient in {gradient.layout}"
    return f"{kind} {list(parameter.shape)} {parameter.dtype}{brought}"


def _numbers(aux: Any) -> str:
    """The hyper-parameters of another optimiser."""
    return "; ".join(
        ", ".join(f"{key}={float(v) if isinstance(v, Tensor) else v}" for key, v in group.items() if key != "params")
        for group in aux.param_groups
    )


def _operands(optimizer: LocoProp) -> list[torch.dtype]:
    """The dtypes of products whose route may differ between processes: those on CPUs."""
    weights = [layer.weight for layer in optimizer._layers.values()]
    found = {optimizer.compute_dtype or weight.dtype for weight in weights if weight.device.type == "cpu"}
    if torch.float8_e4m3fn in found:  # has one route itself, and bfloat16 may take its place
        found.add(torch.bfloat16)
    return [dtype for dtype in PARAMETER_DTYPES if dtype in found]


def _replica(optimizer: LocoProp) -> tuple[Tensor, Tensor]:
    """Two numbers that stand for the weights and for their gradients, on their device."""
    parameters = [p for layer in optimizer._layers.values() for p in layer.parameters.values() if not is_sharded(p)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A step refuses others than dense ones.
    return _mixed(parameters), _mixed([grad for grad in gradients if grad.layout == torch.strided])


def _mixed(tensors: Iterable[Tensor]) -> Tensor:
    """A number that is another one, most likely, if an element of the samples is."""
    samples = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // _SAMPLES)].double())
    if not samples:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    # NaNs have many bit patterns.
    bits = torch.nan_to_num(torch.cat(samples), nan=0.5).view(torch.int64)
    factors = torch.arange(1, 2 * len(bits), 2, device=bits.device) * 0x9E3779B97F4A7C15
    return (bits * factors).sum()


def _digest(value: Any) -> int:
    """A number that stands for a text, the same in every process."""
    found = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)

"""The PyPI package ``locoprop``, by another author."""

from __future__ import annotations

from torch import nn

from bench.contestants.contestant import Contestant, Entry, Parameters, has_package
from bench.contestants.execution import with_tf32
from bench.work import Work

__all__ = ["contestants"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "identity": nn.Identity}


def contestants() -> list[Contestant]:
    """The package, in float32: it has no other precision."""
    return [Contestant("package", _build, has_package, tolerance=1e-3)]


def _build(work: Work) -> Entry:
    from locoprop import LocopropTrainer

    trained = work.trained(work.model())
    network = _network(work, trained)
    trainer = LocopropTrainer(network, work.loss, local_iterations=work.case.iterations, correction=0.0)

    def run() -> None:
        network.zero_grad()
        trainer.step(work.x, work.y)

    def parameters() -> Parameters:
        return [(module.weight, module.bias) for module in trained]

    return Entry(with_tf32(run, False), parameters)


def _network(work: Work, trained: list[nn.Linear | nn.Conv2d]) -> nn.Sequential:
    """The layers with the package's own around them, which know the transfer function of their local problem."""
    from locoprop import LocoLayer

    layers: list[nn.Module] = []
    for module, name, local in zip(trained, work.names, work.local_names, strict=True):
        last = module is trained[-1]
        if work.x.dim() == 4 and isinstance(module, nn.Linear):
            layers.append(nn.Flatten())
        layers.append(LocoLayer(module, _ACTIVATIONS[local](), implicit=last))
        if local != name and not last:
            layers.append(_ACTIVATIONS[name]())
    return nn.Sequential(*layers)

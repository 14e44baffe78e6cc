"""Ablations: LocoProp-M with its chosen values, and one thing changed at a time; nothing is searched again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from bench import textbook
from bench.autoencoder.compare import SUBJECT
from bench.autoencoder.context import Context
from bench.autoencoder.optimisers import Values, contestant_of
from bench.autoencoder.runs import Plan, remembered, run
from bench.autoencoder.search import chosen
from bench.autoencoder.tasks import Autoencoder
from locoprop_kernels import rules
from locoprop_torch import LocoProp
from locoprop_torch.rates import local_rates

__all__ = ["precisions", "study", "variants"]

SEED = 0
#: Textbook and increment form take bench.textbook's rule and γ.
_LR, _ITERATIONS = 2e-5, 10

_ABOUT = """LocoProp-M with its chosen values at the top of each panel, and one thing changed below it. There is one
seed, and nothing is searched again: a variant with another best learning rate is at a disadvantage. The last panel
compares textbook and increment form with the rule of the PyPI package, at a constant learning rate."""

Variant = tuple[str, Values]


def variants(values: Values, squared: Values) -> dict[str, list[Variant]]:
    """What is changed, by question: names and hyper-parameters. The first of each has the chosen values.

    Args:
        values: chosen for LocoProp-M.
        squared: chosen for LocoProp-S.
    """
    lr, gamma = values["lr"], values["gamma"]

    def of(**changes: Any) -> Values:
        return {**values, **changes}

    def rule(rule: rules.Rule, factor: float) -> Values:
        return of(rule=rule, lr=factor * lr)

    return {
        "local iterations": [(f"T = {t}", of(local_iterations=t) if t != 10 else values) for t in (10, 1, 2, 5, 20)],
        "rows per local step": [("all", values), *((str(rows), of(rows=rows)) for rows in (50, 32, 8))],
        "γ": [(f"{gamma * by:.3g}", of(gamma=gamma * by) if by != 1 else values) for by in (1, 0.1, 0.3, 3)],
        "proximal term": [("λ = 0", values), *((f"λ = {prox:g}", of(prox=prox)) for prox in (1.0, 10.0, 100.0))],
        "local loss": [
            ("matching", values),
            ("squared, same values", of(local_loss="squared")),
            ("squared, its own values", {**squared, "local_loss": "squared"}),
        ],
        "target": [("dual", values), ("primal in hidden layers", of(target="primal"))],
        "inner rule, lr × factor": [
            ("RMSProp with momentum", values),
            *((f"RMSProp × {by}", rule(rules.RMSprop(momentum=0.0), by)) for by in (10, 30)),
            *((f"Adam × {by}", rule(rules.Adam(), by)) for by in (10, 30)),
            *((f"AdaGrad × {by}", rule(rules.Adagrad(), by)) for by in (30, 100)),
        ],
    }


def study(context: Context, task: Autoencoder) -> dict[str, Any]:
    """The final train loss of every variant on one seed."""
    subject = f"{context.protocol.name} {SUBJECT}"
    two = (contestant_of(name, context.protocol) for name in ("locoprop-m", "locoprop-s"))
    values, squared = (chosen(context.chosen, subject, one) for one in two)
    questions = variants(values, squared)
    groups = {
        question: [{"label": label, "train_loss": _loss(context, task, changed)} for label, changed in rows]
        for question, rows in questions.items()
    }
    # The textbook form has no ReLU.
    if task.activation == "tanh":
        groups["arithmetic of the products"] = precisions(context, task)
    epochs = context.protocol.ablation_epochs
    return {
        "title": f"LocoProp-M on {task.images.name}, train loss after {epochs} epochs",
        "about": _ABOUT,
        "groups": groups,
    }


def _loss(context: Context, task: Autoencoder, values: Values) -> float | None:
    protocol, contestant = context.protocol, contestant_of("locoprop-m", context.protocol)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return contestant.optimiser(model, _with_targets(model, values), protocol)

    facts = {name: value if isinstance(value, int | float | str) else repr(value) for name, value in values.items()}
    plan = Plan("ablation", make, contestant.name, facts, SEED, protocol.ablation_epochs, min(1, protocol.warm_up))
    with context.bar("ablation", plan.epochs) as advance:
        history = run(plan, task, context.out / "runs", context.clock, context.deadline, advance)
    return _finite(history.final())


def _with_targets(model: nn.Module, values: Values) -> Values:
    """A target by name for every hidden layer: the last transfer function is in the loss, which takes the dual one."""
    if "target" not in values:
        return values
    hidden = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "logits"]
    return {**values, "target": dict.fromkeys(hidden, values["target"])}


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def precisions(context: Context, task: Autoencoder) -> list[dict[str, Any]]:
    """Train loss with textbook and increment form, for each dtype of the products' operands."""
    epochs, rows = context.protocol.ablation_epochs, []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for form, train in (("increment", _increment), ("textbook", _textbook)):
            name = f"{form}-{str(dtype).removeprefix('torch.')}"

            def measure(name: str = name, train: Any = train, dtype: torch.dtype = dtype) -> float:
                context.deadline.check()
                with context.bar(f"arithmetic: {name}", epochs) as advance:
                    return train(task, dtype, epochs, advance)

            facts = {**task.facts(), "epochs": epochs, "seed": SEED}
            path = context.out / "runs" / f"precision-{name}-{task.images.name}.json"
            rows.append({"label": name.replace("-", ", "), "train_loss": remembered(path, facts, measure)})
    return rows


def _increment(task: Autoencoder, dtype: torch.dtype, epochs: int, advance: Any) -> float:
    model = task.network(SEED).to(task.device)
    optimizer = LocoProp(
        model,
        lr=_LR,
        activation_lr=textbook.ACTIVATION_LR,
        local_iterations=_ITERATIONS,
        rule=rules.RMSprop(alpha=textbook.ALPHA, momentum=textbook.MOMENTUM, eps=textbook.EPS),
        transfers={"logits": "sigmoid"},
        reduction="mean",
        compute_dtype=dtype,
    )
    for epoch in range(epochs):
        for x, y in task.batches(SEED, epoch):
            optimizer.zero_grad()
            task.loss(model, x, y).backward()
            optimizer.step()
        advance()
    return task.evaluate(model)["train_loss"]


@torch.no_grad()
def _textbook(task: Autoencoder, dtype: torch.dtype, epochs: int, advance: Any) -> float:
    model = task.network(SEED).to(task.device)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    states = [textbook.LayerState.of(layer.weight, layer.bias) for layer in layers]
    names = [_transfer(task, name) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    rates = torch.tensor(local_rates(_LR, _ITERATIONS), device=task.device)
    for epoch in range(epochs):
        for x, y in task.batches(SEED, epoch):
            textbook.training_step(states, names, names, x, y, rates, dtype)
        advance()
    for layer, state in zip(layers, states, strict=True):
        layer.weight.copy_(state.weight)
        layer.bias.copy_(state.bias)
    return task.evaluate(model)["train_loss"]


def _transfer(task: Autoencoder, name: str) -> str:
    """The transfer function behind a layer of the autoencoder."""
    return {"logits": "sigmoid", "code": "identity"}.get(name, task.activation)

"""Beyond the paper: a convnet and a GPT on characters, with the same training time and the same search for everyone.

How many steps fit the time is measured once for each optimiser and kept with its chosen values, so that a rerun takes
the same steps.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench import device
from bench.autoencoder import search
from bench.autoencoder.context import Context
from bench.autoencoder.data import Images, load, load_labels
from bench.autoencoder.networks import GPT, convnet
from bench.autoencoder.optimisers import Contestant, Values
from bench.autoencoder.protocol import Protocol
from bench.autoencoder.runs import Plan, run
from locoprop_kernels import rules
from locoprop_torch import LocoProp

__all__ = ["CONTESTANTS", "Convnet", "Text", "study", "text_of"]

#: How often a run is evaluated.
_POINTS = 8
_CONTEXT_LENGTH = 64
_MODULES = ("argparse", "dataclasses", "inspect", "typing")
_AUX_LR = 3e-3


class Batch(NamedTuple):
    """Inputs and targets."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Convnet:
    """A classifier of images; an epoch is ``count`` batches. See :class:`bench.autoencoder.runs.Task`."""

    images: Images
    labels: tuple[Tensor, Tensor]
    count: int
    batch_size: int = 100

    @property
    def device(self) -> torch.device:
        return self.images.train.device

    def facts(self) -> dict[str, Any]:
        return {
            "data": self.images.name,
            "digest": self.images.digest,
            "steps": self.count,
            "batch_size": self.batch_size,
        }

    def network(self, seed: int) -> nn.Module:
        return convnet(seed)

    def steps(self) -> int:
        return self.count

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for _ in range(self.count):
            places = torch.randint(len(self.images.train), (self.batch_size,), generator=generator).to(self.device)
            yield self.images.train[places], self.labels[0][places]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        train, test = (model(part) for part in (self.images.train, self.images.test))
        return {
            "train_loss": F.cross_entropy(train, self.labels[0]).item(),
            "test_loss": F.cross_entropy(test, self.labels[1]).item(),
            "accuracy": (test.argmax(1) == self.labels[1]).float().mean().item(),
        }

    def samples(self, model: nn.Module) -> str:
        return ""


@dataclass(frozen=True)
class Text:
    """The next character of a text; the last tenth is the test. See :class:`bench.autoencoder.runs.Task`.

    Attributes:
        tokens: indices ``[length]`` of the characters.
        vocabulary: how many different ones there are.
        digest: of the text.
        count: batches of an epoch.
        batch_size: windows of a batch.
    """

    tokens: Tensor
    vocabulary: int
    digest: str
    count: int
    batch_size: int = 16

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def facts(self) -> dict[str, Any]:
        return {"digest": self.digest, "steps": self.count, "batch_size": self.batch_size, "context": _CONTEXT_LENGTH}

    def network(self, seed: int) -> nn.Module:
        return GPT(self.vocabulary, _CONTEXT_LENGTH, seed)

    def steps(self) -> int:
        return self.count

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        train = self.tokens[: self._border]
        for _ in range(self.count):
            yield self._windows(train, self.batch_size, generator)

    @property
    def _border(self) -> int:
        return len(self.tokens) * 9 // 10

    def _windows(self, tokens: Tensor, count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(tokens) - _CONTEXT_LENGTH - 1, (count, 1), generator=generator)
        windows = tokens[(starts + torch.arange(_CONTEXT_LENGTH + 1)).to(self.device)]
        return Batch(windows[:, :-1], windows[:, 1:])

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy in nats per character."""
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        parts = {"train_loss": self.tokens[: self._border], "test_loss": self.tokens[self._border :]}
        generator = torch.Generator().manual_seed(0)
        return {name: self.loss(model, *self._windows(part, 64, generator)).item() for name, part in parts.items()}

    def samples(self, model: nn.Module) -> str:
        return ""


def text_of(path: Path | None) -> str:
    """A text to learn: a file's, or that of a few modules of Python's library.

    Raises:
        ValueError: the file is missing, is not UTF-8, or too short.
    """
    if path is None:
        files = [Path(str(importlib.import_module(name).__file__)) for name in _MODULES]
        return "".join(file.read_text(encoding="utf-8") for file in files)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {path} cannot be read: {error}") from error
    if len(text) < 20 * (_CONTEXT_LENGTH + 2):
        raise ValueError(f"--text must have at least {20 * (_CONTEXT_LENGTH + 2)} characters, {path} has {len(text)}")
    return text


def _tokens(text: str, where: torch.device) -> Text:
    alphabet = {letter: i for i, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[letter] for letter in text], device=where)
    return Text(tokens, len(alphabet), hashlib.sha256(text.encode()).hexdigest()[:16], count=1)


def _adamw(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=values["lr"], betas=(1 - values["forget"], 0.99), weight_decay=0.01)


def _soap(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    return importlib.import_module("pytorch_optimizer").SOAP(
        model.parameters(),
        lr=values["lr"],
        betas=(1 - values["forget"], 0.95),
        weight_decay=0.01,
        precondition_frequency=protocol.interval,
    )


def _muon(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    """Muon on hidden matrices, AdamW on embeddings, the last layer and vectors, as its authors do."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hidden = {id(layer.weight) for layer in layers[:-1]}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in hidden) == use], "lr": values[lr], "use_muon": use}
        for use, lr in ((True, "lr"), (False, "lr_adamw"))
    ]
    return importlib.import_module("pytorch_optimizer").Muon(groups)


def _locoprop(model: nn.Module, values: Values, protocol: Protocol) -> Optimizer:
    """LocoProp-M on linear and convolutional layers, AdamW on the rest."""
    others = [p for m in model.modules() if isinstance(m, nn.Embedding | nn.LayerNorm) for p in m.parameters()]
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return LocoProp(
        model,
        lr=values["lr"],
        activation_lr=values["gamma"],
        local_iterations=5,
        rule=rules.Adam(betas=(0.9, 0.99)),
        local_loss="matching",
        transfers={last: "softmax"},
        prox=0.0,
        reduction="mean",
        aux=torch.optim.AdamW(others, lr=_AUX_LR) if others else None,
        rows=64,
    )


_PAIR = {"lr": (3e-4, 3e-2), "forget": (0.02, 0.5)}
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("adamw", "AdamW", "first-order", _adamw, _PAIR, {"lr": 3e-3, "forget": 0.1}),
        Contestant("soap", "SOAP", "second-order", _soap, _PAIR, {"lr": 3e-3, "forget": 0.05}, "pytorch_optimizer"),
        Contestant(
            "muon",
            "Muon",
            "second-order",
            _muon,
            {"lr": (3e-3, 1e-1), "lr_adamw": (3e-4, 3e-2)},
            {"lr": 2e-2, "lr_adamw": 3e-3},
            "pytorch_optimizer",
        ),
        Contestant(
            "locoprop-m",
            "LocoProp-M, 64 rows",
            "LocoProp",
            _locoprop,
            {"lr": (1e-4, 1e-2), "gamma": (10.0, 1000.0)},
            {"lr": 1e-3, "gamma": 100.0},
        ),
    )
}


def study(
    context: Context, sources: Sequence[str], text: Path | None, where: torch.device, trials: int | None
) -> dict[str, Any]:
    """Both tasks; the convnet only where some data have labels.

    Raises:
        ValueError: missing or corrupt data, or a missing library.
    """
    learnt = text_of(text)
    tasks: dict[str, tuple[str, Convnet | Text]] = {}
    labelled = [source for source in sources if source != "curves"][-1:]
    for source in labelled:
        images = load(source, context.protocol).to(where)
        labels = load_labels(source, context.protocol)
        tasks[f"convnet on {images.name}"] = ("convnet", Convnet(images, (labels[0].to(where), labels[1].to(where)), 1))
    name = text.name if text else f"Python {platform.python_version()}"
    tasks[f"GPT on characters of {name}"] = ("gpt", _tokens(learnt, where))
    found = {title: _contest(context, subject, task, trials) for title, (subject, task) in tasks.items()}
    searched = search.about(context.chosen, f"{context.protocol.name} gpt", list(CONTESTANTS))
    seconds = f"{context.protocol.beyond_seconds:g} s of the {context.clock} clock"
    clock = f"Everyone trains for {seconds}, in steps that a measurement beforehand has fitted to it."
    return {
        "about": f"{clock} LocoProp-M takes five local steps of Adam on 64 rows. {searched}",
        "tasks": found,
    }


def _contest(context: Context, subject: str, task: Convnet | Text, trials: int | None) -> dict[str, Any]:
    key = f"{context.protocol.name} {subject}"
    found = {}
    for contestant in CONTESTANTS.values():
        if importlib.util.find_spec(contestant.library) is None:
            continue
        counted = replace(task, count=_count(context, key, task, contestant))
        if trials:
            _tune(context, key, counted, contestant, trials)
        values = search.chosen(context.chosen, key, contestant)
        histories = [_run(context, subject, counted, contestant, values, seed) for seed in context.seeds]
        found[contestant.name] = {
            "label": contestant.label,
            "kind": contestant.kind,
            "values": values,
            "steps": counted.count * _POINTS,
            "runs": [{"seed": seed, **_without_facts(one)} for seed, one in zip(context.seeds, histories, strict=True)],
        }
    return found


def _without_facts(history: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(history).items() if name != "facts"}


def _count(context: Context, key: str, task: Convnet | Text, contestant: Contestant) -> int:
    """Steps between two evaluations that fit the time: what is remembered, or what is measured now."""
    known = search.steps_of(context.chosen, key, contestant) or search.steps_of(
        context.out / "steps.json", key, contestant
    )
    if known:
        return known
    model = task.network(0).to(task.device)
    optimizer = contestant.optimiser(model, contestant.usual, context.protocol)
    batch = next(task.batches(0, 0))

    def steps() -> None:
        for _ in range(context.protocol.interval):
            optimizer.zero_grad()
            task.loss(model, *batch).backward()
            optimizer.step()

    steps()
    seconds = min(device.clock(steps, task.device, by=context.clock) for _ in range(2)) / context.protocol.interval
    count = max(1, int(context.protocol.beyond_seconds / seconds / _POINTS))
    search.remember(context.out / "steps.json", key, {contestant.name: {"steps": count}})
    return count


def _tune(context: Context, key: str, task: Convnet | Text, contestant: Contestant, trials: int) -> None:
    def objective(values: Values, number: int) -> float:
        return _run(context, f"search-{number}-{key.split()[-1]}", task, contestant, values, context.search_seed).final(
            "test_loss"
        )

    found = search.search(contestant, trials, context.out / "search.log", key, objective)
    about = {"searched_on": key, "epochs": _POINTS, "seed": context.search_seed, "steps": task.count}
    search.remember(context.chosen, key, {contestant.name: {**found, **about}})


def _run(context: Context, label: str, task: Convnet | Text, contestant: Contestant, values: Values, seed: int) -> Any:
    def make(model: nn.Module) -> Optimizer:
        return contestant.optimiser(model, values, context.protocol)

    plan = Plan(label, make, contestant.name, values, seed, _POINTS, 1)
    with context.bar(f"{label} {contestant.label}, seed {seed}", _POINTS) as advance:
        return run(plan, task, context.out / "runs", context.clock, context.deadline, advance)

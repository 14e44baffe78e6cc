"""The search of hyper-parameters: the same number of trials for every optimiser, kept in a file, and continued from it.

The first trial has the usual values; the others come from optuna's TPE. Each trial's sampler has a seed of its own, so
that a search that was interrupted ends like one that was not.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.autoencoder.optimisers import Contestant
from bench.autoencoder.runs import write

__all__ = ["CHOSEN", "about", "chosen", "remember", "search", "steps_of"]

#: The chosen values of every search that is in the repository.
CHOSEN = Path(__file__).parent / "chosen.json"
#: What a diverged trial counts as: TPE takes finite numbers.
_WORST = 1e30

Chosen = dict[str, Any]


def search(
    contestant: Contestant, trials: int, path: Path, subject: str, objective: Callable[[dict[str, float], int], float]
) -> Chosen:
    """The best values after ``trials`` trials, those that ``path`` has among them.

    Args:
        contestant: whose hyper-parameters are searched.
        trials: how many there shall be.
        path: optuna's journal of all studies.
        subject: what is trained; with the contestant's name it is the study's.
        objective: what to make small, from values and the number of the trial; infinite or not a number if it diverged.

    Returns:
        ``values``, their ``loss``, and all ``trials`` as pairs of values and loss.

    Raises:
        ValueError: optuna is missing, or ``path`` cannot be read.
    """
    optuna = _optuna()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        study = optuna.create_study(
            storage=storage, study_name=f"{subject} {contestant.name}", load_if_exists=True, direction="minimize"
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: optuna cannot read this journal ({error}); remove it to search again: rm {path}"
        ) from error
    space = {
        name: optuna.distributions.FloatDistribution(low, high, log=True)
        for name, (low, high) in contestant.space.items()
    }
    complete = optuna.trial.TrialState.COMPLETE
    for trial in study.get_trials(deepcopy=False):
        # An earlier process was interrupted in it.
        if not trial.state.is_finished():
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    while (done := len(study.get_trials(states=(complete,)))) < trials:
        study.sampler = optuna.samplers.TPESampler(seed=done, n_startup_trials=max(2, trials // 3))
        if done == 0:
            study.enqueue_trial(contestant.usual)
        trial = study.ask(space)
        loss = objective(dict(trial.params), done)
        study.tell(trial, loss if math.isfinite(loss) else _WORST)
    return _summary(study.get_trials(states=(complete,))[:trials])


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError(
            f'--search cannot run, as {error.name} is not installed: pip install -c constraints.txt -e ".[paper]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _summary(trials: list[Any]) -> Chosen:
    best = min(trials, key=lambda trial: trial.value)
    rows = [[trial.params, trial.value if trial.value < _WORST else None] for trial in trials]
    return {"values": best.params, "loss": best.value, "trials": rows}


def chosen(path: Path, subject: str, contestant: Contestant) -> dict[str, float]:
    """The chosen values of a contestant for a subject, or its usual ones where nobody has searched."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    entry = entries.get(subject, {}).get(contestant.name)
    return dict(entry["values"] if entry else contestant.usual)


def steps_of(path: Path, subject: str, contestant: Contestant) -> int | None:
    """How many steps between two evaluations a contestant takes, if ``path`` says so."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    steps = entries.get(subject, {}).get(contestant.name, {}).get("steps")
    return None if steps is None else int(steps)


def about(path: Path, subject: str, names: list[str]) -> str:
    """A sentence on how the values of these contestants were chosen."""
    entries = json.loads(path.read_text(encoding="utf-8")).get(subject, {}) if path.is_file() else {}
    counts = sorted({len(entries[name]["trials"]) for name in names if name in entries})
    where = sorted(
        {f"{entries[name]['searched_on']}, {entries[name]['epochs']} epochs" for name in names if name in entries}
    )
    usual = [name for name in names if name not in entries]
    sentences = []
    if counts:
        trials = " or ".join(map(str, counts))
        sentences.append(
            f"Hyper-parameters: best of {trials} trials for each optimiser ({'; '.join(where)}, another seed)."
        )
    if usual:
        sentences.append(f"Usual values, not searched: {', '.join(usual)}.")
    return " ".join(sentences)


def remember(path: Path, subject: str, found: Mapping[str, Chosen]) -> None:
    """Put what a search has found into ``path``, beside what it has of other subjects and optimisers."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    entries.setdefault(subject, {}).update(found)
    write(path, json.dumps(entries, indent=1) + "\n")

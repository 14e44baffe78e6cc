"""The study of defaults: settings are read or refused, runs are repeatable and never run twice, ratios are right."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench.defaults import __main__ as command
from bench.defaults import configurations, results, training
from bench.defaults.data import load
from bench.defaults.report import summaries
from bench.defaults.tasks import TASKS
from locoprop_torch import LocoProp

WITHOUT_FILES = [task for task in TASKS if not TASKS[task].needs_file]


def record(task, configuration, seed, test, train=1.0):
    return {"task": task, "configuration": configuration, "seed": seed, "test": test, "train": train, "seconds": 2.0}


def test_alternatives_stand_for_every_combination():
    names = configurations.expand(["adam", "T=3|5,kappa=0.5", "kappa=0.5,T=3", "library"])
    assert names[0] == "adam"
    assert names[1:3] == [f"rule=adam,lr=0.001,kappa=0.5,T={t},rows=32" for t in (3, 5)]
    assert len(names) == 4
    assert "lr=" in names[3]
    assert [configurations.Settings.parsed(name).name for name in names[1:3]] == names[1:3]


@pytest.mark.parametrize(
    ("text", "message"), [("speed=3", "'speed=3'"), ("T=a", "T must be of type int"), ("decay=no", "decay must be one")]
)
def test_what_is_no_setting_is_refused_by_name(text, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        configurations.expand([text])
    assert command.main(["run", text, "--out", str(tmp_path / "runs.jsonl")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_every_task_takes_a_step_with_both_optimisers(name):
    for configuration in ("adam", "rule=adam,T=2,rows=8"):
        found = training.run(name, configuration, seed=0, quick=True)
        assert math.isfinite(found["test"]), configuration
        assert found["skipped"] == 0
    assert found["steps"] == len(found["test_losses"]) == training.EVALUATIONS


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_a_task_knows_what_its_loss_averages_over(name):
    """The gradient is that of the same loss as a sum, divided by the number of terms."""
    task = TASKS[name]
    x, y, *_ = load(task.data)
    torch.manual_seed(0)
    output = task.model()(x[: task.batch]).detach().requires_grad_()
    targets = y[: task.batch].flatten() if task.data == "text" else y[: task.batch]
    task.loss(output, targets).backward()
    again = output.detach().clone().requires_grad_()
    of_examples = {"_tokens": F.cross_entropy, "_summed_over_pixels": F.binary_cross_entropy_with_logits}
    loss: Any = getattr(task.loss, "func", task.loss)
    of_examples.get(loss.__name__, loss)(again, targets, reduction="sum").backward()
    torch.testing.assert_close(output.grad * task.terms, again.grad)


@pytest.mark.parametrize("unit", ["max", "layers", "norm", "element", "peak"])
def test_a_measured_unit_is_that_of_the_first_gradient(unit):
    task = TASKS["digits-relu-b128"]
    torch.manual_seed(0)
    model = task.model()
    opt = configurations.made(f"unit={unit},kappa=3", task, model)
    assert isinstance(opt, LocoProp)
    probe = training._OutputGradient(opt)
    x, y, *_ = load(task.data)
    output = model(x[: task.batch])
    output.retain_grad()
    task.loss(output, y[: task.batch]).backward()
    rows = output.grad.double()
    sizes = {"max": rows.abs().amax(1), "norm": rows.norm(dim=1), "element": rows.flatten(), "peak": rows.abs().amax()}
    size = 3 * sizes["max"] if unit == "layers" else sizes[unit]
    expected = size.square().mean().sqrt().item()
    measured = probe.measured()
    assert measured["rows"] == task.batch
    assert measured[unit] == pytest.approx(expected, rel=1e-6)
    training._scale(opt, unit, measured)
    assert opt.param_groups[0]["activation_lr"] == pytest.approx(3 / expected, rel=1e-6)


def test_runs_are_continued_and_reported(tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "cancer-bce", "mnist-relu-b32", "--out", str(out)]
    settings = ["run", "adam", "T=2|3", "--quick", *arguments]
    assert command.main(settings) == 0
    assert "left out without --mnist: mnist-relu-b32" in capsys.readouterr().err
    lines = out.read_text().splitlines()
    assert [json.loads(line)["configuration"] for line in lines] == configurations.expand(["adam", "T=2|3"])
    # As if it had been stopped while it wrote the last one.
    out.write_text("\n".join([*lines[:2], lines[2][:20]]))
    assert command.main(settings) == 0
    again = results.read(out)
    last = json.loads(lines[2])
    assert {**again[results.key_of(last)], "seconds": 0} == {**last, "seconds": 0}
    assert len(again) == 3
    before = out.read_text()
    monkeypatch.setattr(command, "run", None)
    assert command.main(settings) == 0
    assert out.read_text() == before
    plot = tmp_path / "plot.png"
    pytest.importorskip("matplotlib")
    assert command.main(["report", "--by-task", "--units", "--plot", str(plot), *arguments]) == 0
    assert "T=3" in capsys.readouterr().out
    assert plot.stat().st_size > 0


def test_ratios_are_of_the_means_over_common_seeds():
    adam = [record("a", "adam", 0, 1.0), record("a", "adam", 1, 3.0), record("b", "adam", 0, 2.0)]
    ours = [
        record("a", "T=1", 0, 1.0),
        record("a", "T=1", 1, 1.0),
        record("a", "T=1", 2, 9.0),
        record("b", "T=1", 0, 4),
    ]
    (found,) = summaries(adam + ours)
    assert found.ratios == {"a": 0.5, "b": 2.0}
    assert found.spread == {"a": pytest.approx(2 / 3), "b": 0}
    assert (found.seeds, found.as_good, found.worst, found.seconds) == (1, 1, "b", 1)
    assert found.geometric_mean == pytest.approx(1)
    (diverged,) = summaries([*adam, record("a", "T=1", 0, math.nan)])
    assert diverged.ratios == {"a": math.inf}
    assert diverged.geometric_mean == pytest.approx(10)

"""Comparisons after equal time and equal steps: their arithmetic; a stopped run goes on to the same bits."""

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import progress  # noqa: E402
from bench.autoencoder.runs import Deadline  # noqa: E402
from bench.equal_time import __main__ as command  # noqa: E402
from bench.equal_time.contestants import CONTESTANTS, QUICK, Problem  # noqa: E402
from bench.equal_time.training import Run  # noqa: E402
from locoprop_torch.demo.data import curves_tensors  # noqa: E402

STEPS = {"locoprop": 0.02, "rmsprop": 0.01, "adam": 0.01, "defaults": 0.02}


@pytest.fixture(scope="module")
def problem():
    return Problem(QUICK, *curves_tensors(0, 200), "curves")


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, problem, tmp_path):
    values, never = CONTESTANTS[name].grid[0], Deadline()
    whole = Run(name, values, seed=1)
    whole.train(problem, 6, tmp_path / "whole", never)
    for steps in (1, 4, 4, 6):
        Run(name, values, seed=1).resumed(tmp_path / "parts").train(problem, steps, tmp_path / "parts", never)
    parts = Run(name, values, seed=1).resumed(tmp_path / "parts")
    assert parts.steps == whole.steps == [0, 2, 4, 6]
    assert parts.train_loss == whole.train_loss
    assert parts.test_loss == whole.test_loss
    # Between writing the checkpoint and the losses.
    file = tmp_path / "parts" / f"{whole.label}.json"
    stopped = json.loads(file.read_text())
    for curve in ("steps", "train_loss", "test_loss"):
        del stopped[curve][-1]
    file.write_text(json.dumps(stopped))
    again = Run(name, values, seed=1).resumed(tmp_path / "parts")
    again.train(problem, 6, tmp_path / "parts", never)
    assert (again.steps, again.train_loss) == (whole.steps, whole.train_loss)


def test_losses_are_interpolated_between_evaluations():
    run = Run("adam", {"lr": 1e-3}, steps=[0, 2, 4], train_loss=[8.0, 4.0, 3.0], test_loss=[9.0, 5.0, 4.0])
    assert run.loss_after(1) == 6.0
    assert run.loss_after(3, "test_loss") == 4.5
    assert run.loss_after(4) == 3.0
    assert run.loss_after(4.1) == math.inf
    run.train_loss[-1] = None
    assert run.diverged
    assert run.loss_after(1) == math.inf


def test_quick_run_and_its_report(tmp_path, capsys):
    arguments = ["--quick", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        command.main(["train", *arguments])
    assert "step_seconds.json is missing" in capsys.readouterr().err
    assert command.main(["measure", *arguments]) == 0
    measured = json.loads((tmp_path / "step_seconds.json").read_text())
    assert set(measured["seconds"]) == set(STEPS)
    assert all(0 < one["min"] <= one["p50"] for one in measured["seconds"].values())
    # Times that do not depend on the machine.
    measured["seconds"] = {name: {"p50": seconds, "min": seconds} for name, seconds in STEPS.items()}
    (tmp_path / "step_seconds.json").write_text(json.dumps(measured))
    assert command.main(["train", *arguments, "--minutes", "0"]) == command.UNFINISHED
    assert command.main(["train", *arguments]) == 0
    assert command.main(["report", *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "curves.png").stat().st_size > 5000
    for name, found in results["contestants"].items():
        assert [at["steps"] for at in found["at"].values()] == [round(t / STEPS[name]) for t in QUICK.seconds]
        after_first = {json.dumps(run["values"]): run["train_loss"][1] for run in found["runs"]}
        assert after_first[json.dumps(found["best"])] == min(after_first.values())
    assert "LocoProp-M, 32 rows" in capsys.readouterr().out


def test_progress_trains_what_is_missing(tmp_path, capsys):
    arguments = ["--images", "200", "--epochs", "1", "--out", str(tmp_path), "--seeds"]
    assert progress.main([*arguments, "0"]) == 0
    first = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert progress.main([*arguments, "0", "1"]) == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert runs[:2] == first
    assert [(run["seed"], run["rows"]) for run in runs] == [
        (seed, rows) for seed in (0, 1) for rows in ("all rows", "32 rows")
    ]
    assert "ratio" in capsys.readouterr().out

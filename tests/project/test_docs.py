"""The guide: every Python block of its pages and of the README runs; its figures and its numbers are up to date."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.autoencoder import compare
from bench.defaults.configurations import library_name
from tests.processes.pool import free_port

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment on the line before a block, <!-- skip-test: reason -->, exempts it.
BLOCK = re.compile(r"^(<!-- skip-test: .+ -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def loader(batches=2, examples=32):
    """What the pages call ``loader``: flat images in [0, 1] and their labels."""
    return [(torch.rand(examples, 784), torch.randint(10, (examples,))) for _ in range(batches)]


@pytest.fixture
def launched(monkeypatch):
    """What torchrun tells each process, to the only one there is."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, monkeypatch, tmp_path):
    """The blocks of a page share their names, like the cells of a notebook."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page", "torch": torch, "nn": nn, "loader": loader()}
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        skipped, code = match.groups()
        no_triton = re.search(r"\btriton\b", code) and importlib.util.find_spec("triton") is None
        if skipped is None and not no_triton:
            line = text.count("\n", 0, match.start(2))
            exec(compile("\n" * line + code, str(page), "exec"), names)


def test_no_block_escapes():
    """A block that the pattern does not see would never be run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == len(re.findall(r"^\s*```\s*(?:python|py)\b", text, re.MULTILINE)), page


def tree():
    """Every file and folder of the project, as ``/path/from/its/root``; folders end with a slash."""
    tops = [ROOT / name for name in ("bench", "docs", "examples", "locoprop_kernels", "python", "tests")]
    return [
        f"/{path.relative_to(ROOT).as_posix()}{'/' if path.is_dir() else ''}"
        for path in (*tops, *(path for top in tops for path in top.rglob("*")))
    ]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Files and folders go by their path or the end of it: ``kernels/plan.py``, ``device/``."""
    named = set(re.findall(r"(?<![\w/.*])([\w/]+\.py|[a-z_/]+/)(?=[`\s,)])", page.read_text(encoding="utf-8")))
    found = tree()
    made_by_make = {"bench_out/", "demo_out/", "site/"}
    assert not [name for name in named - made_by_make if not any(path.endswith(f"/{name}") for path in found)]


def test_names_in_the_life_of_a_step_exist():
    """Functions, classes and values go by the names that they have in the code."""
    page = (ROOT / "docs/life-of-a-step.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    named = {part for name in re.findall(r"`([A-Za-z_][\w.]*)`", prose) for part in re.split(r"\.(?!py\b)", name)}
    names = {name for name in named if not name.endswith(".py")}
    files = (path for top in ("locoprop_kernels", "python") for path in (ROOT / top).rglob("*.py"))
    known = {word for path in files for word in [path.stem, *re.findall(r"\w+", path.read_text(encoding="utf-8"))]}
    assert len(names) > 50
    assert not names - known


def test_figures_are_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs/figures.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/figures").iterdir()}
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w.]+)\)", page.read_text(encoding="utf-8"))}
    assert drawn == shown


def test_accuracy_table_is_the_measured_one():
    """The tables in precision.md and in the README, from bench/results/accuracy.json."""
    page = (ROOT / "docs/precision.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in json.loads((ROOT / "bench/results/accuracy.json").read_text())["rows"]:
        errors = f"{row['textbook_form']:.1e} | {row['increment_form']:.1e}"
        assert f"| {row['K']} → {row['N']} | {row['operands']} | {errors} |" in page
        assert row["K"] != 1000 or f"| {row['operands']} | {errors} |" in readme


def test_training_table_is_the_measured_one():
    """The table in precision.md, from bench/results/mnist_two_epochs."""
    page = (ROOT / "docs/precision.md").read_text(encoding="utf-8")
    for dtype in ("float32", "bfloat16"):
        results = json.loads((ROOT / f"bench/results/mnist_two_epochs/{dtype}/results.json").read_text())
        run = results["methods"]["LocoProp-M"]
        losses = [*run["train_loss"], run["test_loss"][-1]]
        assert f"| {dtype} | {' | '.join(f'{loss:.2f}' for loss in losses)} |" in page


def test_experiments_table_is_the_measured_one():
    """The table in experiments.md and its statements, from bench/results/autoencoder; the picture is the report's."""
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    folder = ROOT / "bench/results/autoencoder"
    blocks = json.loads((folder / "results.json").read_text(encoding="utf-8"))["compare"]
    for name in blocks["mnist, tanh"]["entries"]:
        entries = [block["entries"][name] for block in blocks.values()]
        figures = [f"{compare.final_loss(one):.1f} | {compare.epoch_seconds(one):.2f}" for one in entries]
        assert f"| {entries[0]['label']} | {' | '.join(figures)} |" in page
    words = {True: "yes", False: "no"}
    for i, one in enumerate(blocks["mnist, tanh"]["statements"]):
        holds = [words[block["statements"][i]["holds"]] for block in blocks.values()]
        assert f"| {one['text']} | {' | '.join(holds)} |" in page
    entries, longer = (blocks["mnist, tanh"][part] for part in ("entries", "longer"))
    ours, soap, rmsprop = (compare.final_loss(entries[name]) for name in ("locoprop-m", "soap", "rmsprop"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"lowest at equal epochs ({ours:.1f}; SOAP {soap:.1f}, RMSProp {rmsprop:.1f})" in readme
    assert f"at equal time RMSProp does ({compare.final_loss(longer['rmsprop']):.1f})" in readme
    picture = (ROOT / "docs/paper_curves.png").read_bytes()
    assert picture == (folder / "curves-mnist-tanh.png").read_bytes()


def test_table_of_the_defaults_is_the_measured_one():
    """The first column of bench/results/defaults/README.md is that of the defaults that the library has."""
    folder = ROOT / "bench/results/defaults"
    page = (folder / "README.md").read_text(encoding="utf-8")
    losses: dict[tuple[str, str], list[float]] = {}
    for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        losses.setdefault((run["task"], run["configuration"]), []).append(run["test"])
    ours = library_name()
    ratios = {}
    for task in {task for task, _ in losses}:
        assert len(losses[task, ours]) == len(losses[task, "adam"]) == 3
        ratios[task] = sum(losses[task, ours]) / sum(losses[task, "adam"])
        assert f"| {task} | {ratios[task]:.3f} ±" in page
    good = sum(ratio <= 1 for ratio in ratios.values())
    assert f"| as good as Adam | {good} of {len(ratios)} |" in page
    assert f"| worst | {max(ratios.values()):.3f} |" in page
    assert good >= 0.9 * len(ratios)


def test_progress_with_few_rows_is_the_measured_one():
    """The table of bench/results/progress, and the ratios in hyperparameters.md; none is above 1.05."""
    folder = ROOT / "bench/results/progress"
    page = (folder / "README.md").read_text(encoding="utf-8")
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
    last = {(run["seed"], run["rows"]): run["train_loss"][-1] for run in runs}
    ratios = []
    for seed in range(3):
        whole, few = last[seed, "all rows"], last[seed, "32 rows"]
        ratios.append(few / whole)
        assert f"| {seed} | {whole:.2f} | {few:.2f} | {few / whole:.3f} |" in page
    assert max(ratios) <= 1.05
    guide = " ".join((ROOT / "docs/hyperparameters.md").read_text(encoding="utf-8").split())
    assert "with 32 of 200 rows is {:.3f}, {:.3f} and {:.3f} times".format(*ratios) in guide


def test_table_at_equal_time_is_the_measured_one():
    """The table of bench/results/equal_time_mnist, and the bound below it."""
    folder = ROOT / "bench/results/equal_time_mnist"
    page = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    ours, theirs = (
        [results["contestants"][name]["at"][seconds]["train_loss"] for seconds in ("60", "120", "300")]
        for name in ("locoprop", "rmsprop")
    )
    for losses in (ours, theirs):
        assert "| {:.2f} | {:.2f} | {:.2f} |".format(*losses) in page
    assert "| ratio | {:.2f} | {:.2f} | {:.2f} |".format(*(a / b for a, b in zip(ours, theirs, strict=True))) in page
    words, floor = " ".join(page.split()), results["data"]["lower_bound"]
    assert f"below {floor:.2f}," in words
    assert f"after five minutes is {0.8 * theirs[2]:.2f}." in words
    shares = [(mine - floor) / (other - floor) for mine, other in zip(ours, theirs, strict=True)]
    assert "has {:.2f} of RMSProp's after two minutes, and {:.2f} after five".format(*shares[1:]) in words
    (default,), (adam, *_) = (results["contestants"][name]["runs"] for name in ("defaults", "adam"))
    assert adam["values"] == {"lr": 1e-3}
    by_step = [dict(zip(run["steps"], run["train_loss"], strict=True)) for run in (default, adam)]
    after = [[losses[steps] for losses in by_step] for steps in (200, 400, 600, 800)]
    for label, values in (
        ("`LocoProp(model)`", [ours for ours, _ in after]),
        ("Adam", [theirs for _, theirs in after]),
        ("ratio", [ours / theirs for ours, theirs in after]),
    ):
        assert f"| {label} | {' | '.join(f'{value:.2f}' for value in values)} |" in page


def test_readme_quotes_its_results():
    """Final train losses of the demo and of MNIST, and the ratios to the PyPI package."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def final(folder, method):
        results = json.loads((ROOT / f"bench/results/{folder}/results.json").read_text())
        return f"{results['methods'][method]['final']['train_loss']:.1f}"

    same_epochs = [final("demo_curves", method) for method in ("LocoProp-M", "RMSProp", "Adam")]
    assert "LocoProp-M ends at {}, RMSProp at {}, Adam at {}.".format(*same_epochs) in readme
    methods = ("LocoProp-M, 32 rows", "RMSProp", "Adam", "LocoProp-M")
    same_time = [final("demo_equal_time", method) for method in methods]
    words = "LocoProp-M on 32 of 200 rows has reached {}, RMSProp {}, Adam {} and LocoProp-M on all rows {}:"
    assert words.format(*same_time) in readme
    mnist = [final("mnist_two_epochs/float32", method) for method in ("LocoProp-M", "Adam")]
    assert "bring LocoProp-M to {} and Adam to {}".format(*mnist) in readme


def test_speed_table_is_the_measured_one():
    """The table in the README, from bench/results/cpu_two_threads: times as fast as the PyPI package."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cases = json.loads((ROOT / "bench/results/cpu_two_threads/bench.json").read_text())["cases"]
    rows = {
        "paper": "the paper's autoencoder, LocoProp-M",
        "paper-s": "the same, LocoProp-S",
        "width-x2": "twice as wide",
        "depth-16": "sixteen layers",
        "batch-100": "100 examples",
        "batch-3000": "3000 examples",
        "T-50": "50 local iterations",
        "convnet-B128": "a convnet, 128 images of 32 × 32",
    }
    for case, label in rows.items():
        facts = [cases[case]["contestants"][f"ours-{precision}"] for precision in ("fp32", "bf16")]
        assert f"| {label} | {' | '.join(format(one['speedup']['package']['p50'], '.1f') for one in facts)} |" in readme
    readme = " ".join(readme.split())
    adam, ours = (cases["paper"]["contestants"][name]["seconds"]["p50"] for name in ("adam-fused", "ours-fp32"))
    assert f"{1e3 * adam:.0f} ms, one of LocoProp-M {1e3 * ours:.0f}" in readme


def test_speed_of_few_rows_is_the_measured_one():
    """The paragraph in the README, from bench/results/cpu_few_rows and cpu_few_rows_intel."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    cases = json.loads((ROOT / "bench/results/cpu_few_rows/bench.json").read_text())["cases"]

    def speedups(case, *names):
        return tuple(f"{cases[case]['contestants'][name]['speedup']['package']['p50']:.1f}" for name in names)

    def milliseconds(case, *names):
        return tuple(1e3 * cases[case]["contestants"][name]["seconds"]["p50"] for name in names)

    matching, squared = (speedups(case, "ours-fp32", "ours-bf16") for case in ("paper", "paper-s"))
    words = "LocoProp-M is {} and {} times as fast as the package, and LocoProp-S {} and {}"
    assert words.format(*matching, *squared) in readme
    assert "would be {} times as fast as the package in float32".format(*speedups("paper", "floor-fp32")) in readme
    ours, adam = milliseconds("paper-rows", "ours-fp32", "adam")
    assert f"takes {ours:.0f} ms where one of Adam takes {adam:.0f} ({ours / adam:.1f} times)" in readme
    ours, adam = milliseconds("classifier-rows", "ours-fp32", "adam")
    assert f"{ours:.1f} ms where Adam takes {adam:.1f} ({ours / adam:.1f} times)" in readme
    pytorch = [milliseconds(case, "ours-reference-fp32")[0] for case in ("paper-rows", "classifier-rows")]
    assert "through PyTorch {:.0f} and {:.1f} ms".format(*pytorch) in readme
    cases = json.loads((ROOT / "bench/results/cpu_few_rows_intel/bench.json").read_text())["cases"]
    ours, adam = milliseconds("paper-rows", "ours-fp32", "adam")
    assert f"{ours:.0f} ms where Adam takes {adam:.0f} ({ours / adam:.1f} times)" in readme
    ours, adam = milliseconds("classifier-rows", "ours-fp32", "adam")
    assert f"{ours:.1f} where Adam takes {adam:.1f} ({ours / adam:.1f} times)" in readme
    matching, squared = (speedups(case, "ours-fp32", "ours-bf16") for case in ("paper", "paper-s"))
    assert words.format(*matching, *squared) in readme
    floors = [speedups(case, "floor-fp32")[0] for case in ("paper", "paper-s")]
    assert "would be {} and {} times as fast in float32".format(*floors) in readme


def test_tuning_table_is_the_measured_one():
    """The table in hyperparameters.md, from bench/results/demo_tuning.json."""
    page = (ROOT / "docs/hyperparameters.md").read_text(encoding="utf-8")
    trials = json.loads((ROOT / "bench/results/demo_tuning.json").read_text())["trials"]
    for method, gammas in (("LocoProp-M", (3.0, 5.0, 10.0)), ("LocoProp-S", (5.0, 10.0, 20.0))):
        losses = {(trial["lr"], trial["activation_lr"]): trial["train_loss"] for trial in trials[method]}
        rows = [f"| {method}, `lr` | " + " | ".join(f"`γ = {gamma:g}`" for gamma in gammas) + " |", "|---|---|---|---|"]
        for lr in (5e-5, 1e-4, 2e-4):
            rows.append(f"| {lr:g} | " + " | ".join(f"{losses[lr, gamma]:.1f}" for gamma in gammas) + " |")
        assert "\n".join(rows) in page


def test_memory_table_is_the_measured_one():
    """The table in training.md, from bench/results/memory.json."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench/results/memory.json").read_text(encoding="utf-8"))["rows"]
    for optimizer in {row["optimizer"] for row in rows}:
        figures = [f"{row['peak_mib']:.0f}" for row in rows if row["optimizer"] == optimizer]
        assert f"| {optimizer} | {' | '.join(figures)} |" in text

"""The guide: every Python block of its pages and of the README runs; its figures and its numbers are up to date."""

import importlib.util
import json
import re
import runpy
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.autoencoder import compare
from bench.defaults.configurations import library_name
from locoprop_kernels.devices import DEVICES
from locoprop_kernels.kernels.configs import for_rows
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


def test_table_of_most_rows_is_that_of_the_configurations():
    """The table in kernels.md: how many rows of a local step the rows driver takes, by operands and GPU."""
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    targets = dict.fromkeys(device.target for device in DEVICES)
    names = {"bf16": "bfloat16", "tf32": "TF32", "ieee": "float32, all bits", "fp16": "float16"}
    for precision, name in names.items():
        most = {target: max((one.b for one in for_rows(target, precision)), default=0) for target in targets}
        ((usual, _),) = Counter(most.values()).most_common(1)
        others = ", ".join(f"{rows or 'none'} on {target}" for target, rows in most.items() if rows != usual)
        assert f"\n| {name} | {usual or 'none'} |{f' {others}' if others else ''} |\n" in page


def test_words_are_explained_once():
    """But for those with several meanings, which have a table of their own as well."""
    one, several = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").split("## Words with several meanings")
    for part in (one, several):
        found = re.findall(r"^\| (?!word \|)([^|]+) \|", part, re.MULTILINE)
        assert len(found) > 10
        assert not [word for word, count in Counter(found).items() if count > 1]


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
    mean = statistics.geometric_mean(ratios.values())
    assert f"| geometric mean | {mean:.3f} |" in page
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    words = "had at most Adam's test loss in {} of {} small settings, and {:.2f} of it in the geometric mean"
    assert words.format(good, len(ratios), mean) in readme
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
    """Final train losses of the demo and of MNIST, and what its advice on when to use the library rests on."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = " ".join(page.split())

    def final(folder, method):
        results = json.loads((ROOT / f"bench/results/{folder}/results.json").read_text())
        return f"{results['methods'][method]['final']['train_loss']:.1f}"

    labels = {
        "LocoProp-M, 32 rows": "LocoProp-M, local steps on 32 of 200 rows",
        "LocoProp-M": "LocoProp-M, all rows",
        "RMSProp": "RMSProp",
        "Adam": "Adam",
    }
    for method, label in labels.items():
        assert f"\n| {label} | {final('demo_curves', method)} | {final('demo_equal_time', method)} |\n" in page
    mnist = [final("mnist_two_epochs/float32", method) for method in ("LocoProp-M", "Adam")]
    assert "bring LocoProp-M to {} and Adam to {}".format(*mnist) in readme

    equal_time = json.loads((ROOT / "bench/results/equal_time_mnist/results.json").read_text(encoding="utf-8"))
    ours, theirs = (
        [equal_time["contestants"][name]["at"][seconds]["train_loss"] for seconds in ("60", "120", "300")]
        for name in ("locoprop", "rmsprop")
    )
    ratios = (a / b for a, b in zip(ours, theirs, strict=True))
    assert "the train loss is {:.2f}, {:.2f} and {:.2f} times that of RMSProp".format(*ratios) in readme
    (default,), (adam, *_) = (equal_time["contestants"][name]["runs"] for name in ("defaults", "adam"))
    by_step = [dict(zip(run["steps"], run["train_loss"], strict=True)) for run in (default, adam)]
    early, late = (by_step[0][steps] / by_step[1][steps] for steps in (200, 800))
    assert (
        f"they have {early:.2f} times the train loss of Adam's defaults after 200 steps, and {late:.2f} times" in readme
    )
    autoencoder = json.loads((ROOT / "bench/results/autoencoder/results.json").read_text(encoding="utf-8"))
    assert autoencoder["config"]["protocol"]["beyond_seconds"] == 2
    (gpt,) = (task for name, task in autoencoder["beyond"]["tasks"].items() if name.startswith("GPT"))
    losses = {name: statistics.median(last_test_losses(one)) for name, one in gpt.items()}
    own = losses.pop("locoprop-m")
    words = "after two seconds of each a small one has a test loss of {:.2f}, where AdamW, SOAP and Muon have {:.2f} to"
    assert f"{words.format(own, min(losses.values()))} {max(losses.values()):.2f}" in readme


def last_test_losses(entry):
    """Of each run of a contestant."""
    return [run["curves"]["test_loss"][-1] for run in entry["runs"]]


ON_ZEN_5, ON_ZEN_4, ON_EMERALD_RAPIDS = "cpu_two_threads", "cpu_few_rows", "cpu_few_rows_intel"


def contestants(folder, case):
    """What each contestant of a case took, by its name."""
    results = json.loads((ROOT / f"bench/results/{folder}/bench.json").read_text(encoding="utf-8"))
    return results["cases"][case]["contestants"]


def speedup(folder, case, name):
    """How many times as fast as the PyPI package a contestant is, as the README says it."""
    return f"{contestants(folder, case)[name]['speedup']['package']['p50']:.1f}"


def milliseconds(folder, case, name):
    return 1e3 * contestants(folder, case)[name]["seconds"]["p50"]


def tables_of(section):
    """The tables of a section of the README: for each, its rows as text, without the two lines of its head."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [table.splitlines()[2:] for table in tables]


def test_speed_table_is_the_measured_one():
    """Two tables in the README, times as fast as the PyPI package: on three processors, and by sizes on one."""
    _, processors, sizes = tables_of("How fast it is")
    contestants_by_label = {
        "float32": "ours-fp32",
        "bfloat16": "ours-bf16",
        "products alone, float32": "floor-fp32",
    }
    assert processors == [
        f"| {method}, {label} | "
        + " | ".join(speedup(folder, case, name) for folder in (ON_ZEN_5, ON_ZEN_4, ON_EMERALD_RAPIDS))
        + " |"
        for method, case in (("LocoProp-M", "paper"), ("LocoProp-S", "paper-s"))
        for label, name in contestants_by_label.items()
    ]
    cases = {
        "width-x2": "twice as wide",
        "depth-16": "sixteen layers",
        "batch-100": "100 examples",
        "batch-3000": "3000 examples",
        "T-50": "50 local iterations",
        "convnet-B128": "a convnet, 128 images of 32 × 32",
    }
    assert sizes == [
        f"| {label} | {speedup(ON_ZEN_5, case, 'ours-fp32')} | {speedup(ON_ZEN_5, case, 'ours-bf16')} |"
        for case, label in cases.items()
    ]


def test_speed_of_few_rows_is_the_measured_one():
    """The table in the README of a step beside one of Adam: on all rows, and on few."""
    steps, *_ = tables_of("How fast it is")
    ours, adam = (milliseconds(ON_ZEN_5, "paper", name) for name in ("ours-fp32", "adam-fused"))
    expected = [
        f"| the paper's autoencoder, all rows | Zen 5 | {ours:.0f} ms | | {adam:.0f} ms (fused) | {ours / adam:.1f} |"
    ]
    networks = {"paper-rows": "the paper's autoencoder", "classifier-rows": "784-256-256-10, 128 examples"}
    for case, network in networks.items():
        digits = 0 if case == "paper-rows" else 1
        for processor, folder in (("Zen 4", ON_ZEN_4), ("Emerald Rapids", ON_EMERALD_RAPIDS)):
            names = ("ours-fp32", "ours-reference-fp32", "adam")
            ours, pytorch, adam = (milliseconds(folder, case, name) for name in names)
            figures = [f"{figure:.{digits}f} ms" for figure in (ours, pytorch, adam)]
            expected.append(f"| {network}, `rows=32` | {processor} | {' | '.join(figures)} | {ours / adam:.1f} |")
    assert steps == expected


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

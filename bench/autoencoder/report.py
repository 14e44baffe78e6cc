"""The report: one HTML file that needs no other, the PNG files that are in it, and the table in the terminal."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from bench.autoencoder import pictures
from bench.autoencoder.compare import Entry, epoch_seconds, final_loss, median_curve, spread, thresholds, time_to
from bench.autoencoder.runs import write

__all__ = ["show", "write_report"]

_HEADS = (
    "train loss",
    "range",
    "test loss",
    "train error",
    "test error",
    "s / epoch",
    "of which optimiser",
    "peak MiB",
    "state MiB",
    "values",
)


def _number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "diverged"


def _row(entry: Entry) -> list[str]:
    low, _, high = (part[-1] for part in spread(entry))
    names = ("train_loss", "test_loss", "train_error", "test_error")
    losses = {name: final_loss(entry, name) for name in names}
    share = epoch_seconds(entry, "optimiser") / epoch_seconds(entry)
    return [
        entry["label"],
        _number(losses["train_loss"]),
        f"{_number(low)} – {_number(high)}",
        _number(losses["test_loss"]),
        _number(losses["train_error"], 2),
        _number(losses["test_error"], 2),
        f"{epoch_seconds(entry):.3g}",
        f"{100 * share:.0f} %",
        f"{entry['peak_mib']:.1f}",
        f"{entry['state_mib']:.1f}",
        _values(entry),
    ]


def _values(entry: Entry) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in entry["values"].items())


def _by_loss(entries: dict[str, Entry]) -> list[Entry]:
    return sorted(entries.values(), key=final_loss)


def _everyone(block: dict[str, Any]) -> dict[str, Entry]:
    """Those of a comparison, and those that were trained for longer."""
    return {**block["entries"], **{f"{name}, longer": entry for name, entry in block["longer"].items()}}


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the comparisons and of the statements."""
    for title, block in results["compare"].items():
        table = Table("optimiser", *_HEADS[:-1], title=title)
        for entry in _by_loss(_everyone(block)):
            table.add_row(*_row(entry)[:-1])
        console.print(table)
        for one in block["statements"]:
            console.print(f"{_word(one)}: {one['text']} {one['evidence']}", highlight=False)


def write_report(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures and write ``report.html``; returns all files."""
    files: list[Path] = []

    def embedded(path: Path) -> str:
        files.append(path)
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    parts = {
        "config": results["config"],
        "environment": results["environment"],
        "comparisons": [
            _comparison(title, block, results["config"], folder, embedded)
            for title, block in results["compare"].items()
        ],
        "ablations": _ablations(results.get("ablations"), folder, embedded),
        "method": _method(results.get("method"), folder, embedded),
        "beyond": _beyond(results.get("beyond"), folder, embedded),
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    write(folder / "report.html", page.get_template("report.html.j2").render(parts))
    write(folder / "README.md", _summary(parts))
    return [folder / "report.html", folder / "README.md", *files]


def _summary(parts: dict[str, Any]) -> str:
    """The tables and the statements in Markdown."""
    config, environment = parts["config"], parts["environment"]
    threads = environment["device"].get("threads")
    lines = [
        "# The paper's experiments",
        "",
        f"`{config['command']}`, {environment['device']['name']}{f', {threads} thread(s)' if threads else ''}; "
        f"protocol *{config['protocol']['name']}*, seeds {', '.join(map(str, config['seeds']))}. {config['search']}",
        f"[`report.html`](report.html) has everything; times are of the {config['clock']} clock and of training alone.",
    ]
    for block in parts["comparisons"]:
        lines += ["", f"## {block['title']}", "", *_markdown(("optimiser", *block["heads"][:-1]), block["rows"])]
        heads = ("seconds until the train loss is", *(f"≤ {loss}" for loss in block["thresholds"]))
        lines += ["", *_markdown(heads, block["times"]), ""]
        lines += [f"* {_word(one).capitalize()}: {one['text']} ({one['evidence']})" for one in block["statements"]]
    for task in parts["beyond"]["tasks"] if parts["beyond"] else ():
        lines += ["", f"## {task['title']}", "", *_markdown(("optimiser", *task["heads"]), task["rows"])]
    return "\n".join(lines) + "\n"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; ``rows`` may be longer than ``heads``."""
    width = len(heads)
    return [f"| {' | '.join(row[:width])} |" for row in (heads, ["---"] * width, *rows)]


def _word(statement: dict[str, Any]) -> str:
    return {None: "not tried", True: "holds", False: "does not hold"}[statement["holds"]]


def _comparison(
    title: str, block: dict[str, Any], config: dict[str, Any], folder: Path, embedded: Any
) -> dict[str, Any]:
    entries, everyone = block["entries"], _everyone(block)
    stem = title.replace(", ", "-").replace(" ", "-")
    losses = thresholds(entries)
    drawn = pictures.curves(entries, f"Deep autoencoder on {title}", config["clock"], folder / f"curves-{stem}.png")
    images = pictures.reconstructions(
        entries, block["images"], f"Test images of {title}", folder / f"images-{stem}.png"
    )
    return {
        "title": title,
        "curves": embedded(drawn),
        "reconstructions": embedded(images),
        "heads": _HEADS,
        "rows": [_row(entry) for entry in _by_loss(everyone)],
        "thresholds": losses,
        "times": [[entry["label"], *(_time(entry, loss) for loss in losses)] for entry in _by_loss(everyone)],
        "statements": block["statements"],
    }


def _time(entry: Entry, loss: float) -> str:
    found = time_to(entry, loss)
    return "–" if found is None else f"{found:.3g}"


def _ablations(found: dict[str, Any] | None, folder: Path, embedded: Any) -> dict[str, Any] | None:
    if not found:
        return None
    return {**found, "picture": embedded(pictures.ablations(found["groups"], found["title"], folder / "ablations.png"))}


def _method(found: dict[str, Any] | None, folder: Path, embedded: Any) -> dict[str, Any] | None:
    if not found:
        return None
    return {
        "about": found["about"],
        "cosines": embedded(pictures.cosines(found["closed_form"], folder / "cosines.png")),
        "traces": embedded(pictures.traces(found["traces"], found["title"], folder / "traces.png")),
    }


def _beyond(found: dict[str, Any] | None, folder: Path, embedded: Any) -> dict[str, Any] | None:
    if not found:
        return None
    picture = embedded(pictures.beyond(found["tasks"], folder / "beyond.png"))
    tasks = [_task(title, entries) for title, entries in found["tasks"].items()]
    return {"about": found["about"], "picture": picture, "tasks": tasks}


def _task(title: str, entries: dict[str, Entry]) -> dict[str, Any]:
    measured = next(iter(entries.values()))["runs"][0]["curves"]
    names = [name for name in ("train_loss", "test_loss", "accuracy") if name in measured]
    rows = [
        [
            entry["label"],
            *(_number(final_loss(entry, name), 3) for name in names),
            str(entry["steps"]),
            f"{median_curve(entry)[-1]:.3g}",
            _values(entry),
        ]
        for entry in sorted(entries.values(), key=lambda entry: final_loss(entry, "test_loss"))
    ]
    return {
        "title": title,
        "heads": [*(name.replace("_", " ") for name in names), "steps", "seconds", "values"],
        "rows": rows,
    }

"""The paper's statements, and ours, checked against a comparison: each holds or does not, by the numbers it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.autoencoder.compare import Entry, epoch_seconds, final_loss, median_curve, spread, time_to

__all__ = ["Statement", "check"]

#: How much above another loss a loss may be and still be called comparable, and how much more a time has to be.
COMPARABLE = 1.05
Entries = dict[str, Entry]


@dataclass(frozen=True)
class Statement:
    """A sentence that the figures decide.

    Attributes:
        source: ``"paper"`` or ``"ours"``.
        text: the sentence.
        holds: whether it does; ``None`` where those that it speaks of did not take part.
        evidence: the numbers, and where it does not hold what is behind them.
    """

    source: str
    text: str
    holds: bool | None
    evidence: str


def _among(entries: Entries, names: tuple[str, ...]) -> Entries:
    return {name: entries[name] for name in names if name in entries}


def _kind(entries: Entries, kind: str) -> Entries:
    return {name: entry for name, entry in entries.items() if entry["kind"] == kind}


def _losses(entries: Entries) -> str:
    return ", ".join(f"{entry['label']} {final_loss(entry):.1f}" for entry in entries.values())


def _lower_at_equal_epochs(entries: Entries, extra: Entries) -> tuple[bool, str] | None:
    others = _kind(entries, "first-order")
    if not others:
        return None
    ours = final_loss(entries["locoprop-m"])
    return ours < min(
        map(final_loss, others.values())
    ), f"train loss at the end: LocoProp-M {ours:.1f}; {_losses(others)}"


def _comparable(entries: Entries, extra: Entries) -> tuple[bool, str] | None:
    others = _among(entries, ("shampoo", "kfac"))
    if not others:
        return None
    ours, best = final_loss(entries["locoprop-m"]), min(map(final_loss, others.values()))
    return (
        ours <= COMPARABLE * best,
        f"LocoProp-M {ours:.1f}; {_losses(others)}; comparable is at most 5 % above the best",
    )


def _faster(entries: Entries, extra: Entries) -> tuple[bool, str] | None:
    others = _among(entries, ("shampoo", "kfac"))
    if not others:
        return None
    mine = entries["locoprop-m"]
    holds, parts = True, []
    for other in others.values():
        needed, total = time_to(mine, final_loss(other)), median_curve(other)[-1]
        holds = holds and needed is not None and needed < total
        reached = "not in its epochs" if needed is None else f"after {needed:.3g} s"
        parts.append(
            f"{other['label']} ends at {final_loss(other):.1f} after {total:.3g} s, LocoProp-M reaches that {reached} "
            f"(an epoch {epoch_seconds(other):.3g} s against {epoch_seconds(mine):.3g} s)"
        )
    return holds, "; ".join(parts)


def _matching_below_squared(entries: Entries, extra: Entries) -> tuple[bool, str] | None:
    if "locoprop-s" not in entries:
        return None
    matching, squared = (final_loss(entries[name]) for name in ("locoprop-m", "locoprop-s"))
    return matching <= squared, f"LocoProp-M {matching:.1f}, LocoProp-S {squared:.1f}"


def _few_rows(entries: Entries, extra: Entries) -> tuple[bool, str] | None:
    if "locoprop-m-rows32" not in entries:
        return None
    whole, few = entries["locoprop-m"], entries["locoprop-m-rows32"]
    losses, seconds = [final_loss(one) for one in (whole, few)], [epoch_seconds(one) for one in (whole, few)]
    evidence = f"loss {losses[0]:.1f} and {losses[1]:.1f}, an epoch {seconds[0]:.3g} s and {seconds[1]:.3g} s"
    return losses[1] <= COMPARABLE * losses[0] and COMPARABLE * seconds[1] <= seconds[0], evidence


def _lower_at_equal_time(entries: Entries, extra: Entries) -> tuple[bool, str] | None:
    if not extra:
        return None
    (other,) = extra.values()
    mine = entries["locoprop-m"]
    total = median_curve(mine)[-1]
    _, losses, _ = spread(other)
    given = [loss for loss, time in zip(losses, median_curve(other), strict=True) if time <= total]
    theirs, ours = min(given, default=float("inf")), final_loss(mine)
    share = epoch_seconds(mine, "optimiser") / epoch_seconds(mine)
    evidence = (
        f"LocoProp-M ends at {ours:.1f} after {total:.3g} s, of which {100 * share:.0f} % are local steps; "
        f"{other['label']}, has {theirs:.1f} by then, and {final_loss(other):.1f} after {median_curve(other)[-1]:.3g} s"
    )
    return ours < theirs, evidence


Check = Callable[[Entries, Entries], tuple[bool, str] | None]
_STATEMENTS: tuple[tuple[str, str, Check], ...] = (
    ("paper", "At equal epochs LocoProp-M ends below every first-order method.", _lower_at_equal_epochs),
    ("paper", "LocoProp-M ends at a loss comparable with Shampoo's and K-FAC's.", _comparable),
    ("paper", "LocoProp-M reaches their final losses in less time than they do.", _faster),
    (
        "paper",
        "The matching loss (LocoProp-M) does at least as well as the squared loss (LocoProp-S).",
        _matching_below_squared,
    ),
    (
        "ours",
        "Local steps on 32 rows end within 5 % of the loss with all rows, and take at least 5 % less time.",
        _few_rows,
    ),
    (
        "ours",
        "At equal time LocoProp-M ends below the best first-order method, trained for longer.",
        _lower_at_equal_time,
    ),
)


def check(entries: Entries, extra: Entries) -> list[dict[str, Any]]:
    """Every statement, for the entries of one data set and those that were trained for longer."""
    found = []
    for source, text, judge in _STATEMENTS:
        outcome = judge(entries, extra) if "locoprop-m" in entries else None
        holds, evidence = outcome or (None, "its optimisers did not take part")
        found.append(asdict(Statement(source, text, holds, evidence)))
    return found

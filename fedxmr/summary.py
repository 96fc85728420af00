"""summary.json, whose keys other tools may rely on, and the table a run ends with."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedxmr.config import Config
from fedxmr.evaluation import mean_scores
from fedxmr.messages import Report, Scores
from fedxmr.participation import dropped
from fedxmr.selection import Scored, Selection
from fedxmr.timing import clock

PARTS = ("start_up", "fit", "evaluate", "state", "messages", "aggregation", "other")
"""The parts that a driver's wall time is split into."""


def summarise(
    config: Config,
    selection: Selection,
    reports: Sequence[Report],
    *,
    engine: str,
    bytes: Mapping[str, int],
    participation: Mapping[str, list[int]],
    abstained: Mapping[str, list[int]],
    rejected: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    recovered: list[dict[str, Any]],
    shared_sha256: str,
) -> dict[str, Any]:
    """The content of summary.json. With evaluation off, `selected` and `last` are null.

    participation: round -> the clients that were asked to train. Those out of reach are not among them, but `dropped`;
    those that were asked in vain are, and `rejected` or `failed` as well.
    """
    last = config.federation.rounds
    selected = {r.client: r.selected for r in reports if r.selected is not None}
    at_last = {r.client: r.last for r in reports if r.last is not None}
    test = {"selected": _scored(selection.round, selected), "last": _scored(last, at_last)}
    if selection.best_on_test is not None:
        test["best_on_test"] = _scored(selection.best_on_test.round, selection.best_on_test.test)
    task = {} if config.dataset.task == "standard" else {"task": config.dataset.task}
    trained = set().union(*participation.values())  # not those that were only ever evaluated
    models = "".join(f"{r.client} {r.state_sha256}\n" for r in reports if r.client in trained)
    return {
        "dataset": config.dataset.name,
        **task,
        "learner": config.learner.name,
        "strategy": config.strategy.name,
        "engine": engine,
        "clients": config.federation.clients,
        "rounds": last,
        "seed": config.seed,
        "test": test,
        "validation": {"selected": _validation(selection.selected), "last": _validation(selection.last)},
        "bytes": dict(bytes),
        "seconds": seconds(),
        "participation": dict(participation),
        "abstained": dict(abstained),
        "dropped": {str(round): away for round in range(1, last + 1) if (away := dropped(config, round))},
        "rejected": rejected,
        "failed": failed,
        "recovered": recovered,
        "shared_sha256": shared_sha256,
        "models_sha256": hashlib.sha256(models.encode()).hexdigest(),
    }


def seconds() -> dict[str, float]:
    """The driver's wall time so far: the total and the parts that add up to it."""
    spent = clock.seconds()
    parts = {part: round(spent.get(part, 0.0), 4) for part in PARTS}
    return {"total": round(sum(parts.values()), 4), **parts}


COLUMNS = 80
"""The width that the tables of a run keep to."""

View = Callable[[Scores], Scores]
"""Which scores by direction are shown, average included, and under which name."""


def by_direction(scores: Scores) -> Scores:
    """All of them."""
    return scores


def by_query(scores: Scores) -> Scores:
    """For each modality the mean over its directions as a query, as "image->*", and the average."""
    values = defaultdict(list)
    for direction, value in scores.items():
        query, arrow, _ = direction.partition("->")
        values[f"{query}->*" if arrow else query].append(value)
    return {name: fmean(of_one) for name, of_one in values.items()}


def averaged(scores: Scores) -> Scores:
    """The average over all directions alone."""
    return {"average": scores["average"]}


def fitting(build: Callable[[View], Table], file: str) -> Table:
    """What `build` makes of the view that shows most, of those whose table keeps to COLUMNS.

    file: where all directions are, which a table that does not show them says.
    """
    console = Console(width=10 * COLUMNS)
    for view in (by_direction, by_query, averaged):
        table = build(view)
        if view is not by_direction:
            means = "->*: mean over all galleries; " if view is by_query else ""
            table.caption, table.caption_justify = f"{means}every direction is in {file}", "left"
        if view is averaged or console.measure(table).maximum <= COLUMNS:
            break
    return table


def table(summary: Mapping[str, Any], costs: Mapping[int, tuple[float, float]]) -> Table:
    """The table a run ends with: test mAP of every client and their mean, at the selected and at the last round.

    costs: client -> megabytes moved, both ways, and seconds of work, over the whole run.
    """
    return fitting(lambda view: _table(summary, costs, view), "summary.json")


def _table(summary: Mapping[str, Any], costs: Mapping[int, tuple[float, float]], view: View) -> Table:
    shown = list(view(summary["test"]["last"]["mean"]))
    found = Table("test mAP@all, seen" if "task" in summary else "test mAP@all", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (*shown, "MB moved", "seconds"):
        found.add_column(column, justify="right")
    for which, scored in summary["test"].items():
        found.add_row(f"{which.replace('_', ' ')}, round {scored['round']}", style="bold")
        for own in scored["clients"]:
            megabytes, seconds = costs.get(own["client"], (0.0, 0.0))
            values = row({name: value for name, value in own.items() if name != "client"}, view)
            found.add_row(f"  client {own['client']}", *values, f"{megabytes:.1f}", f"{seconds:.1f}")
        found.add_row("  mean", *row(scored["mean"], view), end_section=True)
    return found


def row(scores: Scores, view: View) -> list[str]:
    """A table's cells."""
    return [f"{value:.3f}" for value in view(scores).values()]


def _scored(round: int, scores: Mapping[int, Scores]) -> dict[str, Any] | None:
    if not scores:
        return None
    clients = [{"client": client, **scores[client]} for client in sorted(scores)]
    return {"round": round, "mean": mean_scores([scores[c] for c in sorted(scores)]), "clients": clients}


def _validation(scored: Scored | None) -> dict[str, Any] | None:
    return _scored(scored.round, scored.validation) if scored else None

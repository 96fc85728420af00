"""summary.json, whose keys other tools may rely on, and the table a run ends with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedxmr.config import Config
from fedxmr.evaluation import mean_scores
from fedxmr.messages import Report, Scores
from fedxmr.selection import Scored, Selection
from fedxmr.timing import clock

PARTS = ("start_up", "fit", "evaluate", "state", "messages", "aggregation", "other")
"""The parts that a driver's wall time is split into."""


def summarise(
    config: Config,
    selection: Selection,
    reports: Sequence[Report],
    *,
    bytes: Mapping[str, int],
    participation: Mapping[str, list[int]],
    rejected: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    shared_sha256: str,
) -> dict[str, Any]:
    """The content of summary.json. With evaluation off, `selected` and `last` are null."""
    last = config.federation.rounds
    selected = {r.client: r.selected for r in reports if r.selected is not None}
    at_last = {r.client: r.last for r in reports if r.last is not None}
    test = {"selected": _scored(selection.round, selected), "last": _scored(last, at_last)}
    if selection.best_on_test is not None:
        test["best_on_test"] = _scored(selection.best_on_test.round, selection.best_on_test.test)
    models = "".join(f"{r.client} {r.state_sha256}\n" for r in reports)
    return {
        "dataset": config.dataset.name,
        "learner": config.learner.name,
        "strategy": config.strategy.name,
        "engine": "local",
        "clients": config.federation.clients,
        "rounds": last,
        "seed": config.seed,
        "test": test,
        "validation": {"selected": _validation(selection.selected), "last": _validation(selection.last)},
        "bytes": dict(bytes),
        "seconds": seconds(),
        "participation": dict(participation),
        "rejected": rejected,
        "failed": failed,
        "shared_sha256": shared_sha256,
        "models_sha256": hashlib.sha256(models.encode()).hexdigest(),
    }


def seconds() -> dict[str, float]:
    """The driver's wall time so far: the total and the parts that add up to it."""
    spent = clock.seconds()
    parts = {part: round(spent.get(part, 0.0), 4) for part in PARTS}
    return {"total": round(sum(parts.values()), 4), **parts}


def table(summary: Mapping[str, Any]) -> Table:
    """The table a run ends with: per client and mean, test mAP at the selected and the last round."""
    chosen, last = summary["test"]["selected"], summary["test"]["last"]
    shown = Table(title="test mAP", title_justify="left")
    shown.add_column("client")
    for scored, name in ((chosen, "selected"), (last, "last")):
        for direction in scored["mean"]:
            shown.add_column(f"{direction}\n{name} (round {scored['round']})", justify="right")
    rows = [
        (str(own["client"]), own, own_last) for own, own_last in zip(chosen["clients"], last["clients"], strict=True)
    ]
    for name, own, own_last in [*rows, ("mean", chosen["mean"], last["mean"])]:
        values = [own[d] for d in chosen["mean"]] + [own_last[d] for d in last["mean"]]
        shown.add_row(name, *(f"{value:.3f}" for value in values), end_section=name == rows[-1][0])
    return shown


def _scored(round: int, scores: Mapping[int, Scores]) -> dict[str, Any] | None:
    if not scores:
        return None
    clients = [{"client": client, **scores[client]} for client in sorted(scores)]
    return {"round": round, "mean": mean_scores([scores[c] for c in sorted(scores)]), "clients": clients}


def _validation(scored: Scored | None) -> dict[str, Any] | None:
    return _scored(scored.round, scored.validation) if scored else None

"""What an experiment found: tables of scores, of paired differences and of published numbers, and the same as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from fedxmr import zero_shot_report
from fedxmr.comparison import CONFIDENCE, Array, Interval, holm, paired_bootstrap, paired_difference, verdict
from fedxmr.conduct import Results, Run
from fedxmr.experiment import Plan, Row
from fedxmr.tables import Table, spread

MAX_DIRECTIONS = 2
"""With more than two modalities a table shows the average alone; results.json has every direction."""


@dataclass(frozen=True)
class Compared:
    """A row against its reference, in one score. p, and adjusted by Holm over all rows and scores of the table.

    queries: the bootstrap interval over queries; None where the runs' queries are not the same, or there are too few.
    """

    row: Row
    score: str
    seeds: Interval
    queries: Interval | None
    p: float
    adjusted: float
    verdict: str


def scores(run: Run) -> dict[str, float]:
    """A run's scores at the selected round, mean over clients, by name."""
    found = dict(run.summary["test"]["selected"]["mean"])
    found["last round"] = run.summary["test"]["last"]["mean"]["average"]
    if across := run.retrieval["cross_client"]:
        found["cross-client"] = across["average"]
    if of_unseen := run.retrieval.get("zero_shot"):
        found |= zero_shot_report.scores(of_unseen)
    found["MB moved"] = sum(run.summary["bytes"].values()) / 1e6
    found |= {f"{part} seconds": run.summary["seconds"][part] for part in ("fit", "evaluate")}
    return found


def scores_of_clients(run: Run) -> dict[int, dict[str, float]]:
    """Evaluated client -> what a client has of these: test mAP by direction, and their average."""
    clients = run.summary["test"]["selected"]["clients"]
    return {own["client"]: {name: value for name, value in own.items() if name != "client"} for own in clients}


def compare(plan: Plan, results: Results) -> list[Compared]:
    """Every row against its reference; of zero-shot tasks in each of them.

    None of a single seed, nor of rows that were asked something else: of another data set, class split or test part.
    """
    if plan.seeds < 2:
        return []

    def asked_of(row: Row) -> tuple[object, ...]:
        config = results.runs[row][0].config
        data = config.dataset
        return data.name, data.task, data.seen_share, data.class_seed, config.evaluation.on

    against_own = [(row, plan.reference_of(row)) for row in results.runs]
    rows = [(row, against) for row, against in against_own if against and asked_of(row) == asked_of(against)]
    asked = [(score, row, against) for score in compared_scores(results) for row, against in rows]
    apart = [
        paired_difference(*([scores(run)[score] for run in results.runs[one]] for one in (row, against)))
        for score, row, against in asked
    ]
    found: list[Compared] = []
    for (score, row, against), difference, p in zip(asked, apart, holm([d.p for d in apart]), strict=True):
        queries = _over_queries(results.runs[row], results.runs[against]) if score == "average" else None
        judged = verdict(difference, p, queries)
        found.append(Compared(row, score, difference.interval, queries, difference.p, p, judged))
    return found


def tables(plan: Plan, results: Results, compared: Sequence[Compared]) -> list[Table]:
    """All tables, the most important first."""
    found = [_score_table(plan, results)]
    found += [_zero_shot_table(zero_shot)] if (zero_shot := _zero_shot(results)) else []
    found += [_difference_table(plan, compared)] if compared else []
    found += [_published_table(plan, results)] if plan.published and plan.published.rows else []
    return found


def notes(plan: Plan, results: Results) -> list[str]:
    """What must be known to read the tables, a sentence or an item of a list each."""
    commits = sorted({_short(run.environment["commit"]) for runs in results.runs.values() for run in runs})
    spread_of = f"mean ± standard deviation over {plan.seeds} seeds" if plan.seeds > 1 else "of one seed alone"
    found = [
        f"Test mAP@all at the round chosen on validation, mean over clients; {spread_of}. Commit {', '.join(commits)}."
    ]
    configs = {row: runs[0].config for row, runs in results.runs.items()}
    if whole := [row.label for row, config in configs.items() if config.evaluation.on == "all-test"]:
        found.append(
            f"Measured on all test items, also those that chose the round, where they are: {', '.join(whole)}."
        )
    if panel := [row.label for row, c in configs.items() if c.federation.clients > c.evaluation.clients]:
        found.append(f"The mean over a seeded panel of the clients: {', '.join(panel)}.")
    if results.tried:
        trials = len(next(iter(results.tried.values())))
        found.append(f"Every method was tuned with {trials} trials on validation, seeds {plan.tuning_seeds}:")
        for name, method in plan.methods.items():
            grid = ", ".join(f"{key} in {values}" for key, values in method.grid.items())
            picked = ", ".join(f"{key}={value}" for key, value in results.chosen[name].items())
            found.append(f"- {name}: {grid}; chosen {picked}")
    if plan.published is not None:
        found.append(f"Published: {plan.published.source}.")
    if plan.departures:
        found.append("What differs from the published:")
        found += [f"- {text}" for text in plan.departures]
    return found


def as_json(plan: Plan, results: Results, compared: Sequence[Compared]) -> dict[str, Any]:
    """The same for machines."""
    return {
        "title": plan.title,
        "seeds": plan.seeds,
        "chosen": {name: dict(trial) for name, trial in results.chosen.items()},
        "tried": {n: [{"trial": dict(t), "validation": v} for t, v in trials] for n, trials in results.tried.items()},
        "sweep": plan.sweep,
        "runs": {
            row.label: {
                "method": row.method,
                "point": dict(row.point),
                "seeds": [{**scores(run), "clients": run.summary["test"]["selected"]["clients"]} for run in runs],
            }
            for row, runs in results.runs.items()
        },
        "differences": [{**vars(c), "row": c.row.label, **_intervals(c)} for c in compared],
        "published": plan.published.model_dump() if plan.published else None,
        "departures": plan.departures,
    }


def as_csv(plan: Plan, results: Results) -> str:
    """Every score of every row as plain numbers: a line each, with the published number where there is one."""
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow(["row", "score", "mean", "standard deviation", "seeds", "published"])
    for row, runs in results.runs.items():
        of_runs = [scores(run) for run in runs]
        for name in of_runs[0]:
            values = [own[name] for own in of_runs]
            deviation = stdev(values) if len(values) > 1 else ""
            published = plan.published.mean(row.label, name) if plan.published else None
            lines.writerow([row.label, name, fmean(values), deviation, len(values), published])
    return written.getvalue()


def _intervals(compared: Compared) -> dict[str, Any]:
    named = {"seeds": compared.seeds, "queries": compared.queries}
    return {name: vars(interval) if interval else None for name, interval in named.items()}


def _score_table(plan: Plan, results: Results) -> Table:
    """A row per method, or per point of the sweep."""
    by_row = {row: [scores(run) for run in runs] for row, runs in results.runs.items()}
    first = next(iter(results.runs.values()))[0].summary["test"]["selected"]["mean"]
    directions = [name for name in first if name != "average"]
    shown = [*(directions if len(directions) <= MAX_DIRECTIONS else []), "average", "last round"]
    shown += ["cross-client"] if any("cross-client" in own[0] for own in by_row.values()) else []
    published = plan.published
    if published is not None:  # such as seconds; a zero-shot task has a table of its own
        every = set.union(*(set(own[0]) for own in by_row.values()))
        shown += [c for c in published.columns if c in every - set(shown) - set(directions) and c.endswith("seconds")]
    rows = []
    for row, own in by_row.items():
        cells = [row.label, *(spread([s[c] for s in own]) if c in own[0] else "-" for c in shown)]
        cells.append(f"{fmean(s['MB moved'] for s in own):.1f}")
        if published is not None and "average" in published.columns:
            level = published.mean(row.label, "average")
            cells.append("-" if level is None else f"{level:.3f}")
        rows.append(cells)
    head = ["", *shown, "MB moved", *(["published average"] if published and "average" in published.columns else [])]
    return Table(plan.title or "Scores", head, rows)


def _difference_table(plan: Plan, compared: Sequence[Compared]) -> Table:
    several = len({c.score for c in compared}) > 1
    head = ["", *(["of"] if several else []), "difference", "95 % over seeds", "95 % over queries", "p", "Holm's p", ""]
    rows = [
        [
            c.row.label,
            *([c.score] if several else []),
            f"{c.seeds.mean:+.3f}",
            str(c.seeds),
            str(c.queries) if c.queries else "-",
            _probability(c.p),
            _probability(c.adjusted),
            c.verdict,
        ]
        for c in compared
    ]
    reference = plan.reference or next(iter(plan.methods))
    caption = (
        f"Differences of the average to {reference}, paired by seed (t interval) and by query (bootstrap); better or "
        f"worse is said where Holm's p is below {1 - CONFIDENCE:.2f} and 0 is not in the interval over queries, where "
        "there is one."
    )
    return Table(caption, head, rows)


def _published_table(plan: Plan, results: Results) -> Table:
    """Every published row, and ours where the names are the same."""
    published = plan.published
    assert published is not None
    ours = {row.label: runs for row, runs in results.runs.items()}
    head = ["", *published.columns, *(f"ours: {column}" for column in published.columns)]
    rows = []
    for name in published.rows:
        by_client = published.by_client(name)
        for k, numbers in enumerate(by_client):
            label = name if len(by_client) == 1 else f"{name}, client {k}"
            runs = ours.get(name, ())
            own = [scores(run) if len(by_client) == 1 else _client(run, k) for run in runs]
            cells = [spread([s[c] for s in own]) if own and c in own[0] else "-" for c in published.columns]
            rows.append([label, *("-" if number is None else f"{number:.3f}" for number in numbers), *cells])
    return Table(f"Published: {published.source}. Ours beside it, on what the caption above says.", head, rows)


def _client(run: Run, k: int) -> dict[str, float]:
    """The scores of client k of several; none where it was not evaluated."""
    return scores_of_clients(run).get(k, {}) if run.config.federation.clients > 1 else {}


def _zero_shot(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Row -> its runs' zero-shot scores; none where not every row ran such a task."""
    found = {row.label: [run.retrieval.get("zero_shot") for run in runs] for row, runs in results.runs.items()}
    measured = {label: [f for f in own if f is not None] for label, own in found.items()}
    return measured if all(measured.values()) else {}


def _zero_shot_table(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    head, *rows = zero_shot_report.experiment_table(measured)
    caption = (
        "The table above is of seen classes' test items among themselves. The protocols of zero-shot retrieval, over "
        f"{zero_shot_report.splits_note(measured)} In italics what needs no training, under the same splits:"
    )
    return Table(caption, head, rows)


def compared_scores(results: Results) -> Iterator[str]:
    """The average; of a zero-shot task the average of each of its protocols."""
    zero_shot = _zero_shot(results)
    if not zero_shot:
        yield "average"
        return
    names = zero_shot_report.scores(next(iter(zero_shot.values()))[0])
    yield from (name for name in names if name.endswith("average") and not name.startswith("last"))


def _over_queries(one: Sequence[Run], other: Sequence[Run]) -> Interval | None:
    """The bootstrap interval over queries of a difference; None where the two were not asked the same ones."""
    if len({(r.environment["data_sha256"], r.config.evaluation.on) for r in (*one, *other)}) > 1:
        return None
    return paired_bootstrap(_precisions(one), _precisions(other))


def _precisions(runs: Sequence[Run]) -> Array:
    """[directions, n]: the average precision of each item as a query, mean over clients and seeds."""
    of_runs = []
    for run in runs:
        by_direction: dict[str, list[Array]] = {}
        for name, found in run.precisions.items():
            by_direction.setdefault(name.partition("/")[2], []).append(found.double().numpy())
        of_runs.append(np.stack([np.mean(by_direction[d], axis=0) for d in sorted(by_direction)]))
    mean: Array = np.mean(of_runs, axis=0)
    return mean


def _short(commit: str | None) -> str:
    """A commit's first digits; "+" stands for changes on top of it."""
    return "unknown" if commit is None else commit[:12] + "+" * commit.endswith("+")


def _probability(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}"

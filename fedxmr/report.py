"""After a run: every metric of the selected models, cross-client retrieval, pictures, and the closing table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedxmr import state, zero_shot_report
from fedxmr.attendance import attendance
from fedxmr.commands import say
from fedxmr.config import Config
from fedxmr.data import Dataset
from fedxmr.evaluation import evaluate_across, evaluate_in_full
from fedxmr.metrics import Retrieval
from fedxmr.models import load
from fedxmr.recording import read_json, read_lines, write_json
from fedxmr.setting import build_learner, own_device, remarks
from fedxmr.sources import parts as parts_of
from fedxmr.strategies import shared_names
from fedxmr.summary import by_query, table
from fedxmr.types import Items, State

SCOPES = (1, 2, 5, *range(10, 100, 10), *range(100, 500, 50), 500, 1000, 2000, 5000)
"""The cut-offs of mAP@K, Recall@K, Hit@K, nDCG@K and precision@K, up to the size of the largest gallery.

They include the scopes of the DRSL paper: 10, 20 ... 80 for Pascal, 50, 100 ... 400 for Wikipedia.
"""

TIES_WORTH_A_WARNING = 0.01


def report(config: Config, data: Dataset, out: Path, *, pictures: bool, examples: int = 0) -> dict[str, Any]:
    """Measure the selected models in full, write retrieval.json and the pictures, print the table.

    examples: how much of the gallery a page of examples shows per query; 0: no page. Returns the run's summary.
    """
    summary = read_json(out / "summary.json")
    _say_who_failed(summary)
    if summary["test"]["selected"] is None:
        _say_why_not_measured(config)
        _close(summary, out)
        return summary
    items = data.all_test if config.evaluation.on == "all-test" else data.test
    chosen = [entry["client"] for entry in summary["test"]["selected"]["clients"]]
    device = own_device(config)
    models = {k: load(out, k, "selected", str(device)) for k in chosen}
    scaled = {k: model.scale(items).to(device) for k, model in models.items()}
    found = {k: evaluate_in_full(model.learner, scaled[k], config.seed, scopes(items)) for k, model in models.items()}
    across = None
    if len(models) > 1:
        across = evaluate_across([m.learner for m in models.values()], list(scaled.values()), config.seed)
    zero_shot = zero_shot_report.measure(config, data, out, chosen)
    state.save(out / "precisions.safetensors", _precisions(items, found), {"items": len(items)})
    first = chosen[0]
    if pictures:
        from fedxmr.pictures import draw

        draw(out, found, models[first].learner, scaled[first], data.classes, config.seed)
    if examples:
        from fedxmr.examples import write

        model, maps = models[first], {direction: r.map for direction, r in found[first].items()}
        write(out, config, data, scaled[first], model, maps, examples)
    content = _retrieval(summary, found, across)
    # written last: with it a run is over, and has nothing left to resume
    write_json(out / "retrieval.json", content if zero_shot is None else {**content, "zero_shot": zero_shot})
    _print(config, data, out, summary, across, found, zero_shot)
    if examples:
        say(f"examples: {out / 'pictures' / 'examples.html'}")
    return summary


def report_deployed(config: Config, out: Path) -> None:
    """Print the table of a run whose clients have the data, and the models: there is nothing here to measure."""
    summary = read_json(out / "summary.json")
    _say_who_failed(summary)
    if summary["test"]["selected"] is None:
        _say_why_not_measured(config)
    else:
        say(table(summary, _costs_by_client(out)))
    _close(summary, out)


def _say_why_not_measured(config: Config) -> None:
    say("evaluation was off" if config.evaluation.every == 0 else "no round was selected")


def _say_who_failed(summary: Mapping[str, Any]) -> None:
    for kind in ("rejected", "failed"):
        for entry in summary[kind]:
            say(f"{kind}: client {entry['client']} in round {entry['round']}: {entry['reason']}")


def scopes(items: Items) -> tuple[int, ...]:
    """Those of the SCOPES that some gallery of these items reaches."""
    largest = max(len(rows) for rows in items.rows.values())
    return tuple(k for k in SCOPES if k <= largest)


def _retrieval(
    summary: Mapping[str, Any], found: Mapping[int, Mapping[str, Retrieval]], across: Mapping[str, float] | None
) -> dict[str, Any]:
    """retrieval.json: every metric on the test items, of each client's selected model."""
    clients = [
        {"client": k, **{direction: _plain(retrieval) for direction, retrieval in directions.items()}}
        for k, directions in found.items()
    ]
    return {"round": summary["test"]["selected"]["round"], "cross_client": across, "clients": clients}


def _precisions(items: Items, found: Mapping[int, Mapping[str, Retrieval]]) -> State:
    """ "<client>/<direction>" -> [n] float32, the average precision of each test item as a query; NaN where it is none.

    What a bootstrap over queries needs.
    """
    precisions = {}
    for client, directions in found.items():
        for direction, retrieval in directions.items():
            of_items = torch.full((len(items),), torch.nan)
            query, _, _ = direction.partition("->")
            of_items[items.rows[query]] = retrieval.average_precision.float()
            precisions[f"{client}/{direction}"] = of_items
    return precisions


def _plain(retrieval: Retrieval) -> dict[str, Any]:
    """A retrieval's means as JSON; the per-query values stay out."""
    values = {name: value for name, value in vars(retrieval).items() if name != "average_precision"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _print(
    config: Config,
    data: Dataset,
    out: Path,
    summary: Mapping[str, Any],
    across: Mapping[str, float] | None,
    found: Mapping[int, Mapping[str, Retrieval]],
    zero_shot: Mapping[str, Any] | None,
) -> None:
    say(table(summary, _costs_by_client(out)))
    if zero_shot is not None:
        say(zero_shot_report.table(zero_shot))
    if across:
        shown = across if len(across) <= 3 else by_query(across)
        say("cross-client mAP (query by one client, gallery by another), selected round: " + _scores(shown))
    if "best_on_test" in summary["test"]:
        say("note: best on test is a leak: its round was chosen on the test items")
    tied = fmean(r.tied for directions in found.values() for r in directions.values())
    if tied > TIES_WORTH_A_WARNING:
        say(f"warning: {tied:.1%} of the scores are tied; a collapsed model ranks by chance")
    if config.evaluation.on == "all-test" and data.all_test_overlaps:
        say("note: all-test includes the validation rows that chose the round")
    for note in (*untrained(config, data, list(found)), *data.notes, *remarks(config, data)):
        say(f"note: {note}")
    _close(summary, out)


def untrained(config: Config, data: Dataset, clients: Sequence[int]) -> Iterator[str]:
    """Which of these clients lack which modality, and that their means count it all the same; nothing if none does."""
    learner = build_learner(config.learner, data.spec, torch.device("cpu"), None)
    parts, shared = parts_of(config), shared_names(config.strategy, learner)
    lacking, arrives = [], False
    for modality in data.spec.dims:
        own = learner.owned(data.spec.dims) - learner.owned(data.spec.dims.keys() - {modality})
        without = [k for k in clients if not len(parts[k].held.get(modality, ()))]
        if own and without:
            who = ", ".join(map(str, without))
            lacking.append(f"{modality} (client{'s' if len(without) > 1 else ''} {who})")
            arrives |= not own.isdisjoint(shared)
    if lacking:
        how = "as far as others share it" if arrives else "untrained"
        yield f"some clients lack a modality: {'; '.join(lacking)}; the means count their encoder of it, {how}"


def _close(summary: Mapping[str, Any], out: Path) -> None:
    """Who took part, and what it cost."""
    lines = read_lines(out / "metrics.jsonl")
    if not any("loss" in line for line in lines):
        say("warning: no client trained in any round; the scores are those of the initial state")
    for line in attendance(summary):
        say(line)
    say(_costs(summary))


def _costs_by_client(out: Path) -> dict[int, tuple[float, float]]:
    """Client -> megabytes moved and seconds of work by its own clock, over the run."""
    moved: Counter[int] = Counter()
    spent: defaultdict[int, float] = defaultdict(float)
    for line in read_lines(out / "metrics.jsonl"):
        moved[line["client"]] += line.get("bytes_up", 0) + line.get("bytes_down", 0)
    for line in read_lines(out / "timings.jsonl"):
        if "client" in line:
            spent[line["client"]] += sum(line["seconds"].values())
    return {client: (size / 1e6, spent[client]) for client, size in moved.items()}


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{direction} {value:.3f}" for direction, value in scores.items())


def _costs(summary: Mapping[str, Any]) -> str:
    seconds = summary["seconds"]
    moved = ", ".join(f"{summary['bytes'][way] / 1e6:.1f} MB {way}" for way in ("up", "down"))
    parts = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items() if name != "total" and spent >= 0.05)
    return f"moved: {moved}; seconds: {seconds['total']:.1f} ({parts})"

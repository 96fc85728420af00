"""The zero-shot part of a report: a run's final models on unseen classes, beside the floors; and its tables.

retrieval.json has it as `zero_shot`:
    seen_classes, unseen_classes   names
    selected, last                 round; mean: task -> direction -> mAP; clients: the same for each, with its number
    floors                         name -> task -> direction -> mAP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedxmr import floors, sources
from fedxmr.config import Config
from fedxmr.data import Dataset
from fedxmr.evaluation import mean_scores
from fedxmr.models import load
from fedxmr.scaling import Scaler, moments, scale
from fedxmr.setting import own_device
from fedxmr.summary import View, fitting, row
from fedxmr.tables import spread
from fedxmr.zero_shot import MIN_SPLITS, Protocol, evaluate_task

WHICH: tuple[Literal["selected", "last"], ...] = ("selected", "last")


def measure(config: Config, data: Dataset, out: Path, clients: Sequence[int]) -> dict[str, Any] | None:
    """retrieval.json's `zero_shot`; None for the standard task. data: the run's. clients: those evaluated."""
    protocol, seen = sources.zero_shot(config), data.spec.seen
    if protocol is None or seen is None:
        return None
    return {
        "seen_classes": [name for name, is_seen in zip(data.classes, seen.tolist(), strict=True) if is_seen],
        "unseen_classes": [name for name, is_seen in zip(data.classes, seen.tolist(), strict=True) if not is_seen],
        **{which: _models(config, protocol, out, clients, which) for which in WHICH},
        "floors": _floors(config, data, protocol),
    }


def _models(
    config: Config, protocol: Protocol, out: Path, clients: Sequence[int], which: Literal["selected", "last"]
) -> dict[str, Any]:
    device, own, round = own_device(config), [], 0
    for k in clients:
        model = load(out, k, which, str(device))
        round = model.round
        train, test = model.scale(protocol.train).to(device), model.scale(protocol.test).to(device)
        own.append({t: evaluate_task(model.learner, train, test, r, config.seed) for t, r in protocol.tasks.items()})
    mean = {task: mean_scores([scores[task] for scores in own]) for task in protocol.tasks}
    return {
        "round": round,
        "mean": mean,
        "clients": [{"client": k, **scores} for k, scores in zip(clients, own, strict=True)],
    }


def _floors(config: Config, data: Dataset, protocol: Protocol) -> dict[str, Any]:
    """What needs no federation: by name, those that this data set can have. Features are scaled by all that is seen."""
    how = sources.scaling(config, data)
    scaler = Scaler.of(moments(data.train, how))
    scaled = replace(protocol, train=scale(protocol.train, how, scaler), test=scale(protocol.test, how, scaler))
    train, validation = (scale(items, how, scaler) for items in (data.train, data.validation))
    found = {
        "chance": floors.chance(protocol),
        "raw cosine": floors.raw_cosine(protocol, data.spec, config.seed),
        "scaled cosine": floors.raw_cosine(scaled, data.spec, config.seed),
        "ridge to class vectors": floors.ridge_to_class_vectors(scaled, train, validation, data.spec, config.seed),
    }
    return {name: scores for name, scores in found.items() if scores is not None}


def table(found: Mapping[str, Any]) -> Table:
    """A run's zero-shot mAP, mean over clients, by task and direction, at the selected and at the last round."""
    return fitting(lambda view: _table(found, view), "retrieval.json")


def _table(found: Mapping[str, Any], view: View) -> Table:
    drawn = Table("zero-shot mAP@all", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in view(next(iter(found["last"]["mean"].values()))):
        drawn.add_column(column, justify="right")
    for which in WHICH:
        drawn.add_row(f"{which}, round {found[which]['round']}, mean", style="bold")
        for task, scores in found[which]["mean"].items():
            drawn.add_row(f"  {task}", *row(scores, view))
        drawn.add_section()
    drawn.add_row("without training", style="bold")
    for name, by_task in found["floors"].items():
        for task, scores in by_task.items():
            drawn.add_row(f"  {task}, {name}", *row(scores, view))
    return drawn


def scores(found: Mapping[str, Any]) -> dict[str, float]:
    """A run's scores for an experiment: "unseen image->text" ... at the selected round, "last unseen average" ..."""
    flat = _flat(found["selected"]["mean"])
    return {**flat, **{f"last {name}": value for name, value in _flat(found["last"]["mean"]).items()}}


def experiment_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """The rows of an experiment's table, head first. runs: method -> `zero_shot` of its runs, one per class split.

    Mean and standard deviation over the runs; below, the floors. Where one is not the same for all methods, because
    of other class splits, features or class vectors, each different one is there, with the first method that has it.
    """
    first = next(iter(runs.values()))
    columns = list(_flat(first[0]["selected"]["mean"]))
    last = [f"last {name}" for name in columns if name.endswith("average")]
    rows = [["", *columns, *last]]
    for method, found in runs.items():
        of_each = [scores(f) for f in found]
        rows.append([method, *(spread([s[c] for s in of_each]) for c in (*columns, *last))])
    for name in dict.fromkeys(name for found in runs.values() for name in found[0]["floors"]):
        different: dict[tuple[str, ...], str] = {}  # cells -> the first method that has them
        for method, found in runs.items():
            if name in found[0]["floors"]:
                of_each = [_flat(f["floors"][name]) for f in found]
                different.setdefault(tuple(spread([s[c] for s in of_each]) for c in columns), method)
        for cells, method in different.items():
            label = f" ({method})" if len(different) > 1 else ""
            rows.append([f"*{name}*{label}", *cells, *("" for _ in last)])
    return rows


def splits_note(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many splits are behind a row of an experiment's table, and whether these are enough."""
    of_rows = {len({tuple(found["unseen_classes"]) for found in of_method}) for of_method in runs.values()}
    number = " to ".join(str(n) for n in sorted({min(of_rows), max(of_rows)}))
    few = "" if min(of_rows) >= MIN_SPLITS else f"; {MIN_SPLITS} or more would make it a result"
    return f"{number} different splits of the classes{few}."


def _flat(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{task} {direction}": value for task, scores in by_task.items() for direction, value in scores.items()}

"""The figures of an experiment: how methods learn and what that costs in bytes, how they retrieve, or a sweep's curves.

Lines are means over seeds, with one standard deviation about them.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fedxmr import sources
from fedxmr.conduct import Results, Run
from fedxmr.experiment import Plan, Row
from fedxmr.experiment_report import compared_scores, scores, scores_of_clients
from fedxmr.metrics import RECALL_LEVELS
from fedxmr.models import load
from fedxmr.pictures import common_subspace_figure

Array = npt.NDArray[np.float64]

DPI = 110

MAX_CLIENTS = 5
"""A sweep of one method draws a curve of each client, where there are no more."""

LEVELS = (
    ("--", "tab:grey"), ("-.", "tab:brown"), (":", "tab:pink"), ((0, (5, 1)), "tab:olive"), ((0, (3, 1)), "tab:cyan"),
)  # fmt: skip
"""Styles and colours of horizontal lines; curves have the first of matplotlib's colours."""

MUCH = 20
"""Numbers whose largest is as many times the smallest are drawn on a logarithmic scale."""


def draw(plan: Plan, results: Results, folder: Path) -> list[Path]:
    """Draw what an experiment has to show as PNG files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _sweep(plan, results) if plan.sweep else _comparison(plan, results)
    paths = []
    for name, figure in drawn:
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def learning_curve(run: Run) -> tuple[Array, Array, Array]:
    """Rounds, megabytes moved per client up to each, and mean validation mAP, of the evaluated rounds."""
    moved: defaultdict[int, float] = defaultdict(float)
    found: defaultdict[int, list[float]] = defaultdict(list)
    for line in run.metrics():
        moved[line["round"]] += (line.get("bytes_up", 0) + line.get("bytes_down", 0)) / 1e6
        if "validation" in line:
            found[line["round"]].append(line["validation"]["average"])
    rounds = np.array(sorted(moved))
    total = np.cumsum([moved[r] for r in rounds]) / run.config.federation.clients
    shown = np.isin(rounds, list(found))
    return rounds[shown], total[shown], np.array([np.mean(found[r]) for r in rounds[shown]])


def loss_curve(run: Run) -> tuple[Array, Array]:
    """Rounds, and the training loss in each: the mean over the clients that trained."""
    found: defaultdict[int, list[float]] = defaultdict(list)
    for line in run.metrics():
        if "loss" in line:
            found[line["round"]].append(line["loss"])
    return np.array(sorted(found), dtype=float), np.array([np.mean(found[r]) for r in sorted(found)])


def _comparison(plan: Plan, results: Results) -> Iterator[tuple[str, Figure]]:
    """mAP against rounds and bytes, loss against rounds, precision against recall and scope; t-SNE of the reference."""
    runs = {row.label: own for row, own in results.runs.items()}
    learning = {name: [learning_curve(run) for run in own] for name, own in runs.items()}
    yield "map-against-rounds", _against_rounds(learning)
    yield "map-against-bytes", _against_bytes(learning)
    yield "loss-against-rounds", _losses(runs)
    yield "precision-recall", _retrieval(runs, "recall", _recall_curve)
    yield "precision-scope", _retrieval(runs, "scope", _scope_curve)
    yield "t-sne", _common_subspace(runs[plan.reference or next(iter(plan.methods))][0])


def _against_rounds(learning: Mapping[str, Sequence[tuple[Array, Array, Array]]]) -> Figure:
    figure, axes = _figure("validation mAP against rounds", "round", "mAP, mean over clients")
    for name, own in learning.items():
        _band(axes, name, own[0][0], [scores for _, _, scores in own])
    return _legend(figure)


def _against_bytes(learning: Mapping[str, Sequence[tuple[Array, Array, Array]]]) -> Figure:
    """Of a method that moves nothing the level of its best round."""
    title = "validation mAP against bytes moved"
    figure, axes = _figure(title, "megabytes moved per client, both ways", "mAP, mean over clients")
    still = []
    for name, own in learning.items():
        if all(moved[-1] > 0 for _, moved, _ in own):
            _band(axes, name, np.mean([moved for _, moved, _ in own], axis=0), [scores for _, _, scores in own])
        else:
            level = float(np.mean([scores.max() for _, _, scores in own]))
            still.append((f"{name}, best round, nothing moved", level))
    for number, (name, level) in enumerate(still):
        _level(axes, name, level, number)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(0.2, 0.5)))
    return _legend(figure)


def _losses(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """Each method's as a part of its first, since losses of two learners have no common unit."""
    figure, axes = _figure("training loss against rounds", "round", "loss / loss of the first round")
    for name, own in runs.items():
        curves = [loss_curve(run) for run in own]
        if all(len(losses) and losses[0] > 0 for _, losses in curves):
            _band(axes, name, curves[0][0], [losses / losses[0] for _, losses in curves])
    return _legend(figure)


Curve = Callable[[Mapping[str, Any]], tuple[Sequence[float], Sequence[float]]]
"""From a client's retrieval in one direction, as in retrieval.json: where precision was measured, and what it was."""


def _recall_curve(found: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    return RECALL_LEVELS, found["precision_recall"]


def _scope_curve(found: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    reached = {int(k): value for k, value in found["precision_at"].items() if int(k) <= found["gallery"]}
    return list(reached), list(reached.values())


def _retrieval(runs: Mapping[str, Sequence[Run]], what: str, curve: Curve) -> Figure:
    """Precision on test at the selected round, mean over clients and directions; as far as all of them reach."""
    figure, axes = _figure(f"precision against {what} on test", what, "precision, mean over directions and clients")
    for name, own in runs.items():
        of_runs = [
            [curve(found) for client in run.retrieval["clients"] for key, found in client.items() if key != "client"]
            for run in own
        ]
        reach = min(len(precision) for curves in of_runs for _, precision in curves)  # class splits differ in size
        x = np.asarray(of_runs[0][0][0][:reach], dtype=float)
        _band(axes, name, x, [np.mean([precision[:reach] for _, precision in curves], axis=0) for curves in of_runs])
    return _legend(figure)


def _common_subspace(run: Run) -> Figure:
    """t-SNE of what the selected model of a run's first client makes of the test items."""
    data = sources.dataset(run.config)
    client = run.summary["test"]["selected"]["clients"][0]["client"]
    model = load(run.folder, client, "selected", "cpu")
    return common_subspace_figure(model.learner, model.scale(data.test), data.classes, run.config.seed)


def _sweep(plan: Plan, results: Results) -> Iterator[tuple[str, Figure]]:
    """A figure of each score that is compared: a curve per method, and per value of any further swept key.

    Of one method's federation each client's curve too; of methods that are not swept the level.
    """
    key, *_ = plan.sweep
    for score in compared_scores(results):
        figure, axes = _figure(plan.title, key, f"test mAP, {score}")
        place = _places(axes, plan.sweep[key])
        for number, row in enumerate(row for row in results.runs if not row.point):
            _level(axes, row.label, float(np.mean([scores(run)[score] for run in results.runs[row]])), number)
        curves: defaultdict[str, list[tuple[float, Row]]] = defaultdict(list)
        for row in results.runs:
            if row.point:
                (_, value), *others = row.point
                curves[Row(row.method, tuple(others)).label].append((place(value), row))
        for name, points in curves.items():
            points.sort(key=lambda point: point[0])
            x = np.array([at for at, _ in points])
            over_seeds = np.array([[scores(run)[score] for run in results.runs[row]] for _, row in points]).T
            _band(axes, name, x, list(over_seeds), marker="o")
            if len(curves) == 1 and score == "average":
                _clients(axes, x, [results.runs[row] for _, row in points])
        yield f"sensitivity-{score.replace(' ', '-')}" if score != "average" else "sensitivity", _legend(figure)


def _clients(axes: Axes, x: Array, runs: Sequence[Sequence[Run]]) -> None:
    """A thin curve for each client, mean over seeds, where all runs have the same; runs: of each point, by seed."""
    by_point = [[scores_of_clients(run) for run in of_point] for of_point in runs]
    clients = sorted(by_point[0][0])
    if not 2 <= len(clients) <= MAX_CLIENTS or any(sorted(own) != clients for of in by_point for own in of):
        return
    for client in clients:
        values = [np.mean([own[client]["average"] for own in of_point]) for of_point in by_point]
        axes.plot(x, values, linewidth=1, linestyle=":", marker=".", label=f"client {client}")


def _places(axes: Axes, values: Sequence[Any]) -> Callable[[Any], float]:
    """Where a swept value stands: numbers on a scale, logarithmic where they span much, all else in its order."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if min(values) > 0 and max(values) >= MUCH * min(values):
            axes.set_xscale("log")
        axes.set_xticks(list(values), [f"{value:g}" for value in values], minor=False)
        axes.minorticks_off()
        return float
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    return lambda value: float(values.index(value))


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title("\n".join(textwrap.wrap(title, 70)), fontsize="medium")
    return figure, axes


def _legend(figure: Figure) -> Figure:
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _level(axes: Axes, name: str, level: float, number: int) -> None:
    """A horizontal line, in the number-th of the styles."""
    style, colour = LEVELS[number % len(LEVELS)]
    axes.axhline(level, color=colour, linestyle=style, label=name)


def _band(axes: Axes, name: str, x: Array, of_seeds: Sequence[Array], marker: str = "") -> None:
    """Mean over seeds, and one standard deviation about it."""
    mean, deviation = np.mean(of_seeds, axis=0), np.std(of_seeds, axis=0, ddof=1 if len(of_seeds) > 1 else 0)
    (line,) = axes.plot(x, mean, label=name, marker=marker)
    axes.fill_between(x, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())

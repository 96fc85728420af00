"""The figures of an experiment: validation mAP against rounds and against bytes moved, with the spread over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fedxmr.experiment import Run


def draw(runs: Mapping[str, Sequence[Run]], folder: Path) -> list[Path]:
    """Draw both figures; returns their paths. runs: method -> its runs, one per seed."""
    curves = {name: [curve(run) for run in own] for name, own in runs.items()}
    by_rounds = _figure("round", "validation mAP against rounds")
    by_bytes = _figure("megabytes moved per client, both ways", "validation mAP against bytes moved")
    for name, own in curves.items():
        _band(by_rounds, name, [c[0] for c in own], [c[2] for c in own])
        if all(c[1][-1] > 0 for c in own):
            _band(by_bytes, name, [c[1] for c in own], [c[2] for c in own])
        else:
            level = float(np.mean([c[2].max() for c in own]))
            by_bytes.axes[0].axhline(level, color="grey", linestyle="--", label=f"{name}, best round, nothing moved")
    by_bytes.axes[0].set_xscale("log")
    by_bytes.axes[0].xaxis.set_minor_locator(LogLocator(subs=(0.2, 0.5)))
    paths = []
    for figure, name in ((by_rounds, "map-against-rounds"), (by_bytes, "map-against-bytes")):
        figure.axes[0].legend()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def curve(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds, megabytes moved per client up to each, and mean validation mAP, of the evaluated rounds."""
    moved: defaultdict[int, float] = defaultdict(float)
    scores: defaultdict[int, list[float]] = defaultdict(list)
    for line in run.metrics():
        moved[line["round"]] += (line.get("bytes_up", 0) + line.get("bytes_down", 0)) / 1e6
        if "validation" in line:
            scores[line["round"]].append(line["validation"]["average"])
    rounds = np.array(sorted(moved))
    total = np.cumsum([moved[r] for r in rounds]) / run.config.federation.clients
    shown = np.isin(rounds, list(scores))
    return rounds[shown], total[shown], np.array([np.mean(scores[r]) for r in rounds[shown]])


def _figure(x: str, title: str) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.add_subplot(xlabel=x, ylabel="mAP, mean over clients", title=title)
    return figure


def _band(figure: Figure, name: str, x: list[np.ndarray], y: list[np.ndarray]) -> None:
    """Mean over seeds, and one standard deviation about it."""
    mean, deviation = np.mean(y, axis=0), np.std(y, axis=0, ddof=1 if len(y) > 1 else 0)
    (line,) = figure.axes[0].plot(np.mean(x, axis=0), mean, label=name)
    figure.axes[0].fill_between(
        np.mean(x, axis=0), mean - deviation, mean + deviation, alpha=0.2, color=line.get_color()
    )

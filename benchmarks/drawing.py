"""The picture of how a run grows with the clients that are registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure


def draw_scale(path: Path, peaks: Mapping[int, Sequence[float]], seconds: Mapping[int, Sequence[float]]) -> None:
    """Write a PNG. Clients registered -> MiB of all memory, run by run; and seconds per client of a round."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for axes, found, label, factor in (
        (memory, peaks, "memory of the whole process, MiB", 1.0),
        (time, seconds, "a round, per client of it, ms", 1000.0),
    ):
        clients = list(found)
        values = [[factor * value for value in found[n]] for n in clients]
        middle = [median(v) for v in values]
        axes.errorbar(
            clients,
            middle,
            [
                [m - min(v) for m, v in zip(middle, values, strict=True)],
                [max(v) - m for m, v in zip(middle, values, strict=True)],
            ],
            marker="o",
            capsize=3,
        )
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients registered, at most 50 of them in a round")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

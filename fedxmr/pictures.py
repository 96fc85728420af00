"""A run's pictures, as PNG files and in TensorBoard: t-SNE of the common subspace and precision-recall curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from fedxmr.errors import naming
from fedxmr.events import Events
from fedxmr.metrics import RECALL_LEVELS, Retrieval
from fedxmr.seeding import generator
from fedxmr.types import Items, Learner

MAX_POINTS = 400
"""Items in the t-SNE picture; each is there once per modality it has."""

DPI = 120

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")


def draw(
    out: Path,
    found: Mapping[int, Mapping[str, Retrieval]],
    learner: Learner,
    items: Items,
    classes: Sequence[str],
    seed: int,
) -> None:
    """Draw both pictures of a run's selected models into `out`/pictures and TensorBoard.

    found: client -> direction -> its measured retrieval, with curves. learner, items: for the t-SNE, scaled.
    """
    figures = {
        "precision-recall": precision_recall_figure(found),
        "t-sne": common_subspace_figure(learner, items, classes, seed),
    }
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    with Events(out) as events:
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            with naming(path):
                figure.savefig(path, dpi=DPI)
            width, height = figure.get_size_inches() * DPI
            events.picture(f"pictures/{name}", path.read_bytes(), (int(width), int(height)))


def precision_recall_figure(found: Mapping[int, Mapping[str, Retrieval]]) -> Figure:
    """Interpolated precision at 11 levels of recall: a line per direction, the mean over clients, and their range."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", ylim=(0, 1), title="precision and recall on test")
    for direction in next(iter(found.values())):
        curves = np.array([directions[direction].precision_recall for directions in found.values()], dtype=float)
        axes.plot(RECALL_LEVELS, curves.mean(0), marker=".", label=direction)
        axes.fill_between(RECALL_LEVELS, curves.min(0), curves.max(0), alpha=0.2)
    axes.legend()
    return figure


@torch.inference_mode()
def common_subspace_figure(learner: Learner, items: Items, classes: Sequence[str], seed: int) -> Figure:
    """t-SNE (van der Maaten and Hinton, 2008) of the representations: colour is the class, shape the modality."""
    rng = generator(seed, "t-sne")
    some = items.select(torch.randperm(len(items), generator=rng)[:MAX_POINTS].sort().values.to(items.labels.device))
    encoded = [torch.nn.functional.normalize(learner.encode(m, some.features[m]), dim=1) for m in some.modalities]
    points = torch.cat(encoded).cpu().numpy()
    perplexity = min(30.0, max((len(points) - 1) / 3, 1.0))
    place = TSNE(init="pca", perplexity=perplexity, random_state=seed % 2**32, max_iter=500).fit_transform(points)
    labels = torch.cat([some.labels[some.rows[m]] for m in some.modalities]).cpu()
    first_class = labels.int().argmax(1).numpy()
    modality = np.repeat(np.arange(len(encoded)), [len(x) for x in encoded])

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(title="common subspace, test items", xticks=[], yticks=[])
    colours = mpl.colormaps["tab20" if len(classes) > 10 else "tab10"]
    for m, name in enumerate(some.modalities):
        here = modality == m
        colour = colours(first_class[here] % colours.N)
        axes.scatter(
            place[here, 0], place[here, 1], s=12, c=colour, marker=MARKERS[m % len(MARKERS)], label=name, alpha=0.7
        )
    present = np.unique(first_class)[:20]
    handles = [axes.scatter([], [], s=12, color=colours(c % colours.N), label=classes[c]) for c in present]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    axes.legend(loc="lower right", fontsize="small")
    return figure

"""A run's pictures, as PNG files and in TensorBoard: t-SNE of the common subspace and two curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
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

MAX_CLASSES = 20
"""Classes in the t-SNE picture's legend: as many as there are colours."""


def draw(
    out: Path,
    found: Mapping[int, Mapping[str, Retrieval]],
    learner: Learner,
    items: Items,
    classes: Sequence[str],
    seed: int,
) -> None:
    """Draw the pictures of a run's selected models into `out`/pictures and TensorBoard.

    found: client -> direction -> its measured retrieval, with curves. learner, items: for the t-SNE, scaled.
    """
    figures = {
        "precision-recall": precision_recall_figure(found),
        "precision-scope": precision_scope_figure(found),
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
        curves = [directions[direction].precision_recall or () for directions in found.values()]
        _band(axes, direction, RECALL_LEVELS, curves)
    axes.legend()
    return figure


def precision_scope_figure(found: Mapping[int, Mapping[str, Retrieval]]) -> Figure:
    """Precision of the first K, for every K measured up to the gallery: a line per direction, as above."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="scope: the first K", ylabel="precision", xscale="log", ylim=(0, 1), title="precision and scope on test"
    )
    for direction, one in next(iter(found.values())).items():
        scopes = [k for k in one.precision_at if k <= one.gallery]
        curves = [[directions[direction].precision_at[k] for k in scopes] for directions in found.values()]
        _band(axes, direction, scopes, curves)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend()
    return figure


def _band(axes: Axes, name: str, x: Sequence[float], curves: Sequence[Sequence[float]]) -> None:
    """The mean of the clients' curves over x, and their range."""
    y = np.array(curves)
    axes.plot(x, y.mean(0), marker=".", label=name)
    axes.fill_between(x, y.min(0), y.max(0), alpha=0.2)


@torch.inference_mode()
def common_subspace_figure(learner: Learner, items: Items, classes: Sequence[str], seed: int) -> Figure:
    """t-SNE (van der Maaten and Hinton, 2008) of the representations, twice: coloured by class and by modality.

    An item of several classes has the colour of its first one.
    """
    rng = generator(seed, "t-sne")
    some = items.select(torch.randperm(len(items), generator=rng)[:MAX_POINTS].sort().values.to(items.labels.device))
    encoded = [torch.nn.functional.normalize(learner.encode(m, some.features[m]), dim=1) for m in some.modalities]
    points = torch.cat(encoded).cpu().numpy()
    perplexity = min(30.0, max((len(points) - 1) / 3, 1.0))
    place = TSNE(init="pca", perplexity=perplexity, random_state=seed % 2**32, max_iter=500).fit_transform(points)
    labels = torch.cat([some.labels[some.rows[m]] for m in some.modalities]).cpu()
    modality = np.repeat(np.arange(len(encoded)), [len(x) for x in encoded])

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"common subspace, {len(some)} test items: the same points twice")
    by_class, by_modality = figure.subplots(1, 2, subplot_kw={"xticks": [], "yticks": []})
    _scatter(by_class, "class", place, labels.int().argmax(1).numpy(), classes)
    _scatter(by_modality, "modality", place, modality, some.modalities)
    return figure


def _scatter(axes: Axes, title: str, place: np.ndarray, group: np.ndarray, names: Sequence[str]) -> None:
    """Points [n, 2] coloured by their group [n] int, with one legend of the groups, beside them."""
    axes.set_title(f"coloured by {title}")
    colours = mpl.colormaps["tab20" if len(names) > 10 else "tab10"]
    axes.scatter(place[:, 0], place[:, 1], s=10, c=colours(group % colours.N), alpha=0.7)
    present = np.unique(group)
    shown = present[:MAX_CLASSES]
    handles = [axes.scatter([], [], s=12, color=colours(g % colours.N), label=names[g]) for g in shown]
    heading = title if len(shown) == len(present) else f"{title}, {len(shown)} of {len(present)}"
    axes.legend(handles=handles, title=heading, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")

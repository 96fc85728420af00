"""A page of examples: what one model finds first for some queries of every direction, and what of it is right.

One HTML file that needs nothing else: images are part of it, there are no scripts, and it links to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from fedxmr.config import Config
from fedxmr.data import Dataset
from fedxmr.data.looks import Look, Looks
from fedxmr.errors import naming
from fedxmr.evaluation import directions, key, rank
from fedxmr.models import Retriever
from fedxmr.seeding import generator
from fedxmr.types import Encoder, Items

MAX_QUERIES = 20
"""Of one direction."""

MAX_PER_CLASS = 3

TEXT = 300
"""The most characters that are shown of an item's text."""


@dataclass(frozen=True)
class Shown:
    """An item in one modality. number: what its data set calls it."""

    number: int
    classes: tuple[str, ...]
    look: Look


@dataclass(frozen=True)
class Hit:
    """A gallery item and its place in a ranking. right: it shares a class with the query. own: it is the same item."""

    rank: int
    score: float
    right: bool
    own: bool
    item: Shown


@dataclass(frozen=True)
class Example:
    """A query and the first of what it finds.

    average_precision: None where nothing in the gallery is relevant. own_rank: of its own pair, None without one.
    """

    query: Shown
    average_precision: float | None
    own_rank: int | None
    hits: tuple[Hit, ...]


def write(
    out: Path,
    config: Config,
    data: Dataset,
    items: Items,
    model: Retriever,
    maps: Mapping[str, float],
    top: int,
) -> None:
    """Write `out`/pictures/examples.html. items: those evaluated, scaled. maps: the model's mAP by direction.

    Raises InputError for an image that cannot be read.
    """
    part = config.evaluation.on.replace("-", "_")
    found = examples(model.learner, items, data.classes, data.looks(), part, config.seed, top)
    path = out / "pictures" / "examples.html"
    path.parent.mkdir(exist_ok=True)
    with naming(path):
        path.write_text(
            page(
                found,
                maps=maps,
                run=out.resolve().name,
                method=f"{config.method} + {config.learner.name}",
                dataset=data.name,
                client=model.client,
                round=model.round,
                part=config.evaluation.on,
                seed=config.seed,
                items=len(items),
            ),
            encoding="utf-8",
        )


def page(found: Mapping[str, Sequence[Example]], **about: object) -> str:
    """The page's text. All that it says of the data is escaped."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = lambda text: text if len(text) <= TEXT else f"{text[:TEXT]} ..."
    return environment.from_string(template).render(found=found, **about)


def examples(
    learner: Encoder, items: Items, classes: Sequence[str], looks: Looks, part: str, seed: int, top: int
) -> dict[str, list[Example]]:
    """By direction, what queries drawn from the seed find first. part: which of the `looks`' parts the items are."""
    labels = items.labels.cpu()
    rows = {m: items.rows[m].cpu() for m in items.modalities}

    def shown(modality: str, row: Tensor) -> Shown:
        item = int(rows[modality][row])
        names = tuple(classes[c] for c in labels[item].nonzero().flatten().tolist())
        return Shown(looks.number(part, item), names, looks.show(part, item, modality))

    found = {}
    for direction in directions(items):
        query, gallery = direction
        asked = queries(labels[rows[query]], rows[query], seed)
        ranked = rank(learner, items, seed, direction, asked)
        found[key(direction)] = [
            Example(
                query=shown(query, row),
                average_precision=None if ap.isnan() else float(ap),
                own_rank=int(own.int().argmax()) + 1 if own.any() else None,
                hits=tuple(
                    Hit(place + 1, float(scores[place]), bool(relevant[place]), bool(own[place]), shown(gallery, hit))
                    for place, hit in enumerate(order[:top])
                ),
            )
            for row, order, scores, relevant, own, ap in zip(
                asked, ranked.rows, ranked.scores, ranked.relevant, ranked.own, ranked.average_precision, strict=True
            )
        ]
    return found


def queries(labels: Tensor, items: Tensor, seed: int) -> Tensor:
    """[k] int64, some rows of labels [n, C] bool, spread over the classes: up to MAX_PER_CLASS of each, by class.

    items: [n] int64, the item of each row: as far as two modalities have the same items, the same are drawn.
    """
    rng = generator(seed, "examples")
    drawn = torch.randperm(labels.shape[1], generator=rng).tolist()
    order = torch.randperm(int(items.max()) + 1, generator=rng)[items].argsort()
    waiting = {c: iter(order[labels[order, c]].tolist()) for c in drawn}
    taken: dict[int, int] = {}  # row -> the class it is there for
    for c in drawn * MAX_PER_CLASS:
        row = next((row for row in waiting[c] if row not in taken), None)
        if row is not None and len(taken) < MAX_QUERIES:
            taken[row] = c
    return torch.tensor(sorted(taken, key=lambda row: taken[row]))

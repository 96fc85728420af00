"""Zero-shot and generalised zero-shot retrieval: class splits, what is trained on, and what is query and gallery.

The protocol of JFSE (Xu et al., TPAMI 2022, section 4.1), after Chi and Peng (IJCAI 2018; IEEE TCSVT 2020). Half of the
classes are seen, or another share of them (figure 9b). With the training and the test items of a data set that makes
four subsets of items:

    SS, US   the source (training) items of seen and of unseen classes
    ST, UT   the target (test) items of seen and of unseen classes

Models are trained on SS alone, and every task asks queries of one modality for items of the other:

    task         queries               gallery
    seen         ST                    SS
    unseen       UT                    US
    generalised  UT and half of ST     US and the other half of ST

So galleries hold training items, in "seen" ones that were trained on. The paper's test items are all published
ones, test and validation part joined (`evaluation.on: all-test`); by default they are those that did not choose the
round. Results are means and deviations over class splits, at least MIN_SPLITS of them.

In a run (`dataset.task`) all that clients and server see is of seen classes: training and validation items, counts and
moments. Only `protocol` holds the rest, for the report on the final models. Columns of unseen items went before.

A split is of classes, and an item of several classes may have seen and unseen ones; the paper has no such data. Here it
is in no subset, for in training it would show an unseen class. Nor is an item of no class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

import torch
from torch import Generator, Tensor

from fedxmr.data.dataset import Dataset, drop_unseen_columns
from fedxmr.data.splits import stratified
from fedxmr.errors import InputError
from fedxmr.evaluation import average, key
from fedxmr.metrics import mean_average_precision, tie_order
from fedxmr.seeding import generator
from fedxmr.types import Encoder, Items

Task = Literal["seen", "unseen", "generalised"]

MEASURED: Mapping[str, tuple[Task, ...]] = {
    "zero-shot": ("seen", "unseen"),
    "generalised-zero-shot": ("seen", "unseen", "generalised"),
}
"""`dataset.task` -> what its report measures. Both train alike, as in the paper."""

MIN_SPLITS = 5
"""Which classes are unseen decides more than the method: results over fewer splits are not results."""


@dataclass(frozen=True)
class Subsets:
    """Item numbers, ascending int64: ss and us of the training items, st and ut of the test items."""

    ss: Tensor
    us: Tensor
    st: Tensor
    ut: Tensor


@dataclass(frozen=True)
class Ranked:
    """What a task asks and ranks: test items as queries; training and test items, in that order, as gallery.

    All ascending int64 item numbers.
    """

    queries: Tensor
    gallery_train: Tensor
    gallery_test: Tensor


@dataclass(frozen=True)
class Protocol:
    """All that the final models of a run are measured on.

    train, test: items of all classes, raw or scaled. tasks: which of them are queries and gallery.
    """

    train: Items
    test: Items
    tasks: Mapping[Task, Ranked]


def class_split(num_classes: int, rng: Generator, share: float | None = None) -> Tensor:
    """[C] bool, which classes are seen: a random share of them, None: half, rounded to the nearest number, a half up.

    A larger share sees the same classes and more. Raises InputError where no class would be seen, or none unseen.
    """
    seen = math.floor(num_classes * (0.5 if share is None else share) + 0.5)
    if not 0 < seen < num_classes:
        of = "" if share is None else f", by dataset.seen_share={share}"
        raise InputError(f"zero-shot: expected seen and unseen classes, got {seen} seen of {num_classes}{of}")
    drawn = torch.randperm(num_classes, generator=rng)[:seen]
    return torch.zeros(num_classes, dtype=torch.bool).index_fill_(0, drawn, True)


def subsets(train_labels: Tensor, test_labels: Tensor, seen: Tensor) -> Subsets:
    """Divide training and test items [n, C] bool by a split of classes [C] bool.

    Items of seen and of unseen classes, and of none, are in no subset.
    """
    ss, us = _by_side(train_labels, seen)
    st, ut = _by_side(test_labels, seen)
    return Subsets(ss, us, st, ut)


def task_items(task: Task, of: Subsets, test_labels: Tensor, rng: Generator) -> Ranked:
    """Which items are queries and which the gallery of a task.

    "generalised" halves ST by chance, every first class evenly; of an odd number the queries have one more.
    """
    none = of.ss.new_empty(0)
    match task:
        case "seen":
            return Ranked(of.st, of.ss, none)
        case "unseen":
            return Ranked(of.ut, of.us, none)
        case "generalised":
            first_class = test_labels[of.st].long().argmax(1)
            in_gallery = len(of.st) // 2
            asked, ranked = stratified(first_class, (len(of.st) - in_gallery, in_gallery), rng)
            queries = torch.cat([of.ut, of.st[asked]]).sort().values
            return Ranked(queries, of.us, of.st[ranked])


def with_unseen_classes(data: Dataset, seed: int, seen_share: float | None = None) -> Dataset:
    """The data set with its classes split by a seed, and without the columns that compare with unseen items."""
    seen = class_split(data.spec.num_classes, generator(seed, "classes"), seen_share)
    data = drop_unseen_columns(data, seen)
    dropped = "; the columns of unseen items are left out" if data.column_class else ""
    note = f"{data.name}: {int((~seen).sum())} of {len(seen)} classes are unseen, by seed {seed}{dropped}"
    return replace(data, spec=replace(data.spec, seen=seen), notes=(*data.notes, note))


def seen_only(data: Dataset) -> Dataset:
    """What a run may train on and be chosen by: of a data set `with_unseen_classes`, the items of seen classes."""
    seen = data.spec.seen
    assert seen is not None, "asked for the seen classes of a data set without unseen ones"

    def index(items: Items) -> Tensor:
        return _by_side(items.labels, seen)[0]

    def kept(items: Items) -> Items:
        return items.select(index(items))

    left, all_ = len(kept(data.train)), len(data.train)
    note = f"{data.name}: trained and chosen on items of seen classes alone, {left} of {all_} training items"
    return replace(
        data,
        train=kept(data.train),
        validation=kept(data.validation),
        test=kept(data.test),
        all_test=kept(data.all_test),
        looks=lambda: data.looks().kept({"test": index(data.test), "all_test": index(data.all_test)}),
        notes=(*data.notes, note),
    )


def protocol(data: Dataset, task: str, on: Literal["test", "all-test"], seed: int) -> Protocol:
    """What a `dataset.task` measures on a data set `with_unseen_classes`; the seed is of the generalised task's halves.

    Raises InputError where nothing in a gallery could answer any query.
    """
    seen = data.spec.seen
    assert seen is not None, "asked for the protocol of a data set without unseen classes"
    test = data.all_test if on == "all-test" else data.test
    of = subsets(data.train.labels, test.labels, seen)
    tasks = {name: task_items(name, of, test.labels, generator(seed, "halves")) for name in MEASURED[task]}
    none = seen.new_zeros(1, len(seen))
    for name, ranked in tasks.items():
        asked = judged(data.train, test, ranked)
        if not asked:
            raise InputError(f"{data.name}: expected items for the zero-shot task {name!r}, got none")
        for direction in permutations(data.spec.dims, 2):
            queries, gallery = asked.get(direction, (none, none))
            if not bool((queries.any(0) & gallery.any(0)).any()):
                raise InputError(f"{data.name}: expected a class of {name} items in both of {key(direction)}, got none")
    return Protocol(data.train, test, tasks)


def judged(train: Items, test: Items, ranked: Ranked) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """By direction, the labels of a task's queries [q, C] and of its gallery [g, C]; no features are read."""
    queries = {m: _labels(test, ranked.queries, m) for m in sorted(test.rows)}
    gallery = {
        m: torch.cat([_labels(train, ranked.gallery_train, m), _labels(test, ranked.gallery_test, m)])
        for m in sorted(train.rows)
    }
    return {
        (a, b): (asked, there)
        for a, asked in queries.items()
        for b, there in gallery.items()
        if a != b and len(asked) and len(there)
    }


@torch.inference_mode()
def evaluate_task(learner: Encoder, train: Items, test: Items, ranked: Ranked, seed: int) -> dict[str, float]:
    """mAP@all by direction, and their mean as "average", as `evaluation.evaluate` has them.

    train, test: the data set's parts, scaled, on the learner's device. Ties are broken by the seed.
    """
    queries, parts = _select(train, test, ranked)
    asked = {m: learner.encode(m, queries.features[m]) for m in queries.modalities}
    there = {
        m: torch.cat([learner.encode(m, part.features[m]) for part in parts if m in part.modalities])
        for m in sorted({m for part in parts for m in part.modalities})
    }
    found = {}
    for direction, (query_labels, gallery_labels) in judged(train, test, ranked).items():
        query, gallery = asked[direction[0]], there[direction[1]]
        found[key(direction)] = mean_average_precision(
            lambda rows, q=query, g=gallery, d=direction: learner.similarity(q[rows], g, d),  # type: ignore[misc]
            query_labels,
            gallery_labels,
            order=tie_order(len(gallery), generator(seed, "ties")),
        )
    return average(found)


def _select(train: Items, test: Items, ranked: Ranked) -> tuple[Items, tuple[Items, Items]]:
    """A task's queries, and the two parts of its gallery; the index follows the items to their device."""
    device = train.labels.device
    queries, gallery_train, gallery_test = (
        index.to(device) for index in (ranked.queries, ranked.gallery_train, ranked.gallery_test)
    )
    return test.select(queries), (train.select(gallery_train), test.select(gallery_test))


def _labels(items: Items, index: Tensor, modality: str) -> Tensor:
    """[k, C], the labels of those items at `index` that have a modality."""
    if modality not in items.rows:
        return items.labels[:0]
    index = index.to(items.labels.device)
    return items.labels[index[torch.isin(index, items.rows[modality])]]


def _by_side(labels: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The items whose classes are all seen, and those whose classes are all unseen."""
    has_seen, has_unseen = (labels & seen).any(1), (labels & ~seen).any(1)
    return (has_seen & ~has_unseen).nonzero().flatten(), (has_unseen & ~has_seen).nonzero().flatten()

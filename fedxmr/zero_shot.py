"""Zero-shot and generalised zero-shot retrieval: class splits, and which items are query and gallery.

The protocol of JFSE (Xu et al., TPAMI 2022, section 4.1), after Chi and Peng (IJCAI 2018; IEEE TCSVT 2020). Half of the
classes are seen. With the training and the test items of a data set that makes four subsets of items:

    SS, US   the source (training) items of seen and of unseen classes
    ST, UT   the target (test) items of seen and of unseen classes

Models are trained on SS alone, and every task asks queries of one modality for items of the other:

    task         queries               gallery
    seen         ST                    SS
    unseen       UT                    US
    generalised  UT and half of ST     US and the other half of ST

So galleries hold training items, in "seen" ones that were trained on. The test items are all published ones: the paper
joins test and validation part. Results are means and deviations over class splits, at least MIN_SPLITS of them.

A split is of classes, and an item of several classes may have seen and unseen ones; the paper has no such data. Here it
is in no subset, for in training it would show an unseen class. Nor is an item of no class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

import torch
from torch import Generator, Tensor

from fedxmr.data.splits import stratified
from fedxmr.errors import InputError
from fedxmr.evaluation import average, key
from fedxmr.metrics import mean_average_precision, tie_order
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items, Learner

Task = Literal["seen", "unseen", "generalised"]

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


def class_split(num_classes: int, rng: Generator, seen_share: float = 0.5) -> Tensor:
    """[C] bool, which classes are seen: a random half of them, or another share, rounded to a whole number of classes.

    Of an odd number of classes the half more is seen. Raises InputError where a side would be without classes.
    """
    seen = math.floor(seen_share * num_classes + 0.5)
    if not 0 < seen < num_classes:
        raise InputError(f"zero-shot: expected seen and unseen classes, got {seen} seen of {num_classes}")
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


def training_task(train: Items, spec: DataSpec, seen: Tensor) -> tuple[Items, DataSpec]:
    """What a learner may train on, and know: SS, and which classes are seen."""
    ss, _ = _by_side(train.labels, seen)
    return train.select(ss), replace(spec, seen=seen)


@torch.inference_mode()
def evaluate_task(learner: Learner, train: Items, test: Items, ranked: Ranked, seed: int) -> dict[str, float]:
    """mAP@all by direction, and their mean as "average", as `evaluation.evaluate` has them.

    train, test: the data set's parts, scaled, on the learner's device. Ties are broken by the seed.
    """
    queries = test.select(ranked.queries)
    parts = (train.select(ranked.gallery_train), test.select(ranked.gallery_test))
    found = {}
    for query in queries.modalities:
        asked = learner.encode(query, queries.features[query])
        for gallery in sorted({m for part in parts for m in part.modalities} - {query}):
            there = [part for part in parts if gallery in part.modalities]
            encoded = torch.cat([learner.encode(gallery, part.features[gallery]) for part in there])
            labels = torch.cat([part.labels[part.rows[gallery]] for part in there])
            direction = (query, gallery)
            found[key(direction)] = mean_average_precision(
                lambda rows, q=asked, g=encoded, d=direction: learner.similarity(q[rows], g, d),  # type: ignore[misc]
                queries.labels[queries.rows[query]],
                labels,
                order=tie_order(len(encoded), generator(seed, "ties")),
            )
    return average(found)


def over_splits(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Of the scores of each class split, by name: their mean and sample standard deviation.

    Raises InputError for fewer than MIN_SPLITS of them.
    """
    if len(scores) < MIN_SPLITS:
        raise InputError(f"zero-shot: expected at least {MIN_SPLITS} class splits, got {len(scores)}")
    names = list(scores[0])
    return {name: (fmean(s[name] for s in scores), stdev(s[name] for s in scores)) for name in names}


def _by_side(labels: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The items whose classes are all seen, and those whose classes are all unseen."""
    has_seen, has_unseen = (labels & seen).any(1), (labels & ~seen).any(1)
    return (has_seen & ~has_unseen).nonzero().flatten(), (has_unseen & ~has_seen).nonzero().flatten()

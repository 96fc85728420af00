"""How good a learner is at cross-modal retrieval: every ordered pair of modalities, the whole gallery ranked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean

import torch
from torch import Tensor

from fedxmr.metrics import (
    Retrieval,
    average_precision,
    mean_average_precision,
    ranking,
    relevance,
    retrieval,
    scores_of,
    tie_order,
)
from fedxmr.seeding import generator
from fedxmr.types import Encoder, Items, Learner

MAX_PAIRS = 30
"""Ordered pairs of clients that cross-client retrieval is measured on: six clients' worth."""


def directions(items: Items) -> list[tuple[str, str]]:
    """Every ordered pair of the items' modalities, (query, gallery)."""
    return list(permutations(items.modalities, 2))


def key(direction: tuple[str, str]) -> str:
    """("image", "text") -> "image->text"."""
    return "->".join(direction)


def average(by_direction: Mapping[str, float]) -> dict[str, float]:
    """Scores by direction with "average", their mean, added."""
    return {**by_direction, "average": fmean(by_direction.values())}


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over clients, direction by direction."""
    return {name: fmean(s[name] for s in scores) for name in scores[0]}


@torch.inference_mode()
def evaluate(learner: Encoder, items: Items, seed: int) -> dict[str, float]:
    """mAP@all by direction, and their mean as "average".

    Queries are the items that have the one modality, the gallery those that have the other. Ties are broken by a
    permutation of the gallery drawn from the seed, the same for every method.
    """
    with items.lent("the learner's encode"):
        encoded = {m: learner.encode(m, items.features[m]) for m in items.modalities}
    labels = {m: items.labels[items.rows[m]] for m in items.modalities}
    found = {}
    for query, gallery in directions(items):
        found[key((query, gallery))] = mean_average_precision(
            _scores(learner, encoded[query], encoded[gallery], (query, gallery)),
            labels[query],
            labels[gallery],
            order=ties(items, gallery, seed),
        )
    return average(found)


@torch.inference_mode()
def evaluate_in_full(learner: Learner, items: Items, seed: int, at: Sequence[int]) -> dict[str, Retrieval]:
    """Every metric and curve by direction, on final models."""
    encoded = {m: learner.encode(m, items.features[m]) for m in items.modalities}
    found = {}
    for query, gallery in directions(items):
        found[key((query, gallery))] = retrieval(
            _scores(learner, encoded[query], encoded[gallery], (query, gallery)),
            items.labels[items.rows[query]],
            items.labels[items.rows[gallery]],
            order=ties(items, gallery, seed),
            at=at,
            pairs=_own_row(items, query, gallery),
            curves=True,
        )
    return found


@dataclass(frozen=True, eq=False)
class Ranking:
    """The whole gallery as k queries rank it, best first; on the CPU.

    rows: [k, g] int64, feature rows of the gallery. scores: [k, g]. relevant: [k, g] bool. own: [k, g] bool, whether it
    is the query's own pair. average_precision: [k] float64, NaN where nothing is relevant.
    """

    rows: Tensor
    scores: Tensor
    relevant: Tensor
    own: Tensor
    average_precision: Tensor


@torch.inference_mode()
def rank(learner: Encoder, items: Items, seed: int, direction: tuple[str, str], queries: Tensor) -> Ranking:
    """How some queries, [k] int64 feature rows of their modality, rank the gallery: just as all metrics have it."""
    query, gallery = direction
    encoded = {m: learner.encode(m, items.features[m]) for m in direction}
    all_scores = _scores(learner, encoded[query], encoded[gallery], direction)
    scores = scores_of(all_scores, queries, len(encoded[query]), len(encoded[gallery])).cpu()
    order = ties(items, gallery, seed)
    labels = {m: items.labels[items.rows[m]].cpu() for m in direction}
    relevant = relevance(labels[query][queries], labels[gallery])
    rows = ranking(scores, order)
    own = items.rows[query].cpu()[queries, None] == items.rows[gallery].cpu()
    precision = average_precision(scores, relevant, order)
    return Ranking(rows, scores.gather(1, rows), relevant.gather(1, rows), own.gather(1, rows), precision)


@torch.inference_mode()
def evaluate_across(learners: Sequence[Learner], items: Sequence[Items], seed: int) -> dict[str, float]:
    """Cross-client mAP: a query encoded by client a, the gallery by client b, mean over ordered pairs a != b.

    items: the same items as each client scales them. The querying client's similarity ranks. Of more than MAX_PAIRS
    pairs so many are drawn from the seed.
    """
    if len(learners) < 2:
        raise ValueError(f"cross-client retrieval: expected at least 2 learners, got {len(learners)}")
    first = items[0]
    encoded = [
        {m: learner.encode(m, own.features[m]) for m in first.modalities}
        for learner, own in zip(learners, items, strict=True)
    ]
    pairs = list(permutations(range(len(learners)), 2))
    drawn = torch.randperm(len(pairs), generator=generator(seed, "cross-client pairs"))[:MAX_PAIRS].sort().values
    found = {}
    for query, gallery in directions(first):
        values = [
            mean_average_precision(
                _scores(learners[a], encoded[a][query], encoded[b][gallery], (query, gallery)),
                first.labels[first.rows[query]],
                first.labels[first.rows[gallery]],
                order=ties(first, gallery, seed),
            )
            for a, b in (pairs[i] for i in drawn)
        ]
        found[key((query, gallery))] = fmean(values)
    return average(found)


def ties(items: Items, gallery: str, seed: int) -> Tensor:
    """The seeded permutation of a gallery that breaks ties."""
    return tie_order(len(items.rows[gallery]), generator(seed, "ties"))


def _scores(learner: Encoder, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Callable[[slice], Tensor]:
    """The scores of a slice of the queries against the whole gallery."""
    return lambda rows: learner.similarity(query[rows], gallery, direction)


def _own_row(items: Items, query: str, gallery: str) -> Tensor | None:
    """[q] int64: the gallery row of each query's own item, -1 where it has none; None where no query has one."""
    row = torch.full((len(items),), -1, device=items.labels.device)
    row[items.rows[gallery]] = torch.arange(len(items.rows[gallery]), device=row.device)
    own = row[items.rows[query]]
    return own if bool((own >= 0).any()) else None

"""The metrics against loops that spell out the definitions, against other libraries, and by hand."""

import math
import random

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_precision,
)

from fedxmr.metrics import Retrieval, retrieval, tie_order

KS = (1, 2, 3, 7, 40)


class BruteForce:
    """Every metric of one query, from plain lists, one item at a time."""

    def __init__(self, scores: list[float], query: set[int], gallery: list[set[int]], order: list[int]) -> None:
        self.ranking = sorted(range(len(scores)), key=lambda item: (-scores[item], order.index(item)))
        self.gains = [len(query & gallery[item]) for item in self.ranking]
        self.tied = sum(scores.count(score) > 1 for score in scores) / len(scores)

    def average_precision(self, k: int | None = None, rank_offset: int = 0) -> float:
        hits, total = 0, 0.0
        for rank, gain in enumerate(self.gains[:k], start=1):
            if gain > 0:
                hits += 1
                total += hits / (rank + rank_offset)
        return total / hits if hits else 0.0

    def precision(self, k: int) -> float:
        return sum(gain > 0 for gain in self.gains[:k]) / min(k, len(self.gains))

    def hit(self, k: int) -> float:
        return float(any(self.gains[:k]))

    def ndcg(self, k: int) -> float:
        def dcg(gains: list[int]) -> float:
            return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], start=1))

        ideal = dcg(sorted(self.gains, reverse=True))
        return dcg(self.gains) / ideal if ideal else 0.0

    def interpolated_precision(self, tenths: int) -> float:
        relevant = sum(gain > 0 for gain in self.gains)
        best, hits = 0.0, 0
        for rank, gain in enumerate(self.gains, start=1):
            hits += gain > 0
            if 10 * hits >= tenths * relevant and relevant:
                best = max(best, hits / rank)
        return best

    def recall(self, pair: int, k: int) -> float:
        return float(pair in self.ranking[:k])


def problem(seed: int) -> dict[str, Tensor]:
    """Queries and gallery of unequal sizes; scores with and without ties; labels single, several or none."""
    draw = random.Random(seed)
    queries, size, classes = draw.randint(1, 9), draw.choice([1, 2, 5, 17, 30]), draw.randint(1, 6)
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, size, generator=rng, dtype=draw.choice([torch.float32, torch.float64]))
    if draw.random() < 0.6:
        scores = scores.round()  # ties, among them 0.0 with -0.0
    if draw.random() < 0.5:
        labels = torch.rand(queries + size, classes, generator=rng) < draw.choice([0.1, 0.4, 0.9])
    else:
        labels = torch.nn.functional.one_hot(torch.randint(classes, (queries + size,), generator=rng), classes).bool()
    return {
        "scores": scores,
        "query_labels": labels[:queries],
        "gallery_labels": labels[queries:],
        "order": tie_order(size, rng),
        "pairs": torch.randint(-1, size, (queries,), generator=rng),
    }


def measure(scores: Tensor, query_labels: Tensor, gallery_labels: Tensor, **options: object) -> Retrieval:
    options = {"order": torch.arange(len(gallery_labels)), "at": KS, "curves": True} | options
    return retrieval(lambda rows: scores[rows], query_labels, gallery_labels, **options)


def brute_force(scores: Tensor, query_labels: Tensor, gallery_labels: Tensor, order: Tensor) -> list[BruteForce]:
    def sets(labels: Tensor) -> list[set[int]]:
        return [{c for c, has in enumerate(row) if has} for row in labels.tolist()]

    gallery = sets(gallery_labels)
    return [
        BruteForce(row, query, gallery, order.tolist())
        for row, query in zip(scores.tolist(), sets(query_labels), strict=True)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def close(expected: object) -> object:
    return pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(150))
def test_every_metric_is_its_definition(seed: int):
    given = problem(seed)
    found = measure(**given)
    pairs = given.pop("pairs").tolist()
    everyone = brute_force(**given)
    counted = [query for query in everyone if any(query.gains)]

    assert (found.queries, found.left_out) == (len(counted), len(everyone) - len(counted))
    assert found.map == close(mean([q.average_precision() for q in counted]))
    assert found.map_at == close({k: mean([q.average_precision(k) for q in counted]) for k in KS})
    assert found.precision_at == close({k: mean([q.precision(k) for q in counted]) for k in KS})
    assert found.hit_at == close({k: mean([q.hit(k) for q in counted]) for k in KS})
    assert found.ndcg_at == close({k: mean([q.ndcg(k) for q in counted]) for k in KS})
    curve = tuple(mean([q.interpolated_precision(tenths) for q in counted]) for tenths in range(11))
    assert found.precision_recall == close(curve)
    paired = [(q, pair) for q, pair in zip(everyone, pairs, strict=True) if pair >= 0]
    assert found.paired == len(paired)
    assert found.recall_at == close({k: mean([q.recall(pair, k) for q, pair in paired]) for k in KS})
    assert found.tied == close(mean([q.tied for q in everyone]))


@pytest.mark.parametrize("seed", range(150, 180))
def test_the_options_are_their_definitions(seed: int):
    given = problem(seed)
    found = measure(**given, ap_variant="dlsl", without_relevant="zero")
    del given["pairs"]
    everyone = brute_force(**given)
    assert (found.queries, found.left_out) == (len(everyone), 0)
    assert found.map == close(mean([q.average_precision(rank_offset=1) for q in everyone]))
    assert found.map_at == close({k: mean([q.average_precision(k, rank_offset=1) for q in everyone]) for k in KS})
    assert found.precision_at == close({k: mean([q.precision(k) for q in everyone]) for k in KS})


def test_the_random_problems_hold_what_they_are_meant_to_hold():
    problems = [problem(seed) for seed in range(150)]
    assert any(len(p["gallery_labels"]) == 1 for p in problems)
    assert any(measure(**p).left_out for p in problems)
    assert any(measure(**p).queries == 0 for p in problems)
    assert any(0 < measure(**p).tied < 1 for p in problems)
    assert any((p["query_labels"].sum(1) > 1).any() and (p["scores"].dtype == torch.float32) for p in problems)
    assert any(((p["scores"] == 0) & p["scores"].signbit()).any() for p in problems)


# By hand: one query, five items, relevant at ranks 1, 3 and 4

SCORES = torch.tensor([[0.9, -0.2, 0.1, 0.5, 0.3]])
QUERY = torch.tensor([[True, True]])
GALLERY = torch.tensor([[True, False], [False, False], [True, True], [False, False], [False, True]])


def test_one_query_by_hand():
    found = measure(SCORES, QUERY, GALLERY, at=(1, 2, 3, 4, 9), pairs=torch.tensor([2]))
    assert found.map == close((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert found.map_at == close({1: 1, 2: 1, 3: (1 + 2 / 3) / 2, 4: (1 + 2 / 3 + 3 / 4) / 3, 9: found.map})
    assert found.precision_at == close({1: 1, 2: 1 / 2, 3: 2 / 3, 4: 3 / 4, 9: 3 / 5})
    assert found.recall_at == {1: 0, 2: 0, 3: 0, 4: 1, 9: 1}
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    gained = 1 + 1 / 2 + 2 / math.log2(5)
    assert found.ndcg_at[9] == close(gained / ideal)
    assert found.ndcg_at[1] == close(1 / 2)


def test_the_precision_recall_curve_by_hand():
    # a recall of 1/3 is reached with precision 1; 2/3 and all with 3/4 at rank 4, which is more than 2/3 at rank 3
    assert measure(SCORES, QUERY, GALLERY).precision_recall == close((1,) * 4 + (0.75,) * 7)


def test_recall_levels_that_floats_cannot_hold_are_reached():
    # 3 of 10 relevant items are a recall of .3, but in floats 3 / 10 is below 3 * 0.1
    labels = torch.ones(10, 1, dtype=torch.bool)
    gallery = torch.tensor([[True]] * 3 + [[False]] * 10 + [[True]] * 7)
    falling = torch.arange(20, 0, -1).float()[None]
    curve = measure(falling, labels[:1], gallery).precision_recall
    assert curve[:5] == close((1, 1, 1, 1, 0.5))


def test_the_variant_of_the_dlsl_authors_counts_a_hit_at_rank_1_as_half():
    found = measure(SCORES, QUERY, GALLERY, ap_variant="dlsl")
    assert found.map == close((1 / 2 + 2 / 4 + 3 / 5) / 3)
    assert found.map_at[1] == 0.5
    assert found.precision_at[1] == 1


# Other libraries, where there are no ties to break


@pytest.fixture(params=[torch.float32, torch.float64])
def untied(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    labels = torch.rand(130, 4, generator=rng) < 0.25
    labels[:, 0] |= ~labels.any(1)
    # positive: torchmetrics drops what scores 0 or less
    scores = torch.stack([torch.randperm(90, generator=rng) for _ in range(40)]).to(request.param) / 90 + 0.01
    return scores, labels[:40], labels[40:]


def test_map_agrees_with_scikit_learn(untied: tuple[Tensor, Tensor, Tensor]):
    scores, query, gallery = untied
    relevant = (query.float() @ gallery.float().T > 0).numpy()
    theirs = [average_precision_score(y, s) for y, s in zip(relevant, scores.numpy(), strict=True)]
    found = measure(*untied)
    assert found.left_out == 0
    np.testing.assert_allclose(found.average_precision.numpy(), theirs, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 90])
def test_ndcg_agrees_with_scikit_learn(untied: tuple[Tensor, Tensor, Tensor], k: int):
    scores, query, gallery = untied
    gains = (query.double() @ gallery.double().T).numpy()
    assert measure(*untied, at=(k,)).ndcg_at[k] == close(ndcg_score(gains, scores.numpy(), k=k))


@pytest.mark.parametrize("k", [1, 5, 90])
def test_the_metrics_at_k_agree_with_torchmetrics(untied: tuple[Tensor, Tensor, Tensor], k: int):
    scores, query, gallery = untied
    gains = (query.float() @ gallery.float().T).long()

    def theirs(metric: object, target: Tensor) -> float:
        return mean([metric(s, y, top_k=k).item() for s, y in zip(scores, target, strict=True)])

    found = measure(*untied, at=(k,))
    assert found.map_at[k] == pytest.approx(theirs(retrieval_average_precision, gains > 0), rel=1e-5)
    assert found.precision_at[k] == pytest.approx(theirs(retrieval_precision, gains > 0), rel=1e-5)
    assert found.hit_at[k] == pytest.approx(theirs(retrieval_hit_rate, gains > 0), rel=1e-5)
    assert found.ndcg_at[k] == pytest.approx(theirs(retrieval_normalized_dcg, gains), rel=1e-5)

"""What zero-shot scores are judged against: chance, cosine and ridge, each against another implementation."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from fedxmr.floors import PENALTIES, chance, chance_precision, raw_cosine, ridge, ridge_to_class_vectors
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items
from fedxmr.zero_shot import Protocol, subsets, task_items


@pytest.mark.parametrize(("relevant", "gallery"), [(1, 1), (1, 6), (2, 6), (5, 6), (6, 6), (3, 7)])
def test_chance_is_the_mean_over_all_rankings(relevant, gallery):
    hit = np.arange(gallery) < relevant
    every = [average_precision_score(hit, order) for order in permutations(range(gallery))]
    assert float(chance_precision(torch.tensor([relevant]), gallery)) == pytest.approx(np.mean(every))


def test_chance_takes_many_queries_at_once():
    ranks = range(1, 301)
    one = np.mean([1 / i for i in ranks])
    two = np.mean([(1 / i + 2 / j) / 2 for i, j in combinations(ranks, 2)])
    assert chance_precision(torch.tensor([1, 300, 2]), 300).tolist() == pytest.approx([one, 1.0, two])


@pytest.mark.parametrize("penalty", [0.1, 1.0, 1000.0])
@pytest.mark.parametrize("width", [4, 60])  # fewer and more columns than items
def test_ridge_is_that_of_scikit_learn(penalty, width):
    g = generator(0, "ridge")
    x, y = torch.randn(30, width, generator=g) + 2, torch.randn(30, 5, generator=g) - 1
    weights, intercept = ridge(x, y, penalty)
    theirs = Ridge(alpha=penalty).fit(x.double().numpy(), y.double().numpy())
    np.testing.assert_allclose(weights.T.numpy(), theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(intercept.numpy(), theirs.intercept_, atol=1e-9)


CLASSES = 6
SEEN = torch.tensor([True, False, True, False, True, False])


def made_up(widths=(8, 8)):
    """Training and test items near an image of their class's vector, and a validation part."""
    g = generator(0, "made up")
    vectors = torch.randn(CLASSES, 4, generator=g)
    mixing = {m: torch.randn(4, d, generator=g) for m, d in zip(("image", "text"), widths, strict=True)}
    parts = []
    for n in (60, 36, 30):
        classes = torch.arange(n) % CLASSES
        features = {m: vectors[classes] @ w + torch.randn(n, w.shape[1], generator=g) for m, w in mixing.items()}
        parts.append(Items.paired(features, torch.eye(CLASSES, dtype=torch.bool)[classes]))
    train, test, validation = parts
    of = subsets(train.labels, test.labels, SEEN)
    tasks = {t: task_items(t, of, test.labels, generator(0, "halves")) for t in ("seen", "unseen")}
    seen = validation.select((validation.labels & SEEN).any(1).nonzero().flatten())
    spec = DataSpec(dict(zip(("image", "text"), widths, strict=True)), CLASSES, vectors, SEEN)
    return Protocol(train, test, tasks), of, train.select(of.ss), seen, spec


def outside_map(scores, query_labels, gallery_labels):
    relevant = (query_labels.float() @ gallery_labels.float().T > 0).numpy()
    return np.mean([average_precision_score(r, s) for r, s in zip(relevant, scores, strict=True)])


def test_chance_of_a_task_is_of_its_queries_and_gallery():
    protocol, of, *_ = made_up()
    found = chance(protocol)["unseen"]
    expected = float(chance_precision(torch.tensor([len(of.us) // 3]), len(of.us)))
    assert found["image->text"] == found["text->image"] == pytest.approx(expected)


def test_raw_cosine_is_that_of_scikit_learn():
    protocol, of, _, _, spec = made_up()
    found = raw_cosine(protocol, spec, 0)["unseen"]
    x, y = protocol.test.features["text"][of.ut], protocol.train.features["image"][of.us]
    scores = cosine_similarity(x.numpy(), y.numpy())
    expected = outside_map(scores, protocol.test.labels[of.ut], protocol.train.labels[of.us])
    assert found["text->image"] == pytest.approx(expected)


def test_features_of_different_width_have_no_cosine():
    protocol, _, _, _, spec = made_up((8, 6))
    assert raw_cosine(protocol, spec, 0) is None


def test_ridge_is_fitted_on_seen_items_with_the_penalty_that_is_best_on_validation():
    protocol, of, train, validation, spec = made_up((8, 6))
    vectors = torch.nn.functional.normalize(spec.class_vectors.double()).numpy()

    def fitted(penalty):
        return {
            m: Ridge(alpha=penalty).fit(x.double().numpy(), vectors[train.labels.float().argmax(1)])
            for m, x in train.features.items()
        }

    def both(models, queries, gallery):
        encoded = [{m: models[m].predict(p.features[m].double().numpy()) for m in models} for p in (queries, gallery)]
        return [
            outside_map(cosine_similarity(encoded[0][a], encoded[1][b]), queries.labels, gallery.labels)
            for a, b in (("image", "text"), ("text", "image"))
        ]

    best = max(PENALTIES, key=lambda penalty: np.mean(both(fitted(penalty), validation, validation)))
    assert best != PENALTIES[0]  # so that taking the first would show
    expected = both(fitted(best), protocol.test.select(of.ut), protocol.train.select(of.us))
    found = ridge_to_class_vectors(protocol, train, validation, spec, 0)["unseen"]
    assert [found["image->text"], found["text->image"]] == pytest.approx(expected)


def test_without_class_vectors_there_is_no_ridge():
    protocol, _, train, validation, spec = made_up()
    assert ridge_to_class_vectors(protocol, train, validation, DataSpec(spec.dims, CLASSES, None, SEEN), 0) is None

"""The floors against scikit-learn, scipy, and the formulas of their papers written out."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from sklearn.cross_decomposition import CCA, PLSSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import cosine_similarity

from fedxmr.learners import FLOORS, learner_class
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

CLASSES = 4
TWO = {"image": 7, "text": 5}
THREE = {"audio": 6, **TWO}
ALIKE = {"image": 7, "text": 7}


def items(widths, purpose, n=80, several=False):
    """Items whose modalities mix what is common to them, what their class says, and noise; far from zero."""
    mixing, draw = generator(0, "mixing"), generator(0, purpose)
    classes = torch.randint(CLASSES, (n,), generator=draw)
    labels = torch.eye(CLASSES, dtype=torch.bool)[classes]
    if several:
        labels = labels | (torch.rand(n, CLASSES, generator=draw) < 0.2)
        labels[:3] = False
    common = torch.randn(n, 3, generator=draw)
    features = {}
    for m, d in widths.items():
        of_class, of_item = torch.randn(CLASSES, d, generator=mixing), torch.randn(3, d, generator=mixing)
        scale = 1 + 4 * torch.rand(d, generator=mixing)
        noise = torch.randn(n, d, generator=draw)
        features[m] = (labels.float() @ of_class + common @ of_item + noise) * scale + 5
    return Items.paired(features, labels)


def some_of(data, has):
    """Items that lack what `has`, modality -> [n] bool, says they lack."""
    rows = {m: h.nonzero().flatten() for m, h in has.items()}
    return Items({m: data.features[m][r] for m, r in rows.items()}, rows, data.labels)


def fitted(name, widths, train, **options):
    kind = learner_class(name)
    learner = kind(kind.Config(**options), DataSpec(widths, CLASSES), torch.device("cpu"), generator(0, "initial"))
    assert learner.fit(train, 1, generator(0, "fit")).trained
    return learner


def scores(name, widths, train, test, direction=("image", "text"), **options):
    """The learner's scores of test items."""
    learner = fitted(name, widths, train, **options)
    query, gallery = (learner.encode(m, test.features[m]) for m in direction)
    return learner.similarity(query, gallery, direction).numpy()


def arrays(data):
    return {m: x.double().numpy() for m, x in data.features.items()}


def close(ours, theirs, tolerance=2e-5):  # float32 encodings
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=tolerance)


def of_two():
    train, test = items(TWO, "train"), items(TWO, "test", 30)
    return train, test, arrays(train), arrays(test)


@pytest.mark.parametrize("name", ["cca", "mcca"])
def test_cca_without_ridge_is_scikit_learns(name):
    train, test, x, y = of_two()
    theirs = CCA(4, scale=False, max_iter=100_000, tol=1e-14).fit(x["image"], x["text"])
    width = [z.std(0) for z in theirs.transform(x["image"], x["text"])]
    image, text = (z / w for z, w in zip(theirs.transform(y["image"], y["text"]), width, strict=True))
    close(scores(name, TWO, train, test, components=4, ridge=0.0), cosine_similarity(image, text))


def stacked_problem(train, ridge):
    """S_ab off the diagonal, and the regularised S_aa on the other matrix's, in the modalities' sorted order."""
    names, x = sorted(train.features), arrays(train)
    rows = {m: dict(zip(r.tolist(), x[m] - x[m].mean(0), strict=True)) for m, r in train.rows.items()}
    own = {m: np.cov(x[m].T, bias=True) for m in names}
    own = {m: s + ridge * np.trace(s) / len(s) * np.eye(len(s)) for m, s in own.items()}
    between = {m: {m: np.zeros_like(own[m])} for m in names}
    for a, b in combinations(names, 2):
        both = rows[a].keys() & rows[b].keys()
        between[a][b] = np.mean([np.outer(rows[a][i], rows[b][i]) for i in both], axis=0)
        between[b][a] = between[a][b].T
    return np.block([[between[a][b] for b in names] for a in names]), scipy.linalg.block_diag(*own.values())


def projected(vectors, train, test):
    """Test items through stacked axes."""
    x, y, at, found = arrays(train), arrays(test), 0, {}
    for m in sorted(x):
        width = x[m].shape[1]
        found[m] = (y[m] - x[m].mean(0)) @ vectors[at : at + width]
        at += width
    return found


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize(("name", "widths"), [("cca", TWO), ("mcca", TWO), ("mcca", THREE)])
def test_cca_and_mcca_solve_the_generalised_eigenproblem(name, widths, ridge):
    train, test = items(widths, "train"), items(widths, "test", 30)
    _, vectors = scipy.linalg.eigh(*stacked_problem(train, ridge))
    theirs = projected(vectors[:, ::-1][:, :4], train, test)
    for direction in combinations(widths, 2):
        ours = scores(name, widths, train, test, direction, components=4, ridge=ridge)
        close(ours, cosine_similarity(*(theirs[m] for m in direction)))


def test_mcca_takes_each_pair_of_modalities_from_the_items_that_have_both():
    whole, test = items(THREE, "train", 120), items(THREE, "test", 30)
    i = torch.arange(120)
    # the last 20 have one modality, and teach nothing
    train = some_of(whole, {"audio": i % 3 != 0, "image": (i % 3 != 1) & (i < 100), "text": (i % 3 != 2) & (i < 100)})
    counted = some_of(whole, {m: torch.isin(i, r) & (i < 100) for m, r in train.rows.items()})
    _, vectors = scipy.linalg.eigh(*stacked_problem(counted, 0.1))
    theirs = projected(vectors[:, ::-1][:, :3], counted, test)
    for direction in combinations(THREE, 2):
        ours = scores("mcca", THREE, train, test, direction, components=3, ridge=0.1)
        close(ours, cosine_similarity(*(theirs[m] for m in direction)))


def test_cca_of_incomplete_items_is_that_of_the_complete_ones():
    whole, test = items(TWO, "train", 120), items(TWO, "test", 30)
    i = torch.arange(120)
    train = some_of(whole, {"image": i < 90, "text": i >= 20})
    close(scores("cca", TWO, train, test), scores("cca", TWO, whole.select(i[20:90]), test))


def test_pls_is_scikit_learns_plssvd():
    train, test, x, y = of_two()
    theirs = PLSSVD(3, scale=False).fit(x["image"], x["text"]).transform(y["image"], y["text"])
    close(scores("pls", TWO, train, test, components=3), cosine_similarity(*theirs))


def scatters(train):
    """S_W and S_B of the paper, sample by sample: one of each class of each row of each modality, stacked."""
    names, x = sorted(train.features), arrays(train)
    starts = dict(zip(names, np.cumsum([0, *(x[m].shape[1] for m in names)]), strict=False))
    total = sum(x[m].shape[1] for m in names)
    samples, classes = [], []
    for m in names:
        own = [
            (row, c) for row, i in zip(x[m], train.rows[m], strict=True) for c in train.labels[i].nonzero().flatten()
        ]
        mean = np.mean([row for row, _ in own], axis=0)
        for row, c in own:
            padded = np.zeros(total)
            padded[starts[m] : starts[m] + len(row)] = row - mean
            samples.append(padded)
            classes.append(int(c))
    samples, classes = np.array(samples), np.array(classes)
    within, between, mean = np.zeros((total, total)), np.zeros((total, total)), samples.mean(0)
    for c in set(classes.tolist()):
        of_class = samples[classes == c]
        apart = of_class - of_class.mean(0)
        within += apart.T @ apart
        between += len(of_class) * np.outer(of_class.mean(0) - mean, of_class.mean(0) - mean)
    return samples, classes, within, between


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_mvda_solves_the_papers_eigenproblem(ridge, lacking, several):
    whole, test = items(THREE, "train", 90, several), items(THREE, "test", 30)
    i = torch.arange(90)
    everyone = torch.ones(90, dtype=torch.bool)
    has = {"audio": i < 40, "image": i >= 30, "text": i % 2 == 0} if lacking else dict.fromkeys(THREE, everyone)
    train = some_of(whole, has)
    _, _, within, between = scatters(train)
    total = np.diag(within + between)
    at = 0
    for m in sorted(THREE):
        own = slice(at, at + THREE[m])
        within[own, own] += ridge * total[own].mean() * np.eye(THREE[m])
        at += THREE[m]
    _, vectors = scipy.linalg.eigh(between, within)
    theirs = projected(vectors[:, ::-1][:, : CLASSES - 1], train, test)
    # the learner's bias takes off the mean of samples, which is not that of rows where items have several classes
    x = arrays(train)
    for at, m in zip(np.cumsum([0, 6, 7]), sorted(THREE), strict=True):
        weights = train.labels[train.rows[m]].sum(1).numpy()
        shift = np.average(x[m], axis=0, weights=weights) - x[m].mean(0)
        theirs[m] = theirs[m] - shift @ vectors[at : at + THREE[m], ::-1][:, : CLASSES - 1]
    for direction in combinations(THREE, 2):
        ours = scores("mvda", THREE, train, test, direction, ridge=ridge)
        close(ours, cosine_similarity(*(theirs[m] for m in direction)))


def test_mvda_is_scikit_learns_discriminant_analysis_of_stacked_modalities():
    train, test = items(TWO, "train"), items(TWO, "test", 30)
    samples, classes, _, _ = scatters(train)
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(samples, classes)
    found = projected(theirs.scalings_[:, : CLASSES - 1], train, test)
    close(scores("mvda", TWO, train, test, ridge=0.0), cosine_similarity(found["image"], found["text"]))


@pytest.mark.parametrize("similarity", ["product", "cosine"])
@pytest.mark.parametrize("several", [False, True])
def test_logistic_regression_minimises_the_penalised_cross_entropy(several, similarity):
    train, test = items(TWO, "train", several=several), items(TWO, "test", 30)
    probabilities = []
    for m in ("image", "text"):
        labels = train.labels[3:] if several else train.labels  # the first three have no class
        x, target = train.features[m][-len(labels) :].double(), labels.double() / labels.sum(1, keepdim=True)
        d = x.shape[1]

        def objective(flat, x=x, target=target, d=d):
            weights = torch.tensor(flat, requires_grad=True)
            w, b = weights[: d * CLASSES].view(CLASSES, d), weights[d * CLASSES :]
            loss = -((x @ w.T + b).log_softmax(1) * target).sum() + 2.0 / 2 * w.square().sum()
            loss.backward()
            return loss.item(), weights.grad.numpy()

        least = scipy.optimize.minimize(objective, np.zeros((d + 1) * CLASSES), jac=True, method="BFGS", tol=1e-7)
        w, b = torch.tensor(least.x[: d * CLASSES]).view(CLASSES, d), torch.tensor(least.x[d * CLASSES :])
        probabilities.append((test.features[m].double() @ w.T + b).softmax(1).numpy())
    theirs = {"product": probabilities[0] @ probabilities[1].T, "cosine": cosine_similarity(*probabilities)}[similarity]
    close(scores("logistic", TWO, train, test, penalty=2.0, similarity=similarity), theirs, 1e-4)


def test_untrained_cosine_is_scikit_learns():
    test = items(ALIKE, "test", 30)
    kind = learner_class("cosine")
    learner = kind(kind.Config(), DataSpec(ALIKE, CLASSES), torch.device("cpu"), None)
    image, text = (test.features[m] - 5 for m in ("image", "text"))
    ours = learner.similarity(learner.encode("image", image), learner.encode("text", text), ("image", "text"))
    close(ours.numpy(), cosine_similarity(image.double().numpy(), text.double().numpy()))


def test_every_floor_is_here():
    assert set(FLOORS) == {"cca", "mcca", "pls", "mvda", "logistic", "cosine"}

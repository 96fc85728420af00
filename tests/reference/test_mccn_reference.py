"""MCCN's losses, walk, prototypes and steps against loops over the paper's numbered equations in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedxmr.learners.coordination import padding, walk
from fedxmr.learners.dscmr import dscmr_loss
from fedxmr.learners.mccn import MCCN, MCCNConfig, all_pairs_loss, distances, per_sample_loss
from fedxmr.learners.pairwise import pairwise_loss
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items, Proximal

PAIRINGS = {"per_sample": per_sample_loss, "literal": all_pairs_loss}


def unit(x):
    length = math.sqrt(x @ x)
    return x / length if length >= 1e-6 else x * 0


def literal_distances(h, o, normalise):
    """[n][C]: the Euclidean distances of eq. 10's text, with the 1e-12 under the root."""
    if normalise:
        h, o = [unit(a) for a in h], [unit(b) for b in o]
    return [[math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) + 1e-12) for b in o] for a in h]


def equation_10(positive, negative, scale, delta):
    """One modality's log[1 + sum_b sum_a exp(scale (d_a - d^_b + delta))]; in longdouble 1024 does not overflow."""
    total = np.longdouble(0)
    for b in negative:
        for a in positive:
            total += np.exp(np.longdouble(scale) * (np.longdouble(a) - np.longdouble(b) + np.longdouble(delta)))
    return float(np.log1p(total))


def equation_11(positive, negative, scale, delta_p, delta_n):
    """The same as the product of two sums, with both margins."""
    own = sum((np.exp(np.longdouble(scale) * (np.longdouble(a) - delta_p)) for a in positive), np.longdouble(0))
    wrong = sum((np.exp(-np.longdouble(scale) * (np.longdouble(b) - delta_n)) for b in negative), np.longdouble(0))
    return float(np.log1p(own * wrong))


def literal_losses(d, own, wrong, scale, delta, pairing):
    """What `pairing` makes of one modality: [n] losses of samples, or one of the batch."""
    pick = [([x for x, y in zip(*row, strict=True) if y]) for row in zip(d, own, strict=True)]
    against = [([x for x, y in zip(*row, strict=True) if y]) for row in zip(d, wrong, strict=True)]
    if pairing == "per_sample":
        return [equation_10([sum(a) / len(a)], b, scale, delta) for a, b in zip(pick, against, strict=True)]
    return equation_10(np.concatenate(pick), np.concatenate(against), scale, delta)


def case(name):
    """-> embeddings [n, k], prototypes [C, k], own and wrong [n, C] bool."""
    rng = np.random.default_rng(11)
    n, classes = 6, 4
    if name == "one item":
        n = 1
    if name == "two classes":
        classes = 2
    h, o = rng.normal(size=(n, 3)), rng.normal(size=(classes, 3))
    own = np.eye(classes, dtype=bool)[rng.integers(classes, size=n)]
    wrong = ~own
    if name == "several classes":
        own = rng.random((n, classes)) < 0.5
        own[:, 0] |= ~own.any(1)
        wrong = ~own
        wrong[0], own[0] = False, True  # an item of every class is kept from none
    if name == "a class not yet started":
        own[own[:, 3]] = [True, False, False, False]
        o[3] = 0
        wrong = ~own & [True, True, True, False]
    if name == "one class":
        own[:] = [True, False, False, False]
        wrong = own & False
    return h, o, own, wrong


CASES = ["random", "one item", "two classes", "several classes", "a class not yet started", "one class"]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_distances_are_euclidean_not_squared(name, normalise):
    h, o, _, _ = case(name)
    ours = distances(torch.from_numpy(h), torch.from_numpy(o), normalise=normalise)
    np.testing.assert_allclose(ours, literal_distances(h, o, normalise), rtol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 4.0, 64.0, 1024.0])
@pytest.mark.parametrize("margin", [0.6, 0.8, -0.2])  # Tables 5 and 6 at m = .2: full, without Delta_p, without Delta_n
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_equation_10(name, pairing, margin, scale):
    h, o, own, wrong = case(name)
    d = literal_distances(h, o, True)
    ours = PAIRINGS[pairing](torch.tensor(d, dtype=torch.float64), *map(torch.from_numpy, (own, wrong)), scale, margin)
    expected = literal_losses(d, own, wrong, scale, margin, pairing)
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("m", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(
    ("options", "delta_p", "delta_n"),
    [
        ({}, lambda m: m, lambda m: 1 - m),
        ({"intra_margin": False}, lambda m: 0, lambda m: 1 - m),
        ({"inter_margin": False}, lambda m: m, lambda m: 0),
        ({"intra_margin": False, "inter_margin": False}, lambda m: 0, lambda m: 0),
    ],
    ids=["full", "without Delta_p", "without Delta_n", "without both"],
)
def test_the_margins_of_equation_11_are_one_in_equation_10(options, delta_p, delta_n, m):
    margin = MCCNConfig(m=m, **options).margin
    assert margin == pytest.approx(delta_n(m) - delta_p(m))
    h, o, own, wrong = case("random")
    d = torch.tensor(literal_distances(h, o, True), dtype=torch.float64)
    own, wrong = torch.from_numpy(own), torch.from_numpy(wrong)
    everything = equation_11(d[own].tolist(), d[wrong].tolist(), 5.0, delta_p(m), delta_n(m))
    assert float(all_pairs_loss(d, own, wrong, 5.0, margin)) == pytest.approx(everything, rel=1e-12)
    each = [
        equation_11(d[i, own[i]].tolist(), d[i, wrong[i]].tolist(), 5.0, delta_p(m), delta_n(m)) for i in range(len(d))
    ]
    assert per_sample_loss(d, own, wrong, 5.0, margin).tolist() == pytest.approx(each, rel=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_formulas_slope(name, pairing, normalise):
    h, o, own, wrong = case(name)
    u, p = torch.from_numpy(h).requires_grad_(), torch.from_numpy(o).requires_grad_()
    masks = torch.from_numpy(own), torch.from_numpy(wrong)
    PAIRINGS[pairing](distances(u, p, normalise=normalise), *masks, 3.0, 0.6).sum().backward()
    h, o = h.copy(), o.copy()

    def loss():
        return np.sum(literal_losses(literal_distances(h, o, normalise), own, wrong, 3.0, 0.6, pairing))

    slopes = [slope(loss, part) for part in (h, o)]
    if name == "a class not yet started" and normalise:
        slopes[1][3] = 0  # its distances are in no sum; moving it off zero would not change that
    np.testing.assert_allclose(u.grad, slopes[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(p.grad, slopes[1], rtol=1e-6, atol=1e-8)


def slope(loss, part, h=1e-6):
    """The central differences of a loss in an array that it reads."""
    found = np.zeros_like(part)
    for at in np.ndindex(part.shape):
        value = part[at]
        part[at] = value + h
        up = loss()
        part[at] = value - h
        found[at] = (up - loss()) / (2 * h)
        part[at] = value
    return found


def test_without_clustering_the_loss_is_dscmrs_pairwise_term():
    rng = np.random.default_rng(3)
    sizes = [4, 2, 3]
    h = torch.from_numpy(rng.normal(size=(9, 3)))
    classes = torch.from_numpy(rng.random((9, 4)) < 0.5)
    modality = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    rows = list(torch.arange(9).split(sizes))
    expected = dscmr_loss(h, classes.double(), rows, classes).similarity
    weight = 1 / torch.tensor(sizes, dtype=torch.float64)[modality]
    order = torch.from_numpy(rng.permutation(9))
    ours = pairwise_loss(h[order], classes[order], modality[order], weight[order])
    torch.testing.assert_close(ours, expected)


COUNTS = np.array([[5, 2, 3], [1, 2, 0], [4, 3, 1]])  # modalities by classes; the first has the most


def test_padding_is_the_classes_of_modality_k_that_are_missing():
    expected = [[max(0, int(COUNTS[0, c] - COUNTS[z, c])) for c in range(3)] for z in range(3)]
    assert padding(torch.from_numpy(COUNTS)).tolist() == expected == [[0, 0, 0], [4, 0, 3], [1, 0, 2]]


def transition_table(z, c, eps):
    """Eq. 5-7 from one padding embedding of modality z, class c, to each real one, numbered by class, then modality."""
    p = []
    for category in range(3):
        for modality in range(3):
            e = category == c and modality != z  # eq. 5; eps_0 is 0 for padding, and padding is no target
            p += [(float(e) if eps is None else (eps if e else 1.0))] * COUNTS[modality, category]
    return np.array(p) / sum(p)


@pytest.mark.parametrize("eps", [None, 3.0, 1000.0])
@pytest.mark.parametrize(("z", "c"), [(1, 0), (1, 2), (2, 0), (2, 2), (0, 1)])
def test_the_walk_has_the_transition_probabilities(z, c, eps):
    n = 40_000
    modality, category = torch.full((n,), z), torch.full((n,), c)
    reached = walk(modality, category, torch.from_numpy(COUNTS), eps, generator(0, "walk", z, c))
    frequency = reached.bincount(minlength=COUNTS.sum()).double().numpy() / n
    p = transition_table(z, c, eps)
    assert (frequency[p == 0] == 0).all()
    # five standard deviations of a proportion
    assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-12).all()


def literal_adam(weight, gradients, lr, betas):
    m = v = np.zeros_like(weight)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        weight = weight - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8)
    return weight


SPEC = DataSpec({"image": 3, "text": 2}, 3)


def tiny(**options):
    """Two images of class 0, one each of 1 and 2; no text of class 2, so its one slot can only be image 3's."""
    config = MCCNConfig(**{"hidden": 6, "width": 5, "batch_size": 4, "scale": 2.0} | options)
    learner = MCCN(config, SPEC, torch.device("cpu"), generator(69, "initial"))  # no slope vanishes by chance
    g = generator(1, "data")
    labels = torch.eye(3, dtype=torch.bool)[[0, 0, 1, 2]]
    data = Items(
        {"image": torch.randn(4, 3, generator=g), "text": torch.randn(3, 2, generator=g)},
        {"image": torch.arange(4), "text": torch.arange(3)},
        labels,
    )
    return learner, data


def parameters(state):
    return {name: t.double().numpy().copy() for name, t in state.items() if not name.startswith("optimizer.")}


def embed(w, tower, x):
    x = np.concatenate([x, np.zeros(w[f"towers.{tower}.weight"].shape[1] - len(x))])  # eq. 3
    hidden = np.maximum(w[f"towers.{tower}.weight"] @ x + w[f"towers.{tower}.bias"], 0)
    return np.maximum(w["common.weight"] @ hidden + w["common.bias"], 0)


def real(w, data):
    """Modality -> its real embeddings; image i and text i are of the class of item i."""
    return {m: [embed(w, m, x) for x in data.features[m].double().numpy()] for m in ("image", "text")}


def class_means(w, data):
    """Every class's mean over the embeddings of all modalities, scaled to length 1 as the loss sees them."""
    h = real(w, data)
    label = [0, 0, 1, 2]
    return np.array(
        [np.mean([unit(x) for m in h for x, c in zip(h[m], label, strict=False) if c == k], axis=0) for k in range(3)]
    )


def literal_model(w, data, pairing, route, coordinate=True):
    """Eq. 11 of the whole model with m = .2 and scale 2, every real embedding once and the slot's replacement."""
    return sum(np.mean(losses) for losses in literal_parts(w, data, pairing, route, coordinate))


def literal_parts(w, data, pairing, route, coordinate):
    """By modality, the losses of its samples, or the one of them all."""
    h = real(w, data)
    if coordinate:
        tower = {"source": "image", "padded": "text"}[route]
        h["text"].append(embed(w, tower, data.features["image"][3].double().numpy()))
    own = np.eye(3, dtype=bool)[[0, 0, 1, 2]]
    return [
        literal_losses(
            literal_distances(h[m], w["prototypes"], True), own[: len(h[m])], ~own[: len(h[m])], 2.0, 0.6, pairing
        )
        for m in h
    ]


def gradients(w, data, *model):
    return {name: slope(lambda: literal_model(w, data, *model), part) for name, part in w.items()}


MODELS = [
    ("per_sample", "source", True),
    ("per_sample", "padded", True),
    ("literal", "source", True),
    ("literal", "padded", True),
    ("per_sample", "source", False),
]


def test_prototypes_start_at_the_class_means_of_all_modalities():
    learner, data = tiny(optimizer={"lr": 1e-30})
    start = learner.state()
    assert not start["prototypes"].any()
    learner.fit(data, 1, generator(0, "fit"))
    np.testing.assert_allclose(
        learner.state()["prototypes"], class_means(parameters(start), data), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(("pairing", "route", "coordinate"), MODELS)
def test_two_epochs_are_two_literal_adam_steps(pairing, route, coordinate):
    options = {"pairing": pairing, "route": route, "coordinate": coordinate}
    learner, data = tiny(**options, optimizer={"lr": 0.01, "betas": (0.5, 0.9)})
    # not at the class means: class 2 would start at distance 0, where float32 has no slope to compare
    learner.load({"prototypes": torch.randn(3, 5, generator=generator(0, "prototypes"))})
    start = parameters(learner.state())
    learner.fit(data, 1, generator(0, "fit"))
    after_one = parameters(learner.state())
    learner.fit(data, 1, generator(0, "fit"))
    after_two = parameters(learner.state())
    first = gradients(start, data, pairing, route, coordinate)
    second = gradients(after_one, data, pairing, route, coordinate)
    for name, at in start.items():
        gs = [first[name], second[name]]
        np.testing.assert_allclose(after_one[name], literal_adam(at, gs[:1], 0.01, (0.5, 0.9)), atol=5e-6, err_msg=name)
        np.testing.assert_allclose(after_two[name], literal_adam(at, gs, 0.01, (0.5, 0.9)), atol=5e-6, err_msg=name)


@pytest.mark.parametrize(("pairing", "route", "coordinate"), MODELS)
def test_the_report_is_the_mean_per_sample_loss(pairing, route, coordinate):
    learner, data = tiny(pairing=pairing, route=route, coordinate=coordinate, optimizer={"lr": 1e-30})
    w = parameters(learner.state())
    w["prototypes"] = class_means(w, data)
    fit = learner.fit(data, 1, generator(0, "fit"))
    samples = np.concatenate(literal_parts(w, data, "per_sample", route, coordinate))
    assert len(samples) == (8 if coordinate else 7)  # of two modalities with as many, or one less
    assert fit.loss == pytest.approx(np.mean(samples), rel=1e-5)
    assert fit.loss_sum == pytest.approx(fit.loss)  # one batch


def test_fedprox_starts_and_steps_by_the_loss_plus_half_mu_the_squared_distance():
    mu = 0.3
    learner, data = tiny(optimizer={"name": "sgd", "lr": 0.1})
    state = learner.state()
    # below the anchor |w - a| and (w - a) differ in sign, so a wrong gradient shows
    anchor = {"common.weight": state["common.weight"] + 2, "prototypes": torch.full((3, 5), 0.5)}
    w = parameters(state)
    w["prototypes"] = (class_means(w, data) + mu * 0.5) / (1 + mu)
    loss = literal_model(w, data, "per_sample", "source")
    slopes = gradients(w, data, "per_sample", "source")
    fit = learner.fit(data, 1, generator(0, "fit"), Proximal(mu, anchor))
    assert fit.loss == pytest.approx(loss / 2, rel=1e-5)  # without the proximal term
    for name, after in parameters(learner.state()).items():
        pull = mu * (w[name] - anchor[name].double().numpy()) if name in anchor else 0.0
        np.testing.assert_allclose(after, w[name] - 0.1 * (slopes[name] + pull), atol=1e-6, err_msg=name)

"""DSCMR's loss, its gradient and one step against loops over the formulas in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedxmr.learners.dscmr import DSCMR, DSCMRConfig, Terms, dscmr_loss
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items, Proximal

NORMS, BLOCKS, SIMILAR = ("row", "frobenius"), ("unordered", "ordered"), ("binary", "count")


def literal_loss(common, predicted, rows, labels, norm, blocks, similar):
    """l1, l2, l3 of lists of per-modality arrays: element by element, as the module's docstring prints them."""
    modalities = range(len(rows))

    def mean_norm(differences):
        if norm == "row":
            return sum(math.sqrt(sum(e * e for e in d) + 1e-12) for d in differences) / len(differences)
        return math.sqrt(sum(e * e for d in differences for e in d) + 1e-12) / len(differences)

    def cos(a, b):
        length_a, length_b = math.sqrt(a @ a), math.sqrt(b @ b)
        return 0.0 if length_a < 1e-6 or length_b < 1e-6 else float(a @ b) / length_a / length_b

    l1 = l2 = l3 = 0.0
    for m in modalities:
        if len(rows[m]):
            l1 += mean_norm([predicted[m][r] - labels[item].astype(float) for r, item in enumerate(rows[m])])
    for m in modalities:
        for k in modalities:
            if (k < m and blocks == "unordered") or not len(rows[m]) or not len(rows[k]):
                continue
            block = 0.0
            for a, i in enumerate(rows[m]):
                for b, j in enumerate(rows[k]):
                    gamma = cos(common[m][a], common[k][b]) / 2
                    shared = int((labels[i] & labels[j]).sum())
                    s = shared if similar == "count" else int(shared > 0)
                    block += math.log(1 + math.exp(gamma)) - s * gamma
            l2 += block / len(rows[m]) / len(rows[k])
    for m in modalities:
        for k in range(m + 1, len(rows)):
            at = {item: r for r, item in enumerate(rows[k])}
            differences = [common[m][r] - common[k][at[item]] for r, item in enumerate(rows[m]) if item in at]
            if differences:
                l3 += mean_norm(differences)
    return l1, l2, l3


def flat(parts, width):
    return torch.from_numpy(np.concatenate([np.reshape(p, (-1, width)) for p in parts]))


def case(name):
    """-> common, predicted (lists of [n_m, .]), rows (lists of items), labels [n, C]."""
    rng = np.random.default_rng(7)
    n, rows, classes, scale = 5, [range(5), range(5)], 4, 1.0
    if name == "one item":
        n, rows = 1, [range(1), range(1)]
    if name == "three modalities, missing":
        n, rows = 6, [[0, 2, 3, 5], [1, 2, 4, 5], [0, 1, 2]]
    if name == "no item in common":
        n, rows = 5, [[0, 2], [1, 3, 4]]
    if name == "nobody has the second":
        rows = [range(5), []]
    if name == "one modality":
        rows = [range(5)]
    if name == "huge":
        scale = 1e6
    labels = np.eye(classes, dtype=bool)[rng.integers(classes, size=n)]
    if name == "all equal":
        labels[:] = labels[0]
    if name == "multi-label":
        labels = rng.random((n, classes)) < 0.6
        labels[0] = True
        labels[1] = False
    common = [scale * rng.normal(size=(len(r), 3)) for r in rows]
    predicted = [scale * rng.normal(size=(len(r), classes)) for r in rows]
    if name == "zero rows":
        common[0][1] = common[1][1] = common[1][3] = 0.0
    if name == "identical":
        common[1], predicted[1] = common[0].copy(), labels.astype(float)
    return common, predicted, [list(r) for r in rows], labels


CASES = [
    "random",
    "one item",
    "three modalities, missing",
    "no item in common",
    "nobody has the second",
    "one modality",
    "huge",
    "all equal",
    "multi-label",
    "zero rows",
    "identical",
]


def ours(common, predicted, rows, labels, **options) -> Terms:
    return dscmr_loss(common, predicted, [torch.tensor(r, dtype=torch.int64) for r in rows], labels, **options)


@pytest.mark.parametrize("similar", SIMILAR)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_each_term_is_the_formula(name, norm, blocks, similar):
    common, predicted, rows, labels = case(name)
    terms = ours(
        flat(common, 3),
        flat(predicted, 4),
        rows,
        torch.from_numpy(labels),
        norm=norm,
        blocks=blocks,
        similar=similar,
    )
    expected = literal_loss(common, predicted, rows, labels, norm, blocks, similar)
    assert [float(t) for t in terms] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [c for c in CASES if c not in ("zero rows", "identical", "huge")])
def test_the_gradient_is_the_formulas_slope(name, norm):
    common, predicted, rows, labels = case(name)
    u, p = flat(common, 3).requires_grad_(), flat(predicted, 4).requires_grad_()
    options = {"norm": norm, "blocks": "ordered", "similar": "binary"}
    terms = ours(u, p, rows, torch.from_numpy(labels), **options)
    (terms.label + 0.7 * terms.similarity + 0.3 * terms.invariance).backward()

    def loss():
        l1, l2, l3 = literal_loss(common, predicted, rows, labels, **options)
        return l1 + 0.7 * l2 + 0.3 * l3

    def slope(parts):
        found, h = [], 1e-5
        for part in parts:
            for at in np.ndindex(part.shape):
                value = part[at]
                part[at] = value + h
                up = loss()
                part[at] = value - h
                down = loss()
                part[at] = value
                found.append((up - down) / (2 * h))
        return found

    assert u.grad.flatten().tolist() == pytest.approx(slope(common), rel=1e-6, abs=1e-9)
    assert p.grad.flatten().tolist() == pytest.approx(slope(predicted), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_finite_everywhere(name, norm, dtype):
    common, predicted, rows, labels = case(name)
    u, p = flat(common, 3).to(dtype).requires_grad_(), flat(predicted, 4).to(dtype).requires_grad_()
    terms = ours(u, p, rows, torch.from_numpy(labels), norm=norm)
    sum(terms).backward()
    assert all(torch.isfinite(t) for t in terms)
    assert torch.isfinite(u.grad).all()
    assert torch.isfinite(p.grad).all()


def test_a_zero_row_has_cosine_0_and_no_gradient_from_the_similarity():
    u = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    terms = ours(u, torch.zeros(2, 1), [[0, 1]], torch.tensor([[True], [True]]))
    terms.similarity.backward()
    # log 2 thrice for cosine 0, and softplus(1/2) - 1/2 for the row with itself
    assert float(terms.similarity.detach()) == pytest.approx((3 * math.log(2) + math.log(1 + math.exp(0.5)) - 0.5) / 4)
    assert u.grad[0].tolist() == [0.0, 0.0]


def test_equal_items_repel_nothing_and_similar_ones_attract():
    # moving v towards u must lower l2 where they share a class and raise it where they do not
    for shared, sign in ((True, -1), (False, 1)):
        u = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        labels = torch.tensor([[True, False], [shared, not shared]])
        ours(u, torch.zeros(2, 2), [[0, 1]], labels).similarity.backward()
        # along +x row 1 turns towards row 0
        assert math.copysign(1, float(u.grad[1, 0])) == sign


def literal_adam(weight, gradients, lr, betas):
    m = v = np.zeros_like(weight)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        weight = weight - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8)
    return weight


def tiny(**options):
    spec = DataSpec({"image": 3, "text": 2}, 2)
    config = DSCMRConfig(hidden=4, width=3, batch_size=6, **options)
    learner = DSCMR(config, spec, torch.device("cpu"), generator(0, "initial"))
    g = generator(1, "data")
    labels = torch.tensor([[True, False], [False, True]] * 3)
    data = Items.paired({"image": torch.randn(6, 3, generator=g), "text": torch.randn(6, 2, generator=g)}, labels)
    return learner, data


def literal_model(state, data, lambda_, eta):
    """J of the whole model in float64, and the leaf tensors it depends on."""
    w = {k: t.double().requires_grad_() for k, t in state.items() if not k.startswith("optimizer.")}
    u = []
    for m in ("image", "text"):
        h = (data.features[m].double() @ w[f"towers.{m}.weight"].T + w[f"towers.{m}.bias"]).clamp(min=0)
        z = h @ w["common.weight"].T + w["common.bias"]
        u.append(torch.maximum(z, 0.01 * z))
    p = [z @ w["classifier.weight"].T + w["classifier.bias"] for z in u]
    y = data.labels.double()
    l1 = sum(((q - y) ** 2).sum(1).sqrt().mean() for q in p)
    s = (y @ y.T > 0).double()
    l2 = 0
    for a, b in ((u[0], u[0]), (u[0], u[1]), (u[1], u[1])):
        gamma = a @ b.T / a.norm(dim=1)[:, None] / b.norm(dim=1) / 2
        l2 = l2 + ((1 + gamma.exp()).log() - s * gamma).mean()
    l3 = ((u[0] - u[1]) ** 2).sum(1).sqrt().mean()
    return l1 + lambda_ * l2 + eta * l3, w


def test_two_epochs_are_two_literal_adam_steps():
    learner, data = tiny(**{"lambda": 0.6}, eta=0.3, optimizer={"lr": 0.01, "betas": (0.5, 0.9)})
    start = learner.state()
    value, w = literal_model(start, data, 0.6, 0.3)
    value.backward()
    first = {k: t.grad.numpy() for k, t in w.items()}
    fit = learner.fit(data, 1, generator(0, "fit"))
    assert fit.loss == pytest.approx(float(value.detach()), rel=1e-6)
    after_one = learner.state()
    value, w = literal_model(after_one, data, 0.6, 0.3)
    value.backward()
    learner.fit(data, 1, generator(0, "fit"))
    after_two = learner.state()
    for name, g in first.items():
        at = start[name].double().numpy()
        gs = [g, w[name].grad.numpy()]
        np.testing.assert_allclose(after_one[name], literal_adam(at, gs[:1], 0.01, (0.5, 0.9)), atol=2e-6)
        np.testing.assert_allclose(after_two[name], literal_adam(at, gs, 0.01, (0.5, 0.9)), atol=2e-6)


def test_fedprox_step_is_sgd_on_the_loss_plus_half_mu_the_squared_distance():
    learner, data = tiny(**{"lambda": 1.0}, optimizer={"name": "sgd", "lr": 0.1})
    start = learner.state()
    # below the anchor |w - a| and (w - a) differ in sign, so a wrong gradient shows
    anchor = {name: start[name] + 2 for name in ("common.weight", "classifier.bias")}
    value, w = literal_model(start, data, 1.0, 0.1)
    distance = sum(((w[name] - a.double()) ** 2).sum() for name, a in anchor.items())
    (value + 0.3 / 2 * distance).backward()
    fit = learner.fit(data, 1, generator(0, "fit"), Proximal(0.3, anchor))
    assert fit.loss == pytest.approx(float(value.detach()), rel=1e-6)  # without the proximal term
    for name, after in learner.state().items():
        np.testing.assert_allclose(after, start[name].double() - 0.1 * w[name].grad, atol=1e-6)

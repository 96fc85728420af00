"""DLSL against its paper's equations, written out in NumPy with columns as items, as the paper has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fedxmr.learners.dlsl import DLSL, DLSLConfig
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items, Proximal

SPEC = DataSpec({"image": 9, "text": 6}, 3)
CPU = torch.device("cpu")
N, K = 40, 4
ALPHA, BETA, GAMMA, RIDGE = 0.4, 0.7, 0.3, 0.2


def data(n=N, spec=SPEC):
    g = generator(0, "data")
    labels = torch.eye(3, dtype=torch.bool)[torch.randint(3, (n,), generator=g)]
    features = {
        m: 2 * labels.float() @ torch.randn(3, d, generator=g) + torch.randn(n, d, generator=g)
        for m, d in spec.dims.items()
    }
    return Items.paired(features, labels)


def make(**options):
    config = DLSLConfig(**{"width": K, "alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "ridge": RIDGE} | options)
    return DLSL(config, SPEC, CPU, generator(0, "initial"))


def dictionaries(learner):
    state = learner.state()
    return [state[name].numpy() for name in ("dictionaries.image", "dictionaries.text", "map")]


def matrices(items):
    return [x.double().numpy().T for x in (items.features["image"], items.features["text"], items.labels)]


def equation_3(parts, ds, weights, ridge):
    """Z = argmin |Xt - Dt Z|^2, with the code's ridge as further rows of Dt."""
    xt = np.vstack([w * x for w, x in zip(weights, parts, strict=True)] + [np.zeros((K, parts[0].shape[1]))])
    dt = np.vstack([w * d for w, d in zip(weights, ds, strict=True)] + [np.sqrt(ridge) * np.eye(K)])
    return np.linalg.pinv(dt) @ xt


def equation_5(x, z, bound):
    """D = (X Z')(Z Z' + L)^-1 at the L that maximises the Lagrange dual of eq. 4."""

    def dual(multipliers):
        """-g and its gradient."""
        d = x @ z.T @ np.linalg.inv(z @ z.T + np.diag(multipliers))
        return np.trace(d @ z @ x.T) + bound * multipliers.sum(), bound - (d**2).sum(0)

    best = minimize(
        dual,
        np.full(K, np.trace(z @ z.T) / K),
        jac=True,
        bounds=[(0, None)] * K,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-10, "maxiter": 10_000, "maxfun": 10_000},
    )
    return x @ z.T @ np.linalg.inv(z @ z.T + np.diag(best.x))


def objective(parts, ds, z, weights, ridge):
    """Eq. 2 with eq. 3's weights, and the ridge; per item."""
    terms = [w**2 * ((x - d @ z) ** 2).sum() for w, x, d in zip(weights, parts, ds, strict=True)]
    return (sum(terms) + ridge * (z**2).sum()) / z.shape[1]


STACKS = {"paper": [1, ALPHA, BETA], "sqrt": [1, ALPHA**0.5, BETA**0.5]}


@pytest.mark.parametrize("col_norm", [1.0, 0.1, 30.0])
@pytest.mark.parametrize("solver", ["dual", "coordinate"])
@pytest.mark.parametrize("stack", STACKS)
def test_three_epochs_are_three_times_algorithm_1(stack, solver, col_norm):
    items, weights = data(), STACKS[stack]
    parts = matrices(items)
    learner = make(stack=stack, solver=solver, col_norm=col_norm)
    ds, losses = dictionaries(learner), []
    for _ in range(3):
        z = equation_3(parts, ds, weights, RIDGE)
        ds = [equation_5(x, z, col_norm**2) for x in parts]  # eq. 5, 7 and 9
        losses.append(objective(parts, ds, z, weights, RIDGE))
    fit = learner.fit(items, 3, generator(0, "fit"))
    for ours, theirs in zip(dictionaries(learner), ds, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * col_norm)  # L-BFGS-B stops there
    assert fit.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert fit.loss_sum == pytest.approx(np.sum(losses), rel=1e-6)


def test_its_state_has_the_sufficient_statistics_of_the_last_codes():
    items, learner = data(), make()
    learner.fit(items, 2, generator(0, "fit"))
    before = dictionaries(learner)
    learner.fit(items, 1, generator(0, "fit"))
    z = equation_3(matrices(items), before, STACKS["paper"], RIDGE)
    for name, x in zip(("dictionaries.image", "dictionaries.text", "map"), matrices(items), strict=True):
        state = learner.state()
        np.testing.assert_allclose(state[f"statistics.{name}.gram"], z @ z.T / N, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state[f"statistics.{name}.cross"], x @ z.T / N, rtol=1e-9, atol=1e-12)


def test_codes_are_equations_10_and_11_and_rank_by_cosine():
    items, learner = data(), make()
    learner.fit(items, 5, generator(0, "fit"))
    codes = []
    for m, d in zip(("image", "text"), dictionaries(learner), strict=False):
        x = items.features[m].double().numpy()
        stacked = np.vstack([d, np.sqrt(GAMMA) * np.eye(K)])
        z = np.array([np.linalg.lstsq(stacked, np.append(row, np.zeros(K)), rcond=None)[0] for row in x])
        np.testing.assert_allclose(learner.encode(m, items.features[m]), z, rtol=1e-5, atol=1e-6)
        codes.append(z / np.linalg.norm(z, axis=1, keepdims=True))
    ours = learner.similarity(*(learner.encode(m, items.features[m]) for m in ("image", "text")), ("image", "text"))
    np.testing.assert_allclose(ours, codes[0] @ codes[1].T, atol=1e-5)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("mu", [0.05, 5.0])
def test_fedprox_minimises_each_dictionarys_part_plus_half_mu_the_squared_distance(stack, mu):
    items, weights = data(), STACKS[stack]
    learner = make(stack=stack, alpha=0.1)
    weights = [weights[0], 0.1 if stack == "paper" else 0.1**0.5, weights[2]]
    before = dictionaries(learner)
    g = generator(1, "anchor")
    anchor = {name: torch.randn(t.shape, generator=g).double() for name, t in learner.state(learner.trainable).items()}
    anchor = {name: 0.8 * t / t.norm(dim=0) for name, t in anchor.items()}
    learner.fit(items, 1, generator(0, "fit"), Proximal(mu, anchor))
    z = equation_3(matrices(items), before, weights, RIDGE)
    for name, weight, x, ours in zip(
        ("dictionaries.image", "dictionaries.text", "map"), weights, matrices(items), dictionaries(learner), strict=True
    ):
        a = anchor[name].numpy()

        def cost(d, x=x, a=a, weight=weight):
            return weight**2 * ((x - d @ z) ** 2).sum() / N + mu / 2 * ((d - a) ** 2).sum()

        best = numerically(x, z, a, weight**2, mu)
        np.testing.assert_allclose(ours, best, atol=1e-7, err_msg=name)
        assert cost(ours) <= cost(best) * (1 + 1e-10)


def numerically(x, z, anchor, weight, mu):
    """The minimiser under |d_i| <= 1 by projected gradient steps."""
    d = anchor.copy()
    step = 1 / (2 * weight * np.linalg.eigvalsh(z @ z.T)[-1] / N + mu)
    for _ in range(4_000):
        d = d - step * (2 * weight * (d @ z - x) @ z.T / N + mu * (d - anchor))
        d = d / np.maximum(np.linalg.norm(d, axis=0), 1)
    return d

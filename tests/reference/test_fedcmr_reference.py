"""FedCMR's server side against a literal transcription of the paper's equations 2 to 6 in plain Python and NumPy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedxmr.strategies import Contribution, StrategyConfig, client_weights, combine, gompertz, merge, preset


def equation_3(n: list[float], c: list[float]) -> list[float]:
    return [n[k] / sum(n) * c[k] / sum(c) for k in range(len(n))]


def equation_4(f: list[float]) -> list[float]:
    mean = sum(f) / len(f)
    return [math.exp(-math.exp(loss / mean)) for loss in f]


def equation_5(s: list[float], v: list[float], alpha: float) -> list[float]:
    power = [math.exp(s[k] + alpha * v[k]) for k in range(len(s))]
    return [p / sum(power) for p in power]


def contribution(client: int, w: torch.Tensor, n: int = 10, loss: float = 1.0, counts: list[int] | None = None):
    return Contribution(client, n, torch.tensor(counts or [n]), loss, {"w": w})


sizes = st.lists(st.integers(1, 10_000), min_size=1, max_size=6)


@given(st.data(), sizes, st.sampled_from([1.0, 5.0, 20.0, 100.0]))
def test_weights_are_equations_3_to_5(data, n, alpha):
    classes = data.draw(st.lists(st.integers(1, 80), min_size=len(n), max_size=len(n)))
    losses = data.draw(st.lists(st.floats(1e-6, 1e6), min_size=len(n), max_size=len(n)))
    expected = equation_5(equation_3(n, classes), equation_4(losses), alpha)
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (n, classes, losses))
    np.testing.assert_allclose(gompertz(*tensors, alpha).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("losses", "alpha", "expected"),
    [  # the table of the method's specification
        ([1, 1, 1], 20, [0.333, 0.333, 0.333]),
        ([0.9, 1, 1.1], 20, [0.462, 0.313, 0.225]),
        ([0.5, 1, 1.5], 5, [0.516, 0.275, 0.209]),
        ([0.5, 1, 1.5], 20, [0.904, 0.072, 0.024]),
        ([0, 1, 2], 20, [0.997, 0.002, 0.001]),
        ([0.95, 1, 1.05], 100, [0.642, 0.251, 0.107]),
    ],
)
def test_a_lower_loss_weighs_more(losses, alpha, expected):
    n = classes = torch.full((3,), 5.0, dtype=torch.float64)
    q = gompertz(n, classes, torch.tensor(losses, dtype=torch.float64), alpha)
    np.testing.assert_allclose(q.numpy(), expected, atol=1.5e-3)


def test_the_size_term_as_printed_and_as_in_the_authors_code():
    n = torch.tensor([80.0, 10.0, 10.0], dtype=torch.float64)
    even = torch.ones(3, dtype=torch.float64)
    np.testing.assert_allclose(gompertz(n, even, even, 20.0).numpy(), [0.387, 0.307, 0.307], atol=1e-3)
    normalised = gompertz(n, even, even, 20.0, "normalised")
    np.testing.assert_allclose(normalised.numpy(), [0.502, 0.249, 0.249], atol=1e-3)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.0, 0.0, 0.0], [1 / 3] * 3),  # 0/0: equal losses
        ([2.5], [1.0]),
        ([1e308, 1e308, 1e308], None),
        ([0.0, 0.0, 1e300], [0.5, 0.5, 0.0]),
        ([5e-324, 5e-324, 5e-324], None),
    ],
)
def test_weights_stay_a_distribution_at_the_extremes(losses, expected):
    even = torch.ones(len(losses), dtype=torch.float64)
    q = gompertz(even, even, torch.tensor(losses, dtype=torch.float64), 100.0)
    assert torch.isfinite(q).all()
    assert q.sum().item() == pytest.approx(1.0)
    if expected:
        np.testing.assert_allclose(q.numpy(), expected, atol=1e-9)


def test_under_summed_losses_the_largest_client_counts_least():
    n = torch.tensor([1000.0, 500.0, 500.0], dtype=torch.float64)
    even = torch.ones(3, dtype=torch.float64)
    assert gompertz(n, even, n, 20.0)[0] < 0.1 < 0.3 < gompertz(n, even, even, 20.0)[0]


def test_weighing_by_examples_and_uniformly():
    parts = [contribution(0, torch.zeros(1), n=80), contribution(1, torch.zeros(1), n=20)]
    fedavg = StrategyConfig(**preset("fedavg"))
    assert client_weights(fedavg, parts).tolist() == [0.8, 0.2]
    assert client_weights(fedavg.model_copy(update={"weigh": "uniform"}), parts).tolist() == [0.5, 0.5]


def test_gompertz_weights_count_the_classes_a_client_has_items_of():
    even = StrategyConfig(alpha=0.0)
    parts = [contribution(0, torch.zeros(1), counts=[5, 5]), contribution(1, torch.zeros(1), counts=[10, 0])]
    expected = equation_5(equation_3([10, 10], [2, 1]), [0.0, 0.0], 0.0)
    np.testing.assert_allclose(client_weights(even, parts).numpy(), expected, rtol=1e-12)


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_combining_is_equation_2(clients, seed):
    rng = np.random.default_rng(seed)
    ws = rng.normal(size=(clients, 3, 2)).astype(np.float32)
    q = rng.dirichlet(np.ones(clients))
    parts = [contribution(k, torch.tensor(ws[k])) for k in range(clients)]
    got = combine({"w": torch.zeros(3, 2)}, parts, torch.tensor(q), frozenset())["w"]
    expected = sum(q[k] * ws[k].astype(np.float64) for k in range(clients))
    np.testing.assert_array_equal(got.numpy(), (expected / q.cumsum()[-1]).astype(np.float32))


@pytest.mark.parametrize("step", [1.0, 1.5])
def test_combining_many_numbers_is_equation_2(step):
    rng = np.random.default_rng(3)
    before, *ws = rng.normal(size=(4, 300, 700)).astype(np.float32)
    q = np.array([0.2, 0.3, 0.5])
    parts = [contribution(k, torch.tensor(w)) for k, w in enumerate(ws)]
    got = combine({"w": torch.tensor(before)}, parts, torch.tensor(q), frozenset(), step)["w"]
    mean = sum(q[k] * ws[k].astype(np.float64) for k in range(3))
    # they may be multiplied and added at once
    np.testing.assert_array_max_ulp(got.numpy(), (before + step * (mean - before)).astype(np.float32), maxulp=1)


def test_combining_does_not_ask_how_numbers_lie_in_memory():
    before, own = torch.zeros(2, 3).T, torch.arange(6.0).reshape(2, 3).T
    got = combine({"w": before}, [contribution(0, own)], torch.ones(1), frozenset())["w"]
    assert got.equal(own)


def test_a_name_counts_for_its_owners_alone():
    parts = [
        Contribution(0, 1, torch.tensor([1]), 1.0, {"w": torch.tensor([1.0]), "image": torch.tensor([1.0])}),
        Contribution(1, 1, torch.tensor([1]), 1.0, {"w": torch.tensor([4.0])}),
    ]
    previous = {"w": torch.tensor([9.0]), "image": torch.tensor([9.0]), "text": torch.tensor([9.0])}
    got = combine(previous, parts, torch.tensor([0.25, 0.75]), frozenset())
    assert {name: t.item() for name, t in got.items()} == {"w": 3.25, "image": 1.0, "text": 9.0}


def test_a_class_row_counts_for_clients_with_items_of_that_class():
    rows = [torch.full((3, 2), 1.0), torch.full((3, 2), 5.0)]
    parts = [contribution(0, rows[0], counts=[3, 1, 0]), contribution(1, rows[1], counts=[2, 0, 0])]
    previous = {"w": torch.full((3, 2), -7.0)}
    got = combine(previous, parts, torch.tensor([0.75, 0.25]), frozenset({"w"}))["w"]
    assert got[:, 0].tolist() == [2.0, 1.0, -7.0]  # both, only client 0, nobody


def test_a_server_step_of_one_plus_gamma_goes_beyond_the_mean():
    parts = [contribution(0, torch.tensor([3.0])), contribution(1, torch.tensor([5.0]))]
    even = torch.tensor([0.5, 0.5])
    assert combine({"w": torch.tensor([1.0])}, parts, even, frozenset(), step=1.5)["w"].item() == 1 + 1.5 * 3


@given(st.integers(0, 2**31), st.sampled_from([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]))
def test_merging_is_equation_6(seed, gamma):
    rng = np.random.default_rng(seed)
    w_t, w_0, w_k = rng.normal(size=(3, 4, 2)).astype(np.float32)
    config = StrategyConfig(gamma=gamma)
    state = [{"w": torch.tensor(w)} for w in (w_t, w_0, w_k)]
    got = merge(config, *state, frozenset(), torch.tensor([1]))["w"]
    np.testing.assert_allclose(got.numpy(), w_t + np.float32(gamma) * (w_k - w_0), rtol=1e-6, atol=1e-6)


def test_what_a_client_does_not_own_is_replaced():
    received = {"w": torch.tensor([[1.0], [1.0]]), "text": torch.tensor([1.0])}
    before, after = {"w": torch.tensor([[0.0], [0.0]])}, {"w": torch.tensor([[2.0], [2.0]])}
    got = merge(StrategyConfig(gamma=0.5), received, before, after, frozenset({"w"}), torch.tensor([3, 0]))
    assert got["w"].tolist() == [[2.0], [1.0]]  # the second class is not this client's
    assert got["text"].tolist() == [1.0]


def test_replacing_ignores_the_own_change():
    fedavg = StrategyConfig(**preset("fedavg"))
    state = [{"w": torch.tensor([float(i)])} for i in (1, 2, 3)]
    assert merge(fedavg, *state, frozenset(), torch.tensor([1]))["w"].item() == 1.0


def test_gamma_minus_one_cancels_the_joint_step():
    # the mean over clients of eq. 6 is W_0 + (1 + gamma) * the mean change
    w_0 = torch.zeros(1)
    parts = [contribution(k, torch.tensor([float(k + 1)])) for k in range(3)]
    combined = combine({"w": w_0}, parts, torch.full((3,), 1 / 3), frozenset())
    means = []
    for gamma in (-1.0, 0.0, 1.0):
        config = StrategyConfig(gamma=gamma)
        merged = [merge(config, combined, {"w": w_0}, p.shared, frozenset(), torch.tensor([1]))["w"] for p in parts]
        means.append(torch.stack(merged).mean().item())
    assert means == pytest.approx([0.0, 2.0, 4.0])
    assert all(a < b for a, b in pairwise(means))

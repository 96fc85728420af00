"""Who drops out: drawn for each client by itself, and nothing else is moved by it."""

from __future__ import annotations

import math

import pytest
import torch

from fedxmr.config import Config, resolve
from fedxmr.participation import dropped, sampled, short_round
from fedxmr.seeding import generator


def config(seed: int = 0, **federation: float) -> Config:
    return resolve({"seed": seed, "federation": federation})


def test_every_client_of_a_round_has_a_draw_of_its_own():
    some = config(seed=3, clients=40, dropout=0.3)
    for round in (2, 1):  # in any order
        draws = [torch.rand(1, dtype=torch.float64, generator=generator(3, "dropout", round, k)) for k in range(40)]
        assert dropped(some, round) == [k for k in range(40) if draws[k] < 0.3]


def test_other_clients_rounds_and_samples_change_no_draw():
    few, many = config(clients=10, dropout=0.4), config(clients=30, dropout=0.4, rounds=7)
    sparse = config(clients=30, sample=12, dropout=0.4)
    for round in range(1, 20):
        assert dropped(few, round) == [k for k in dropped(many, round) if k < 10]
        assert dropped(sparse, round) == [k for k in dropped(many, round) if k in sampled(sparse, round)]


def test_sampling_is_the_same_with_dropout_and_without():
    for round in range(1, 20):
        assert sampled(config(clients=30, sample=5, dropout=0.9), round) == sampled(config(clients=30, sample=5), round)


def test_who_drops_out_at_a_low_chance_does_so_at_a_higher_one():
    low, high = (config(clients=100, dropout=p) for p in (0.1, 0.4))
    assert set(dropped(low, 1)) < set(dropped(high, 1))


def test_another_seed_drops_others_and_chance_0_nobody():
    assert dropped(config(clients=100, dropout=0.4), 1) != dropped(config(seed=1, clients=100, dropout=0.4), 1)
    assert dropped(config(clients=100), 1) == []


@pytest.mark.parametrize("chance", [0.05, 0.5, 0.95])
def test_clients_drop_out_as_often_as_said_and_independently(chance):
    """Hoeffding: a mean of n draws is further off than sqrt(log(2 / q) / 2n) with a probability below q."""
    some = config(clients=1000, dropout=chance)
    away = torch.zeros(40, 1000, dtype=torch.bool)
    for round in range(40):
        away[round, dropped(some, round + 1)] = True

    def off(events: torch.Tensor, expected: float) -> bool:
        bound = math.sqrt(math.log(2 / 1e-9) / (2 * events.numel()))
        return abs(events.double().mean().item() - expected) > bound

    assert not off(away, chance)
    assert not off(away[0::2] & away[1::2], chance**2)  # of one client in two rounds
    assert not off(away[:, 0::2] & away[:, 1::2], chance**2)  # of two clients in one round


def test_the_first_round_that_too_few_clients_are_in_reach_in_is_known_before():
    def there(some: Config, round: int) -> int:
        return len(sampled(some, round)) - len(dropped(some, round))

    some = config(clients=6, sample=4, dropout=0.3, min_clients=2, rounds=100)
    at = short_round(some)
    assert at is not None
    assert there(some, at) < 2 <= min(there(some, round) for round in range(1, at))
    assert short_round(config(clients=6, sample=4, dropout=0.3, min_clients=2, rounds=at - 1)) is None
    assert short_round(config(clients=1)) is None

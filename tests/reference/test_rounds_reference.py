"""Whole federations against the papers' algorithms written as plain loops, with no messages and no framework."""

from __future__ import annotations

import math

import pytest
import torch

from fedxmr import state
from fedxmr.config import Config
from fedxmr.learners import learner_class
from fedxmr.rounds import divide
from fedxmr.scaling import ROW_NORM
from fedxmr.seeding import generator
from fedxmr.sources import dataset, parts
from fedxmr.types import Items, Learner, Proximal, State
from tests.federations import SMALL, configured, federate


def pooled_scaling(config: Config) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    x = {m: f.double() for m, f in dataset(config).train.features.items()}
    return {m: (f.mean(0).float(), f.std(0, unbiased=False).float()) for m, f in x.items()}


def scaled(items: Items, config: Config) -> Items:
    how, moments = dataset(config).scaling, pooled_scaling(config)
    features = {
        m: (x - moments[m][0]) / moments[m][1]
        if how[m] == "standardise"
        else x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) * ROW_NORM
        for m, x in items.features.items()
    }
    return Items(features, items.rows, items.labels)


def start(config: Config) -> tuple[list[Items], list[Learner]]:
    data = dataset(config)
    items = [scaled(part.take(data.train), config) for part in parts(config)]
    options, cpu = config.learner.options, torch.device("cpu")
    kind = learner_class(config.learner.name)
    learners = [kind(options, data.spec, cpu, generator(config.seed, "initial")) for _ in items]
    return items, learners


def copied(learner: Learner, names: frozenset[str]) -> State:
    return {name: t.clone() for name, t in learner.state().items() if name in names}


def gompertz_by_hand(items: list[Items], losses: list[float], alpha: float) -> list[float]:
    n = [len(part) for part in items]
    c = [int((part.labels.sum(0) > 0).sum()) for part in items]
    mean = sum(losses) / len(losses)
    powers = [
        math.exp(n[k] / sum(n) * c[k] / sum(c) + alpha * math.exp(-math.exp(losses[k] / mean))) for k in range(len(n))
    ]
    return [power / sum(powers) for power in powers]


def weighted(states: list[State], weights: list[float]) -> State:
    return {name: sum(w * s[name].double() for w, s in zip(weights, states, strict=True)).float() for name in states[0]}


def algorithm_1(config: Config) -> tuple[list[Learner], State]:
    """FedCMR, Algorithm 1, in its own order: joint training, aggregation, eq. 6, enhancement."""
    items, learners = start(config)
    epochs, strategy = config.federation.epochs, config.strategy
    combined: State = {}
    for t in range(1, config.federation.rounds + 1):
        before = [copied(learner, learner.common) for learner in learners]
        divisions, losses = [], []
        for k, learner in enumerate(learners):
            draw = divide(len(items[k]), strategy.joint_fraction, generator(config.seed, "division", t, k))
            divisions.append(draw)
            fit = learner.fit(items[k].select(draw[0]), epochs, generator(config.seed, "joint", t, k))
            losses.append(fit.loss)
        after = [copied(learner, learner.common) for learner in learners]
        combined = weighted(after, gompertz_by_hand(items, losses, strategy.alpha))
        for k, learner in enumerate(learners):
            learner.load({n: combined[n] + strategy.gamma * (after[k][n] - before[k][n]) for n in combined})
            held_back = items[k].select(divisions[k][1])
            learner.fit(held_back, epochs, generator(config.seed, "enhancement", t, k))
    return learners, combined


def federated_averaging(config: Config) -> tuple[list[Learner], State]:
    """FedAvg: every client starts from the mean of all, weighted by items; FedProx: and is held near it."""
    items, learners = start(config)
    combined: State = {}
    mu = config.strategy.mu
    for t in range(1, config.federation.rounds + 1):
        for k, learner in enumerate(learners):
            near = Proximal(mu, copied(learner, learner.trainable)) if mu else None
            learner.fit(items[k], config.federation.epochs, generator(config.seed, "joint", t, k), near)
        n = [len(part) for part in items]
        combined = weighted([copied(x, x.trainable) for x in learners], [k / sum(n) for k in n])
        for learner in learners:
            learner.load(combined)
    return learners, combined


@pytest.mark.parametrize("gamma", [0.5, -0.5])
def test_one_message_a_round_is_algorithm_1(tmp_path, gamma):
    assignments = (f"strategy.gamma={gamma}", "partition.scheme=dirichlet", "seed=3")
    compare(tmp_path, algorithm_1, *assignments)


def test_fedavg_is_federated_averaging(tmp_path):
    compare(tmp_path, federated_averaging, "strategy=fedavg", "partition.scheme=quantity")


def test_fedprox_is_federated_averaging_held_near_what_was_received(tmp_path):
    held = ("strategy=fedprox", "strategy.mu=0.5", "learner.optimizer.name=sgd", "learner.optimizer.lr=0.3")
    compare(tmp_path, federated_averaging, *held)
    learners, _ = federated_averaging(configured(*held))
    free, _ = federated_averaging(configured(*held, "strategy.mu=0.0"))
    assert not torch.allclose(learners[0].state()["common.weight"], free[0].state()["common.weight"], atol=1e-4)


def test_centralised_training_is_a_plain_loop(tmp_path):
    compare(tmp_path, federated_averaging, "strategy=fedavg", "federation.clients=1")


def compare(out, algorithm, *assignments) -> None:
    """The shared state and every client's own must be the loop's, up to the rounding of the weights' sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        learners, combined = algorithm(configured(*assignments, base=SMALL))
    finally:
        torch.set_num_threads(threads)
    federate(out / "run", *assignments)
    shared, _ = state.load(out / "run" / "shared-last.safetensors")
    assert shared.keys() == combined.keys()
    for name in combined:
        torch.testing.assert_close(shared[name], combined[name], rtol=1e-5, atol=1e-6)
    for k, learner in enumerate(learners):
        tensors, about = state.load(out / "run" / "clients" / str(k) / "last.safetensors")
        assert about["round"] == 3
        for name, expected in copied(learner, learner.trainable).items():
            torch.testing.assert_close(tensors[f"weights/{name}"], expected, rtol=1e-5, atol=1e-6)

"""Who takes part in a round and who is evaluated: pure functions of the seed, so a resumed run draws the same."""

from __future__ import annotations

import torch

from fedxmr.config import Config
from fedxmr.seeding import generator


def sampled(config: Config, round: int) -> list[int]:
    """The clients of a round, sorted: all, or `federation.sample` of them drawn from (seed, round)."""
    return _draw(config.federation.clients, config.federation.sample, config.seed, "sample", round)


def dropped(config: Config, round: int) -> list[int]:
    """The sampled clients that are out of reach in a round, sorted: each by its own draw from (seed, round, client)."""
    chance = config.federation.dropout
    return [k for k in sampled(config, round) if _uniform(config.seed, "dropout", round, k) < chance] if chance else []


def short_round(config: Config) -> int | None:
    """The first round that cannot stand, for too few clients are in reach in it; None where every round can."""
    federation = config.federation
    rounds = range(1, federation.rounds + 1) if federation.dropout else ()
    return next((t for t in rounds if len(sampled(config, t)) - len(dropped(config, t)) < federation.quorum), None)


def panel(config: Config) -> list[int]:
    """The clients that are evaluated, sorted, the same in every round: all, or `evaluation.clients` of them."""
    if config.evaluation.every == 0:
        return []
    return _draw(config.federation.clients, config.evaluation.clients, config.seed, "panel", 0)


def evaluated(config: Config, round: int) -> bool:
    """Whether the model of a round is evaluated; the last one is, unless evaluation is off."""
    every = config.evaluation.every
    return every > 0 and round > 0 and (round % every == 0 or round == config.federation.rounds)


def _uniform(seed: int, purpose: str, round: int, client: int) -> float:
    """A number from 0 up to, but not, 1."""
    return torch.rand(1, dtype=torch.float64, generator=generator(seed, purpose, round, client)).item()


def _draw(clients: int, count: int | None, seed: int, purpose: str, round: int) -> list[int]:
    if count is None or count >= clients:
        return list(range(clients))
    drawn = torch.randperm(clients, generator=generator(seed, purpose, round))[:count]
    return sorted(drawn.tolist())

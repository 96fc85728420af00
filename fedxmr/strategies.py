"""How clients learn together: what they share, how much each counts, and how a client takes the result over.

FedCMR (Zong et al., SIGIR 2021), FedAvg (McMahan et al., AISTATS 2017) and FedProx (Li et al., MLSys 2020) are four
choices each - share, weigh, merge, fit - and so is every ablation between them.

Departs from the FedCMR paper: sums over clients run in float64, and a client's loss is a mean per item unless
`loss: sum` asks for the authors' sum over batches, under which the client with the most data counts least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from fedxmr.errors import FederationError, InputError, unknown
from fedxmr.state import finite
from fedxmr.types import Learner, State

Share = Literal["common", "trainable", "statistics", "nothing"]


class StrategyConfig(BaseModel):
    """The four choices and their numbers. Defaults are FedCMR's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field("fedcmr", description="the preset these choices start from")
    share: Share | tuple[str, ...] = Field(
        "common", description="common, trainable, statistics, nothing, or a list of parameter names (* matches)"
    )
    weigh: Literal["examples", "uniform", "gompertz"] = Field(
        "gompertz", description="a client's weight: n_k, the same for all, or FedCMR eq. 3-5"
    )
    alpha: float = Field(20.0, ge=0, description="weight of the loss in eq. 5; the paper's grid is 1 to 100")
    size_term: Literal["printed", "normalised"] = Field(
        "printed", description="S of eq. 3 as printed, or made to sum to one as in the authors' code"
    )
    loss: Literal["mean", "sum"] = Field(
        "mean", description="f of eq. 4: mean per item, or the authors' sum of batches"
    )
    merge: Literal["smooth", "replace"] = Field("smooth", description="how a client takes W_t over: eq. 6, or as it is")
    gamma: float = Field(0.5, description="step along the client's own change in eq. 6; the paper's grid is -2 to 2")
    joint_fraction: float = Field(
        0.8, gt=0, le=1, description="share of the items in the joint stage; rest: enhancement"
    )
    mu: float = Field(
        0.0, ge=0, le=1e6, description="FedProx: mu/2 * ||w - w_t||^2 in the joint stage; usual grid .001 to 1"
    )
    server_step: float = Field(1.0, gt=0, description="W_t = W_{t-1} + server_step * (combined - W_{t-1})")

    @field_validator("share", mode="before")
    @classmethod
    def _known_share(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) and value not in get_args(Share):
            raise unknown("strategy.share", str(value), [*get_args(Share), "a list of parameter names"])
        return value


_AVERAGE: Mapping[str, Any] = {"share": "trainable", "weigh": "examples", "merge": "replace", "joint_fraction": 1.0}

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "fedcmr": {},
    "fedavg": _AVERAGE,
    "fedprox": {**_AVERAGE, "mu": 0.2},
    "local": {**_AVERAGE, "share": "nothing"},
}
"""What each named strategy sets; everything else is the default."""


def preset(name: str) -> dict[str, Any]:
    """The choices a strategy's name stands for. Raises InputError for an unknown name."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    return {"name": name, **STRATEGIES[name]}


def shared_names(config: StrategyConfig, learner: Learner) -> frozenset[str]:
    """The names of the learner's state that clients share.

    Raises InputError where the learner has nothing such, and for FedProx's term on what is not trained but summed.
    """
    names = _chosen_names(config, learner)
    if config.mu and names & learner.statistics:
        raise InputError(
            f"strategy.mu={config.mu:g}: FedProx holds trained parameters near those received, expected strategy.share "
            f"to have no statistics, got {config.share}"
        )
    return names


def _chosen_names(config: StrategyConfig, learner: Learner) -> frozenset[str]:
    why_not = getattr(learner, "unshared", None)
    if why_not and config.share != "nothing":
        raise InputError(
            f"strategy {config.name}: the learner {type(learner).__name__} {why_not}; "
            "expected strategy local, or fedxmr.centralized"
        )
    match config.share:
        case "common":
            names = learner.common
        case "trainable":
            names = learner.trainable
        case "statistics":
            names = learner.statistics
        case "nothing":
            return frozenset()
        case patterns:
            shareable = learner.trainable | learner.statistics
            names = frozenset()
            for pattern in patterns:
                found = frozenset(name for name in shareable if fnmatchcase(name, pattern))
                if not found:
                    raise unknown("parameter in strategy.share", pattern, shareable)
                names |= found
    if not names:
        raise InputError(f"strategy.share={config.share}: the learner {type(learner).__name__} has no such parameters")
    return names


@dataclass(frozen=True)
class Contribution:
    """One client's part in a round.

    client: its id. n: training items. class_counts: [C] int64, training items of each class. loss: f_t^k.
    shared: the names it owns of those that are shared.
    """

    client: int
    n: int
    class_counts: Tensor
    loss: float
    shared: State


def client_weights(config: StrategyConfig, contributions: Sequence[Contribution]) -> Tensor:
    """The weight q of each contribution, [K] float64, summing to one; of none, none."""
    n = torch.tensor([c.n for c in contributions], dtype=torch.float64)
    match config.weigh:
        case "uniform":
            return torch.full_like(n, 1 / max(len(n), 1))
        case "examples":
            return n / n.sum()
        case "gompertz":
            classes = torch.tensor([int((c.class_counts > 0).sum()) for c in contributions], dtype=torch.float64)
            losses = torch.tensor([c.loss for c in contributions], dtype=torch.float64)
            return gompertz(n, classes, losses, config.alpha, config.size_term)


def gompertz(n: Tensor, classes: Tensor, losses: Tensor, alpha: float, size_term: str = "printed") -> Tensor:
    """FedCMR's weights, eq. 3-5: softmax(S + alpha V) with V = exp(-exp(f / mean f)).

    n, classes, losses: [K] float64; n > 0, losses >= 0 and finite. Where every loss is 0, all count as equal to their
    mean; where nobody has a class, all as having the same number. Returns [K] float64, summing to one.
    """
    if not classes.any():
        classes = torch.ones_like(classes)
    size = n / n.sum() * classes / classes.sum()
    if size_term == "normalised":
        size = size / size.sum()
    if torch.isinf(losses.sum()):  # their ratios are what counts
        losses = losses / losses.max()
    mean = losses.mean()
    ratio = losses / mean if mean > 0 else torch.ones_like(losses)
    return torch.softmax(size + alpha * torch.exp(-torch.exp(ratio)), dim=0)


def combine(
    previous: State, contributions: Sequence[Contribution], weights: Tensor, by_class: frozenset[str], step: float = 1.0
) -> State:
    """W_t of eq. 2: per name, the weighted mean over the clients that own it; `step` > 1 goes on beyond that mean.

    A row of a `by_class` name counts for the clients with an item of that class; a name or row nobody owns keeps its
    previous value. weights: [K], renormalised over the owners. Contributions must come in client order.
    Raises FederationError where the result is not finite: a step beyond what the type can hold.
    """
    combined: State = {}
    for name, old in previous.items():
        owners = [(c, w) for c, w in zip(contributions, weights.tolist(), strict=True) if name in c.shared]
        mean = _mean_by_class if name in by_class else _mean
        combined[name] = mean(name, old, owners, step)
        if not finite(combined[name]):
            raise FederationError(f"{name}: not finite when combined")
    return combined


_CACHED = 1 << 16
"""Numbers combined at a time: half a megabyte in float64, which stays in a core's cache while clients are added up."""


def _mean(name: str, old: Tensor, owners: Sequence[tuple[Contribution, float]], step: float) -> Tensor:
    """The step of `combine` for one name, whole."""
    mass = sum(weight for _, weight in owners)
    if not mass:
        return old
    new = torch.empty_like(old, memory_format=torch.contiguous_format)  # whatever the learner's memory looks like
    before, after = old.reshape(-1), new.view(-1)
    theirs = [(c.shared[name].reshape(-1), weight) for c, weight in owners]
    for start in range(0, len(after), _CACHED):
        part = slice(start, start + _CACHED)
        # float64: the size of the federation must not show in the rounding of the sum
        mean = torch.zeros(len(after[part]), dtype=torch.float64)
        for own, weight in theirs:
            mean.add_(own[part], alpha=weight)
        mean.div_(mass)
        after[part] = mean if step == 1 else before[part] + step * (mean - before[part])
    return new


def _mean_by_class(name: str, old: Tensor, owners: Sequence[tuple[Contribution, float]], step: float) -> Tensor:
    """The step of `combine` for one name, row by row."""
    total = torch.zeros(old.shape, dtype=torch.float64)
    mass = torch.zeros(len(old), dtype=torch.float64)
    for contribution, weight in owners:
        share = weight * (contribution.class_counts > 0).double()
        total += _by_row(share, old) * contribution.shared[name].double()
        mass += share
    owned = mass > 0
    mean = total / _by_row(torch.where(owned, mass, 1.0), old)
    moved = mean if step == 1 else old + step * (mean - old)
    return torch.where(_by_row(owned, old), moved, old.double()).to(old.dtype)


def merge(
    config: StrategyConfig,
    received: State,
    before: State,
    after: State,
    by_class: frozenset[str],
    class_counts: Tensor,
) -> State:
    """What a client goes on with: W_t itself, or eq. 6's W_t + gamma (W_t^k - W_0^k).

    received: W_t. before, after: the client's W_0^k and W_t^k, of the names it owns. class_counts: [C].
    Names, and rows of `by_class` names, that the client does not own are replaced.
    """
    if config.merge == "replace":
        return dict(received)
    merged: State = {}
    for name, new in received.items():
        if name not in before:
            merged[name] = new
            continue
        change = config.gamma * (after[name] - before[name])
        if name in by_class:
            change = change * _by_row(class_counts > 0, change)
        merged[name] = new + change
    return merged


def _by_row(values: Tensor, like: Tensor) -> Tensor:
    """[rows] or [] values shaped so that they broadcast over `like` row by row."""
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values

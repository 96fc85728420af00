"""What the classical floors have in common: an affine map for each modality, solved for anew from the items given.

Each module of theirs says what is solved: `correlation` (CCA, MCCA, PLS), `mvda`, `logistic`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fedxmr.errors import InputError
from fedxmr.learners.cosine import cosine
from fedxmr.learners.training import layers, restore, snapshot
from fedxmr.types import DataSpec, Fit, Items, Proximal, State

_NO_VARIANCE = 1e-10
"""A direction whose variance is less than this part of the largest has none."""

_NO_WEIGHT = 1e-9
"""An axis that weighs less, where 1 is the most that it can, is none."""


class Affine(NamedTuple):
    """The map x W^T + b. weight: W [k, d] float64. bias: b [k] float64."""

    weight: Tensor
    bias: Tensor


class ProjectionLearner:
    """The part of `types.Learner` that does not depend on the method; a subclass solves for the maps.

    Its state is `projections.<modality>.weight` [k, d] and `.bias` [k], float64: a random projection at first, and a
    function of the items alone once it has been fitted. Epochs, FedProx's term and what was loaded do not show in it.
    """

    least, most = 1, 1 << 20
    """How many modalities it takes to fit, and how many the method is defined for."""

    unshared = "is solved for anew from a client's own items, and would forget what the others send"
    rounds = 1

    common: frozenset[str] = frozenset()
    statistics: frozenset[str] = frozenset()
    by_class: frozenset[str] = frozenset()

    def __init__(self, width: int, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        """width: k. Raises InputError for more modalities than the method is defined for."""
        if len(spec.dims) > self.most:
            raise InputError(
                f"{type(self).__name__} takes {self.most} modalities, got {', '.join(sorted(spec.dims))}; "
                "MCCA (learner mcca) takes any number"
            )
        drawn = layers({f"projections.{m}": (spec.dims[m], width) for m in sorted(spec.dims)}, rng, device)
        # float64: features may be far from zero, and covariances nearly singular
        self._live = {name: tensor.double() for name, tensor in drawn.items()}
        self._device = device
        self.trainable = frozenset(self._live)

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:  # noqa: ARG002
        """Solve for the maps; the loss is the method's own. Where the items determine none, nothing changes."""
        solved = self._solve(data.to(self._device)) if epochs else None
        if solved is None:
            return Fit(loss=0.0, loss_sum=0.0, trained=False)
        maps, loss = solved
        for modality, (weight, bias) in maps.items():
            self._live[f"projections.{modality}.weight"].copy_(weight)
            self._live[f"projections.{modality}.bias"].copy_(bias)
        return Fit(loss=loss, loss_sum=loss)

    def owned(self, held: Collection[str]) -> frozenset[str]:
        """The maps of the modalities that it holds, where these are enough to fit."""
        own = tuple(f"projections.{m}." for m in held)
        return frozenset(name for name in self.trainable if len(own) >= self.least and name.startswith(own))

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d] features -> [n, k] float32, on the learner's device."""
        return self._project(modality, x).float()

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:  # noqa: ARG002
        """Cosines, [q, k] and [g, k] -> [q, g]; the direction does not matter."""
        return cosine(query, gallery)

    def state(self, names: Collection[str] | None = None) -> State:
        """All of it, copied; or some names of it."""
        return snapshot(self._live if names is None else {name: self._live[name] for name in names})

    def load(self, state: State) -> None:
        """Take over part or all of a state; ValueError, loading nothing, where a name, shape or dtype is wrong."""
        restore(self._live, state)

    def _project(self, modality: str, x: Tensor) -> Tensor:
        """[n, d] -> [n, k] float64."""
        of = f"projections.{modality}"
        return F.linear(x.to(self._device).double(), self._live[f"{of}.weight"], self._live[f"{of}.bias"])

    def _solve(self, data: Items) -> tuple[Mapping[str, Affine], float] | None:
        """The maps of the modalities that the items determine, and the loss; None where they determine nothing."""
        raise NotImplementedError


class View(NamedTuple):
    """One modality's rows, centred. x: [n, d] float64. mean: [d] float64, what was taken off."""

    x: Tensor
    mean: Tensor

    @classmethod
    def of(cls, x: Tensor) -> View:
        """The view of raw features [n, d]; a constant column is exactly zero, and not the rounding of its mean."""
        x = x.double()
        mean = x.mean(0)
        return cls(torch.where((x == x[:1]).all(0), 0.0, x - mean), mean)

    def principal(self) -> tuple[Tensor, Tensor]:
        """Directions [d, r] of length 1 and the variance [r] along them; r is the rank, at most n and d."""
        n, d = self.x.shape
        wide = d > n
        values, vectors = torch.linalg.eigh((self.x @ self.x.T if wide else self.x.T @ self.x) / n)
        there = values > _NO_VARIANCE * values[-1].clamp(min=0)
        values, vectors = values[there], vectors[:, there]
        return (self.x.T @ (vectors * (n * values).rsqrt()) if wide else vectors), values

    def whitener(self, ridge: float) -> Tensor:
        """[d, r] W with W^T (S + ridge m I) W = I, S the covariance, m its mean diagonal and r its rank.

        Directions without variance (constant columns, more columns than items) are left out, whatever the ridge.
        """
        directions, variance = self.principal()
        return directions * (variance + ridge * variance.sum() / len(directions)).rsqrt()

    def rotation(self) -> Tensor:
        """[d, r] the principal directions, on a scale that gives the view a total variance of 1."""
        directions, variance = self.principal()
        return directions * variance.sum().rsqrt()


def leading(
    axes: Mapping[str, Tensor], weights: Tensor, k: int, views: Mapping[str, View]
) -> tuple[dict[str, Affine], Tensor] | None:
    """Maps to the k axes of most weight, and their weights; None where no axis has any.

    axes: modality -> [d, r]. weights: [r], 1 at most. Where fewer than k have a weight, the others are zero. Signs are
    such that an axis's largest number is positive: the same items give the same maps.
    """
    order = weights.argsort(descending=True, stable=True)
    chosen = order[weights[order] > _NO_WEIGHT][:k]
    if not len(chosen):
        return None
    picked = {m: of[:, chosen] for m, of in axes.items()}
    stacked = torch.cat(list(picked.values()))
    signs = stacked.gather(0, stacked.abs().argmax(0, keepdim=True)).sign()
    maps = {}
    for modality, of in picked.items():
        weight = F.pad((of * signs).T, (0, 0, 0, k - len(chosen)))
        maps[modality] = Affine(weight, -weight @ views[modality].mean)
    return maps, weights[chosen]

"""Scaling of features, the same on every client without any item leaving one.

Each client reports per modality count, mean and centred sum of squares; the server combines them exactly (Chan, Golub
and LeVeque, 1983) into one mean and deviation, so simulation and deployment scale alike.

    standardise   every column to zero mean and unit deviation
    isotropic     every column to zero mean, and all to a mean square of 1 by one number: columns keep their proportions
    norm          every row to an L2 norm of 10
    none          as they are
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedxmr.state import prefixed, sha256, under
from fedxmr.types import Items, State

BY_MOMENTS = frozenset({"standardise", "isotropic"})
"""The scalings that depend on what the training items are like."""

ROW_NORM = 10.0
"""The L2 norm that `norm` scaling gives every row (TF-IDF rows have norm 1, which trains slowly)."""


@dataclass(frozen=True)
class Moments:
    """count: n. mean, centred: [d] float64, the mean and the sum of squares about it."""

    count: int
    mean: Tensor
    centred: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of [n, d] features."""
        x = x.double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        return cls(len(x), mean, (x - mean).square().sum(0))


def moments(items: Items, scaling: Mapping[str, str]) -> dict[str, Moments]:
    """Of the modalities that some of the items have, and whose scaling depends on them."""
    return {m: Moments.of(items.features[m]) for m in items.modalities if scaling[m] in BY_MOMENTS}


def combine_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together; the order of `parts` shows in the last bits."""
    total = parts[0]
    for part in parts[1:]:
        count = total.count + part.count
        if count == 0:
            continue
        apart = part.mean - total.mean
        mean = total.mean + apart * (part.count / count)
        centred = total.centred + part.centred + apart.square() * (total.count * part.count / count)
        total = Moments(count, mean, centred)
    return total


@dataclass(frozen=True, eq=False)
class Scaler:
    """mean, deviation: modality -> [d] float32, of the modalities whose scaling takes them. Equal by content."""

    mean: Mapping[str, Tensor]
    deviation: Mapping[str, Tensor]

    @cached_property
    def _digest(self) -> str:
        return sha256(self.to_state())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaler) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def over(self, other: Scaler | None) -> Scaler:
        """This one, and the other's where this one says nothing."""
        return Scaler({**other.mean, **self.mean}, {**other.deviation, **self.deviation}) if other else self

    def to_state(self) -> State:
        """As one flat state, for a message or a file."""
        return {**prefixed("mean", self.mean), **prefixed("deviation", self.deviation)}

    @classmethod
    def from_state(cls, state: State) -> Scaler:
        """What `to_state` gave."""
        return cls(under("mean", state), under("deviation", state))

    @classmethod
    def of(cls, moments: Mapping[str, Moments]) -> Scaler:
        """The population's; the deviation of a constant column is 0."""
        return cls(
            {m: x.mean.float() for m, x in moments.items()},
            {m: (x.centred / max(x.count, 1)).sqrt().float() for m, x in moments.items()},
        )

    def unit(self, modality: str, scaling: str) -> Tensor:
        """What `standardise` or `isotropic` divides by, [d] or []; 1 where that were 0: a constant column stays one."""
        deviation = self.deviation[modality]
        by = deviation if scaling == "standardise" else deviation.double().square().mean().sqrt().float()
        return torch.where(by > 0, by, 1.0)


def scale(items: Items, scaling: Mapping[str, str], scaler: Scaler) -> Items:
    """The items with every modality scaled as `scaling` says: standardise, isotropic, norm or none."""
    features = {}
    for modality, x in items.features.items():
        match scaling[modality]:
            case "standardise" | "isotropic" as how if modality in scaler.mean:  # not where nobody has any of it
                features[modality] = (x - scaler.mean[modality]) / scaler.unit(modality, how)
            case "norm":
                features[modality] = torch.nn.functional.normalize(x, dim=1) * ROW_NORM
            case _:
                features[modality] = x
    return Items(features, items.rows, items.labels)

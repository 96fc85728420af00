"""The cosine of the features themselves, untrained, where modalities are equally wide: what a method starts from.

Equal width does not make columns mean the same; where they do not, this is chance.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor

from fedxmr.errors import InputError
from fedxmr.learners.cosine import cosine
from fedxmr.learners.training import restore, snapshot
from fedxmr.types import DataSpec, Fit, Items, Proximal, State


class CosineConfig(BaseModel):
    """Nothing can be chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cosine:
    """The learner that learns nothing and holds nothing. As every learner it sees features as the run scales them."""

    Config = CosineConfig

    unshared = "has nothing to learn"
    rounds = 1

    common: frozenset[str] = frozenset()
    trainable: frozenset[str] = frozenset()
    statistics: frozenset[str] = frozenset()
    by_class: frozenset[str] = frozenset()

    def __init__(self, config: CosineConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:  # noqa: ARG002
        """Raises InputError where modalities differ in width."""
        if len(set(spec.dims.values())) > 1:
            widths = ", ".join(f"{m} {d}" for m, d in sorted(spec.dims.items()))
            raise InputError(f"Cosine: expected modalities of the same width, got {widths}")
        self._device = device

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:  # noqa: ARG002
        """Nothing."""
        return Fit(loss=0.0, loss_sum=0.0, trained=False)

    def owned(self, held: Collection[str]) -> frozenset[str]:  # noqa: ARG002
        """No name."""
        return frozenset()

    def encode(self, modality: str, x: Tensor) -> Tensor:  # noqa: ARG002
        """The features themselves, float32, on the learner's device."""
        return x.to(self._device, torch.float32)

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:  # noqa: ARG002
        """Cosines, [q, k] and [g, k] -> [q, g]."""
        return cosine(query, gallery)

    def state(self, names: Collection[str] | None = None) -> State:  # noqa: ARG002
        """The empty one."""
        return snapshot({})

    def load(self, state: State) -> None:
        """ValueError for any name."""
        restore({}, state)

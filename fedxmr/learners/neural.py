"""What learners that are a `Network` have in common: their state, how many items are encoded, and cosine ranking."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fedxmr.learners.cosine import cosine
from fedxmr.learners.training import Network, restore, snapshot
from fedxmr.types import State

_CHUNK = 4096
"""Items encoded at a time: what is between the layers needs memory too."""


class NeuralLearner:
    """The part of `types.Learner` that does not depend on the method; a subclass sets what is declared here."""

    _network: Network
    _device: torch.device

    trainable: frozenset[str]

    statistics: frozenset[str] = frozenset()
    by_class: frozenset[str] = frozenset()

    def owned(self, held: Collection[str]) -> frozenset[str]:
        """All but the towers of other modalities. For learners any modality of which trains all that is not a tower."""
        towers = tuple(f"towers.{m}." for m in held)
        return frozenset(
            name for name in self.trainable if held and (name.startswith(towers) or not name.startswith("towers."))
        )

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d] features -> [n, k] float32, what `similarity` compares, on the learner's device."""
        with torch.no_grad():
            parts = [self._embed(modality, part.to(self._device, torch.float32)) for part in torch.split(x, _CHUNK)]
        return torch.cat(parts)

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:  # noqa: ARG002
        """Cosines, [q, k] and [g, k] -> [q, g]; the direction does not matter."""
        return cosine(query, gallery)

    def state(self, names: Collection[str] | None = None) -> State:
        """All that must survive a round, copied; or some names of it."""
        live = self._live()
        return snapshot(live if names is None else {name: live[name] for name in names})

    def load(self, state: State) -> None:
        """Take over part or all of a state; ValueError, loading nothing, where a name, shape or dtype is wrong."""
        restore(self._live(), state)

    def _live(self) -> dict[str, Tensor]:
        """The tensors of the state themselves."""
        return self._network.live()

    def _embed(self, modality: str, x: Tensor) -> Tensor:
        """[n, d] float32 features -> [n, k], through the networks of a modality."""
        raise NotImplementedError

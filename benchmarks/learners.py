"""Learners for benchmarks, as learners from outside fedxmr are: `learner.name=benchmarks.learners:NoOp`."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection

import psutil
import torch
from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor

from fedxmr.learners.cosine import cosine
from fedxmr.learners.dscmr import DSCMR
from fedxmr.types import DataSpec, Fit, Items, Proximal, State


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NoOp:
    """One parameter, which is never trained: what is left of a round is what it costs to have one."""

    Config = _Options
    common = trainable = frozenset({"w"})
    statistics: frozenset[str] = frozenset()
    by_class: frozenset[str] = frozenset()

    def __init__(self, config: _Options, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._w = torch.zeros(1)

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        """Nothing."""
        return Fit(0.0, 0.0)

    def owned(self, held: Collection[str]) -> frozenset[str]:
        """The one parameter."""
        return self.trainable if held else frozenset()

    def state(self, names: Collection[str] | None = None) -> State:
        """A copy of it."""
        return {"w": self._w.clone()} if names is None or "w" in names else {}

    def load(self, state: State) -> None:
        """Take it over."""
        if unknown := state.keys() - {"w"}:
            raise ValueError(f"state: {unknown} is no tensor of this learner")
        for value in state.values():
            if value.shape != self._w.shape or value.dtype != self._w.dtype:
                raise ValueError(f"state: w: expected [1] float32, got {list(value.shape)} {value.dtype}")
            self._w.copy_(value)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """The first feature."""
        return x[:, :1]

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:
        """Cosines."""
        return cosine(query, gallery)


class Stopwatch(DSCMR):
    """DSCMR that says, as it is first asked to train, how long its process has been there."""

    _said = False

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        """As DSCMR."""
        if epochs and not Stopwatch._said:
            Stopwatch._said = True
            sys.stdout.write(f"first step after {time.time() - psutil.Process().create_time():.3f} s\n")
        return super().fit(data, epochs, rng, proximal)

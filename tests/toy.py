"""A learner small enough to follow by hand, for tests of everything around learners; `learner.name=tests.toy:Toy`.

Its state is two numbers: `shared.w` moves by `step` times the mean of the first feature for each epoch, and `private.v`
counts the items seen. Its loss is the mean absolute first feature.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor

from fedxmr.types import DataSpec, Fit, Items, Proximal, State


class ToyConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: float = 0.25
    abstains_without: str = ""
    misbehaves: dict[str, str] = {}
    """Number of items seen -> raise, nan, negative, interrupt, hang or die, perhaps " once": see `fit`."""
    once: Path = Path()


class Toy:
    Config = ToyConfig
    statistics: frozenset[str] = frozenset()
    by_class: frozenset[str] = frozenset()
    common = frozenset({"shared.w"})
    trainable = frozenset({"shared.w", "private.v"})

    def __init__(self, config: ToyConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._config = config
        self._modalities = sorted(spec.dims)
        first = torch.rand(1, generator=rng) if rng is not None else torch.empty(1)
        self._state = {"shared.w": first, "private.v": torch.zeros(1)}

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        if not epochs:  # nothing of it depends on the first data
            return Fit(0.0, 0.0, trained=False)
        if self._config.abstains_without and self._config.abstains_without not in data.modalities:
            return Fit(0.0, 0.0, trained=False)
        x = data.features[data.modalities[0]][:, 0]
        self._state["private.v"] += len(data) * epochs
        move = self._config.step * epochs * x.mean()
        if proximal is not None:
            move = move - proximal.mu * (self._state["shared.w"] - proximal.anchor["shared.w"]).mean()
        self._state["shared.w"] += move
        loss = float(x.abs().mean())
        match self._misbehaviour():
            case "raise":
                raise RuntimeError("the toy broke")
            case "nan":
                self._state["shared.w"] += float("nan")
            case "negative":
                loss = -1.0
            case "interrupt":
                raise KeyboardInterrupt
            case "hang":
                time.sleep(3600)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return Fit(loss, loss * epochs)

    def _misbehaviour(self) -> str:
        """What to do wrong now; "... once" is done once for each file `once`."""
        how = self._config.misbehaves.get(str(int(self._state["private.v"])), "")
        if how.endswith(" once"):
            if self._config.once.exists():
                return ""
            self._config.once.touch()
        return how.removesuffix(" once")

    def owned(self, held: Collection[str]) -> frozenset[str]:
        return self.trainable if held else frozenset()

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return x[:, :2] * (1 + self._modalities.index(modality)) + self._state["shared.w"]

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:
        return -torch.cdist(query, gallery)

    def state(self, names: Collection[str] | None = None) -> State:
        return {name: t.clone() for name, t in self._state.items() if names is None or name in names}

    def load(self, state: State) -> None:
        for name, value in state.items():
            if name not in self._state or value.shape != self._state[name].shape:
                raise ValueError(f"toy: {name} {list(value.shape)}")
        for name, value in state.items():
            self._state[name].copy_(value)

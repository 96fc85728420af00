"""What all clients of one process share: the configuration, the common data, and the learner everybody starts from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from fedxmr.config import Config, LearnerConfig
from fedxmr.data import Dataset
from fedxmr.data.dataset import lacking
from fedxmr.errors import InputError
from fedxmr.learners import describe, learner_class, vet
from fedxmr.machine import choose_device
from fedxmr.partition import Part
from fedxmr.scaling import Scaler, scale
from fedxmr.seeding import generator
from fedxmr.sources import parts, scaling, zero_shot
from fedxmr.state import sha256, size
from fedxmr.strategies import shared_names
from fedxmr.types import DataSpec, Items, Learner, State


class Setting:
    """What all clients of one process share: configuration, common validation and test items, initial state."""

    def __init__(self, config: Config, data: Dataset) -> None:
        self.config = config
        self.data = data
        self.device = choose_device(config.runtime.device)
        self.scaling = scaling(config, data)
        self._scaled: tuple[Scaler, dict[str, Items]] = (Scaler({}, {}), {})

    @cached_property
    def parts(self) -> Sequence[Part]:
        """In a simulation, every client's part of the training items."""
        return parts(self.config)

    @cached_property
    def initial(self) -> State:
        """The seeded initial weights; not to be changed in place."""
        return initial_state(self.config, self.data.spec)

    @cached_property
    def state_bytes(self) -> int:
        """The size of a learner's whole state."""
        return size(self.learner().state())

    @cached_property
    def shared(self) -> frozenset[str]:
        """The names of the learner's state that clients share."""
        return shared_names(self.config.strategy, self.learner())

    @cached_property
    def initial_sha256(self) -> str:
        """The hash of the seeded shared state, by which server and clients see that they agree."""
        return sha256({name: self.initial[name] for name in self.shared})

    def scale(self, items: Items, scaler: Scaler) -> Items:
        """The items as learners see them, on the device."""
        return scale(items, self.scaling, scaler).to(self.device)

    def part(self, name: str, scaler: Scaler) -> Items:
        """The scaled validation, test or all_test items; one copy serves all clients that scale alike."""
        if self._scaled[0] != scaler:
            self._scaled = (scaler, {})
        parts = self._scaled[1]
        if name not in parts:
            parts[name] = self.scale(getattr(self.data, name), scaler)
        return parts[name]

    def learner(self) -> Learner:
        """A learner whose state is loaded next."""
        return build_learner(self.config.learner, self.data.spec, self.device, None)


def check(config: Config, data: Dataset) -> None:
    """See that learner, strategy, scaling, device and data go together. Raises InputError."""
    own_device(config)
    scaling(config, data)
    zero_shot(config)
    try:
        # on the CPU: the process that checks may not be one that trains, and is to take no GPU memory
        learner = build_learner(config.learner, data.spec, torch.device("cpu"), None)
        vet(config.learner.name, learner, data.spec)
        shared_names(config.strategy, learner)
        remarks(config, data)
    except InputError:
        raise
    except Exception as error:  # a learner from outside may raise anything
        raise InputError(f"the learner cannot be built as configured: {describe(error)}") from error
    for part, items in (("validation", data.validation), ("test", data.test)):
        if (what := lacking(items, part, data.spec.dims)) is not None:
            raise InputError(f"{data.name}: expected {what}, got none")


def remarks(config: Config, data: Dataset) -> tuple[str, ...]:
    """What a user should know of the learner on this data, one line each: a learner's `remarks`, where it has them.

    And what becomes of a learner in closed form, with statistics, where the strategy is not made for it.
    """
    of = getattr(learner_class(config.learner.name), "remarks", None)
    own = tuple(of(config.learner.options, data.spec)) if of else ()
    learner = build_learner(config.learner, data.spec, torch.device("cpu"), None)
    return (*own, *_closed_form(config, learner)) if learner.statistics else own


def _closed_form(config: Config, learner: Learner) -> Iterator[str]:
    federation, strategy = config.federation, config.strategy
    if strategy.joint_fraction < 1:
        yield (
            f"{config.learner.name} solves anew in every stage: the enhancement on the items held back forgets much of "
            "what was merged; strategy.joint_fraction=1 has none"
        )
    if not shared_names(strategy, learner) & learner.statistics:
        return
    exact: Mapping[str, tuple[Any, Any]] = {
        "federation.epochs": (federation.epochs, 1),
        "strategy.weigh": (strategy.weigh, "examples"),
        "strategy.merge": (strategy.merge, "replace"),
        "strategy.joint_fraction": (strategy.joint_fraction, 1),
        "strategy.server_step": (strategy.server_step, 1),
    }
    if other := [f"{key}={needed}, not {has}" for key, (has, needed) in exact.items() if has != needed]:
        yield f"sharing statistics is training on pooled data, round by round, only with {'; '.join(other)}"


def own_device(config: Config) -> torch.device:
    """The device of the process that checks and reports. With a cluster, the one asked for may be another machine's."""
    return choose_device("auto" if config.runtime.ray_address else config.runtime.device)


def owned_names(shared: frozenset[str], learner: Learner, held: Collection[str]) -> frozenset[str]:
    """The shared names that a client holding these modalities trains."""
    return shared & learner.owned(held)


def build_learner(config: LearnerConfig, spec: DataSpec, device: torch.device, rng: torch.Generator | None) -> Learner:
    """The configured learner; rng None: for a state that is loaded next."""
    return learner_class(config.name)(config.options, spec, device, rng)


def initial_state(config: Config, spec: DataSpec) -> State:
    """The weights, without moments, that every client and the server start from, drawn from the seed alone."""
    learner = build_learner(config.learner, spec, torch.device("cpu"), generator(config.seed, "initial"))
    return learner.state(learner.trainable | learner.statistics)

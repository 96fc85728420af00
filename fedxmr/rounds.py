"""A client's side of a round: merge, enhance, evaluate, train (FedCMR, Algorithm 1; any strategy's four choices).

FedCMR's last two steps of round t-1 run at the start of round t's message, so a round costs one exchange. What a
client carries between messages is its learner, the snapshot W_0 that eq. 6 needs, and the round these belong to; the
80/20 draw, batches and noise come from (seed, purpose, round, client) and need no storage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedxmr.evaluation import evaluate
from fedxmr.learners.training import products_in
from fedxmr.machine import versions
from fedxmr.messages import Farewell, Registration, Report, Scores, Task, Update
from fedxmr.models import Model
from fedxmr.scaling import Moments, Scaler, moments
from fedxmr.seeding import generator
from fedxmr.setting import Setting, owned_names
from fedxmr.snapshot import Owner, Snapshot
from fedxmr.state import sha256, size
from fedxmr.strategies import merge
from fedxmr.timing import clock
from fedxmr.types import Fit, Items, Learner, Proximal, State

INITIAL = 0
"""The round of the seeded initial state."""

_DIRTY = -1
"""The round of a state that a task has begun to change."""


class Client:
    """One client: its items, and what it carries from message to message."""

    def __init__(self, setting: Setting, take: Callable[[], Items], owner: Owner) -> None:
        """take: gives its own raw training items, of which it keeps no copy. owner: whose its durable states are."""
        self.owner = owner
        self.client = owner.client
        self.kept: dict[int, State] = {}
        self._setting = setting
        self._config = setting.config
        self._take = take
        raw = take()
        self._n, self._class_counts = len(raw), class_counts(raw)
        self._held = {modality: len(raw.rows[modality]) for modality in raw.modalities}
        self._scaler = Scaler({}, {})
        self._items: Items | None = None
        self._learner: Learner | None = None
        self._round = INITIAL
        self._before: State | None = None
        self._previous: Snapshot | None = None

    def register(self) -> Registration:
        """What the server may know of this client before the first round."""
        return Registration(
            client=self.client,
            n=self._n,
            class_counts=self._class_counts,
            spec=self._setting.data.spec,
            held=self._held,
            moments=self._moments(),
            versions=versions(),
            initial_sha256=self._setting.initial_sha256,
        )

    def take_part(self, task: Task) -> Update:
        """Do one task. On an exception the state is the one before, if failures are tolerated, else lost."""
        started = clock.seconds()
        if task.keep:
            update = self._follow(task)
            self._round = task.round
        else:
            held = self.snapshot() if self._learner is not None else None
            try:
                update = self._follow(task)
            finally:
                self.restore(held)
        spent = {part: seconds - started.get(part, 0.0) for part, seconds in clock.seconds().items()}
        return dataclasses.replace(update, seconds={part: s for part, s in spent.items() if s > 0})

    def finish(self, farewell: Farewell) -> Report:
        """The last word; from then on `kept` holds the selected round alone and the last is the learner's own state."""
        self.return_to(farewell.base)
        last = self.learner.state()
        scores: dict[int, Scores] = {}
        if farewell.evaluate:
            scores[farewell.last] = self._evaluate("test")
            if farewell.selected in self.kept and farewell.selected != farewell.last:
                self.learner.load(self.kept[farewell.selected])
                scores[farewell.selected] = self._evaluate("test")
                self.learner.load(last)
        self.kept = {round: weights for round, weights in self.kept.items() if round == farewell.selected}
        return Report(self.client, scores.get(farewell.selected), scores.get(farewell.last), sha256(last))

    @property
    def learner(self) -> Learner:
        """The live learner of a client that has taken part."""
        assert self._learner is not None, "asked for the learner of a client that never took part"
        return self._learner

    def models(self) -> dict[str, Model]:
        """After the end of a run: `last`, and `selected` where a round was."""
        learner = self.learner

        def model(round: int, weights: State) -> Model:
            return Model(self.client, round, weights, self._setting.data.spec, self._scaler, self._setting.scaling)

        found = {"last": model(min(self._round, self._config.federation.rounds), learner.state(self._weights()))}
        for round, weights in self.kept.items():
            found["selected"] = model(round, weights)
        return found

    def snapshot(self) -> Snapshot:
        """A copy of all that must survive; of a client that never took part, that and what it was evaluated with."""
        learner = self._learner.state() if self._learner is not None else {}
        return Snapshot(self._round, learner, self._before, self._scaler, dict(self.kept))

    def states(self) -> list[Snapshot]:
        """What it takes to go on, or to go back if the last reply is not accepted: at most two, by round."""
        held = [self._previous] if self._previous is not None else []
        if self._round == _DIRTY or (self._learner is None and not self.kept):  # nothing whole, or nothing at all
            return held
        return [*held, self.snapshot()]

    @property
    def nbytes(self) -> int:
        """The memory this client takes: states, and its items as the learner sees them."""
        live = self._setting.state_bytes if self._learner is not None else 0
        held = self._previous.nbytes if self._previous is not None else 0
        kept = sum(size(weights) for weights in self.kept.values())
        items = size(self._items.features) if self._items is not None else 0
        return live + size(self._before or {}) + held + kept + items

    def roll_back(self, held: Snapshot) -> None:
        """Go back to a snapshot, kept models included, and forget anything newer."""
        self.restore(None if held.round == INITIAL else held)
        self.kept = dict(held.kept)
        self._previous = None

    def restore(self, held: Snapshot | None) -> None:
        """Go back to a snapshot, but for `kept`; None: as if never asked."""
        if held is None:
            self._learner, self._before, self._round = None, None, INITIAL
            return
        if self._learner is None:
            self._learner = self._setting.learner()
        self._learner.load(held.learner)
        self._before, self._round = held.before, held.round
        self._standardise(held.scaler)

    def _follow(self, task: Task) -> Update:
        self._begin(task)
        self._take_over(task)
        validation = test = None
        if task.evaluate:
            validation = self._evaluate("validation")
            test = self._evaluate("test") if self._config.evaluation.protocol == "paper" else None
            self.kept = {round: weights for round, weights in self.kept.items() if round == task.leader}
            self.kept[task.round - 1] = self.learner.state(self._weights())
        loss, shared = self._train(task) if task.fit else (None, {})
        return Update(task.round, self.client, self._n, self._class_counts, loss, shared, validation, test)

    def return_to(self, base: int) -> None:
        """Go to the state of the last accepted reply, and discard anything newer. RuntimeError where it is not here."""
        if base == INITIAL:
            self.restore(None)
        elif self._round != base:
            if self._previous is None or self._previous.round != base:
                raise RuntimeError(f"client {self.client} holds no state of round {base}")
            self.restore(self._previous)

    def _begin(self, task: Task) -> None:
        """Go to the state the task starts from; from here until the reply the state is neither old nor new."""
        self.return_to(task.base)
        if task.base == INITIAL:
            self._learner = self._setting.learner()
            self._learner.load(self._setting.initial)
            self._standardise(task.scaler)
        if task.keep:
            if self._config.federation.tolerate_failures and task.base != INITIAL:
                self._previous = self.snapshot()
            self._round = _DIRTY

    def _take_over(self, task: Task) -> None:
        """Merge W_{t-1} into the own model (eq. 6) and enhance on what was held back in the round of the own update."""
        strategy = self._config.strategy
        if self._before is None:
            self.learner.load(task.shared)
            return
        after = self.learner.state(self._before) if self._before else {}
        self.learner.load(merge(strategy, task.shared, self._before, after, self.learner.by_class, self._class_counts))
        _, held_back = self._division(task.base)
        if len(held_back):
            rng = generator(self._config.seed, "enhancement", task.base, self.client)
            self._fit(self._scaled().select(held_back), self._config.federation.epochs, rng)
        self._before = None

    def _train(self, task: Task) -> tuple[float | None, State]:
        """The joint stage: the loss and the update W_t^k, or (None, {}) where this client cannot train."""
        strategy = self._config.strategy
        own = self._owned()
        proximal = Proximal(strategy.mu, {name: task.shared[name] for name in own}) if strategy.mu and own else None
        # before W_0: where prototypes start is no change of the client's, and takes all its items, held back or not
        self._fit(self._scaled(), 0, generator(self._config.seed, "start", task.round, self.client), proximal)
        self._before = self.learner.state(own) if strategy.merge == "smooth" else {}  # nothing else asks for W_0
        joint, _ = self._division(task.round)
        items = self._scaled() if len(joint) == self._n else self._scaled().select(joint)
        rng = generator(self._config.seed, "joint", task.round, self.client)
        with items.lent("the learner's fit"):
            fit = self._fit(items, self._config.federation.epochs, rng, proximal)
        if not fit.trained:
            return None, {}
        return (fit.loss_sum if strategy.loss == "sum" else fit.loss), self.learner.state(own)

    def _fit(self, items: Items, epochs: int, rng: torch.Generator, proximal: Proximal | None = None) -> Fit:
        """A stage of training, in the precision that is asked for."""
        half = self._config.federation.precision == "bfloat16"
        with clock.part("fit"), products_in(torch.bfloat16 if half else None):
            return self.learner.fit(items, epochs, rng, proximal)

    def _division(self, round: int) -> tuple[Tensor, Tensor]:
        """The items of a round's joint stage and those held back for its enhancement."""
        rng = generator(self._config.seed, "division", round, self.client)
        return divide(self._n, self._config.strategy.joint_fraction, rng)

    def _evaluate(self, part: str) -> Scores:
        if part == "test" and self._config.evaluation.on == "all-test":
            part = "all_test"
        with clock.part("evaluate"):
            return evaluate(self.learner, self._setting.part(part, self._scaler), self._config.seed)

    def _weights(self) -> frozenset[str]:
        return self.learner.trainable | self.learner.statistics

    def _owned(self) -> frozenset[str]:
        """The shared names this client can train."""
        return owned_names(self._setting.shared, self.learner, self._held)

    def _standardise(self, scaler: Scaler | None) -> None:
        if self._config.federation.standardise == "client":
            scaler = Scaler.of(self._moments()).over(scaler)
        scaler = scaler or Scaler({}, {})
        if scaler != self._scaler:
            self._scaler, self._items = scaler, None

    def _scaled(self) -> Items:
        if self._items is None:
            self._items = self._setting.scale(self._take(), self._scaler)
        return self._items

    def _moments(self) -> dict[str, Moments]:
        return moments(self._take(), self._setting.scaling)


def divide(n: int, fraction: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A fresh draw of ceil(fraction n) of n items, and the rest; both sorted int64."""
    drawn = torch.randperm(n, generator=rng)
    joint = math.ceil(round(fraction * n, 6))  # .55 of 100 is 55, not 55.00000000000001
    return drawn[:joint].sort().values, drawn[joint:].sort().values


def class_counts(items: Items) -> Tensor:
    """[C] int64: the items of each class."""
    return items.labels.sum(0)

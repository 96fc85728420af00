"""The clients that live in a process, and what becomes of them between two messages.

An engine that sends a client's messages to one process says so (`alive`): its clients stay there, learners on their
device, and those used longest ago move to files when together they exceed the memory budget. On any other carrier the
next message may come to another process, so a client is a file between messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context

from fedxmr import sources
from fedxmr.config import Config
from fedxmr.data import Dataset
from fedxmr.errors import InputError
from fedxmr.machine import cores
from fedxmr.rounds import Client
from fedxmr.setting import Setting, check
from fedxmr.snapshot import Owner, Store


@dataclass(frozen=True)
class Place:
    """Who a client is and where it lives, as the engine says in the node's configuration.

    owner: the client, and the experiment that its message is of.
    alive: whether this process gets all its messages. data: the folder of its own data, in a deployment.
    out: the run folder; in a deployment, where what is the client's own stays on its machine. states: durable ones.
    threads: what the engine gives this process where the configuration does not say. budget: bytes for living clients.
    """

    owner: Owner
    alive: bool
    data: Path | None
    out: Path
    states: Path
    threads: int
    budget: int

    @classmethod
    def of(cls, context: Context, experiment: str) -> Place:
        """What a node's configuration says; Flower's own simulation says `partition-id` alone.

        Raises InputError where a deployed client's does not say all it needs.
        """
        config = context.node_config
        data, states = (Path(str(config[key])) if key in config else None for key in ("data-path", "state-dir"))
        out = Path(str(context.run_config["out"]))
        if data is not None:
            if states is None:
                raise InputError("node configuration: expected state-dir beside data-path, got none")
            out, states = states / experiment, None
        return cls(
            owner=Owner(int(config["partition-id"]), experiment),
            alive=bool(config.get("alive", False)),
            data=data,
            out=out,
            states=states or out / "states",
            threads=int(config.get("threads", os.environ.get("OMP_NUM_THREADS") or cores())),
            budget=int(config.get("memory-budget", 0)),
        )

    @property
    def client(self) -> int:
        """Its id."""
        return self.owner.client

    def store(self, owner: Owner) -> Store:
        """The durable states of a client here."""
        return Store(self.states, owner)


class Residents:
    """The clients of one run in this process, those used last at the end."""

    def __init__(self) -> None:
        self._run: tuple[str, ...] | None = None
        self._setting: Setting | None = None
        self._clients: dict[int, Client] = {}
        self._sizes: dict[int, int] = {}

    def welcome(self, context: Context, place: Place) -> Client:
        """A client as new, at the start of a run or when it begins again; it is not kept before it has work."""
        self._clients.pop(place.client, None)
        self._sizes.pop(place.client, None)
        return self._new(context, place)

    @contextmanager
    def at_work(self, context: Context, place: Place, base: int) -> Iterator[Client]:
        """A client for one message that starts from its state of round `base`; afterwards it is kept as it then is.

        Where the work fails, a living client is left as it is and a durable one keeps the state it had.
        """
        client = self._clients.pop(place.client, None)
        if client is None:
            client = self._new(context, place)
            if (held := place.store(client.owner).load(base)) is not None:
                client.roll_back(held)
        if place.alive:
            self._clients[place.client] = client
            yield client
            self._shrink(place)
        else:
            yield client
            place.store(client.owner).save(client.snapshot())

    def _shrink(self, place: Place) -> None:
        """Move clients to files, those used longest ago first, until the rest fits the budget."""
        self._sizes[place.client] = self._clients[place.client].nbytes
        total = sum(self._sizes.values())
        for k in list(self._clients):
            if total <= place.budget:
                return
            client = self._clients[k]
            for held in client.states():
                place.store(client.owner).save(held)
            del self._clients[k]  # not before: where the disk is full it stays alive
            total -= self._sizes.pop(k, 0)

    def _new(self, context: Context, place: Place) -> Client:
        setting = self._settle(context, place)
        if place.data is not None:
            return Client(setting, lambda: setting.data.train, place.owner)
        if not 0 <= place.client < len(setting.parts):
            raise InputError(f"expected a client from 0 to {len(setting.parts) - 1}, got {place.client}")
        return Client(setting, partial(setting.parts[place.client].take, setting.data.train), place.owner)

    def _settle(self, context: Context, place: Place) -> Setting:
        """What all clients of this process share; another run, or life of the worker, begins with nobody here."""
        run = (
            str(context.run_config["config"]),
            str(context.run_config["out"]),
            str(context.node_config.get("life", "")),
        )
        if self._setting is None or self._run != run:
            config = Config.from_yaml(run[0])
            torch.set_num_threads(config.runtime.threads or place.threads)
            self._run, self._setting = run, Setting(config, _data(config, place))
            self._clients.clear()
            self._sizes.clear()
        return self._setting


def _data(config: Config, place: Place) -> Dataset:
    """What the clients of a process have in common, or a deployed one alone. Raises InputError."""
    if config.deployed != (place.data is not None):
        has = "no data-path in its node configuration" if place.data is None else "one of its own"
        raise InputError(f"dataset {config.dataset.name}: is not for a client with {has}")
    if place.data is None:
        return sources.dataset(config)
    data = sources.own_folder(config, place.data)
    check(config, data)  # nobody else can
    return data


residents = Residents()
"""This process's."""

"""The Flower ClientApp: unpack a message, let fedxmr.rounds do the work, pack the answer.

The engine says through the node's configuration who this client is (`partition-id`). Clients stay alive in their
process from message to message.
"""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedxmr import sources, wire
from fedxmr.config import Config
from fedxmr.machine import cores
from fedxmr.models import save_models
from fedxmr.rounds import Client
from fedxmr.setting import Setting
from fedxmr.snapshot import Snapshot
from fedxmr.timing import clock

app = ClientApp()


class Residents:
    """The clients that live in this process, all of one run."""

    def __init__(self) -> None:
        self._run: tuple[str, str] | None = None
        self._setting: Setting | None = None
        self._clients: dict[int, Client] = {}

    def welcome(self, context: Context) -> Client:
        """A client as new, at the start of a run."""
        run = (str(context.run_config["config"]), str(context.run_config["out"]))
        if self._setting is None or self._run != run:
            config = Config.from_yaml(run[0])
            torch.set_num_threads(config.runtime.threads or cores())
            self._run, self._setting = run, Setting(config, sources.dataset(config))
            self._clients.clear()
        client = int(context.node_config["partition-id"])
        part = sources.parts(self._setting.config)[client]
        self._clients[client] = Client(self._setting, part.take(self._setting.data.train), client)
        return self._clients[client]

    def get(self, context: Context) -> Client:
        """A client that was welcomed."""
        return self._clients[int(context.node_config["partition-id"])]


residents = Residents()


@app.query("start")
def start(message: Message, context: Context) -> Message:
    """Say who this client is."""
    with clock.part("start_up"):
        registration = residents.welcome(context).register()
    return Message(wire.pack_registration(registration), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do one task of a round."""
    update = residents.get(context).take_part(wire.unpack_task(message.content))
    return Message(wire.pack_update(update), reply_to=message)


@app.query("checkpoint")
def checkpoint(message: Message, context: Context) -> Message:
    """In a simulation: write this client's state into the run folder."""
    asked = wire.unpack_checkpoint(message.content)
    with clock.part("state"):
        client = residents.get(context)
        client.return_to(asked.base)
        client.snapshot().save(Path(str(context.run_config["out"])) / asked.file, asked.client)
    return Message(wire.pack_checkpoint(asked), reply_to=message)


@app.query("restore")
def restore(message: Message, context: Context) -> Message:
    """In a simulation: go back to a state in the run folder."""
    asked = wire.unpack_checkpoint(message.content)
    with clock.part("state"):
        path = Path(str(context.run_config["out"])) / asked.file
        residents.get(context).roll_back(Snapshot.load(path, asked.client))
    return Message(wire.pack_checkpoint(asked), reply_to=message)


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """Hold the final models, and say how good they are."""
    client = residents.get(context)
    report = client.finish(wire.unpack_farewell(message.content))
    with clock.part("state"):
        save_models(Path(str(context.run_config["out"])) / "clients" / str(client.client), client.models())
    return Message(wire.pack_report(report), reply_to=message)

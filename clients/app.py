"""The Flower ClientApp: unpack a message, let fedxmr.rounds do the work, pack the answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.residents import Place, residents
from fedxmr import recording, wire
from fedxmr.config import Config
from fedxmr.models import save_models
from fedxmr.snapshot import Snapshot
from fedxmr.timing import clock

app = ClientApp()


@app.query("start")
def start(message: Message, context: Context) -> Message:
    """Say who this client is."""
    place = _place(message, context)
    with _in_time(context, place), clock.part("start_up"):
        registration = residents.welcome(context, place).register()
    return Message(wire.pack_registration(registration), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do one task of a round."""
    task, place = wire.unpack_task(message.content), _place(message, context)
    with _in_time(context, place), residents.at_work(context, place, task.base) as client:
        update = client.take_part(task)
    # one of our own engines: between its processes arrays are copied once anyway
    return Message(wire.pack_update(update, give=place.alive), reply_to=message)


@app.query("checkpoint")
def checkpoint(message: Message, context: Context) -> Message:
    """In a simulation: write this client's state into the run folder."""
    asked, place = wire.unpack_checkpoint(message.content), _place(message, context)
    with clock.part("state"), residents.at_work(context, place, asked.base) as client:
        client.return_to(asked.base)
        client.snapshot().save(place.out / asked.file, client.owner)
    return Message(wire.pack_checkpoint(asked), reply_to=message)


@app.query("restore")
def restore(message: Message, context: Context) -> Message:
    """In a simulation: go back to a state in the run folder."""
    asked, place = wire.unpack_checkpoint(message.content), _place(message, context)
    with clock.part("state"), residents.at_work(context, place, asked.base) as client:
        client.roll_back(Snapshot.load(place.out / asked.file, client.owner))
    return Message(wire.pack_checkpoint(asked), reply_to=message)


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """Hold the final models, and say how good they are."""
    farewell, place = wire.unpack_farewell(message.content), _place(message, context)
    with _in_time(context, place), residents.at_work(context, place, farewell.base) as client:
        report = client.finish(farewell)
        with clock.part("state"):
            save_models(place.out / "clients" / str(client.client), client.models())
            if place.data is not None:  # with it, fedxmr.load takes the folder for a run's
                recording.write_text(place.out / "config.yaml", str(context.run_config["config"]))
    return Message(wire.pack_report(report), reply_to=message)


@contextmanager
def _in_time(context: Context, place: Place) -> Iterator[None]:
    """Within it a deployed client's process ends when its deadline is over: no message reaches one that hangs.

    The process is there for this message alone; the next one has another.
    """
    if place.data is None:
        yield
        return
    deadline = Config.from_yaml(str(context.run_config["config"])).federation.deadline
    watchdog = threading.Timer(deadline, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _place(message: Message, context: Context) -> Place:
    """Where the client that a message is for lives. Raises WireError, InputError."""
    return Place.of(context, wire.experiment(message.content))

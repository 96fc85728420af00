"""Carrying Flower messages by hand: what any Grid of our own needs, in one place.

Flower has no public way to deliver a message outside its own runtime, so this module uses a few non-public parts of it
(flwr 1.41): `TaskIdentity`, `Run` and three private fields of `Metadata`. tests/integration/test_carrier.py fails when
a new flwr changes them.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedxmr.activity import Activity
from fedxmr.errors import reason

log = logging.getLogger(__name__)

RUN_ID = 1
SERVER_NODE = 1
CLIENT_FAILED = 2
"""The error code of a reply for a client that raised (Flower's own for the same)."""


def identify(node_id: int) -> None:
    """Tell Flower which node this process acts for; needed before any `Message` is made."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, RUN_ID, node_id


def context(node_id: int, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Context:
    """The context of an app on a node."""
    return Context(RUN_ID, node_id, dict(node_config), RecordDict(), dict(run_config))


def load_app(reference: str) -> ClientApp:
    """The ClientApp that "module:attribute" names."""
    module, _, attribute = reference.partition(":")
    app: ClientApp = getattr(importlib.import_module(module), attribute)
    return app


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A run folder's folder of durable states, of use only while the run goes on: empty before, gone after."""
    folder = out / "states"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def error_reply(message: Message, reason: str) -> Message:
    """The reply for a client that failed."""
    return Message(Error(CLIENT_FAILED, reason), reply_to=message)


def answer(app: ClientApp, message: Message, at: Context) -> Message:
    """What a ClientApp answers; an error reply where it raises, or answers in another's name."""
    try:
        reply = app(message, at)
        if (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) != (
            message.metadata.message_id,
            message.metadata.dst_node_id,
        ):
            raise ValueError("expected an answer to the message that was sent, got one to another")
    except Exception as error:
        log.debug("client %d failed", client_of(at.node_id), exc_info=True)
        return error_reply(message, reason(error))
    return reply


class CarrierGrid(Grid):
    """A Grid that delivers messages itself. Subclasses say which nodes there are and carry messages out.

    Node ids are the client ids plus 2: Flower keeps 1 for the server. activity: what is being done, kept up to date.
    """

    engine: ClassVar[str]

    def __init__(self, clients: int) -> None:
        self.activity = Activity()
        self._clients = clients
        self._run = Run.create_empty(RUN_ID)
        self._message_ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        identify(SERVER_NODE)

    def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        """Deliver addressed messages and return their replies, in any order; a missing one means no answer in time.

        timeout: seconds each client has, from the moment it is worked for; None: the carrier's own deadline.
        """
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return [node_of(client) for client in range(self._clients)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        addressed = [self._address(message) for message in messages]
        self._replies.update((reply.metadata.reply_to_message_id, reply) for reply in self._exchange(addressed, None))
        return [message.metadata.message_id for message in addressed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._exchange([self._address(message) for message in messages], timeout)

    def _exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        self.activity.ask(messages[0].metadata.message_type if messages else "", len(messages))
        return self.exchange(messages, timeout)

    def _address(self, message: Message) -> Message:
        fields = message.metadata.__dict__
        fields["_message_id"] = str(next(self._message_ids))
        fields["_src_node_id"] = SERVER_NODE
        fields["_run_id"] = RUN_ID
        return message


def node_of(client: int) -> int:
    """The node a client lives on."""
    return client + 2


def client_of(node_id: int) -> int:
    """The client that lives on a node."""
    return node_id - 2

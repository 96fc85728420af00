"""The nodes of a federation as the server reaches them: by client id, with a deadline on every exchange."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedxmr import wire
from fedxmr.activity import Activity
from fedxmr.config import FederationConfig
from fedxmr.errors import FederationError, in_one_line
from fedxmr.messages import Checkpoint, Registration

Said = TypeVar("Said")

FLOWER = "flower"
"""The engine's name where Flower's own runtime carries the messages."""


@dataclass(frozen=True)
class Reply:
    """What came back for one message: what was said; or why nothing was (`failed`), or why it is none (`fault`)."""

    content: RecordDict = field(default_factory=RecordDict)
    failed: str | None = None
    fault: str | None = None

    def read(self, unpack: Callable[[RecordDict], Said]) -> Said:
        """What was said. Raises WireError with the reason where that was nothing, or nothing of use."""
        if why := self.failed or self.fault:
            raise wire.WireError(why)
        return unpack(self.content)


class Nodes:
    """Which node each client lives on, known once they have registered.

    engine: what carries the messages. experiment: what they are of. activity: what its workers do; nothing is known
    of Flower's own runtimes.
    """

    def __init__(self, grid: Grid, config: FederationConfig, experiment: str) -> None:
        """experiment: what every message says it is of."""
        self.experiment = experiment
        self.engine = str(getattr(grid, "engine", FLOWER))
        self.activity: Activity = getattr(grid, "activity", None) or Activity()
        self._grid = grid
        self._config = config
        self._node_of: dict[int, int] = {}

    def register(self) -> list[Registration]:
        """Ask every node who it is; the registrations by client. Raises FederationError where one does not say."""
        contents = {node: wire.pack_start() for node in self._wait()}
        registrations, failed = [], []
        for node, reply in self._send(wire.START, contents, 0, self._config.start_deadline).items():
            try:
                registration = reply.read(wire.unpack_registration)
            except wire.WireError as error:
                failed.append(f"a client failed at the start: {in_one_line(str(error))} (node {node})")
                continue
            registrations.append(registration)
            self._node_of[registration.client] = node
        if failed:
            raise FederationError("\n".join(failed))
        return sorted(registrations, key=lambda r: r.client)

    def exchange(self, kind: str, contents: Mapping[int, RecordDict], round: int) -> dict[int, Reply]:
        """Send each client its content and return what came back, by client, for every one of them."""
        by_node = {self._node_of[client]: content for client, content in contents.items()}
        replies = self._send(kind, by_node, round, self._config.deadline)
        return {client: replies[self._node_of[client]] for client in contents}

    def ask(self, kind: str, asked: Mapping[int, Checkpoint], round: int) -> None:
        """Have clients write or read a state. Raises FederationError naming one that does not say it has done that."""
        contents = {client: wire.pack_checkpoint(checkpoint) for client, checkpoint in asked.items()}
        for client, reply in sorted(self.exchange(kind, contents, round).items()):
            try:
                if (said := reply.read(wire.unpack_checkpoint)) != asked[client]:
                    raise wire.WireError(f"expected {asked[client]}, got {said}")
            except wire.WireError as error:
                raise FederationError(f"client {client} failed at {kind}: {in_one_line(str(error))}") from error

    def _send(self, kind: str, contents: Mapping[int, RecordDict], round: int, deadline: float) -> dict[int, Reply]:
        """An exchange by node. Every reply belongs to the message it answers, whatever it says of itself."""
        addressed = {node: wire.address(content, self.experiment) for node, content in contents.items()}
        messages = {node: Message(content, node, kind, group_id=str(round)) for node, content in addressed.items()}
        came: dict[int, list[Message]] = {node: [] for node in messages}
        replies = self._grid.send_and_receive(list(messages.values()), timeout=deadline)
        asked = {message.metadata.message_id: node for node, message in messages.items()}  # which sending has numbered
        for reply in replies:
            about = reply.metadata
            node = asked.get(about.reply_to_message_id, about.src_node_id)
            if node not in came:
                raise FederationError(f"node {node} answered {kind} of round {round}, which it was not asked")
            came[node].append(reply)
        return {node: _reply(messages[node], came[node], deadline) for node in messages}

    def _wait(self) -> list[int]:
        deadline = time.monotonic() + self._config.start_deadline
        while len(nodes := sorted(self._grid.get_node_ids())) < self._config.clients:
            if time.monotonic() > deadline:
                raise FederationError(f"expected {self._config.clients} clients, {len(nodes)} were there in time")
            time.sleep(0.1)
        return nodes


def _reply(message: Message, came: list[Message], deadline: float) -> Reply:
    """What to make of all that came for a message."""
    if not came:
        return Reply(failed=f"no answer within {deadline:g} s")
    if len(came) > 1:
        return Reply(fault=f"answered {len(came)} times")
    (reply,) = came
    about = reply.metadata
    if about.reply_to_message_id != message.metadata.message_id:
        return Reply(fault="answers another message than the one it was sent")
    if reply.has_error():  # perhaps Flower's own, of which the server itself is the source
        return Reply(failed=str(reply.error.reason))
    if about.src_node_id != message.metadata.dst_node_id:
        return Reply(fault=f"the answer came from node {about.src_node_id}")
    return Reply(reply.content)

"""The nodes of a federation as the server reaches them: by client id, with a deadline on every exchange."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedxmr import wire
from fedxmr.activity import Activity
from fedxmr.checks import fingerprint
from fedxmr.config import FederationConfig
from fedxmr.errors import FederationError, in_one_line
from fedxmr.messages import Checkpoint, Registration

Said = TypeVar("Said")

FLOWER = "flower"
"""The engine's name where Flower's own runtime carries the messages."""

POLL = 0.5
"""Seconds between two looks at what has come, or who is there, of Flower's own runtimes."""


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
        self._fingerprints: dict[int, str] = {}
        self._strangers: set[int] = set()

    def register(self) -> list[Registration]:
        """Ask every node who it is; the registrations by client. Raises FederationError where one does not say."""
        nodes = self._wait(self._config.clients, self._config.start_deadline)
        if len(nodes) < self._config.clients:
            raise FederationError(f"expected {self._config.clients} clients, {len(nodes)} were there in time")
        registrations, failed = self._ask_who(nodes)
        if failed:
            raise FederationError("\n".join(failed))
        for node, registration in registrations.items():
            self._node_of[registration.client] = node
            self._fingerprints[registration.client] = fingerprint(registration)
        return sorted(registrations.values(), key=lambda r: r.client)

    def exchange(
        self, kind: str, contents: Mapping[int, RecordDict], round: int, *, wanted: int = 0
    ) -> dict[int, Reply]:
        """Send each client its content and return what came back, by client, for every one of them.

        wanted: of Flower's own runtimes, where nodes come and go, so many are waited for until the deadline.
        """
        if self.engine == FLOWER:
            self._wait(min(wanted, len(contents)), self._config.deadline, contents.keys())
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

    def _ask_who(self, nodes: Iterable[int]) -> tuple[dict[int, Registration], list[str]]:
        """The registrations of nodes, by node, and a line for each that does not say who it is."""
        contents = {node: wire.pack_start() for node in nodes}
        registrations, failed = {}, []
        for node, reply in self._send(wire.START, contents, 0, self._config.start_deadline).items():
            try:
                registrations[node] = reply.read(wire.unpack_registration)
            except wire.WireError as error:
                failed.append(f"a client failed at the start: {in_one_line(str(error))} (node {node})")
        return registrations, failed

    def _wait(self, wanted: int, deadline: float, clients: Iterable[int] | None = None) -> list[int]:
        """The nodes that are there once so many are, of any or of these clients, or once the deadline is over."""
        end = time.monotonic() + deadline
        while True:
            there = self._there()
            if clients is not None:
                self._recognise(there)
                there = [node for client in clients if (node := self._node_of[client]) in there]
            if len(there) >= wanted or time.monotonic() > end:
                return there
            time.sleep(POLL)

    def _there(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def _recognise(self, there: Iterable[int]) -> None:
        """Ask nodes that have come since the start who they are: a client that was started again may be another node.

        Raises FederationError where one claims to be a client whose node is there.
        """
        there = set(there)
        new = there - set(self._node_of.values()) - self._strangers
        if not new:
            return
        for node, registration in self._ask_who(new)[0].items():
            client = registration.client
            if self._node_of.get(client) in there:
                raise FederationError(f"client {client}: claimed by 2 nodes")
            if self._fingerprints.get(client) == fingerprint(registration):
                self._node_of[client] = node
            else:
                self._strangers.add(node)

    def _send(self, kind: str, contents: Mapping[int, RecordDict], round: int, deadline: float) -> dict[int, Reply]:
        """An exchange by node. Every reply belongs to the message it answers, whatever it says of itself."""
        addressed = {node: wire.address(content, self.experiment) for node, content in contents.items()}
        messages = {node: Message(content, node, kind, group_id=str(round)) for node, content in addressed.items()}
        there = messages.keys() & set(self._there()) if self.engine == FLOWER else messages.keys()
        came: dict[int, list[Message]] = {node: [] for node in messages}
        replies = self._carry([message for node, message in messages.items() if node in there], deadline)
        asked = {message.metadata.message_id: node for node, message in messages.items()}  # which sending has numbered
        for reply in replies:
            about = reply.metadata
            node = asked.get(about.reply_to_message_id, about.src_node_id)
            if node not in came:
                raise FederationError(f"node {node} answered {kind} of round {round}, which it was not asked")
            came[node].append(reply)
        absent = Reply(failed="its node is not connected")
        return {node: _reply(messages[node], came[node], deadline) if node in there else absent for node in messages}

    def _carry(self, messages: list[Message], deadline: float) -> Iterable[Message]:
        """The replies that come in time. Flower's own exchange waits in vain for what its SuperLink did not take."""
        if self.engine != FLOWER:
            return self._grid.send_and_receive(messages, timeout=deadline)
        end = time.monotonic() + deadline
        waiting = {name for name in self._grid.push_messages(messages) if name}
        came: list[Message] = []
        while waiting and time.monotonic() < end:
            time.sleep(POLL)
            came += self._grid.pull_messages(waiting)
            waiting -= {message.metadata.reply_to_message_id for message in came}
        return came


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

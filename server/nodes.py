"""The nodes of a federation as the server reaches them: by client id, with a deadline on every exchange."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedxmr import wire
from fedxmr.activity import Activity
from fedxmr.config import FederationConfig
from fedxmr.errors import FederationError
from fedxmr.messages import Registration

FLOWER = "flower"
"""The engine's name where Flower's own runtime carries the messages."""


class Nodes:
    """Which node each client lives on, known once they have registered.

    engine: what carries the messages. activity: what its workers do; of Flower's own runtimes nothing is known.
    """

    def __init__(self, grid: Grid, config: FederationConfig) -> None:
        self.engine = str(getattr(grid, "engine", FLOWER))
        self.activity: Activity = getattr(grid, "activity", None) or Activity()
        self._grid = grid
        self._config = config
        self._node_of: dict[int, int] = {}

    def register(self) -> list[Registration]:
        """Ask every node who it is; the registrations by client. Raises FederationError where one does not say."""
        nodes = self._wait()
        messages = [Message(wire.pack_start(), node, wire.START, group_id="0") for node in nodes]
        registrations = []
        for reply in self._grid.send_and_receive(messages, timeout=self._config.start_deadline):
            if reply.has_error():
                raise FederationError(f"a client failed at the start: {reply.error.reason}")
            registration = wire.unpack_registration(reply.content)
            registrations.append(registration)
            self._node_of[registration.client] = reply.metadata.src_node_id
        if silent := len(nodes) - len(registrations):
            raise FederationError(f"{silent} of {len(nodes)} clients did not answer the start query in time")
        return sorted(registrations, key=lambda r: r.client)

    def exchange(self, kind: str, contents: Mapping[int, RecordDict], round: int) -> dict[int, Message]:
        """Send each client its content and return the replies by client; one that did not answer in time is missing."""
        messages = [
            Message(content, self._node_of[client], kind, group_id=str(round)) for client, content in contents.items()
        ]
        client_on = {node: client for client, node in self._node_of.items()}
        replies = self._grid.send_and_receive(messages, timeout=self._config.deadline)
        return {client_on[reply.metadata.src_node_id]: reply for reply in replies}

    def ask(self, kind: str, contents: Mapping[int, RecordDict], round: int) -> dict[int, RecordDict]:
        """An exchange in which everybody must answer, by client. Raises FederationError naming who did not."""
        replies = self.exchange(kind, contents, round)
        for client in sorted(contents):
            if client not in replies:
                raise FederationError(f"client {client} did not answer {kind} within {self._config.deadline:g} s")
            if replies[client].has_error():
                raise FederationError(f"client {client} failed at {kind}: {replies[client].error.reason}")
        return {client: replies[client].content for client in sorted(contents)}

    def _wait(self) -> list[int]:
        deadline = time.monotonic() + self._config.start_deadline
        while len(nodes := sorted(self._grid.get_node_ids())) < self._config.clients:
            if time.monotonic() > deadline:
                raise FederationError(f"expected {self._config.clients} clients, {len(nodes)} were there in time")
            time.sleep(0.1)
        return nodes

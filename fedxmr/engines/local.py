"""The `local` engine: all clients in this process, one after the other, each with all cores.

It carries messages of Flower's own, unchanged ServerApp and ClientApp. A client cannot be interrupted here, so
deadlines are checked after the fact: an answer that came too late does not count.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedxmr.engines.carrier import SERVER_NODE, CarrierGrid, client_of, context, error_reply
from fedxmr.timing import clock

log = logging.getLogger(__name__)


def run(server: ServerApp, client: ClientApp, clients: int, run_config: Mapping[str, Any]) -> None:
    """Run both apps to the end, in this thread. Whatever the ServerApp raises comes out."""
    grid = LocalGrid(client, clients, run_config)
    server(grid, context(SERVER_NODE, {}, run_config))


class LocalGrid(CarrierGrid):
    """Delivers every message by calling the ClientApp."""

    def __init__(self, app: ClientApp, clients: int, run_config: Mapping[str, Any]) -> None:
        super().__init__(clients)
        self._app = app
        self._run_config = run_config
        self._contexts: dict[int, Context] = {}

    def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        return [reply for message in messages if (reply := self._deliver(message, timeout)) is not None]

    def _deliver(self, message: Message, timeout: float | None) -> Message | None:
        node = message.metadata.dst_node_id
        if node not in self._contexts:
            place = {"partition-id": client_of(node), "num-partitions": self._clients}
            self._contexts[node] = context(node, place, self._run_config)
        started = time.monotonic()
        try:
            with clock.part("messages"):
                reply = self._app(message, self._contexts[node])
        except Exception as error:
            log.debug("client %d failed", client_of(node), exc_info=True)
            return error_reply(message, f"{type(error).__name__}: {error}")
        if timeout is not None and time.monotonic() - started > timeout:
            return None
        return reply

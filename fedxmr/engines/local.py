"""The `local` engine: all clients in this process, one after the other, each with all cores.

It carries messages of Flower's own, unchanged ServerApp and ClientApp. A client cannot be interrupted here, so
deadlines are checked after the fact: an answer that came too late does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedxmr.config import Config
from fedxmr.engines.carrier import SERVER_NODE, CarrierGrid, answer, client_of, context, load_app, scratch
from fedxmr.machine import cores, memory
from fedxmr.timing import clock

THIS_PROCESS = 0
"""The one worker there is."""


def check(config: Config) -> None:
    """Nothing is needed that is not there."""


def run(server: ServerApp, client: str, config: Config, run_config: Mapping[str, Any]) -> None:
    """Run both apps to the end, in this thread. Whatever the ServerApp raises comes out."""
    clients, budget = config.federation.clients, config.runtime.memory_budget
    with scratch(Path(str(run_config["out"]))):
        server(LocalGrid(load_app(client), clients, run_config, budget), context(SERVER_NODE, {}, run_config))


class LocalGrid(CarrierGrid):
    """Delivers every message by calling the ClientApp.

    budget: bytes for living clients; None: half of the memory there is.
    """

    engine = "local"

    def __init__(self, app: ClientApp, clients: int, run_config: Mapping[str, Any], budget: int | None = None) -> None:
        super().__init__(clients)
        self._app = app
        self._run_config = run_config
        self._place = {
            "num-partitions": clients,
            "alive": True,
            "threads": cores(),
            "memory-budget": memory() // 2 if budget is None else budget,
        }
        self._contexts: dict[int, Context] = {}

    def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        return [reply for message in messages if (reply := self._deliver(message, timeout)) is not None]

    def _deliver(self, message: Message, timeout: float | None) -> Message | None:
        node = message.metadata.dst_node_id
        if node not in self._contexts:
            self._contexts[node] = context(node, {"partition-id": client_of(node), **self._place}, self._run_config)
        started = time.monotonic()
        self.activity.begin(THIS_PROCESS, client_of(node))
        with clock.part("messages"):
            reply = answer(self._app, message, self._contexts[node])
        self.activity.end(THIS_PROCESS)
        late = timeout is not None and time.monotonic() - started > timeout
        return None if late and not reply.has_error() else reply

"""The `ray` engine: clients live in Ray actors, on this machine or on a cluster.

A client is pinned to one actor, where its learner stays alive on its device from round to round. Arrays travel through
Ray's object store, and what several clients get goes there once per exchange. A worker that dies or hangs takes the
states of its clients with it: `StateLost` says so, and the next exchange first waits until there are workers again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from flwr.app import Message
from flwr.serverapp import ServerApp
from ray.exceptions import RayError

from fedxmr.activity import Activity
from fedxmr.commands import say
from fedxmr.config import Config
from fedxmr.engines import cluster, transport
from fedxmr.engines.carrier import SERVER_NODE, CarrierGrid, client_of, context, error_reply, scratch
from fedxmr.engines.placement import Node, place
from fedxmr.engines.workers import Reference, WorkerLost, Workers
from fedxmr.errors import FederationError, StateLost
from fedxmr.machine import cores
from fedxmr.recording import add_environment
from fedxmr.timing import clock

AHEAD = 2
"""Messages a worker has at a time: the one it works on, and the next, so that it does not wait for it."""

LOOK = 2.0
"""Seconds between two looks at whether Ray itself lives."""

INLINE = 50_000
"""Bytes that are sent along with every message sooner than fetched from the object store."""

WORK = ("start_up", "fit", "evaluate", "state")
"""Parts of a worker's time that the driver waits for: of the worker that is done last they count as the driver's."""


def check(config: Config) -> None:
    """See that a cluster answers at the address, or that this machine has what is asked for. Raises InputError."""
    runtime, federation = config.runtime, config.federation
    if runtime.ray_address is not None:
        cluster.ask(runtime.ray_address)
        return
    here = Node(cores(), cluster.gpus_here(runtime))
    place(runtime, [here], federation.sample or federation.clients, gpu=here.gpus > 0)


def run(server: ServerApp, client: str, config: Config, run_config: Mapping[str, Any]) -> None:
    """Run both apps to the end, the ServerApp in this thread. What it raises comes out, and no process stays behind.

    Raises InputError where Ray, the cluster or what is asked of it is not there.
    """
    try:
        _run(server, client, config, run_config)
    except RayError as error:
        raise FederationError(f"engine ray: {' '.join(str(error).split())}") from error


def _run(server: ServerApp, client: str, config: Config, run_config: Mapping[str, Any]) -> None:
    out = Path(str(run_config["out"]))
    with scratch(out), cluster.opened(config.runtime) as check, Workers(client, config, out, check) as workers:
        threads = config.runtime.threads or workers.placement.threads
        gpus = workers.placement.gpus
        facts = {"workers": len(workers), "machines": workers.machines, "threads": threads, "gpus_per_worker": gpus}
        add_environment(out, **facts)
        say("ray: " + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in facts.items() if value))
        server(RayGrid(workers, config), context(SERVER_NODE, {}, run_config))


class RayGrid(CarrierGrid):
    """Delivers every message to the worker that its client is pinned to."""

    engine = "ray"

    def __init__(self, workers: Workers, config: Config) -> None:
        super().__init__(config.federation.clients)
        self._workers = workers
        self._checked = time.monotonic()
        self._deadline = config.federation.deadline

    def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        """Raises StateLost, when the others have answered, where a worker died, or hung and was ended."""
        if not messages:
            return []
        with clock.part("messages"):
            if time.monotonic() > self._checked + LOOK:  # a worker may go on answering for a while
                self._workers.check()
                self._checked = time.monotonic()
            if not self._workers.complete:
                with clock.part("start_up"):
                    self._workers.ready()
            seconds = self._deadline if timeout is None else timeout
            course = Exchange(self._workers, messages, seconds, self.activity)
            course.run()
        clock.shift("messages", course.longest())
        if course.lost:
            about = messages[0].metadata
            at = about.message_type, int(about.group_id or 0)
            raise StateLost(*at, died=course.died, hung=course.hung, found=course.found)
        return course.replies


class Exchange:
    """Messages on their way to the workers and back.

    replies: those that came. died, hung: client -> why, of those a worker was working for when it died or was ended.
    found: client -> why, of those whose worker had died before.
    """

    def __init__(self, workers: Workers, messages: Sequence[Message], seconds: float, activity: Activity) -> None:
        """seconds: that a client has for its answer, from the moment its worker turns to it."""
        self.replies: list[Message] = []
        self.died: dict[int, str] = {}
        self.hung: dict[int, str] = {}
        self.found: dict[int, str] = {}
        self._workers = workers
        self._seconds = seconds
        self._activity = activity
        self._stored = _stored(messages)
        self._waiting: dict[int, deque[Message]] = {worker: deque() for worker in range(len(workers))}
        self._sent: dict[int, deque[tuple[Reference, Message]]] = {worker: deque() for worker in range(len(workers))}
        self._since: dict[int, float] = {}
        self._spent: dict[int, Counter[str]] = {}
        self._last: int | None = None
        for message in messages:
            self._waiting[workers.of(_client(message))].append(message)

    def run(self) -> None:
        """Until all that was sent is answered, or its worker lost; after a loss nothing more is sent."""
        for worker in self._waiting:
            self._send(worker)
        while working := {sent[0][0]: worker for worker, sent in self._sent.items() if sent}:
            first = min(self._since[worker] for worker in working.values())
            left = max(first + self._seconds - time.monotonic(), 0)
            answered, _ = ray.wait(list(working), timeout=min(left, LOOK))
            for reference in answered:
                self._receive(working[reference], reference)
            if not answered:
                self._workers.check()
            self._end_late()
            if not self.lost:
                for worker in self._waiting:
                    self._send(worker)

    @property
    def lost(self) -> bool:
        """Whether a worker is gone."""
        return bool(self.died or self.hung or self.found)

    def longest(self) -> Mapping[str, float]:
        """The parts of its work of the worker that was done last."""
        spent = self._spent.get(self._last, Counter()) if self._last is not None else Counter[str]()
        return {part: seconds for part, seconds in spent.items() if part in WORK}

    def _send(self, worker: int) -> None:
        """Send a worker what it has room for."""
        sent, waiting = self._sent[worker], self._waiting[worker]
        while waiting and len(sent) < AHEAD:
            message = waiting.popleft()
            records = transport.array_records(message).values()
            buffers = [self._stored.get(id(record)) or transport.arrays(record) for record in records]
            sent.append((self._workers.deliver(worker, message, buffers), message))
            if len(sent) == 1:
                self._turn(worker)

    def _turn(self, worker: int) -> None:
        """A worker turns to the first message that it has."""
        self._since[worker] = time.monotonic()
        self._activity.begin(worker, _client(self._sent[worker][0][1]))

    def _receive(self, worker: int, reference: Reference) -> None:
        """The answer to a worker's first message."""
        _, message = self._sent[worker][0]
        try:
            answer = self._workers.receive(reference)
        except WorkerLost as lost:
            self._lose(worker, self.found if lost.before else self.died, str(lost))
            return
        except RuntimeError as error:
            self.replies.append(error_reply(message, str(error)))
        else:
            self.replies.append(transport.message(answer.envelope, answer.arrays))
            self._spent.setdefault(worker, Counter()).update(answer.seconds)
            self._last = worker
        self._activity.end(worker)
        self._sent[worker].popleft()
        if self._sent[worker]:
            self._turn(worker)

    def _end_late(self) -> None:
        """End the workers whose client has had its time."""
        now = time.monotonic()
        for worker, sent in self._sent.items():
            if sent and now >= self._since[worker] + self._seconds:
                self._workers.end(worker)
                self._lose(worker, self.hung, f"no answer within {self._seconds:g} s")

    def _lose(self, worker: int, blame: dict[int, str], reason: str) -> None:
        """A worker is gone, with all it had; it was working for the client of its first message."""
        blame[_client(self._sent[worker][0][1])] = reason
        self._sent[worker].clear()
        self._activity.end(worker)


def _stored(messages: Sequence[Message]) -> dict[int, Reference]:
    """What several messages carry, put into the object store once: the record's identity -> where it is."""
    carried = [record for message in messages for record in transport.array_records(message).values()]
    times, records = Counter(map(id, carried)), {id(record): record for record in carried}
    several = {key: transport.arrays(record) for key, record in records.items() if times[key] > 1}
    return {key: ray.put(arrays) for key, arrays in several.items() if transport.size(arrays) > INLINE}


def _client(message: Message) -> int:
    return client_of(message.metadata.dst_node_id)

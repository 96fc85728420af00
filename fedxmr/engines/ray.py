"""The `ray` engine: clients live in Ray actors, on this machine or on a cluster.

A client is pinned to one actor, where its learner stays alive on its device from round to round. Arrays travel through
Ray's object store, what several clients get once per exchange. A worker that dies or hangs takes the states of its
clients with it: `StateLost` says so, and the next exchange first waits until there are workers again.

Unless an address is given, Ray is a private one: started for this run, closed to anyone without its token, and gone
after it. A cluster is only ever joined by its address.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import ray
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import ServerApp
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from fedxmr import wire
from fedxmr.commands import say
from fedxmr.config import Config
from fedxmr.engines import transport
from fedxmr.engines.carrier import SERVER_NODE, CarrierGrid, client_of, context, error_reply, scratch
from fedxmr.engines.placement import Node, place
from fedxmr.engines.worker import Answer, Files, Where, Worker
from fedxmr.errors import FederationError, InputError, StateLost
from fedxmr.machine import cores
from fedxmr.recording import add_environment
from fedxmr.timing import clock

log = logging.getLogger(__name__)

Handle = ActorHandle[Worker]
ObjectRef = ray.ObjectRef[Any]

AHEAD = 2
"""Messages a worker has at a time: the one it works on, and the next, so that it does not wait for it."""

POLL = 0.5
"""Seconds between two looks at a cluster that is being waited for."""

SOCKET_PATH = 40
"""The longest path of a temporary folder below which Ray's sockets fit into the 107 bytes of a socket's name."""


def run(server: ServerApp, client: str, config: Config, run_config: Mapping[str, Any]) -> None:
    """Run both apps to the end, the ServerApp in this thread. What it raises comes out, and no process stays behind.

    Raises InputError where Ray, the cluster or what is asked of it is not there.
    """
    out = Path(str(run_config["out"]))
    with scratch(out), _ray(config) as gpu, Workers(client, config, out, gpu=gpu) as workers:
        server(RayGrid(workers, config, out), context(SERVER_NODE, {}, run_config))


@contextmanager
def _ray(config: Config) -> Iterator[bool]:
    """A private Ray, or the connection to a cluster. Whether clients train on a GPU there."""
    address, device = config.runtime.ray_address, config.runtime.device
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", "GOMP_SPINCOUNT": "0"}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    folder: Path | None = None
    if address is None:
        folder = _short_folder()
        gpus = 0 if device.startswith("cpu") else torch.cuda.device_count()
        options |= {"address": "local", "num_cpus": cores(), "num_gpus": gpus, "include_dashboard": False}
        options |= {"_temp_dir": str(folder)}
        quiet["RAY_gcs_rpc_server_reconnect_timeout_s"] = "20"  # so soon its processes end where this one is killed
    else:
        _reach(address)
        options |= {"address": address, "runtime_env": {"env_vars": quiet}}
    try:
        with clock.part("start_up"), _environment(quiet):
            _init(options)
        yield any(node.gpus for node in _nodes()) and not device.startswith("cpu")
    finally:
        ray.shutdown()
        if folder is not None:
            _end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _init(options: Mapping[str, Any]) -> None:
    """ray.init, which takes SIGTERM for itself: what was there is put back."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as error:  # SIGTERM came meanwhile
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise KeyboardInterrupt from error
    except (RuntimeError, ValueError, OSError, RayError) as error:  # ConnectionError is an OSError
        where = options["address"] if options["address"] != "local" else "a private Ray"
        raise InputError(f"engine ray: {where} cannot be used: {' '.join(str(error).split())}") from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_processes(folder: Path) -> None:
    """End what is left of a private Ray: its own shutdown knows nothing of a start that was interrupted."""
    own = [process for process in psutil.Process().children() if str(folder) in " ".join(_command(process))]
    left = [*own, *(below for process in own for below in process.children(recursive=True))]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ends just now
        return []


def _short_folder() -> Path:
    """A new temporary folder in which Ray's sockets have room for their names."""
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="fedxmr-", dir=usual if len(usual) < SOCKET_PATH else "/tmp"))


def _reach(address: str) -> None:
    """See that somebody listens at a cluster's address: Ray itself would try for a minute. Raises InputError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"runtime.ray_address: expected host:port, such as 10.0.0.1:6379, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"runtime.ray_address: nobody answers at {address}: {error}") from error


def _nodes() -> list[Node]:
    """The living nodes."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]


class Workers:
    """The actors of a run. Client k lives in number k mod their number."""

    def __init__(self, app: str, config: Config, out: Path, *, gpu: bool) -> None:
        federation = config.federation
        self._runtime = config.runtime
        self._out = out
        self._patience = federation.start_deadline
        self.placement = place(config.runtime, _nodes(), federation.sample or federation.clients, gpu=gpu)
        self._here = str(ray.get_runtime_context().get_node_id())
        options: dict[str, Any] = {"num_cpus": self.placement.cpus, "num_gpus": self.placement.gpus}
        options |= {"max_restarts": -1, "max_task_retries": 0}
        if config.runtime.ray_address is not None:
            options["scheduling_strategy"] = "SPREAD"
        self._make = ray.remote(Worker).options(**options).remote
        self._arguments = (app, federation.clients, config.to_yaml(), secrets.token_hex(8))
        self._actors: list[Handle] = []
        self._places: list[Where] = []
        self.complete = False

    def __enter__(self) -> Workers:
        with clock.part("start_up"):
            self._actors = [cast("Handle", self._make(*self._arguments)) for _ in range(self.placement.workers)]
            self.ready()
        plan, nodes = self.placement, len({place.node for place in self._places})
        facts = {"workers": len(self), "threads": self._runtime.threads or plan.threads, "nodes": nodes}
        add_environment(self._out, **facts, gpus_per_worker=plan.gpus)
        each = f"{facts['threads']} threads" if facts["threads"] > 1 else "one thread"
        gpus = f" and {plan.gpus:g} GPU" if plan.gpus else ""
        say(f"ray: {len(self)} workers on {nodes} machines, each with {each}{gpus}")
        return self

    def __exit__(self, *_: object) -> None:
        """Remove scratch folders on other machines, as far as workers answer, and end them all."""
        away = [a for a, place in zip(self._actors, self._places, strict=False) if place.node != self._here]
        if away:
            ray.wait([actor.close.remote() for actor in away], num_returns=len(away), timeout=5)
        for actor in self._actors:
            ray.kill(actor)

    def __len__(self) -> int:
        return len(self._actors)

    def __getitem__(self, worker: int) -> Handle:
        return self._actors[worker]

    def of(self, client: int) -> int:
        """The worker a client is pinned to."""
        return client % len(self._actors)

    def has_run_folder(self, worker: int) -> bool:
        """Whether a worker is on this machine; one on another is taken not to share its disk."""
        return self._places[worker].node == self._here

    def end(self, worker: int) -> None:
        """End a worker's process, whatever it does; Ray starts another in its place."""
        ray.kill(self._actors[worker], no_restart=False)
        self.complete = False

    def ready(self) -> None:
        """Wait until every worker answers. Those for which there is no room, or no time, are given up.

        Raises FederationError where none is left, or one cannot start.
        """
        places = self._await()
        for worker, actor in enumerate(self._actors):
            if worker not in places:
                ray.kill(actor)
        self._actors = [actor for worker, actor in enumerate(self._actors) if worker in places]
        self._places = [places[worker] for worker in sorted(places)]
        if not self._actors:
            raise FederationError(f"engine ray: no worker answered within {self._patience:g} s")
        if lost := self.placement.workers - len(self._actors):
            log.warning("%d workers are gone for good; their clients move to the others", lost)
        self._settle()
        self.complete = True

    def _await(self) -> dict[int, Where]:
        """Worker -> where it is, of those that answer."""
        end = time.monotonic() + self._patience
        asked: dict[ObjectRef, int] = {actor.where.remote(): worker for worker, actor in enumerate(self._actors)}
        places: dict[int, Where] = {}
        while asked and (left := end - time.monotonic()) > 0:
            answered, _ = ray.wait(list(asked), timeout=min(left, POLL))
            for ref in answered:
                worker = asked.pop(ref)
                try:
                    places[worker] = ray.get(ref)
                except RayTaskError as error:
                    raise FederationError(f"engine ray: a worker cannot start: {_cause(error)}") from error
                except RayActorError as error:
                    if "creation task" in str(error):
                        raise FederationError(f"engine ray: a worker cannot start: {_cause(error)}") from error
                    time.sleep(POLL / 5)  # it is being restarted
                    asked[self._actors[worker].where.remote()] = worker
            if places and len(places) >= self.placement.room(_nodes()):
                break
        return places

    def _settle(self) -> None:
        """Tell every worker where it works and what it may use."""
        plan, asked = self.placement, list[ObjectRef]()
        for worker, place_ in enumerate(self._places):
            share = sum(other.node == place_.node for other in self._places)
            out = str(self._out) if self.has_run_folder(worker) else None
            budget = self._runtime.memory_budget
            asked.append(self._actors[worker].settle.remote(out, plan.threads, share, budget, plan.gpus))
        try:
            ray.get(asked, timeout=self._patience)
        except (RayTaskError, GetTimeoutError) as error:
            raise FederationError(f"engine ray: a worker cannot start: {_cause(error)}") from error
        except RayError:  # it died meanwhile: the next message to it will tell
            log.debug("a worker died while it settled", exc_info=True)


def _cause(error: Exception) -> str:
    """The last line of an error, which names what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _death(error: Exception) -> str:
    """How a worker died, as far as Ray knows."""
    return "out of memory" if isinstance(error, OutOfMemoryError) else type(error).__name__


@dataclass
class Exchange:
    """Messages on their way. waiting, sent: by worker, in order; the first that was sent is being worked on."""

    waiting: dict[int, deque[Message]]
    sent: dict[int, deque[tuple[ObjectRef, Message]]]
    since: dict[int, float] = field(default_factory=dict)
    replies: list[Message] = field(default_factory=list)
    spent: dict[int, dict[str, float]] = field(default_factory=dict)
    died: dict[int, str] = field(default_factory=dict)
    hung: dict[int, str] = field(default_factory=dict)
    last: int | None = None


class RayGrid(CarrierGrid):
    """Delivers every message to the worker that its client is pinned to."""

    engine = "ray"

    def __init__(self, workers: Workers, config: Config, out: Path) -> None:
        super().__init__(config.federation.clients)
        self._workers = workers
        self._deadline = config.federation.deadline
        self._out = out

    def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        """Raises StateLost, when the others have answered, where a worker died, or hung and was ended."""
        if not messages:
            return []
        with clock.part("messages"):
            if not self._workers.complete:
                self._workers.ready()
            seconds = self._deadline if timeout is None else timeout
            workers = range(len(self._workers))
            course = Exchange({w: deque() for w in workers}, {w: deque() for w in workers})
            for message in messages:
                course.waiting[self._workers.of(client_of(message.metadata.dst_node_id))].append(message)
            broadcast = _broadcast(messages)
            for worker in workers:
                self._send(course, worker, broadcast)
            refs: list[ObjectRef]
            while refs := [ref for sent in course.sent.values() for ref, _ in sent]:
                first = min(course.since[worker] for worker, sent in course.sent.items() if sent)
                answered, _ = ray.wait(refs, timeout=max(first + seconds - time.monotonic(), 0))
                for answer in answered:
                    self._receive(course, answer)
                if not answered:
                    self._end_late(course, seconds)
                if not course.died and not course.hung:
                    for worker in workers:
                        self._send(course, worker, broadcast)
        if course.last is not None:
            parts = course.spent[course.last]
            clock.shift("messages", {part: s for part, s in parts.items() if part in ("fit", "evaluate", "state")})
        if course.died or course.hung:
            about = messages[0].metadata
            raise StateLost(about.message_type, int(about.group_id or 0), course.died, course.hung)
        return course.replies

    def _send(self, course: Exchange, worker: int, broadcast: Mapping[int, ObjectRef]) -> None:
        """Send a worker what it has room for."""
        sent, waiting = course.sent[worker], course.waiting[worker]
        while waiting and len(sent) < AHEAD:
            message = waiting.popleft()
            records = transport.array_records(message)
            buffers = [broadcast.get(id(record)) or transport.arrays(record) for record in records.values()]
            files = self._files_for(message) if not self._workers.has_run_folder(worker) else {}
            ref: ObjectRef = self._workers[worker].deliver.remote(
                transport.envelope(message), files, list(records), *buffers
            )
            sent.append((ref, message))
            if len(sent) == 1:
                self._begin(course, worker)

    def _begin(self, course: Exchange, worker: int) -> None:
        """The first message that was sent is now worked on."""
        _, message = course.sent[worker][0]
        course.since[worker] = time.monotonic()
        self.activity.begin(worker, client_of(message.metadata.dst_node_id))

    def _receive(self, course: Exchange, ref: ObjectRef) -> None:
        worker = next((w for w, sent in course.sent.items() if any(r == ref for r, _ in sent)), None)
        if worker is None:  # its worker was found dead with another message of the same answer
            return
        message = next(m for r, m in course.sent[worker] if r == ref)
        try:
            answer: Answer = ray.get(ref, timeout=self._deadline)
            self._write(answer.files)
            reply = transport.message(answer.envelope, answer.arrays)
        except RayTaskError as error:
            reply = error_reply(message, _cause(error))
        except (RayError, GetTimeoutError) as error:
            self._lose(course, worker, course.died, f"its worker died ({_death(error)})")
            return
        else:
            spent = course.spent.setdefault(worker, {})
            for part, seconds in answer.seconds.items():
                spent[part] = spent.get(part, 0.0) + seconds
            course.last = worker
        course.replies.append(reply)
        self.activity.end(worker)
        first = course.sent[worker][0][0] == ref
        course.sent[worker] = deque((r, m) for r, m in course.sent[worker] if r != ref)
        if first and course.sent[worker]:
            self._begin(course, worker)

    def _end_late(self, course: Exchange, seconds: float) -> None:
        """End the workers whose client has had its time."""
        now = time.monotonic()
        for worker, sent in course.sent.items():
            if sent and now >= course.since[worker] + seconds:
                self._workers.end(worker)
                self._lose(course, worker, course.hung, f"no answer within {seconds:g} s")

    def _lose(self, course: Exchange, worker: int, blame: dict[int, str], reason: str) -> None:
        """A worker is gone: it was working for the client of the first message that it had not answered."""
        _, message = course.sent[worker][0]
        blame[client_of(message.metadata.dst_node_id)] = reason
        course.sent[worker].clear()
        self.activity.end(worker)
        self._workers.complete = False

    def _files_for(self, message: Message) -> Files:
        """What a worker that does not have the run folder needs of it to answer a message."""
        if message.metadata.message_type != wire.RESTORE:
            return {}
        name = wire.unpack_checkpoint(message.content).file
        return {name: np.fromfile(self._out / name, np.uint8)}

    def _write(self, files: Files) -> None:
        """Put what such a worker wrote into the run folder, each file whole or not at all."""
        for name, content in files.items():
            path = self._out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            content.tofile(temporary)
            temporary.replace(path)


def _broadcast(messages: Sequence[Message]) -> dict[int, ObjectRef]:
    """What several messages carry, put into the object store once: the record's identity -> where it is."""
    seen: dict[int, tuple[int, ArrayRecord]] = {}
    for message in messages:
        for record in transport.array_records(message).values():
            count, _ = seen.get(id(record), (0, record))
            seen[id(record)] = (count + 1, record)
    return {key: ray.put(transport.arrays(record)) for key, (count, record) in seen.items() if count > 1 and record}

"""The workers of the `ray` engine, as the driver sees them: placing, sending, losing and waiting for them."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import ray
from flwr.app import Message
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedxmr import wire
from fedxmr.commands import say
from fedxmr.config import Config
from fedxmr.engines import cluster, transport
from fedxmr.engines.placement import place
from fedxmr.engines.transport import Arrays
from fedxmr.engines.worker import Answer, Files, Where, Worker
from fedxmr.errors import FederationError
from fedxmr.timing import clock

log = logging.getLogger(__name__)

Handle = ActorHandle[Worker]
Reference = ray.ObjectRef[Any]

REMOVAL = 10.0
"""Seconds that other machines have to remove their files."""

POLL = 0.5
"""Seconds between two looks at a cluster that is being waited for."""


class WorkerLost(Exception):
    """A worker died, and what it had in memory with it. The message says how, as far as it is known.

    before: it had died before it turned to the message that tells.
    """

    def __init__(self, reason: str, *, before: bool = False) -> None:
        super().__init__(reason)
        self.before = before


class Workers:
    """The actors of a run. Client k lives in number k mod their number.

    complete: False from the loss of one until `ready` was called again. check: as given.
    """

    def __init__(self, app: str, config: Config, out: Path, check: cluster.Check) -> None:
        """app: "module:attribute" of the ClientApp. out: the run folder. check: that Ray itself lives.

        Raises InputError where what the configuration asks for is not there.
        """
        federation, runtime = config.federation, config.runtime
        nodes = cluster.nodes()
        gpu = any(node.gpus for node in nodes) and not runtime.device.startswith("cpu")
        self.placement = place(runtime, nodes, federation.sample or federation.clients, gpu=gpu)
        self.check = check
        self.complete = False
        self._budget = runtime.memory_budget
        self._out = out
        self._patience = federation.start_deadline
        self._here = str(ray.get_runtime_context().get_node_id())
        options: dict[str, Any] = {"num_cpus": self.placement.cpus, "num_gpus": self.placement.gpus}
        spread = "SPREAD" if runtime.ray_address is not None else "DEFAULT"
        self._make = ray.remote(Worker).options(
            **options, max_restarts=-1, max_task_retries=0, scheduling_strategy=spread
        )
        self._arguments = (app, federation.clients, config.to_yaml(), secrets.token_hex(8), sys.path)
        self._actors: list[Handle] = []
        self._places: list[Where] = []
        self._seen: set[Where] = set()
        self._lives: list[str] = []

    def __enter__(self) -> Self:
        with clock.part("start_up"):
            make = self._make.remote
            self._actors = [cast("Handle", make(*self._arguments)) for _ in range(self.placement.workers)]
            self.ready()
        return self

    def __exit__(self, *_: object) -> None:
        """End them all, and remove what they kept on other machines."""
        for actor in self._actors:
            ray.kill(actor)
        remove: Any = ray.remote(shutil.rmtree)
        removals = [
            remove.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(at.node, soft=False)).remote(
                at.scratch, ignore_errors=True
            )
            for at in self._seen
            if at.node != self._here
        ]
        if removals:
            ray.wait(removals, num_returns=len(removals), timeout=REMOVAL)

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def machines(self) -> int:
        """How many machines they are on."""
        return len({at.node for at in self._places})

    def of(self, client: int) -> int:
        """The worker a client is pinned to."""
        return client % len(self._actors)

    def deliver(self, worker: int, message: Message, buffers: Sequence[Arrays | Reference]) -> Reference:
        """Send a worker a message. buffers: its records of arrays, or where they are in the object store."""
        files = {} if self._has_run_folder(worker) else self._files_for(message)
        names = list(transport.array_records(message))
        sent = transport.envelope(message)
        reference: Reference = self._actors[worker].deliver.remote(self._lives[worker], sent, files, names, *buffers)
        return reference

    def receive(self, reference: Reference) -> Answer:
        """What a worker answered; files it could not write into the run folder are written there.

        Raises WorkerLost, and RuntimeError where the worker itself failed.
        """
        try:
            answer: Answer | None = ray.get(reference, timeout=self._patience)
        except RayTaskError as error:
            raise RuntimeError(_cause(error)) from error
        except (RayError, GetTimeoutError) as error:
            self.complete = False
            raise WorkerLost(f"its worker died ({type(error).__name__})") from error
        if answer is None:
            self.complete = False
            raise WorkerLost("its worker had died and was restarted", before=True)
        self._write(answer.files)
        return answer

    def end(self, worker: int) -> None:
        """End a worker's process, whatever it does; Ray starts another in its place."""
        ray.kill(self._actors[worker], no_restart=False)
        self.complete = False

    def ready(self) -> None:
        """Wait until every worker answers. Those for which there is no room, or no time, are given up.

        Raises FederationError where none is left, or one cannot start.
        """
        end = time.monotonic() + self._patience
        self._gather(end)
        while not self._settle():  # one died meanwhile
            self._gather(end)
        self.complete = True

    def _gather(self, end: float) -> None:
        """Know where every worker is, and have only those that are there."""
        places, before = self._await(end), self._actors
        for worker, actor in enumerate(self._actors):
            if worker not in places:
                ray.kill(actor)
        self._actors = [actor for worker, actor in enumerate(self._actors) if worker in places]
        self._places = [places[worker] for worker in sorted(places)]
        self._seen |= set(self._places)
        if not self._actors:
            raise FederationError(f"engine ray: no worker answered within {self._patience:g} s")
        if lost := len(before) - len(self._actors):
            say(f"ray: {lost} of {len(before)} workers are gone for good; the others take over their clients")

    def _await(self, end: float) -> dict[int, Where]:
        """Worker -> where it is, of those that answer in time."""
        asked: dict[Reference, int] = {actor.where.remote(): worker for worker, actor in enumerate(self._actors)}
        places: dict[int, Where] = {}
        while asked and (left := end - time.monotonic()) > 0:
            answered, _ = ray.wait(list(asked), timeout=min(left, POLL))
            self.check()
            for reference in answered:
                worker = asked.pop(reference)
                try:
                    places[worker] = ray.get(reference)
                except RayActorError as error:
                    if "creation task" in str(error):
                        raise FederationError(f"engine ray: a worker cannot start: {_cause(error)}") from error
                    time.sleep(POLL / 5)  # it is being restarted
                    asked[self._actors[worker].where.remote()] = worker
            if places and len(places) >= self.placement.room(cluster.nodes()):
                break
        return places

    def _settle(self) -> bool:
        """Tell every worker where it works and what it may use. False where one has died."""
        plan, asked = self.placement, list[Reference]()
        self._lives = [secrets.token_hex(8) for _ in self._actors]
        for worker, actor in enumerate(self._actors):
            share = sum(other.node == self._places[worker].node for other in self._places)
            out = str(self._out) if self._has_run_folder(worker) else None
            place_ = (self._lives[worker], out, plan.threads, share, self._budget, plan.gpus)
            asked.append(actor.settle.remote(*place_))
        try:
            ray.get(asked, timeout=self._patience)
        except (RayTaskError, GetTimeoutError) as error:
            raise FederationError(f"engine ray: a worker cannot start: {_cause(error)}") from error
        except RayError:
            log.debug("a worker died while it settled", exc_info=True)
            return False
        return True

    def _has_run_folder(self, worker: int) -> bool:
        """Whether a worker is on this machine; one on another is taken not to share its disk."""
        return self._places[worker].node == self._here

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


def _cause(error: Exception) -> str:
    """The last line of an error, which names what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()

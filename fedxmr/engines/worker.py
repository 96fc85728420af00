"""A worker of the `ray` engine: a Ray actor in which the clients that are pinned to it live."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from fedxmr.engines.carrier import answer, client_of, context, identify, load_app
from fedxmr.engines.transport import Arrays, Bytes, Envelope, array_records, arrays, envelope, message
from fedxmr.machine import memory
from fedxmr.timing import clock

Files = Mapping[str, Bytes]
"""Path in the run folder -> content: what travels between the run folder and a machine that does not have it."""


@dataclass(frozen=True)
class Answer:
    """What comes back from a worker. seconds: what the parts of its work took."""

    envelope: Envelope
    arrays: Mapping[str, Arrays]
    files: Files
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Where:
    """The node a worker is on, and the folder where all workers there keep files of a run folder they do not have."""

    node: str
    scratch: str


class Worker:
    """Answers messages with the ClientApp, one at a time."""

    def __init__(self, app: str, clients: int, config: str, run: str, path: Sequence[str]) -> None:
        """app: "module:attribute". config: as YAML. run: names the run's scratch folders.

        path: sys.path of the driver, so that a learner from outside this package is found here too.
        """
        sys.path += [folder for folder in path if folder not in sys.path]
        self._app = load_app(app)
        self._clients = clients
        self._config = config
        self._scratch = Path(tempfile.gettempdir()) / f"fedxmr-{run}"
        self._life = ""
        self._own: Path | None = None
        self._out = Path()
        self._place: dict[str, Any] = {}

    def where(self) -> Where:
        """Which node this is: perhaps another after a restart."""
        return Where(ray.get_runtime_context().get_node_id(), str(self._scratch))

    def settle(self, life: str, out: str | None, threads: int, share: int, budget: int | None, gpus: float) -> None:
        """Take up work. life: names this process's life until it settles again; one that Ray restarted has none.

        out: the run folder, None where this machine does not have it.
        share: workers on this machine. budget: bytes for living clients of the machine; None: half its memory, or half
        of this worker's part of a GPU.
        """
        self._life = life
        on_gpu = gpus > 0 and torch.cuda.is_available()
        if on_gpu and gpus < 1:
            torch.cuda.set_per_process_memory_fraction(gpus)
        if budget is None:
            total = int(torch.cuda.get_device_properties(0).total_memory * min(gpus, 1)) * share if on_gpu else memory()
            budget = total // 2
        if out is None:
            self._own = self._scratch / str(os.getpid())
            self._out = self._own / "run"
            states = self._own / "states"
            self._out.mkdir(parents=True, exist_ok=True)
        else:
            self._out = Path(out)
            states = self._out / "states"
        self._place = {
            "num-partitions": self._clients,
            "alive": True,
            "life": life,
            "state-dir": str(states),
            "threads": threads,
            "memory-budget": budget // share,
        }

    def deliver(self, life: str, sent: Envelope, files: Files, names: Sequence[str], *buffers: Arrays) -> Answer | None:
        """Let the ClientApp answer a message. names, buffers: its records of arrays.

        None where this is not the life the message is for: that one, and what was in its memory, has ended unnoticed.
        """
        if life != self._life:
            return None
        before = clock.seconds()
        with clock.part("messages"):
            received = message(sent, dict(zip(names, buffers, strict=True)))
            for name, content in files.items():
                path = self._out / name
                path.parent.mkdir(parents=True, exist_ok=True)
                content.tofile(path)
            node = received.metadata.dst_node_id
            identify(node)
            place = {"partition-id": client_of(node), **self._place}
            at = context(node, place, {"config": self._config, "out": str(self._out)})
            reply = answer(self._app, received, at)
            for name in files:
                (self._out / name).unlink()
            back = {name: arrays(record) for name, record in array_records(reply).items()}
            written = self._take_files() if self._own is not None else {}
        spent = {part: seconds - before.get(part, 0.0) for part, seconds in clock.seconds().items()}
        return Answer(envelope(reply), back, written, spent)

    def _take_files(self) -> Files:
        """What is in this machine's run folder, which is empty afterwards."""
        found = {}
        for path in sorted(path for path in self._out.rglob("*") if path.is_file()):
            found[str(path.relative_to(self._out))] = np.fromfile(path, np.uint8)
            path.unlink()
        return found

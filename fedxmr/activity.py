"""What the workers of a simulation are doing, as the engine sees it; the progress bar and TensorBoard show it."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Doing:
    """A client a worker works for, and since when (time.monotonic)."""

    client: int
    what: str
    since: float


@dataclass
class Activity:
    """Of the exchange in progress: clients asked and clients done; and what each worker is at.

    busy: worker -> the seconds it has worked since `take_busy`.
    """

    what: str = ""
    asked: int = 0
    done: int = 0
    working: dict[int, Doing] = field(default_factory=dict)
    _busy: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    def ask(self, what: str, clients: int) -> None:
        """An exchange begins."""
        self.what, self.asked, self.done = what, clients, 0

    def begin(self, worker: int, client: int) -> None:
        """A worker turns to a client."""
        self.working = {**self.working, worker: Doing(client, self.what, time.monotonic())}

    def end(self, worker: int) -> None:
        """It is done with it, or lost."""
        doing = self.working.get(worker)
        if doing is not None:
            self.done += 1
            self._busy[worker] += time.monotonic() - doing.since
            self.working = {w: d for w, d in self.working.items() if w != worker}

    def take_busy(self) -> dict[int, float]:
        """Worker -> the seconds it has worked since this was last asked."""
        busy, self._busy = dict(self._busy), defaultdict(float)
        return busy

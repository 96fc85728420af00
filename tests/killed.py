"""`python -m tests.killed N FOLDER ARGUMENT...`: fedxmr.simulate, killed with all it has started at its N-th event.

An event is a change of a file in FOLDER, the run folder, or a step of training in this process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import psutil

from fedxmr import commands
from fedxmr.learners.training import Losses
from fedxmr.simulate import simulate

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}


class Executioner:
    """Counts events down, and kills this process and those it has started at the last."""

    def __init__(self, events: int, folder: str) -> None:
        self._left = events
        self._folder = folder

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1] not in ("r", "rb")
        if self._left > 0 and (writes or event in CHANGES) and str(arguments[0]).startswith(self._folder):
            self.count()

    def count(self) -> None:
        self._left -= 1
        if self._left == 0:
            for process in psutil.Process().children(recursive=True):
                process.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def in_steps(self, add: Callable[..., None]) -> Callable[..., None]:
        """`Losses.add`, which every learner calls once per step, as an event."""

        def counted(*arguments: Any) -> None:
            add(*arguments)
            self.count()

        return counted


if __name__ == "__main__":
    executioner = Executioner(int(sys.argv[1]), sys.argv[2])
    Losses.add = executioner.in_steps(Losses.add)  # type: ignore[method-assign]
    sys.addaudithook(executioner.hear)
    sys.argv[1:] = sys.argv[3:]
    commands.main(simulate)

"""Timing whole commands in turn, and what is made of the times: ratios within each turn, for machines are noisy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Timer

from fedxmr.errors import FederationError
from fedxmr.processes import ROOT

PATIENCE = 3600.0
"""Seconds a command has."""
GRACE = 15.0
"""Seconds it has to end where it is interrupted."""


@dataclass(frozen=True)
class Command:
    """A program and its arguments. environment: what is set besides; a variable that is None is taken away."""

    arguments: Sequence[object]
    python: Path = Path(sys.executable)
    environment: Mapping[str, str | None] = field(default_factory=dict)

    def run(self) -> Ran:
        """Run it to its end. Raises FederationError where it fails or takes too long."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self.environment}
        line = [str(self.python), *map(str, self.arguments)]
        started = time.perf_counter()
        process = subprocess.Popen(
            line,
            cwd=ROOT,
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timer = _ending(process)
        try:
            assert process.stdout is not None
            with process.stdout as stream:
                said = stream.read()
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            _end(process)
            raise
        finally:
            timer.cancel()
        if process.returncode:
            raise FederationError(f"exit code {process.returncode} of {' '.join(line)}:\n{said[-3000:]}")
        return Ran(seconds, used.ru_maxrss * 1024, said)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command that is of no use any more, and all it has started: first it may remove its own files."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(process: subprocess.Popen[str]) -> Timer:
    timer = Timer(PATIENCE, os.killpg, (process.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer


@dataclass(frozen=True)
class Ran:
    """A command that has ended: its wall-clock seconds, the most memory its first process had, and what it said."""

    seconds: float
    peak_bytes: int
    said: str


def in_turn(commands: Mapping[str, Command], turns: int) -> dict[str, list[Ran]]:
    """Run all commands so many times, in turn; each turn begins with another of them, and one not counted goes before.

    So what the machine does besides falls on all alike, and the first reads no file from disk for the others.
    """
    next(iter(commands.values())).run()
    names, ran = list(commands), {name: list[Ran]() for name in commands}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            ran[name].append(commands[name].run())
    return ran


@dataclass(frozen=True)
class Measured:
    """One number of interest, as often as it was measured. goal: what is asked of it, in words.

    values: ratios of ours to the reference's, turn by turn; or, without a reference, of `unit`.
    """

    what: str
    goal: str
    values: Sequence[float]
    unit: str = "x"
    ours: Sequence[float] = ()
    reference: Sequence[float] = ()

    @classmethod
    def ratio(cls, what: str, goal: str, ours: Sequence[Ran], reference: Sequence[Ran]) -> Measured:
        """Of wall-clock seconds."""
        a, b = [r.seconds for r in ours], [r.seconds for r in reference]
        return cls(what, goal, [x / y for x, y in zip(a, b, strict=True)], "x", a, b)

    @property
    def middle(self) -> float:
        """The median."""
        return median(self.values)

    def cells(self) -> list[str]:
        """A row of a table."""
        spread = f"{_short(min(self.values))} to {_short(max(self.values))}" if len(self.values) > 1 else ""
        seconds = [f"{median(times):.2f} s" if times else "" for times in (self.ours, self.reference)]
        return [self.what, self.goal, f"{_short(self.middle)} {self.unit}", spread, *seconds]


HEAD = ("what", "goal", "median", "lowest to highest", "ours", "reference")


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"

"""The progress bar: round, loss, mAP and time left; on anything but a terminal, a line every tenth of the way."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fedxmr.config import Config


class Progress:
    """An open progress display on standard error."""

    def __init__(self, config: Config) -> None:
        self._rounds = config.federation.rounds
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Bar(*columns, *times, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=self._rounds)
        self._loss: float | None = None
        self._map: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start_at(self, round: int) -> None:
        """A resumed run has this round behind it."""
        self._bar.reset(self._task, total=self._rounds, completed=round)

    def trained(self, round: int, loss: float | None) -> None:
        """A round's updates are in; loss: their mean."""
        self._loss = loss
        self._bar.update(self._task, completed=round, description=self._figures)
        if self._bar.disable and (round == self._rounds or round % max(self._rounds // 10, 1) == 0):
            self._console.print(f"round {round}/{self._rounds}  {self._figures}", soft_wrap=True)

    def scored(self, mean_average_precision: float) -> None:
        """The models of the newest evaluated round have been measured on validation."""
        self._map = mean_average_precision
        self._bar.update(self._task, description=self._figures)

    def say(self, line: str) -> None:
        """One line that stays on the screen."""
        self._console.print(line, soft_wrap=True)

    @property
    def _figures(self) -> str:
        loss = "" if self._loss is None else f"loss {self._loss:.4f}"
        score = "" if self._map is None else f"validation mAP {self._map:.3f}"
        return "  ".join(part for part in (loss, score) if part)

"""The progress bar: round, clients done of it, loss, mAP, time left and what each worker does.

On anything but a terminal, a line every tenth of the way.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from fedxmr.activity import Activity
from fedxmr.config import Config

WORKERS_SHOWN = 8
VERBS = {"train": "trains", "query.start": "starts", "query.finish": "is measured"}
"""What a worker does for a client, by type of message; of any other: its state is moved."""


class Progress:
    """An open progress display on standard error."""

    def __init__(self, config: Config, activity: Activity, console: Console | None = None) -> None:
        """activity: of the engine, which keeps it up to date. console: standard error, unless given."""
        self._rounds = config.federation.rounds
        self._console = console or Console(stderr=True, highlight=False)
        columns = (TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = _Bar(activity, *columns, *times, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=self._rounds)
        self._loss: float | None = None
        self._map: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start_at(self, round: int) -> None:
        """The run goes on from this round."""
        self._bar.round = round
        self._bar.reset(self._task, total=self._rounds, completed=round)

    def trained(self, round: int, loss: float | None) -> None:
        """A round's updates are in; loss: their mean."""
        self._loss = loss
        self._bar.round = round
        self._bar.update(self._task, completed=round, description=self._figures)
        if self._bar.disable and (round == self._rounds or round % max(self._rounds // 10, 1) == 0):
            self._console.print(f"round {round}/{self._rounds}  {self._figures}", soft_wrap=True)

    def scored(self, mean_average_precision: float) -> None:
        """The models of the newest evaluated round have been measured on validation."""
        self._map = mean_average_precision
        self._bar.update(self._task, description=self._figures)

    def say(self, line: str) -> None:
        """One line that stays on the screen."""
        self._console.print(line, soft_wrap=True, markup=False)

    @property
    def renderable(self) -> RenderableType:
        """What is on the screen now."""
        return self._bar.get_renderable()

    @property
    def completed(self) -> float:
        """The rounds done, those of the one in progress by its clients."""
        return self._bar.tasks[0].completed

    @property
    def _figures(self) -> str:
        loss = "" if self._loss is None else f"loss {self._loss:{'.4f' if self._loss < 1e6 else '.4g'}}"
        score = "" if self._map is None else f"validation mAP {self._map:.3f}"
        return "  ".join(part for part in (loss, score) if part)


class _Bar(Bar):
    """The bar, and below it the clients done and a line for each worker; drawn anew several times a second.

    round: the last that is complete; the clients done of the next one count as a part of it.
    """

    def __init__(self, activity: Activity, *columns: ProgressColumn, console: Console, disable: bool) -> None:
        self._activity = activity
        self.round = 0
        super().__init__(*columns, console=console, disable=disable)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Called by rich at each refresh."""
        activity = self._activity
        if activity.what == "train" and activity.done < activity.asked and self.task_ids:
            total = self.tasks[0].total or 0  # the last message is one to train without training
            self.update(self.task_ids[0], completed=min(self.round + activity.done / activity.asked, total))
        yield self.make_tasks_table(self.tasks)
        if activity.working:
            yield Text(f"  clients {activity.done}/{activity.asked}", style="dim")
        for worker, doing in sorted(activity.working.items())[:WORKERS_SHOWN]:
            verb = VERBS.get(doing.what, "moves its state")
            seconds = time.monotonic() - doing.since
            yield Text(f"  worker {worker}: client {doing.client} {verb}, {seconds:.0f} s", style="dim")

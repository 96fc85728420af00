"""What the progress bar shows of the engine's activity, and what is counted of it."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fedxmr.activity import Activity
from fedxmr.progress import WORKERS_SHOWN, Progress
from tests.federations import configured


def shown(activity: Activity, *, round: int = 0, width: int = 200) -> str:
    """What is on the screen in the middle of a round."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm"})
    progress = Progress(configured("federation.rounds=10"), activity, screen)
    if round:
        progress.trained(round, 0.5)
    with screen.capture() as capture:
        screen.print(progress.renderable)
    return capture.get()


def test_it_shows_what_every_worker_is_doing_and_the_clients_done():
    activity = Activity()
    activity.ask("train", 5)
    for worker, client in ((0, 4), (1, 7)):
        activity.begin(worker, client)
    activity.end(0)
    activity.begin(0, 6)
    text = shown(activity, round=3)
    assert "3/10" in text
    assert "loss 0.5000" in text
    assert "clients 1/5" in text
    assert "worker 0: client 6 trains" in text
    assert "worker 1: client 7 trains" in text


@pytest.mark.parametrize(
    ("what", "says"),
    [("query.start", "starts"), ("query.checkpoint", "moves its state"), ("query.finish", "is measured")],
)
def test_it_says_what_kind_of_work_it_is(what, says):
    activity = Activity()
    activity.ask(what, 1)
    activity.begin(0, 2)
    assert f"client 2 {says}" in shown(activity)


def test_many_workers_do_not_fill_the_screen():
    activity = Activity()
    activity.ask("train", 100)
    for worker in range(50):
        activity.begin(worker, worker)
    assert shown(activity).count("worker ") == WORKERS_SHOWN


def test_clients_done_are_a_part_of_the_round_for_the_time_left():
    activity = Activity()
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = Progress(configured("federation.rounds=10"), activity, screen)
    progress.trained(3, 0.5)
    activity.ask("train", 4)
    for client in range(2):
        activity.begin(0, client)
        activity.end(0)
    screen.print(progress.renderable)
    assert progress.completed == 3.5


def test_the_bar_does_not_run_past_its_end_in_the_last_message():
    activity = Activity()
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = Progress(configured("federation.rounds=10"), activity, screen)
    for round in (9, 10):
        progress.trained(round, 0.5)
        screen.print(progress.renderable)
        assert progress.completed == round
        activity.ask("train", 2)
        activity.begin(0, 0)
        activity.end(0)
        screen.print(progress.renderable)
    assert progress.completed == 10


def test_busy_seconds_are_counted_once():
    activity = Activity()
    activity.ask("train", 2)
    started = time.monotonic()
    activity.begin(1, 0)
    activity.end(1)
    assert set(busy := activity.take_busy()) == {1}
    assert 0 <= busy[1] <= time.monotonic() - started
    assert activity.take_busy() == {}
    activity.end(1)  # an end without a beginning: a worker was lost between two clients
    assert activity.done == 1

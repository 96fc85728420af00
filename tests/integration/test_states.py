"""Where clients' states are between messages does not show: alive, in files beyond a budget, or lost and recovered."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clients.residents import residents
from fedxmr import wire
from fedxmr.engines.local import LocalGrid
from fedxmr.errors import StateLost
from tests.federations import SMALL, TOY, federate, same_bytes

BASE = (*SMALL, "federation.rounds=7", "federation.checkpoint_every=3")
CASES = {
    "fedcmr": ("strategy=fedcmr",),
    "fedavg": ("strategy=fedavg", "evaluation.every=3"),
    "sampled": ("federation.clients=6", "federation.sample=2", "evaluation.clients=3"),
    "local": ("strategy=local", "evaluation.every=0"),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def assignments(request) -> tuple[str, ...]:
    return request.param


@pytest.mark.parametrize("budget", ["1B", "5kB"])
def test_clients_beyond_the_memory_budget_move_to_files(tmp_path, monkeypatch, assignments, budget):
    seen = count_states(monkeypatch)
    federate(tmp_path / "alive", *assignments, base=BASE)
    assert not seen["saved"]
    federate(tmp_path / "moved", *assignments, f"runtime.memory_budget={budget}", base=BASE)
    assert seen["saved"]
    assert same_bytes(tmp_path / "alive", tmp_path / "moved")
    assert not (tmp_path / "moved" / "states").exists()


def test_clients_without_a_process_of_their_own_are_files(tmp_path, monkeypatch, assignments):
    """As in Flower's own runtimes: every message may come to another process."""
    federate(tmp_path / "alive", *assignments, base=BASE)
    exchange = LocalGrid.exchange

    def forgetful(self, messages, timeout):
        self._place = {"num-partitions": self._clients}  # all that Flower says
        replies = []
        for message in messages:
            residents.__init__()
            replies += exchange(self, [message], timeout)
        return replies

    monkeypatch.setattr(LocalGrid, "exchange", forgetful)
    federate(tmp_path / "durable", *assignments, base=BASE)
    assert same_bytes(tmp_path / "alive", tmp_path / "durable")


@pytest.mark.parametrize("budget", ["1B", "1GB"])
def test_a_rejected_reply_is_undone_also_where_states_are_files(tmp_path, budget):
    uneven = (*(a for a in TOY if not a.startswith("dataset.items")), "dataset.items=61", "strategy.joint_fraction=1.0")
    misbehaves = "learner.misbehaves={'84': nan once}"
    tolerant = (*uneven, "federation.rounds=6", "federation.tolerate_failures=true")
    for name, kept in (("alive", "1GB"), ("other", budget)):
        once = f"learner.once={tmp_path / name}.once"
        summary = federate(tmp_path / name, misbehaves, once, f"runtime.memory_budget={kept}", base=tolerant)
        assert [(entry["round"], entry["client"]) for entry in summary["rejected"]] == [(2, 0)]
    assert same_bytes(tmp_path / "alive", tmp_path / "other")


def test_lost_states_are_recovered_from_the_last_checkpoint(tmp_path, monkeypatch, assignments):
    whole = federate(tmp_path / "whole", *assignments, base=BASE)
    lose_at(monkeypatch, [(wire.TRAIN, 2), (wire.TRAIN, 5), (wire.RESTORE, 3), (wire.TRAIN, 8), (wire.FINISH, 8)])
    broken = federate(tmp_path / "broken", *assignments, base=BASE)
    assert same_bytes(tmp_path / "whole", tmp_path / "broken")
    recovered = broken.pop("recovered")
    assert [(entry["round"], entry["to"]) for entry in recovered] == [(2, 0), (5, 3), (3, 3), (8, 6), (8, 6)]
    assert "client 0: its worker died" in recovered[0]["reason"]
    assert whole.pop("recovered") == []
    for summary in (whole, broken):
        summary.pop("seconds")
    assert whole == broken


def test_without_checkpoints_a_lost_state_costs_the_whole_run_and_nothing_more(tmp_path, monkeypatch):
    federate(tmp_path / "whole", "federation.checkpoint_every=0", base=BASE)
    lose_at(monkeypatch, [(wire.TRAIN, 6)])
    broken = federate(tmp_path / "broken", "federation.checkpoint_every=0", base=BASE)
    assert same_bytes(tmp_path / "whole", tmp_path / "broken")
    assert [(entry["round"], entry["to"]) for entry in broken["recovered"]] == [(6, 0)]


def test_tensorboard_shows_every_step_once_after_a_recovery(tmp_path, monkeypatch):
    monkeypatch.setattr("fedxmr.events._files", itertools.count(9))  # the second file has a number of two digits
    lose_at(monkeypatch, [(wire.TRAIN, 3), (wire.TRAIN, 6)])
    federate(tmp_path / "run", base=BASE)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for tag in ("loss/client 0", "validation/mean/average", "busy/worker 0"):
        assert [e.step for e in events.Scalars(tag)] == list(range(1, 8)), tag


def test_a_client_that_is_lost_with_its_worker_again_and_again_is_left_out_where_that_is_tolerated(
    tmp_path, monkeypatch
):
    lose_at(monkeypatch, [(wire.TRAIN, 4)] * 3)
    summary = federate(tmp_path / "run", "federation.tolerate_failures=true", base=BASE)
    assert [(entry["round"], entry["client"]) for entry in summary["failed"]] == [(4, 0)]
    assert "its worker died 3 times" in summary["failed"][0]["reason"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["client"] for line in lines if line["round"] == 4 and "loss" in line] == [1, 2]
    assert [line["client"] for line in lines if line["round"] == 5 and "loss" in line] == [0, 1, 2]


def lose_at(monkeypatch: pytest.MonkeyPatch, at: list[tuple[str, int]]) -> None:
    """Lose all that clients hold, once for each kind and round of message in `at`, in this order."""
    exchange, left = LocalGrid.exchange, list(at)

    def losing(self, messages, timeout):
        replies = exchange(self, messages, timeout)
        kind, round = messages[0].metadata.message_type, int(messages[0].metadata.group_id)
        if left and left[0] == (kind, round):
            left.pop(0)
            residents.__init__()
            raise StateLost(kind, round, died={0: "its worker died"})
        return replies

    monkeypatch.setattr(LocalGrid, "exchange", losing)


def count_states(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Path]]:
    from fedxmr.snapshot import Store

    save, seen = Store.save, {"saved": []}

    def noted(self, snapshot):
        seen["saved"].append(self._folder)
        save(self, snapshot)

    monkeypatch.setattr(Store, "save", noted)
    return seen

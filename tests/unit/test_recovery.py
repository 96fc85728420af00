"""Whose fault the loss of a worker is, and what follows."""

from __future__ import annotations

import pytest

from fedxmr import wire
from fedxmr.config import FederationConfig
from fedxmr.errors import FederationError, StateLost
from server.recovery import STANDSTILL, TRIES, Recovery


def recovery(*, tolerate: bool) -> Recovery:
    return Recovery(FederationConfig(tolerate_failures=tolerate))


def died(round: int, client: int, kind: str = wire.TRAIN) -> StateLost:
    return StateLost(kind, round, died={client: "its worker died"})


def test_a_death_is_nobodys_failure_until_it_has_happened_several_times_in_one_round():
    found = recovery(tolerate=False)
    for _ in range(TRIES - 1):
        found.learn(died(7, 1))
    with pytest.raises(FederationError, match=f"client 1 failed in round 7: its worker died {TRIES} times"):
        found.learn(died(7, 1))


def test_a_round_that_has_stood_since_forgives_its_deaths():
    found = recovery(tolerate=False)
    for round in (7, 7, 8, 7, 7):  # round 8 was reached: client 1 got through round 7 in between
        found.learn(died(round, 1))


def test_deaths_in_earlier_rounds_after_going_back_do_not_forgive():
    found = recovery(tolerate=False)
    found.learn(died(7, 1))
    found.learn(died(6, 2))  # on the way back to round 7
    found.learn(died(7, 1))
    with pytest.raises(FederationError, match="client 1"):
        found.learn(died(7, 1))


def test_clients_are_counted_apart():
    found = recovery(tolerate=False)
    for client in range(STANDSTILL - 1):
        found.learn(died(7, client))


def test_a_death_found_late_or_in_a_query_is_charged_to_nobody():
    found = recovery(tolerate=False)
    for _ in range(TRIES):
        found.learn(StateLost(wire.TRAIN, 7, found={1: "its worker had died"}))
        found.learn(died(7, 1, kind=wire.RESTORE))
    with pytest.raises(FederationError, match="client 1 failed in round 7"):
        for _ in range(TRIES):
            found.learn(died(7, 1))


def test_a_run_that_no_longer_gets_ahead_ends():
    found = recovery(tolerate=True)
    for round in range(1, 2 * STANDSTILL):  # each a round further
        found.learn(died(round, 1))
    with pytest.raises(FederationError, match=f"lost {STANDSTILL} times in a row, .*: client 1: its worker had died"):
        for _ in range(STANDSTILL - 1):
            found.learn(StateLost(wire.START, 0, found={1: "its worker had died"}))


def test_a_tolerated_client_is_left_out_of_that_round_alone():
    found = recovery(tolerate=True)
    for _ in range(TRIES):
        found.learn(died(7, 1))
    assert "its worker died" in (found.given_up(wire.TRAIN, 7, 1) or "")
    assert found.given_up(wire.TRAIN, 8, 1) is None
    assert found.given_up(wire.TRAIN, 7, 2) is None


def test_a_client_that_hung_has_failed_at_once():
    hung = StateLost(wire.TRAIN, 3, hung={2: "no answer within 5 s"})
    with pytest.raises(FederationError, match="client 2 failed in round 3: no answer within 5 s"):
        recovery(tolerate=False).learn(hung)
    found = recovery(tolerate=True)
    found.learn(hung)
    assert found.given_up(wire.TRAIN, 3, 2) == "no answer within 5 s"


@pytest.mark.parametrize("kind", [wire.START, wire.CHECKPOINT, wire.RESTORE])
def test_no_run_goes_on_without_an_answer_that_all_must_give(kind):
    with pytest.raises(FederationError, match=f"client 2 failed in round 3 .{kind}.: no answer"):
        recovery(tolerate=True).learn(StateLost(kind, 3, hung={2: "no answer"}))

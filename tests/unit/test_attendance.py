"""What a report says of who took part in which round."""

from __future__ import annotations

from typing import Any

from fedxmr.attendance import SPANS, attendance, missed


def ended(clients: int, rounds: int, away: dict[int, list[int]], asked: dict[int, list[int]]) -> dict[str, Any]:
    """A summary; asked: of the rounds in which not everybody else was."""
    everyone = {round: [k for k in range(clients) if k not in away.get(round, [])] for round in range(1, rounds + 1)}
    return {
        "clients": clients,
        "rounds": rounds,
        "participation": {str(round): who for round, who in (everyone | asked).items()},
        "dropped": {str(round): who for round, who in away.items()},
        "abstained": {},
        "failed": [],
        "rejected": [],
    }


def test_a_round_is_missed_for_one_reason_and_every_reason_is_told_apart():
    summary = ended(4, 6, away={2: [1]}, asked={3: [0, 2, 3]})
    summary["failed"] = [{"round": 4, "client": 1}, {"round": 3, "client": 1}, {"round": 7, "client": 0}]
    summary["rejected"] = [{"round": 5, "client": 1}]
    summary["abstained"] = {"6": [1]}
    expected = {"not sampled": [3], "dropped out": [2], "failed": [4], "rejected": [5], "abstained": [6]}
    assert missed(summary)[1] == expected
    assert not any(missed(summary)[0].values())
    assert attendance(summary) == [
        "who took part, in how many of 6 rounds:",
        "  client 0: 6",
        "  client 1: 1; not sampled in 3; dropped out in 2; failed in 4; rejected in 5; abstained in 6",
        "  client 2: 6",
        "  client 3: 6",
    ]


def test_rounds_in_a_row_are_a_span_and_very_many_are_cut_short():
    summary = ended(2, 60, away={round: [0] for round in (1, 2, 3, 5, 59, 60)}, asked={})
    assert attendance(summary)[1] == "  client 0: 54; dropped out in 1-3, 5, 59-60"
    summary = ended(2, 60, away={round: [0] for round in range(1, 60, 2)}, asked={})
    shown = attendance(summary)[1]
    assert shown == f"  client 0: 30; dropped out in 1, 3, 5, 7, 9, 11, 13, 15, 17, 19 and {30 - SPANS} spans more"


def test_where_nobody_missed_anything_a_line_says_so():
    summary = ended(50, 3, away={}, asked={})
    assert attendance(summary) == ["who took part: every client in every round"]


def test_many_clients_are_told_of_in_two_lines():
    summary = ended(1000, 3, away={2: [7, 9]}, asked={1: [5, 6, 7], 2: [5], 3: [1, 2, 5]})
    summary["failed"] = [{"round": 3, "client": 1}]
    assert attendance(summary) == [
        "who took part: 1 to 3 of 1000 clients in a round; 4 of them at least once, none in more than 3 of 3 rounds",
        "  missed by sampled clients: dropped out 2 times, failed 1 times; who and when: summary.json",
    ]

"""Who took part in which round of a run that has ended, and why others did not, in a few lines.

A client took part in a round if its update counted in the round's sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

NOT_SAMPLED = "not sampled"
MISSED = (NOT_SAMPLED, "dropped out", "failed", "rejected", "abstained")
"""Why a client did not take part in a round. One that was only evaluated, and failed at that, was not sampled."""

BY_CLIENT = 20
"""With more clients there is no line for each."""

SPANS = 10
"""So many spans of rounds are listed at most."""

Missed = Mapping[int, Mapping[str, Sequence[int]]]
"""Client -> why -> the rounds that it missed for this reason, ascending; every client and every reason."""


def attendance(summary: Mapping[str, Any]) -> list[str]:
    """What a report says of it. summary: the content of the run's summary.json."""
    rounds, found = summary["rounds"], missed(summary)
    if not any(of_client[why] for of_client in found.values() for why in MISSED):
        return ["who took part: every client in every round"]
    if len(found) <= BY_CLIENT:
        return [f"who took part, in how many of {rounds} rounds:", *(_line(k, found[k], rounds) for k in found)]
    return _overview(found, rounds)


def missed(summary: Mapping[str, Any]) -> Missed:
    """Which rounds every client missed, and why."""
    failed, rejected = ({(at["round"], at["client"]) for at in summary[kind]} for kind in ("failed", "rejected"))
    found: dict[int, dict[str, list[int]]] = {k: {why: [] for why in MISSED} for k in range(summary["clients"])}
    for round in range(1, summary["rounds"] + 1):
        asked, away, abstained = (
            set(summary[what].get(str(round), ())) for what in ("participation", "dropped", "abstained")
        )
        for client, rounds_missed in found.items():
            for why, holds in (
                ("dropped out", client in away),
                (NOT_SAMPLED, client not in asked),
                ("failed", (round, client) in failed),
                ("rejected", (round, client) in rejected),
                ("abstained", client in abstained),
            ):
                if holds:
                    rounds_missed[why].append(round)
                    break
    return found


def _line(client: int, of_client: Mapping[str, Sequence[int]], rounds: int) -> str:
    reasons = (f"; {why} in {_spans(of_client[why])}" for why in MISSED if of_client[why])
    return f"  client {client}: {rounds - sum(map(len, of_client.values()))}{''.join(reasons)}"


def _overview(found: Missed, rounds: int) -> list[str]:
    """Of many clients: how many took part in a round, how often one did, and how often a sampled one did not."""
    absent = Counter(round for of_client in found.values() for missed in of_client.values() for round in missed)
    there = [len(found) - absent[round] for round in range(1, rounds + 1)]
    often = [rounds - sum(map(len, of_client.values())) for of_client in found.values()]
    times = {why: sum(len(of_client[why]) for of_client in found.values()) for why in MISSED if why != NOT_SAMPLED}
    reasons = ", ".join(f"{why} {count} times" for why, count in times.items() if count)
    fewest = f"{min(there)} to " if min(there) < max(there) else ""
    return [
        f"who took part: {fewest}{max(there)} of {len(found)} clients in a round; {sum(map(bool, often))} of them at "
        f"least once, none in more than {max(often)} of {rounds} rounds",
        f"  missed by sampled clients: {reasons or 'nothing'}; who and when: summary.json",
    ]


def _spans(rounds: Sequence[int]) -> str:
    """Ascending rounds as '1-3, 7'."""
    starts = [rounds[0], *(b for a, b in pairwise(rounds) if b > a + 1)]
    ends = [*(a for a, b in pairwise(rounds) if b > a + 1), rounds[-1]]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    more = f" and {len(spans) - SPANS} spans more" if len(spans) > SPANS else ""
    return ", ".join(spans[:SPANS]) + more

"""When clients' states are lost with a worker: whose fault it was, and where the run goes on from.

Recovery is resume: the run goes back to its last checkpoint, or to its start, and ends with the bytes of an undisturbed
one. A worker's death is nobody's fault until it has happened several times while training one client in one round.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fedxmr import wire
from fedxmr.config import FederationConfig
from fedxmr.errors import FederationError, StateLost
from server.standing import Standing

TRIES = 3
"""So many deaths under one client in one round, with no later round reached between them, are the client's failure.

DESIGN speaks of two; but where workers are killed at random times, two soon fall on one client by chance.
"""

STANDSTILL = 10
"""So many losses, with no later round reached between them, end the run, whoever they fell on."""

CHARGED = (wire.TRAIN, wire.FINISH)
"""Messages that a client works for, so that its worker's death in them is charged to it, and that may do without it."""


class Recovery:
    """What a run remembers when it goes back: deaths so far, and what clients are not asked again."""

    def __init__(self, config: FederationConfig) -> None:
        self._tolerate = config.tolerate_failures
        self._furthest = 0
        self._losses = 0
        self._deaths: Counter[tuple[str, int, int]] = Counter()
        self._given_up: dict[tuple[str, int, int], str] = {}

    def given_up(self, kind: str, round: int, client: int) -> str | None:
        """Why a client is not asked again for a message it hung or died in; None where it is asked."""
        return self._given_up.get((kind, round, client))

    def learn(self, lost: StateLost) -> None:
        """Take note of a loss.

        Raises FederationError where it is a client's failure and failures end the run, or where the run stands still.
        """
        for at in [at for at in self._deaths if at[1] < lost.round]:
            del self._deaths[at]  # that round has stood since
        if lost.kind in CHARGED:
            for client, reason in lost.died.items():
                at = (lost.kind, lost.round, client)
                self._deaths[at] += 1
                if self._deaths[at] == TRIES:
                    self._give_up(lost, client, f"its worker died {TRIES} times: {reason}")
        for client, reason in lost.hung.items():
            self._give_up(lost, client, reason)
        self._losses = self._losses + 1 if lost.round <= self._furthest else 1
        self._furthest = max(self._furthest, lost.round)
        if self._losses == STANDSTILL:
            raise FederationError(f"states were lost {STANDSTILL} times in a row, with no round standing anew: {lost}")

    def _give_up(self, lost: StateLost, client: int, reason: str) -> None:
        if not self._tolerate or lost.kind not in CHARGED:
            what = "" if lost.kind == wire.TRAIN else f" ({lost.kind})"
            raise FederationError(f"client {client} failed in round {lost.round}{what}: {reason}")
        self._given_up[lost.kind, lost.round, client] = reason


def go_back(out: Path, experiment: str, lost: StateLost, standing: Standing) -> Standing:
    """The standing to go on from: the last checkpoint's, or a new one where there is none yet."""
    earlier = Standing.newest(out, experiment)
    earlier.recovered = [*standing.recovered, {"round": lost.round, "to": earlier.round, "reason": str(lost)}]
    return earlier

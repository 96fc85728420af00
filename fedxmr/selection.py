"""Which round is reported: chosen on validation, the mean over the evaluated clients, ties to the earlier round.

A round that fewer clients were evaluated in than in another never leads: their means are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedxmr.evaluation import mean_scores
from fedxmr.messages import Scores


@dataclass(frozen=True)
class Scored:
    """The scores of one round's models, by client; test only under the `paper` protocol."""

    round: int
    validation: Mapping[int, Scores]
    test: Mapping[int, Scores]


class Selection:
    """The round that leads on validation so far, the last one, and the best on test where that is looked at."""

    def __init__(self) -> None:
        self.selected: Scored | None = None
        self.last: Scored | None = None
        self.best_on_test: Scored | None = None

    @property
    def round(self) -> int:
        """The leading round, 0 for none."""
        return self.selected.round if self.selected else 0

    def offer(self, round: int, validation: Mapping[int, Scores], test: Mapping[int, Scores]) -> bool:
        """Take note of a round; whether it now leads."""
        self.last = Scored(round, validation, test)
        leads = self.selected is None or _rank(validation) > _rank(self.selected.validation)
        if leads:
            self.selected = self.last
        if test and (self.best_on_test is None or _rank(test) > _rank(self.best_on_test.test)):
            self.best_on_test = self.last
        return leads

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: asdict(scored) for name, scored in vars(self).items() if scored is not None}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Selection:
        """What `to_json` gave."""
        selection = cls()
        for name, scored in facts.items():
            by_client = ({int(k): v for k, v in scored[part].items()} for part in ("validation", "test"))
            setattr(selection, name, Scored(scored["round"], *by_client))
        return selection


def _rank(scores: Mapping[int, Scores]) -> tuple[int, float]:
    return len(scores), mean_scores(list(scores.values()))["average"]

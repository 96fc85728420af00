"""What the server knows between two rounds; a checkpoint holds exactly this."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedxmr import checkpoint
from fedxmr.selection import Selection
from fedxmr.state import prefixed, under
from fedxmr.types import State

Incident = dict[str, Any]
"""A failure or a rejection: round, client, reason."""


@dataclass
class Standing:
    """How far a federation has come.

    round: the last that stood. shared: W_t. base: client -> the round of its last accepted reply.
    selected_shared: W of the round that leads on validation. records: where the recorder stood, at a checkpoint.
    registered: client -> the fingerprint of what it said of its data.
    recovered: the losses of states that the run went back from: in which round, to which, and why.
    """

    round: int = 0
    shared: State = field(default_factory=dict)
    selected_shared: State = field(default_factory=dict)
    base: dict[int, int] = field(default_factory=dict)
    registered: dict[int, str] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    bytes: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    participation: dict[str, list[int]] = field(default_factory=dict)
    abstained: dict[str, list[int]] = field(default_factory=dict)
    rejected: list[Incident] = field(default_factory=list)
    failed: list[Incident] = field(default_factory=list)
    recovered: list[Incident] = field(default_factory=list)
    records: dict[str, Any] | None = None

    def tensors(self) -> State:
        """The arrays of a checkpoint."""
        return prefixed("shared", self.shared) | prefixed("selected", self.selected_shared)

    def facts(self, records: dict[str, Any]) -> dict[str, Any]:
        """All else of a checkpoint, as JSON."""
        return {
            "round": self.round,
            "base": self.base,
            "registered": self.registered,
            "selection": self.selection.to_json(),
            "bytes": self.bytes,
            "participation": self.participation,
            "abstained": self.abstained,
            "rejected": self.rejected,
            "failed": self.failed,
            "recovered": self.recovered,
            "records": records,
        }

    @classmethod
    def newest(cls, out: Path, experiment: str) -> Standing:
        """That of the newest checkpoint in a run folder, or a new one where there is none yet.

        Raises InputError where the checkpoint is damaged or of another experiment.
        """
        if not checkpoint.rounds(out):
            return cls()
        tensors, facts = checkpoint.newest(out, experiment)
        for name in ("base", "registered"):  # JSON has made strings of the ids
            facts[name] = {int(client): value for client, value in facts[name].items()}
        facts["selection"] = Selection.from_json(facts["selection"])
        return cls(shared=under("shared", tensors), selected_shared=under("selected", tensors), **facts)

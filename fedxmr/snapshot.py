"""What a client carries from message to message, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedxmr.errors import InputError
from fedxmr.scaling import Scaler
from fedxmr.state import load, prefixed, save, under
from fedxmr.types import State


@dataclass(frozen=True)
class Snapshot:
    """What a client carries from message to message: a durable state is exactly this.

    round: of the reply it belongs to. before: W_0^k of the names the client owns; None when nothing waits to be merged.
    kept: round -> weights without moments, of the leading and the newest evaluated round.
    """

    round: int
    learner: State
    before: State | None
    scaler: Scaler
    kept: Mapping[int, State]

    def save(self, path: Path, client: int) -> None:
        """Write it as one file."""
        tensors = {**prefixed("learner", self.learner), **prefixed("scaler", self.scaler.to_state())}
        tensors |= prefixed("before", self.before or {})
        for round, weights in self.kept.items():
            tensors |= prefixed(f"kept/{round}", weights)
        waits = self.before is not None
        save(path, tensors, {"client": client, "round": self.round, "waits": waits, "kept": list(self.kept)})

    @classmethod
    def load(cls, path: Path, client: int) -> Snapshot:
        """What `save` wrote. Raises InputError for a damaged file or that of another client."""
        tensors, about = load(path)
        if about.get("client") != client:
            raise InputError(f"{path}: expected the state of client {client}, got that of {about.get('client')}")
        return cls(
            round=about["round"],
            learner=under("learner", tensors),
            before=under("before", tensors) if about["waits"] else None,
            scaler=Scaler.from_state(under("scaler", tensors)),
            kept={round: under(f"kept/{round}", tensors) for round in about["kept"]},
        )

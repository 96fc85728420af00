"""What a client carries from message to message, in memory and on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedxmr.errors import InputError
from fedxmr.scaling import Scaler
from fedxmr.state import load, prefixed, save, size, under
from fedxmr.types import State


@dataclass(frozen=True)
class Owner:
    """Whose a durable state is: a client, in one experiment."""

    client: int
    experiment: str


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

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        return size(self.learner) + size(self.before or {}) + sum(size(weights) for weights in self.kept.values())

    def save(self, path: Path, owner: Owner) -> None:
        """Write it as one file."""
        tensors = {**prefixed("learner", self.learner), **prefixed("scaler", self.scaler.to_state())}
        tensors |= prefixed("before", self.before or {})
        for round, weights in self.kept.items():
            tensors |= prefixed(f"kept/{round}", weights)
        waits = self.before is not None
        save(path, tensors, {**vars(owner), "round": self.round, "waits": waits, "kept": list(self.kept)})

    @classmethod
    def load(cls, path: Path, owner: Owner) -> Snapshot:
        """What `save` wrote. Raises InputError for a damaged file or that of another client or experiment."""
        tensors, about = load(path)
        for what, expected in vars(owner).items():
            if about.get(what) != expected:
                raise InputError(f"{path}: expected the state of {what} {expected}, got that of {about.get(what)}")
        return cls(
            round=about["round"],
            learner=under("learner", tensors),
            before=under("before", tensors) if about["waits"] else None,
            scaler=Scaler.from_state(under("scaler", tensors)),
            kept={round: under(f"kept/{round}", tensors) for round in about["kept"]},
        )


KEPT = 2


class Store:
    """One client's durable states: a file for each round that it replied in, the newest two kept.

    The newest may belong to a reply the server did not accept; then the client goes on from the one before it, and
    whatever is newer than the state it goes on from is discarded.
    """

    def __init__(self, folder: Path, owner: Owner) -> None:
        self._folder = folder / f"client-{owner.client}"
        self._owner = owner

    def save(self, snapshot: Snapshot) -> None:
        """Add a state, the newest from now on."""
        self._discard_after(snapshot.round)
        snapshot.save(self._file(snapshot.round), self._owner)
        for round in self._rounds()[:-KEPT]:
            self._file(round).unlink(missing_ok=True)

    def load(self, round: int) -> Snapshot | None:
        """The state of a round, to go on from; None where there is none. Raises InputError for a damaged file."""
        self._discard_after(round)
        return Snapshot.load(self._file(round), self._owner) if round in self._rounds() else None

    def _discard_after(self, round: int) -> None:
        for newer in self._rounds():
            if newer > round:
                self._file(newer).unlink(missing_ok=True)

    def _file(self, round: int) -> Path:
        return self._folder / f"round-{round}.safetensors"

    def _rounds(self) -> list[int]:
        names = (re.fullmatch(r"round-(\d+)\.safetensors", path.name) for path in self._folder.glob("round-*"))
        return sorted(int(name[1]) for name in names if name)

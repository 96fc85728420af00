"""Checkpoints: the server's state and, in a simulation, every client's, together or not at all.

    checkpoint/round-10/server.safetensors      shared arrays, and all the server knows besides
    checkpoint/round-10/client-0.safetensors    one for every client that has taken part

A checkpoint is written beside its place and renamed; the newest two are kept. A state that has not changed since the
one before is linked, not written again. Every file says which experiment it belongs to, and the server's has the
checksums of all others. In a deployment the clients keep their own states, the newest two, so there is a checkpoint
after every round.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedxmr import state
from fedxmr.errors import InputError
from fedxmr.types import State

KEPT = 2


def folder(round: int) -> str:
    """A checkpoint's place in the run folder."""
    return f"checkpoint/round-{round}"


def client_file(client: int) -> str:
    """A client's state in a checkpoint's folder."""
    return f"client-{client}.safetensors"


def begin(out: Path, round: int) -> str:
    """An empty folder in the run folder, for the clients' states; returns its name."""
    name = f"checkpoint/.round-{round}"
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).mkdir(parents=True)
    return name


def complete(
    out: Path,
    experiment: str,
    server: State,
    standing: dict[str, Any],
    *,
    until: int,
    unchanged: Iterable[int],
    before: int,
) -> None:
    """Add the server's state and the unchanged clients' of checkpoint `before`, put all in place, drop old ones.

    standing: what `newest` gives back, its round included. until: the last round that the run is to have.
    """
    round = standing["round"]
    begun = out / f"checkpoint/.round-{round}"
    for client in unchanged:
        _link(out / folder(before) / client_file(client), begun / client_file(client))
    files = {path.name: state.fingerprint(path) for path in sorted(begun.glob("client-*"))}
    about = {"experiment": experiment, "rounds": until, "standing": standing, "files": files}
    state.save(begun / "server.safetensors", server, about)
    shutil.rmtree(out / folder(round), ignore_errors=True)
    begun.rename(out / folder(round))
    state.sync(out / "checkpoint")
    for old in rounds(out)[:-KEPT]:
        shutil.rmtree(out / folder(old))


def _link(file: Path, other: Path) -> None:
    """Make `other` the same file, or a copy where the file system has no links."""
    try:
        other.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, other)


def rounds(out: Path) -> list[int]:
    """The rounds of the checkpoints in a run folder, ascending."""
    names = (re.fullmatch(r"round-(\d+)", path.name) for path in (out / "checkpoint").glob("round-*"))
    return sorted(int(name[1]) for name in names if name)


def newest(out: Path, experiment: str) -> tuple[State, dict[str, Any]]:
    """The server's state and standing of the newest checkpoint, of which there is one.

    Raises InputError where it is damaged or of another experiment.
    """
    tensors, about = _server(out, rounds(out)[-1], experiment)
    return tensors, about["standing"]


def verify(out: Path, experiment: str) -> dict[str, Any]:
    """See that the newest checkpoint, of which there is one, is whole and of this experiment.

    Returns what its server's file says besides arrays: experiment, rounds, standing, files.
    Raises InputError where it is not, which offers the one before where that is.
    """
    found = rounds(out)
    try:
        return _verified(out, found[-1], experiment)
    except InputError as error:
        good = next((round for round in reversed(found[:-1]) if _is_good(out, round, experiment)), None)
        if good is None:
            raise
        raise InputError(f"{error}; to go on from round {good}, remove {out / folder(found[-1])}") from error


def _is_good(out: Path, round: int, experiment: str) -> bool:
    try:
        _verified(out, round, experiment)
    except InputError:
        return False
    return True


def _verified(out: Path, round: int, experiment: str) -> dict[str, Any]:
    """See to one checkpoint; what its server's file says. Raises InputError."""
    _, about = _server(out, round, experiment)
    for name, fingerprint in about["files"].items():
        path = out / folder(round) / name
        if state.verify(path) != fingerprint:
            raise InputError(f"{path}: expected the file that belongs to this checkpoint, got another")
    return about


def _server(out: Path, round: int, experiment: str) -> tuple[State, dict[str, Any]]:
    path = out / folder(round) / "server.safetensors"
    tensors, about = state.load(path)
    of, at = about.get("experiment"), about.get("standing", {}).get("round")
    if (of, at) != (experiment, round):
        expected = f"round {round} of experiment {experiment}, which config.yaml describes"
        raise InputError(f"{path}: expected {expected}, got round {at} of {of}")
    return tensors, about

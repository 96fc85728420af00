"""A simulation's checkpoints: the server's state and every client's, together or not at all.

    checkpoint/round-10/server.safetensors      shared arrays, and all the server knows besides
    checkpoint/round-10/client-0.safetensors    one for every client that has taken part

A checkpoint is written beside its place and renamed; the newest two are kept. A state that has not changed since the
one before is linked, not written again.
"""

from __future__ import annotations

import os
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
    out: Path, round: int, server: State, facts: dict[str, Any], unchanged: Iterable[int], before: int
) -> None:
    """Add the server's state and the unchanged clients' of checkpoint `before`, put all in place, drop old ones."""
    begun = out / f"checkpoint/.round-{round}"
    for client in unchanged:
        os.link(out / folder(before) / client_file(client), begun / client_file(client))
    state.save(begun / "server.safetensors", server, facts)
    shutil.rmtree(out / folder(round), ignore_errors=True)
    begun.rename(out / folder(round))
    for old in rounds(out)[:-KEPT]:
        shutil.rmtree(out / folder(old))


def rounds(out: Path) -> list[int]:
    """The rounds of the checkpoints in a run folder, ascending."""
    names = (re.fullmatch(r"round-(\d+)", path.name) for path in (out / "checkpoint").glob("round-*"))
    return sorted(int(name[1]) for name in names if name)


def newest(out: Path) -> tuple[State, dict[str, Any]]:
    """The server's state and facts of the newest checkpoint. Raises InputError where there is none or it is damaged."""
    if not (found := rounds(out)):
        raise InputError(f"{out}: has no checkpoint to resume from")
    return _load(out, found[-1], "server.safetensors")


def client_state(out: Path, round: int, client: int) -> tuple[State, dict[str, Any]]:
    """A client's state and facts in a checkpoint. Raises InputError where it is missing or damaged."""
    return _load(out, round, client_file(client))


def _load(out: Path, round: int, name: str) -> tuple[State, dict[str, Any]]:
    try:
        return state.load(out / folder(round) / name)
    except InputError as error:
        older = [r for r in rounds(out) if r < round]
        hint = f"; to go on from round {older[-1]}, remove {out / folder(round)}" if older else ""
        raise InputError(f"{error}{hint}") from error

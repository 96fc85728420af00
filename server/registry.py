"""Which clients the SuperLink lets in: a folder of public keys says so, and the SuperLink is made to agree.

A key's file name is the client's name. A key whose file is taken away is unregistered, at once and for good: Flower
never takes a key again that it has once unregistered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedxmr.errors import InputError
from fedxmr.flower import Flower, FlowerError
from fedxmr.folders import replace
from fedxmr.keys import read_public

IN_USE = "[code: 23]"
"""Flower's words for a key that it knows already, be it unregistered since."""


@dataclass
class Entry:
    """What we know of a key: its client's name, the node that Flower made of it, and whether it is out for good."""

    name: str
    node: str
    out: bool = False


def read_keys(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The public keys in a folder, key -> client's name, and what is wrong with other files in it."""
    keys: dict[str, str] = {}
    wrong = []
    for file in sorted(folder.glob("*.pub")):
        try:
            key = read_public(file)
        except InputError as error:
            wrong.append(str(error))
            continue
        if key in keys:
            wrong.append(f"{file}: expected a key of its own, got that of {keys[key]}.pub")
        keys.setdefault(key, file.stem)
    return keys, wrong


class Registry:
    """The keys that a SuperLink knows, on file beside its database."""

    def __init__(self, file: Path, flower: Flower) -> None:
        """Raises InputError where the file is damaged."""
        self._file = file
        self._flower = flower
        self._known = _read(file) if file.exists() else {}

    def statuses(self) -> dict[str, str]:
        """Client's name -> online, offline, registered (never seen) or unregistered. Raises FlowerError."""
        nodes = self._nodes()
        return {entry.name: nodes.get(entry.node, "unknown") for entry in self._known.values()}

    def agree(self, folder: Path) -> list[str]:
        """Make the SuperLink know the keys in a folder and no others; returns a line for all that was done, or not.

        While a file is no key, or the folder is empty, nobody is unregistered, which could not be undone.
        Raises FlowerError.
        """
        keys, said = read_keys(folder)
        if self._known:
            self._learn(self._nodes())
        gone = [key for key, entry in self._known.items() if not entry.out and key not in keys]
        if gone and (said or not keys):
            said.append(f"{folder}: as it is now nobody is unregistered")
        elif gone:
            said += [self._take_out(key) for key in gone]
        return said + [line for key, name in keys.items() if (line := self._let_in(key, name, folder))]

    def _nodes(self) -> dict[str, str]:
        answer = self._flower.ask("supernode", "list")
        return {str(node["node-id"]): str(node["status"]) for node in answer["nodes"]}

    def _learn(self, nodes: Mapping[str, str]) -> None:
        """Forget keys that the database does not have, and note those that somebody else has unregistered."""
        self._known = {key: entry for key, entry in self._known.items() if entry.node in nodes}
        for entry in self._known.values():
            entry.out = entry.out or nodes[entry.node] == "unregistered"
        self._save()

    def _take_out(self, key: str) -> str:
        entry = self._known[key]
        self._flower.ask("supernode", "unregister", entry.node)
        entry.out = True
        self._save()
        return f"{entry.name}: unregistered, for its key is gone"

    def _let_in(self, key: str, name: str, folder: Path) -> str | None:
        if (entry := self._known.get(key)) is not None:
            entry.name = name
            self._save()
            return f"{name}: its key was unregistered and is not taken again: it needs a new one" if entry.out else None
        try:
            node = str(self._flower.ask("supernode", "register", str(folder / f"{name}.pub"))["node-id"])
        except FlowerError as error:
            if IN_USE not in str(error) or len(strangers := self._strangers()) != 1:
                return f"{name}: not registered: {error}"
            node = strangers[0]  # we were ended between Flower's note of it and ours
        self._known[key] = Entry(name, node)
        self._save()
        return f"{name}: registered"

    def _strangers(self) -> list[str]:
        """Nodes that the SuperLink lets in and we know nothing of."""
        known = {entry.node for entry in self._known.values()}
        return [node for node, status in self._nodes().items() if node not in known and status != "unregistered"]

    def _save(self) -> None:
        text = json.dumps({key: asdict(entry) for key, entry in self._known.items()}, indent=1)
        replace(self._file, text.encode())


def _read(file: Path) -> dict[str, Entry]:
    try:
        return {key: Entry(**entry) for key, entry in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error

"""Flower's command line, `flwr`, talking to one SuperLink."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedxmr.addresses import Address
from fedxmr.errors import FederationError, InputError, in_one_line
from fedxmr.folders import replace
from fedxmr.processes import environment

PATIENCE = 60.0
"""Seconds a command of Flower's may take."""

CONNECTION = "here"


class FlowerError(FederationError):
    """Flower refused, or could not reach the SuperLink; its own words."""


class Flower:
    """The commands of `flwr`, with settings and files in a folder of our own."""

    def __init__(self, home: Path, program: str = "flwr") -> None:
        """home: the folder, which `connect` or an earlier one has filled."""
        self._home = home
        self._program = program
        self._environment = environment(home)

    def connect(self, server: Address, authority: Path | None) -> None:
        """Say which SuperLink is meant from now on.

        authority: the certificate of who signed the SuperLink's; None: without TLS. Raises InputError.
        """
        text = json.dumps(str(authority and authority.absolute()), ensure_ascii=False)
        trust = "insecure = true" if authority is None else f"root-certificates = {text}"
        settings = f'[superlink.{CONNECTION}]\naddress = "{server}"\n{trust}\n'
        try:
            self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace(self._home / "config.toml", settings.encode())
        except OSError as error:
            raise InputError(f"{self._home}: cannot be written: {error.strerror or error}") from error

    def ask(self, *command: str, after: tuple[str, ...] = ()) -> dict[str, Any]:
        """Run a command to its end, and return what it answers as JSON.

        after: options that come behind the connection's name. Raises FlowerError.
        """
        line = [self._program, *command, CONNECTION, *after, "--format", "json"]
        try:
            ran = subprocess.run(
                line, env=self._environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise FlowerError(f"flwr {command[0]}: no answer within {PATIENCE:g} s") from error
        answer = _json(ran.stdout)
        if answer is None or not answer.get("success"):
            raise FlowerError(f"flwr {command[0]}: {_words(answer, ran.stderr or ran.stdout)}")
        return answer

    def open(self, *command: str) -> subprocess.Popen[str]:
        """Start a command whose output is read while it runs, in a session of its own: Ctrl-C is for us alone."""
        return subprocess.Popen(
            [self._program, *command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )


def _json(text: str) -> dict[str, Any] | None:
    """The object in what a command printed."""
    try:
        found = json.loads(text[text.index("{") :])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _words(answer: Mapping[str, Any] | None, otherwise: str) -> str:
    """What Flower says is wrong, without the line by which it says whom it asked."""
    said = str((answer or {}).get("error-message") or otherwise)
    kept = [line for line in said.splitlines() if not line.startswith("Using SuperLink")]
    return in_one_line(os.linesep.join(kept)) or "it ended without a word"

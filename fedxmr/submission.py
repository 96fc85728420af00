"""Submitting a run to a SuperLink, and following it to its end.

What travels to the server and from there to every client is this program itself, the packages fedxmr, server and
clients as they are here, and the run's configuration.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedxmr import __version__
from fedxmr.addresses import Address, obstacle
from fedxmr.commands import A_MISTAKE, BAD_INPUT, FAILED, OK
from fedxmr.errors import FederationError, InputError, in_one_line
from fedxmr.flower import CONNECTION, Flower, FlowerError
from fedxmr.keys import check_authority
from fedxmr.processes import ROOT

PACKAGES = ("fedxmr", "server", "clients")
PATIENCE = 180.0
"""Seconds a SuperLink may be away while a run is followed: restarted, say."""

PAUSE = 2.0
LAST_LOOKS = 2
"""How often a run that has ended is read again, for its last words may come late."""

UNKNOWN = "Run ID not found"
"""Flower's words for a run that there never was."""

EXIT_CODE = re.compile(r"exit code: (\d+)")
"""A run's last line."""

FLOWERS = re.compile(r"(\x1b\[\d+m)?(INFO|DEBUG) (\x1b\[0m)?: |Successfully installed fedxmr to ")
"""How lines begin that are Flower's and not the run's."""

PROJECT = f"""\
[project]
name = "fedxmr"
version = "{__version__}"
description = "Federated learning for cross-modal retrieval"

[tool.flwr.app]
publisher = "fedxmr"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
config = ""
out = ""
"""
"""The pyproject.toml of an installation that has none, as far as Flower asks for it."""


class LostSight(FederationError):
    """The SuperLink is gone, and with it all that could be known of a run."""


@dataclass(frozen=True)
class Link:
    """How a SuperLink is reached. authority: the certificate of who signed its own; None: without TLS."""

    server: Address
    authority: Path | None

    @property
    def options(self) -> str:
        """As the commands take it."""
        return f"--server {self.server} " + (f"--ca {self.authority}" if self.authority else "--insecure")

    @contextmanager
    def open(self) -> Iterator[Flower]:
        """Flower's commands, for as long as they are needed. Raises InputError where there is no server."""
        if self.authority is not None:
            check_authority(self.authority)
        if (why := obstacle(self.server, self.authority)) is not None:
            raise InputError(f"--server: {why}")
        with tempfile.TemporaryDirectory(prefix="fedxmr-") as home:
            flower = Flower(Path(home))
            flower.connect(self.server, self.authority)
            yield flower


def stage(folder: Path) -> Path:
    """Copy what travels into a folder, of a name that Flower takes; returns the copy."""
    copy = folder / "fedxmr"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    project = ROOT / "pyproject.toml"
    if project.is_file():
        shutil.copy(project, copy)
    else:
        (copy / "pyproject.toml").write_text(PROJECT)
    return copy


def submit(flower: Flower, config: str, out: Path) -> str:
    """Start a run; returns Flower's number of it.

    config: as YAML. out: the run folder, on the server. Raises FlowerError.
    """
    with tempfile.TemporaryDirectory(prefix="fedxmr-") as folder:
        settings = Path(folder) / "run.toml"
        values = {"config": config, "out": str(out)}
        settings.write_text("".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items()))
        answer = flower.ask("run", str(stage(Path(folder))), after=("--run-config", str(settings)))
    return str(answer["run-id"])


def end(flower: Flower, run: str) -> None:
    """Stop a run. Raises FlowerError."""
    flower.ask("stop", run)


def follow(flower: Flower, run: str, show: Callable[[str], None], patience: float = PATIENCE) -> int:
    """Show what a run says until it has ended, also when the SuperLink goes away and comes again; its exit code.

    The exit code is what the run's last line says. Raises FederationError where it ended without that line, LostSight,
    InputError where there is no such run.
    """
    read, looks, code = 0, 0, None
    lost = time.monotonic()
    while True:
        for line in _log(flower, run, read):
            read += 1
            if (code is None or code == A_MISTAKE) and not FLOWERS.match(line):  # of a mistake Flower shows where it is
                show(line)
            if found := EXIT_CODE.fullmatch(line.strip()):
                code = int(found[1])
        if code is not None:
            return code
        try:
            status, details = _status(flower, run)
        except FlowerError as error:
            if UNKNOWN in str(error):
                raise InputError(f"run {run}: the server knows of no such run") from error
            if time.monotonic() - lost > patience:
                raise LostSight(f"run {run}: lost sight of it: {error}") from error
        else:
            lost = time.monotonic()
            looks += status.startswith("finished")
            if looks >= LAST_LOOKS or status == "finished:stopped":
                raise FederationError(f"run {run}: Flower says {status}{details}, and the run itself nothing")
        time.sleep(PAUSE)


def _log(flower: Flower, run: str, skip: int) -> Iterator[str]:
    """The lines of a run's log behind the first `skip`, until it has ended or the connection breaks."""
    with flower.open("log", run, CONNECTION, "--stream") as process:
        try:
            lines = (line for line in process.stdout or () if not line.startswith("Using SuperLink"))
            for i, line in enumerate(lines):
                if i >= skip and line.endswith("\n"):  # else it may be half a line
                    yield line.rstrip("\n")
        finally:
            process.kill()


def _status(flower: Flower, run: str) -> tuple[str, str]:
    """How Flower says a run is, such as finished:completed, and its details. Raises FlowerError."""
    found = flower.ask("list", after=("--run-id", run))["runs"][0]
    details = found.get("status-details", "N/A")
    return str(found["status"]), "" if details in ("N/A", "") else f" ({in_one_line(str(details))})"


def expect_success(run: str, code: int) -> None:
    """Nothing where a run's exit code is 0; else raises the error with which a command ends likewise."""
    if code == OK:
        return
    if code == BAD_INPUT:
        raise InputError(f"run {run}: bad input, as it says above")
    what = "failed" if code == FAILED else f"ended with exit code {code}"
    raise FederationError(f"run {run}: {what}, as it says above")

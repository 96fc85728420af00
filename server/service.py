"""The server of a deployment: Flower's SuperLink with TLS, which knows its clients by their keys."""

from __future__ import annotations

import http.client
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from fedxmr import keys
from fedxmr.addresses import Address, expect_free, expect_ip, obstacle
from fedxmr.commands import say
from fedxmr.errors import FederationError, InputError
from fedxmr.flower import Flower, FlowerError
from fedxmr.folders import alone
from fedxmr.processes import environment, start, stop
from server.registry import Registry, read_keys

START_UP, GRACE = 60.0, 3.0
"""Seconds the SuperLink has to answer, and to end: it would wait for all who are connected."""

POLL = 2.0
"""Seconds between two looks at the folder of keys."""

SOON = timedelta(days=30)
FOREIGN = {"X-Forwarded-For": "192.0.2.1"}
"""What a request from another machine would bring, had a proxy passed it on."""


@dataclass(frozen=True)
class Service:
    """Where the server listens and keeps its files. keys, clients: None, both, for one without TLS."""

    address: Address
    state: Path
    keys: Path | None
    clients: Path | None

    @property
    def authority(self) -> Path | None:
        """The certificate by which the server is known."""
        return self.keys and self.keys / keys.CA

    @property
    def database(self) -> Path:
        """Runs, nodes, logs and what is on its way."""
        return self.state / "superlink.db"

    @property
    def log(self) -> Path:
        """What the SuperLink says, a file a day, kept for a week."""
        return self.state / "superlink.log"

    def check(self) -> None:
        """See that all files are good and the port is free. Raises InputError for the first thing that is not."""
        expect_ip(self.address.host, "--host")
        if self.keys is None or self.clients is None:
            if not self.address.local:
                raise InputError(f"--insecure: expected a loopback --host such as 127.0.0.1, got {self.address.host}")
        else:
            keys.check_server(self.keys, self.address.reached_at.host)
            if not self.clients.is_dir():
                raise InputError(f"{self.clients}: expected a folder of clients' public keys")
            if wrong := read_keys(self.clients)[1]:
                raise InputError(wrong[0])
        expect_free(self.address)

    def arguments(self) -> list[str]:
        """The SuperLink's."""
        line = ["--host", self.address.host, "--port", str(self.address.port)]
        line += ["--database", str(self.database), "--log-file", str(self.log)]
        line += ["--disable-runtime-dependency-installation"]
        if self.keys is None:
            return [*line, "--insecure"]
        line += ["--ssl-ca-certfile", str(self.keys / keys.CA), "--ssl-certfile", str(self.keys / keys.SERVER)]
        return [*line, "--ssl-keyfile", str(self.keys / keys.SERVER_KEY), "--enable-supernode-auth"]


def registry_of(state: Path) -> Registry:
    """Who is let in by the server that keeps its files in `state`. Raises InputError where there is none."""
    if not (state / "flwr" / "config.toml").is_file():
        raise InputError(f"{state}: expected the --state folder of a server")
    return Registry(state / "clients.json", Flower(state / "flwr"))


def serve(service: Service) -> None:
    """Run the server until it is ended. Raises InputError before it starts, FederationError when it ends by itself."""
    service.check()
    with alone(service.state, "server"):
        Flower(service.state / "flwr").connect(service.address.reached_at, service.authority)
        link = start("server.superlink", service.arguments(), environment(service.state / "flwr"))
        try:
            _await(service, link)
            _expect_guarded(service)
            _announce(service)
            _watch(service, link)
        finally:
            stop(link, GRACE)


def _await(service: Service, link: subprocess.Popen[str]) -> None:
    """Wait until the SuperLink answers."""
    deadline = time.monotonic() + START_UP
    while why := obstacle(service.address.reached_at, service.authority):
        _expect_alive(service, link)
        if time.monotonic() > deadline:
            raise FederationError(f"the SuperLink does not answer: {why}; see {service.log}")
        time.sleep(0.1)
    _expect_alive(service, link)


def _expect_alive(service: Service, link: subprocess.Popen[str]) -> None:
    if (code := link.poll()) is not None:
        raise FederationError(f"the SuperLink has ended with exit code {code}: see {service.log}")


def _expect_guarded(service: Service) -> None:
    """See that other machines cannot submit runs. Raises FederationError."""
    at = service.address.reached_at
    connection: http.client.HTTPConnection
    if service.authority is None:
        connection = http.client.HTTPConnection(at.host, at.port, timeout=START_UP)
    else:
        trusting = ssl.create_default_context(cafile=service.authority)
        connection = http.client.HTTPSConnection(at.host, at.port, timeout=START_UP, context=trusting)
    try:
        connection.request("POST", "/v1/control/list-runs", headers=FOREIGN)
        status = connection.getresponse().status
    finally:
        connection.close()
    if status != 403:
        raise FederationError(f"the SuperLink would take runs from other machines (status {status}): not started")


def _announce(service: Service) -> None:
    at = service.address
    say(f"SuperLink at {at}, {'without TLS' if service.keys is None else 'TLS'}, state in {service.state}")
    option = f"--ca {service.authority}" if service.authority else "--insecure"
    say(f"runs are submitted on this machine: python -m fedxmr.deploy run --server {at.reached_at} {option} ...")


def _watch(service: Service, link: subprocess.Popen[str]) -> None:
    """Keep to the folder of keys until the SuperLink ends, which raises FederationError."""
    registry = registry_of(service.state)
    today: date | None = None
    seen: object = None
    while True:
        _expect_alive(service, link)
        if today != (today := datetime.now(UTC).date()):
            for line in _expiring(service):
                say(line)
        if (now := _look(service.clients)) != seen and _agree(registry, service.clients):
            if seen is None:
                say("ready")
            seen = now
        time.sleep(POLL)


def _look(folder: Path | None) -> object:
    """What changes when a file in a folder does."""
    found = []
    for file in sorted(folder.glob("*.pub")) if folder else ():
        with suppress(FileNotFoundError):  # just gone
            found.append((file.name, file.stat().st_mtime_ns, file.stat().st_size))
    return found


def _agree(registry: Registry, folder: Path | None) -> bool:
    """Have the SuperLink know the keys in a folder, and say what was done; whether Flower could be talked to."""
    try:
        for line in registry.agree(folder) if folder else ():
            say(line)
    except FlowerError as error:
        say(f"warning: {error}; trying again")
        return False
    return True


def _expiring(service: Service) -> Iterator[str]:
    """A line for every certificate that is about to expire."""
    for file in (service.keys / keys.SERVER, service.keys / keys.CA) if service.keys else ():
        try:
            end = keys.read_certificate(file).not_valid_after_utc
        except InputError as error:  # of no matter until the next start
            yield f"warning: {error}"
        else:
            if end - datetime.now(UTC) < SOON:
                yield f"warning: {file} expires on {end:%Y-%m-%d}"

"""A real server and a real client on this machine, with TLS and keys, by the commands that institutions use."""

from __future__ import annotations

import http.client
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedxmr import keys
from fedxmr.addresses import free_port, is_loopback

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 90.0


def deploy(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fedxmr.deploy", *map(str, arguments)]


def ran(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(deploy(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


class Running:
    """A command that lasts, and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path) -> None:
        self.process = process
        self._file = file

    @property
    def said(self) -> str:
        return self._file.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def until(self, text: str) -> None:
        """Wait until it has said something."""
        until(lambda: text in self.said or self.process.poll() is not None, lambda: self.said)
        assert text in self.said, self.said

    def end(self, number: int, expected: int) -> None:
        """Send it a signal, and see that it ends so and with all it started."""
        family = self.family()
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) == expected, self.said
        until(lambda: not any(member.is_running() for member in family), lambda: str(family))


def until(what: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)


@contextmanager
def running(file: Path, *arguments: object) -> Iterator[Running]:
    """Start a command; it is ended whatever happens."""
    with file.open("wb") as opened:
        process = subprocess.Popen(deploy(*arguments), cwd=ROOT, stdout=opened, stderr=subprocess.STDOUT)
    started = Running(process, file)
    try:
        yield started
    finally:
        if process.poll() is None:
            family = started.family()
            process.kill()
            process.wait()
            for member in psutil.wait_procs(family, timeout=20)[1]:
                member.kill()


def status(host: str, port: int, path: str) -> int:
    """What the server answers to a request of nobody known."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=trusting)
    try:
        connection.request("POST", path)
        return connection.getresponse().status
    finally:
        connection.close()


def address_in_a_network() -> str | None:
    """An address of this machine that is not loopback."""
    found = [a.address for of in psutil.net_if_addrs().values() for a in of if a.family.name == "AF_INET"]
    return next((address for address in found if not is_loopback(address)), None)


@pytest.fixture
def data(tmp_path) -> Path:
    """A client's own data."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "features").mkdir(parents=True)
    np.save(folder / "features" / "image.npy", rng.normal(size=(30, 4)))
    np.save(folder / "features" / "text.npy", rng.normal(size=(30, 3)))
    np.save(folder / "labels.npy", np.arange(30) % 3)
    np.savez(folder / "split.npz", train=np.arange(20), validation=np.arange(20, 25), test=np.arange(25, 30))
    return folder


@pytest.mark.long
def test_a_server_and_a_client_from_their_keys_to_their_end(tmp_path, data):
    made, port = tmp_path / "keys", free_port()
    keys.write_server(made, ["server.example.org"])
    keys.write_trial(made, 1)
    link = ("--server", f"127.0.0.1:{port}", "--ca", made / "ca.crt")
    serve = ("server", "--keys", made, "--clients", made / "clients", "--state", tmp_path / "server", "--port", port)
    own = ("--keys", made / "client-0", "--data", data, "--state", tmp_path / "client")
    with ExitStack() as stack:
        server = stack.enter_context(running(tmp_path / "server.txt", *serve))
        server.until("ready")
        assert "client-0: registered" in server.said
        client = stack.enter_context(
            running(tmp_path / "client.txt", "client", "--client", 0, "--server", f"127.0.0.1:{port}", *own)
        )
        client.until("connected to")
        assert ran("status", "--state", tmp_path / "server").stdout == "client-0: online\n"

        assert status("127.0.0.1", port, "/v1/control/start-run") == 415  # let through, to who wants a protobuf
        if (host := address_in_a_network()) is not None:
            assert status(host, port, "/v1/control/start-run") == 403
            assert status(host, port, "/v1/control/register-node") == 403
            assert status(host, port, "/v1/fleet/pull-messages") == 415
        assert "another client is working" in ran("client", "--client", 0, "--server", f"127.0.0.1:{port}", *own).stderr

        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.txt").write_text("precious")
        failed = ran("run", *link, "--out", tmp_path / "thesis", "--rounds", 1, "federation.clients=1")
        assert failed.returncode == 2, failed
        assert "exit code: 2" in failed.stdout.splitlines()
        assert "thesis" in failed.stdout
        assert failed.stderr.startswith("error: run ")
        number = failed.stdout.split()[1].rstrip(":")
        again = ran("follow", number, *link)
        assert again.returncode == 2
        assert again.stdout.splitlines()[-1] == "exit code: 2"
        assert ran("stop", number, *link).returncode == 3  # it has ended

        node = next(process for process in client.family() if "clients.node" in process.cmdline())
        node.send_signal(signal.SIGKILL)
        client.until("the SuperNode has ended by SIGKILL; starting again in 1 s")
        client.end(signal.SIGTERM, 143)

        family = server.family()
        server.process.send_signal(signal.SIGKILL)  # nothing is left that would hold the port
        until(lambda: not any(member.is_running() for member in family), lambda: str(family))
        again_served = stack.enter_context(running(tmp_path / "again.txt", *serve))
        again_served.until("ready")
        assert "client-0: registered" not in again_served.said
        link_process = next(process for process in again_served.family() if "server.superlink" in process.cmdline())
        link_process.send_signal(signal.SIGKILL)
        assert again_served.process.wait(PATIENCE) == 3
        assert "error: the SuperLink has ended with exit code -9" in again_served.said


@pytest.mark.long
def test_without_tls_on_this_machine_alone(tmp_path, data):
    port = free_port()
    with ExitStack() as stack:
        server = stack.enter_context(
            running(
                tmp_path / "s", "server", "--insecure", "--host", "127.0.0.1", "--port", port, "--state", tmp_path / "a"
            )
        )
        server.until("ready")
        own = ("--insecure", "--data", data, "--state", tmp_path / "b")
        client = stack.enter_context(
            running(tmp_path / "c", "client", "--client", 0, "--server", f"127.0.0.1:{port}", *own)
        )
        client.until("connected to")
        client.end(signal.SIGTERM, 143)
        server.end(signal.SIGTERM, 143)
        assert server.said.splitlines()[-1] == "error: interrupted by SIGTERM"

"""The real thing: a server and three clients as processes in network namespaces of their own, with TLS and keys.

Each sees its own files alone, and has no route but to the others. The tests stand in the order they run in: all use
one server and its clients, which they leave as they found them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedxmr import keys as making
from fedxmr.config import resolve
from fedxmr.simulate import run as simulate
from tests import networks
from tests.federations import same_bytes
from tests.networks import Machine

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

CLIENTS = 3
PORT = 8443
PATIENCE = 240.0
LEARNER = {"name": "dscmr", "hidden": 64, "width": 32}


@dataclass
class Deployment:
    """A server and its clients. supervisors: client -> the process that keeps its SuperNode up."""

    server: Machine
    clients: list[Machine]
    service: subprocess.Popen[bytes] | None = None
    supervisors: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def authority(self) -> Path:
        return self.server.folder / "keys" / "ca.crt"

    def serve(self) -> None:
        """Start the server and wait until it lets clients in."""
        before = self.server.said("server").count("ready")
        folder = self.server.folder
        options = ("--state", folder / "state", "--keys", folder / "keys", "--clients", folder / "clients")
        self.service = self.server.start("server", "fedxmr.deploy", "server", *options, "--port", PORT)
        until(
            lambda: self.server.said("server").count("ready") > before, "the server to be ready", self.server, "server"
        )

    def join(self, client: int) -> None:
        """Start a client."""
        machine = self.clients[client]
        self.supervisors[client] = machine.start(
            "client", "fedxmr.deploy", "client", *self.options(machine), "--client", client
        )

    def options(self, machine: Machine) -> tuple[object, ...]:
        """What a client is told but for its number."""
        address = f"{self.server.address}:{PORT}"
        folder = machine.folder
        places = ("--data", folder / "data", "--state", folder / "state", "--keys", folder / "keys")
        return ("--server", address, *places, "--threads", 1)

    def submit(self, out: Path, rounds: int, **learner: object) -> subprocess.Popen[bytes]:
        """Submit a run on the server's machine; its output is in <the name of out>.log there."""
        file = self.server.folder / f"{out.name}.yaml"
        file.write_text(json.dumps(tree(rounds, dataset={"name": "own-folder", "scaling": SCALING}, **learner)))
        options = ("--server", f"127.0.0.1:{PORT}", "--ca", self.authority, "--out", out, "--config", file)
        return self.server.start(out.name, "fedxmr.deploy", "run", *options)


SCALING = {"image": "standardise", "text": "norm"}


def tree(rounds: int, dataset: object = "wikipedia", **learner: object) -> dict[str, object]:
    return {
        "dataset": dataset,
        "federation": {"clients": CLIENTS, "rounds": rounds, "start_deadline": PATIENCE},
        "learner": {**LEARNER, **learner},
        "runtime": {"engine": "local", "threads": 1},
    }


def until(happens: Callable[[], object], what: str, machine: Machine, log: str, patience: float = PATIENCE) -> None:
    """Wait for something; fail with what was said until then."""
    deadline = time.monotonic() + patience
    while not happens():
        assert time.monotonic() < deadline, f"waited in vain for {what}; {log} says:\n{machine.said(log)[-5000:]}"
        time.sleep(0.2)


def ended(machine: Machine, name: str, process: subprocess.Popen[bytes], patience: float = 600) -> int:
    """The exit code of a process that ends in time."""
    until(lambda: process.poll() is not None, f"{name} to end", machine, name, patience)
    return process.wait()


@pytest.fixture(scope="module")
def bridge() -> Iterator[str]:
    """The switch that all machines are plugged into."""
    if why := networks.missing():
        pytest.skip(why)
    name = f"fx{os.getpid() % 10**7}"
    networks.ip("link", "add", name, "type", "bridge")
    networks.ip("link", "set", name, "up")
    yield name
    networks.ip("link", "del", name)


@pytest.fixture(scope="module")
def deployment(bridge: str, benchmark_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server and three clients, each with its own key and data, all of which are up."""
    root = tmp_path_factory.mktemp("deployment")
    names = ["server", *(f"client-{k}" for k in range(CLIENTS))]
    machines: list[Machine] = []
    try:
        for number, name in enumerate(names, start=1):
            hidden = [*(root / other for other in names if other != name), benchmark_data]
            machines.append(Machine(name, number, root / name, bridge, hidden))
        found = Deployment(machines[0], machines[1:])
        divide(root / "split", benchmark_data, root)
        keys(found)
        found.serve()
        for k in range(CLIENTS):
            found.join(k)
        yield found
    finally:
        for machine in reversed(machines):
            machine.close()


def divide(split: Path, data: Path, root: Path) -> None:
    """Give every client its folder, and leave none behind."""
    line = [networks.sys.executable, "-m", "fedxmr.data", "split", "wikipedia", "--clients", str(CLIENTS)]
    subprocess.run(
        [*line, "--test", "shared", "--data-dir", str(data), "--out", str(split)], check=True, cwd=networks.ROOT
    )
    for k in range(CLIENTS):
        (split / f"client-{k}").rename(root / f"client-{k}" / "data")
    shutil.rmtree(split)


def keys(deployment: Deployment) -> None:
    """Every machine makes its own; only public halves and the authority's certificate travel."""
    server = deployment.server
    made = server.run("fedxmr.deploy", "keys", "--out", server.folder / "keys", "--name", server.address)
    assert made.returncode == 0, made.stdout
    (server.folder / "clients").mkdir()
    for k, machine in enumerate(deployment.clients):
        made = machine.run("fedxmr.deploy", "keys", "--out", machine.folder / "keys", "--client", f"client-{k}")
        assert made.returncode == 0, made.stdout
        shutil.copy(machine.folder / "keys" / f"client-{k}.pub", server.folder / "clients")
        shutil.copy(deployment.authority, machine.folder / "keys")


def test_a_deployed_run_has_the_bytes_of_its_simulation(deployment, tmp_path):
    out = deployment.server.folder / "first"
    code = ended(deployment.server, "first", deployment.submit(out, rounds=3))
    said = deployment.server.said("first")
    assert code == 0, said
    assert "test mAP@all" in said
    simulate(resolve(tree(3)), tmp_path / "simulated", pictures=False)
    assert same_bytes(tmp_path / "simulated", out)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["failed"], summary["rejected"]) == ([], [])
    assert scalars(out) == scalars(tmp_path / "simulated")


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for what a clock measured and what the one process of a simulation was busy with."""
    events = EventAccumulator(str(out))
    events.Reload()
    shown = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("seconds/", "busy/"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in shown}


def test_what_is_a_clients_own_stays_on_its_machine(deployment):
    import fedxmr

    server_files = {path.name for path in (deployment.server.folder / "first").rglob("*.safetensors")}
    assert server_files == {"shared-selected.safetensors", "shared-last.safetensors", "server.safetensors"}
    for k, machine in enumerate(deployment.clients):
        (folder,) = (machine.folder / "state" / "runs").iterdir()
        assert fedxmr.load(folder, client=k).client == k


def test_nothing_is_sent_to_anywhere_but_the_configured_address(deployment):
    for machine in (deployment.server, *deployment.clients):
        assert machine.sent_elsewhere == 0


def test_other_machines_get_the_fleet_api_alone(deployment):
    asks = (
        "-c",
        "import ssl, urllib.request as u; c = ssl.create_default_context(cafile='{ca}');"
        "r = u.Request('https://{at}/v1/control/list-runs', data=b'');"
        "print(u.urlopen(r, context=c, timeout=30).status)",
    )
    machine = deployment.clients[0]
    code = asks[1].format(ca=machine.folder / "keys" / "ca.crt", at=f"{deployment.server.address}:{PORT}")
    line = ["ip", "netns", "exec", machine.name, networks.sys.executable, "-c", code]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert "HTTP Error 403" in ran.stderr


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("key", r"(?i)not (registered|known|let in)"),
        ("authority", r"certificate .* is not accepted: .*"),
    ],
)
def test_who_has_no_key_or_another_authority_stays_out(deployment, bridge, tmp_path, spoil, says):
    stranger = Machine(f"stranger-{spoil}", 9, tmp_path / "stranger", bridge)
    try:
        folder = stranger.folder / "keys"
        stranger.run("fedxmr.deploy", "keys", "--out", folder, "--client", "stranger")
        if spoil == "authority":
            other = tmp_path / "other"
            stranger.run("fedxmr.deploy", "keys", "--out", other, "--name", deployment.server.address)
            shutil.copy(other / "ca.crt", folder)
        else:
            shutil.copy(deployment.authority, folder)
        shutil.copytree(deployment.clients[0].folder / "data", stranger.folder / "data")
        stranger.start("client", "fedxmr.deploy", "client", *deployment.options(stranger), "--client", 0)
        until(lambda: re.search(says, stranger.said("client")), says, stranger, "client")
    finally:
        stranger.close()


def test_an_expired_certificate_is_refused_by_the_client_and_not_even_served(deployment, bridge, tmp_path):
    """The client meets it on another server, which has it from the authority that the client trusts."""
    other = Machine("expired", 8, tmp_path / "other", bridge)
    try:
        folder = other.folder / "keys"
        folder.mkdir()
        past = making.Period(datetime.now(UTC) - timedelta(days=2), datetime.now(UTC) - timedelta(days=1))
        pair = making.make_server(making.read_authority(deployment.authority.parent), [other.address], past)
        (folder / "server.pem").write_bytes(pair.certificate.public_bytes(serialization.Encoding.PEM))
        plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / "server.key").write_bytes(pair.key.private_bytes(serialization.Encoding.PEM, *plain))
        (folder / "server.key").chmod(0o600)
        shutil.copy(deployment.authority, folder)
        (other.folder / "clients").mkdir()
        options = ("--state", other.folder / "state", "--keys", folder, "--clients", other.folder / "clients")
        refused = other.run("fedxmr.deploy", "server", *options, "--port", PORT)
        assert refused.returncode == 2
        assert "expired" in refused.stdout
        certificate = ("--ssl-certfile", folder / "server.pem", "--ssl-keyfile", folder / "server.key")
        where = ("--ssl-ca-certfile", deployment.authority, "--host", other.address, "--port", PORT)
        other.start("superlink", "server.superlink", *certificate, *where, "--disable-runtime-dependency-installation")
        until(lambda: "Uvicorn running" in other.said("superlink"), "the server", other, "superlink")
        client = other.start("client", "fedxmr.deploy", "client", *client_options(deployment, other, folder, tmp_path))
        until(lambda: "certificate has expired" in other.said("client"), "the refusal", other, "client")
        assert client.poll() is None  # it tries again: a certificate may be renewed
    finally:
        other.close()


def client_options(deployment: Deployment, other: Machine, keys: Path, scratch: Path) -> tuple[object, ...]:
    """Of client 0 with a key of its own, and the data of the deployment's, going to another server."""
    own = scratch / "own-keys"
    other.run("fedxmr.deploy", "keys", "--out", own, "--client", "own")
    shutil.copy(keys / "ca.crt", own)
    data = deployment.clients[0].folder / "data"
    places = ("--data", data, "--state", scratch / "own-state", "--keys", own)
    return ("--client", 0, "--server", f"{other.address}:{PORT}", *places)


def test_a_client_that_is_killed_misses_a_round_and_is_back(deployment):
    victim, out = deployment.clients[1], deployment.server.folder / "killed"
    before = victim.said("client").count("ROUND 2]")
    process = deployment.submit(out, rounds=5)
    until(lambda: victim.said("client").count("ROUND 2]") > before, "round 2", victim, "client")
    supernode(deployment.supervisors[1]).kill()
    assert ended(deployment.server, "killed", process, 900) == 0, deployment.server.said("killed")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["failed"][0]["round"], summary["failed"][0]["client"]) == (2, 1)
    assert {entry["client"] for entry in summary["failed"]} == {1}
    assert "client 1 failed in round 2" in deployment.server.said("killed")
    assert [own["client"] for own in summary["test"]["last"]["clients"]] == [0, 1, 2]


def supernode(supervisor: subprocess.Popen[bytes]) -> psutil.Process:
    """The SuperNode that a client's supervisor keeps up."""
    family = psutil.Process(supervisor.pid).children(recursive=True)
    return next(process for process in family if "clients.node" in process.cmdline())


def test_a_link_that_is_cut_for_twenty_seconds_is_survived(deployment, tmp_path):
    victim, out = deployment.clients[2], deployment.server.folder / "cut"
    before = victim.said("client").count("ROUND 2]")
    process = deployment.submit(out, rounds=3, width=16)
    until(lambda: victim.said("client").count("ROUND 2]") > before, "round 2", victim, "client")
    victim.cut()
    time.sleep(20)
    victim.mend()
    assert ended(deployment.server, "cut", process, 900) == 0, deployment.server.said("cut")
    assert json.loads((out / "summary.json").read_text())["failed"] == []
    simulate(resolve(tree(3, width=16)), tmp_path / "simulated", pictures=False)
    assert same_bytes(tmp_path / "simulated", out)


def test_a_server_that_is_killed_is_started_again_and_the_run_goes_on(deployment, tmp_path):
    out = deployment.server.folder / "resumed"
    process = deployment.submit(out, rounds=4, width=8)
    until((out / "checkpoint" / "round-2").is_dir, "round 2 to stand", deployment.server, "resumed")
    networks.end(deployment.service, kill=True)
    deployment.serve()
    assert ended(deployment.server, "resumed", process) == 3, deployment.server.said("resumed")
    again = deployment.submit(out, rounds=4, width=8)
    assert ended(deployment.server, "resumed", again, 900) == 0, deployment.server.said("resumed")
    simulate(resolve(tree(4, width=8)), tmp_path / "simulated", pictures=False)
    assert same_bytes(tmp_path / "simulated", out)

"""The commands of a deployment, as far as they need no Flower: refusals, what is submitted, and who is let in."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest

from clients import supernode
from clients.supernode import PAUSES, Node, Voice, keep_alive, live, why_ended
from fedxmr import commands, deploy, keys, processes, submission
from fedxmr.addresses import Address, free_port, obstacle
from fedxmr.config import Config
from fedxmr.errors import FederationError, InputError
from fedxmr.flower import Flower, FlowerError
from fedxmr.folders import alone
from server.registry import Registry, read_keys

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "run": deploy.run,
    "server": deploy.server,
    "client": deploy.client,
    "follow": deploy.follow,
    "status": deploy.status,
}
PATIENCE = 30.0


def until(what, patience: float = PATIENCE) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + patience
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def data(tmp_path) -> Path:
    """A client's folder of data."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "features").mkdir(parents=True)
    for modality, width in (("image", 4), ("text", 3)):
        with (folder / "features" / f"{modality}.npy").open("wb") as opened:
            np.lib.format.write_array(opened, rng.normal(size=(30, width)), allow_pickle=False)
    np.save(folder / "labels.npy", np.arange(30) % 3)
    np.savez(folder / "split.npz", train=np.arange(20), validation=np.arange(20, 25), test=np.arange(25, 30))
    return folder


@pytest.fixture
def trial(tmp_path) -> Path:
    """Keys of a server and two clients."""
    keys.write_server(tmp_path / "keys", ["10.77.0.1"])
    keys.write_trial(tmp_path / "keys", 2)
    return tmp_path / "keys"


# --- addresses


@pytest.mark.parametrize(
    ("text", "host", "port", "local"),
    [
        ("127.0.0.1:8443", "127.0.0.1", 8443, True),
        ("[::1]:8443", "::1", 8443, True),
        ("localhost:1", "localhost", 1, True),
        ("server.example.org:8443", "server.example.org", 8443, False),
        ("10.77.0.1:65535", "10.77.0.1", 65535, False),
    ],
)
def test_an_address_is_a_host_and_a_port(text, host, port, local):
    address = Address.parse(text, "--server")
    assert (address.host, address.port, address.local, str(address)) == (host, port, local, text)


@pytest.mark.parametrize("text", ["", "host", ":8443", "host:", "host:0", "host:65536", "host:x", "https://host:1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InputError, match=r"--server .*expected host:port"):
        Address.parse(text, "--server")


def test_what_stands_between_us_and_a_server_is_said(trial):
    nobody = Address("127.0.0.1", free_port())
    assert obstacle(nobody, None) == f"{nobody} cannot be reached: Connection refused"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = Address(*listening.getsockname())
        assert obstacle(address, None) is None
        assert obstacle(address, trial / keys.CA, timeout=0.2) == f"no answer from {address}"


# --- refusals: one line, exit code 2, before anything starts


def refusal(capsys, arguments: list[str]) -> str:
    """The line that refuses a command."""
    code = commands.run(COMMANDS, arguments)
    shown = capsys.readouterr()
    assert code == commands.BAD_INPUT, shown.err
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    return shown.err


def test_a_port_in_use_is_refused(tmp_path, trial, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = [*("server", "--keys", str(trial), "--clients", str(trial / "clients"), "--host", "127.0.0.1")]
        said = refusal(capsys, [*line, "--port", str(port), "--state", str(tmp_path / "state")])
    assert f"127.0.0.1:{port}: cannot be listened at: Address already in use" in said
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--insecure"], "--insecure: expected a loopback --host such as 127.0.0.1, got 0.0.0.0"),
        (["--insecure", "--host", "10.77.0.1"], "--insecure: expected a loopback --host"),
        (["--insecure", "--keys", "{keys}"], "knows no keys"),
        ([], "expected --keys and --clients, or else --insecure"),
        (["--keys", "{keys}"], "expected --keys and --clients, or else --insecure"),
        (["--keys", "{keys}", "--clients", "{keys}/none"], "keys/none: expected a folder of clients' public keys"),
        (["--keys", "{keys}", "--clients", "{keys}/bad"], "bad/x.pub: expected a public ECDSA key"),
        (["--keys", "{keys}/none", "--clients", "{keys}/clients"], "ca.crt: cannot be read"),
        (["--keys", "{keys}", "--clients", "{keys}/clients", "--host", "server"], "expected an IP address"),
        (["--keys", "{keys}", "--clients", "{keys}/clients", "--host", "10.77.0.2"], "expected a certificate for"),
        (["--keys", "{keys}", "--clients", "{keys}/clients", "--port", "0"], "0 is not in the range"),
    ],
)
def test_a_server_that_cannot_be_is_refused(tmp_path, trial, capsys, arguments, says):
    (trial / "bad").mkdir()
    (trial / "bad" / "x.pub").write_text("ssh-ed25519 AAAA")
    given = [argument.format(keys=trial) for argument in arguments]
    assert says in refusal(capsys, ["server", "--state", str(tmp_path / "state"), *given])
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected --keys, or else --insecure"),
        (["--insecure", "--server", "server.example.org:1"], "--insecure: expected a server on this machine"),
        (["--insecure", "--keys", "{keys}/client-0"], "expected --keys, or else --insecure"),
        (["--keys", "{keys}"], "expected one private key, NAME.key, got ca.key, server.key"),
        (["--keys", "{keys}/clients"], "ca.crt: cannot be read"),
        (["--keys", "{keys}/open"], "client-1.key: expected a file that its owner alone can read (chmod 600)"),
        (["--keys", "{keys}/client-0", "--server", "x"], "--server 'x': expected host:port"),
        (["--keys", "{keys}/client-0", "--data", "{keys}"], "labels.npy: expected a .npy array"),
        (["--keys", "{keys}/client-0", "--data", "{keys}/none"], "expected a folder, got nothing there"),
        (["--keys", "{keys}/client-0", "--state", '{keys}/a"b'], "expected a path without quotation marks"),
        (["--keys", "{keys}/client-0", "--state", "{keys}/ca.crt"], "ca.crt: cannot be written"),
        (["--keys", "{keys}/client-0", "--client", "-1"], "-1 is not in the range"),
    ],
)
def test_a_client_that_cannot_be_is_refused(tmp_path, trial, data, capsys, arguments, says):
    (trial / "client-1").rename(trial / "open")
    (trial / "open" / "client-1.key").chmod(0o644)
    base = ["--client", "0", "--server", "127.0.0.1:1", "--data", str(data), "--state", str(tmp_path / "state")]
    given = [argument.format(keys=trial) for argument in arguments]
    assert says in refusal(capsys, ["client", *base, *given])
    assert not (tmp_path / "state").exists()


def test_a_folder_is_held_by_one(tmp_path, trial, data, capsys):
    base = ["--client", "0", "--server", "127.0.0.1:1", "--data", str(data), "--keys", str(trial / "client-0")]
    with alone(tmp_path / "state", "client"):
        said = refusal(capsys, ["client", *base, "--state", str(tmp_path / "state")])
    assert "state: another client is working in this folder" in said
    with alone(tmp_path / "state", "client"):
        pass  # it is free again


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "runs/x"], "--out 'runs/x': expected an absolute path"),
        (["--dataset", "x"], "No such option"),
        (
            ["dataset.name=wikipedia"],
            "dataset.name: expected own-folder, as every client has its own data, got wikipedia",
        ),
        (["dataset=digits"], "expected own-folder, as every client has its own data, got digits"),
        (["--config", "{tmp}/digits.yaml"], "expected own-folder, as every client has its own data, got digits"),
        (["partition.scheme=dirichlet"], "there is nothing to divide"),
        (["--strategy", "fedvag"], "did you mean 'fedavg'?"),
        (["--learner", "dscrm"], "did you mean 'dscmr'?"),
        (["--rounds", "0"], "federation.rounds"),
        (["--config", "{tmp}/none.yaml"], "none.yaml: cannot be read"),
        (["--insecure"], "expected --ca, or else --insecure"),
        (["--server", "127.0.0.1"], "--server '127.0.0.1': expected host:port"),
        ([], "--server: 127.0.0.1:1 cannot be reached: Connection refused"),
    ],
)
def test_a_run_that_cannot_be_is_refused(tmp_path, trial, capsys, arguments, says):
    (tmp_path / "digits.yaml").write_text("dataset: digits")
    base = ["--server", "127.0.0.1:1", "--out", str(tmp_path / "run"), "--ca", str(trial / keys.CA)]
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert says in refusal(capsys, ["run", *base, *given])


def test_a_command_without_tls_stays_on_this_machine(capsys):
    assert "--insecure: expected a server on this machine" in refusal(
        capsys, ["follow", "1", "--server", "10.0.0.1:1", "--insecure"]
    )


def test_only_a_servers_folder_has_a_status(tmp_path, capsys):
    assert "expected the --state folder of a server" in refusal(capsys, ["status", "--state", str(tmp_path)])


# --- what is submitted


@pytest.mark.parametrize("named", [False, True])
def test_a_run_is_of_the_clients_own_folders(tmp_path, named):
    file = tmp_path / "run.yaml"
    file.write_text("dataset: own-folder\nseed: 3\n" if named else "seed: 3\n")
    config = deploy._deployed(file, {"federation.rounds": 7, "strategy.name": None}, ["federation.clients=4"])
    assert config.deployed
    assert (config.seed, config.federation.rounds, config.federation.clients) == (3, 7, 4)
    assert Config.from_yaml(config.to_yaml()) == config


def test_what_travels_is_the_program_and_nothing_else(tmp_path):
    copy = submission.stage(tmp_path)
    assert copy.name.isalnum()  # as Flower wants it
    assert {path.name for path in copy.iterdir()} == {"fedxmr", "server", "clients", "pyproject.toml"}
    assert not [path for path in copy.rglob("*") if path.name == "__pycache__" or path.name.startswith(".")]
    assert (copy / "clients" / "app.py").read_text() == (ROOT / "clients" / "app.py").read_text()
    assert sum(path.stat().st_size for path in copy.rglob("*") if path.is_file()) < 3e6


def test_an_installation_without_a_project_file_says_the_same_to_flower(tmp_path, monkeypatch):
    for package in submission.PACKAGES:
        (tmp_path / "site" / package).mkdir(parents=True)
    monkeypatch.setattr(submission, "ROOT", tmp_path / "site")
    made = tomllib.loads((submission.stage(tmp_path) / "pyproject.toml").read_text())
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert made["tool"]["flwr"] == ours["tool"]["flwr"]
    assert {**ours["project"], **made["project"]} == ours["project"]


# --- Flower's command line, played by a program of ours


FAKE = """\
#!{python}
import json, sys
from pathlib import Path
base = Path(__file__).parent
file = base / "nodes.json"
nodes = json.loads(file.read_text()) if file.exists() else {{}}
with (base / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")

def answer(**facts):
    file.write_text(json.dumps(nodes))
    print(json.dumps({{"success": True, **facts}}))
    sys.exit(0)

def refuse(words):
    print(json.dumps({{"success": False, "error-message": "Using SuperLink: here (x)\\n\\n" + words}}))
    sys.exit(0)

match sys.argv[1:]:
    case ["supernode", "list", *_]:
        answer(nodes=[{{"node-id": k, "status": v["status"]}} for k, v in nodes.items()])
    case ["supernode", "register", path, *_]:
        key = Path(path).read_text().split()[1]
        if any(node["key"] == key for node in nodes.values()):
            refuse("[code: 23] Public key already in use.")
        number = str(len(nodes) + 1)
        nodes[number] = {{"key": key, "status": "registered"}}
        answer(**{{"node-id": int(number)}})
    case ["supernode", "unregister", number, *_]:
        nodes[number]["status"] = "unregistered"
        answer()
    case ["list", *_]:
        if (base / "gone").exists():
            refuse("Connection to the SuperLink is unavailable.")
        if (base / "unknown").exists():
            refuse("Run ID not found")
        state = (base / "state").read_text() if (base / "state").exists() else "running"
        answer(runs=[{{"status": state, "status-details": "N/A"}}])
    case ["log", *_]:
        done = base / "logged"
        count = int(done.read_text()) if done.exists() else 0
        done.write_text(str(count + 1))
        logs = json.loads((base / "logs.json").read_text())
        print("Using SuperLink: here (x)")
        print(logs[min(count, len(logs) - 1)], end="", flush=True)
"""


@pytest.fixture
def flower(tmp_path) -> Flower:
    """A `flwr` that remembers the nodes it was told of, and says logs as it is told to."""
    program = tmp_path / "flower" / "flwr"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    made = Flower(tmp_path / "home", str(program))
    made.connect(Address("127.0.0.1", 8443), tmp_path / 'a "strange" folder' / "ca.crt")
    return made


def test_flowers_settings_name_the_server_and_its_authority(tmp_path, flower):
    settings = tomllib.loads((tmp_path / "home" / "config.toml").read_text())
    path = str(tmp_path / 'a "strange" folder' / "ca.crt")
    assert settings == {"superlink": {"here": {"address": "127.0.0.1:8443", "root-certificates": path}}}


def test_what_flower_refuses_is_said_in_its_words(flower, trial):
    flower.ask("supernode", "register", str(trial / "clients" / "client-0.pub"))
    with pytest.raises(FlowerError, match=r"^flwr supernode: \[code: 23\] Public key already in use\.$"):
        flower.ask("supernode", "register", str(trial / "clients" / "client-0.pub"))


@pytest.fixture
def folder(tmp_path, trial) -> Path:
    """The public keys of client-0 and client-1."""
    return trial / "clients"


def agree(tmp_path: Path, flower: Flower, folder: Path) -> list[str]:
    """What a server that starts anew does."""
    return Registry(tmp_path / "clients.json", flower).agree(folder)


def calls(tmp_path: Path) -> list[str]:
    """What Flower was asked since the last time."""
    file = tmp_path / "flower" / "calls"
    found = [" ".join(line.split()[:2]) for line in file.read_text().splitlines()]
    file.write_text("")
    return found


def test_keys_are_registered_once(tmp_path, flower, folder):
    assert agree(tmp_path, flower, folder) == ["client-0: registered", "client-1: registered"]
    assert calls(tmp_path) == ["supernode register"] * 2
    assert agree(tmp_path, flower, folder) == []
    assert calls(tmp_path) == ["supernode list"]
    assert Registry(tmp_path / "clients.json", flower).statuses() == {
        "client-0": "registered",
        "client-1": "registered",
    }


def test_a_key_that_is_gone_is_unregistered_and_not_taken_again(tmp_path, flower, folder):
    agree(tmp_path, flower, folder)
    key = (folder / "client-1.pub").read_bytes()
    (folder / "client-1.pub").unlink()
    assert agree(tmp_path, flower, folder) == ["client-1: unregistered, for its key is gone"]
    assert agree(tmp_path, flower, folder) == []
    (folder / "client-1.pub").write_bytes(key)
    assert agree(tmp_path, flower, folder) == [
        "client-1: its key was unregistered and is not taken again: it needs a new one"
    ]


def test_a_key_may_be_given_another_name(tmp_path, flower, folder):
    agree(tmp_path, flower, folder)
    (folder / "client-1.pub").rename(folder / "hospital-b.pub")
    assert agree(tmp_path, flower, folder) == []
    assert set(Registry(tmp_path / "clients.json", flower).statuses()) == {"client-0", "hospital-b"}


def test_nobody_is_unregistered_while_the_folder_is_empty_or_has_a_bad_file(tmp_path, flower, folder):
    agree(tmp_path, flower, folder)
    key = (folder / "client-1.pub").read_bytes()
    (folder / "client-1.pub").write_text("half a k")
    said = agree(tmp_path, flower, folder)
    assert said[0].startswith(f"{folder / 'client-1.pub'}: expected a public ECDSA key")
    assert said[1:] == [f"{folder}: as it is now nobody is unregistered"]
    for file in folder.iterdir():
        file.unlink()
    assert agree(tmp_path, flower, folder) == [f"{folder}: as it is now nobody is unregistered"]
    (folder / "client-1.pub").write_bytes(key)
    assert agree(tmp_path, flower, folder) == ["client-0: unregistered, for its key is gone"]


def test_a_key_that_flower_noted_and_we_did_not_is_found_again(tmp_path, flower, folder):
    agree(tmp_path, flower, folder)
    known = json.loads((tmp_path / "clients.json").read_text())
    known = {key: entry for key, entry in known.items() if entry["name"] == "client-0"}
    (tmp_path / "clients.json").write_text(json.dumps(known))
    assert agree(tmp_path, flower, folder) == ["client-1: registered"]
    assert {entry["node"] for entry in json.loads((tmp_path / "clients.json").read_text()).values()} == {"1", "2"}


def test_with_a_new_database_all_are_registered_anew(tmp_path, flower, folder):
    agree(tmp_path, flower, folder)
    (tmp_path / "flower" / "nodes.json").unlink()
    assert agree(tmp_path, flower, folder) == ["client-0: registered", "client-1: registered"]


def test_what_somebody_else_unregisters_is_noticed(tmp_path, flower, folder):
    agree(tmp_path, flower, folder)
    flower.ask("supernode", "unregister", "1")
    assert agree(tmp_path, flower, folder) == [
        "client-0: its key was unregistered and is not taken again: it needs a new one"
    ]


def test_two_files_with_one_key_are_one_too_many(folder):
    (folder / "twin.pub").write_bytes((folder / "client-0.pub").read_bytes())
    found, wrong = read_keys(folder)
    assert sorted(found.values()) == ["client-0", "client-1"]
    assert wrong == [f"{folder / 'twin.pub'}: expected a key of its own, got that of client-0.pub"]


# --- following a run


def logs(tmp_path: Path, *texts: str, state: str = "running") -> None:
    """What the run's log is, each time it is read."""
    (tmp_path / "flower" / "logs.json").write_text(json.dumps(texts))
    (tmp_path / "flower" / "state").write_text(state)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(submission, "PAUSE", 0.01)


def test_a_run_is_followed_to_its_exit_code(tmp_path, flower):
    info = "\x1b[92mINFO \x1b[0m:      "
    logs(tmp_path, f"{info}Start\nround 1/2\n\n table\nexit code: 0\n{info}bye\nTraceback\n")
    shown: list[str] = []
    assert submission.follow(flower, "7", shown.append) == 0
    assert shown == ["round 1/2", "", " table", "exit code: 0"]


def test_of_a_mistake_the_stack_is_shown(tmp_path, flower):
    logs(tmp_path, "exit code: 1\nTraceback\n  KeyError\n")
    shown: list[str] = []
    assert submission.follow(flower, "7", shown.append) == 1
    assert shown == ["exit code: 1", "Traceback", "  KeyError"]


def test_a_broken_connection_repeats_and_loses_no_line(tmp_path, flower):
    logs(tmp_path, "round 1\nrou", "round 1\nround 2\n", "round 1\nround 2\nround 3\nexit code: 3\n")
    shown: list[str] = []
    assert submission.follow(flower, "7", shown.append) == 3
    assert shown == ["round 1", "round 2", "round 3", "exit code: 3"]


@pytest.mark.parametrize("state", ["finished:failed", "finished:stopped"])
def test_a_run_that_ends_without_a_word_has_failed(tmp_path, flower, state):
    logs(tmp_path, "round 1\n", state=state)
    with pytest.raises(FederationError, match=rf"run 7: Flower says {state}, and the run itself nothing"):
        submission.follow(flower, "7", lambda line: None)


def test_a_run_that_there_never_was_is_not_waited_for(tmp_path, flower):
    logs(tmp_path, "")
    (tmp_path / "flower" / "unknown").touch()
    with pytest.raises(InputError, match=r"^run 7: the server knows of no such run$"):
        submission.follow(flower, "7", lambda line: None)


def test_a_superlink_that_stays_away_is_given_up(tmp_path, flower):
    logs(tmp_path, "round 1\n")
    (tmp_path / "flower" / "gone").touch()
    with pytest.raises(submission.LostSight, match=r"run 7: lost sight of it: flwr list: Connection"):
        submission.follow(flower, "7", lambda line: None, patience=0.3)


@pytest.mark.parametrize(("code", "error"), [(2, InputError), (3, FederationError), (1, FederationError)])
def test_the_command_ends_as_the_run_did(code, error):
    submission.expect_success("7", 0)
    with pytest.raises(error, match=r"run 7: .*as it says above"):
        submission.expect_success("7", code)


# --- processes that last


SLEEPER = "import sys, time; print('up', flush=True); time.sleep(600)"


def test_a_process_ends_with_who_started_it(tmp_path):
    """And that one is killed, which nobody can prepare for."""
    (tmp_path / "sleeper.py").write_text("from fedxmr.processes import end_with_parent\nend_with_parent(1)\n" + SLEEPER)
    starter = textwrap.dedent(
        f"""
        import os, sys
        from pathlib import Path
        from fedxmr import processes
        processes.ROOT = Path({str(tmp_path)!r})
        started = processes.start("sleeper", [], {{**os.environ, "PYTHONPATH": {str(ROOT)!r}}}, piped=True)
        started.stdout.readline()
        print(started.pid, flush=True)
        started.wait()
        """
    )
    with subprocess.Popen([sys.executable, "-c", starter], cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert child.is_running()
        process.send_signal(signal.SIGKILL)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_process_is_ended_with_all_it_started(tmp_path):
    """One in another session, one that was left behind by its parent, and both deaf to SIGTERM."""
    (tmp_path / "family.py").write_text(
        textwrap.dedent(
            f"""
            import os, signal, subprocess, sys
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            code = {SLEEPER!r}
            away = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL)
            middle = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]], " \\
                     "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
            left = subprocess.run([sys.executable, "-c", middle, code], capture_output=True, text=True, check=True)
            print(away.pid, left.stdout.strip(), flush=True)
            signal.pause()
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = processes.start("family", [], environment, piped=True)
    assert process.stdout is not None
    family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(family) == 2
    processes.stop(process, grace=0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    until(lambda: not any(member.is_running() for member in family))


def test_flowers_processes_send_and_install_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    monkeypatch.setenv("no_proxy", "example.org")
    environment = processes.environment(tmp_path, OMP_NUM_THREADS="2")
    assert environment["FLWR_TELEMETRY_ENABLED"] == environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"
    assert "FORWARDED_ALLOW_IPS" not in environment  # who may say where a request comes from


# --- a client that is looked after


class Enough(Exception):
    """The test has seen enough."""


def test_pauses_grow_while_lives_are_short_and_begin_anew_after_a_long_one(capsys):
    lengths = [0.0] * (len(PAUSES) + 2) + [supernode.LONG, 0.0]
    now = 0.0
    paused: list[float] = []

    def live() -> str:
        nonlocal now
        if not lengths:
            raise Enough
        now += lengths.pop(0)
        return "it ended"

    with pytest.raises(Enough):
        keep_alive(live, paused.append, lambda: now)
    assert paused == [*PAUSES, PAUSES[-1], PAUSES[-1], PAUSES[0], PAUSES[1]]
    assert capsys.readouterr().out.splitlines()[0] == "it ended; starting again in 1 s"


@pytest.mark.parametrize(
    ("says", "code", "why"),
    [
        (
            "Exit Code: 305\\n[code: 2004] Failed to activate SuperNode.",
            1,
            "the server does not accept this client's key",
        ),
        ("SuperNode terminated gracefully.", 0, "the server does not know its key any more"),
        ("KeyError: 3", 1, "the SuperNode has ended with exit code 1"),
        ("x", None, "the SuperNode has ended by SIGKILL"),
    ],
)
def test_why_a_supernode_has_ended_is_said(tmp_path, monkeypatch, capsys, trial, data, says, code, why):
    end = "os.kill(os.getpid(), 9)" if code is None else f"os._exit({code})"
    (tmp_path / "fake.py").write_text(f"import os, sys\nprint({says!r}.replace('\\\\n', chr(10)), flush=True)\n{end}\n")
    start = processes.start

    def started(module: str, arguments: list[str], environment: dict[str, str], *, piped: bool):
        return start("fake", arguments, {**environment, "PYTHONPATH": str(tmp_path)}, piped=piped)

    monkeypatch.setattr(supernode, "start", started)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        node = Node(0, Address(*listening.getsockname()), data, tmp_path / "state", None)
        assert why in live(node)
    assert ("KeyError: 3" in capsys.readouterr().out) == ("KeyError" in says)


def test_a_server_that_is_not_there_costs_no_start(tmp_path, data):
    node = Node(0, Address("127.0.0.1", free_port()), data, tmp_path, None)
    assert "cannot be reached: Connection refused" in live(node)


def test_what_a_supernode_says_is_shown_from_when_it_is_connected(capsys):
    voice = Voice(Address("127.0.0.1", 8443))
    for line in ("\x1b[92mINFO \x1b[0m:  Starting", "INFO : SuperNode ID: 17", "INFO : [RUN 3]"):
        voice.hear(line)
    assert capsys.readouterr().out.splitlines() == [
        "connected to 127.0.0.1:8443 as node 17",
        "INFO :  Starting",
        "INFO : SuperNode ID: 17",
        "INFO : [RUN 3]",
    ]
    assert why_ended(voice.last) is None


def test_a_node_says_who_it_is_and_where_its_files_are(tmp_path, trial):
    node = Node(2, Address("server.example.org", 8443), tmp_path / "my data", tmp_path / "s", trial / "client-0", 3)
    line = node.arguments()
    config = f'partition-id=2 data-path="{tmp_path / "my data"}" state-dir="{tmp_path / "s" / "runs"}"'
    assert line[line.index("--node-config") + 1] == config
    assert line[line.index("--auth-supernode-private-key") + 1] == str(trial / "client-0" / "client-0.key")
    assert line[line.index("--root-certificates") + 1] == str(trial / "client-0" / "ca.crt")
    assert line[line.index("--host") + 1] == "127.0.0.1"
    assert "--insecure" not in line
    assert node.environment()["OMP_NUM_THREADS"] == "3"

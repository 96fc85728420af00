"""The engine `ray`, with real actors: the bytes of `local`, recovery from deaths, and nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedxmr import commands, engines
from fedxmr.commands import SWIFT
from fedxmr.config import RuntimeConfig
from fedxmr.engines import cluster
from fedxmr.engines import ray as engine
from fedxmr.errors import FederationError
from fedxmr.recording import prepare
from fedxmr.simulate import simulate
from fedxmr.sources import dataset, parts
from tests.federations import SMALL, TOY, configured, federate, same_bytes
from tests.toy import Toy

ROOT = Path(__file__).resolve().parents[2]
BASE = (*SMALL, "federation.rounds=5", "federation.checkpoint_every=2")
ON_RAY = ("runtime.engine=ray", "runtime.device=cpu")
UNEVEN = (
    *(a for a in TOY if not a.startswith("dataset.items")),
    "dataset.items=61",  # 21, 20 and 20: client 0's count of items seen is its own
    "strategy.joint_fraction=1.0",
    "federation.rounds=4",
    "federation.checkpoint_every=1",
    *ON_RAY,
)
IN_ROUND_3 = "126"


# Ray ends its processes without waiting for them, and leaves files open
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    gc.collect()  # here, where the warnings that this brings are ignored
    assert not ray.is_initialized()
    assert not list(Path("/dev/shm").glob("*plasma*"))
    assert left_after(20, ray_processes(os.getpid())) == []


def ray_processes(of: int) -> set[psutil.Process]:
    """Ray's processes among those a process has started."""
    found = set()
    for process in psutil.Process(of).children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if any(
                name in line for name in ("ray::", "/raylet/raylet", "gcs_server", "/ray/dashboard/", "/log_monitor")
            ):
                found.add(process)
    return found


def left_after(seconds: float, processes: set[psutil.Process]) -> list[int]:
    """Those that do not end in time; one that has, and that nobody has waited for yet, has ended."""
    end = time.monotonic() + seconds
    while (left := [p.pid for p in processes if lives(p)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


@pytest.mark.parametrize(
    "assignments",
    [
        ("strategy=fedcmr",),
        ("strategy=fedavg", "federation.clients=5", "federation.sample=2", "runtime.memory_budget=1B"),
        ("strategy=fedcmr", "federation.clients=6", "federation.dropout=0.3", "evaluation.clients=3"),
    ],
    ids=["fedcmr", "sampled, states in files", "dropout"],
)
def test_the_same_bytes_with_one_worker_and_with_two_as_with_local(tmp_path, assignments):
    federate(tmp_path / "local", *assignments, "runtime.engine=local", base=BASE)
    for workers in (1, 2):
        out = tmp_path / f"ray{workers}"
        summary = federate(out, *assignments, *ON_RAY, f"runtime.workers={workers}", base=BASE)
        assert same_bytes(tmp_path / "local", out)
        assert summary["engine"] == "ray"
        environment = json.loads((out / "environment.json").read_text())
        assert (environment["workers"], environment["threads"]) == (workers, 1)
        assert not (out / "states").exists()
        seconds = summary["seconds"]
        assert seconds["fit"] > 0
        assert sum(s for part, s in seconds.items() if part != "total") == pytest.approx(seconds["total"], abs=1e-3)


def test_flowers_own_fedavg_runs_unchanged_on_workers(tmp_path):
    server, found = ServerApp(), {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
        result = strategy.start(grid, ArrayRecord([np.zeros(2)]), num_rounds=2)
        found["arrays"] = result.arrays.to_numpy_ndarrays()[0]

    config = configured(*ON_RAY, "runtime.workers=2")
    prepare(tmp_path / "run", config, dataset(config), parts(config), overwrite=False)
    run_config = {"config": config.to_yaml(), "out": str(tmp_path / "run")}
    engine.run(server, "tests.integration.test_carrier:client", config, run_config)
    np.testing.assert_allclose(found["arrays"], [4.0, 4.0])  # two rounds of the mean of 1, 2 and 3


def test_a_worker_that_dies_is_recovered_from(tmp_path):
    dies = f"learner.misbehaves={{'{IN_ROUND_3}': die once}}"
    federate(tmp_path / "whole", "runtime.workers=2", base=UNEVEN)
    summary = federate(tmp_path / "run", dies, f"learner.once={tmp_path / 'died'}", "runtime.workers=2", base=UNEVEN)
    assert (tmp_path / "died").exists()
    assert [(entry["round"], entry["to"]) for entry in summary["recovered"]] == [(3, 2)]
    assert summary["failed"] == []
    assert same_bytes(tmp_path / "whole", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/client 0")] == [1, 2, 3, 4]


def test_a_client_under_which_its_worker_dies_every_time_ends_the_run(tmp_path):
    dies = f"learner.misbehaves={{'{IN_ROUND_3}': die}}"
    with pytest.raises(FederationError, match="client 0 failed in round 3: its worker died 3 times"):
        federate(tmp_path / "run", dies, base=UNEVEN)


@pytest.mark.parametrize("how", ["hang", "raise"])
def test_a_failing_client_ends_the_run_naming_it(tmp_path, how):
    misbehaves = (f"learner.misbehaves={{'{IN_ROUND_3}': {how}}}", "federation.deadline=2")
    reason = {"hang": "no answer within 2 s", "raise": "RuntimeError: the toy broke"}[how]
    with pytest.raises(FederationError) as caught:
        federate(tmp_path / "run", *misbehaves, base=UNEVEN)
    assert str(caught.value) == f"client 0 failed in round 3: {reason}"


@pytest.mark.parametrize("how", ["hang", "raise"])
def test_a_tolerated_failure_is_left_out_listed_and_asked_again_in_the_next_round(tmp_path, how):
    misbehaves = (f"learner.misbehaves={{'{IN_ROUND_3}': {how} once}}", f"learner.once={tmp_path / how}")
    tolerant = ("federation.tolerate_failures=true", "federation.deadline=2", "runtime.workers=2")
    summary = federate(tmp_path / "run", *misbehaves, *tolerant, base=UNEVEN)
    assert [(entry["round"], entry["client"]) for entry in summary["failed"]] == [(3, 0)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = {
        round: [line["client"] for line in lines if line["round"] == round and "loss" in line] for round in (3, 4)
    }
    assert trained == {3: [1, 2], 4: [0, 1, 2]}
    # the same bytes as where the failure is an exception in this process
    other = (f"learner.misbehaves={{'{IN_ROUND_3}': raise once}}", f"learner.once={tmp_path / 'local'}")
    local = tuple(a for a in UNEVEN if a not in ON_RAY)
    federate(tmp_path / "other", *other, "federation.tolerate_failures=true", "federation.deadline=2", base=local)
    mine, its = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "other"))
    assert mine["shared_sha256"] == its["shared_sha256"]
    assert mine["models_sha256"] == its["models_sha256"]


def test_a_client_that_cannot_start_on_a_worker_ends_the_run_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDXMR_TEST_DRIVER", str(os.getpid()))
    here = ("learner.name=tests.integration.test_ray:Here", *ON_RAY)
    with pytest.raises(FederationError, match="a client failed at the start: RuntimeError: not here"):
        federate(tmp_path / "run", *here, base=TOY)


class Here(Toy):
    """A learner that the driver can build, and no other process."""

    def __init__(self, *arguments) -> None:
        if str(os.getpid()) != os.environ["FEDXMR_TEST_DRIVER"]:
            raise RuntimeError("not here")
        super().__init__(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ray-address", "nonsense"], "runtime.ray_address: expected host:port"),
        (["--ray-address", "127.0.0.1:9"], "runtime.ray_address: nobody answers at 127.0.0.1:9"),
        (
            ["--engine", "ray", "--gpus-per-client", "0.5", "--device", "cpu"],
            "runtime.gpus_per_client: 0.5 cannot be had",
        ),
        (["--engine", "ray", "--cpus-per-client", "1000"], "1000 cores for a worker are more than any machine has"),
        (["--engine", "local", "--workers", "2"], "runtime: workers: only the engine ray has it"),
        (["--workers", "4"], "runtime.workers: expected at most the 3 clients of a round, got 4"),
        (["--engine", "ray", "--device", "cuda:1"], "device: a worker sees its own GPU alone"),
        (["--workers", "0"], "runtime.workers: input should be greater than or equal to 1"),
        (["--gpus-per-client", "1.5"], "runtime.gpus_per_client: above 1, expected a whole number of GPUs"),
        (["--memory-budget", "much"], "runtime.memory_budget"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(tmp_path, capsys, arguments, says):
    out = ["--out", str(tmp_path / "run"), "--no-pictures"]
    assert commands.run(simulate, [*SMALL, *arguments, *out]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_a_user_has_set_for_torch_is_left_to_workers(monkeypatch):
    seen = []

    def note(*_, **__):
        seen.append({name: os.environ[name] for name in SWIFT})

    monkeypatch.setattr(cluster, "_init", note)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    with cluster.opened(RuntimeConfig()):
        pass
    assert seen == [{**SWIFT, "GOMP_SPINCOUNT": "7"}]
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_the_choice_of_the_engine_is_told_with_its_reason(monkeypatch):
    def chosen(**runtime) -> str:
        return str(engines.choose(configured(*(f"runtime.{k}={v}" for k, v in runtime.items())).runtime))

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a cluster is never joined by accident
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen() == "local (auto: no GPU, no Ray address)"
    assert chosen(workers=2) == "ray (auto: workers is given)"
    assert chosen(ray_address="a:1") == "ray (auto: ray_address is given)"
    assert chosen(engine="ray") == "ray"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert chosen() == "ray (auto: there is a GPU)"
    assert chosen(engine="local") == "local"
    assert chosen(device="cuda:1").startswith("local")
    assert chosen(device="cpu") == "local (auto: no GPU, no Ray address)"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    # a process started in the background, as these tests may be, ignores Ctrl-C and hands that on
    listen = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; runpy.run_module('fedxmr.simulate', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, *SMALL, "--no-pictures", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, env={**os.environ, **environment}, **pipes)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("when", ["checkpoint", "config.yaml"], ids=["in a round", "while Ray starts"])
def test_no_way_of_ending_leaves_a_process_or_shared_memory_behind(tmp_path, number, code, when):
    shared = shared_memory()
    out = tmp_path / "run"
    arguments = ("--engine", "ray", "--device", "cpu", "--workers", "2", "federation.rounds=100000", "--out", str(out))
    with start(*arguments, TMPDIR=str(tmp_path)) as process:
        try:
            wait_for(out / when, process)
            if when == "config.yaml":
                wait_for_ray(process)
            started = ray_processes(process.pid)
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, error
    if number != signal.SIGKILL:
        assert "Traceback" not in error
        assert f"what was measured so far is in {out}" in error.splitlines()[-1]
        assert not list(tmp_path.glob("fedxmr-*"))
    # of a driver that was killed, Ray's processes find out by themselves
    assert left_after(90 if number == signal.SIGKILL else 10, started) == []
    assert shared_memory() <= shared


@pytest.mark.parametrize("pause", [0.01, 0.2])
def test_a_second_ctrl_c_does_not_disturb_the_closing(tmp_path, pause):
    out = tmp_path / "run"
    arguments = ("--engine", "ray", "--device", "cpu", "federation.rounds=100000", "--out", str(out))
    with start(*arguments, TMPDIR=tempfile.mkdtemp(prefix="t", dir="/tmp")) as process:
        try:
            wait_for(out / "checkpoint", process)
            started = ray_processes(process.pid)
            for _ in range(4):
                process.send_signal(signal.SIGINT)
                time.sleep(pause)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert left_after(10, started) == []


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_death_of_ray_itself_ends_the_run_in_one_line(tmp_path, name):
    out = tmp_path / "run"
    arguments = ("--engine", "ray", "--device", "cpu", "federation.rounds=100000", "--out", str(out))
    with start(*arguments) as process:
        try:
            wait_for(out / "checkpoint" / "round-5", process)
            (vital,) = [child for child in psutil.Process(process.pid).children() if child.name() == name]
            vital.kill()
            _, error = process.communicate(timeout=90)
        finally:
            process.kill()
    assert process.returncode == commands.FAILED
    assert "error: engine ray: one of Ray's own processes, raylet or gcs_server, has died" in error
    assert error.endswith(f"python -m fedxmr.simulate --resume {out}\n")


def test_something_else_at_the_address_of_a_cluster_is_told_within_a_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fedxmr.engines.cluster.PATIENCE", 3.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        out = ["--out", str(tmp_path / "run")]
        assert commands.run(simulate, [*SMALL, "--ray-address", address, *out]) == commands.BAD_INPUT
    assert f"at {address}, and its token where it has one" in capsys.readouterr().err


def wait_for_ray(process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not ray_processes(process.pid):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_run_is_resumed_with_the_same_bytes(tmp_path):
    out = tmp_path / "run"
    arguments = ("--engine", "ray", "--device", "cpu", "federation.rounds=60", "federation.checkpoint_every=2")
    with start(*arguments, "--out", str(out)) as process:
        try:
            wait_for(out / "checkpoint" / "round-4", process)
        finally:
            process.kill()
    assert commands.run(simulate, ["--resume", str(out), "--no-pictures"]) == commands.OK
    federate(tmp_path / "whole", "federation.rounds=60", "federation.checkpoint_every=2")
    assert same_bytes(tmp_path / "whole", out)


def test_a_stranger_cannot_reach_the_private_ray(tmp_path):
    out = tmp_path / "run"
    with start("--engine", "ray", "--device", "cpu", "federation.rounds=100000", "--out", str(out)) as process:
        try:
            wait_for(out / "checkpoint", process)
            (gcs,) = [c for c in psutil.Process(process.pid).children() if "gcs_server" in " ".join(c.cmdline())]
            ports = {c.laddr.port for c in gcs.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            asks = (
                "import sys\nfrom ray._raylet import GcsClient\n"
                "GcsClient(address=sys.argv[1]).internal_kv_keys(b'', timeout=5)\nprint('in')"
            )
            for port in ports:
                command = [sys.executable, "-c", asks, f"127.0.0.1:{port}"]
                asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
                assert "in" not in asked.stdout.split()
                assert "Unauthenticated" in asked.stderr or "auth" in asked.stderr.lower()
            assert ports
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@pytest.mark.long
def test_twenty_killed_workers_in_one_run_change_no_byte(tmp_path):
    arguments = ("federation.rounds=300", "federation.epochs=20", "federation.checkpoint_every=5")
    federate(tmp_path / "whole", *arguments)
    killed, ended, rng = [], threading.Event(), np.random.default_rng(0)

    def kill_one() -> None:
        workers: list[psutil.Process] = []
        while not workers and not ended.wait(0.01):
            workers = [p for p in psutil.Process().children(recursive=True) if "ray::Worker" in " ".join(p.cmdline())]
        if workers:
            victim = workers[rng.integers(len(workers))]
            victim.kill()
            killed.append(victim.pid)

    def kill_some() -> None:
        """Ten times two: the first in a round, the second some time later, most often while the run recovers."""
        for round in sorted(rng.choice(range(5, 280), 10, replace=False)):
            while last_round(tmp_path / "run") < round and not ended.wait(0.01):
                pass
            kill_one()
            ended.wait(rng.uniform(0.0, 1.5))
            kill_one()

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        summary = federate(tmp_path / "run", *arguments, *ON_RAY, "runtime.workers=2")
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 20
    assert summary["recovered"]
    assert same_bytes(tmp_path / "whole", tmp_path / "run")


def last_round(run: Path) -> int:
    """The last round in a run's records."""
    with suppress(OSError, ValueError):  # not there yet, or half a line
        if lines := (run / "metrics.jsonl").read_text().splitlines():
            return int(json.loads(lines[-1])["round"])
    return 0

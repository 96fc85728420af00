"""A Ray cluster of several nodes on this machine: nodes share no disk as far as the engine knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.federations import federate, same_bytes
from tests.integration.test_ray import SMALL, left_after, ray_processes

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ("federation.rounds=200", "federation.epochs=5", "federation.checkpoint_every=5")

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Cluster]:
    """A head that has no room for workers, and two nodes that have room for one each."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # of a private Ray that this process had
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
        yield made
    finally:
        started = ray_processes(os.getpid())
        made.shutdown()
        assert left_after(20, started) == []


def simulate(cluster: Cluster, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedxmr.simulate", *SMALL, *arguments, "--no-pictures", "--device", "cpu"]
    command += ["--ray-address", cluster.address, "--out", str(out)]
    scratch = {"TMPDIR": tempfile.gettempdir()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, env={**os.environ, **scratch}, **pipes)


def scratch_folders() -> set[Path]:
    """What workers that do not have the run folder keep on their machines."""
    return set(Path(tempfile.gettempdir()).glob(f"fedxmr-{16 * '?'}/*"))


def test_a_cluster_gives_the_same_bytes_and_keeps_nothing(tmp_path, cluster):
    before = scratch_folders()
    with simulate(cluster, tmp_path / "run", "federation.checkpoint_every=2", "runtime.memory_budget=1B") as process:
        shown, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "workers 2, machines 2" in shown
    federate(tmp_path / "whole", "federation.checkpoint_every=2")
    assert same_bytes(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint" / "round-2" / "client-1.safetensors").is_file()
    assert (tmp_path / "run" / "clients" / "2" / "selected.safetensors").is_file()
    assert scratch_folders() == before


@pytest.mark.long
def test_a_node_lost_in_mid_round_with_its_states_changes_no_byte(tmp_path, cluster):
    out, before = tmp_path / "run", scratch_folders()
    with simulate(cluster, out, *ARGUMENTS) as process:
        try:
            wait_for(out / "checkpoint" / "round-20", process)
            lost = cluster.nodes[1]
            # the states of the workers on that node: they are named after the worker's process
            raylet = lost.all_processes["raylet"][0].process.pid
            workers = {str(p.pid) for p in psutil.Process(raylet).children(recursive=True)}
            states = [folder for folder in scratch_folders() - before if folder.name in workers]
            assert states
            cluster.remove_node(lost, allow_graceful=False)
            for folder in states:
                shutil.rmtree(folder)
            _, error = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, error
    federate(tmp_path / "whole", *ARGUMENTS)
    assert same_bytes(tmp_path / "whole", out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["recovered"]
    assert summary["failed"] == []
    assert scratch_folders() == before


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)

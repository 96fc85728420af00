"""The benchmarks compare what does the same work, and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import jobs
from benchmarks.suite import BENCHMARKS
from benchmarks.timing import Command, Measured, Ran, in_turn
from fedxmr.errors import FederationError
from fedxmr.simulate import run

ROOT = Path(__file__).resolve().parents[2]


def small(folder: Path, strategy: str, **changes: object) -> Path:
    """A job that takes a second."""
    options = {
        "dims": (12, 8),
        "items": (200, 60, 60),
        "clients": 3,
        "rounds": 4,
        "epochs": 2,
        "batch_size": 20,
        "hidden": 32,
        "width": 16,
        "threads": 1,
    }
    return jobs.prepare(folder, strategy, **{**options, "strategy": strategy, **changes})


def reference(name: str, job: Path) -> float:
    """The validation mAP that a reference program ends with."""
    command = [sys.executable, "-m", f"benchmarks.references.{name}", str(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])["map"]


@pytest.mark.parametrize("strategy", ["fedcmr", "fedavg"])
@pytest.mark.parametrize("uneven", [200, 197])
def test_the_bare_loop_does_what_a_run_does(strategy, uneven, one_thread, tmp_path):
    """To the last digits: what differs is the order of a few sums."""
    job = small(tmp_path, strategy, items=(uneven, 60, 60))
    summary = run(jobs.as_config(jobs.read(job)), tmp_path / "run", pictures=False)
    ours = summary["validation"]["last"]["mean"]["average"]
    assert reference("bare", job) == pytest.approx(ours, abs=1e-9)


def test_the_bare_loop_samples_the_clients_of_a_run(one_thread, tmp_path):
    job = small(tmp_path, "fedavg", clients=10, sample=3, evaluate_every=1)
    summary = run(jobs.as_config(jobs.read(job)), tmp_path / "run", pictures=False)
    # FedAvg's model is the same for all, whoever is measured
    assert reference("bare", job) == pytest.approx(summary["validation"]["last"]["mean"]["average"], abs=1e-9)


@pytest.mark.long
def test_flowers_simulation_learns_as_well_as_the_bare_loop(tmp_path):
    """Its batches are others."""
    job = small(tmp_path, "fedavg", rounds=6)
    assert reference("flower_simulation", job) == pytest.approx(reference("bare", job), abs=0.1)


def test_commands_run_in_turn_and_a_ratio_is_of_one_turn():
    slow, quick = (Command(["-c", f"import time; time.sleep({s}); print({s})"]) for s in (0.2, 0.0))
    ran = in_turn({"slow": slow, "quick": quick}, 3)
    assert [len(of) for of in ran.values()] == [3, 3]
    assert ran["slow"][0].said == "0.2\n"
    assert ran["quick"][0].peak_bytes > 2**20
    one = Measured.ratio("a", "< 1", [Ran(2.0, 0, ""), Ran(9.0, 0, "")], [Ran(1.0, 0, ""), Ran(3.0, 0, "")])
    assert one.values == [2.0, 3.0]
    assert one.middle == 2.5
    assert one.cells() == ["a", "< 1", "2.5 x", "2 to 3", "5.50 s", "2.00 s"]


def test_a_command_that_fails_says_why():
    with pytest.raises(FederationError, match=r"exit code 3 of .*\n.*no such thing"):
        Command(["-c", "print('no such thing'); raise SystemExit(3)"]).run()


@pytest.mark.long
def test_the_benchmarks_are_a_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "metric", "--turns", "1", "--out", tmp_path / "out"]
    page = tmp_path / "page.md"
    ran = subprocess.run([*command, "--into", page], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "out" / "metric.json").read_text())
    assert len(found["measured"][0]["values"]) == 5
    assert {"commit", "cores", "packages", "load_before", "command"} <= found.keys()
    assert re.search(r"<!-- begin: metric -->\n`python -m benchmarks metric .*\| mAP of 5000", page.read_text(), re.S)


def test_an_unknown_benchmark_gets_one_line():
    command = [sys.executable, "-m", "benchmarks", "metrics"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "metric" in ran.stderr


def test_every_benchmark_says_what_it_measures():
    assert all((of.__doc__ or "").strip() for of in BENCHMARKS.values())

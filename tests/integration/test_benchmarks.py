"""The benchmarks compare what does the same work, and run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks import jobs
from benchmarks.references.job import Job
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
    summary = run(jobs.as_config(Job.read(job)), tmp_path / "run", pictures=False)
    ours = summary["validation"]["last"]["mean"]["average"]
    assert reference("bare", job) == pytest.approx(ours, abs=1e-9)


def test_the_bare_loop_samples_the_clients_of_a_run(one_thread, tmp_path):
    job = small(tmp_path, "fedavg", clients=10, sample=3, evaluate_every=1)
    summary = run(jobs.as_config(Job.read(job)), tmp_path / "run", pictures=False)
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


INTERRUPTED = """
import signal, subprocess, sys, time
from pathlib import Path
here = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(here / "writing").write_text(str(below.pid))
(here / "writing").rename(here / "below")
try:
    time.sleep(60)
finally:
    (here / "tidied").touch()
"""


def test_an_interrupted_command_tidies_up_and_leaves_no_process(tmp_path):
    def interrupt():
        while not (tmp_path / "below").exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            Command(["-c", INTERRUPTED, tmp_path]).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "tidied").exists()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "below").read_text())).wait(10)  # it is killed, which takes a moment


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["metrics"], "metric"),
        (["metric", "--into", "nowhere/page.md"], "--into nowhere/page.md: expected a folder nowhere"),
        (["metric", "--into", "cut.md"], "expected '<!-- end: metric -->'"),
    ],
)
def test_what_cannot_be_done_gets_one_line_before_anything_is_measured(arguments, says, tmp_path):
    (tmp_path / "cut.md").write_text("<!-- begin: metric -->\n")
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False
    )
    assert (ran.returncode, ran.stderr.count("\n"), ran.stdout) == (2, 1, "")
    assert says in ran.stderr
    assert not (tmp_path / "build").exists()


def test_every_benchmark_says_what_it_measures():
    assert all((of.__doc__ or "").strip() for of in BENCHMARKS.values())

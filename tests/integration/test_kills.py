"""A run killed with all its processes, anywhere and again and again, is resumed to the bytes of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedxmr import commands
from tests.federations import SMALL, federate, same_bytes

ROOT = Path(__file__).resolve().parents[2]
DSCMR = (*SMALL, "strategy=fedcmr")
JFSE = (
    *(a for a in SMALL if not a.startswith("learner.")),
    "strategy=fedavg",
    "learner={name: jfse, hidden: 8, width: 4}",
)
LOCAL, RAY = ("runtime.engine=local",), ("runtime.engine=ray", "runtime.workers=2")


def attempt(events: int, out: Path, arguments: tuple[str, ...]) -> int:
    """Begin or resume a run that is killed at its event of that number, if it comes so far; how the process ended."""
    resume = ["--resume", str(out)] if (out / "config.yaml").exists() else ["--out", str(out), *arguments]
    command = [sys.executable, "-m", "tests.killed", str(events), str(out), *resume, "--no-pictures"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode in (commands.OK, -signal.SIGKILL), ended.stdout + ended.stderr
    return ended.returncode


def check(tmp_path: Path, rounds: int) -> None:
    """What came of the killed run is what came of the whole one."""
    assert same_bytes(tmp_path / "whole", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for tag in ("loss/client 0", "validation/mean/average", "bytes/up"):
        assert [e.step for e in events.Scalars(tag)] == list(range(1, rounds + 1)), tag
    assert not list((tmp_path / "run").rglob(".*")), "half a file was left"


@pytest.mark.parametrize("events", [2, 11, 40, 75])
def test_a_run_killed_anywhere_is_resumed(tmp_path, events):
    arguments = (*DSCMR, "federation.rounds=6", "federation.checkpoint_every=2")
    federate(tmp_path / "whole", base=arguments)
    assert attempt(events, tmp_path / "run", arguments) == -signal.SIGKILL
    assert attempt(0, tmp_path / "run", arguments) == commands.OK
    check(tmp_path, 6)


@pytest.mark.long
@pytest.mark.parametrize(("engine", "kills", "longest"), [(LOCAL, 20, 60), (RAY, 8, 60)], ids=["local", "ray"])
@pytest.mark.parametrize("learner", [DSCMR, JFSE], ids=["fedcmr with dscmr", "fedavg with jfse"])
def test_a_run_killed_again_and_again_is_resumed_each_time(tmp_path, learner, engine, kills, longest):
    arguments = (*learner, *engine, "federation.rounds=40", "federation.checkpoint_every=3")
    federate(tmp_path / "whole", base=(*learner, "federation.rounds=40", "federation.checkpoint_every=3"))
    rng = np.random.default_rng(0)
    for _ in range(kills):
        assert attempt(int(rng.integers(1, longest)), tmp_path / "run", arguments) == -signal.SIGKILL
    assert attempt(0, tmp_path / "run", arguments) == commands.OK
    check(tmp_path, 40)

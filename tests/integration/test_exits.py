"""However a run ends: a documented exit code, one clear line, one that says how to go on, and nothing lost.

tests/disk.py makes it happen, on small disks in a namespace of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedxmr import checkpoint, commands, sources
from fedxmr.simulate import simulate
from tests.federations import SMALL, TOY, federate, same_bytes

ROOT = Path(__file__).resolve().parents[2]
RESUME = "python -m fedxmr.simulate --resume"

FULL = "No space left on device"
FAST = {
    "later events": (3, f"{{out}}/events.out.tfevents.*: {FULL}", 2),
    "a client's state in a checkpoint": (3, f"client 1 failed at query.checkpoint: * {FULL} *client-1.safetensors'", 2),
    "no memory for a client's tensors": (3, "client 2 failed in round 4: RuntimeError: * can't allocate memory", 2),
}
SLOW = {
    "the first file": (2, f"error: {{out}}: cannot be written: {FULL}", None),
    "metrics before a checkpoint": (3, f"error: {{out}}/*: {FULL}", 0),
    "metrics after a checkpoint": (3, f"error: {{out}}/*: {FULL}", 2),
    "timings": (3, f"error: {{out}}/*: {FULL}", 2),
    "the first events": (3, f"{{out}}/events.out.tfevents.*: {FULL}", 0),
    "the folder of a checkpoint": (3, FULL, 2),
    "the server's state in a checkpoint": (3, f"error: {{out}}/checkpoint/.round-4/server.safetensors: * {FULL}", 2),
    "a client's state beyond the memory budget": (3, f"client 0 failed in round 3: * {FULL} *", 2),
    "a client's final models": (3, f"client 1 failed in round 7: * {FULL}", 6),
    "the summary": (3, f"error: {{out}}/summary.json: {FULL}", 6),
    "a picture": (3, f"error: {{out}}/pictures/*.png: {FULL}", "report"),
    "a picture in TensorBoard": (3, f"{{out}}/events.out.tfevents.*: {FULL}", "report"),
    "the report": (3, f"error: {{out}}/retrieval.json: {FULL}", "report"),
    "read-only checkpoints": (3, "error: {out}/checkpoint/.round-4: Read-only file system", 2),
    "a limit on files": (3, "error: {out}/metrics.jsonl: File too large", 2),
    "no memory for a client's objects": (3, "error: client 2 failed in round 4: MemoryError", 2),
    "no memory for the server": (3, "error: out of memory: * can't allocate memory", 2),
}
"""What happens -> exit code, what the error's line says, and the round of the checkpoint to go on from."""

Outcomes = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Scenario -> what was seen of it; all fast ones, or all slow ones, are run at once."""
    namespace = ["unshare", "-m" if os.getuid() == 0 else "-rm"]
    try:
        tried = subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"no disks of its own: {error}")
    if tried.returncode:
        pytest.skip(f"no disks of its own: {tried.stderr.decode().strip()}")

    @cache
    def run_all(*names: str) -> dict[str, Any]:
        folder = str(tmp_path_factory.mktemp("disks"))
        command = [*namespace, sys.executable, "-m", "tests.disk", folder, *names]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
        assert ran.returncode == 0, ran.stderr
        return dict(json.loads(ran.stdout))

    return lambda name: run_all(*(FAST if name in FAST else SLOW))[name]


def lines(shown: str) -> list[str]:
    """What is on standard error, but for the progress of rounds."""
    return [line for line in shown.splitlines() if not line.startswith("round ")]


def says(line: str, pattern: str) -> bool:
    """Whether the parts of a pattern, which stars divide, are in a line in this order."""
    at = 0
    return all((at := line.find(part.strip(), at)) >= 0 for part in pattern.split("*"))


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.long) for name in SLOW)])
def test_a_full_disk_or_no_memory_ends_a_run_in_one_line_and_costs_nothing(outcomes, name):
    code, pattern, after = (FAST | SLOW)[name]
    seen = outcomes(name)
    first, out = seen["first"], seen["out"]
    assert first["code"] == code, first["err"]
    error, *rest = lines(first["err"])
    assert says(error, pattern.format(out=out)), error
    kept = f"what was measured so far is in {out}; "
    assert rest == {
        None: [],
        0: [f"{kept}to go on from the start, as there is no checkpoint: {RESUME} {out}"],
        "report": [f"{kept}to go on with its report: {RESUME} {out}"],
    }.get(after, [f"{kept}to go on from the checkpoint of round {after}: {RESUME} {out}"])
    if after is None:
        assert seen["left"] == []
    if "still full" in seen:
        assert seen["still full"]["code"] == commands.FAILED
        assert len(lines(seen["still full"]["err"])) == 2
    assert seen["second"]["code"] == 0, seen["second"]["err"]
    assert seen["same"]
    assert seen["steps"] == [1, 2, 3, 4, 5, 6]
    assert seen["hidden"] == []
    assert len(seen["pictures"]) == (3 if "picture" in name else 0)


def test_every_scenario_is_looked_at():
    from tests.disk import SCENARIOS

    assert SCENARIOS.keys() == FAST.keys() | SLOW.keys()


STOPS = [*TOY, "federation.rounds=4", "federation.checkpoint_every=2", "strategy.joint_fraction=1.0"]
IN_ROUND_2, IN_ROUND_3 = "80", "120"


@pytest.mark.parametrize(
    ("at", "how", "checkpoints", "code", "says"),
    [
        (IN_ROUND_3, "interrupt", 2, commands.INTERRUPTED, "to go on from the checkpoint of round 2"),
        (IN_ROUND_2, "interrupt", 2, commands.INTERRUPTED, "to go on from the start, as there is no checkpoint"),
        (IN_ROUND_3, "raise", 2, commands.FAILED, "to go on from the checkpoint of round 2"),
        (IN_ROUND_2, "nan", 2, commands.FAILED, "to go on from the start, as there is no checkpoint"),
        (IN_ROUND_3, "raise", 0, commands.FAILED, "to go on from the start, as there is no checkpoint"),
    ],
)
def test_the_last_line_says_whether_and_how_a_run_can_go_on(tmp_path, capsys, at, how, checkpoints, code, says):
    out = tmp_path / "my run"  # a path that a shell would take apart
    misbehaves = [f"learner.misbehaves={{'{at}': {how}}}", f"federation.checkpoint_every={checkpoints}"]
    assert commands.run(simulate, [*STOPS, *misbehaves, "--out", str(out), "--no-pictures"]) == code
    error, last = lines(capsys.readouterr().err)
    assert error.startswith("error: ")
    assert last == f"what was measured so far is in {out}; {says}: {RESUME} '{out}'"


def test_tolerated_failures_with_every_round_standing_exit_0(tmp_path):
    tolerant = ["federation.tolerate_failures=true", f"learner.misbehaves={{'{IN_ROUND_3}': raise}}"]
    uneven = ["dataset.items=61", "federation.min_clients=1", "--out", str(tmp_path / "run"), "--no-pictures"]
    assert commands.run(simulate, [*STOPS, *tolerant, *uneven]) == commands.OK
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failed"]


def test_an_error_that_nobody_expected_is_shown_whole_and_its_last_line_says_how_to_go_on(tmp_path):
    code = (
        "from fedxmr import commands, recording\nfrom fedxmr.simulate import simulate\n"
        "def broken(*_): raise ZeroDivisionError('a bug')\n"
        "recording.Recorder.write_up_to = broken\ncommands.main(simulate)"
    )
    command = [sys.executable, "-c", code, *TOY, "--no-pictures", "--out", str(tmp_path / "run")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    bug, last = ran.stderr.splitlines()[-2:]
    assert bug == "ZeroDivisionError: a bug"
    assert last.endswith(f"to go on from the start, as there is no checkpoint: {RESUME} {tmp_path / 'run'}")


def test_a_reader_of_the_output_that_has_gone_ends_the_run_with_a_documented_code(tmp_path):
    """As `python -m fedxmr.simulate | head -1` may."""
    command = [sys.executable, "-m", "fedxmr.simulate", *SMALL, "--no-pictures", "--out", str(tmp_path / "run")]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ran = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
    finally:
        os.close(writing)
    assert ran.returncode == commands.FAILED
    assert b"Traceback" not in ran.stderr
    assert b"Broken pipe" in ran.stderr


def own_data(folder: Path) -> Path:
    (folder / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for modality in ("image", "text"):
        np.save(folder / "features" / f"{modality}.npy", rng.normal(size=(60, 4)))
    np.save(folder / "labels.npy", np.arange(60) % 3)
    np.savez(folder / "split.npz", train=np.arange(40), validation=np.arange(40, 50), test=np.arange(50, 60))
    return folder


def another_process() -> None:
    """What the next run finds in this one's caches of data: nothing."""
    for cached in (sources._dataset, sources._whole, sources._parts):
        cached.cache_clear()


def test_data_that_vanish_while_a_run_goes_on_and_before_its_resume_cost_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, out = own_data(tmp_path / "mine"), tmp_path / "run"
    base = (*(a for a in STOPS if not a.startswith("dataset.")), "dataset.name=./mine")
    federate(tmp_path / "whole", base=base)
    complete, stops = checkpoint.complete, iter([True, False, False])

    def vanish(*args: Any, **keywords: Any) -> None:
        complete(*args, **keywords)
        shutil.rmtree(data, ignore_errors=True)
        if next(stops):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "complete", vanish)
    another_process()
    assert commands.run(simulate, [*base, "--out", str(out), "--no-pictures"]) == commands.INTERRUPTED
    another_process()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert commands.run(simulate, ["--resume", str(out), "--no-pictures"]) == commands.BAD_INPUT
    assert capsys.readouterr().err == "error: mine: expected a folder, got nothing there\n"
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    own_data(data)
    assert commands.run(simulate, ["--resume", str(out), "--no-pictures"]) == commands.OK
    assert not data.exists()  # they vanished again, after the checkpoint of round 4
    assert same_bytes(tmp_path / "whole", out)


@pytest.mark.long
def test_a_read_only_run_folder_is_refused_in_one_line(tmp_path):
    """At the start and at a resume. To root permissions mean nothing, so it is a read-only mount."""
    out = tmp_path / "run"
    federate(out, "federation.rounds=4", "federation.checkpoint_every=2")
    (out / "retrieval.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    command = f"{sys.executable} -m fedxmr.simulate --no-pictures"
    script = (
        f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} || exit 77\n"
        f"{command} --resume {out} --rounds 6; echo code $?\n"
        f"{command} {SMALL[0]} --out {tmp_path}/new; echo code $?\n"
    )
    namespace = ["unshare", "-m" if os.getuid() == 0 else "-rm", "sh", "-c", script]
    try:
        ran = subprocess.run(namespace, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    except OSError as error:
        pytest.skip(f"no mounts of its own: {error}")
    if ran.returncode:
        pytest.skip(f"no mounts of its own: {ran.stderr.strip()}")
    assert [line for line in ran.stdout.splitlines() if line.startswith("code")] == ["code 2", "code 2"]
    assert ran.stderr.splitlines() == [
        f"error: {out}: cannot be written: Read-only file system",
        f"error: {tmp_path}/new: cannot be written: Read-only file system",
    ]
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

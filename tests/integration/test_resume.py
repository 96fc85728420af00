"""An interrupted run, resumed, ends with the same bytes as one that was left alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedxmr import checkpoint, commands
from fedxmr.errors import InputError
from fedxmr.simulate import run, simulate
from tests.federations import SMALL, TOY, configured, federate, same_bytes

ROOT = Path(__file__).resolve().parents[2]
BASE = (*SMALL, "federation.rounds=9", "federation.checkpoint_every=2")
ARGUMENTS = [*BASE, "--no-pictures"]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, messages: int) -> None:
    """Ctrl-C in the middle of a client's work, after so many training tasks."""
    from fedxmr.rounds import Client

    take_part, count = Client.take_part, iter(range(messages, -1, -1))

    def interrupted(self, task):
        if next(count, 1) == 0:
            raise KeyboardInterrupt
        return take_part(self, task)

    monkeypatch.setattr(Client, "take_part", interrupted)


@pytest.mark.parametrize(
    "assignments",
    [
        ("strategy=fedcmr",),
        ("strategy=fedavg", "evaluation.every=3"),
        ("strategy=fedcmr", "federation.clients=8", "federation.sample=2", "evaluation.clients=3"),
        ("strategy=local", "evaluation.every=0"),
        ("federation.clients=5", "federation.sample=3", "federation.dropout=0.3", "evaluation.clients=2"),
    ],
    ids=["fedcmr", "fedavg", "sampled", "local", "dropout"],
)
def test_a_resumed_run_has_the_bytes_of_an_undisturbed_one(tmp_path, monkeypatch, assignments):
    config = configured(*assignments, base=BASE)
    run(config, tmp_path / "whole", pictures=False)
    for stops in (7, 9, 5):  # three interruptions, the first before the first checkpoint where few take part
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, stops)
            if checkpoint.rounds(tmp_path / "broken"):
                run(config, None, resume=tmp_path / "broken", pictures=False)
            else:
                run(config, tmp_path / "broken", overwrite=True, pictures=False)
    run(config, None, resume=tmp_path / "broken", pictures=False)
    assert same_bytes(tmp_path / "whole", tmp_path / "broken")
    whole, broken = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "broken"))
    for summary in (whole, broken):
        summary.pop("seconds")
    assert whole == broken


def test_a_run_killed_by_the_system_is_resumed(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fedxmr.simulate", *ARGUMENTS, "federation.rounds=200", "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while len(checkpoint.rounds(out)) < 2 and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    assert commands.run(simulate, ["--resume", str(out), "--no-pictures"]) == commands.OK
    federate(tmp_path / "whole", "federation.rounds=200", base=BASE)
    assert same_bytes(out, tmp_path / "whole")


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path, monkeypatch):
    config = configured(base=BASE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 16)  # in round 6, of which round 5 was not checkpointed
        run(config, tmp_path / "run", pictures=False)
    run(config, None, resume=tmp_path / "run", pictures=False)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/client 0")] == list(range(1, 10))
    assert [e.step for e in events.Scalars("validation/mean/average")] == list(range(1, 10))


def test_rounds_may_grow_and_the_longer_run_is_that_of_one_piece(tmp_path):
    federate(tmp_path / "run", "federation.rounds=4", base=BASE)
    assert commands.run(simulate, ["--resume", str(tmp_path / "run"), "--rounds", "9", "--no-pictures"]) == commands.OK
    federate(tmp_path / "whole", base=BASE)
    assert same_bytes(tmp_path / "run", tmp_path / "whole")


def test_a_tolerated_failure_before_a_checkpoint_is_resumed_from_the_last_accepted_state(tmp_path, monkeypatch):
    base = (*(a for a in TOY if not a.startswith("dataset.items")), "dataset.items=61", "strategy.joint_fraction=1.0")
    tolerant = (*base, "federation.rounds=6", "federation.checkpoint_every=2", "federation.tolerate_failures=true")
    misbehaves = "learner.misbehaves={'84': nan once}"  # client 0 in round 2

    def config(name: str):
        return configured(misbehaves, f"learner.once={tmp_path / name}.once", base=tolerant)

    run(config("whole"), tmp_path / "whole", pictures=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 8)  # in round 3
        run(config("broken"), tmp_path / "broken", pictures=False)
    summary = run(config("broken"), None, resume=tmp_path / "broken", pictures=False)
    assert [(entry["round"], entry["client"]) for entry in summary["rejected"]] == [(2, 0)]
    assert summary["failed"] == []
    assert same_bytes(tmp_path / "whole", tmp_path / "broken")


def test_a_run_interrupted_in_its_report_is_reported_by_a_resume(tmp_path, monkeypatch, capsys):
    config = configured(base=BASE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr("fedxmr.report.evaluate_across", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(config, tmp_path / "run", pictures=False)
    assert caught.value.__notes__[-1].endswith(f"--resume {tmp_path / 'run'}")
    assert not (tmp_path / "run" / "retrieval.json").exists()
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    run(config, None, resume=tmp_path / "run", pictures=False)
    assert (tmp_path / "run" / "retrieval.json").is_file()
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary


def test_a_damaged_newest_checkpoint_is_refused_and_the_older_one_offered(tmp_path, capsys):
    out = tmp_path / "run"
    federate(out, base=BASE)
    path = out / checkpoint.folder(8) / "server.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    arguments = ["--resume", str(out), "--rounds", "10", "--no-pictures"]
    assert commands.run(simulate, arguments) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert f"to go on from round 6, remove {out / checkpoint.folder(8)}" in error
    assert (out / "summary.json").is_file()
    for file in (out / checkpoint.folder(8)).iterdir():
        file.unlink()
    (out / checkpoint.folder(8)).rmdir()
    assert commands.run(simulate, arguments) == commands.OK
    federate(tmp_path / "whole", "federation.rounds=10", base=BASE)
    assert same_bytes(out, tmp_path / "whole")


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ("checkpoint/round-8/client-1.safetensors", "to go on from round 6, remove"),
        ("metrics.jsonl", "metrics.jsonl: is not what it was at the checkpoint of round 8"),
        ("timings.jsonl", "timings.jsonl: is not what it was at the checkpoint of round 8"),
    ],
)
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_run_folder_that_lacks_what_a_resume_needs_is_refused_untouched(tmp_path, capsys, damaged, says, how):
    out = tmp_path / "run"
    federate(out, base=BASE)
    (out / damaged).write_bytes((out / damaged).read_bytes()[:20]) if how == "truncated" else (out / damaged).unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert commands.run(simulate, ["--resume", str(out), "--rounds", "12"]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("error:") == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_newest_two_checkpoints_are_kept_whole(tmp_path):
    federate(tmp_path / "run", "federation.clients=8", "federation.sample=2", "evaluation.clients=3", base=BASE)
    assert checkpoint.rounds(tmp_path / "run") == [6, 8]
    for folder in (tmp_path / "run" / "checkpoint").iterdir():
        assert (folder / "server.safetensors").is_file()
    assert len(list((tmp_path / "run" / "checkpoint").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--strategy", "fedavg"], "changed: strategy."),
        (["--seed", "3"], "cannot be resumed with another configuration; changed: seed"),
        (["learner.eta=0.5"], "changed: learner.eta"),
        (["--rounds", "3"], "federation.rounds may grow, from 4, got 3"),
        ([], "this run has ended"),
        (["--config", "x.yaml"], "expected no --config"),
        (["--out", "x"], "expected neither --out nor --overwrite"),
        (["--overwrite"], "expected neither --out nor --overwrite"),
    ],
)
def test_what_cannot_be_resumed_says_why_and_changes_nothing(tmp_path, capsys, arguments, says):
    federate(tmp_path / "run", "federation.rounds=4", base=BASE)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert commands.run(simulate, ["--resume", str(tmp_path / "run"), *arguments]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    out = tmp_path / "run"
    federate(out, base=(*TOY, "federation.checkpoint_every=1"))
    (newest,) = checkpoint.rounds(out)[-1:]
    path = out / checkpoint.folder(newest) / "server.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    grown = configured("federation.rounds=5", base=(*TOY, "federation.checkpoint_every=1"))
    with pytest.raises(InputError, match="damaged"):
        run(grown, None, resume=out, pictures=False)
    path.write_bytes(content)
    one, other = (out / checkpoint.folder(newest) / f"client-{k}.safetensors" for k in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match=r"expected the file that belongs to this .* from round 2, remove"):
        run(grown, None, resume=out, pictures=False)


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path, capsys):
    for seed in (0, 1):
        federate(tmp_path / f"seed{seed}", f"seed={seed}", base=(*TOY, "federation.checkpoint_every=1"))
    ours, theirs = (tmp_path / f"seed{seed}" / checkpoint.folder(3) for seed in (0, 1))
    resume = ["--resume", str(tmp_path / "seed0"), "--rounds", "5", "--no-pictures"]
    for file in sorted(theirs.iterdir()):
        kept = (ours / file.name).read_bytes()
        (ours / file.name).write_bytes(file.read_bytes())
        capsys.readouterr()
        assert commands.run(simulate, resume) == commands.BAD_INPUT
        error = capsys.readouterr().err
        assert f"{ours / file.name}: expected" in error
        assert "to go on from round 2, remove" in error
        (ours / file.name).write_bytes(kept)
    config = tmp_path / "seed0" / "config.yaml"
    config.write_text(config.read_text().replace("step: 0.25", "step: 0.5"))
    assert commands.run(simulate, resume) == commands.BAD_INPUT
    assert "config.yaml: is not what the run began with; changed: learner.step" in capsys.readouterr().err


def test_an_older_checkpoint_is_offered_only_where_it_is_good(tmp_path, capsys):
    out = tmp_path / "run"
    federate(out, base=BASE)
    for round, name in ((8, "server.safetensors"), (6, "client-2.safetensors")):
        (out / checkpoint.folder(round) / name).write_bytes(b"")
    assert commands.run(simulate, ["--resume", str(out), "--rounds", "10"]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert "round-8/server.safetensors: not a state of fedxmr's, or damaged" in error
    assert "to go on from" not in error


@pytest.mark.parametrize("name", ["metrics", "timings"])
def test_changed_records_are_noticed(tmp_path, capsys, name):
    out = tmp_path / "run"
    federate(out, base=BASE)
    path = out / f"{name}.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:10] + b"9" + content[11:])
    assert commands.run(simulate, ["--resume", str(out), "--rounds", "10"]) == commands.BAD_INPUT
    assert f"{path}: is not what it was at the checkpoint of round 8" in capsys.readouterr().err


@pytest.mark.parametrize("every", [0, 5])
def test_a_run_without_a_checkpoint_is_resumed_from_the_start(tmp_path, monkeypatch, every):
    config = configured(f"federation.checkpoint_every={every}", base=BASE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        interrupt_after(patch, 7)
        run(config, tmp_path / "broken", pictures=False)
    assert "to go on from the start" in caught.value.__notes__[-1]
    run(config, None, resume=tmp_path / "broken", pictures=False)
    run(config, tmp_path / "whole", pictures=False)
    assert same_bytes(tmp_path / "whole", tmp_path / "broken")


def test_changed_data_are_noticed(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "features").mkdir(parents=True)
    labels = rng.integers(0, 3, 60)
    for modality, width in (("image", 6), ("text", 4)):
        np.save(folder / "features" / f"{modality}.npy", rng.normal(size=(60, width)) + labels[:, None])
    np.save(folder / "labels.npy", labels)
    train, validation, test = np.split(rng.permutation(60), [30, 45])
    np.savez(folder / "split.npz", train=train, validation=validation, test=test)
    out = tmp_path / "run"
    small = tuple(a for a in BASE if not a.startswith("dataset."))
    federate(out, f"dataset.name={folder}", base=small)
    features = np.load(folder / "features" / "text.npy")
    features[-1, -1] += 1e-3
    np.save(folder / "features" / "text.npy", features)
    command = [sys.executable, "-m", "fedxmr.simulate", "--resume", str(out), "--rounds", "10"]
    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert resumed.returncode == commands.BAD_INPUT
    assert "cannot be resumed: the data of" in resumed.stderr


@pytest.mark.parametrize("how", [["--resume"], [*ARGUMENTS, "--overwrite", "--out"]])
def test_a_run_folder_that_another_process_works_in_is_left_alone(tmp_path, capsys, how):
    out = tmp_path / "run"
    federate(out, "federation.rounds=4", base=BASE)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = (
        "import sys, time; from pathlib import Path; from fedxmr.recording import claimed\n"
        "with claimed(Path(sys.argv[1])): print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", other, str(out)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            assert commands.run(simulate, [*how, str(out), "--rounds", "9"]) == commands.BAD_INPUT
        finally:
            process.kill()
    assert f"{out}: another process is working in this run folder" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert commands.run(simulate, [*how, str(out), "--rounds", "9", "--no-pictures"]) == commands.OK


FEW = ("federation.clients=8", "federation.sample=2", "evaluation.clients=4")


@pytest.mark.parametrize("assignments", [(), FEW], ids=["all", "panel members that never trained"])
def test_a_client_file_of_an_earlier_checkpoint_is_noticed(tmp_path, capsys, assignments):
    out = tmp_path / "run"
    federate(out, *assignments, base=BASE)
    newest, before = (out / checkpoint.folder(round) for round in (8, 6))
    for file in sorted(newest.glob("client-*")):
        kept = file.read_bytes()
        if not (before / file.name).exists() or kept == (before / file.name).read_bytes():
            continue  # it did nothing in between
        file.unlink()  # not through the link to the same file
        file.write_bytes((before / file.name).read_bytes())
        assert commands.run(simulate, ["--resume", str(out), "--rounds", "12"]) == commands.BAD_INPUT
        error = capsys.readouterr().err
        assert f"{file}: expected the file that belongs to this checkpoint, got another" in error
        assert "to go on from round 6, remove" in error
        file.write_bytes(kept)
    assert commands.run(simulate, ["--resume", str(out), "--rounds", "12", "--no-pictures"]) == commands.OK


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("when", [1, 16], ids=["before a checkpoint", "after one"])
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("gamma: 0.5", "gamma: 0.7", "config.yaml: is not what the run began with; changed: strategy.gamma"),
        ("seed: 0", "seed: 5", "config.yaml: is not what the run began with; changed: dataset.seed, seed"),
        ("clients: 3", "clients: 4", "is not what the run began with; changed: federation.clients"),
    ],
)
def test_a_configuration_edited_by_hand_is_refused_naming_the_key(tmp_path, monkeypatch, capsys, when, old, new, says):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, when)
        run(configured(base=BASE), out, pictures=False)
    edit(out / "config.yaml", old, new)
    assert commands.run(simulate, ["--resume", str(out)]) == commands.BAD_INPUT
    assert says in capsys.readouterr().err


def test_fewer_rounds_written_by_hand_are_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 22)
        run(configured(base=BASE), out, pictures=False)
    edit(out / "config.yaml", "rounds: 9", "rounds: 3")
    assert commands.run(simulate, ["--resume", str(out)]) == commands.BAD_INPUT
    assert "federation.rounds may grow, from 9, got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: (out / "summary.json").write_text("{"), "summary.json: cannot be read"),
        (lambda out: (out / "clients" / "1" / "selected.safetensors").unlink(), "no 'selected' model of client 1"),
        (
            lambda out: shutil.copy(
                out / "clients" / "1" / "selected.safetensors", out / "clients" / "0" / "selected.safetensors"
            ),
            "expected the model of client 0, got that of 1",
        ),
        (lambda out: edit(out / "config.yaml", "gamma: 0.5", "gamma: 0.7"), "changed: strategy.gamma"),
    ],
)
def test_a_report_is_not_made_of_something_else(tmp_path, monkeypatch, capsys, damage, says):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedxmr.report.evaluate_across", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(configured(base=BASE), out, pictures=False)
    damage(out)
    assert commands.run(simulate, ["--resume", str(out), "--no-pictures"]) == commands.BAD_INPUT
    assert says in capsys.readouterr().err
    assert (out / "checkpoint").is_dir()

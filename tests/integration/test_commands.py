"""The commands as a user meets them: one line and exit code 2 for whatever is wrong, and nothing half-written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedxmr
from fedxmr import commands
from fedxmr.centralized import centralized
from fedxmr.config import read_yaml, resolve
from fedxmr.errors import InputError
from fedxmr.setting import check
from fedxmr.simulate import simulate
from fedxmr.sources import dataset
from fedxmr.types import Items
from tests.federations import SMALL, configured, same_bytes

RESUME = "python -m fedxmr.simulate --resume"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A working directory with nothing in it, and no cached data anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDXMR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "wikipdia"], "unknown dataset 'wikipdia'; did you mean 'wikipedia'?"),
        (["--learner", "dscrm"], "unknown learner 'dscrm'; did you mean 'dscmr'?"),
        (["--learner", "no.such:Learner"], "learner 'no.such:Learner'"),
        (["--strategy", "fedvag"], "unknown strategy 'fedvag'; did you mean 'fedavg'?"),
        (["strategy.gama=1"], "unknown configuration key 'strategy.gama'; did you mean 'strategy.gamma'?"),
        (["stratgy.gamma=1"], "unknown configuration key 'stratgy'; did you mean 'strategy'?"),
        (["learner.hiden=3"], "unknown configuration key 'learner.hiden'; did you mean 'learner.hidden'?"),
        (["learner.optimizer.lrr=3"], "'learner.optimizer.lrr'; did you mean 'learner.optimizer.lr'?"),
        (["--dataset", "synthetic", "dataset.itms=3"], "'dataset.itms'; did you mean 'dataset.items'?"),
        (["--dataset", "digits", "--features", "sift-lda"], "unknown configuration key 'dataset.features'"),
        (["strategy.gamma=fast"], "strategy.gamma: input should be a valid number"),
        (["federation.rounds=2.5"], "federation.rounds: input should be a valid integer"),
        (["strategy.joint_fraction=1.5"], "strategy.joint_fraction: input should be less than or equal to 1, got 1.5"),
        (["--rounds", "0"], "federation.rounds: input should be greater than 0, got 0"),
        (["--rounds", "many"], "'many' is not a valid integer"),
        (["--engine", "warp"], "'warp' is not one of"),
        (["--clients", "3", "--sample", "4"], "federation: sample: expected at most the 3 clients, got 4"),
        (["--dropout", "1"], "federation.dropout: input should be less than 1, got 1.0"),
        (["--dropout", "-0.1"], "federation.dropout: input should be greater than or equal to 0, got -0.1"),
        (["--dropout", "nan"], "federation.dropout: input should be"),
        (["--deadline", "0"], "federation.deadline: input should be greater than 0, got 0.0"),
        (["--clients", "5000"], "5000"),
        (["--partition", "shard"], "partition.scheme: input should be"),
        (["--partition", "dirichlet", "partition.alpha=0.001", "partition.min_items=359"], "partition dirichlet"),
        (["gamma"], "'gamma': expected key=value"),
        (["strategy.gamma=[1"], "strategy.gamma: expected a YAML value"),
        (["strategy.share=[nothing.*]"], "unknown parameter in strategy.share 'nothing.*'"),
        (["strategy.share=commn"], "unknown strategy.share 'commn'; did you mean 'common'?"),
        (["strategy.gamma=.nan"], "strategy.gamma: input should be a finite number, got nan"),
        (["--learner", "os:getcwd"], "learner 'os:getcwd': expected a class with the methods of a learner"),
        (["--dataset", "synthetic", "dataset.modalities={image: 4}"], "dataset.modalities"),
        (["--threads", "100000"], "runtime.threads: input should be less than or equal to 1024"),
        (["learner.options={hidden: 3}"], "unknown configuration key 'learner.options'"),
        (["learner.hidden=100000000000"], "learner.hidden: input should be less than or equal to"),
        (["learner.optimizer.betas=[1, 1]"], "learner.optimizer.betas.0: input should be less than 1"),
        (["learner.eta=1", "learner=null"], "learner: input should be"),
        (["strategy.share=null"], "unknown strategy.share 'None'"),
        (["--device", "meta"], "runtime.device: 'meta' cannot be used here"),
        (["--learner", ".foo:Bar"], "learner '.foo:Bar'"),
        (["--method", "fedavg"], "--method fedavg: expected --config with a file that has a section 'experiment'"),
        (["--config", "odd.yaml", "--method", "a"], "odd.yaml: experiment"),
        (["--out", "x" * 300], "cannot be written: File name too long"),
        (["--out", "link", "--overwrite"], "link: already exists; it is no run folder"),
        (["--resume", "taken", "--out", "x"], "taken/config.yaml: cannot be read"),
        (["strategy.share=statistics"], "the learner DSCMR has no such parameters"),
        (["dataset.scaling={image: none}"], "unknown modality in dataset.scaling 'image'"),
        (["--config", "no.yaml"], "no.yaml: cannot be read"),
        (["--config", "list.yaml"], "list.yaml: expected keys and values, got list"),
        (["--config", "broken.yaml"], "broken.yaml: not YAML"),
        (["--dataset", "./folder"], "folder: expected a folder, got nothing there"),
        (["--device", "cuda:77"], "runtime.device: 'cuda:77' cannot be used here"),
        (["--device", "gpu"], "runtime.device: 'gpu' cannot be used here"),
        (["--out", "taken"], "taken: already exists; pass --overwrite"),
        (["--out", "taken", "--overwrite"], "taken: already exists; it is no run folder"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(empty, capsys, arguments, says):
    (empty / "taken").mkdir()
    (empty / "taken" / "thesis.txt").write_text("precious")
    (empty / "list.yaml").write_text("[1, 2]")
    (empty / "broken.yaml").write_text("a: [")
    (empty / "odd.yaml").write_text("experiment: {methods: [a]}")
    (empty / "link").symlink_to(empty / "taken")
    before = sorted(empty.rglob("*"))
    assert commands.run(simulate, arguments) == commands.BAD_INPUT
    captured = capsys.readouterr()
    assert says.lower() in captured.err.lower()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(empty.rglob("*")) == before


def test_a_missing_file_offline_is_named_with_its_address_and_the_two_ways_out(empty, capsys, monkeypatch):
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens: as good as offline
    assert commands.run(simulate, ["--dataset", "wikipedia"]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "https://" in error
    assert "FEDXMR_DATA" in error or "--data-dir" in error
    assert not (empty / "runs").exists()


def folder(path: Path, **changed: np.ndarray) -> Path:
    (path / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {"image": rng.normal(size=(30, 4)), "text": rng.normal(size=(30, 3)), "labels": np.arange(30) % 3}
    arrays |= changed
    for name in ("image", "text"):
        np.save(path / "features" / f"{name}.npy", arrays[name])
    np.save(path / "labels.npy", arrays["labels"])
    np.savez(path / "split.npz", train=np.arange(20), validation=np.arange(20, 25), test=np.arange(25, 30))
    return path


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"image": np.full((30, 4), np.nan)}, "image"),
        ({"labels": np.arange(29) % 3}, "expected 29 rows, one per label, got 30"),
        ({"text": np.zeros((30, 3, 2))}, "text"),
    ],
)
def test_a_bad_folder_gets_one_line(empty, capsys, changed, says):
    folder(empty / "mine", **changed)
    assert commands.run(simulate, ["--dataset", "mine/"]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (empty / "runs").exists()


def test_a_part_without_a_modality_is_refused_before_the_run():
    config = configured()
    data = dataset(config)
    images = {"image": data.validation.features["image"]}
    lacking = Items(images, {"image": data.validation.rows["image"]}, data.validation.labels)
    with pytest.raises(InputError, match="synthetic: expected validation items with text, got none"):
        check(config, replace(data, validation=lacking))


def test_items_nobody_can_find_anything_for_are_refused_before_the_run(empty, capsys):
    own = folder(empty / "mine", labels=np.zeros((30, 3), dtype=bool))
    assert commands.run(simulate, ["--dataset", f"{own}/"]) == commands.BAD_INPUT
    assert "expected a validation text that shares a class with some image, got none" in capsys.readouterr().err
    assert not (empty / "runs").exists()


def test_a_users_own_folder_runs(empty):
    folder(empty / "mine")
    small = [a for a in SMALL if not a.startswith("dataset")]
    arguments = ["--dataset", "mine/", "--no-pictures", "--out", "run", *small, "federation.rounds=1"]
    assert commands.run(simulate, arguments) == commands.OK
    assert (empty / "run" / "summary.json").is_file()


def test_an_existing_run_folder_is_replaced_only_when_asked(empty, capsys):
    arguments = [*SMALL, "--no-pictures", "--out", "run", "--rounds", "1"]
    assert commands.run(simulate, arguments) == commands.OK
    first = (empty / "run" / "summary.json").read_bytes()
    assert commands.run(simulate, arguments) == commands.BAD_INPUT
    assert (empty / "run" / "summary.json").read_bytes() == first
    assert commands.run(simulate, [*arguments, "--seed", "1", "--overwrite"]) == commands.OK
    assert (empty / "run" / "summary.json").read_bytes() != first


def test_without_out_every_run_gets_a_folder_of_its_own(empty):
    for _ in range(2):
        assert commands.run(simulate, [*SMALL, "--no-pictures", "--rounds", "1"]) == commands.OK
    assert sorted(p.name for p in (empty / "runs").iterdir()) == [
        "synthetic-fedcmr-dscmr-seed0",
        "synthetic-fedcmr-dscmr-seed0-2",
    ]


def test_later_settings_win(empty):
    from fedxmr.commands import configure

    (empty / "my.yaml").write_text("strategy: {name: fedcmr, gamma: 1.0, alpha: 5}\nfederation: {rounds: 7}\n")
    by_option = configure(empty / "my.yaml", {"federation.rounds": 8}, ["strategy.alpha=6"])
    assert (by_option.strategy.gamma, by_option.strategy.alpha, by_option.federation.rounds) == (1.0, 6.0, 8)
    renamed = configure(empty / "my.yaml", {"strategy.name": "fedavg"}, [])
    assert renamed.strategy.share == "trainable"
    assert renamed.strategy.gamma == 0.5  # another strategy starts anew


def test_the_table_shows_every_client_and_the_mean(empty, capsys):
    assert commands.run(simulate, [*SMALL, "--no-pictures"]) == commands.OK
    out = capsys.readouterr().out
    assert "mean" in out
    assert "cross-client" in out
    assert "moved" in out


def test_centralized_is_one_client_with_everything(empty, capsys):
    assert commands.run(centralized, [*SMALL, "--no-pictures", "--out", "run"]) == commands.OK
    assert '"clients": 1' in (empty / "run" / "summary.json").read_text()
    assert "0.0 MB" in capsys.readouterr().out


def test_centralized_is_called_so_in_the_first_line_and_in_the_run_folders_name(empty, capsys):
    assert commands.run(centralized, [*SMALL, "--no-pictures", "--rounds", "1"]) == commands.OK
    assert capsys.readouterr().out.startswith("centralized + dscmr on synthetic: 1 client (iid), 3 rounds, seed 0")
    assert [p.name for p in (empty / "runs").iterdir()] == ["synthetic-centralized-dscmr-seed0"]
    assert '"strategy": "local"' in next((empty / "runs").glob("*/summary.json")).read_text()


def test_centralized_refuses_to_be_a_federation(empty, capsys):
    for extra in ("federation.clients=3", "strategy=fedavg"):
        assert commands.run(centralized, [*SMALL, extra]) == commands.BAD_INPUT
        assert "expected one client that shares nothing" in capsys.readouterr().err
    assert not (empty / "runs").exists()


def test_a_page_of_examples_is_written_only_when_asked(empty):
    mine = folder(empty / "mine")
    (mine / "shown").mkdir()
    (mine / "shown" / "text.txt").write_text("".join(f"words of {i}\n" for i in range(30)))
    small = [a for a in SMALL if not a.startswith("dataset")]
    arguments = ["--dataset", "mine/", "--no-pictures", "--evaluate-on", "all-test", *small, "federation.rounds=1"]
    assert commands.run(simulate, [*arguments, "--out", "plain"]) == commands.OK
    assert not (empty / "plain" / "pictures").exists()
    for name in ("one", "other"):
        assert commands.run(simulate, [*arguments, "--out", f"{name}/run", "--examples", "3"]) == commands.OK
    pages = [(empty / name / "run" / "pictures" / "examples.html").read_bytes() for name in ("one", "other")]
    assert pages[0] == pages[1]
    read = pages[0].decode()
    assert read.count("<section") == 2 * 5  # both directions, all five test items
    assert read.count("<li>") == 2 * 5 * 3
    assert "The model of client 0 as selected" in read
    assert "words of 27" in read
    assert same_bytes(empty / "plain", empty / "one" / "run")


def test_what_cannot_be_shown_is_refused_before_the_run_and_matters_to_no_other(empty, capsys):
    mine = folder(empty / "mine")
    (mine / "shown").mkdir()
    (mine / "shown" / "text.txt").write_text("too few\n")
    small = [a for a in SMALL if not a.startswith("dataset")]
    arguments = ["--dataset", "mine/", "--no-pictures", *small, "federation.rounds=1"]
    assert commands.run(simulate, [*arguments, "--examples", "3"]) == commands.BAD_INPUT
    assert "text.txt: expected 30 lines, one per row of the features, got 1" in capsys.readouterr().err
    assert not (empty / "runs").exists()
    assert commands.run(simulate, arguments) == commands.OK


def test_the_examples_of_drsl_are_ranked_by_its_own_network(empty):
    three = [a.replace("{image: 6, text: 4}", "{audio: 3, image: 6, text: 4}") for a in SMALL]
    drsl = [a for a in three if not a.startswith("learner")]
    arguments = ["--learner", "drsl", "learner.hidden=[8]", *drsl, "--no-pictures", "--examples", "1", "--out", "run"]
    assert commands.run(simulate, [*arguments, "dataset.classes=6", "dataset.labels_per_item=2"]) == commands.OK
    read = (empty / "run" / "pictures" / "examples.html").read_text()
    config = resolve(read_yaml(empty / "run" / "config.yaml"))
    model, test = fedxmr.load(empty / "run", 0), dataset(config).test
    query, gallery = (model.encode(m, test.features[m]) for m in ("image", "text"))
    best = model.similarity(query, gallery, ("image", "text")).argmax(1)
    section = read.split("<h2>image-&gt;text</h2>")[1].split("<h2>")[0]
    numbers = [int(number) for number in re.findall(r"item (\d+)</p>", section)]
    assert len(numbers) == 2 * 18  # three of six classes
    assert numbers[1::2] == best[numbers[::2]].tolist()


def test_a_zero_shot_run_has_examples_of_seen_classes(empty):
    arguments = [*SMALL, "--task", "zero-shot", "--no-pictures", "--examples", "1", "--out", "run"]
    assert commands.run(simulate, arguments) == commands.OK
    assert "<section" in (empty / "run" / "pictures" / "examples.html").read_text()


def test_overwriting_needs_a_whole_run_folder_to_replace(empty, capsys):
    (empty / "project").mkdir()
    (empty / "project" / "config.yaml").write_text("mine")
    assert commands.run(simulate, [*SMALL, "--out", "project", "--overwrite"]) == commands.BAD_INPUT
    assert "it is no run folder" in capsys.readouterr().err
    assert (empty / "project" / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "arguments", "option"),
    [
        ("fedxmr.simulate", [], "--rounds"),
        ("fedxmr.centralized", [], "--rounds"),
        ("fedxmr.data", ["split"], "--partition"),
    ],
)
def test_help_imports_nothing_heavy(module, arguments, option):
    """`--help` is to come at once; what takes its time are these imports."""
    code = (
        f"import os, runpy, sys; sys.argv = {['x', *arguments, '--help']}; os._exit = sys.exit\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"except SystemExit: pass\n"
        f"print(sorted({{'torch', 'flwr', 'ray', 'numpy', 'pydantic', 'scipy', 'sklearn'}} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert option in shown.stdout
    assert shown.stdout.endswith("[]\n"), shown.stdout[-200:]


def test_ctrl_c_ends_the_run_says_where_the_results_are_and_exits_130(tmp_path):
    out = tmp_path / "run"
    # a process started in the background, as these tests may be, ignores Ctrl-C and hands that on
    listen = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; runpy.run_module('fedxmr.simulate', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, *SMALL, "federation.rounds=100000", "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            wait_for_line(out / "metrics.jsonl", process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == commands.INTERRUPTED, err
    assert f"what was measured so far is in {out}" in err.splitlines()[-1]
    assert err.splitlines()[-2] == "error: interrupted by SIGINT"
    assert "Traceback" not in err
    assert (out / "metrics.jsonl").read_text().endswith("\n")


def wait_for_line(path: Path, process: subprocess.Popen[str]) -> None:
    import time

    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_two_processes_of_one_seed_agree(tmp_path):
    from tests.federations import same_bytes

    for name in ("a", "b"):
        command = [sys.executable, "-m", "fedxmr.simulate", *SMALL, "--no-pictures", "--out", str(tmp_path / name)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120, env={**os.environ})
    assert same_bytes(tmp_path / "a", tmp_path / "b")


def test_a_signal_that_was_ignored_still_is(monkeypatch):
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with commands.Ended().by_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_first_of_several_signals_is_heeded():
    ended = commands.Ended()
    with ended.by_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert ended.code == 143


def test_bad_input_found_after_the_rounds_does_not_cost_the_run(tmp_path, monkeypatch, capsys):
    def damaged(*_: object, **__: object) -> None:
        raise InputError("a model: damaged")

    monkeypatch.setattr("fedxmr.report.report", damaged)
    out = tmp_path / "run"
    assert commands.run(simulate, [*SMALL, "--no-pictures", "--out", str(out)]) == commands.BAD_INPUT
    assert (out / "summary.json").is_file()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"to go on with its report: {RESUME} {out}")

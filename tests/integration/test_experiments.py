"""Experiments: every YAML in the repository, tuning with equal effort, and picking up where a run was left."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

from fedxmr import commands
from fedxmr.conduct import Processes, Run, _ended, _run_one, conduct
from fedxmr.config import read_yaml, resolve
from fedxmr.data import DATASETS
from fedxmr.errors import InputError
from fedxmr.experiment import configured, read_experiment
from fedxmr.learners import FLOORS, LEARNERS
from fedxmr.reproduce import reproduce
from fedxmr.simulate import simulate

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_in_the_repository_builds(path):
    plan, base = read_experiment(path)
    for method in plan.methods.values():
        for trial in method.trials():
            configured(base, method, trial, 0)


# two are for trying things out; of those whose files a user brings no setting can be tried here
BENCHMARKS = sorted(name for name in DATASETS.keys() - {"digits", "synthetic"} if not DATASETS[name].brought)
# floors are classical methods that every table has as a whole, in floors*.yaml; no paper here says how to set them
SETTINGS = [(learner, dataset) for learner in sorted(LEARNERS.keys() - FLOORS.keys()) for dataset in BENCHMARKS]


def lacking(folder: Path, learner: str, dataset: str) -> set[str]:
    """What <learner>-<dataset>.yaml has not got that the settings of a learner's paper must have."""
    path = folder / f"{learner}-{dataset}.yaml"
    if not path.is_file():
        return {path.name}
    plan, base = read_experiment(path)
    runs = [configured(base, method, trial, 0) for method in plan.methods.values() for trial in method.trials()]
    opening = "".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines(True)))
    there = {
        "this learner in every method": {run.learner.name for run in runs} == {learner},
        "this data set in every method": {run.dataset.name for run in runs} == {dataset},
        "a method with all the data": any(run.federation.clients == 1 for run in runs),
        "published numbers, or that there are none": bool(plan.published) != ("Nobody has published" in opening),
        "departures": bool(plan.departures),
    }
    return {what for what, found in there.items() if not found}


@pytest.mark.parametrize(("learner", "dataset"), SETTINGS)
def test_every_learner_has_the_settings_of_its_paper_on_every_benchmark(learner, dataset):
    # no pair is exempt: no learner refuses a benchmark, DRSL too takes any number of modalities
    assert lacking(EXPERIMENTS, learner, dataset) == set()


def test_every_floor_has_its_place_in_an_experiment_of_floors():
    trained: dict[str, set[str]] = {}
    for path in EXPERIMENTS.glob("floors*.yaml"):
        plan, base = read_experiment(path)
        for method in plan.methods.values():
            for trial in method.trials():
                config = configured(base, method, trial, 0)
                assert (config.federation.clients, config.federation.rounds) == (1, 1)
                trained.setdefault(path.stem, set()).add(config.learner.name)
    assert trained == {
        "floors": FLOORS.keys() - {"cosine"},  # wikipedia's modalities differ in width
        "floors-sift-lda": FLOORS.keys() - {"cosine"},
        "floors-pascal": FLOORS.keys(),
    }


def test_settings_that_lack_something_are_found_out(tmp_path):
    assert lacking(tmp_path, "drsl", "mfeat") == {"drsl-mfeat.yaml"}
    path = tmp_path / "drsl-mfeat.yaml"
    path.write_text(
        "dataset: pascal\nexperiment: {methods: {one: {set: {learner: mccn}}, other: {set: {learner: drsl}}}}"
    )
    assert lacking(tmp_path, "drsl", "mfeat") == {
        "this learner in every method",
        "this data set in every method",
        "a method with all the data",
        "published numbers, or that there are none",
        "departures",
    }
    # the words of the opening comment count, not those of another one
    path.write_text("dataset: mfeat\n# Nobody has published\nexperiment: {methods: {one: {set: {learner: drsl}}}}")
    assert "published numbers, or that there are none" in lacking(tmp_path, "drsl", "mfeat")


STUDIES = {
    "FedCMR": ["pascal", "wikipedia", "fedcmr-table4", "fedcmr-table5", "fedcmr-figure3", "fedcmr-gamma"],
    "DLSL": ["dlsl-table2", "dlsl-table3", "dlsl-table4", "dlsl-figure2-alpha", "dlsl-figure2-beta"],
    "DRSL": [*(f"drsl-table{n}" for n in range(1, 8)), "drsl-figure4"],
    "JFSE": [*(f"jfse-table{n}" for n in range(2, 8)), *(f"jfse-figure{n}" for n in ("9a", "9b", "10", "11a", "11b"))],
    "MCCN": [*(f"mccn-table{n}" for n in range(2, 7)), "mccn-figure2-lambda", "mccn-figure2-m"],
}
"""Paper -> every table and study of parameters that it has, as the file that answers it is called, data sets aside.

Left out are tables of how large the data sets are, curves that every run draws, and pictures of examples.
"""


@pytest.mark.parametrize(("paper", "study"), [(paper, study) for paper in STUDIES for study in STUDIES[paper]])
def test_every_published_table_and_study_has_a_file_that_answers_it(paper, study):
    found = [path for path in EXPERIMENTS.glob("*.yaml") if f"{path.stem}-".startswith(f"{study}-")]
    titles = [read_yaml(path)["experiment"]["title"] for path in found]
    assert any(title.startswith(f"{paper}, ") for title in titles)


MISPRINTS = [
    [0.480, 0.411, 0.431],  # DRSL, Table 1, ACMR
    [0.769, 0.778, 0.772],  # JFSE, Table 5, DSCMR on NUS-WIDE
    [0.268, 0.255, 0.277],  # JFSE, Table 7, DSCMR on Pascal
    [0.603, 0.624, 0.618],  # MCCN, Table 4, DCCA on Pascal
    [0.705, 0.712, 0.707],  # MCCN, Tables 4 and 6, MCCN on Pascal
    [0.670, 0.694, 0.687],  # MCCN, Table 6, "w/o MCC"
]
"""Rows whose printed average is not the mean of their directions."""


def faults(published: Mapping[str, Any]) -> list[str]:
    """What is wrong with published numbers, as far as they tell by themselves."""
    columns = [column.rpartition(" ")[::2] for column in published.get("columns", [])]  # task and score
    rows = [
        (name, row)
        for name, found in published.get("rows", {}).items()
        for row in (found if isinstance(found[0], list) else [found])
    ]
    wrong = []
    for name, row in rows:
        if len(row) != len(columns):
            wrong.append(f"{name}: {len(row)} numbers in {len(columns)} columns")
            continue
        known = {column: number for column, number in zip(columns, row, strict=True) if number is not None}
        if not all(0 <= number <= (1 if score != "seconds" else 3600) for (_, score), number in known.items()):
            wrong.append(f"{name}: no mAP and no seconds")
        for task in {task for task, score in known if score == "average"}:
            directions = {score: number for (of, score), number in known.items() if of == task and "->" in score}
            modalities = {modality for score in directions for modality in score.split("->")}
            whole = [*directions.values(), known[task, "average"]]
            complete = directions and len(directions) == len(modalities) * (len(modalities) - 1)
            if complete and abs(mean(whole[:-1]) - whole[-1]) > 0.0011 and whole not in MISPRINTS:
                wrong.append(f"{name}: {task} average {whole[-1]} of {whole[:-1]}")
    return wrong


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_numbers_fit_their_columns_and_their_averages(path):
    # a number that was copied wrongly mostly shows in its row's average
    assert faults(read_yaml(path)["experiment"].get("published", {})) == []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0.5, 0.4, 0.46], ["one:  average 0.46 of [0.5, 0.4]"]),
        ([0.5, 0.4], ["one: 2 numbers in 3 columns"]),
        ([[0.5, 0.4, 0.45], [50.0, 40.0, 45.0]], ["one: no mAP and no seconds"]),
        ([0.5, None, 0.9], []),
    ],
)
def test_published_numbers_that_do_not_fit_are_found_out(row, says):
    assert faults({"columns": ["image->text", "text->image", "average"], "rows": {"one": row}}) == says


def test_the_default_preset_says_what_the_code_does():
    tree = read_yaml(EXPERIMENTS / "default.yaml")
    tree.pop("experiment")
    assert resolve(tree) == resolve({})
    written = {(section, key) for section in ("strategy", "learner") for key in tree[section]}
    code = resolve({}).model_dump(mode="json", by_alias=True)
    left_out = {("strategy", "mu"), ("strategy", "server_step")}
    assert written | left_out == {(section, key) for section in ("strategy", "learner") for key in code[section]}


def test_the_official_preset_trains_fedavg_by_sgd():
    plan, base = read_experiment(EXPERIMENTS / "official.yaml")
    options = configured(base, plan.methods["fedavg"], {}, 0).learner.options.model_dump()
    assert options["optimizer"]["name"] == "sgd"
    fedcmr = configured(base, plan.methods["fedcmr"], {}, 0)
    assert (fedcmr.strategy.gamma, fedcmr.strategy.alpha, fedcmr.strategy.loss) == (-0.5, 100.0, "sum")


SMALL = {
    "dataset": {"name": "synthetic", "items": 60, "validation_items": 20, "test_items": 30, "classes": 3},
    "learner": {"name": "dscmr", "hidden": 8, "width": 4},
    "federation": {"rounds": 2},
    "experiment": {
        "seeds": 2,
        "reference": "local",
        "methods": {
            "local": {"set": {"strategy": "local"}, "grid": {"federation.epochs": [1, 2]}},
            "fedcmr": {"set": {"strategy": "fedcmr"}, "grid": {"strategy.gamma": [-0.5, 0.5]}},
        },
    },
}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_an_experiment_tunes_on_validation_runs_every_seed_and_goes_on_where_it_was(experiment, capsys):
    arguments = [str(experiment), "--out", "out", "--figures", "figures", "--workers", "2"]
    assert commands.run(reproduce, arguments) == commands.OK
    out = experiment.parent / "out"
    results = json.loads((out / "results.json").read_text())
    for name, key in (("local", "federation.epochs"), ("fedcmr", "strategy.gamma")):
        trials = {t["trial"][key]: t["validation"] for t in results["tried"][name]}
        assert results["chosen"][name] == {key: max(trials, key=trials.__getitem__)}
        for seed in (0, 1):
            config = resolve(read_yaml(out / name / f"seed{seed}" / "config.yaml")).model_dump()
            section, _, last = key.partition(".")
            assert config[section][last] == results["chosen"][name][key]
            assert config["seed"] == seed
    text = (out / "results.md").read_text()
    assert "| local " in text
    assert "paired by seed" in text
    assert "tuned with 2 trials" in text
    assert {path.stem for path in (experiment.parent / "figures").iterdir()} == {
        "map-against-rounds", "map-against-bytes", "loss-against-rounds", "precision-recall", "precision-scope", "t-sne"
    }  # fmt: skip
    for name in ("results.tex", "results.csv"):
        assert "fedcmr" in (out / name).read_text()

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert len(stamps) == 8
    interrupted = out / "fedcmr" / "seed1" / "summary.json"
    interrupted.unlink()
    assert commands.run(reproduce, arguments) == commands.OK
    again = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert {path for path in again if again[path] != stamps[path]} == {interrupted}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda e: e["methods"]["local"]["grid"].update({"federation.epochs": [1]}),
            "same number of validation trials",
        ),
        (lambda e: e.update(reference="fedavg"), "reference: expected one of"),
        (lambda e: e.update(tuning_seeds=[1]), "among the reported seeds"),
        (lambda e: e.update(sweep={"seed": [1]}), "sweep stands beside experiment"),
        (lambda e: e.update(published={"source": "x", "columns": ["average"], "rows": {"a": [1, 2]}}), "1 numbers for"),
        (lambda e: e["methods"].update({"a/b": {}, "a_b": {}}), "rows whose folders differ, got 'a_b' more than once"),
        (lambda e: e["methods"].update({"..": {}}), "methods: expected another name than '..'"),
        (lambda e: e["methods"]["local"]["grid"].update(seed=[3, 4]), "seed: is not varied by hand"),
        (
            lambda e: e["methods"]["local"]["set"].update(dataset={"task": "zero-shot"}),
            "expected one dataset.task for all methods, got standard (fedcmr) and zero-shot (local)",
        ),
        (lambda e: e.update(methds={}), "unknown configuration key 'experiment.methds'; did you mean"),
        (lambda e: e["methods"]["local"]["set"].update(strategy="lcal"), "method local: unknown strategy 'lcal'"),
    ],
)
def test_a_bad_experiment_gets_one_line(experiment, capsys, change, says):
    tree = yaml.safe_load(experiment.read_text())
    change(tree["experiment"])
    experiment.write_text(yaml.safe_dump(tree))
    assert commands.run(reproduce, [str(experiment)]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (experiment.parent / "runs").exists()


def test_a_sweep_runs_every_value_and_what_is_not_swept_once(experiment, capsys):
    tree = yaml.safe_load(experiment.read_text())
    tree["sweep"] = {"strategy.gamma": [0.5, 1.0], "seeds": 1}
    tree["experiment"]["methods"] = {"local": {"set": {"strategy": "local"}, "sweep": False}, "fedcmr": {}}
    experiment.write_text(yaml.safe_dump(tree))
    assert commands.run(reproduce, [str(experiment), "federation.epochs=1", "--out", "out"]) == commands.OK
    out = experiment.parent / "out"
    gammas = {}
    for folder in out.glob("*/seed0"):
        config = resolve(read_yaml(folder / "config.yaml"))
        assert config.federation.epochs == 1
        gammas[folder.parent.name] = config.strategy.gamma
    assert gammas == {"local": resolve({}).strategy.gamma, "fedcmr, gamma=0.5": 0.5, "fedcmr, gamma=1.0": 1.0}
    results = json.loads((out / "results.json").read_text())
    points = {label: run["point"] for label, run in results["runs"].items()}
    assert points == {
        "local": {},
        "fedcmr, gamma=0.5": {"strategy.gamma": 0.5},
        "fedcmr, gamma=1.0": {"strategy.gamma": 1.0},
    }
    assert (out / "figures" / "sensitivity.png").is_file()
    text = (out / "results.md").read_text()
    assert "federation.epochs=1`" in text
    assert "\n\nTitle, what is published and what differs are of the file without federation.epochs=1.\n" in text


def test_a_file_with_a_sweep_alone_sweeps_its_own_configuration(tmp_path):
    (tmp_path / "alone.yaml").write_text("strategy: fedavg\nsweep: {federation.epochs: [1, 2], seeds: 3}")
    plan, _ = read_experiment(tmp_path / "alone.yaml")
    assert plan.seeds == 3
    assert [row.label for row in plan.rows()] == ["fedavg, epochs=1", "fedavg, epochs=2"]


def test_a_sweep_may_be_over_lists_and_booleans_but_not_twice_over_the_same(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("strategy: fedavg\nsweep: {strategy.share: [[common.*], [towers.*, common.*]]}")
    rows = read_experiment(path)[0].rows()
    assert [{row: i for i, row in enumerate(rows)}[row] for row in rows] == [0, 1]
    path.write_text("sweep: {federation.tolerate_failures: [false, true]}")
    assert [row.folder for row in read_experiment(path)[0].rows()] == [
        "fedcmr, tolerate_failures=False",
        "fedcmr, tolerate_failures=True",
    ]
    path.write_text("sweep: {strategy.gamma: [0.5, 0.50]}")
    with pytest.raises(InputError, match=r"'fedcmr, gamma=0\.5' more than once"):
        read_experiment(path)


def test_a_grid_of_one_value_needs_no_tuning_and_holds(experiment, monkeypatch):
    tree = yaml.safe_load(experiment.read_text())
    tree["experiment"] = {"seeds": 2, "methods": {"fedcmr": {"grid": {"strategy.gamma": [1.5]}}}}
    experiment.write_text(yaml.safe_dump(tree))
    asked = {}

    def run_all(wanted, workers, what):
        asked.update(wanted)
        return {folder: Run(config, folder) for folder, config in wanted.items()}

    monkeypatch.setattr("fedxmr.conduct._run_all", run_all)
    results = conduct(*read_experiment(experiment), Path("out"), 1)
    assert {(str(folder), config.strategy.gamma) for folder, config in asked.items()} == {
        ("out/fedcmr/seed0", 1.5),
        ("out/fedcmr/seed1", 1.5),
    }
    assert (results.chosen, results.tried) == ({"fedcmr": {"strategy.gamma": 1.5}}, {})


def test_make_figures_draws_experiments_that_there_are():
    text = (EXPERIMENTS.parent / "Makefile").read_text("utf-8").replace("\\\n", "")
    (names,) = (line.partition("=")[2].split() for line in text.splitlines() if line.startswith("FIGURES ="))
    assert names
    assert [name for name in names if not (EXPERIMENTS / f"{name}.yaml").is_file()] == []


def test_an_assignment_holds_for_every_method_but_not_for_what_is_varied(experiment):
    plan, base = read_experiment(experiment, ["strategy.mu=0.5", "dataset.name=digits"])
    for method in plan.methods.values():
        config = configured(base, method, {}, 0)
        assert (config.dataset.name, config.strategy.mu) == ("digits", 0.5)
    for assignment in ("strategy.gamma=1", "seed=3"):
        with pytest.raises(InputError, match=r"is what the experiment varies"):
            read_experiment(experiment, [assignment])
    assert list(plan.only(["fedcmr"]).methods) == ["fedcmr"]
    with pytest.raises(InputError, match="unknown method 'fedcm'"):
        plan.only(["fedcm"])


def test_an_interrupted_run_goes_on_from_its_checkpoint(experiment):
    tree = yaml.safe_load(experiment.read_text())
    tree.pop("experiment")
    config = resolve({**tree, "federation": {"rounds": 2, "checkpoint_every": 1}})
    folder = experiment.parent / "run"
    _run_one(Processes(), folder, config)
    assert _ended(folder, config)
    for name in ("summary.json", "retrieval.json", "precisions.safetensors", "metrics.jsonl"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        assert not _ended(folder, config), name  # damaged: it is run again
        (folder / name).write_bytes(content)
    (folder / "summary.json").unlink()
    begun = (folder / "environment.json").stat().st_mtime_ns
    _run_one(Processes(), folder, config)
    assert (folder / "summary.json").is_file()
    assert (folder / "environment.json").stat().st_mtime_ns == begun


def test_runs_are_ended_together_and_none_is_begun_after():
    processes = Processes()
    endless = ["--dataset", "synthetic", "--rounds", "100000", "--out", "/dev/null/none"]
    processes.end()
    assert processes.simulate(endless) == (commands.INTERRUPTED, "ended with the others")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--into", "."], "--into .: expected a Markdown page"),
        (["--into", "none/page.md"], "--into none/page.md: expected a folder none"),
        (["--into", "page.md"], "expected '<!-- end: out -->'"),
        (["--seeds", "1000000000000"], "--seeds: expected 1 to 100"),
        (["strategy=fedavg"], "strategy=fedavg makes methods the same that differ"),
        (["seed=1"], "seed"),
    ],
)
def test_what_cannot_be_is_refused_before_the_runs(experiment, capsys, arguments, says):
    (experiment.parent / "page.md").write_text("<!-- begin: out -->\n")
    assert commands.run(reproduce, [str(experiment), "--out", "out", *arguments]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (experiment.parent / "out").exists()


def test_less_than_one_worker_is_refused(experiment, capsys):
    for workers in ("0", "-1"):
        assert commands.run(reproduce, [str(experiment), "--workers", workers]) == commands.BAD_INPUT
        assert "--workers: expected 1 or more" in capsys.readouterr().err


def test_a_plain_configuration_is_no_experiment(tmp_path):
    (tmp_path / "plain.yaml").write_text("seed: 1")
    with pytest.raises(InputError, match="has no section 'experiment' or 'sweep'"):
        read_experiment(tmp_path / "plain.yaml")


def test_a_failing_run_ends_the_experiment_naming_it(experiment, capsys):
    tree = yaml.safe_load(experiment.read_text())
    tree["federation"]["clients"] = 61
    experiment.write_text(yaml.safe_dump(tree))
    assert commands.run(reproduce, [str(experiment), "--workers", "1"]) == commands.FAILED
    assert "clients: expected 1 to 60" in capsys.readouterr().err


def test_simulate_runs_one_method_of_an_experiment(experiment):
    arguments = ["--config", str(experiment), "--method", "local", "--out", "run", "--no-pictures"]
    assert commands.run(simulate, arguments) == commands.OK
    assert json.loads((experiment.parent / "run" / "summary.json").read_text())["strategy"] == "local"
    assert commands.run(simulate, [*arguments[:3], "lcal"]) == commands.BAD_INPUT

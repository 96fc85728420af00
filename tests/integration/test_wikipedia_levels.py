"""Whole runs on the real Wikipedia data: far below these levels, something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedxmr.config import override, resolve
from fedxmr.simulate import run

PROTOTYPE = (  # the settings at which the levels were once seen, with a private prototype and one seed
    "dataset=wikipedia",
    "evaluation.on=all-test",
    "evaluation.every=40",
    "learner.lambda=1.0",
    "learner.batch_size=20",
    "learner.optimizer.lr=1e-4",
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "seen"), [("local", 0.361), ("fedcmr", 0.382), ("fedavg", 0.437), ("fedprox", 0.424)]
)
def test_a_strategy_reaches_its_level(benchmark_data: Path, tmp_path: Path, strategy: str, seen: float):
    config = resolve(override({}, [*PROTOTYPE, f"strategy={strategy}", f"dataset.data_dir={benchmark_data}"]))
    summary = run(config, tmp_path / "run", pictures=False)
    assert summary["test"]["last"]["mean"]["average"] > 0.9 * seen


@pytest.mark.long
def test_centralised_training_reaches_its_level(benchmark_data: Path, tmp_path: Path):
    changes = ("federation.clients=1", "strategy=local", "federation.rounds=15", "learner.batch_size=100")
    config = resolve(override({}, [*PROTOTYPE, *changes, "evaluation.every=15", f"dataset.data_dir={benchmark_data}"]))
    summary = run(config, tmp_path / "run", pictures=False)
    assert summary["test"]["last"]["mean"]["average"] > 0.9 * 0.433


def test_cca_is_at_the_level_known_of_it(benchmark_data: Path, tmp_path: Path):
    changes = (
        "dataset.features=sift-lda",
        f"dataset.data_dir={benchmark_data}",
        "evaluation.on=all-test",
        "federation.clients=1",
        "strategy=local",
        "learner=cca",
        "learner.components=7",
    )
    summary = run(resolve(override({}, ["dataset=wikipedia", *changes])), tmp_path / "run", pictures=False)
    assert summary["rounds"] == 1
    found = summary["test"]["last"]["mean"]
    assert (round(found["image->text"], 3), round(found["text->image"], 3)) == (0.247, 0.201)


@pytest.mark.long
@pytest.mark.parametrize(("features", "rounds", "seen"), [("cnn-tfidf", 10, 0.411), ("sift-lda", 5, 0.286)])
def test_drsl_reaches_its_level(benchmark_data: Path, tmp_path: Path, features: str, rounds: int, seen: float):
    changes = (
        f"dataset.features={features}",
        f"dataset.data_dir={benchmark_data}",
        "evaluation.on=all-test",
        f"evaluation.every={rounds}",
        "federation.clients=1",
        f"federation.rounds={rounds}",  # trained for longer on these features it overfits
        "strategy=local",
        "learner=drsl",
    )
    summary = run(resolve(override({}, ["dataset=wikipedia", *changes])), tmp_path / "run", pictures=False)
    assert summary["test"]["last"]["mean"]["average"] > 0.9 * seen


@pytest.mark.long
@pytest.mark.parametrize(("features", "seen"), [("sift-lda", 0.228), ("cnn-tfidf", 0.323)])
@pytest.mark.parametrize(
    "federation",
    [
        pytest.param(("strategy=local", "federation.clients=1"), id="pooled"),
        pytest.param(("strategy=fedavg", "strategy.share=statistics"), id="statistics"),
    ],
)
def test_dlsl_reaches_its_level(benchmark_data: Path, tmp_path: Path, federation, features: str, seen: float):
    changes = (
        *("dataset=wikipedia", f"dataset.features={features}", f"dataset.data_dir={benchmark_data}"),
        *("evaluation.on=all-test", "evaluation.every=40", "federation.rounds=40", "federation.epochs=1"),
        *("learner=dlsl", "runtime.threads=1"),
    )
    summary = run(resolve(override({}, [*changes, *federation])), tmp_path / "run", pictures=False)
    assert summary["test"]["last"]["mean"]["average"] > 0.9 * seen

"""Federations whose clients lack modalities, classes or pairs; galleries of disjoint items of different sizes."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import fedxmr
from fedxmr.learners import FLOORS, LEARNERS, learner_class
from fedxmr.partition import load_partition
from fedxmr.state import load
from tests.federations import federate, same_bytes

WIDTHS = {"audio": 5, "image": 8, "text": 6}
SIZES = {"validation": {"audio": 9, "image": 24, "text": 15}, "test": {"audio": 12, "image": 33, "text": 21}}
"""Part -> modality -> how many items have it; no item of these parts has two."""

SYNTHETIC = (
    "dataset.name=synthetic",
    "dataset.items=60",
    "dataset.validation_items=20",
    "dataset.test_items=30",
    "dataset.modalities={image: 6, text: 4}",
    "dataset.classes=3",
)
SCHEMES = {
    "missing-modality": ("partition.scheme=missing-modality", "partition.missing=0.67"),
    "unpaired": ("partition.scheme=unpaired",),
}
SMALL = {"hidden": 8, "width": 4}
PAIRS = [
    (learner, strategy)
    for learner in sorted(LEARNERS.keys() - {"cosine"})  # which refuses modalities of different width
    for strategy in ("fedcmr", "fedavg", "local")
    if learner not in FLOORS or strategy == "local"  # nothing of a floor is shared
]
THREE = [(learner, strategy) for learner, strategy in PAIRS if learner not in ("cca", "pls")]  # which take two


def base(learner: str, *dataset: str) -> tuple[str, ...]:
    """A federation that takes little time; a learner with other options has its own defaults."""
    known = learner_class(learner).Config.model_fields
    small = [f"learner.{key}={width}" for key, width in SMALL.items() if key in known and known[key].annotation is int]
    return (*dataset, f"learner.name={learner}", *small, "runtime.threads=1", "federation.rounds=2")


def strict(path: Path) -> Any:
    """JSON as other tools read it, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 training items, a third of them complete; the items of the other parts have one modality each."""
    path = tmp_path_factory.mktemp("data") / "mine"
    rng = np.random.default_rng(0)
    has: dict[str, list[int]] = {"audio": [*range(0, 45)], "image": [*range(0, 90)], "text": [*range(15, 75)]}
    parts = {"train": [*range(90)]}
    items = 90
    for part, sizes in SIZES.items():
        parts[part] = [*range(items, items + sum(sizes.values()))]
        for modality, size in sizes.items():
            has[modality] += range(items, items + size)
            items += size
    classes = rng.permutation(np.arange(items) % 3)
    for name in ("features", "rows"):
        (path / name).mkdir(parents=True)
    for modality, rows in has.items():
        centres = rng.normal(size=(3, WIDTHS[modality]))
        noise = 0.5 * rng.normal(size=(len(rows), WIDTHS[modality]))
        np.save(path / "features" / f"{modality}.npy", centres[classes[rows]] + noise)
        np.save(path / "rows" / f"{modality}.npy", np.array(rows))
    np.save(path / "labels.npy", classes)
    np.savez(path / "split.npz", **{part: np.array(rows) for part, rows in parts.items()})
    return path


def check(summary: dict[str, Any], out: Path, modalities: tuple[str, ...]) -> None:
    """Nobody failed, and everything measured is a number, for every ordered pair of modalities."""
    assert summary["rejected"] == summary["failed"] == []
    directions = {"->".join(pair) for pair in permutations(modalities, 2)} | {"average"}
    for part in ("validation", "test"):
        for scored in (summary[part]["selected"], summary[part]["last"]):
            assert [c["client"] for c in scored["clients"]] == [0, 1, 2]
            for scores in (scored["mean"], *scored["clients"]):
                assert set(scores) - {"client"} == directions
                assert all(0 <= scores[d] <= 1 for d in directions)
    strict(out / "summary.json")
    retrieval = strict(out / "retrieval.json")
    assert set(retrieval["cross_client"]) == directions
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def modalities_held(out: Path) -> list[set[str]]:
    """Of each client."""
    parts = load_partition(out / "partition.npz")
    return [{m for m, held in part.held.items() if len(held)} for part in parts]


def check_sent(out: Path, held: list[set[str]]) -> None:
    """A client that has less sends no more."""
    sent = {line["client"]: line["bytes_up"] for line in lines(out) if line["round"] == 1}
    for one, other in permutations(range(len(held)), 2):
        if held[one] < held[other]:
            assert sent[one] <= sent[other]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize(("learner", "strategy"), PAIRS)
def test_pairs_of_modalities_on_made_up_items(learner: str, scheme: str, strategy: str, tmp_path: Path):
    assignments = (f"strategy={strategy}", *SCHEMES[scheme])
    summary = federate(tmp_path / "run", *assignments, base=base(learner, *SYNTHETIC))
    check(summary, tmp_path / "run", ("image", "text"))
    held = modalities_held(tmp_path / "run")
    check_sent(tmp_path / "run", held)
    if scheme == "missing-modality":
        assert sorted(map(len, held)) == [1, 1, 2]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize(("learner", "strategy"), THREE)
def test_three_modalities_with_galleries_of_disjoint_items(
    learner: str, scheme: str, strategy: str, folder: Path, tmp_path: Path
):
    assignments = (f"strategy={strategy}", *SCHEMES[scheme])
    summary = federate(tmp_path / "run", *assignments, base=base(learner, f"dataset.name={folder}"))
    check(summary, tmp_path / "run", tuple(WIDTHS))
    for client in strict(tmp_path / "run" / "retrieval.json")["clients"]:
        for direction, measured in client.items():
            if direction != "client":
                assert measured["queries"] == SIZES["test"][direction.partition("->")[0]]
                assert measured["paired"] == 0  # no query has a pair, so Recall@K has nothing to say
                assert measured["recall_at"] == {}


def mean_average_precision(scores: Tensor, query: Tensor, gallery: Tensor) -> float:
    """One query at a time; scores [q, g], classes [q] and [g]."""
    found = []
    for row, own in zip(scores, query, strict=True):
        ranks = (gallery[row.argsort(descending=True)] == own).nonzero().flatten() + 1
        found.append(float((torch.arange(1, len(ranks) + 1) / ranks).mean()))
    return sum(found) / len(found)


def test_the_reported_levels_are_those_of_the_items_that_have_the_modalities(folder: Path, tmp_path: Path):
    summary = federate(tmp_path / "run", *SCHEMES["unpaired"], base=base("dscmr", f"dataset.name={folder}"))
    test = np.load(folder / "split.npz")["test"]
    labels = np.load(folder / "labels.npy")
    features, classes = {}, {}
    for modality in WIDTHS:
        rows = np.load(folder / "rows" / f"{modality}.npy")
        here = np.isin(rows, test)
        features[modality] = torch.tensor(np.load(folder / "features" / f"{modality}.npy")[here], dtype=torch.float32)
        classes[modality] = torch.tensor(labels[rows[here]])
    for client in summary["test"]["selected"]["clients"]:
        model = fedxmr.load(tmp_path / "run", client["client"])
        for query, gallery in permutations(WIDTHS, 2):
            encoded = [model.encode(m, features[m]) for m in (query, gallery)]
            scores = model.similarity(*encoded, (query, gallery))
            expected = mean_average_precision(scores, classes[query], classes[gallery])
            assert client[f"{query}->{gallery}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_two_runs_end_with_the_same_bytes(scheme: str, folder: Path, tmp_path: Path):
    for name in ("one", "other"):
        federate(tmp_path / name, *SCHEMES[scheme], base=base("dscmr", f"dataset.name={folder}"))
    assert same_bytes(tmp_path / "one", tmp_path / "other")


def test_items_without_pairs_still_teach_what_goes_together(tmp_path: Path):
    learnable = ("dataset.items=300", "dataset.difficulty=0.3", "federation.rounds=8", "learner.hidden=32",
                 "learner.width=16", "learner.optimizer.lr=0.01", "strategy=fedavg")  # fmt: skip
    summary = federate(tmp_path / "run", *learnable, *SCHEMES["unpaired"], base=base("dscmr", *SYNTHETIC))
    assert summary["test"]["last"]["mean"]["average"] > 0.7  # chance is about .4


@pytest.mark.parametrize(("learner", "strategy"), PAIRS)
def test_clients_of_one_class_each(learner: str, strategy: str, tmp_path: Path):
    assignments = (f"strategy={strategy}", "partition.scheme=shards", "partition.classes_per_client=1")
    summary = federate(tmp_path / "run", *assignments, base=base(learner, *SYNTHETIC))
    check(summary, tmp_path / "run", ("image", "text"))
    assert all(line.get("loss", 0.0) >= 0 for line in lines(tmp_path / "run"))


def test_what_a_client_lacks_is_what_the_others_make_of_it(tmp_path: Path):
    assignments = ("strategy=fedavg", *SCHEMES["missing-modality"], "partition.missing=0.34")
    federate(tmp_path / "run", *assignments, base=base("dscmr", *SYNTHETIC))
    held = modalities_held(tmp_path / "run")
    (lacking,) = [k for k, modalities in enumerate(held) if len(modalities) == 1]
    (absent,) = {"image", "text"} - held[lacking]
    shared, _ = load(tmp_path / "run" / "shared-last.safetensors")
    model, _ = load(tmp_path / "run" / "clients" / str(lacking) / "last.safetensors")
    assert torch.equal(model[f"weights/towers.{absent}.weight"], shared[f"towers.{absent}.weight"])


def test_all_clients_may_lack_pairs_and_few_items_have_one_modality(folder: Path, tmp_path: Path):
    # ten clients of nine items, of which some hold one or two of a modality: stages without a modality, small batches
    assignments = ("federation.clients=10", "partition.scheme=unpaired", "learner.batch_size=2")
    summary = federate(tmp_path / "run", *assignments, base=base("dscmr", f"dataset.name={folder}"))
    assert summary["rejected"] == summary["failed"] == []
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["partition"]["unpaired"] == 1.0


def test_pictures_of_disjoint_galleries_can_be_drawn(folder: Path, tmp_path: Path):
    from fedxmr.simulate import run
    from tests.federations import configured

    run(configured(base=base("dscmr", f"dataset.name={folder}")), tmp_path / "run")
    drawn = {p.stem for p in (tmp_path / "run" / "pictures").iterdir()}
    assert drawn == {"precision-recall", "precision-scope", "t-sne"}

"""Whole runs of DLSL: every strategy, the exact one against centralised training, and what leaves a client."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import fedxmr
from fedxmr import commands
from fedxmr.centralized import centralized
from fedxmr.errors import InputError
from fedxmr.learners.dlsl import DLSL
from fedxmr.rounds import Client
from fedxmr.setting import check, remarks
from fedxmr.simulate import run
from fedxmr.sources import dataset, parts
from fedxmr.state import load
from tests.federations import SMALL, configured, federate, same_bytes
from tests.integration.test_resume import interrupt_after

BASE = ("learner.name=dlsl", *(a for a in SMALL if a != "learner.hidden=8"))
EXACT = ("strategy=fedavg", "strategy.share=statistics", "federation.epochs=1")
STRATEGIES = {
    **{name: (f"strategy={name}",) for name in ("fedcmr", "fedavg", "fedprox", "local")},
    "statistics": EXACT,
    "statistics by FedCMR's weights and merge": ("strategy=fedcmr", "strategy.share=statistics"),
}
DIVISIONS = {
    "iid": (),
    "one class each": ("partition.scheme=shards", "partition.classes_per_client=1"),
    "some lack a modality": ("partition.scheme=missing-modality", "partition.missing=0.67"),
}


def scores(out: Path) -> dict[tuple[int, int], dict[str, float]]:
    """(round, client) -> validation scores."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {(line["round"], line["client"]): line["validation"] for line in lines if "validation" in line}


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs(strategy, division, tmp_path):
    summary = federate(tmp_path / "run", *STRATEGIES[strategy], *DIVISIONS[division], base=BASE)
    assert summary["rejected"] == summary["failed"] == []
    assert summary["test"]["last"]["mean"]["average"] > 0.33


def test_it_runs_centralised(tmp_path):
    arguments = [*(a for a in BASE if not a.startswith("runtime")), "--out", str(tmp_path / "run"), "--no-pictures"]
    assert commands.run(centralized, arguments) == commands.OK
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["learner"] == "dlsl"


def moved_and_stretched(folder: Path) -> None:
    """A data set whose columns lie far from zero and differ in spread, one image column being constant."""
    rng = np.random.default_rng(0)
    classes = rng.integers(3, size=90)
    (folder / "features").mkdir(parents=True)
    for modality, spread in (("image", [10, 5, 1, 0.1, 0]), ("text", [3, 2, 1])):
        noise = rng.normal(size=(90, len(spread))) + classes[:, None]
        np.save(folder / "features" / f"{modality}.npy", (noise * spread + 100).astype("float32"))
    np.save(folder / "labels.npy", classes)
    np.savez(folder / "split.npz", train=np.arange(50), validation=np.arange(50, 70), test=np.arange(70, 90))


def isotropic(x: torch.Tensor, of: torch.Tensor | None) -> torch.Tensor:
    if of is None:
        return x
    mean = of.double().mean(0)
    return ((x - mean) / (of - mean).square().mean().sqrt()).float()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("standardise", ["federated", "client", "none"])
def test_it_sees_features_centred_and_divided_by_one_number_unless_told_otherwise(
    standardise, tmp_path, capsys, monkeypatch
):
    seen = []
    fit = DLSL.fit
    monkeypatch.setattr(DLSL, "fit", lambda self, data, *rest: seen.append(data) or fit(self, data, *rest))
    moved_and_stretched(tmp_path / "data")
    config = configured(
        *(f"dataset={tmp_path / 'data'}", "learner=dlsl", "learner.width=2", "strategy=fedavg", "federation.rounds=1"),
        *(f"federation.standardise={standardise}", "federation.clients=2", "dataset.scaling={text: norm}"),
        base=(),
    )
    run(config, tmp_path / "run", pictures=False)
    how = "none" if standardise == "none" else "isotropic"
    assert f"features: image {how} (in place of standardise), text norm (in place of standardise)\n" in (
        capsys.readouterr().out
    )
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["scaling"]
    assert recorded == {"image": how, "text": "norm"}
    data = dataset(config)
    for k, part in enumerate(parts(config)):
        own, loaded = part.take(data.train).features["image"], fedxmr.load(tmp_path / "run", k, "last")
        of = {"federated": data.train.features["image"], "client": own, "none": None}[standardise]
        assert any(close(items.features["image"], isotropic(own, of)) for items in seen)
        codes = loaded.learner.encode("image", isotropic(data.test.features["image"], of))
        torch.testing.assert_close(loaded.encode("image", data.test.features["image"]), codes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("division", ["iid", "one class each"])  # pooled, nobody lacks a modality: see test_dlsl.py
def test_sharing_statistics_is_centralised_training_in_every_round(division, tmp_path):
    # the same features to the bit: a common standardisation differs in its last bits with the number of clients
    same = ("federation.standardise=none", "federation.rounds=6", *DIVISIONS[division], "learner.pairing=instance")
    federate(tmp_path / "exact", *EXACT, *same, base=BASE)
    pooled = [a for a in same if not a.startswith("partition")]
    federate(tmp_path / "pooled", *EXACT, "strategy=local", "federation.clients=1", *pooled, base=BASE)
    exact, alone = scores(tmp_path / "exact"), scores(tmp_path / "pooled")
    assert len(exact) == 3 * 6
    for (round, _), found in exact.items():
        assert found == pytest.approx(alone[round, 0], abs=1e-9)
    expected = fedxmr.load(tmp_path / "pooled", 0, "last").learner.state()
    for client in range(3):
        found = fedxmr.load(tmp_path / "exact", client, "last").learner.state()
        for name in ("dictionaries.image", "dictionaries.text", "map"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("share", ["statistics", "[dictionaries.*, statistics.map.*]"])
def test_fedprox_with_statistics_is_refused_before_the_run(share):
    config = configured("strategy=fedprox", f"strategy.share={share}", base=BASE)
    with pytest.raises(InputError, match=r"strategy\.mu=0\.2: .* expected strategy\.share to have no statistics, got"):
        check(config, dataset(config))


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (EXACT, []),
        (("strategy=fedavg",), []),
        (("strategy=local",), []),
        (("strategy=fedcmr",), ["strategy.joint_fraction=1 has none"]),
        ((*EXACT, "federation.epochs=2"), ["only with federation.epochs=1, not 2"]),
        (
            ("strategy=fedcmr", "strategy.share=statistics", "federation.epochs=1", "strategy.joint_fraction=1"),
            ["only with strategy.weigh=examples, not gompertz; strategy.merge=replace, not smooth"],
        ),
    ],
)
def test_a_run_says_what_becomes_of_closed_form_solving_and_when_it_is_not_pooled_training(assignments, says):
    config = configured(*assignments, base=BASE)
    found = remarks(config, dataset(config))
    assert len(found) == len(says)
    assert all(words in remark for words, remark in zip(says, found, strict=True))


@pytest.mark.parametrize("strategy", ["fedcmr", "statistics"])
def test_a_resumed_run_has_the_bytes_of_an_undisturbed_one(strategy, tmp_path, monkeypatch):
    config = configured(*STRATEGIES[strategy], "federation.rounds=9", "federation.checkpoint_every=2", base=BASE)
    run(config, tmp_path / "whole", pictures=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 16)
        run(config, tmp_path / "broken", pictures=False)
    run(config, None, resume=tmp_path / "broken", pictures=False)
    assert same_bytes(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_dictionaries_or_sums_over_items_leave_a_client(strategy, tmp_path, monkeypatch):
    replies, take_part = [], Client.take_part

    def noted(self, task):
        replies.append(take_part(self, task))
        return replies[-1]

    monkeypatch.setattr(Client, "take_part", noted)
    federate(tmp_path / "run", *STRATEGIES[strategy], base=BASE)
    dictionaries = {"dictionaries.image": [6, 4], "dictionaries.text": [4, 4], "map": [3, 4]}
    statistics = {f"statistics.{name}.gram": [4, 4] for name in dictionaries}
    statistics |= {f"statistics.{name}.cross": shape for name, shape in dictionaries.items()}
    allowed = {} if strategy == "local" else statistics if "statistics" in strategy else dictionaries
    sent = [reply.shared for reply in replies if reply.loss is not None]
    assert len(sent) == 9
    assert all({name: list(t.shape) for name, t in shared.items()} == allowed for shared in sent)


def test_all_clients_of_the_exact_federation_end_with_the_same_dictionaries(tmp_path):
    federate(tmp_path / "run", *EXACT, *DIVISIONS["one class each"], base=BASE)
    models = [load(tmp_path / "run" / "clients" / str(k) / "last.safetensors")[0] for k in range(3)]
    for one, other in pairwise(models):
        for name in ("dictionaries.image", "dictionaries.text", "map"):
            assert torch.equal(one[f"weights/{name}"], other[f"weights/{name}"])

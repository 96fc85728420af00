"""Zero-shot tasks in whole runs: nothing unseen leaks into training, and the report measures the paper's protocols."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score

import fedxmr
from fedxmr import commands, sources
from fedxmr.centralized import centralized
from fedxmr.data import load_dataset
from fedxmr.reproduce import reproduce
from fedxmr.seeding import generator
from fedxmr.simulate import simulate
from fedxmr.tables import spread
from fedxmr.types import Items
from fedxmr.zero_shot import class_split, subsets, task_items
from tests.federations import SMALL, configured, federate, same_bytes

SIX = (*SMALL, "dataset.classes=6", "dataset.items=90", "dataset.test_items=60")
"""Six classes; three are unseen."""
DSCMR = (*SIX, "dataset.task=generalised-zero-shot")
JFSE = (
    *(a for a in DSCMR if not a.startswith("learner.")),
    *("learner.name=jfse", "learner.hidden=8", "learner.critic_steps=1", "learner.noise=4"),
)


def retrieval(out):
    return json.loads((out / "retrieval.json").read_text())


def protocols(out):
    return retrieval(out)["zero_shot"]


@pytest.fixture
def loader(monkeypatch):
    """Replaces what a synthetic data set is, by a function of the true one."""

    def patch(change):
        forget()
        monkeypatch.setattr(sources, "load_dataset", lambda *args: change(load_dataset(*args)))

    def forget():
        for cached in (sources._whole, sources._dataset, sources._parts):
            cached.cache_clear()

    yield patch
    forget()


def with_class_vectors(data, poison=False):
    """Class vectors, and image columns that compare with items of classes in turn; poison: NaN for all unseen."""
    column_class = {"image": torch.arange(6)}
    spec = replace(data.spec, class_vectors=torch.randn(6, 5, generator=generator(0, "vectors")))
    data = replace(data, spec=spec, column_class=column_class)
    if not poison:
        return data
    seen = class_split(6, generator(0, "classes"))

    def poisoned(items):
        features = {m: x.clone() for m, x in items.features.items()}
        features["image"][:, ~seen] = math.nan
        for x in features.values():
            x[(items.labels & ~seen).any(1)] = math.nan
        return Items(features, items.rows, items.labels)

    parts = {name: poisoned(getattr(data, name)) for name in ("train", "validation", "test", "all_test")}
    return replace(data, **parts)


@pytest.mark.parametrize("base", [DSCMR, JFSE], ids=["dscmr", "jfse"])
@pytest.mark.parametrize("how", [(), ("federation.clients=1", "strategy.name=local")], ids=["fedcmr", "centralized"])
def test_what_is_unseen_does_not_change_training(tmp_path, loader, base, how):
    loader(with_class_vectors)
    federate(tmp_path / "clean", *how, base=base)
    loader(lambda data: with_class_vectors(data, poison=True))
    with pytest.raises(ValueError, match="NaN"):  # from the report: training and selection are over
        federate(tmp_path / "poisoned", *how, base=base)
    assert same_bytes(tmp_path / "clean", tmp_path / "poisoned")
    clean, poisoned = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("clean", "poisoned"))
    for key in ("test", "validation", "bytes"):
        assert clean[key] == poisoned[key]


def test_models_and_clients_are_of_seen_classes(tmp_path, loader):
    loader(with_class_vectors)
    federate(tmp_path / "run", base=JFSE)
    config = configured(base=JFSE)
    seen = class_split(6, generator(0, "classes"))
    data = sources.dataset(config)
    for part in sources.parts(config):
        assert not (part.take(data.train).labels & ~seen).any()
    assert fedxmr.load(tmp_path / "run", 0).dims == {"image": 3, "text": 4}
    names = [str(c) for c in range(6)]
    assert protocols(tmp_path / "run")["seen_classes"] == [n for n in names if seen[int(n)]]
    assert protocols(tmp_path / "run")["unseen_classes"] == [n for n in names if not seen[int(n)]]


def brute_force(model, train, test, ranked, query, gallery):
    def encoded(items, index, modality):
        return model.encode(modality, items.features[modality][index])

    there = torch.cat([encoded(train, ranked.gallery_train, gallery), encoded(test, ranked.gallery_test, gallery)])
    labels = torch.cat([train.labels[ranked.gallery_train], test.labels[ranked.gallery_test]]).float()
    scores = model.similarity(encoded(test, ranked.queries, query), there, (query, gallery))
    assert all(len(row.unique()) == len(row) for row in scores)
    relevant = test.labels[ranked.queries].float() @ labels.T > 0
    return fmean(average_precision_score(r, s) for r, s in zip(relevant.numpy(), scores.double().numpy(), strict=True))


def test_the_report_has_the_protocols_of_the_selected_and_the_last_models(tmp_path):
    out = tmp_path / "run"
    wider = ("learner.hidden=32", "learner.width=16")  # where cosines are near 1, float32 has ties
    summary = federate(out, *wider, "federation.rounds=8", "learner.optimizer.lr=0.02", base=DSCMR)
    assert summary["task"] == "generalised-zero-shot"
    data = load_dataset("synthetic", configured(base=DSCMR).dataset.options)
    of = subsets(data.train.labels, data.test.labels, class_split(6, generator(0, "classes")))
    found = protocols(out)
    for which in ("selected", "last"):
        assert found[which]["round"] == summary["test"][which]["round"]
        for entry in found[which]["clients"]:
            model = fedxmr.load(out, entry["client"], which)
            for task in ("seen", "unseen", "generalised"):
                ranked = task_items(task, of, data.test.labels, generator(0, "halves"))
                for query, gallery in (("image", "text"), ("text", "image")):
                    expected = brute_force(model, data.train, data.test, ranked, query, gallery)
                    assert entry[task][f"{query}->{gallery}"] == pytest.approx(expected, abs=1e-6)
        for task, scores in found[which]["mean"].items():
            for direction, value in scores.items():
                assert value == pytest.approx(fmean(c[task][direction] for c in found[which]["clients"]))
    assert found["selected"]["mean"] != found["last"]["mean"]  # so that one in place of the other would show
    assert set(found["floors"]) == {"chance"}  # widths differ, and there are no class vectors


def test_both_zero_shot_tasks_train_alike_and_the_generalised_one_measures_more(tmp_path):
    federate(tmp_path / "generalised", base=DSCMR)
    federate(tmp_path / "zero-shot", "dataset.task=zero-shot", base=SIX)
    assert same_bytes(tmp_path / "generalised", tmp_path / "zero-shot")
    wider, narrower = (protocols(tmp_path / name)["last"]["mean"] for name in ("generalised", "zero-shot"))
    assert wider.pop("generalised")
    assert wider == narrower


def test_a_zero_shot_run_can_be_repeated_and_its_split_chosen(tmp_path):
    for name in ("a", "b"):
        federate(tmp_path / name, base=DSCMR)
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert retrieval(tmp_path / "a") == retrieval(tmp_path / "b")
    splits = set()
    for name, change in (("seed", "seed=1"), ("class seed", "dataset.class_seed=1")):
        federate(tmp_path / name, change, base=DSCMR)
        splits.add(tuple(protocols(tmp_path / name)["unseen_classes"]))
    assert len(splits) == 1
    assert tuple(protocols(tmp_path / "a")["unseen_classes"]) not in splits


def test_a_run_sees_the_share_of_classes_and_the_width_of_their_vectors_that_were_asked_for(loader):
    loader(with_class_vectors)
    config = configured("dataset.seen_share=0.67", "dataset.class_vector_width=3", base=JFSE)
    data, narrow = sources.dataset(config), sources.dataset(config).spec.class_vectors
    assert (int(data.spec.seen.sum()), data.spec.dims["image"]) == (4, 4)  # and the columns of as many
    assert set(data.train.labels.long().argmax(1).tolist()) == set(data.spec.seen.nonzero().flatten().tolist())
    assert narrow.shape == (6, 3)
    unseen = sources.zero_shot(config).tasks["unseen"]
    assert bool((data.spec.seen & sources.zero_shot(config).test.labels[unseen.queries]).any()) is False


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_engine_does_not_show(tmp_path):
    federate(tmp_path / "local", base=DSCMR)
    on_ray = ("runtime.engine=ray", "runtime.device=cpu", "runtime.workers=1")
    federate(tmp_path / "ray", *on_ray, base=DSCMR)
    assert same_bytes(tmp_path / "local", tmp_path / "ray")
    assert retrieval(tmp_path / "local") == retrieval(tmp_path / "ray")


def test_the_standard_task_is_what_it_was(tmp_path):
    federate(tmp_path / "default", base=SIX)
    summary = federate(tmp_path / "named", "dataset.task=standard", "dataset.class_seed=7", base=SIX)
    assert same_bytes(tmp_path / "default", tmp_path / "named")
    assert retrieval(tmp_path / "default") == retrieval(tmp_path / "named")
    assert "zero_shot" not in retrieval(tmp_path / "default")
    assert "task" not in summary
    data = sources.dataset(configured(base=SIX))
    assert data.spec.seen is None
    assert len(data.train) == 90


def test_an_experiment_shows_each_task_over_splits_beside_the_floors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = configured(base=SIX).model_dump(mode="json", by_alias=True)
    tree = {"dataset": {**tree["dataset"], "task": "zero-shot"}, "federation": {"rounds": 1}}
    tree["experiment"] = {"seeds": 2, "methods": {m: {"set": {"strategy": m}} for m in ("fedcmr", "fedavg")}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    assert commands.run(reproduce, ["small.yaml", "--out", "out", "--workers", "2"]) == commands.OK
    text = (tmp_path / "out" / "results.md").read_text()
    assert "2 different splits of the classes; 5 or more would make it a result." in text
    shown = text[text.index("protocols") : text.index("Differences")]
    table = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in shown.splitlines() if line.startswith("|"))
    }
    unseen = table[""].index("unseen average")
    for method in ("fedcmr", "fedavg"):
        runs = [protocols(tmp_path / "out" / method / f"seed{seed}") for seed in (0, 1)]
        assert runs[0]["unseen_classes"] != runs[1]["unseen_classes"]
        assert table[method][unseen] == spread([run["selected"]["mean"]["unseen"]["average"] for run in runs])
        assert table[method][-1] == spread([run["last"]["mean"]["unseen"]["average"] for run in runs])
    assert table["*chance*"][unseen] == spread([run["floors"]["chance"]["unseen"]["average"] for run in runs])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["runs"]["fedavg"]["seeds"][1]["unseen average"] == runs[1]["selected"]["mean"]["unseen"]["average"]


@pytest.mark.parametrize("command", [simulate, centralized])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learner", "jfse", "--task", "zero-shot"], "expected class vectors for a zero-shot task"),
        (["--task", "zero-shot", "dataset.classes=1"], "expected seen and unseen classes, got 1 seen of 1"),
        (["--task", "few-shot"], "'few-shot' is not one of"),
        (["dataset.task=few-shot"], "dataset.task: input should be 'standard', 'zero-shot' or"),
        (["--task", "zero-shot", "dataset.test_items=1"], "expected items for the zero-shot task 'seen', got none"),
    ],
)
def test_a_zero_shot_task_that_cannot_be_gets_one_line(tmp_path, monkeypatch, capsys, command, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert commands.run(command, ["--dataset", "synthetic", *arguments]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [simulate, centralized])
def test_the_commands_print_the_protocols(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    own = [a for a in SIX if not a.startswith(("dataset.name", "learner."))]
    arguments = ["--dataset", "synthetic", "--learner", "jfse", "--task", "zero-shot", "--no-pictures", "--out", "run"]
    more = ["learner.allow_random=true", "learner.hidden=8", "learner.width=6"]
    assert commands.run(command, [*arguments, *own, *more]) == commands.OK
    printed = capsys.readouterr().out
    for expected in (
        "zero-shot mAP@all",
        "unseen",
        "chance",
        "3 of 6 classes are unseen, by seed 0",
        "made-up orthonormal",
    ):
        assert expected in printed
    assert set(protocols(tmp_path / "run")["last"]["mean"]) == {"seen", "unseen"}

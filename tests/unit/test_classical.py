"""The floors as learners: degenerate items, what they refuse, and that one round is all they take."""

from __future__ import annotations

import math

import pytest
import torch

import fedxmr
from fedxmr import commands
from fedxmr.centralized import centralized
from fedxmr.config import override, resolve
from fedxmr.errors import InputError
from fedxmr.learners import FLOORS, LEARNERS, learner_class
from fedxmr.seeding import generator
from fedxmr.setting import check
from fedxmr.simulate import simulate
from fedxmr.sources import dataset
from fedxmr.strategies import STRATEGIES
from fedxmr.types import DataSpec, Items
from tests.federations import federate, same_bytes

CPU = torch.device("cpu")
SOLVED = sorted(FLOORS.keys() - {"cosine"})
CLASSES = 3
SYNTHETIC = (
    "dataset.name=synthetic",
    "dataset.items=60",
    "dataset.validation_items=20",
    "dataset.test_items=30",
    "dataset.classes=3",
    "runtime.threads=1",
)


def items(n=60, widths=(6, 4), purpose="items", several=False):
    """Items of three classes that both modalities show."""
    mixing, draw = generator(0, "mixing"), generator(0, purpose)
    labels = torch.eye(CLASSES, dtype=torch.bool)[torch.arange(n) % CLASSES]
    if several:
        labels = labels | (torch.rand(n, CLASSES, generator=draw) < 0.3)
    features = {
        m: labels.float() @ torch.randn(CLASSES, d, generator=mixing) + 0.3 * torch.randn(n, d, generator=draw)
        for m, d in zip(("image", "text"), widths, strict=True)
    }
    return Items.paired(features, labels)


def fitted(name, data, **options):
    kind = learner_class(name)
    spec = DataSpec({m: x.shape[1] for m, x in data.features.items()}, CLASSES)
    learner = kind(kind.Config(**options), spec, CPU, generator(0, "initial"))
    return learner, learner.fit(data, 1, generator(0, "fit"))


def scores(learner, data):
    return learner.similarity(*(learner.encode(m, data.features[m]) for m in ("image", "text")), ("image", "text"))


def with_features(data, change):
    return Items.paired({m: change(x) for m, x in data.features.items()}, data.labels)


@pytest.mark.parametrize("name", SOLVED)
def test_a_constant_column_changes_nothing(name):
    data = items()
    widened = with_features(data, lambda x: torch.cat([x, torch.full((len(x), 1), 0.1)], 1))
    # a ridge is a part of the mean variance, which one more column without any would lower
    options = {"ridge": 0.0} if "ridge" in learner_class(name).Config.model_fields else {}
    plain, wide = (scores(fitted(name, d, **options)[0], d) for d in (data, widened))
    torch.testing.assert_close(wide, plain, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", SOLVED)
def test_where_features_lie_does_not_matter(name):
    data, moved = items(), with_features(items(), lambda x: x.double() + 1000)
    torch.testing.assert_close(
        scores(fitted(name, moved)[0], moved), scores(fitted(name, data)[0], data), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("name", SOLVED)
def test_more_columns_than_items_still_teach_what_goes_together(name):
    data, unseen = (items(n, (80, 50), purpose) for n, purpose in ((30, "items"), (30, "others")))
    learner, fit = fitted(name, data)
    assert fit.trained
    same_class = unseen.labels.float() @ unseen.labels.float().T > 0
    found = scores(learner, unseen)
    assert found[same_class].mean() > found[~same_class].mean() + found.std()


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("values", [0.0, 0.1, 1e6 / 3])
def test_features_that_never_change_teach_nothing(name, values):
    learner, fit = fitted(name, with_features(items(), lambda x: torch.full_like(x, values)))
    assert all(torch.isfinite(t).all() for t in learner.state().values())
    assert fit.trained == (name == "logistic")  # which learns how frequent classes are
    assert math.isfinite(fit.loss)


@pytest.mark.parametrize("name", ["cca", "mcca", "pls"])
def test_axes_beyond_the_rank_are_zero(name):
    learner, _ = fitted(name, items(), components=9)
    encoded = learner.encode("image", items().features["image"])
    assert encoded[:, :4].abs().min() > 0
    assert not encoded[:, 4:].any()


def test_mvda_has_as_many_axes_as_classes_less_one():
    learner, _ = fitted("mvda", items())
    assert learner.encode("image", items().features["image"]).shape == (60, CLASSES - 1)
    assert fitted("mvda", items(), components=1)[0].encode("text", items().features["text"]).shape == (60, 1)


@pytest.mark.parametrize("name", ["mvda", "logistic"])
def test_modalities_of_different_items_teach_as_much(name):
    """Neither needs pairs: an item counts in a modality whether or not it has the other."""
    data = items(120)
    i = torch.arange(120)
    rows = {"image": i[i % 2 == 0], "text": i[i % 2 == 1]}
    apart = Items({m: data.features[m][r] for m, r in rows.items()}, rows, data.labels)
    learner, _ = fitted(name, apart)
    same_class = data.labels.float() @ data.labels.float().T > 0
    found = scores(learner, data)
    assert found[same_class].mean() > found[~same_class].mean() + found.std()


def test_a_class_without_an_item_has_no_probability():
    data = items()
    data = data.select((~data.labels[:, 1]).nonzero().flatten())
    learner, _ = fitted("logistic", data)
    probabilities = learner.encode("image", data.features["image"])
    assert probabilities[:, 1].max() < 1e-6
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(data)))


def test_probabilities_of_several_classes_are_their_expected_share():
    data = items(3000, several=True)
    learner, _ = fitted("logistic", data, penalty=0.01)
    share = data.labels.float() / data.labels.sum(1, keepdim=True)
    for m, x in data.features.items():  # what a maximum of the likelihood with a constant has
        torch.testing.assert_close(learner.encode(m, x).mean(0), share.mean(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SOLVED)
def test_neither_epochs_nor_what_was_loaded_show(name):
    once, data = fitted(name, items())[0], items()
    other = learner_class(name)(learner_class(name).Config(), DataSpec({"image": 6, "text": 4}, CLASSES), CPU, None)
    other.load({n: torch.full_like(t, 3.0) for n, t in once.state().items()})
    other.fit(data, 7, generator(1, "fit"))
    assert all(torch.equal(t, other.state()[n]) for n, t in once.state().items())


def test_cosine_is_of_the_features_and_holds_nothing():
    data = items(widths=(5, 5))
    learner, fit = fitted("cosine", data)
    assert not fit.trained
    assert learner.state() == {}
    expected = torch.nn.functional.cosine_similarity(
        data.features["image"][:, None], data.features["text"][None], dim=2
    )
    torch.testing.assert_close(scores(learner, data), expected)
    with pytest.raises(ValueError, match=r"no\.such\.name"):
        learner.load({"no.such.name": torch.zeros(1)})


def test_a_learner_shares_nothing_if_and_only_if_it_is_a_floor():
    assert {name for name in LEARNERS if getattr(learner_class(name), "unshared", None)} == set(FLOORS)


def run_config(*assignments):
    return resolve(override({}, [*SYNTHETIC, *assignments]))


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_a_strategy_that_shares_is_refused(name):
    for strategy in sorted(STRATEGIES.keys() - {"local"}):
        config = run_config(f"learner.name={name}", f"strategy={strategy}", "dataset.modalities={image: 5, text: 5}")
        with pytest.raises(InputError, match=f"strategy {strategy}: the learner .* expected strategy local"):
            check(config, dataset(config))


@pytest.mark.parametrize("share", ["statistics", "[projections.*]"])
def test_no_choice_of_names_to_share_is_taken(share):
    config = run_config("learner.name=cca", "strategy=fedavg", f"strategy.share={share}")
    with pytest.raises(InputError, match="the learner CCA is solved for anew"):
        check(config, dataset(config))


@pytest.mark.parametrize(
    ("name", "modalities", "says"),
    [
        ("cca", "{a: 5, b: 5, c: 5}", r"CCA takes 2 modalities, got a, b, c; MCCA \(learner mcca\) takes any number"),
        ("pls", "{a: 5, b: 5, c: 5}", "PLS takes 2 modalities, got a, b, c"),
        ("cosine", "{image: 6, text: 4}", "Cosine: expected modalities of the same width, got image 6, text 4"),
    ],
)
def test_modalities_that_a_floor_is_not_defined_for_get_one_line(name, modalities, says):
    config = run_config(f"learner.name={name}", "strategy=local", f"dataset.modalities={modalities}")
    with pytest.raises(InputError, match=says):
        check(config, dataset(config))


def test_a_floor_has_one_round_unless_told_otherwise():
    assert run_config("learner.name=cca").federation.rounds == 1
    assert run_config("learner=cca", "federation.clients=2").federation.rounds == 1
    assert run_config("learner.name=cca", "federation.rounds=3").federation.rounds == 3
    assert run_config("learner.name=dscmr").federation.rounds == run_config().federation.rounds == 40


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_a_run_alone_and_with_pooled_data(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--learner", name, "--dataset", "synthetic", "--no-pictures", "--threads", "1", "--out"]
    small = ["dataset.items=60", "dataset.validation_items=20", "dataset.test_items=30", "dataset.classes=3"]
    small += ["dataset.modalities={image: 5, text: 5}"]
    assert commands.run(centralized, [*arguments, "pooled", *small]) == commands.OK
    assert commands.run(simulate, [*arguments, "alone", "--strategy", "local", *small]) == commands.OK
    learner = fedxmr.load("pooled").learner
    assert set(learner.state()) == learner.trainable
    for folder in ("pooled", "alone"):
        assert (tmp_path / folder / "summary.json").is_file()


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_more_rounds_are_the_same_round_again(name, tmp_path):
    base = (*SYNTHETIC, "dataset.modalities={image: 5, text: 5}", f"learner.name={name}", "strategy=local")
    summary = federate(tmp_path / "run", "federation.rounds=3", base=base)
    federate(tmp_path / "again", "federation.rounds=3", base=base)
    assert same_bytes(tmp_path / "run", tmp_path / "again")
    assert summary["test"]["selected"]["round"] == 1
    assert summary["test"]["selected"]["mean"] == summary["test"]["last"]["mean"]
    assert summary["failed"] == summary["rejected"] == []

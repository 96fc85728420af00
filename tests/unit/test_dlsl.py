"""DLSL: a monotone objective, pairs by class, and the exact federation by statistics."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedxmr.evaluation import evaluate
from fedxmr.learners.dlsl import DLSL, DLSLConfig, paired_by_class
from fedxmr.seeding import generator
from fedxmr.strategies import Contribution, StrategyConfig, client_weights, combine
from fedxmr.types import DataSpec, Items, Proximal

CPU = torch.device("cpu")
CLASSES = 4
SPEC = DataSpec({"image": 12, "text": 7, "audio": 5}, CLASSES)
MODALITIES = ("audio", "image", "text")
K = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def data(n=90, purpose="items", noise=1.0, modalities=MODALITIES, labels=None):
    """Items of four classes, all with the modalities named."""
    g = generator(0, purpose)
    if labels is None:
        labels = torch.eye(CLASSES, dtype=torch.bool)[torch.randint(CLASSES, (n,), generator=g)]
    centres = {m: torch.randn(CLASSES, d, generator=generator(0, "centres", m)) for m, d in SPEC.dims.items()}
    features = {
        m: 2 * labels.float() @ centres[m] + noise * torch.randn(len(labels), d, generator=g)
        for m, d in SPEC.dims.items()
    }
    return Items.paired({m: features[m] for m in modalities}, labels)


def some_lack(items, chance=0.5, purpose="lack"):
    """The same items, each modality of each present with that chance."""
    g = generator(1, purpose)
    rows = {m: (torch.rand(len(items), generator=g) < chance).nonzero().flatten() for m in items.modalities}
    return Items({m: items.features[m][rows[m]] for m in rows}, rows, items.labels)


def only(items, *modalities):
    return Items({m: items.features[m] for m in modalities}, {m: items.rows[m] for m in modalities}, items.labels)


def make(seed=0, spec=SPEC, **options):
    return DLSL(DLSLConfig(**{"width": K} | options), spec, CPU, generator(seed, "initial"))


def names(modalities=MODALITIES):
    return [*(f"dictionaries.{m}" for m in modalities), "map"]


def objective(learner, items):
    """min over Z of what DLSL minimises, item by item, from what each item has: at the default weights."""
    weights = {"dictionaries.audio": 1.0, "dictionaries.image": 0.1, "dictionaries.text": 0.1, "map": 0.1}
    state = learner.state()
    total = 0.0
    for i, label in enumerate(items.labels):
        has = {f"dictionaries.{m}": x[items.rows[m] == i][0] for m, x in items.features.items() if i in items.rows[m]}
        if not has:
            continue
        has["map"] = label
        d = np.vstack([weights[name] * state[name].numpy() for name in has] + [np.sqrt(0.1) * np.eye(K)])
        x = np.concatenate([weights[name] * x.double().numpy() for name, x in has.items()] + [np.zeros(K)])
        z = np.linalg.lstsq(d, x, rcond=None)[0]
        total += ((x - d @ z) ** 2).sum()
    return total


SEVERAL = torch.rand(90, CLASSES, generator=generator(0, "labels")) < 0.4


@pytest.mark.parametrize(
    "items",
    [
        pytest.param(data(), id="paired"),
        pytest.param(data(labels=SEVERAL), id="several classes or none"),
        pytest.param(some_lack(data()), id="some lack some"),
        pytest.param(only(data(), "text"), id="text only"),
        pytest.param(data(n=1), id="one item"),
        pytest.param(data(n=3), id="fewer items than atoms"),
    ],
)
def test_the_objective_never_rises(items):
    learner = make(pairing="instance")
    values = [objective(learner, items)]
    for _ in range(12):
        learner.fit(items, 1, generator(0, "fit"))
        values.append(objective(learner, items))
    assert all(b <= a * (1 + 1e-7) for a, b in pairwise(values))  # dictionaries.JITTER
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("solver", ["dual", "coordinate"])
def test_what_it_reports_of_paired_items_never_rises_either(solver):
    learner, items = make(solver=solver), data()
    losses = [learner.fit(items, 1, generator(0, "fit")).loss for _ in range(6)]
    assert all(b <= a for a, b in pairwise(losses))
    again = make(solver=solver).fit(items, 6, generator(0, "fit"))
    assert again.loss == pytest.approx(sum(losses) / 6)
    assert again.loss_sum == pytest.approx(sum(losses))


def test_a_report_is_per_item_and_comparable_between_clients_that_hold_different_modalities():
    items = data()
    twice = Items.paired({m: torch.cat([x, x]) for m, x in items.features.items()}, items.labels.repeat(2, 1))
    whole = make().fit(items, 1, generator(0, "fit")).loss
    assert make().fit(twice, 1, generator(0, "fit")).loss == pytest.approx(whole)
    # image and text weigh .01 beside audio's 1: by themselves they would seem a hundred times better
    for held in ("image", "text"):
        squares = float(items.features[held].square().sum(1).mean())
        assert 0.5 * squares < make(width=2).fit(only(items, held), 1, generator(0, "fit")).loss < 1.1 * squares


def test_columns_are_never_longer_than_they_may_be_trained_or_loaded():
    learner = make(col_norm=0.5)
    learner.fit(data(), 3, generator(0, "fit"))
    state = learner.state(learner.trainable)
    assert all(float(d.norm(dim=0).max()) <= 0.5 * (1 + 1e-9) for d in state.values())
    learner.load({name: 3 * d for name, d in state.items()})
    for name, d in learner.state(learner.trainable).items():
        torch.testing.assert_close(d, 3 * state[name] * (0.5 / (3 * state[name].norm(dim=0))).clamp(max=1))


def test_items_that_nobody_has_seen_do_not_count():
    items = data()
    some = Items(
        {m: x[:40] for m, x in items.features.items()}, {m: rows[:40] for m, rows in items.rows.items()}, items.labels
    )
    one, other = make(), make()
    one.fit(some, 3, generator(0, "fit"))
    other.fit(items.select(torch.arange(40)), 3, generator(0, "fit"))
    for name in names():
        torch.testing.assert_close(one.state()[name], other.state()[name], rtol=0, atol=1e-9)


def test_weights_are_by_modality_and_checked():
    items = data()
    heavy, light = make(weights={"text": 1.0}), make()
    for learner in (heavy, light):
        learner.fit(items, 5, generator(0, "fit"))

    def unexplained(learner):
        d = learner.state()["dictionaries.text"]
        codes = learner.encode("text", items.features["text"]).double()
        return float((items.features["text"].double() - codes @ d.T).square().sum())

    assert unexplained(heavy) < unexplained(light)
    with pytest.raises(ValueError, match=r"learner.weights: expected some of audio, image, text, got smell"):
        make(weights={"smell": 1.0})
    with pytest.raises(ValueError, match=r"learner.weights: expected numbers above 0, got text: 0.0"):
        make(weights={"text": 0.0})


def test_fedprox_with_shared_statistics_is_refused():
    learner = make()
    anchor = learner.state(learner.statistics)
    with pytest.raises(ValueError, match="FedProx pulls at dictionaries"):
        learner.fit(data(), 1, generator(0, "fit"), Proximal(0.1, anchor))


# pairs by class


def test_class_means_stand_for_what_a_row_is_not_paired_with():
    items = Items(
        {"image": torch.tensor([[1.0], [3.0], [5.0]]), "text": torch.tensor([[10.0], [20.0]])},
        {"image": torch.tensor([0, 1, 2]), "text": torch.tensor([3, 4])},
        torch.eye(3, dtype=torch.bool)[[0, 0, 1, 0, 2]],
    )
    paired = paired_by_class(items)
    # items: the images 1, 3 and 5, then the texts 10 and 20; 5 and 20 are the only ones of their classes
    assert paired.features["image"].flatten().tolist() == [1, 3, 5, 2]
    assert paired.rows["image"].tolist() == [0, 1, 2, 3]
    assert paired.features["text"].flatten().tolist() == [10, 10, 10, 20]
    assert paired.rows["text"].tolist() == [0, 1, 3, 4]
    assert torch.equal(paired.labels, items.labels)


def test_of_several_classes_it_is_the_mean_of_those_that_have_one():
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    items = Items(
        {"image": torch.zeros(3, 1), "text": torch.tensor([[4.0], [8.0]])},
        {"image": torch.tensor([2, 3, 4]), "text": torch.tensor([0, 1])},
        labels,
    )
    paired = paired_by_class(items)
    assert paired.features["text"].flatten().tolist() == [6, 4, 8]
    assert paired.rows["text"].tolist() == [0, 3, 4]  # the image of class 2 has no text, nor that of no class


def test_pairs_are_by_class_where_no_item_has_two_modalities_and_by_item_otherwise():
    paired, g = data(), generator(2, "who has what")
    which = torch.randint(3, (90,), generator=g)
    rows = {m: (which == i).nonzero().flatten() for i, m in enumerate(MODALITIES)}
    apart = Items({m: paired.features[m][rows[m]] for m in MODALITIES}, rows, paired.labels)
    for items, expected in ((paired, "instance"), (apart, "class_mean"), (some_lack(paired), "instance")):
        ends = {}
        for pairing in (None, "instance", "class_mean"):
            learner = make(pairing=pairing)
            learner.fit(items, 2, generator(0, "fit"))
            ends[pairing] = learner.state()["map"]
        assert not torch.equal(ends["instance"], ends["class_mean"])
        assert torch.equal(ends[None], ends[expected])


def test_unpaired_items_by_class_come_near_paired_ones_and_dropping_what_they_lack_does_not():
    train, test = data(400, noise=3.0), data(200, "test", noise=3.0)
    train, test = only(train, "image", "text"), only(test, "image", "text")
    half = {"image": torch.arange(0, 400, 2), "text": torch.arange(1, 400, 2)}
    apart = Items({m: train.features[m][rows] for m, rows in half.items()}, half, train.labels)
    spec = DataSpec({m: SPEC.dims[m] for m in ("image", "text")}, CLASSES)
    found = {}
    for name, items, pairing in (
        ("paired", train, "instance"),
        ("by class", apart, "class_mean"),
        ("dropped", apart, "instance"),
    ):
        learner = make(spec=spec, pairing=pairing)
        learner.fit(items, 20, generator(0, "fit"))
        found[name] = evaluate(learner, test, 0)["average"]
    assert found["by class"] > 0.9 * found["paired"]
    assert found["dropped"] < 0.9 * found["by class"]


# the exact federation


def by_label(items, parts):
    return [items.select(index) for index in torch.tensor_split(items.labels.int().argmax(1).argsort(), parts)]


def unequal(items):
    return [items.select(index) for index in torch.tensor_split(torch.arange(len(items)), [4, 30])]


FEDERATIONS = {
    "equal": lambda: [data().select(i) for i in torch.tensor_split(torch.arange(90), 3)],
    "unequal": lambda: unequal(data()),
    "sorted by label": lambda: by_label(data(), 3),
    "one class each": lambda: by_label(data(), CLASSES),
    "several classes or none": lambda: unequal(data(labels=SEVERAL)),
    "a client without text, one without images": lambda: [
        only(part, *held)
        for part, held in zip(by_label(data(), 3), [("audio", "image"), MODALITIES, ("audio", "text")], strict=True)
    ],
    "items that lack some": lambda: by_label(some_lack(data()), 3),
    "items that nobody has seen": lambda: unequal(some_lack(data(), 0.3)),
}


def together(parts):
    """All items of all clients."""
    first = [sum(len(p) for p in parts[:i]) for i in range(len(parts))]
    held = sorted({m for part in parts for m in part.modalities})
    have = {m: [(part, at) for part, at in zip(parts, first, strict=True) if m in part.modalities] for m in held}
    return Items(
        {m: torch.cat([part.features[m] for part, _ in have[m]]) for m in held},
        {m: torch.cat([part.rows[m] + at for part, at in have[m]]) for m in held},
        torch.cat([part.labels for part in parts]),
    )


def contribution(k, learner, part, fit):
    owned = learner.statistics & learner.owned(part.modalities)
    return Contribution(k, len(part), part.labels.sum(0), fit.loss, learner.state(owned))


@pytest.mark.parametrize("stack", ["paper", "sqrt"])
@pytest.mark.parametrize("federation", FEDERATIONS)
def test_sharing_statistics_is_centralised_training_after_every_round(federation, stack):
    parts = FEDERATIONS[federation]()
    alone = make(pairing="instance", stack=stack)
    learners = [make(pairing="instance", stack=stack) for _ in parts]
    shared = alone.state(alone.statistics)
    strategy = StrategyConfig(name="fedavg", share="statistics", weigh="examples", merge="replace", joint_fraction=1.0)
    assert len(together(parts)) == sum(map(len, parts))
    for _ in range(15):
        contributions = []
        for k, (learner, part) in enumerate(zip(learners, parts, strict=True)):
            contributions.append(contribution(k, learner, part, learner.fit(part, 1, generator(0, "fit"))))
        shared = combine(shared, contributions, client_weights(strategy, contributions), alone.by_class)
        for learner in learners:
            learner.load(shared)
        alone.fit(together(parts), 1, generator(0, "fit"))
        for name in names():
            expected = alone.state()[name]
            torch.testing.assert_close(learners[0].state()[name], expected, rtol=0, atol=1e-8, msg=name)
            assert all(torch.equal(learner.state()[name], learners[0].state()[name]) for learner in learners)


def test_alone_clients_sorted_by_label_are_not_it():
    # what the test above would not notice if every client had the same data
    parts = by_label(data(), 3)
    alone = make()
    alone.fit(data(), 15, generator(0, "fit"))
    for part in parts:
        learner = make()
        learner.fit(part, 15, generator(0, "fit"))
        assert float((learner.state()["map"] - alone.state()["map"]).abs().max()) > 1e-2


def test_statistics_without_their_dictionary_are_solved_for_and_with_it_are_not():
    trained, learner = make(), make(seed=1)
    trained.fit(data(), 3, generator(0, "fit"))
    start = learner.state()
    state = trained.state()
    text = {name: t for name, t in state.items() if name.startswith("statistics.dictionaries.text")}
    learner.load(text)
    torch.testing.assert_close(learner.state()["dictionaries.text"], state["dictionaries.text"], rtol=0, atol=1e-10)
    assert torch.equal(learner.state()["map"], start["map"])
    learner.load(text | {"dictionaries.text": start["dictionaries.text"]})
    assert torch.equal(learner.state()["dictionaries.text"], start["dictionaries.text"])


def test_statistics_that_are_still_zero_change_no_dictionary():
    learner = make()
    start = learner.state()
    learner.load(learner.state(learner.statistics))
    assert all(torch.equal(t, start[name]) for name, t in learner.state().items())


def test_no_code_is_in_the_state_nor_kept():
    n = 97  # no width, and no number of classes
    learner, items = make(), data(n)
    before = learner.state()
    learner.fit(items, 2, generator(0, "fit"))
    assert {name: t.shape for name, t in learner.state().items()} == {name: t.shape for name, t in before.items()}

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for each in value.values():
                yield from tensors(each)
        elif isinstance(value, list | tuple):
            for each in value:
                yield from tensors(each)

    held = list(tensors(vars(learner)))
    assert len(held) == len(before)
    assert all(n not in t.shape for t in held)

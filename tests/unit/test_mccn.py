"""MCCN as a learner: extreme scales, its start, clients that lack things, federations of different classes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedxmr.learners.coordination import Samples, padding, walk
from fedxmr.learners.mccn import MCCN, MCCNConfig, all_pairs_loss, distances, per_sample_loss
from fedxmr.seeding import generator
from fedxmr.strategies import Contribution, StrategyConfig, combine, merge
from fedxmr.types import DataSpec, Items, Proximal

CPU = torch.device("cpu")
SPEC = DataSpec({"image": 5, "text": 3, "audio": 4}, 4)


pytestmark = pytest.mark.usefixtures("one_thread")


def learner(spec=SPEC, seed=0, **options):
    return MCCN(MCCNConfig(**{"hidden": 16, "width": 8} | options), spec, CPU, generator(seed, "initial"))


def items(classes, modalities=("audio", "image", "text"), seed=3):
    """Items of these classes, each with all the modalities."""
    g = generator(seed, "items")
    labels = torch.eye(4, dtype=torch.bool)[torch.tensor(classes, dtype=torch.int64)]
    return Items.paired({m: torch.randn(len(classes), SPEC.dims[m], generator=g) for m in modalities}, labels)


def imbalanced():
    """Eight texts, two of each class; images of classes 0, 0, 1, 3; one audio, of class 2. No item has two of them."""
    g = generator(5, "imbalanced")
    labels = torch.eye(4, dtype=torch.bool)[[0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 3, 2]]
    return Items(
        {
            "text": torch.randn(8, 3, generator=g),
            "image": torch.randn(4, 5, generator=g),
            "audio": torch.randn(1, 4, generator=g),
        },
        {"text": torch.arange(8), "image": torch.arange(8, 12), "audio": torch.tensor([12])},
        labels,
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finite(model):
    return all(torch.isfinite(t).all() for t in model.state().values())


def test_the_defaults_are_the_papers_but_for_pairing_scale_walk_and_route():
    config = MCCNConfig()
    assert (config.hidden, config.width, config.batch_size, config.m) == (2048, 1024, 128, 0.2)
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-4, (0.9, 0.999))
    assert (config.pairing, config.scale, config.eps) == ("per_sample", 4.0, None)
    assert (config.route, config.coordinate) == ("source", True)


@pytest.mark.parametrize(
    "bad",
    [
        {"lambda": 4},
        {"width": 0},
        {"scale": 0},
        {"m": -0.1},
        {"m": 1.1},
        {"eps": 1.0},
        {"route": "text"},
        {"eps": "inf"},
    ],
)
def test_a_bad_option_is_refused(bad):
    with pytest.raises(ValidationError):
        MCCNConfig(**bad)


def test_fedcmr_shares_the_common_layer_and_the_prototypes():
    names = learner()
    assert names.common == {"common.weight", "common.bias", "prototypes"}
    assert names.by_class == {"prototypes"}
    towers = {f"towers.{m}.{part}" for m in SPEC.dims for part in ("weight", "bias")}
    assert names.trainable == names.common | towers
    assert names.owned({"text"}) == names.common | {"towers.text.weight", "towers.text.bias"}


def test_without_clustering_there_are_no_prototypes_and_it_trains():
    model = learner(loss="pairwise", optimizer={"lr": 0.01})
    assert model.by_class == frozenset()
    assert not any("prototypes" in name for name in model.state())
    first = model.fit(imbalanced(), 1, generator(0, "fit")).loss
    assert 0 < model.fit(imbalanced(), 40, generator(1, "fit")).loss < first


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pairing", ["per_sample", "literal"])
def test_no_scale_overflows(pairing, normalise):
    # at scale 1024 the summands of eq. 11 reach e^2000 and more; float32 ends at e^88
    model = learner(scale=1024.0, pairing=pairing, normalise=normalise, optimizer={"lr": 0.01})
    fit = model.fit(items([0, 1, 2, 3, 0, 1]), 5, generator(0, "fit"))
    assert fit.loss > 1
    assert math.isfinite(fit.loss)
    assert finite(model)


@pytest.mark.parametrize("loss", [per_sample_loss, all_pairs_loss])
def test_at_scale_1024_the_loss_is_the_hardest_pair_and_its_gradient_is_theirs(loss):
    d = torch.tensor([[0.9, 0.5, 1.2]], requires_grad=True)
    own = torch.tensor([[True, False, False]])
    value = loss(d, own, ~own, 1024.0, 0.6).sum()
    value.backward()
    assert float(value.detach()) == pytest.approx(1024 * (0.9 - 0.5 + 0.6))
    assert d.grad.tolist() == [[1024, -1024, 0]]


def test_where_embedding_and_prototype_meet_the_gradient_is_finite():
    h = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1e-30, 0.0]], requires_grad=True)
    o = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]], requires_grad=True)
    for normalise in (True, False):
        distances(h, o, normalise=normalise).sum().backward()
        assert torch.isfinite(h.grad).all()
        assert torch.isfinite(o.grad).all()


@pytest.mark.parametrize("pairing", ["per_sample", "literal"])
def test_with_one_class_nothing_is_wrong_and_the_loss_is_0(pairing):
    model = learner(pairing=pairing)
    before = model.state()
    fit = model.fit(items([1, 1, 1]), 3, generator(0, "fit"))
    assert (fit.trained, fit.loss) == (True, 0.0)
    after = model.state()
    assert all(torch.equal(after[n], before[n]) for n in model.trainable - {"prototypes"})
    assert after["prototypes"].any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("pairing", ["per_sample", "literal"])
@pytest.mark.parametrize("data", [items([2]), items([0, 1], ("text",))], ids=["one item", "one modality"])
def test_one_item_and_one_modality_train(data, pairing):
    model = learner(pairing=pairing)
    fit = model.fit(data, 3, generator(0, "fit"))
    assert fit.trained
    assert math.isfinite(fit.loss)
    assert finite(model)


def test_an_item_without_a_class_rests():
    data = items([0, 1, 2])
    more = Items(
        {m: torch.cat([x, 100 * torch.ones(1, x.shape[1])]) for m, x in data.features.items()},
        {m: torch.arange(4) for m in data.rows},
        torch.cat([data.labels, torch.zeros(1, 4, dtype=torch.bool)]),
    )
    ends = []
    for of in (data, more):
        model = learner()
        fit = model.fit(of, 2, generator(0, "fit"))
        ends.append(model.state() | {"loss": torch.tensor(fit.loss)})
    assert same(*ends)


@pytest.mark.parametrize(
    "data",
    [
        items([]),
        Items({}, {}, torch.ones(3, 4, dtype=torch.bool)),
        Items.paired({"text": torch.ones(2, 3)}, torch.zeros(2, 4, dtype=torch.bool)),
    ],
    ids=["no item", "no modality", "no class"],
)
def test_without_anything_to_learn_from_nothing_is_trained(data):
    model = learner()
    before = model.state()
    fit = model.fit(data, 2, generator(0, "fit"))
    assert (fit.trained, fit.loss) == (False, 0.0)
    assert same(model.state(), before)


@pytest.mark.parametrize("pairing", ["per_sample", "literal"])
@pytest.mark.parametrize("route", ["source", "padded"])
@pytest.mark.parametrize("eps", [None, 2.0])
def test_items_of_several_classes_train(pairing, route, eps):
    g = generator(0, "several")
    labels = torch.rand(12, 4, generator=g) < 0.5
    data = Items(
        {"image": torch.randn(12, 5, generator=g), "text": torch.randn(5, 3, generator=g)},
        {"image": torch.arange(12), "text": torch.arange(0, 10, 2)},
        labels,
    )
    model = learner(pairing=pairing, route=route, eps=eps, optimizer={"lr": 0.01})
    first = model.fit(data, 1, generator(0, "fit")).loss
    assert model.fit(data, 60, generator(1, "fit")).loss < first
    assert finite(model)


def test_padding_evens_out_classes_and_modalities():
    data = imbalanced()
    samples = Samples(data, 128)
    assert samples.modalities == ("audio", "image", "text")
    seen = torch.zeros(3, 4, dtype=torch.int64)
    sources = []
    for batch in samples.epoch(generator(0, "epoch")):
        for modality, classes in zip(batch.modality, batch.classes, strict=True):
            seen[modality] += classes
        sources += [source for _, source, rows in batch.parts for _ in rows]
    assert seen.tolist() == [[2, 2, 2, 2]] * 3
    assert len(sources) == 24


def test_a_replacement_is_of_the_class_and_of_another_modality_and_changes_with_the_epoch():
    data = imbalanced()
    labels = {m: data.labels[rows] for m, rows in data.rows.items()}
    samples, rng = Samples(data, 1, route="padded"), generator(0, "epoch")
    epochs = []
    for _ in range(6):
        found = []
        for batch in samples.epoch(rng):
            at = 0
            for tower, source, rows in batch.parts:
                for row in rows.tolist():
                    assert samples.modalities[batch.modality[at]] == tower
                    assert torch.equal(batch.classes[at], labels[source][row])
                    found.append((tower, source, row))
                    at += 1
        own = sorted(f for f in found if f[0] == f[1])
        assert own == sorted((m, m, row) for m, x in data.features.items() for row in range(len(x)))  # each once
        epochs.append(sorted(f for f in found if f[0] != f[1]))
        assert len(epochs[-1]) == 11
    assert len({tuple(e) for e in epochs}) > 1


def test_with_a_ratio_some_replacements_are_of_another_class():
    samples = Samples(imbalanced(), 128, eps=1.5)
    labels = {m: imbalanced().labels[rows] for m, rows in imbalanced().rows.items()}
    rng, wrong = generator(0, "epoch"), 0
    for _ in range(10):
        for batch in samples.epoch(rng):
            truth = torch.cat([labels[source][rows] for _, source, rows in batch.parts])
            wrong += int((truth != batch.classes).any(1).sum())
    assert wrong > 0


def test_without_coordination_every_embedding_is_used_once_as_itself():
    batches = list(Samples(imbalanced(), 128, coordinate=False).epoch(generator(0, "epoch")))
    assert sum(len(b.weight) for b in batches) == 13
    assert all(tower == source for b in batches for tower, source, _ in b.parts)


def test_a_client_without_a_modality_pads_nothing_for_it():
    samples = Samples(imbalanced().select(torch.arange(12)), 128)
    assert samples.modalities == ("image", "text")


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 100])
def test_batches_are_even_and_weights_make_means(batch_size):
    batches = list(Samples(imbalanced(), batch_size).epoch(generator(0, "epoch")))
    assert len(batches) == math.ceil(8 / batch_size)
    for batch in batches:
        sizes = batch.modality.bincount(minlength=3)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.max() <= batch_size
        for modality in batch.modality.unique():
            assert float(batch.weight[batch.modality == modality].sum()) == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_padding_and_walk_hold_for_any_counts(data):
    m, q = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    cell = st.integers(0, 6)
    counts = torch.tensor([[data.draw(cell) for _ in range(q)] for _ in range(m)])
    lacking = padding(counts)
    assert (lacking >= 0).all()
    modality, category = lacking.nonzero().T
    block = (
        torch.arange(q).repeat_interleave(m).repeat_interleave(counts.T.flatten()),
        torch.arange(m).repeat(q).repeat_interleave(counts.T.flatten()),
    )
    near = walk(modality, category, counts, None, generator(data.draw(st.integers(0, 99)), "walk"))
    assert torch.equal(block[0][near], category)
    assert (block[1][near] != modality).all()
    far = walk(modality, category, counts, 1.01, generator(0, "walk"))
    assert ((far >= 0) & (far < counts.sum())).all()


def test_the_padded_route_reads_foreign_features_with_the_padded_modalitys_tower():
    model = learner(route="padded", coordinate=True)
    assert all(model.state()[f"towers.{m}.weight"].shape == (16, 5) for m in SPEC.dims)
    before = model.state()["towers.audio.weight"]
    model.fit(imbalanced(), 2, generator(0, "fit"))
    moved = (model.state()["towers.audio.weight"] != before).any(0)
    assert moved.tolist() == [True] * 5  # its own features have width 4; the fifth input is the images'
    x = torch.randn(2, 3, generator=generator(0, "x"))
    wide = torch.cat([x, torch.zeros(2, 2)], dim=1)
    torch.testing.assert_close(model.encode("text", x), model.encode("text", wide))


def test_a_saved_learner_that_has_not_started_goes_on_as_if_nothing_had_happened():
    through, resumed = learner(seed=0), MCCN(MCCNConfig(hidden=16, width=8), SPEC, CPU, None)
    resumed.load(through.state())
    for round in range(2):
        for model in (through, resumed):
            model.fit(items([0, 1, 0, 1]), 1, generator(round, "fit"))
        assert same(through.state(), resumed.state())
        again = MCCN(MCCNConfig(hidden=16, width=8), SPEC, CPU, None)
        again.load(resumed.state())
        resumed = again
    for model in (through, resumed):  # classes that come later start later
        model.fit(items([2, 3, 0, 1]), 1, generator(2, "fit"))
    assert same(through.state(), resumed.state())
    assert through.state()["prototypes"].any(1).all()


def test_prototypes_start_once():
    data = items([0, 1, 2, 3])
    model = learner(optimizer={"lr": 1e-30})
    model.fit(data, 1, generator(0, "fit"))
    started = model.state()["prototypes"]
    model.load({"common.bias": model.state()["common.bias"] + 1})  # other embeddings, other means
    model.fit(data, 1, generator(1, "fit"))
    torch.testing.assert_close(model.state()["prototypes"], started)


def test_what_has_not_started_repels_nobody():
    model, other = learner(), learner()
    other.load({"prototypes": torch.eye(4, 8) * torch.tensor([0, 0, 0, 1.0])[:, None]})
    data = items([0, 1, 2, 0, 1, 2])
    assert model.fit(data, 1, generator(0, "fit")).loss < other.fit(data, 1, generator(0, "fit")).loss
    assert not model.state()["prototypes"][3].any()
    assert not model.state()["optimizer.exp_avg.prototypes"][3].any()


def test_a_client_that_joins_late_goes_on_from_the_prototypes_it_receives():
    received = torch.nn.functional.normalize(torch.rand(4, 8, generator=generator(0, "o")))
    received[3] = 0
    model = learner(optimizer={"lr": 1e-30})
    model.load({"prototypes": received})
    model.fit(items([0, 1, 2, 3]), 1, generator(0, "fit"))
    after = model.state()["prototypes"]
    assert torch.equal(after[:3], received[:3])
    assert after[3].any()


def test_a_fedprox_anchor_pulls_where_prototypes_start():
    data, plain = items([0, 1, 2, 3]), learner(optimizer={"lr": 1e-30})
    anchor = {"prototypes": plain.state()["prototypes"]}
    plain.fit(data, 1, generator(0, "fit"))
    pulled = learner(optimizer={"lr": 1e-30})
    pulled.fit(data, 1, generator(0, "fit"), Proximal(0.25, anchor))
    torch.testing.assert_close(pulled.state()["prototypes"], plain.state()["prototypes"] / 1.25)


def test_clients_that_own_different_classes_average_the_rows_they_own():
    """Two FedCMR rounds as strategies.py combines and merges them: classes 0, 1 here, 1, 2 there, 3 nowhere."""
    shards = [items([0, 0, 1, 1, 0], seed=1), items([1, 2, 2, 1], ("image", "text"), seed=2)]
    clients = [learner(), learner()]
    counts = [data.labels.sum(0) for data in shards]
    server = {name: t for name, t in clients[0].state().items() if name in clients[0].common}
    strategy = StrategyConfig()
    for round in range(2):
        before, updates = [], []
        for client, (model, data) in enumerate(zip(clients, shards, strict=True)):
            model.fit(data, 0, generator(round, "start"))
            before.append(model.state(server))
            assert before[-1]["prototypes"][counts[client] > 0].any(1).all()  # its start is in W_0, so no change
            fit = model.fit(data, 1, generator(round, "fit"))
            updates.append(Contribution(client, len(data), counts[client], fit.loss, model.state(server)))
        server = combine(server, updates, torch.tensor([0.25, 0.75]), clients[0].by_class)
        rows = [u.shared["prototypes"] for u in updates]
        expected = torch.stack([rows[0][0], 0.25 * rows[0][1] + 0.75 * rows[1][1], rows[1][2], torch.zeros(8)])
        torch.testing.assert_close(server["prototypes"], expected)
        for client, model in enumerate(clients):
            after = updates[client].shared
            model.load(merge(strategy, server, before[client], after, model.by_class, counts[client]))
        for model, lacks in zip(clients, (2, 0), strict=True):
            assert torch.equal(model.state()["prototypes"][lacks], expected[lacks])
    assert not server["prototypes"][3].any()


def test_a_client_of_one_class_learns_from_the_prototypes_of_the_others():
    shards = [items([c] * 6, seed=c) for c in range(3)]
    models = [learner(optimizer={"lr": 0.01}) for _ in shards]
    names = models[0].common
    server = models[0].state(names)
    for round in range(2):
        updates = []
        for client, (model, data) in enumerate(zip(models, shards, strict=True)):
            model.load(server)
            fit = model.fit(data, 10, generator(round, "fit"))
            assert (fit.loss > 0) == (round > 0)  # alone, there is no wrong prototype
            updates.append(Contribution(client, 6, data.labels.sum(0), fit.loss, model.state(names)))
        server = combine(server, updates, torch.full((3,), 1 / 3), models[0].by_class)
    for client, (model, data) in enumerate(zip(models, shards, strict=True)):
        nearest = distances(model.encode("image", data.features["image"]), server["prototypes"][:3]).argmin(1)
        assert (nearest == client).all()


def test_trained_items_find_their_own_class_first():
    g = generator(0, "classes")
    labels = torch.eye(4, dtype=torch.bool)[torch.arange(40) % 4]
    centres = {m: torch.randn(4, d, generator=g) for m, d in SPEC.dims.items()}
    features = {m: labels.float() @ c + 0.1 * torch.randn(40, c.shape[1], generator=g) for m, c in centres.items()}
    data = Items.paired(features, labels)
    model = learner(hidden=32, width=32, optimizer={"lr": 0.01})

    def first_is_right():
        image, text = (model.encode(m, data.features[m]) for m in ("image", "text"))
        nearest = model.similarity(image, text, ("image", "text")).argmax(dim=1)
        return float((labels[nearest] & labels).any(dim=1).float().mean())

    before = first_is_right()
    model.fit(data, 60, generator(0, "fit"))
    assert before < 0.6
    assert first_is_right() == 1.0


def test_dead_relus_and_zero_features_train_without_nan():
    model = learner()
    model.load({"common.bias": torch.full((8,), -1e3)})
    fit = model.fit(items([0, 1, 2]), 2, generator(0, "fit"))
    assert math.isfinite(fit.loss)
    assert finite(model)


def test_encode_is_two_layers_with_relu_and_takes_many_and_no_rows():
    model = learner()
    w, x = model.state(), torch.randn(5000, 3, generator=generator(0, "x"))
    hidden = (x @ w["towers.text.weight"].T + w["towers.text.bias"]).clamp(min=0)
    expected = (hidden @ w["common.weight"].T + w["common.bias"]).clamp(min=0)
    torch.testing.assert_close(model.encode("text", x.double()), expected)
    assert model.encode("text", x[:0]).shape == (0, 8)

"""DRSL as a learner: what it reports, what it names, clients that lack things, and its memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from itertools import product
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from fedxmr.learners import drsl
from fedxmr.learners.drsl import DRSL, DRSLConfig, Fusion, Relation, drsl_loss, relate, same_class
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

CPU = torch.device("cpu")
SPEC = DataSpec({"image": 5, "text": 3}, 4)
THREE = DataSpec({"audio": 2, "image": 5, "text": 3}, 4)
STILL = {"lr": 1e-30}
"""A vanishing learning rate: all batches see the initial parameters."""


pytestmark = pytest.mark.usefixtures("one_thread")


def learner(spec=SPEC, **options):
    small = {"hidden": (8,), "width": 6, "relation": 7}
    return DRSL(DRSLConfig(**small | options), spec, CPU, generator(0, "initial"))


def items(n=12, modalities=("image", "text"), spec=SPEC, multi_label=False):
    g = generator(3, "items")
    labels = torch.eye(4, dtype=torch.bool)[torch.randint(4, (n,), generator=g)]
    if multi_label:
        labels = torch.rand(n, 4, generator=g) < 0.4
    features = {m: torch.randn(n, d, generator=g) for m, d in spec.dims.items()}
    return Items.paired({m: features[m] for m in modalities}, labels)


def unpaired():
    """Images of items 0-2, texts of items 2-5; item 6 has neither."""
    g = generator(0, "unpaired")
    return Items(
        {"image": torch.randn(3, 5, generator=g), "text": torch.randn(4, 3, generator=g)},
        {"image": torch.tensor([0, 1, 2]), "text": torch.tensor([2, 3, 4, 5])},
        torch.eye(4, dtype=torch.bool)[[0, 1, 2, 3, 0, 1, 2]],
    )


def changed(before, after):
    return {name for name, t in after.items() if not torch.equal(t, before[name])}


def whole_loss(model, data, a, b, **options):
    """L over all pairs of two modalities, from what the learner shows to the outside."""
    y = {m: data.labels[data.rows[m]].float() for m in (a, b)}
    related = model.similarity(*(model.encode(m, data.features[m]) for m in (a, b)), (a, b))
    return float(drsl_loss(related, same_class(y[a], y[b], "binary"), **options))


def test_the_defaults_are_the_papers():
    config = DRSLConfig()
    assert (config.hidden, config.width, config.relation, config.fusion) == ((1024,), 300, 1024, "concatenate")
    assert (config.output, config.similar, config.pos_weight, config.batch_size) == ("linear", "binary", 1.0, 100)
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-4, (0.9, 0.999))


@pytest.mark.parametrize(
    "bad", [{"fusion": "concat"}, {"width": 0}, {"hidden": [0]}, {"pos_weight": 0}, {"batch_size": 0}, {"wdith": 3}]
)
def test_a_bad_option_is_refused(bad):
    with pytest.raises(ValidationError):
        DRSLConfig(**bad)


def test_fedcmr_shares_the_relation_network_and_fedavg_everything():
    names = learner()
    relation = {f"relations.image.text.{x}.{y}" for x in ("hidden", "output") for y in ("weight", "bias")}
    towers = {f"towers.{m}.{x}.{y}" for m in ("image", "text") for x in (0, 1) for y in ("weight", "bias")}
    assert names.common == relation
    assert names.trainable == relation | towers
    # of two modalities, a client without one trains nothing at all
    assert names.owned({"image"}) == names.owned({"text"}) == frozenset()


def test_of_three_modalities_each_pair_has_its_network():
    names = learner(THREE)
    assert {name.rsplit(".", 2)[0] for name in names.common} == {
        "relations.audio.image",
        "relations.audio.text",
        "relations.image.text",
    }
    # without texts the image network still trains, against the audio
    assert {name.rsplit(".", 1)[0] for name in names.owned({"audio", "image"})} == {
        *(f"towers.{m}.{layer}" for m in ("audio", "image") for layer in (0, 1)),
        *(f"relations.audio.image.{layer}" for layer in ("hidden", "output")),
    }


@pytest.mark.parametrize(("fusion", "inputs"), [("concatenate", 12), ("multiply", 6), ("add", 6), ("subtract", 6)])
def test_the_fusion_sets_the_width_of_the_relation_networks_input(fusion, inputs):
    assert learner(fusion=fusion).state()["relations.image.text.hidden.weight"].shape == (7, inputs)


def test_networks_have_the_layers_asked_for():
    assert [t.shape for name, t in learner(hidden=()).state().items() if name.startswith("towers.text")] == [
        (6, 3),
        (6,),
    ]
    deep = {name: t.shape for name, t in learner(hidden=(8, 9)).state().items() if name.startswith("towers.text")}
    assert [shape for name, shape in deep.items() if name.endswith("weight")] == [(8, 3), (9, 8), (6, 9)]


@pytest.mark.parametrize("options", [{}, {"pos_weight": 4.0}, {"output": "sigmoid"}, {"fusion": "multiply"}])
def test_the_report_is_the_mean_over_all_pairs(options):
    weight = {"pos_weight": options.get("pos_weight", 1.0)}
    for data in (items(), unpaired(), items(multi_label=True)):
        model = learner(batch_size=100, optimizer=STILL, **options)
        fit = model.fit(data, 2, generator(0, "fit"))
        assert fit.loss == pytest.approx(whole_loss(model, data, "image", "text", **weight), rel=1e-5)
        assert fit.loss_sum == pytest.approx(2 * fit.loss)


def test_three_modalities_report_the_mean_over_their_pairs_and_a_client_with_two_that_of_its_own():
    model, data = learner(THREE, optimizer=STILL), items(spec=THREE, modalities=("audio", "image", "text"))
    losses = {
        pair: whole_loss(model, data, *pair) for pair in (("audio", "image"), ("audio", "text"), ("image", "text"))
    }
    assert model.fit(data, 1, generator(0, "fit")).loss == pytest.approx(sum(losses.values()) / 3, rel=1e-5)
    two = items(spec=THREE, modalities=("audio", "text"))
    assert model.fit(two, 1, generator(0, "fit")).loss == pytest.approx(losses["audio", "text"], rel=1e-5)


def least_of_a_constant(data, pos_weight, similar):
    """By search, not by formula: the least weighted squared error of one number for all pairs."""
    s = same_class(*[data.labels.double()] * 2, similar).flatten()
    weight = 1 + (pos_weight - 1) * s
    r = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]
    losses = torch.cat([(weight * (part - s) ** 2).mean(1) for part in r.split(500)])
    return float(losses.min())


@pytest.mark.parametrize("pos_weight", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("similar", ["binary", "jaccard"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_the_relative_report_divides_by_the_loss_of_the_best_constant(multi_label, similar, pos_weight):
    data = items(60, multi_label=multi_label)
    options = {"optimizer": STILL, "pos_weight": pos_weight, "similar": similar}
    plain = learner(**options).fit(data, 2, generator(0, "fit"))
    relative = learner(**options, relative_loss=True).fit(data, 2, generator(0, "fit"))
    least = least_of_a_constant(data, pos_weight, similar)
    assert relative.loss == pytest.approx(plain.loss / least, rel=1e-5)
    assert relative.loss_sum == pytest.approx(plain.loss_sum / least, rel=1e-5)


@pytest.mark.parametrize("similar", ["binary", "jaccard"])
def test_where_all_pairs_are_alike_the_report_is_l_itself(similar):
    data = items(100)
    labels = torch.tensor([[True, False, False, False]]).expand(100, 4)
    third = {"image": labels.clone(), "text": labels.clone()}
    third["text"][:, 2:] = True  # of the texts alone: S is 1/3 by Jaccard, and 1 else
    alike = Items(
        data.features,
        {"image": torch.arange(100), "text": torch.arange(100, 200)},
        torch.cat([third["image"], third["text"]]),
    )
    for pos_weight in (1.0, 3.0):
        losses = [
            learner(optimizer=STILL, relative_loss=r, similar=similar, pos_weight=pos_weight)
            .fit(alike, 1, generator(0, "fit"))
            .loss
            for r in (False, True)
        ]
        assert losses[0] == losses[1] > 0


def test_an_epoch_uses_the_larger_modality_once_and_begins_the_smaller_anew():
    seen = list(drsl._batches({"image": 7, "text": 2}, 3, generator(0, "b"), CPU))
    assert [len(rows["image"]) for rows in seen] == [3, 3, 1]
    assert sorted(torch.cat([rows["image"] for rows in seen]).tolist()) == list(range(7))
    assert [sorted(rows["text"].tolist()) for rows in seen] == [[0, 1]] * 3
    steps = [len(list(drsl._batches({"a": n, "b": n}, 3, generator(0, "b"), CPU))) for n in (1, 3, 4)]
    assert steps == [1, 1, 2]


def test_the_modalities_are_drawn_apart():
    rows = next(drsl._batches({"image": 100, "text": 100}, 100, generator(0, "b"), CPU))
    assert not torch.equal(rows["image"], rows["text"])


@pytest.mark.parametrize(
    "data",
    [
        items(modalities=("image",)),
        items(modalities=("text",)),
        items(0),
        Items({}, {}, torch.ones(3, 4, dtype=torch.bool)),
        Items.paired({"text": torch.ones(2, 3), "image": torch.ones(0, 5)}, torch.ones(2, 4, dtype=torch.bool)),
    ],
    ids=["image", "text", "no item", "no modality", "a modality without rows"],
)
def test_a_client_without_a_pair_of_modalities_abstains_and_still_receives(data):
    model = learner()
    before = model.state()
    fit = model.fit(data, 3, generator(0, "fit"))
    assert (fit.trained, fit.loss, fit.loss_sum) == (False, 0.0, 0.0)
    assert changed(before, model.state()) == set()
    received = {name: torch.full_like(before[name], 0.5) for name in model.trainable}
    model.load(received)
    assert changed(before, model.state()) == model.trainable


@pytest.mark.parametrize("fusion", get_args(Fusion))
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_unpaired_items_train_whatever_the_batches(fusion, batch_size):
    model = learner(batch_size=batch_size, fusion=fusion)
    before = model.state()
    fit = model.fit(unpaired(), 3, generator(0, "fit"))
    assert fit.trained
    assert math.isfinite(fit.loss)
    after = model.state()
    assert all(torch.isfinite(t).all() for t in after.values())
    assert changed(before, after) >= model.common


def test_what_a_client_lacks_is_not_trained():
    model = learner(THREE)
    before = model.state()
    model.fit(items(spec=THREE, modalities=("audio", "image")), 2, generator(0, "fit"))
    moved = changed(before, model.state()) & model.trainable
    assert moved == model.owned({"audio", "image"})


def test_one_item_one_class_and_no_class_train():
    for labels in ([[True, False, False, False]], [[False] * 4]):
        data = Items.paired({"image": torch.ones(1, 5), "text": torch.ones(1, 3)}, torch.tensor(labels))
        model = learner(optimizer={"lr": 1e-2})
        first = model.fit(data, 1, generator(0, "fit")).loss
        assert model.fit(data, 200, generator(1, "fit")).trained
        # R goes to S: to 1 for a pair with a class in common, to 0 for one without
        related = model.similarity(
            model.encode("image", torch.ones(1, 5)), model.encode("text", torch.ones(1, 3)), ("image", "text")
        )
        assert first > 0
        assert float(related) == pytest.approx(float(labels[0][0]), abs=0.05)


def test_a_loss_that_is_not_finite_is_not_hidden():
    data = items(4)
    data.features["image"][0, 0] = math.nan
    fit = learner(relative_loss=True).fit(data, 1, generator(0, "fit"))
    assert math.isnan(fit.loss)
    assert math.isnan(fit.loss_sum)


def test_dead_networks_still_learn_the_constant():
    model = learner(optimizer={"lr": 1e-2})
    dead = {
        name: torch.full_like(t, -1e3)
        for name, t in model.state().items()
        if name.startswith("towers.") and name.endswith("1.bias")
    }
    model.load(dead)
    data = items(40)
    losses = [model.fit(data, 100, generator(i, "fit")).loss for i in range(3)]
    p = float(same_class(*[data.labels.float()] * 2, "binary").mean())
    assert losses[2] == pytest.approx(p * (1 - p), rel=0.05)


def test_trained_items_find_their_own_class_first_in_both_directions():
    g = generator(0, "classes")
    labels = torch.eye(4, dtype=torch.bool)[torch.arange(40) % 4]
    centres = {m: torch.randn(4, d, generator=g) for m, d in SPEC.dims.items()}
    features = {m: labels.float() @ c + 0.1 * torch.randn(40, c.shape[1], generator=g) for m, c in centres.items()}
    data = Items.paired(features, labels)

    def first_is_right(model, query, gallery):
        scores = model.similarity(*(model.encode(m, features[m]) for m in (query, gallery)), (query, gallery))
        return float((labels[scores.argmax(dim=1)] & labels).any(dim=1).float().mean())

    for fusion in get_args(Fusion):
        model = learner(fusion=fusion, hidden=(32,), width=16, relation=32, optimizer={"lr": 1e-2})
        model.fit(data, 150, generator(0, "fit"))
        assert first_is_right(model, "image", "text") > 0.95
        assert first_is_right(model, "text", "image") > 0.95


def test_similarity_is_of_two_different_modalities():
    model = learner()
    z = model.encode("image", items().features["image"])
    for direction in (("image", "image"), ("image", "audio")):
        with pytest.raises(ValueError, match="expected two modalities \\(image and text\\), got image and"):
            model.similarity(z, z, direction)


@pytest.mark.parametrize("fusion", get_args(Fusion))
def test_an_empty_gallery_or_no_query_gives_no_scores(fusion):
    model = learner(fusion=fusion)
    z = {m: model.encode(m, x) for m, x in items().features.items()}
    assert model.similarity(z["image"], z["text"][:0], ("image", "text")).shape == (12, 0)
    assert model.similarity(z["image"][:0], z["text"], ("image", "text")).shape == (0, 12)
    assert model.similarity(z["text"][:0], z["image"], ("text", "image")).shape == (0, 12)
    assert model.encode("text", torch.empty(0, 3)).shape == (0, 6)


def test_scores_need_no_gradient_and_have_no_strides():
    model = learner()
    z = {m: model.encode(m, x) for m, x in items().features.items()}
    for direction in (("image", "text"), ("text", "image")):
        scores = model.similarity(z[direction[0]], z[direction[1]], direction)
        assert not scores.requires_grad
        assert scores.is_contiguous()


@pytest.mark.parametrize("units", [1, 10, 64, 1000])
def test_tiles_cover_every_pair_once_within_the_bound(units, monkeypatch):
    monkeypatch.setattr(drsl, "_CPU_TILE", units)
    for p, q, width in product((0, 1, 5), (0, 1, 7), (1, 3, 20)):
        covered = Counter()
        for rows, columns in drsl._tiles(torch.empty(p, 2), torch.empty(q, 2), width):
            pairs = list(product(range(*rows.indices(p)), range(*columns.indices(q))))
            assert len(pairs) * width <= max(units, width)
            covered.update(pairs)
        assert covered == Counter(product(range(p), range(q)))


@pytest.mark.parametrize("fusion", get_args(Fusion))
def test_float32_scores_of_wide_networks_are_exact_to_rounding(fusion):
    g = generator(0, "wide")
    sizes = ((1024, 600 if fusion == "concatenate" else 300), (1024,), (1, 1024), (1,))
    network = [torch.randn(*s, generator=g, dtype=torch.float64) / 32 for s in sizes]
    z = [torch.rand(n, 300, generator=g, dtype=torch.float64) for n in (30, 400)]
    with torch.no_grad():
        exact = relate(*z, Relation(*network), fusion)
        found = relate(*(x.float() for x in z), Relation(*(x.float() for x in network)), fusion)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.std()))


PEAK = """
import torch
from pathlib import Path
from fedxmr.metrics import mean_average_precision, tie_order
from fedxmr.learners.drsl import DRSL, DRSLConfig
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

torch.set_num_threads(1)
g = generator(0, "items")
dims = {"image": 128, "text": 100}
labels = torch.eye(10, dtype=torch.bool)[torch.randint(10, (4000,), generator=g)]
items = Items.paired({m: torch.randn(4000, d, generator=g) for m, d in dims.items()}, labels)
learner = DRSL(DRSLConfig(), DataSpec(dims, 10), torch.device("cpu"), generator(0, "initial"))
learner.fit(items.select(torch.arange(200)), 1, generator(0, "fit"))
text, image = (learner.encode(m, items.features[m]) for m in ("text", "image"))  # the direction that is transposed
order = tie_order(4000, generator(0, "ties"))
scores = lambda rows: learner.similarity(text[rows], image, ("text", "image"))
assert 0 < mean_average_precision(scores, labels, labels, order=order) < 1
status = Path("/proc/self/status").read_text()
print(*[line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
def test_evaluating_4000_by_4000_takes_less_than_a_gigabyte():
    ended = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=500)
    assert int(ended.stdout) * 1024 < 1e9  # the process's whole peak, torch itself included


def test_a_large_batch_keeps_no_hidden_unit_of_a_pair_for_the_gradient():
    # autograd on its own would keep 300 x 300 pairs x 64 units
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    model = learner(relation=64, batch_size=300)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.fit(items(300), 1, generator(0, "fit"))
    assert max(kept) == 300 * 300

"""JFSE as a learner: its switches, its class vectors, zero-shot tasks, and clients that lack things."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from fedxmr import commands
from fedxmr.centralized import centralized
from fedxmr.errors import InputError
from fedxmr.learners.adversarial import modality_loss
from fedxmr.learners.alignment import SCHEMES, Pair
from fedxmr.learners.jfse import JFSE, JFSEConfig, class_targets, orthonormal
from fedxmr.seeding import generator
from fedxmr.simulate import simulate
from fedxmr.types import DataSpec, Items

CPU = torch.device("cpu")
VECTORS = torch.randn(4, 6, generator=generator(0, "class vectors"))
SPEC = DataSpec({"image": 5, "text": 3}, 4, VECTORS)
SEEN = torch.tensor([True, True, True, False])
ZERO_SHOT = dataclasses.replace(SPEC, seen=SEEN)
SMALL = {"hidden": 8, "noise": 4, "discriminator": (6, 4), "critic_steps": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def learner(spec=SPEC, rng=True, **options):
    return JFSE(JFSEConfig(**SMALL | options), spec, CPU, generator(0, "initial") if rng else None)


def items(n=12, modalities=("image", "text"), spec=SPEC):
    g = generator(3, "items")
    labels = torch.eye(4, dtype=torch.bool)[torch.arange(n) % 4]
    features = {m: torch.randn(n, d, generator=g) for m, d in spec.dims.items()}
    return Items.paired({m: features[m] for m in modalities}, labels)


def trained(data=None, epochs=2, spec=SPEC, **options):
    """The state that some epochs leave, and what they changed: names without the moments."""
    model = learner(spec, **options)
    before = model.state()
    fit = model.fit(items() if data is None else data, epochs, generator(0, "fit"))
    assert math.isfinite(fit.loss)
    after = model.state()
    assert all(torch.isfinite(t).all() for t in after.values())
    changed = {k for k, t in after.items() if not k.startswith("optimizer.") and not torch.equal(t, before[k])}
    return after, changed


def kinds(names):
    return {name.split(".")[0] for name in names}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# options and names


def test_the_defaults_are_the_codes_weights_and_the_papers_training():
    c = JFSEConfig()
    assert (c.beta, c.gamma, c.lambda_, c.synthetic, c.generator) == (1e-4, 0.01, 1.0, 0.01, 0.1)
    assert (c.alignment, c.critic_steps, c.penalty, c.batch_size, c.copies) == (("cmpm",), 5, 10.0, 64, 1)
    assert (c.optimizer.lr, c.optimizer.betas) == (1e-4, (0.5, 0.999))
    assert JFSEConfig(optimizer={"betas": (0.9, 0.999)}).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    "bad",
    [
        {"lamda": 1},
        {"layers": 0},
        {"beta": -1},
        {"synthetic": 0},
        {"alignment": ["mmd"]},
        {"alignment": ["cmpm", "cmpm"]},
        {"lambda": 0, "gamma": 0, "beta": 0},
        {"lambda": 0, "gamma": 0, "alignment": []},
        {"discriminator": [300]},
    ],
)
def test_a_bad_option_is_refused(bad):
    with pytest.raises(ValidationError):
        JFSEConfig(**bad)


def test_lambda_is_spelt_lambda_in_yaml():
    assert JFSEConfig(**{"lambda": 0.5}).lambda_ == JFSEConfig(lambda_=0.5).lambda_ == 0.5
    assert JFSEConfig().model_dump(by_alias=True)["lambda"] == 1.0


def test_fedcmr_shares_the_regressors_last_layers_and_fedavg_everything():
    model = learner(layers=3)
    assert model.common == {f"regressors.{m}.2.{part}" for m in SPEC.dims for part in ("weight", "bias")}
    assert kinds(model.trainable) == {"regressors", "generators", "critics", "discriminator"}
    of_images = {name for name in model.trainable if "image" in name}
    discriminator = {name for name in model.trainable if "discriminator" in name}
    assert model.owned({"text"}) == model.trainable - of_images - discriminator
    assert "epochs" in model.state()
    assert {f"optimizer.exp_avg_sq.{name}" for name in model.trainable} <= model.state().keys()


def test_a_switched_off_part_does_not_exist_and_leaves_the_others_as_they_start():
    whole = learner().state()
    without = {"synthesis": {"generators", "critics"}, "gamma": {"discriminator"}}
    for switch, gone in without.items():
        state = learner(**{switch: 0}).state()
        assert kinds(learner().trainable) - kinds(learner(**{switch: 0}).trainable) == gone
        assert all(torch.equal(whole[name], t) for name, t in state.items())


def test_no_moments_without_an_optimiser_that_is_kept():
    assert not [name for name in learner(keep_optimizer=False).state() if name.startswith("optimizer.")]


# the switches of Table 3


@pytest.mark.parametrize(
    "switch", [{}, {"synthesis": False}, {"lambda": 0}, {"alignment": []}, {"beta": 0}, {"gamma": 0}]
)
def test_every_component_can_be_switched_off(switch):
    after, changed = trained(**switch)
    assert changed == {name for name in after if not name.startswith("optimizer.")}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("synthesis", [True, False])
def test_each_scheme_alone_trains_the_regressors(scheme, synthesis):
    _, changed = trained(**{"lambda": 0, "gamma": 0, "beta": 1, "synthesis": synthesis, "alignment": [scheme]})
    assert "regressors" in kinds(changed)


def test_schemes_can_be_summed():
    ends = [trained(beta=1, alignment=schemes)[0] for schemes in ([], ["cmmd"], ["cmca"], ["cmmd", "cmca"])]
    assert not any(same(a, b) for i, a in enumerate(ends) for b in ends[:i])
    assert same(trained(alignment=[])[0], trained(beta=0)[0])


def test_without_cycle_the_report_still_is_the_cycle_of_true_features():
    options = {"optimizer": {"lr": 1e-30}, "batch_size": 12}
    data = items()
    model = learner(**options)
    targets = torch.nn.functional.normalize(VECTORS)[data.labels.long().argmax(1)]
    expected = sum(float((model.encode(m, x) - targets).square().mean()) for m, x in data.features.items())
    for weight in (0, 1, 7):
        fit = learner(**options | {"lambda": weight}).fit(data, 2, generator(0, "fit"))
        assert fit.loss == pytest.approx(expected, rel=1e-5)
        assert fit.loss_sum == pytest.approx(2 * expected, rel=1e-5)


def test_the_reversal_grows_with_the_epochs_trained_and_starts_at_none():
    options = {"lambda": 0, "alignment": [], "gamma": 1, "synthesis": False, "optimizer": {"name": "sgd", "lr": 0.5}}
    model = learner(ramp=4, **options)
    moved = []
    for epoch in range(3):
        before = model.state()
        model.fit(items(), 1, generator(epoch, "fit"))
        assert not torch.equal(model.state()["discriminator.0.weight"], before["discriminator.0.weight"])
        moved.append(float((model.state()["regressors.image.1.bias"] - before["regressors.image.1.bias"]).norm()))
    assert moved[0] == 0
    assert moved[1] > 0
    assert model.state()["epochs"] == 3
    assert kinds(trained(ramp=0, epochs=1, **options)[1]) == {"discriminator", "regressors", "epochs"}


def test_the_reversal_moves_embeddings_to_where_the_discriminator_errs():
    data = items(12)
    model = learner(**{"lambda": 0, "alignment": [], "gamma": 1, "synthesis": False, "ramp": 0, "batch_size": 12,
                       "optimizer": {"name": "sgd", "lr": 0.1}})  # fmt: skip
    before = model.state()

    def error():
        logits = [model._discriminate(model.encode(m, data.features[m])) for m in ("image", "text")]
        return float(modality_loss(logits, (0, 1)).detach())

    start = error()
    model.fit(data, 1, generator(0, "fit"))
    regressors, discriminator = (
        {name: t for name, t in model.state().items() if name.startswith(kind)} for kind in ("regressors", "discrim")
    )
    model.load(before | regressors)
    assert error() > start
    model.load(before | discriminator)
    assert error() < start


def test_generated_features_come_to_resemble_true_ones():
    g = generator(0, "clusters")
    labels = torch.eye(4, dtype=torch.bool)[torch.arange(200) % 4]
    centres = {m: 2 * torch.randn(4, d, generator=g) for m, d in SPEC.dims.items()}
    features = {m: labels.float() @ c + 0.1 * torch.randn(200, c.shape[1], generator=g) for m, c in centres.items()}
    model = learner(hidden=32, critic_steps=5, batch_size=50, optimizer={"lr": 0.005})

    def distance():
        c = model._targets(torch.eye(4, dtype=torch.bool).repeat(25, 1))
        made = {m: model._generate(m, c, generator(1, "noise")).detach().reshape(25, 4, -1).mean(0) for m in SPEC.dims}
        return sum(float((made[m] - centres[m]).norm()) for m in SPEC.dims)

    before = distance()
    model.fit(Items.paired(features, labels), 50, generator(0, "fit"))
    assert distance() < before / 3


# class vectors


def test_class_vectors_have_length_1_or_each_dimension_in_0_to_1_over_all_classes():
    vectors = VECTORS.clone()
    vectors[:, 2] = 7.0
    spec = DataSpec(SPEC.dims, 4, vectors, SEEN)
    unit = class_targets(JFSEConfig(), spec)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(unit * vectors.norm(dim=1, keepdim=True), vectors)
    scaled = class_targets(JFSEConfig(embedding="relu"), spec)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(scaled.amin(0), torch.zeros(6))
    assert torch.equal(scaled.amax(0)[others], torch.ones(5))  # of unseen classes too: never outside 0 to 1
    assert torch.equal(scaled[:, 2], torch.zeros(4))


def test_made_up_class_vectors_are_orthonormal_and_the_same_everywhere():
    spec = DataSpec(SPEC.dims, 4)
    made_up = class_targets(JFSEConfig(width=9), spec)
    torch.testing.assert_close(made_up @ made_up.T, torch.eye(4))
    assert torch.equal(made_up, class_targets(JFSEConfig(width=9), spec))
    assert not torch.equal(made_up, class_targets(JFSEConfig(width=9, class_seed=1), spec))
    assert orthonormal(3, 3, 0).shape == (3, 3)
    with pytest.raises(InputError, match=r"learner.width: expected at least 4.*got 3"):
        class_targets(JFSEConfig(width=3), spec)
    for rng in (True, False):  # a learner whose state is loaded next has the same
        assert torch.equal(learner(spec, rng, width=9)._class_vectors, made_up)


def test_made_up_class_vectors_are_remarked_upon():
    assert JFSE.remarks(JFSEConfig(), SPEC) == ()
    (remark,) = JFSE.remarks(JFSEConfig(class_seed=3), DataSpec(SPEC.dims, 4))
    assert "no class vectors" in remark
    assert "seed 3" in remark


def test_an_item_of_several_classes_aims_at_their_mean():
    model = learner()
    labels = torch.tensor([[True, False, True, False], [False, True, False, False]])
    expected = torch.stack([(model._class_vectors[0] + model._class_vectors[2]) / 2, model._class_vectors[1]])
    torch.testing.assert_close(model._targets(labels), expected)


# zero-shot


def test_a_zero_shot_task_needs_class_vectors_that_mean_something():
    spec = DataSpec(SPEC.dims, 4, seen=SEEN)
    with pytest.raises(InputError, match="class vectors for a zero-shot task, got none"):
        learner(spec)
    assert learner(spec, allow_random=True).fit(items(), 1, generator(0, "fit")).trained


def test_zero_shot_training_uses_no_item_of_an_unseen_class():
    data = items()
    unseen = data.labels[:, 3]
    poisoned = {m: torch.where(unseen[:, None], math.nan, x) for m, x in data.features.items()}
    after, _ = trained(Items.paired(poisoned, data.labels), spec=ZERO_SHOT)
    seen_only, _ = trained(data.select((~unseen).nonzero().flatten()), spec=ZERO_SHOT)
    assert same(after, seen_only)
    several = data.labels.clone()
    several[unseen, 0] = True  # a seen class does not make an item of an unseen one usable
    assert same(after, trained(Items.paired(poisoned, several), spec=ZERO_SHOT)[0])
    assert not learner(ZERO_SHOT).fit(data.select(unseen.nonzero().flatten()), 1, generator(0, "fit")).trained


def test_unseen_classes_are_imagined_from_their_vectors_alone():
    seen_only, _ = trained(spec=ZERO_SHOT, imagine="none")
    imagined, _ = trained(spec=ZERO_SHOT)
    assert not same(seen_only, imagined)
    other = VECTORS.clone()
    other[3] = -other[3]
    elsewhere = dataclasses.replace(ZERO_SHOT, class_vectors=other)
    assert same(trained(spec=elsewhere, imagine="none")[0], seen_only)
    assert not same(trained(spec=elsewhere)[0], imagined)
    assert same(trained(spec=ZERO_SHOT, synthesis=False)[0],
                trained(spec=ZERO_SHOT, synthesis=False, imagine="none")[0])  # fmt: skip


def test_a_client_can_imagine_the_classes_it_lacks():
    data = items()
    some = data.select((data.labels[:, 0] | data.labels[:, 1]).nonzero().flatten())
    assert not same(trained(some)[0], trained(some, imagine="missing")[0])
    assert same(trained(data)[0], trained(data, imagine="missing")[0])  # it lacks none


def test_regressors_carry_over_to_unseen_classes_what_they_know_of_seen_ones():
    # features are a linear image of the class vector: what is known of seen classes carries over
    g = generator(0, "semantic")
    vectors = torch.randn(30, 5, generator=g)
    vectors = torch.nn.functional.normalize(vectors)
    mixing = {m: torch.randn(5, 12, generator=g) for m in ("image", "text")}
    seen = torch.arange(30) < 24
    spec = DataSpec({"image": 12, "text": 12}, 30, vectors, seen)

    def draw(classes):
        labels = torch.eye(30, dtype=torch.bool)[classes]
        noise = {m: 0.1 * torch.randn(len(classes), 12, generator=g) for m in mixing}
        return Items.paired({m: vectors[classes] @ w + noise[m] for m, w in mixing.items()}, labels)

    model = learner(spec, hidden=64, optimizer={"lr": 0.002})
    model.fit(draw(torch.arange(240) % 24), 40, generator(0, "fit"))
    test = draw(24 + torch.arange(60) % 6)
    image, text = (model.encode(m, test.features[m]) for m in ("image", "text"))
    nearest = model.similarity(image, text, ("image", "text")).argmax(1)
    right = float((test.labels[nearest] & test.labels).any(1).float().mean())
    chance = 1 / 6
    assert right > chance + 5 * math.sqrt(chance * (1 - chance) / len(test))  # standard deviations of a guesser


# clients that lack things


def test_a_client_with_one_modality_trains_its_own_networks_alone_and_reports_twice_its_cycle():
    data = items(modalities=("text",))
    _, changed = trained(data)
    assert kinds(changed) == {"regressors", "generators", "critics", "epochs"}
    assert not {name for name in changed if "image" in name}
    options = {"optimizer": {"lr": 1e-30}, "batch_size": 12}
    model = learner(**options)
    targets = model._targets(data.labels)
    cycle = float((model.encode("text", data.features["text"]) - targets).square().mean())
    assert model.fit(data, 1, generator(0, "fit")).loss == pytest.approx(2 * cycle, rel=1e-5)


def test_one_modality_with_neither_cycle_nor_synthesis_has_nothing_to_train():
    model = learner(**{"lambda": 0, "synthesis": False})
    before = model.state()
    fit = model.fit(items(modalities=("text",)), 2, generator(0, "fit"))
    assert (fit.trained, fit.loss) == (False, 0.0)
    assert same(model.state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpaired_items_and_batches_without_a_modality_train(batch_size, scheme):
    g = generator(0, "unpaired")
    data = Items(
        {"image": torch.randn(3, 5, generator=g), "text": torch.randn(4, 3, generator=g)},
        {"image": torch.tensor([0, 1, 2]), "text": torch.tensor([2, 3, 4, 5])},
        torch.eye(4, dtype=torch.bool)[[0, 1, 2, 3, 0, 1, 2]],
    )  # item 6 has neither
    trained(data, batch_size=batch_size, alignment=[scheme], beta=1)


def test_items_of_no_class_are_left_out():
    data = items()
    labels = data.labels.clone()
    labels[::3] = False
    poisoned = {m: torch.where(labels.any(1)[:, None], x, math.nan) for m, x in data.features.items()}
    after, _ = trained(Items.paired(poisoned, labels))
    assert same(after, trained(data.select(labels.any(1).nonzero().flatten()))[0])


@pytest.mark.parametrize("data", [items(0), Items({}, {}, torch.ones(3, 4, dtype=torch.bool))])
def test_without_items_or_modalities_nothing_is_trained(data):
    model = learner()
    before = model.state()
    fit = model.fit(data, 2, generator(0, "fit"))
    assert (fit.trained, fit.loss) == (False, 0.0)
    assert same(model.state(), before)


def test_three_modalities():
    spec = DataSpec({"audio": 4, "image": 5, "text": 3}, 4, VECTORS)
    data = items(spec=spec, modalities=("audio", "image", "text"))
    after, changed = trained(data, spec=spec, alignment=list(SCHEMES))
    assert changed == {name for name in after if not name.startswith("optimizer.")}
    assert after["discriminator.2.weight"].shape == (2, 4)


@pytest.mark.parametrize("held", [("audio",), ("text",), ("audio", "text"), ("audio", "image", "text")], ids="+".join)
@pytest.mark.parametrize(
    "switches",
    [{}, {"synthesis": False}, {"lambda": 0}, {"lambda": 0, "synthesis": False}, {"gamma": 0}, {"alignment": []}],
    ids=str,
)
def test_what_a_client_owns_is_what_it_trains_under_every_switch(held, switches):
    # any two modalities suffice for the discriminator; one alone leaves it untouched, which no mean may count
    spec = DataSpec({"audio": 4, "image": 5, "text": 3}, 4, VECTORS)
    _, changed = trained(items(spec=spec, modalities=held), spec=spec, **switches)
    assert changed - {"epochs"} == learner(spec, **switches).owned(held)


def test_a_loss_that_is_not_finite_is_not_hidden():
    data = items()
    data.features["image"][0, 0] = math.nan
    assert math.isnan(learner().fit(data, 1, generator(0, "fit")).loss)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dead_relus_and_zero_features_train_without_nan(scheme):
    model = learner(embedding="relu", features="relu", alignment=[scheme], beta=1)
    model.load({"regressors.image.1.bias": torch.full((6,), -1e3)})
    data = items()
    data.features["text"].zero_()
    assert math.isfinite(model.fit(data, 3, generator(0, "fit")).loss)
    assert all(torch.isfinite(t).all() for t in model.state().values())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", ["empty", "one row", "zero", "identical", "huge", "nothing matches", "all match"])
def test_every_scheme_and_its_gradient_are_finite(scheme, case):
    g = generator(0, "pair")
    n = {"empty": 0, "one row": 1}.get(case, 5)
    a, b = torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)
    match = torch.eye(n, dtype=torch.bool)
    match = {"nothing matches": torch.zeros_like(match), "all match": torch.ones_like(match)}.get(case, match)
    if case == "zero":
        a.zero_()
    if case == "identical":
        b = a.clone()
    if case == "huge":
        a, b = 1e6 * a, 1e6 * b
    a.requires_grad_()
    b.requires_grad_()
    loss = SCHEMES[scheme](Pair(a, b, match, (a, b)))
    assert torch.isfinite(loss)
    if loss.requires_grad:
        loss.backward()
        assert a.grad is None or torch.isfinite(a.grad).all()
        assert b.grad is None or torch.isfinite(b.grad).all()


# encoding, and runs


@pytest.mark.parametrize("embedding", ["linear", "relu"])
def test_encode_is_the_regressor(embedding):
    model = learner(embedding=embedding, layers=3)
    w, x = model.state(), items().features["image"]
    y = x
    for layer in range(3):
        y = y.clamp(min=0) if layer else y
        y = y @ w[f"regressors.image.{layer}.weight"].T + w[f"regressors.image.{layer}.bias"]
    expected = y.clamp(min=0) if embedding == "relu" else y
    torch.testing.assert_close(model.encode("image", x.double()), expected)
    assert model.encode("image", x[:0]).shape == (0, 6)


def test_a_run_without_class_vectors_says_so_before_and_after(tmp_path, capsys):
    small = ["learner.hidden=8", "learner.critic_steps=1", "dataset.items=40", "dataset.classes=3"]
    arguments = ["--learner", "jfse", "--dataset", "synthetic", "--rounds", "1", "--engine", "local", "--threads", "1"]
    assert (
        commands.run(centralized, [*arguments, "--no-pictures", "--out", str(tmp_path / "run"), *small]) == commands.OK
    )
    shown = capsys.readouterr().out
    assert "warning: jfse: the data set has no class vectors" in shown
    assert "note: jfse: the data set has no class vectors" in shown


@pytest.mark.parametrize("strategy", ["fedcmr", "fedavg", "fedprox"])
def test_a_federation_in_which_a_client_lacks_a_modality(strategy, tmp_path):
    small = ["learner.hidden=8", "learner.critic_steps=1", "dataset.items=60", "dataset.classes=3"]
    arguments = ["--learner", "jfse", "--dataset", "synthetic", "--rounds", "2", "--engine", "local", "--threads", "1"]
    federation = ["--clients", "3", "--partition", "missing-modality", "--strategy", strategy]
    assert (
        commands.run(simulate, [*arguments, *federation, "--no-pictures", "--out", str(tmp_path / "run"), *small])
        == commands.OK
    )

"""DSCMR as a learner: what it reports, what it names, and clients that lack things."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedxmr.learners.dscmr import DSCMR, DSCMRConfig, dscmr_loss
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

CPU = torch.device("cpu")
SPEC = DataSpec({"image": 5, "text": 3}, 4)


pytestmark = pytest.mark.usefixtures("one_thread")


def learner(spec=SPEC, **options):
    return DSCMR(DSCMRConfig(**{"hidden": 8, "width": 6} | options), spec, CPU, generator(0, "initial"))


def items(n=12, modalities=("image", "text"), multi_label=False):
    g = generator(3, "items")
    labels = torch.eye(4, dtype=torch.bool)[torch.randint(4, (n,), generator=g)]
    if multi_label:
        labels = torch.rand(n, 4, generator=g) < 0.9
    return Items.paired({m: torch.randn(n, SPEC.dims[m], generator=g) for m in modalities}, labels)


def test_the_defaults():
    config = DSCMRConfig()
    assert (config.hidden, config.width, config.lambda_, config.eta, config.batch_size) == (512, 256, 0.1, 0.1, 50)
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, (0.5, 0.999))


@pytest.mark.parametrize("bad", [{"lamda": 1}, {"width": 0}, {"eta": -1}, {"norm": "l2"}, {"batch_size": 0}])
def test_a_bad_option_is_refused(bad):
    with pytest.raises(ValidationError):
        DSCMRConfig(**bad)


def test_lambda_is_spelt_lambda_in_yaml():
    assert DSCMRConfig(**{"lambda": 0.5}).lambda_ == DSCMRConfig(lambda_=0.5).lambda_ == 0.5
    assert DSCMRConfig().model_dump(by_alias=True)["lambda"] == 0.1


def test_fedcmr_shares_the_common_layer_and_fedavg_everything():
    names = learner()
    assert names.common == {"common.weight", "common.bias"}
    assert names.trainable == {
        f"{layer}.{part}"
        for layer in ("towers.image", "towers.text", "common", "classifier")
        for part in ("weight", "bias")
    }
    assert names.trainable - names.owned({"image"}) == {"towers.text.weight", "towers.text.bias"}


def test_the_report_is_the_mean_of_j_over_batches_of_unequal_size():
    # a vanishing learning rate: the batches all see the initial parameters
    model, data = learner(**{"lambda": 1.0}, batch_size=5, shuffle=False, optimizer={"lr": 1e-30}), items(12)
    expected = []
    for index in torch.arange(12).split(5):
        batch = data.select(index)
        common = torch.cat([model.encode(m, batch.features[m]) for m in ("image", "text")])
        predicted = model._network.linear("classifier", common).detach()
        label, similarity, invariance = dscmr_loss(common, predicted, list(batch.rows.values()), batch.labels)
        expected.append(float(label + similarity + 0.1 * invariance))
    fit = model.fit(data, 2, generator(0, "fit"))
    assert fit.loss == pytest.approx((5 * expected[0] + 5 * expected[1] + 2 * expected[2]) / 12, rel=1e-6)
    assert fit.loss_sum == pytest.approx(2 * sum(expected), rel=1e-6)


def test_a_client_with_half_the_modalities_reports_l1_twice():
    options = {"lambda": 1.0, "batch_size": 12, "optimizer": {"lr": 1e-30}}
    data = items(12, modalities=("text",))
    common = learner(**options).encode("text", data.features["text"])
    predicted = learner(**options)._network.linear("classifier", common).detach()
    label, similarity, _ = dscmr_loss(common, predicted, [data.rows["text"]], data.labels)
    fit = learner(**options).fit(data, 1, generator(0, "fit"))
    assert fit.loss == pytest.approx(2 * float(label) + float(similarity), rel=1e-6)


def test_what_a_client_lacks_is_not_trained():
    model = learner()
    before = model.state()
    model.fit(items(modalities=("image",)), 2, generator(0, "fit"))
    changed = {name for name, t in model.state().items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if "towers.text" not in name}


def test_unpaired_items_and_a_batch_without_a_modality_train():
    g = generator(0, "unpaired")
    data = Items(
        {"image": torch.randn(3, 5, generator=g), "text": torch.randn(4, 3, generator=g)},
        {"image": torch.tensor([0, 1, 2]), "text": torch.tensor([2, 3, 4, 5])},
        torch.eye(4, dtype=torch.bool)[[0, 1, 2, 3, 0, 1, 2]],
    )  # item 6 has neither
    for batch_size in (1, 2, 7):
        model = learner(batch_size=batch_size)
        fit = model.fit(data, 3, generator(0, "fit"))
        assert fit.trained
        assert math.isfinite(fit.loss)
        assert all(torch.isfinite(t).all() for t in model.state().values())


@pytest.mark.parametrize("data", [items(0), Items({}, {}, torch.ones(3, 4, dtype=torch.bool))])
def test_without_items_or_modalities_nothing_is_trained(data):
    model = learner()
    before = model.state()
    fit = model.fit(data, 2, generator(0, "fit"))
    assert (fit.trained, fit.loss) == (False, 0.0)
    assert all(torch.equal(t, before[name]) for name, t in model.state().items())


def test_counting_shared_classes_never_reports_below_zero():
    data = items(12, multi_label=True)
    options = {"similar": "count", "lambda": 50.0, "batch_size": 12, "optimizer": {"lr": 1e-30}}
    assert learner(**options).fit(data, 1, generator(0, "fit")).loss == 0.0
    assert learner(**options | {"similar": "binary"}).fit(data, 1, generator(0, "fit")).loss > 0


def test_a_loss_that_is_not_finite_is_not_hidden():
    data = items(4)
    data.features["image"][0, 0] = math.nan
    fit = learner(similar="count").fit(data, 1, generator(0, "fit"))
    assert math.isnan(fit.loss)
    assert math.isnan(fit.loss_sum)


def test_dead_relus_and_zero_features_train_without_nan():
    model = learner(activation="relu")
    state = model.state()
    model.load({"common.bias": torch.full_like(state["common.bias"], -1e3)})
    fit = model.fit(items(), 2, generator(0, "fit"))
    assert math.isfinite(fit.loss)
    assert all(torch.isfinite(t).all() for t in model.state().values())


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "none"])
def test_encode_is_the_subspace_after_its_activation(activation):
    model = learner(activation=activation)
    w, x = model.state(), items().features["image"]
    hidden = (x @ w["towers.image.weight"].T + w["towers.image.bias"]).clamp(min=0)
    z = hidden @ w["common.weight"].T + w["common.bias"]
    negative = {"leaky_relu": 0.01, "relu": 0.0, "none": 1.0}[activation]
    torch.testing.assert_close(model.encode("image", x.double()), torch.where(z > 0, z, negative * z))


def test_encode_takes_many_and_no_rows():
    model = learner()
    x = torch.randn(5000, 3, generator=generator(0, "x"))
    whole = model.encode("text", x)
    assert whole.shape == (5000, 6)
    torch.testing.assert_close(whole[4990:], model.encode("text", x[4990:]))
    assert not whole.requires_grad
    assert model.encode("text", x[:0]).shape == (0, 6)


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
    first = model.fit(data, 1, generator(0, "fit")).loss
    assert model.fit(data, 80, generator(1, "fit")).loss < first
    assert before < 0.6
    assert first_is_right() == 1.0


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_order_of_the_items_does_not_show_in_the_loss(data):
    n = data.draw(st.integers(1, 6))
    g = generator(data.draw(st.integers(0, 1000)), "permuted")
    has = torch.rand(3, n, generator=g) < 0.7
    labels = torch.rand(n, 4, generator=g) < 0.4
    common = torch.randn(3, n, 2, generator=g, dtype=torch.float64)
    predicted = torch.randn(3, n, 4, generator=g, dtype=torch.float64)
    order = torch.randperm(n, generator=g)

    def loss(of):
        rows = [has[m][of].nonzero().flatten() for m in range(3)]
        parts = [of[r] for r in rows]
        return dscmr_loss(
            torch.cat([common[m][p] for m, p in enumerate(parts)]),
            torch.cat([predicted[m][p] for m, p in enumerate(parts)]),
            rows,
            labels[of],
        )

    torch.testing.assert_close(torch.stack(loss(torch.arange(n))), torch.stack(loss(order)))

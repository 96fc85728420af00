"""DRSL's similarity, its loss, its gradient and its updates against loops over eq. 2 to 10 in float64 NumPy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from fedxmr.learners import drsl
from fedxmr.learners.drsl import DRSL, DRSLConfig, Fusion, Relation, drsl_loss, relate, same_class
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items, Proximal

FUSIONS = get_args(Fusion)
CPU = torch.device("cpu")


def fuse(z_i, z_t, fusion):
    """Eq. 4."""
    return {
        "concatenate": np.concatenate([z_i, z_t]),
        "multiply": z_i * z_t,
        "add": z_i + z_t,
        "subtract": z_i - z_t,
    }[fusion]


def literal_relation(z_i, z_t, network, fusion):
    """R of eq. 5, pair by pair."""
    weight, bias, output, constant = network
    related = np.empty((len(z_i), len(z_t)))
    for p, q in np.ndindex(related.shape):
        hidden = np.maximum(weight @ fuse(z_i[p], z_t[q], fusion) + bias, 0)
        related[p, q] = output[0] @ hidden + constant[0]
    return related


def literal_slopes(z_i, z_t, network, fusion, slope):
    """Back through eq. 5 and 4, pair by pair: the gradient by z_i, z_t, W, b, w and c of a loss with dL/dR = slope."""
    weight, bias, output, constant = network
    of_i, of_t, of_weight, of_bias, of_output, of_constant = (
        np.zeros_like(x) for x in (z_i, z_t, weight, bias, output, constant)
    )
    for p, q in np.ndindex(slope.shape):
        v = fuse(z_i[p], z_t[q], fusion)
        before = weight @ v + bias
        of_constant += slope[p, q]
        of_output[0] += slope[p, q] * np.maximum(before, 0)
        of_before = slope[p, q] * output[0] * (before > 0)
        of_weight += np.outer(of_before, v)
        of_bias += of_before
        of_v = weight.T @ of_before
        k = len(z_i[p])
        match fusion:
            case "concatenate":
                of_i[p] += of_v[:k]
                of_t[q] += of_v[k:]
            case "multiply":
                of_i[p] += of_v * z_t[q]
                of_t[q] += of_v * z_i[p]
            case "add":
                of_i[p] += of_v
                of_t[q] += of_v
            case "subtract":
                of_i[p] += of_v
                of_t[q] -= of_v
    return of_i, of_t, of_weight, of_bias, of_output, of_constant


def literal_similar(labels_p, labels_q):
    """Eq. 9, for items of one class."""
    return np.array([[1.0 if p == q else 0.0 for q in labels_q] for p in labels_p])


def problem(fusion, p=5, q=7, k=3, h=4):
    """z of two modalities, signs mixed so that a wrong one shows, and a relation network half of whose units rest."""
    rng = np.random.default_rng(3)
    fused = 2 * k if fusion == "concatenate" else k
    network = [rng.normal(size=s) for s in ((h, fused), (h,), (1, h), (1,))]
    return rng.normal(size=(p, k)), rng.normal(size=(q, k)), network


def tensors(arrays):
    return [torch.from_numpy(x).requires_grad_() for x in arrays]


@pytest.fixture(params=[1, 8, 40, 1 << 18], ids=lambda units: f"tiles of {units}")
def tile(request, monkeypatch):
    """One pair a tile, two, ten (of seven columns: one row), all."""
    monkeypatch.setattr(drsl, "_CPU_TILE", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_relation_network_is_eq_4_and_5(fusion):
    z_i, z_t, network = problem(fusion)
    expected = literal_relation(z_i, z_t, network, fusion)
    z = tensors([z_i, z_t])
    np.testing.assert_allclose(relate(*z, Relation(*tensors(network)), fusion).detach(), expected, rtol=1e-12)
    with torch.no_grad():
        np.testing.assert_allclose(relate(*z, Relation(*tensors(network)), fusion), expected, rtol=1e-12)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_its_gradient_is_the_pairs_gradients_summed(fusion):
    z_i, z_t, network = problem(fusion)
    slope = np.random.default_rng(4).normal(size=(len(z_i), len(z_t)))
    leaves = tensors([z_i, z_t, *network])
    relate(leaves[0], leaves[1], Relation(*leaves[2:]), fusion).backward(torch.from_numpy(slope))
    for leaf, expected in zip(leaves, literal_slopes(z_i, z_t, network, fusion, slope), strict=True):
        np.testing.assert_allclose(leaf.grad, expected, rtol=1e-10, atol=1e-12)


def test_subtraction_is_the_first_less_the_second():
    z_i, z_t, network = problem("subtract")
    z = tensors([z_i, z_t])
    swapped = relate(z[1], z[0], Relation(*tensors(network)), "subtract").T
    assert not torch.allclose(swapped, relate(*z, Relation(*tensors(network)), "subtract"), atol=0.1)


@pytest.mark.parametrize("pos_weight", [1.0, 5.0])
def test_the_loss_is_the_squared_frobenius_norm_over_the_pairs(pos_weight):
    # |R - S| above and below 1: neither its absolute value nor the norm's root is its square
    related, similar = np.array([[3.0, -0.5], [0.25, 0.0]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    expected = 0.0
    for p, q in np.ndindex(2, 2):
        expected += (pos_weight if similar[p, q] else 1.0) * (related[p, q] - similar[p, q]) ** 2
    r = torch.from_numpy(related).requires_grad_()
    loss = drsl_loss(r, torch.from_numpy(similar), pos_weight)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected / 4, rel=1e-12)
    if pos_weight == 1:
        assert expected == np.linalg.norm(related - similar, "fro") ** 2
    weight = np.where(similar == 1, pos_weight, 1.0)
    np.testing.assert_allclose(r.grad, 2 * weight * (related - similar) / 4, rtol=1e-12)


def test_similar_is_eq_9():
    p, q = [0, 1, 2, 1], [1, 1, 0]
    expected = literal_similar(p, q)
    for similar in ("binary", "jaccard"):
        np.testing.assert_array_equal(same_class(torch.eye(3)[p], torch.eye(3)[q], similar), expected)


def test_several_classes_are_similar_by_a_shared_one_or_by_jaccards_index():
    rng = np.random.default_rng(5)
    p, q = rng.random((6, 4)) < 0.5, rng.random((5, 4)) < 0.5
    p[0], q[0] = False, False
    p[1], q[1] = True, True
    binary, jaccard = np.zeros((6, 5)), np.zeros((6, 5))
    for i, j in np.ndindex(6, 5):
        both, either = set(np.flatnonzero(p[i])) & set(np.flatnonzero(q[j])), set(np.flatnonzero(p[i] | q[j]))
        binary[i, j] = bool(both)
        jaccard[i, j] = len(both) / len(either) if either else 0
    first, second = torch.from_numpy(p).double(), torch.from_numpy(q).double()
    np.testing.assert_array_equal(same_class(first, second, "binary"), binary)
    np.testing.assert_allclose(same_class(first, second, "jaccard"), jaccard, rtol=1e-15)
    assert 0 < jaccard[jaccard > 0].min() < 1


CLASSES = [0, 1, 1, 2, 0, 1]


def tiny(fusion="concatenate", **options):
    """A learner, and six items of three classes that are one batch in whatever order."""
    spec = DataSpec({"image": 3, "text": 2}, 3)
    config = DRSLConfig(hidden=(5,), width=4, relation=6, fusion=fusion, batch_size=6, **options)
    learner = DRSL(config, spec, CPU, generator(0, "initial"))
    g = generator(1, "data")
    labels = torch.eye(3, dtype=torch.bool)[CLASSES]
    data = Items.paired({"image": torch.randn(6, 3, generator=g), "text": torch.randn(6, 2, generator=g)}, labels)
    return learner, data


def literal_tower(w, modality, x):
    """f_m, eq. 2 and 3: -> the input of each layer, and z."""
    inputs = [x]
    for layer in range(2):
        inputs.append(
            np.maximum(inputs[-1] @ w[f"towers.{modality}.{layer}.weight"].T + w[f"towers.{modality}.{layer}.bias"], 0)
        )
    return inputs


def literal_model(state, data, fusion):
    """L of the whole model over the number of pairs, and its gradient by name (algorithm 1, lines 2 to 6)."""
    w = {name: t.double().numpy() for name, t in state.items() if not name.startswith("optimizer.")}
    parts = [f"relations.image.text.{layer}.{part}" for layer in ("hidden", "output") for part in ("weight", "bias")]
    through = {m: literal_tower(w, m, data.features[m].double().numpy()) for m in ("image", "text")}
    z_i, z_t = through["image"][-1], through["text"][-1]
    network = [w[name] for name in parts]
    error = literal_relation(z_i, z_t, network, fusion) - literal_similar(CLASSES, CLASSES)
    of_i, of_t, *of_network = literal_slopes(z_i, z_t, network, fusion, 2 * error / error.size)
    slopes = dict(zip(parts, of_network, strict=True))
    for modality, of_z in (("image", of_i), ("text", of_t)):
        inputs, of_output = through[modality], of_z
        for layer in (1, 0):
            of_before = of_output * (inputs[layer + 1] > 0)
            slopes[f"towers.{modality}.{layer}.weight"] = of_before.T @ inputs[layer]
            slopes[f"towers.{modality}.{layer}.bias"] = of_before.sum(0)
            of_output = of_before @ w[f"towers.{modality}.{layer}.weight"]
    return (error**2).sum() / error.size, slopes


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_step_is_algorithm_1s_update(fusion):
    learner, data = tiny(fusion, optimizer={"name": "sgd", "lr": 0.1})
    start = learner.state()
    value, slopes = literal_model(start, data, fusion)
    assert slopes.keys() == start.keys()
    fit = learner.fit(data, 1, generator(0, "fit"))
    assert fit.loss == pytest.approx(value, rel=1e-5)
    for name, after in learner.state().items():
        np.testing.assert_allclose(after, start[name].double().numpy() - 0.1 * slopes[name], atol=1e-6)
        assert np.abs(slopes[name]).max() > 1e-4  # a step that forgot it would show


def literal_adam(weight, gradients, lr, betas):
    m = v = np.zeros_like(weight)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        weight = weight - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8)
    return weight


@pytest.mark.parametrize("fusion", FUSIONS)
def test_two_epochs_are_two_literal_adam_steps(fusion):
    learner, data = tiny(fusion, optimizer={"lr": 0.01, "betas": (0.5, 0.9)})
    start = learner.state()
    _, first = literal_model(start, data, fusion)
    learner.fit(data, 1, generator(0, "fit"))
    after_one = learner.state()
    _, second = literal_model(after_one, data, fusion)
    learner.fit(data, 1, generator(1, "fit"))
    after_two = learner.state()
    for name, g in first.items():
        gradients = [g, second[name]]
        at = start[name].double().numpy()
        sure = (np.abs(g) > 1e-5) | (g == 0)  # Adam's first step is the sign: a rounded 0 may have either
        for after, of in ((after_one, gradients[:1]), (after_two, gradients)):
            np.testing.assert_allclose(
                after[name].numpy()[sure], literal_adam(at, of, 0.01, (0.5, 0.9))[sure], atol=1e-5
            )


def test_fedprox_step_is_sgd_on_the_loss_plus_half_mu_the_squared_distance():
    learner, data = tiny(optimizer={"name": "sgd", "lr": 0.1})
    start = learner.state()
    value, slopes = literal_model(start, data, "concatenate")
    # below the anchor |w - a| and (w - a) differ in sign, so a wrong gradient shows
    anchor = {name: t + 2 for name, t in start.items() if name in learner.common}
    fit = learner.fit(data, 1, generator(0, "fit"), Proximal(0.3, anchor))
    assert fit.loss == pytest.approx(value, rel=1e-5)  # without the proximal term
    for name, after in learner.state().items():
        pull = 0.3 * (start[name] - anchor[name]) if name in anchor else torch.zeros(())
        np.testing.assert_allclose(
            after, start[name].double().numpy() - 0.1 * (slopes[name] + pull.double().numpy()), atol=1e-6
        )


@pytest.mark.parametrize("output", ["linear", "sigmoid"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_retrieval_ranks_by_r_itself_in_both_directions(fusion, output):
    learner, data = tiny(fusion, output=output)
    w = {name: t.double().numpy() for name, t in learner.state().items()}
    z = {m: literal_tower(w, m, data.features[m].double().numpy())[-1] for m in ("image", "text")}
    parts = [f"relations.image.text.{layer}.{part}" for layer in ("hidden", "output") for part in ("weight", "bias")]
    expected = literal_relation(z["image"], z["text"], [w[name] for name in parts], fusion)
    if output == "sigmoid":
        expected = 1 / (1 + np.exp(-expected))
    image, text = (learner.encode(m, data.features[m]) for m in ("image", "text"))
    np.testing.assert_allclose(learner.similarity(image, text[:4], ("image", "text")), expected[:, :4], atol=1e-6)
    np.testing.assert_allclose(learner.similarity(text[:4], image, ("text", "image")), expected[:, :4].T, atol=1e-6)

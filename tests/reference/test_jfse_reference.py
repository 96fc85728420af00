"""JFSE's losses, their gradients and one round of updates against loops over the numbered equations in float64 NumPy.

Gradients are checked against finite differences of those loops, so no automatic derivative is trusted, second ones
included. Where the paper misprints a sign (eq. 12, 14) the loops have the sign the module's docstrings argue for.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedxmr.learners.adversarial import SLOPE, Critic, critic_loss, modality_loss, scale_gradient
from fedxmr.learners.alignment import EPSILON, MARGIN, SIGMAS, cmca, cmmd, cmpm, cor, trip
from fedxmr.learners.jfse import JFSE, JFSEConfig, cycle_loss
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items, Proximal


def literal_critic(x, c, weight, bias, value):
    """D(x, c) of one item, and its gradient with respect to x: sums over hidden units."""
    inputs = np.concatenate([x, c])
    score, slope = 0.0, np.zeros(len(x))
    for w, b, v in zip(weight, bias, value, strict=True):
        h = float(w @ inputs) + b
        score += v * (h if h > 0 else SLOPE * h)
        slope += v * (1 if h > 0 else SLOPE) * w[: len(x)]
    return score, slope


def literal_critic_loss(real, synthetic, c, mix, parameters, penalty):
    """-1 times eq. 1, item by item."""
    n, total = len(real), 0.0
    for v, v_tilde, c_i, a in zip(real, synthetic, c, mix, strict=True):
        total -= literal_critic(v, c_i, *parameters)[0] / n
        total += literal_critic(v_tilde, c_i, *parameters)[0] / n
        _, slope = literal_critic(a * v + (1 - a) * v_tilde, c_i, *parameters)
        total += penalty * (math.sqrt(sum(s * s for s in slope)) - 1) ** 2 / n
    return total


def literal_cycle(embeddings, targets):
    """Eq. 15 of one set of embeddings, over their width as in the authors' code."""
    return sum(
        sum(sum((x - y) ** 2 for x, y in zip(e, c, strict=True)) / len(c) for e, c in zip(es, cs, strict=True))
        / len(es)
        for es, cs in zip(embeddings, targets, strict=True)
    )


def literal_adversarial(logits, modalities):
    """Eq. 14 with its arguments the right way round: for two modalities -(l log x + (1 - l) log(1 - x))."""
    total = 0.0
    for of_modality, label in zip(logits, modalities, strict=True):
        for logit in of_modality:
            if len(logit) == 1:
                x = 1 / (1 + math.exp(-logit[0]))
                total -= (label * math.log(x) + (1 - label) * math.log(1 - x)) / len(of_modality)
            else:
                scores = [1.0, *(math.exp(z) for z in logit)]
                total -= math.log(scores[label] / sum(scores)) / len(of_modality)
    return total


def literal_cmmd(a, b, match):
    def kernel(x, y):
        return sum(math.exp(-sum((x - y) ** 2) / (2 * sigma)) for sigma in SIGMAS)

    def mean(xs, ys):
        return sum(kernel(x, y) for x in xs for y in ys) / len(xs) / len(ys)

    return mean(a, a) - 2 * mean(a, b) + mean(b, b)


def literal_cmca(a, b, match):
    def covariance(u):  # eq. 6, letter by letter
        n, ones = len(u), np.ones((len(u), 1))
        return (u.T @ u - (ones.T @ u).T @ (ones.T @ u) / n) / (n - 1)

    return ((covariance(a) - covariance(b)) ** 2).sum() / (4 * a.shape[1] ** 2)


def literal_cmpm(a, b, match):
    def one_way(queries, gallery, match):
        total, counted = 0.0, 0
        for i, e in enumerate(queries):
            scores = [math.exp(float(e @ g) / math.sqrt(float(g @ g))) for g in gallery]
            if not match[i].any():
                continue
            counted += 1
            for j, score in enumerate(scores):
                p, q = score / sum(scores), match[i][j] / match[i].sum()
                total += p * math.log(p / (q + EPSILON))
        return total / counted if counted else 0.0

    return one_way(a, b, match) + one_way(b, a, match.T)


def literal_cor(a, b, match):
    return sum(sum((x - y) ** 2) for x, y in zip(a, b, strict=True)) / len(a)


def literal_trip(a, b, match):
    total = 0.0
    for anchors, others, same in ((a, b, match), (b, a, match.T)):
        hinges = [
            max(0.0, MARGIN + sum((x - others[p]) ** 2) - sum((x - others[n]) ** 2))
            for i, x in enumerate(anchors)
            for p in range(len(others))
            for n in range(len(others))
            if same[i][p] and not same[i][n]
        ]
        total += sum(hinges) / len(hinges) if hinges else 0.0
    return total


SCHEMES = {
    "cmmd": (lambda a, b, match: cmmd(a, b), literal_cmmd),
    "cmca": (lambda a, b, match: cmca(a, b), literal_cmca),
    "cmpm": (cmpm, literal_cmpm),
    "cor": (lambda a, b, match: cor(a, b), literal_cor),
    "trip": (trip, literal_trip),
}


def slopes(loss, arrays, h=1e-6):
    """Central differences of loss() in every number of every array."""
    found = []
    for array in arrays:
        slope = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            value = array[at]
            array[at] = value + h
            up = loss()
            array[at] = value - h
            down = loss()
            array[at] = value
            slope[at] = (up - down) / (2 * h)
        found.append(slope)
    return found


def tensors(arrays):
    return [torch.from_numpy(np.array(array)).requires_grad_() for array in arrays]


def check(value, expected, leaves, expected_slopes, rtol=1e-6):
    assert float(value.detach()) == pytest.approx(expected, rel=1e-10)
    value.backward()
    for leaf, slope in zip(leaves, expected_slopes, strict=True):
        scale = max(1e-3, np.abs(slope).max())
        np.testing.assert_allclose(leaf.grad, slope, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_the_critics_loss_is_minus_eq_1_and_its_gradient_that_of_the_gradient_penalty(penalty):
    rng = np.random.default_rng(1)
    n, d, s, h = 4, 3, 2, 5
    real, synthetic, c, mix = rng.normal(size=(n, d)), rng.normal(size=(n, d)), rng.normal(size=(n, s)), rng.random(n)
    parameters = [rng.normal(size=(h, d + s)), rng.normal(size=h), rng.normal(size=h)]
    features, classes, bias, value = tensors([parameters[0][:, :d], parameters[0][:, d:], *parameters[1:]])

    def literal():
        return literal_critic_loss(real, synthetic, c, mix, parameters, penalty)

    loss = critic_loss(
        Critic(features, classes, bias, value[None]),
        *map(torch.from_numpy, (real, synthetic, c, mix[:, None])), penalty,
    )  # fmt: skip
    of_weight, *others = slopes(literal, parameters)
    check(loss, literal(), [features, classes, bias, value], [of_weight[:, :d], of_weight[:, d:], *others])


def test_the_slope_in_the_gradient_penalty_is_that_of_the_critic_in_the_features_alone():
    rng = np.random.default_rng(2)
    x, c = rng.normal(size=3), rng.normal(size=2)
    parameters = rng.normal(size=(5, 5)), rng.normal(size=5), rng.normal(size=5)
    (slope,) = slopes(lambda: literal_critic(x, c, *parameters)[0], [x])
    np.testing.assert_allclose(literal_critic(x, c, *parameters)[1], slope, rtol=1e-7)
    weight, bias, value = map(torch.from_numpy, parameters)
    critic = Critic(weight[:, :3], weight[:, 3:], bias, value[None])
    leaf = torch.from_numpy(x)[None].requires_grad_()
    critic(leaf, torch.from_numpy(c)[None]).sum().backward()
    np.testing.assert_allclose(leaf.grad[0], slope, rtol=1e-7)


def test_a_better_critic_has_a_lower_loss():
    # D grows with the first feature, which is larger in true items: minus eq. 1 must be negative
    critic = Critic(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1))
    high, low, c = torch.full((2, 1), 3.0), torch.full((2, 1), 1.0), torch.zeros(2, 1)
    mix = torch.full((2, 1), 0.5)
    assert float(critic_loss(critic, high, low, c, mix, 10.0)) == pytest.approx(1 - 3)  # of slope 1: no penalty
    assert float(critic_loss(critic, low, high, c, mix, 10.0)) == pytest.approx(3 - 1)


def embedding_case(name):
    """-> a [n_a, s], b [n_b, s], match [n_a, n_b]."""
    rng = np.random.default_rng(3)
    n_a, n_b, scale = 6, 6, 1.0
    labels_a = labels_b = np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 0]]
    match name:
        case "unequal":
            n_b, labels_b = 4, np.eye(3, dtype=bool)[[0, 1, 1, 0]]  # nothing matches class 2
        case "multi-label":
            labels_a = labels_b = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
        case "large":
            scale = 6.0
        case "small":
            scale = 1e-2
    a, b = scale * rng.normal(size=(n_a, 4)) + 0.3, scale * rng.normal(size=(n_b, 4)) - 0.2
    return a, b, labels_a.astype(int) @ labels_b.T.astype(int) > 0


CASES = ["paired", "unequal", "multi-label", "large", "small"]


@pytest.mark.parametrize(
    ("scheme", "case"),
    [(s, c) for s in SCHEMES for c in CASES if (s, c) != ("cor", "unequal")],  # cor is of pairs
)
def test_each_alignment_scheme_is_its_equation(scheme, case):
    a, b, match = embedding_case(case)
    ours, literal = SCHEMES[scheme]
    leaves = tensors([a, b])
    expected = slopes(lambda: literal(a, b, match), [a, b], h=1e-7 if scheme == "cmmd" else 1e-6)
    check(ours(*leaves, torch.from_numpy(match)), literal(a, b, match), leaves, expected, rtol=2e-5)


def test_cmpm_descends_towards_the_matches():
    # eq. 12 as printed has the other sign: it would be minimised by matching the wrong class
    match = torch.eye(2, dtype=torch.bool)
    right, wrong = torch.eye(2) * 9, torch.eye(2).flip(0) * 9
    assert float(cmpm(right, right, match)) < 0.1
    assert float(cmpm(wrong, right, match)) > 36


def test_the_nineteen_kernels():
    assert len(SIGMAS) == 19
    far = torch.full((1, 2), 1e6)
    # far apart no kernel sees the other: 19 - 2 * (what the widest still see) + 19
    widest = sum(math.exp(-2e12 / (2 * sigma)) for sigma in SIGMAS)
    assert float(cmmd(torch.zeros(1, 2), far)) == pytest.approx(2 * 19 - 2 * widest)


@pytest.mark.parametrize("modalities", [(0, 1), (1, 0), (0, 2, 1), (2, 1)])
def test_the_modality_loss_is_the_cross_entropy_of_eq_14(modalities):
    rng = np.random.default_rng(4)
    width = 2 if 2 in modalities else 1
    logits = [rng.normal(size=(n, width)) for n in (3, 5, 2)[: len(modalities)]]
    leaves = tensors(logits)
    expected = slopes(lambda: literal_adversarial(logits, modalities), logits)
    check(modality_loss(leaves, modalities), literal_adversarial(logits, modalities), leaves, expected)


def test_the_cycle_loss_is_the_squared_norm_of_eq_15_over_the_width():
    rng = np.random.default_rng(5)
    embeddings = [rng.normal(size=(3, 4)), rng.normal(size=(5, 4))]
    targets = [rng.normal(size=e.shape) for e in embeddings]
    leaves = tensors(embeddings)
    expected = slopes(lambda: literal_cycle(embeddings, targets), embeddings)
    check(cycle_loss(leaves, tensors(targets)), literal_cycle(embeddings, targets), leaves, expected)


def test_the_reversal_is_the_identity_whose_gradient_changes_its_sign():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = scale_gradient(x, -0.5)
    assert torch.equal(y, x)
    (y * torch.tensor([3.0, 4.0]) + x).sum().backward()  # what does not pass through is not reversed
    assert x.grad.tolist() == [1 - 1.5, 1 - 2.0]


# one round of updates

SPEC = DataSpec(
    {"image": 3, "text": 2}, 3, class_vectors=torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 2.0], [-2.0, 1.0, 1.0]])
)
WEIGHTS = {"beta": 0.3, "gamma": 0.4, "lambda": 0.7, "synthetic": 0.6, "generator": 0.25}


def tiny(seen=None, **options):
    spec = DataSpec(SPEC.dims, 3, SPEC.class_vectors, seen)
    defaults = {"hidden": 4, "noise": 2, "discriminator": (3, 2), "critic_steps": 2, "ramp": 40, **WEIGHTS}
    config = JFSEConfig(**defaults | {"optimizer": {"name": "sgd", "lr": 0.2}} | options)
    learner = JFSE(config, spec, torch.device("cpu"), generator(0, "initial"))
    g = generator(1, "data")
    classes = torch.tensor([0, 1, 0, 1, 1, 0])
    data = Items.paired({"image": torch.randn(6, 3, generator=g), "text": torch.randn(6, 2, generator=g)},
                        torch.eye(3, dtype=torch.bool)[classes])  # fmt: skip
    return learner, data


class Literal:
    """The whole model in NumPy: what one batch makes of a state, by finite differences of the paper's losses."""

    def __init__(self, learner, data, rng, config, imagined=()):
        self.w = {k: t.double().numpy() for k, t in learner.state().items() if not k.startswith("optimizer.")}
        self.config = config
        order = torch.randperm(len(data), generator=rng)
        batch = data.select(order)
        self.x = {m: batch.features[m].double().numpy() for m in ("image", "text")}
        vectors = SPEC.class_vectors.double().numpy()
        if config.embedding == "relu":
            low, high = vectors.min(0), vectors.max(0)
            self.vectors = (vectors - low) / (high - low)
        else:
            self.vectors = vectors / np.sqrt((vectors**2).sum(1, keepdims=True))
        self.classes = batch.labels.long().argmax(1).numpy()
        n = len(data)

        def noise(rows):
            return torch.randn(rows, config.noise, generator=rng).double().numpy()

        if config.synthesis:
            self.critic_noise = {m: noise(config.critic_steps * n) for m in self.x}
            self.mix = [
                {m: torch.rand(n, 1, generator=rng).double().numpy()[:, 0] for m in self.x}
                for _ in range(config.critic_steps)
            ]
            self.seen = (np.tile(self.classes, config.copies), {m: noise(config.copies * n) for m in self.x})
            self.unseen = None
            if imagined:
                drawn = torch.tensor(imagined)[torch.randint(len(imagined), (n,), generator=rng)].numpy()
                self.unseen = (np.tile(drawn, config.copies), {m: noise(config.copies * n) for m in self.x})

    def layer(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def regress(self, m, x):
        for i in range(self.config.layers - 1):
            x = np.maximum(self.layer(f"regressors.{m}.{i}", x), 0)
        e = self.layer(f"regressors.{m}.{self.config.layers - 1}", x)
        return np.maximum(e, 0) if self.config.embedding == "relu" else e

    def generate(self, m, classes, noise):
        h = self.layer(f"generators.{m}.0", np.concatenate([self.vectors[classes], noise], axis=1))
        x = self.layer(f"generators.{m}.1", np.where(h > 0, h, SLOPE * h))
        return np.maximum(x, 0) if self.config.features == "relu" else x

    def critic(self, m):
        weight = np.concatenate([self.w[f"critics.{m}.features"], self.w[f"critics.{m}.classes"]], axis=1)
        return weight, self.w[f"critics.{m}.bias"], self.w[f"critics.{m}.value"][0]

    def discriminate(self, e):
        for i in (0, 1):
            h = self.layer(f"discriminator.{i}", e)
            e = np.where(h > 0, h, SLOPE * h)
        return self.layer("discriminator.2", e)

    def names(self, *kinds):
        return [k for k in self.w if k.split(".")[0] in kinds]

    def step(self, changes, lr=0.2):
        for k, slope in changes.items():
            self.w[k] = self.w[k] - lr * slope

    def slopes(self, loss, *kinds):
        names = self.names(*kinds)
        return dict(zip(names, slopes(loss, [self.w[k] for k in names]), strict=True))

    def critic_steps(self):
        n = len(self.classes)
        for i in range(self.config.critic_steps):

            def loss(i=i):
                return sum(
                    literal_critic_loss(
                        self.x[m],
                        self.generate(m, self.classes, self.critic_noise[m][i * n : (i + 1) * n]),
                        self.vectors[self.classes],
                        self.mix[i][m],
                        self.critic(m),
                        self.config.penalty,
                    )
                    for m in self.x
                )  # eq. 3

            self.step(self.slopes(loss, "critics"))

    def true(self):
        return {m: self.regress(m, self.x[m]) for m in self.x}, self.classes

    def synthetic(self, of):
        classes, noise = of
        return {m: self.regress(m, self.generate(m, classes, noise[m])) for m in self.x}, classes

    def adversarial(self, embedded):
        e, _ = embedded
        return literal_adversarial([self.discriminate(e["image"]), self.discriminate(e["text"])], (0, 1))

    def descended(self, embedded, reversal):
        """What regressors and generators descend of one set of embeddings: L_ADV reversed."""
        e, classes = embedded
        match = classes[:, None] == classes
        config = self.config
        alignment = sum(SCHEMES[s][1](e["image"], e["text"], match) for s in config.alignment)
        cycle = literal_cycle(list(e.values()), [self.vectors[classes]] * 2)
        return config.beta * alignment - reversal * config.gamma * self.adversarial(embedded) + config.lambda_ * cycle

    def joint_step(self, reversal):
        config = self.config
        synthetic = [of for of in (self.seen, self.unseen) if of is not None] if config.synthesis else []

        def of_regressors():
            return self.descended(self.true(), reversal) + config.synthetic * sum(
                self.descended(self.synthetic(of), reversal) for of in synthetic
            )

        def of_generators():
            classes, noise = self.seen
            scores = sum(
                literal_critic(x, self.vectors[k], *self.critic(m))[0]
                for m in self.x
                for x, k in zip(self.generate(m, classes, noise[m]), classes, strict=True)
            )
            embedded = sum(self.descended(self.synthetic(of), reversal) for of in synthetic)
            return -scores / len(classes) + config.generator * embedded

        def of_discriminator():
            return config.gamma * sum(self.adversarial(e) for e in [self.true(), *map(self.synthetic, synthetic)])

        changes = self.slopes(of_regressors, "regressors") | self.slopes(of_discriminator, "discriminator")
        if config.synthesis:
            changes |= self.slopes(of_generators, "generators")
        self.step(changes)  # all at once


@pytest.mark.parametrize(
    ("options", "imagined"),
    [
        pytest.param({}, (), id="default"),
        pytest.param({"layers": 3, "copies": 2}, (), id="three layers, two copies"),
        pytest.param({"embedding": "relu", "features": "relu"}, (), id="relu ends"),
        pytest.param({"alignment": ("cor", "trip")}, (), id="cor and trip"),
        pytest.param({"alignment": ("cmca", "cmpm")}, (), id="cmca and cmpm"),
        pytest.param({}, (2,), id="an unseen class"),
        pytest.param({"synthesis": False}, (), id="no synthesis"),
    ],
)
def test_one_batch_makes_the_literal_updates(options, imagined):
    seen = torch.tensor([True, True, False]) if imagined else None
    learner, data = tiny(seen, **options)
    config = learner._config
    ends = {f"regressors.{m}.1.bias" for m in SPEC.dims} if config.embedding == "relu" else ()
    # no embedding may be 0 throughout: it has no direction, and no slope to compare
    learner.load({"epochs": torch.tensor(9.0)} | {name: torch.ones(3) for name in ends})
    literal = Literal(learner, data, generator(2, "fit"), config, imagined)
    cycle = literal_cycle(list(literal.true()[0].values()), [literal.vectors[literal.classes]] * 2)
    if config.synthesis:
        literal.critic_steps()
    literal.joint_step(2 / (1 + math.exp(-10 * 9 / 40)) - 1)
    before = learner.state()
    fit = learner.fit(data, 1, generator(2, "fit"))
    assert fit.loss == pytest.approx(cycle, rel=1e-5)
    after = learner.state()
    assert after["epochs"] == 10
    for name in literal.w:
        if name != "epochs":
            assert not torch.equal(after[name], before[name]), name
            np.testing.assert_allclose(after[name], literal.w[name], atol=5e-6, err_msg=name)


def test_every_term_shows_in_the_updates_it_should_and_in_no_other():
    """A term switched off, next to one that is not, from the same state and the same draws."""

    def after(**options):
        learner, data = tiny(**{"ramp": 0} | options)
        learner.fit(data, 1, generator(2, "fit"))
        return learner.state()

    def changed(**options):
        whole, less = after(), after(**options)
        moved = {k for k in less if not torch.allclose(whole[k], less[k], rtol=0, atol=1e-7)}
        return {k.split(".")[0] for k in moved}

    assert changed(beta=0) == {"regressors", "generators"}
    assert changed(**{"lambda": 0}) == {"regressors", "generators"}
    assert changed(gamma=1e-6) == {"regressors", "generators", "discriminator"}
    assert changed(synthetic=0.1) == {"regressors"}
    assert changed(generator=0) == {"generators"}
    assert changed(penalty=0) == {"critics", "generators"}


def literal_adam(weight, gradients, lr, betas):
    m = v = np.zeros_like(weight)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        weight = weight - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8)
    return weight


def test_critics_and_the_others_have_adams_of_their_own():
    adam = {"lr": 0.01, "betas": (0.5, 0.9)}
    learner, data = tiny(optimizer=adam, critic_steps=1)
    gradients, starts = [], learner.state()
    for fit in range(2):
        literal = Literal(learner, data, generator(fit, "fit"), learner._config)
        start = dict(literal.w)
        literal.critic_steps()
        gradient = {k: (start[k] - literal.w[k]) / 0.2 for k in literal.names("critics")}
        learner.fit(data, 1, generator(fit, "fit"))
        state = learner.state()
        literal.w |= {k: state[k].double().numpy() for k in gradient}  # the joint step sees the critics that Adam moved
        literal.joint_step(2 / (1 + math.exp(-10 * fit / 40)) - 1)
        others = literal.names("regressors", "generators", "discriminator")
        gradients.append(gradient | {k: (start[k] - literal.w[k]) / 0.2 for k in others})
    for name in gradients[0]:
        gs = [g[name] for g in gradients]
        if min(np.abs(g[g != 0]).min(initial=1) for g in gs) > 1e-4:  # smaller ones Adam divides by their own rounding
            expected = literal_adam(starts[name].double().numpy(), gs, **adam)
            np.testing.assert_allclose(state[name], expected, atol=2e-5, err_msg=name)
    steps = {k.removeprefix("optimizer.step."): int(t) for k, t in state.items() if ".step." in k}
    assert set(steps.values()) == {2}
    learner, data = tiny(optimizer=adam, critic_steps=3)
    learner.fit(data, 1, generator(0, "fit"))
    steps = {k.removeprefix("optimizer.step."): int(t) for k, t in learner.state().items() if ".step." in k}
    assert {k.split(".")[0]: v for k, v in steps.items()} == {
        "critics": 3, "generators": 1, "regressors": 1, "discriminator": 1,
    }  # fmt: skip


def test_fedprox_pulls_critics_and_regressors_alike():
    mu = 0.3
    ends = {}
    for proximal in (False, True):
        learner, data = tiny(critic_steps=1)
        start = learner.state()
        # below the anchor |w - a| and (w - a) differ in sign, so a wrong gradient shows
        anchor = {k: start[k] + 2 for k in ("critics.image.bias", "regressors.text.1.bias")}
        learner.fit(data, 1, generator(2, "fit"), Proximal(mu, anchor) if proximal else None)
        ends[proximal] = learner.state()
    for name, target in anchor.items():
        expected = ends[False][name] - 0.2 * mu * (start[name] - target)
        torch.testing.assert_close(ends[True][name], expected, rtol=0, atol=2e-6)

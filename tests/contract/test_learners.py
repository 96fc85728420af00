"""What every learner must do, whatever its method.

For a learner outside this repository:

    class TestMine(LearnerContract):
        @pytest.fixture
        def kind(self):
            return MyLearner
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch

from fedxmr.errors import InputError
from fedxmr.experiment import configured, read_experiment
from fedxmr.learners import FLOORS, LEARNERS, learner_class
from fedxmr.learners.training import products_in
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items, Proximal

CPU = torch.device("cpu")
CLASSES = 3
SPEC = DataSpec(
    {"image": 6, "text": 4}, CLASSES, class_vectors=torch.randn(CLASSES, 5, generator=generator(0, "class vectors"))
)


THREE = replace(SPEC, dims={"audio": 5, **SPEC.dims})


def problem(n=30, labels=None, modalities=("image", "text"), spec=SPEC) -> Items:
    """n items of three classes that their features tell apart; every item has all the modalities named."""
    g = generator(0, "problem")
    if labels is None:
        labels = torch.eye(CLASSES, dtype=torch.bool)[torch.arange(n) % CLASSES]
    features = {}
    for m, d in spec.dims.items():  # drawn for all: a client that lacks one has the same others
        centres, noise = torch.randn(CLASSES, d, generator=g), torch.randn(n, d, generator=g)
        features[m] = labels.float() @ centres + 0.3 * noise
    return Items.paired({m: features[m] for m in modalities}, labels)


def several() -> torch.Tensor:
    """Labels of 30 items: each has none to three of the classes."""
    return torch.rand(30, CLASSES, generator=generator(0, "labels")) < 0.6


def unpaired() -> Items:
    """Items 0-19 have an image, items 10-29 a text."""
    data = problem()
    return Items(
        {"image": data.features["image"][:20], "text": data.features["text"][10:]},
        {"image": torch.arange(20), "text": torch.arange(10, 30)},
        data.labels,
    )


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def unshared(learner) -> bool:
    """Whether it says that no strategy can share anything of it."""
    return bool(getattr(learner, "unshared", None))


class LearnerContract:
    """Subclass it with a fixture `kind` that returns the learner's class."""

    @pytest.fixture(autouse=True)
    def one_thread(self):
        """Bit-equality is promised at one thread; and small steps wait for each other's threads on a busy machine."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def kind(self):
        raise NotImplementedError

    @pytest.fixture
    def make(self, kind):
        def make(device=CPU, seed=0, spec=SPEC):
            rng = None if seed is None else generator(seed, "initial")
            return kind(kind.Config(), spec, device, rng)

        return make

    @staticmethod
    def scores(learner, data=None):
        data = data or problem()
        encoded = [learner.encode(m, data.features[m]) for m in ("image", "text")]
        return learner.similarity(*encoded, ("image", "text"))

    def test_what_it_names_is_in_its_state(self, make):
        learner = make()
        names = set(learner.state())
        assert learner.common or unshared(learner)
        assert learner.trainable or learner.statistics
        for group in (learner.common, learner.trainable, learner.statistics, learner.by_class):
            assert group <= names
        assert learner.owned(SPEC.dims) == learner.trainable | learner.statistics

    def test_rows_that_belong_to_classes_are_one_per_class(self, make):
        learner = make()
        state = learner.state()
        assert all(len(state[name]) == CLASSES for name in learner.by_class)

    def test_one_seed_gives_one_state(self, make):
        assert same(make(seed=5).state(), make(seed=5).state())
        learner = make(seed=5)
        if learner.trainable:
            assert not same(make(seed=5).state(), make(seed=6).state())

    def test_the_order_in_which_modalities_are_named_does_not_show(self, kind):
        swapped = replace(SPEC, dims=dict(reversed(SPEC.dims.items())))
        there, back = (kind(kind.Config(), spec, CPU, generator(5, "initial")) for spec in (SPEC, swapped))
        assert same(there.state(), back.state())
        assert there.common == back.common
        assert all(there.owned([m]) == back.owned([m]) for m in SPEC.dims)

    @pytest.mark.parametrize("modalities", [("image",), ("text",), ("image", "text")])
    def test_a_client_that_lacks_a_modality_has_the_same_state_from_the_same_seed(self, make, modalities):
        first, second = make(seed=5), make(seed=5)
        start = first.state()
        for learner in (first, second):
            learner.fit(problem(modalities=modalities), 2, generator(0, "fit"))
        end = first.state()
        assert same(end, second.state())
        assert end.keys() == start.keys()
        assert all(t.shape == start[name].shape for name, t in end.items())

    def test_its_names_and_shapes_do_not_change_with_training(self, make):
        learner = make()
        before = {name: (t.shape, t.dtype) for name, t in learner.state().items()}
        learner.fit(problem(), 1, generator(0, "fit"))
        assert before == {name: (t.shape, t.dtype) for name, t in learner.state().items()}
        assert before == {name: (t.shape, t.dtype) for name, t in make(seed=None).state().items()}

    def test_training_is_a_function_of_the_seed(self, make):
        ends = []
        for _ in range(2):
            learner = make()
            fit = learner.fit(problem(), 2, generator(0, "fit"))
            ends.append(learner.state() | {"loss": torch.tensor([fit.loss, fit.loss_sum])})
        assert same(*ends)

    def test_a_saved_learner_goes_on_as_if_nothing_had_happened(self, make):
        through = make()
        through.fit(problem(), 1, generator(0, "fit", 1))
        saved = through.state()
        through.fit(problem(), 1, generator(0, "fit", 2))

        resumed = make(seed=None)
        resumed.load(saved)
        assert same(resumed.state(), saved)
        resumed.fit(problem(), 1, generator(0, "fit", 2))
        assert same(resumed.state(), through.state())
        assert torch.equal(self.scores(resumed), self.scores(through))

    def test_a_loaded_state_ranks_as_the_saved_one_did(self, make):
        learner, other = make(seed=0), make(seed=1)
        learner.fit(problem(), 1, generator(0, "fit"))
        other.load(learner.state())
        for data in (problem(), problem(labels=several())):
            assert torch.equal(self.scores(other, data), self.scores(learner, data))

    def test_its_state_is_a_copy_both_ways(self, make):
        learner = make()
        saved = learner.state()
        for tensor in saved.values():
            tensor.fill_(0.5)
        assert not same(learner.state(), saved)
        learner.load(saved)
        loaded = learner.state()
        for tensor in saved.values():
            tensor.fill_(0.25)
        assert same(learner.state(), loaded)
        assert all(t.device == CPU and not t.requires_grad for t in loaded.values())

    def test_part_of_a_state_can_be_loaded(self, make):
        learner, other = make(seed=0), make(seed=1)
        names = learner.common or {min(learner.trainable)}
        before, part = learner.state(), {name: t for name, t in other.state().items() if name in names}
        learner.load(part)
        assert same(learner.state(), before | part)

    def test_a_wrong_state_raises_and_loads_nothing(self, make):
        learner = make()
        before = learner.state()
        good = min(learner.common or learner.trainable)
        moved = {good: before[good] + 1}
        last = max(before, key=lambda name: before[name].numel())
        for wrong in ({"no.such.name": torch.zeros(1)}, {last: torch.zeros(2, 3, 4, 5)}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                learner.load(moved | wrong)
            assert same(learner.state(), before)

    def test_it_leaves_the_data_alone(self, make):
        for draw in (problem, unpaired, lambda: problem(labels=several())):
            data, untouched, learner = draw(), draw(), make()
            learner.fit(data, 1, generator(0, "fit"))
            self.scores(learner, data)
            assert same(data.features, untouched.features)
            assert same(data.rows, untouched.rows)
            assert torch.equal(data.labels, untouched.labels)

    def test_ranking_leaves_representations_alone(self, make):
        learner, data = make(), problem()
        for query, gallery in permutations(SPEC.dims, 2):
            encoded = [learner.encode(m, data.features[m]) for m in (query, gallery)]
            untouched = [x.clone() for x in encoded]
            learner.similarity(*encoded, (query, gallery))
            assert all(torch.equal(x, y) for x, y in zip(encoded, untouched, strict=True))

    def test_it_leaves_the_global_generator_alone(self, make):
        before = torch.get_rng_state()
        learner = make()
        learner.fit(problem(), 1, generator(0, "fit"))
        self.scores(learner)
        assert torch.equal(torch.get_rng_state(), before)

    def test_encoding_changes_nothing(self, make):
        learner = make()
        before = learner.state()
        encoded = learner.encode("image", problem().features["image"])
        assert not encoded.requires_grad
        assert encoded.dtype == torch.float32
        assert same(learner.state(), before)

    @pytest.mark.parametrize("direction", list(permutations(SPEC.dims, 2)))
    def test_permuting_gallery_or_queries_permutes_columns_or_rows(self, make, direction):
        learner, data = make(), problem()
        query, gallery = (learner.encode(m, data.features[m]) for m in direction)
        order = torch.randperm(len(gallery), generator=generator(0, "gallery"))
        scores = learner.similarity(query, gallery, direction)
        assert float(scores.std()) > 0  # or any order would do
        permuted = learner.similarity(query, gallery[order], direction)
        torch.testing.assert_close(permuted, scores[:, order], rtol=1e-5, atol=1e-6)
        permuted = learner.similarity(query[order], gallery, direction)
        torch.testing.assert_close(permuted, scores[order], rtol=1e-5, atol=1e-6)

    def test_queries_and_gallery_may_differ_in_number_and_order(self, make):
        learner, data = make(), problem()
        image, text = (learner.encode(m, data.features[m]) for m in ("image", "text"))
        assert learner.similarity(image[:7], text, ("image", "text")).shape == (7, 30)
        assert learner.similarity(text[:1], image[:5], ("text", "image")).shape == (1, 5)

    def test_training_brings_items_of_one_class_closer(self, make):
        learner = make()
        shared = problem().labels.float() @ problem().labels.float().T > 0

        def margin():
            scores = self.scores(learner)
            return float(scores[shared].mean() - scores[~shared].mean())

        before = margin()
        assert learner.fit(problem(), 20, generator(0, "fit")).trained
        assert margin() > before

    def test_in_bfloat16_it_goes_where_it_goes_in_float32(self, make):
        """Also after many steps; and what it reports, as what it keeps, is float32."""
        ends = []
        for half in (False, True):
            learner = make()
            start = learner.state()
            with products_in(torch.bfloat16 if half else None):
                fit = learner.fit(problem(), 20, generator(0, "fit"))
            assert fit.trained
            assert math.isfinite(fit.loss)
            end = learner.state()
            assert all(end[name].dtype == start[name].dtype for name in end)
            names = sorted(learner.trainable | learner.statistics)
            ends.append(torch.cat([(end[name] - start[name]).flatten().double() for name in names]))
        exact, half_exact = ends
        assert torch.cosine_similarity(exact, half_exact, dim=0) > 0.9
        if hasattr(learner, "_network"):
            assert not torch.equal(exact, half_exact)

    @pytest.mark.parametrize("share", ["trainable", "common"])
    def test_a_large_mu_keeps_what_is_shared_at_the_anchor(self, make, share):
        moved = {}
        for mu in (0.0, 1e4):
            learner = make()
            start = learner.state()
            names = learner.trainable & getattr(learner, share)
            if not names or unshared(learner):
                pytest.skip("nothing that FedProx shares")
            anchor = {name: start[name] for name in names}
            learner.fit(problem(), 20, generator(0, "fit"), Proximal(mu, anchor))
            end = learner.state()
            moved[mu] = sum(float((end[name] - start[name]).square().sum()) for name in anchor)
        assert moved[1e4] < moved[0.0] / 10

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(problem(labels=torch.tensor([[True, False, False]]).expand(30, 3)), id="one class"),
            pytest.param(problem(n=1), id="one item"),
            pytest.param(problem(modalities=("image",)), id="image only"),
            pytest.param(problem(modalities=("text",)), id="text only"),
            pytest.param(problem(n=1, modalities=("image",)), id="one item, image only"),
            pytest.param(problem(labels=several()), id="several classes, or none"),
            pytest.param(problem(labels=torch.zeros(30, 3, dtype=torch.bool)), id="no class"),
            pytest.param(problem(labels=torch.ones(30, 3, dtype=torch.bool)), id="all classes"),
            pytest.param(unpaired(), id="unpaired"),
            pytest.param(Items({}, {}, problem().labels), id="no modality"),
            pytest.param(problem(n=0), id="no item"),
        ],
    )
    def test_clients_that_lack_something(self, make, data):
        learner = make()
        before = learner.state()
        fit = learner.fit(data, 2, generator(0, "fit"))
        assert math.isfinite(fit.loss)
        assert fit.loss >= 0
        after = learner.state()
        assert all(torch.isfinite(t).all() for t in after.values())
        assert fit.trained or same(before, after)
        for name in learner.trainable - learner.owned(data.modalities):
            assert torch.equal(before[name], after[name])

    @pytest.mark.parametrize("draw", [problem, unpaired, lambda: problem(labels=several())])
    def test_no_epochs_take_no_step(self, make, draw):
        learner = make()
        for round in range(2):
            before = learner.state()
            fit = learner.fit(draw(), 0, generator(round, "fit"))
            assert (fit.loss, fit.loss_sum, fit.trained) == (0.0, 0.0, False)
            after = learner.state()
            changed = {name for name in after if not torch.equal(before[name], after[name])}
            assert changed <= (learner.by_class if round == 0 else set())  # what is set is set once

    @pytest.mark.parametrize("held", [h for k in range(4) for h in combinations(THREE.dims, k)], ids="+".join)
    def test_what_a_client_owns_is_what_it_trains(self, make, held):
        try:
            learner = make(spec=THREE)
        except InputError as error:
            pytest.skip(f"not defined for three modalities: {error}")
        before = learner.state()
        learner.fit(problem(modalities=held, spec=THREE), 2, generator(0, "fit"))
        after = learner.state()
        shareable = learner.trainable | learner.statistics
        assert {name for name in shareable if not torch.equal(before[name], after[name])} == learner.owned(held)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_cpu_and_gpu_agree(self, make):
        ends = []
        for device in (CPU, torch.device("cuda")):
            learner = make(device)
            fit = learner.fit(unpaired(), 2, generator(0, "fit"))
            ends.append((learner.state(), fit.loss, self.scores(learner).cpu()))
        (cpu, cpu_loss, cpu_scores), (gpu, gpu_loss, gpu_scores) = ends
        assert gpu_loss == pytest.approx(cpu_loss, rel=1e-3)
        torch.testing.assert_close(gpu_scores, cpu_scores, rtol=0, atol=5e-3)
        assert cpu.keys() == gpu.keys()
        for name, tensor in cpu.items():
            apart = float((gpu[name] - tensor).norm())
            # a small gradient's sign may differ, and with it Adam's first steps: few of the numbers, so little of all
            assert apart <= 0.02 * float(tensor.norm()) + 1e-6, f"{name}: {apart}"


class TestRegisteredLearners(LearnerContract):
    # cosine holds no state and refuses modalities of different width: tests/unit/test_classical.py has its tests
    @pytest.fixture(params=sorted(LEARNERS.keys() - {"cosine"}))
    def kind(self, request):
        return learner_class(request.param)


ROOT = Path(__file__).parents[2]


@cache
def learners_in_experiments() -> frozenset[str]:
    """The learners that the methods of experiments/*.yaml train."""
    read = [read_experiment(path) for path in sorted((ROOT / "experiments").glob("*.yaml"))]
    return frozenset(
        configured(base, method, trial, 0).learner.name
        for plan, base in read
        for method in plan.methods.values()
        for trial in method.trials()
    )


def lacking(name: str) -> set[str]:
    """What a learner of this name has not got that every registered one must have."""
    tests = "floors" if name in FLOORS else name  # that file sees to it that it has every one of FLOORS
    there = {
        "reference test": (ROOT / "tests" / "reference" / f"test_{tests}_reference.py").is_file(),
        "experiment": name in learners_in_experiments(),
        # as it is given on a command line
        "mention in README.md": bool(re.search(rf"\b{re.escape(name)}\b", (ROOT / "README.md").read_text("utf-8"))),
    }
    return {what for what, found in there.items() if not found}


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_every_registered_learner_is_tested_used_and_documented(name):
    assert lacking(name) == set()


def test_a_learner_without_any_of_these_is_found_out():
    assert lacking("nobodys") == {"reference test", "experiment", "mention in README.md"}


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_every_option_of_a_learner_is_described_and_frozen(name):
    config = learner_class(name).Config
    assert config.model_config["extra"] == "forbid"
    assert config.model_config["frozen"]
    assert all(field.description for field in config.model_fields.values())


BY_STEPS = sorted(name for name in LEARNERS if "optimizer" in learner_class(name).Config.model_fields)
"""The learners that an optimiser trains; the others are in closed form."""


def test_a_learner_has_an_optimiser_or_sufficient_statistics():
    kinds = {name: learner_class(name) for name in LEARNERS if name not in FLOORS}
    in_closed_form = {name for name, kind in kinds.items() if kind(kind.Config(), SPEC, CPU, None).statistics}
    assert in_closed_form == LEARNERS.keys() - FLOORS.keys() - set(BY_STEPS)


@pytest.mark.parametrize(
    "change",
    [{"name": "sgd"}, {"lr": 0.5}, {"betas": (0.1, 0.2)}, {"weight_decay": 0.5}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("name", BY_STEPS)
def test_changing_one_number_of_the_optimiser_keeps_the_others(name, change):
    config = learner_class(name).Config
    default = config().optimizer.model_dump()
    assert set(change) <= set(default)
    assert config(optimizer=change).optimizer.model_dump() == default | change


@pytest.mark.parametrize("name", BY_STEPS)
def test_every_number_of_the_optimiser_is_among_those_that_are_changed(name):
    assert set(learner_class(name).Config().optimizer.model_dump()) == {"name", "lr", "betas", "weight_decay"}

"""Zero-shot protocols: which classes are seen, which items are asked and ranked, and results over class splits."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fedxmr.config import resolve
from fedxmr.data.dataset import Dataset
from fedxmr.errors import InputError
from fedxmr.learners.jfse import JFSE, JFSEConfig
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items
from fedxmr.zero_shot import (
    MEASURED,
    class_split,
    evaluate_task,
    protocol,
    seen_only,
    subsets,
    task_items,
    with_unseen_classes,
)
from fedxmr.zero_shot_report import experiment_table, splits_note

CLASSES = 6
SEEN = torch.tensor([True, False, True, False, True, False])


def one_hot(classes):
    return torch.eye(CLASSES, dtype=torch.bool)[torch.as_tensor(classes)]


TRAIN = one_hot(torch.arange(30) % CLASSES)
TEST = one_hot(torch.arange(50) % CLASSES)


@pytest.mark.parametrize(("classes", "seen"), [(10, 5), (20, 10), (11, 6), (2, 1)])
def test_half_of_the_classes_are_seen(classes, seen):
    split = class_split(classes, generator(0, "classes"))
    assert (split.shape, split.dtype, int(split.sum())) == ((classes,), torch.bool, seen)


def test_splits_are_drawn_from_the_seed():
    splits = [class_split(10, generator(seed, "classes")) for seed in range(20)]
    assert torch.equal(splits[3], class_split(10, generator(3, "classes")))
    assert len({tuple(s.tolist()) for s in splits}) > 15
    assert torch.stack(splits).any(0).all()  # no class is always unseen
    assert not torch.stack(splits).all(0).any()


def test_another_share_of_the_classes_may_be_seen():
    splits = [class_split(10, generator(0, "classes"), share) for share in (0.2, 0.4, 0.5, 0.6, 0.8)]  # figure 9b
    assert [int(split.sum()) for split in splits] == [2, 4, 5, 6, 8]
    for fewer, more in pairwise(splits):
        assert bool((more | ~fewer).all())  # those seen of fewer are among those of more
    assert torch.equal(splits[2], class_split(10, generator(0, "classes")))


@pytest.mark.parametrize(("share", "seen"), [(0.04, 0), (0.96, 10)])
def test_a_share_that_leaves_a_side_without_classes_is_refused(share, seen):
    says = f"expected seen and unseen classes, got {seen} seen of 10, by dataset.seen_share={share}"
    with pytest.raises(InputError, match=says):
        class_split(10, generator(0, "classes"), share)


def test_a_share_of_seen_classes_is_of_zero_shot_tasks_alone():
    assert resolve({"dataset": {"task": "zero-shot", "seen_share": 0.2}}).dataset.seen_share == 0.2
    with pytest.raises(InputError, match="seen_share: expected a zero-shot task, got task standard"):
        resolve({"dataset": {"seen_share": 0.5}})


@pytest.mark.parametrize("classes", [0, 1])
def test_a_side_without_classes_is_refused(classes):
    with pytest.raises(InputError, match="expected seen and unseen classes"):
        class_split(classes, generator(0, "classes"))


def test_the_four_subsets_divide_all_items():
    of = subsets(TRAIN, TEST, SEEN)
    assert torch.cat([of.ss, of.us]).sort().values.tolist() == list(range(30))
    assert torch.cat([of.st, of.ut]).sort().values.tolist() == list(range(50))
    for labels, seen, unseen in ((TRAIN, of.ss, of.us), (TEST, of.st, of.ut)):
        assert (labels[seen].int() @ SEEN.int()).min() == 1
        assert (labels[unseen].int() @ SEEN.int()).max() == 0


def test_items_of_both_sides_or_of_no_class_are_nowhere():
    labels = torch.tensor([[1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0]]).bool()
    of = subsets(labels, labels, SEEN)
    assert (of.ss.tolist(), of.us.tolist()) == ([0], [3])
    assert (of.st.tolist(), of.ut.tolist()) == ([0], [3])


def test_who_asks_and_who_is_ranked():
    of = subsets(TRAIN, TEST, SEEN)
    seen = task_items("seen", of, TEST, generator(0, "halves"))
    assert torch.equal(seen.queries, of.st)
    assert torch.equal(seen.gallery_train, of.ss)
    assert not len(seen.gallery_test)
    unseen = task_items("unseen", of, TEST, generator(0, "halves"))
    assert torch.equal(unseen.queries, of.ut)
    assert torch.equal(unseen.gallery_train, of.us)
    assert not len(unseen.gallery_test)


def test_the_generalised_task_halves_the_seen_test_items():
    of = subsets(TRAIN, TEST, SEEN)
    found = task_items("generalised", of, TEST, generator(0, "halves"))
    assert torch.equal(found.gallery_train, of.us)
    asked = found.queries[torch.isin(found.queries, of.st)]
    assert torch.cat([asked, found.gallery_test]).sort().values.tolist() == of.st.tolist()  # each on one side
    assert 0 <= len(asked) - len(found.gallery_test) <= 1
    assert found.queries[torch.isin(found.queries, of.ut)].tolist() == of.ut.tolist()
    for side in (asked, found.gallery_test):  # every class evenly
        counts = TEST[side].sum(0)[SEEN]
        assert int(counts.max() - counts.min()) <= 1
    again = task_items("generalised", of, TEST, generator(1, "halves"))
    assert not torch.equal(found.gallery_test, again.gallery_test)


def items(labels, columns=CLASSES):
    """The features of an item are its class number, in every column."""
    x = labels.float().argmax(1, keepdim=True).expand(-1, columns).clone()
    return Items.paired({"image": x, "text": x[:, :2].clone()}, labels)


def data(train=TRAIN, validation=TEST[:20], test=TEST[20:], all_test=TEST):
    """A data set whose image features are similarities to one item per class."""
    return Dataset(
        name="made-up",
        spec=DataSpec({"image": CLASSES, "text": 2}, CLASSES),
        classes=tuple("abcdef"),
        train=items(train),
        validation=items(validation),
        test=items(test),
        all_test=items(all_test),
        all_test_overlaps=True,
        scaling={"image": "none", "text": "none"},
        column_class={"image": torch.arange(CLASSES)},
    )


def test_all_that_a_run_sees_is_of_seen_classes():
    whole = with_unseen_classes(data(), 3)
    seen = class_split(CLASSES, generator(3, "classes"))
    left = seen_only(whole)
    assert torch.equal(left.spec.seen, seen)
    assert left.spec.dims == {"image": 3, "text": 2}
    for part, labels in (("train", TRAIN), ("validation", TEST[:20]), ("test", TEST[20:]), ("all_test", TEST)):
        own = getattr(left, part)
        assert torch.equal(own.labels, labels[(labels & seen).any(1)])
        assert own.features["image"][:, 0].tolist() == own.labels.float().argmax(1).tolist()  # each its own features
        assert own.features["image"].shape[1] == 3
    assert any("3 of 6 classes are unseen, by seed 3; the columns" in note for note in left.notes)
    assert any("15 of 30 training items" in note for note in left.notes)


@pytest.mark.parametrize("task", MEASURED)
def test_a_protocol_asks_test_items_about_training_items(task):
    whole = with_unseen_classes(data(), 3)
    for on, labels in (("test", TEST[20:]), ("all-test", TEST)):
        found = protocol(whole, task, on, 3)
        of = subsets(TRAIN, labels, whole.spec.seen)
        assert tuple(found.tasks) == MEASURED[task]
        assert torch.equal(found.test.labels, labels)
        assert torch.equal(found.tasks["unseen"].queries, of.ut)
        assert torch.equal(found.tasks["unseen"].gallery_train, of.us)


def test_a_task_that_nothing_could_answer_is_refused():
    unseen = (~class_split(CLASSES, generator(3, "classes"))).nonzero().flatten().tolist()
    one, other = one_hot([unseen[0]] * 5), one_hot([unseen[1]] * 5)
    seen = TEST[(TEST & class_split(CLASSES, generator(3, "classes"))).any(1)]
    with pytest.raises(InputError, match="a class of unseen items in both of image->text"):
        protocol(with_unseen_classes(data(torch.cat([seen, one]), seen, torch.cat([seen, other])), 3), *ASKED)
    with pytest.raises(InputError, match="expected items for the zero-shot task 'unseen'"):
        protocol(with_unseen_classes(data(seen, seen, torch.cat([seen, other])), 3), *ASKED)


def test_a_modality_that_no_unseen_item_has_is_refused():
    whole = data()
    seen = class_split(CLASSES, generator(3, "classes"))

    def without(items: Items) -> Items:
        rows = (items.labels & seen).any(1).nonzero().flatten()
        return Items(
            {**items.features, "audio": torch.zeros(len(rows), 2)}, {**items.rows, "audio": rows}, items.labels
        )

    lacking = replace(
        whole,
        spec=replace(whole.spec, dims={**whole.spec.dims, "audio": 2}),
        **{part: without(getattr(whole, part)) for part in ("train", "validation", "test", "all_test")},
    )
    with pytest.raises(InputError, match="a class of unseen items in both of image->audio, got none"):
        protocol(with_unseen_classes(lacking, 3), *ASKED)


ASKED = ("zero-shot", "test", 3)


class Plain:
    """Its embedding is the feature itself, its similarity minus the distance."""

    def encode(self, modality, x):
        return x

    def similarity(self, query, gallery, direction):
        return -torch.cdist(query, gallery)


def literal_map(scores, query_labels, gallery_labels):
    found = []
    for row, labels in zip(scores, query_labels, strict=True):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        hits = [bool((gallery_labels[j] & labels).any()) for j in order]
        if any(hits):
            found.append(statistics.fmean(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit))
    return statistics.fmean(found)


@pytest.mark.parametrize("task", ["seen", "unseen", "generalised"])
def test_a_tasks_score_is_the_map_of_its_queries_and_gallery(task):
    g = generator(0, "features")
    train = Items.paired({m: torch.randn(30, 2, generator=g) for m in ("image", "text")}, TRAIN)
    rows = torch.arange(0, 50, 3)  # every third test item has a text
    test = Items(
        {"image": torch.randn(50, 2, generator=g), "text": torch.randn(17, 2, generator=g)},
        {"image": torch.arange(50), "text": rows},
        TEST,
    )
    of = subsets(TRAIN, TEST, SEEN)
    ranked = task_items(task, of, TEST, generator(0, "halves"))
    scores = evaluate_task(Plain(), train, test, ranked, seed=0)

    texts = [i for i in ranked.gallery_test.tolist() if i in rows]
    gallery = torch.cat([train.features["text"][ranked.gallery_train], test.features["text"][[i // 3 for i in texts]]])
    labels = torch.cat([TRAIN[ranked.gallery_train], TEST[texts]])
    similarity = -torch.cdist(test.features["image"][ranked.queries], gallery)
    expected = literal_map(similarity.tolist(), TEST[ranked.queries], labels)
    assert scores["image->text"] == pytest.approx(expected, abs=1e-9)

    asking = [i for i in ranked.queries.tolist() if i in rows]
    gallery = torch.cat([train.features["image"][ranked.gallery_train], test.features["image"][ranked.gallery_test]])
    labels = torch.cat([TRAIN[ranked.gallery_train], TEST[ranked.gallery_test]])
    similarity = -torch.cdist(test.features["text"][[i // 3 for i in asking]], gallery)
    expected = literal_map(similarity.tolist(), TEST[asking], labels)
    assert scores["text->image"] == pytest.approx(expected, abs=1e-9)
    assert scores["average"] == pytest.approx((scores["image->text"] + scores["text->image"]) / 2)


def semantic(noise=0.3):
    """Training and test items whose features are an image of their class's vector: what is seen tells of the unseen."""
    g = generator(0, "semantic")
    vectors = torch.nn.functional.normalize(torch.randn(20, 6, generator=g))
    mixing = {m: torch.randn(6, d, generator=g) for m, d in (("image", 16), ("text", 12))}
    parts = []
    for n in (400, 200):
        classes = torch.arange(n) % 20
        features = {
            m: vectors[classes] @ w + noise * torch.randn(n, w.shape[1], generator=g) for m, w in mixing.items()
        }
        parts.append(Items.paired(features, torch.eye(20, dtype=torch.bool)[classes]))
    return *parts, DataSpec({"image": 16, "text": 12}, 20, vectors)


@pytest.mark.usefixtures("one_thread")
def test_jfse_ranks_unseen_classes_better_for_knowing_their_vectors():
    train, test, spec = semantic()
    config = JFSEConfig(hidden=32, width=20, noise=8, critic_steps=1, allow_random=True, optimizer={"lr": 0.002})
    kinds = {"trained": (spec.class_vectors, 20), "made up": (None, 20), "untrained": (spec.class_vectors, 0)}
    found = {}
    for name, (vectors, epochs) in kinds.items():
        scores = {"unseen": [], "generalised": []}
        for split in range(10):
            seen = class_split(20, generator(split, "classes"))
            of = subsets(train.labels, test.labels, seen)
            known = DataSpec(spec.dims, 20, vectors, seen)
            learner = JFSE(config, known, torch.device("cpu"), generator(0, "initial"))
            learner.fit(train.select(of.ss), epochs, generator(0, "fit"))
            for task, so_far in scores.items():
                ranked = task_items(task, of, test.labels, generator(split, "halves"))
                so_far.append(evaluate_task(learner, train, test, ranked, seed=0))
        found[name] = {task: [of_split["average"] for of_split in s] for task, s in scores.items()}
    for task in ("unseen", "generalised"):
        assert better(found["trained"][task], found["made up"][task])
        # made-up vectors are better than none: unseen items are told apart by the seen classes they resemble
        assert better(found["made up"][task], found["untrained"][task])


def better(one, other):
    """Whether the mean difference over splits is above two of its standard errors."""
    apart = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.fmean(apart) > 2 * statistics.stdev(apart) / math.sqrt(len(apart))


def measured(split, **floors):
    """What a run's report has of one split, with an mAP of .5 and floors by name."""
    level = {"round": 1, "mean": {"unseen": {"average": 0.5}}}
    floors = {name: {"unseen": {"average": floor}} for name, floor in floors.items()}
    return {"unseen_classes": [split], "selected": level, "last": level, "floors": floors}


def test_a_floor_stands_once_and_where_methods_differ_in_it_with_each():
    few, many = measured("a", chance=0.1, cosine=0.2), measured("b", chance=0.3, cosine=0.2)
    rows = experiment_table({"one": [few], "same": [few], "other": [many]})
    floors = {label: level for label, level, *_ in rows[4:]}
    assert floors == {"*chance* (one)": "0.100", "*chance* (other)": "0.300", "*cosine*": "0.200"}


def test_the_splits_that_are_counted_are_those_of_one_method():
    # a sweep over the share of seen classes has other splits at every point, and yet one seed alone
    assert splits_note({str(n): [measured(n)] for n in range(5)}).startswith("1 different splits of the classes; 5 or")
    assert splits_note({m: [measured(n) for n in range(5)] for m in "ab"}) == "5 different splits of the classes."

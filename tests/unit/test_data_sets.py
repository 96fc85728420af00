"""What every data set must be, and what each of those made here is."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from fedxmr.data import DATASETS, Dataset, dataset_options, load_dataset, source
from fedxmr.data.dataset import drop_unseen_columns
from fedxmr.data.digits import Options as DigitsOptions
from fedxmr.data.splits import first_copies, stratified, stratified_labels
from fedxmr.data.synthetic import Options as SyntheticOptions
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.types import Items
from fedxmr.zero_shot import seen_only, with_unseen_classes
from tests.conftest import NEEDED


@pytest.fixture(scope="module", params=sorted(name for name, source in DATASETS.items() if not source.brought))
def dataset(request: pytest.FixtureRequest) -> Dataset:
    folder = request.getfixturevalue("benchmark_folder")(request.param) if request.param in NEEDED else None
    return load_dataset(request.param, data_dir=folder)


def item_bytes(items: Items) -> list[bytes]:
    """One fingerprint per item of a complete data set."""
    together = torch.cat([items.features[m] for m in sorted(items.features)], 1).numpy()
    return [row.tobytes() for row in together]


def ink(address: str, times: int, highest: int) -> Tensor:
    """[h, w] the pixels behind what is shown enlarged, dark on light."""
    image = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    return ((255 - torch.tensor(np.array(image))[::times, ::times].double()) * highest / 255).round()


def test_every_data_set_fits_its_own_description(dataset: Dataset):
    assert dataset.name in DATASETS
    assert len(dataset.classes) == dataset.spec.num_classes
    assert set(dataset.scaling) == set(dataset.spec.dims)
    for part in (dataset.train, dataset.validation, dataset.test, dataset.all_test):
        assert {m: x.shape[1] for m, x in part.features.items()} == dict(dataset.spec.dims)
        assert part.modalities == tuple(sorted(dataset.spec.dims))
        assert part.labels.shape == (len(part), dataset.spec.num_classes)
        assert part.labels.any(1).all()
        assert all(x.dtype == torch.float32 and x.isfinite().all() for x in part.features.values())
    assert dataset.train.labels.any(0).all()
    assert dataset.notes


def test_what_a_data_set_can_show_it_shows_of_every_test_item(dataset: Dataset):
    looks = dataset.looks()
    assert set(looks.of) <= set(dataset.spec.dims)
    for part, items in (("test", dataset.test), ("all_test", dataset.all_test)):
        for item in (0, len(items) - 1):
            for modality in dataset.spec.dims:
                look = looks.show(part, item, modality)
                assert bool(look.text or look.image) == (modality in looks.of)


def test_every_data_sets_parts_are_disjoint(dataset: Dataset):
    for one, other in combinations((dataset.train, dataset.validation, dataset.test), 2):
        assert not set(item_bytes(one)) & set(item_bytes(other))


def test_every_data_sets_all_test_is_what_it_says(dataset: Dataset):
    expected = item_bytes(dataset.test) + (item_bytes(dataset.validation) if dataset.all_test_overlaps else [])
    assert sorted(item_bytes(dataset.all_test)) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("wikpedia", {}, "unknown dataset 'wikpedia'; did you mean 'wikipedia'? (known: coco, cub, digits, "
         "iaprtc12, mfeat, mirflickr, nus-wide-10k, own-folder, pascal, pascal-vgg, synthetic, wikipedia, "
         "wikipedia-multi, wikipedia-vgg, xmedia, xmedianet)"),
        ("zzz", {}, "unknown dataset 'zzz' (known: coco, cub, digits, iaprtc12, "),
        ("coco", {"layout": "mccn"}, "dataset coco: layout: Input should be 'auto', 'fedcmr' or 'dscmr', got 'mccn'"),
        ("wikipedia-multi", {"modalities": ["cnn"]}, "dataset wikipedia-multi: modalities: Tuple should have at "),
        ("wikipedia-multi", {"modalities": ["cnn", "cnn"]}, "dataset wikipedia-multi: modalities: expected different "),
        ("wikipedia-multi", {"modalities": ["cnn", "lda"]}, "dataset wikipedia-multi: modalities.1: Input should be "),
        ("pascal", {"class_vectors": "bert"}, "dataset pascal: class_vectors: Input should be 'word2vec' or 'glove'"),
        ("wikipedia", {"feature": "x"}, "unknown option of dataset wikipedia 'feature'; did you mean 'features'?"),
        ("wikipedia", {"features": "cnn"}, "dataset wikipedia: features: Input should be 'cnn-tfidf' or 'sift-lda', "
         "got 'cnn'"),
        ("synthetic", {"items": "many"}, "dataset synthetic: items: Input should be a valid integer"),
        ("synthetic", {"classes": 3, "labels_per_item": 4}, "dataset synthetic: labels_per_item: expected at most 3"),
        ("synthetic", {"difficulty": float("nan")}, "dataset synthetic: difficulty: Input should be a finite number"),
        ("synthetic", {"modalities": {"a.b": 3}}, "dataset synthetic: modalities.a.b.[key]: String should match "),
        ("synthetic", {"modalities": {}}, "dataset synthetic: modalities: "),
        ("somewhere/else", {}, "somewhere/else: expected a folder, got nothing there"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_option_gets_one_line(name: str, options: dict[str, object], expected: str):
    with pytest.raises(InputError, match="^" + re.escape(expected)) as caught:
        load_dataset(name, options)
    assert "\n" not in str(caught.value)


def test_a_folder_beside_is_found_by_name_but_hides_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "digits").mkdir()
    assert source("mine") is source("./digits") is not source("digits")
    assert source("digits") is DATASETS["digits"]


def test_options_may_be_given_checked_or_as_a_mapping():
    checked = dataset_options("synthetic", {"items": 30})
    assert checked == SyntheticOptions(items=30)
    assert len(load_dataset("synthetic", checked).train) == len(load_dataset("synthetic", {"items": 30}).train) == 30
    with pytest.raises(TypeError, match=r"expected fedxmr\.data\.synthetic\.Options"):
        load_dataset("synthetic", DigitsOptions())


def test_digits_are_scikit_learns_images_cut_in_half():
    dataset = load_dataset("digits")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [1078, 270, 449]
    images, digits = load_digits(return_X_y=True)
    expected = {x.astype("float32").tobytes(): int(digit) for x, digit in zip(images, digits, strict=True)}
    for part in (dataset.train, dataset.validation, dataset.test):
        halves = [part.features[side].reshape(-1, 8, 4) for side in ("left", "right")]
        for image, label in zip(torch.cat(halves, 2), part.labels.int().argmax(1), strict=True):
            assert expected[image.contiguous().numpy().tobytes()] == label


def test_a_split_seed_moves_items_but_not_sizes():
    first, again, other = (load_dataset("digits", {"split_seed": seed}) for seed in (0, 0, 1))
    assert torch.equal(first.test.features["left"], again.test.features["left"])
    assert not torch.equal(first.test.features["left"], other.test.features["left"])
    assert len(first.test) == len(other.test)


def test_synthetic_options_set_every_size():
    options = {"items": 40, "validation_items": 11, "test_items": 13, "classes": 4, "labels_per_item": 2}
    dataset = load_dataset("synthetic", options | {"modalities": {"a": 3, "b": 5, "c": 7}})
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [40, 11, 13]
    assert dataset.spec.dims == {"a": 3, "b": 5, "c": 7}
    assert (dataset.train.labels.sum(1) == 2).all()
    assert dataset.train.labels.shape[1] == 4


def test_synthetic_classes_are_balanced():
    assert load_dataset("synthetic", {"items": 50}).train.labels.sum(0).tolist() == [5] * 10


@pytest.mark.parametrize("threads", [1, 2])
def test_synthetic_bytes_depend_on_the_options_alone(threads: int):
    before = torch.get_num_threads()
    expected = load_dataset("synthetic", {"modalities": {"wide": 512, "thin": 32}})
    try:
        torch.set_num_threads(threads)
        again = load_dataset("synthetic", {"modalities": {"wide": 512, "thin": 32}})
    finally:
        torch.set_num_threads(before)
    other = load_dataset("synthetic", {"modalities": {"wide": 512, "thin": 32}, "seed": 1})
    assert torch.equal(expected.train.features["wide"], again.train.features["wide"])
    assert not torch.equal(expected.train.features["wide"], other.train.features["wide"])


def test_another_modality_leaves_the_others_as_they_were():
    two = load_dataset("synthetic", {"modalities": {"image": 8, "text": 4}})
    three = load_dataset("synthetic", {"modalities": {"audio": 6, "image": 8, "text": 4}})
    assert torch.equal(two.train.features["text"], three.train.features["text"])


def nearest_mean_accuracy(dataset: Dataset) -> float:
    x, y = dataset.train.features["image"], dataset.train.labels.float()
    means = (y.T @ x) / y.sum(0)[:, None]
    nearest = torch.cdist(dataset.test.features["image"], means).argmin(1)
    return float(dataset.test.labels[torch.arange(len(nearest)), nearest].float().mean())


def test_synthetic_difficulty_goes_from_separable_to_hard():
    easy, medium, hard = (
        nearest_mean_accuracy(load_dataset("synthetic", {"difficulty": d, "test_items": 500})) for d in (0.0, 1.0, 2.0)
    )
    assert easy > 0.95
    assert easy > medium + 0.05 > hard + 0.15
    assert hard > 0.2  # chance is 0.1


def class_counts(classes: Tensor, part: Tensor) -> list[int]:
    return torch.bincount(classes[part], minlength=int(classes.max()) + 1).tolist()


def test_a_stratified_division_is_exact_and_proportional():
    classes = torch.tensor([0] * 6 + [1] * 3 + [2])
    one, other = stratified(classes, (5, 5), generator(0, "test"))
    # shares of 3, 1.5 and 0.5: the larger remainder is tied, so the lower class takes it
    assert class_counts(classes, one) == [3, 2, 0]
    assert class_counts(classes, other) == [3, 1, 1]
    assert torch.cat([one, other]).sort().values.tolist() == list(range(10))
    assert one.tolist() == sorted(one.tolist())


def test_a_stratified_division_refuses_sizes_that_do_not_add_up():
    with pytest.raises(ValueError, match="expected a sum of 4"):
        stratified(torch.zeros(4, dtype=torch.int64), (1, 2), generator(0, "test"))


def random_labels(n: int, classes: int, seed: int) -> Tensor:
    """[n, classes] bool from common labels to rare ones; some items have none."""
    rate = 0.6 * 0.5 ** torch.arange(classes)
    return torch.rand(n, classes, generator=generator(seed, "labels")) < rate


@settings(max_examples=100, deadline=None)
@given(data=st.data(), classes=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_division_by_several_labels_is_exact_disjoint_and_repeatable(data: st.DataObject, classes: int, seed: int):
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    labels = random_labels(sum(sizes), classes, seed)
    parts = stratified_labels(labels, sizes, generator(seed, "test"))
    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts).sort().values.tolist() == list(range(sum(sizes)))
    assert all((part.diff() > 0).all() for part in parts)
    again = stratified_labels(labels, sizes, generator(seed, "test"))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_division_by_several_labels_keeps_their_proportions():
    labels = random_labels(1000, 8, 0)
    one, other = stratified_labels(labels, (250, 750), generator(0, "test"))
    assert len(other) == 750
    assert ((labels[one].sum(0) - 0.25 * labels.sum(0)).abs() <= 2).all()
    drawn = torch.randperm(1000, generator=generator(0, "test"))[:250]
    assert not ((labels[drawn].sum(0) - 0.25 * labels.sum(0)).abs() <= 2).all()  # as chance would have it


def test_a_label_of_one_item_is_in_the_largest_part():
    labels = torch.eye(6, dtype=torch.bool).repeat_interleave(torch.tensor([1, 1, 1, 1, 1, 20]), 0)
    for seed in range(5):
        small, large = stratified_labels(labels, (8, 17), generator(seed, "test"))
        assert labels[large].sum(0).tolist() == [1, 1, 1, 1, 1, 12]
        assert labels[small].sum(0).tolist() == [0, 0, 0, 0, 0, 8]


def test_one_label_each_is_divided_as_by_class():
    classes = torch.arange(90) % 3
    for part, size in zip(stratified_labels(torch.eye(3, dtype=torch.bool)[classes], (30, 60), generator(0, "test")),
                          (10, 20), strict=True):  # fmt: skip
        assert class_counts(classes, part) == [size] * 3


def test_a_division_by_several_labels_refuses_sizes_that_do_not_add_up():
    with pytest.raises(ValueError, match="expected a sum of 4"):
        stratified_labels(torch.zeros(4, 2, dtype=torch.bool), (1, 2), generator(0, "test"))


def test_copies_are_items_alike_in_every_modality():
    image = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0]])
    text = torch.tensor([[5.0], [6.0], [7.0], [5.0], [7.0]])
    assert first_copies({"image": image, "text": text}).tolist() == [0, 1, 2, 0, 2]


def similarities() -> Dataset:
    """Three classes; "a" and "b" are similarities to items of classes 0, 1, 1, 2, and "c" is not."""
    base = load_dataset("synthetic", {"items": 9, "validation_items": 3, "test_items": 3, "classes": 3,
                                      "modalities": {"a": 4, "b": 4, "c": 5}})  # fmt: skip
    columns = torch.tensor([0, 1, 1, 2])
    return replace(base, column_class={"a": columns, "b": columns})


def test_columns_of_unseen_class_items_are_dropped_everywhere():
    whole = similarities()
    seen = torch.tensor([True, False, True])
    kept = drop_unseen_columns(whole, seen)
    assert dict(kept.spec.dims) == {"a": 2, "b": 2, "c": 5}
    for part in ("train", "validation", "test", "all_test"):
        before, after = getattr(whole, part), getattr(kept, part)
        for modality in ("a", "b"):
            assert torch.equal(after.features[modality], before.features[modality][:, [0, 3]])
        assert torch.equal(after.features["c"], before.features["c"])
        assert torch.equal(after.labels, before.labels)
    assert kept.column_class["a"].tolist() == [0, 2]
    assert drop_unseen_columns(kept, seen).spec.dims == kept.spec.dims


def test_a_data_set_of_features_keeps_them_in_a_zero_shot_task():
    whole = load_dataset("digits")
    kept = drop_unseen_columns(whole, torch.arange(10) < 5)
    assert torch.equal(kept.train.features["left"], whole.train.features["left"])


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (torch.ones(4, dtype=torch.bool), r"seen: expected \[3\] bool, got \[4\] torch.bool"),
        (torch.ones(3), r"seen: expected \[3\] bool, got \[3\] torch.float32"),
        (torch.zeros(3, dtype=torch.bool), "seen: expected a class that a columns compare with, got none"),
    ],
)
def test_seen_classes_that_do_not_fit_are_refused(seen: Tensor, expected: str):
    with pytest.raises(ValueError, match=expected):
        drop_unseen_columns(similarities(), seen)


def test_the_halves_of_a_digit_are_shown_as_they_are():
    data = load_dataset("digits")
    looks, images = data.looks(), torch.tensor(load_digits().images)
    for item in (0, 7):
        halves = [ink(looks.show("test", item, m).image, 10, 16) for m in ("left", "right")]
        assert (images == torch.cat(halves, 1)).all(2).all(1).any()


def test_items_of_seen_classes_alone_are_shown_as_themselves():
    data = load_dataset("digits")
    seen = seen_only(with_unseen_classes(data, 0))
    assert len(seen.test) < len(data.test)
    for item in (0, len(seen.test) - 1):
        shown = ink(seen.looks().show("test", item, "left").image, 10, 16)
        assert torch.equal(shown.flatten().float(), seen.test.features["left"][item])

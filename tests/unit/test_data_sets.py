"""What every data set must be, and what each of those made here is."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fedxmr.data import DATASETS, Dataset, dataset_options, load_dataset, source
from fedxmr.data.digits import Options as DigitsOptions
from fedxmr.data.splits import stratified
from fedxmr.data.synthetic import Options as SyntheticOptions
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.types import Items


@pytest.fixture(scope="module", params=sorted(DATASETS))
def dataset(request: pytest.FixtureRequest) -> Dataset:
    needs_files = request.param == "wikipedia"
    return load_dataset(request.param, data_dir=request.getfixturevalue("benchmark_data") if needs_files else None)


def item_bytes(items: Items) -> list[bytes]:
    """One fingerprint per item of a complete data set."""
    together = torch.cat([items.features[m] for m in sorted(items.features)], 1).numpy()
    return [row.tobytes() for row in together]


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


def test_every_data_sets_parts_are_disjoint(dataset: Dataset):
    for one, other in combinations((dataset.train, dataset.validation, dataset.test), 2):
        assert not set(item_bytes(one)) & set(item_bytes(other))


def test_every_data_sets_all_test_is_what_it_says(dataset: Dataset):
    expected = item_bytes(dataset.test) + (item_bytes(dataset.validation) if dataset.all_test_overlaps else [])
    assert sorted(item_bytes(dataset.all_test)) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("wikpedia", {}, "unknown dataset 'wikpedia'; did you mean 'wikipedia'? (known: digits, synthetic, wikipedia)"),
        ("zzz", {}, "unknown dataset 'zzz' (known: digits, synthetic, wikipedia)"),
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

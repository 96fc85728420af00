"""The real Wikipedia files: counts, alignment, and levels that only right features in the right order reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fedxmr.data import Dataset, load_dataset, wikipedia
from fedxmr.data.looks import Look
from fedxmr.errors import InputError
from fedxmr.types import Items

COUNTS = [34, 88, 96, 85, 65, 58, 51, 41, 71, 104]  # of the 693 published test pairs


@pytest.fixture(scope="module", params=["cnn-tfidf", "sift-lda"])
def dataset(request: pytest.FixtureRequest, benchmark_data: Path) -> Dataset:
    return load_dataset("wikipedia", {"features": request.param}, benchmark_data)


@pytest.fixture(scope="module")
def deep(benchmark_data: Path) -> Dataset:
    return load_dataset("wikipedia", data_dir=benchmark_data)


def class_of(items: Items) -> Tensor:
    assert (items.labels.sum(1) == 1).all()
    return items.labels.int().argmax(1)


def mean_average_precision(scores: Tensor, query: Tensor, gallery: Tensor) -> float:
    """One query at a time, straight from the definition; rows of `scores` [q, g] are queries."""
    means = []
    for row, label in zip(scores, query, strict=True):
        ranks = (gallery[row.argsort(descending=True)] == label).nonzero().flatten() + 1
        means.append((torch.arange(1, len(ranks) + 1) / ranks).mean())
    return float(torch.stack(means).mean())


def test_the_parts_have_their_published_sizes(dataset: Dataset):
    parts = (dataset.train, dataset.validation, dataset.test, dataset.all_test)
    assert [len(part) for part in parts] == [2173, 231, 462, 693]
    assert dataset.all_test_overlaps
    assert len(dataset.classes) == 10
    assert dataset.classes[0] == "art"
    assert dataset.classes[9] == "warfare"


def test_validation_is_a_third_of_each_class(dataset: Dataset):
    assert dataset.all_test.labels.sum(0).tolist() == COUNTS
    for got, of_class in zip(dataset.validation.labels.sum(0).tolist(), COUNTS, strict=True):
        assert of_class / 3 - 1 < got < of_class / 3 + 1
    assert (dataset.validation.labels.sum(0) + dataset.test.labels.sum(0)).tolist() == COUNTS
    assert any("231 validation and 462 test" in note and "seed 0" in note for note in dataset.notes)


def test_both_feature_sets_are_divided_alike(benchmark_data: Path, deep: Dataset):
    shallow = load_dataset("wikipedia", {"features": "sift-lda"}, benchmark_data)
    assert torch.equal(deep.test.labels, shallow.test.labels)
    other = load_dataset("wikipedia", {"split_seed": 1}, benchmark_data)
    assert not torch.equal(deep.test.features["image"], other.test.features["image"])


def test_features_are_the_published_ones_in_the_published_order(benchmark_data: Path):
    raw = loadmat(benchmark_data / "wikipedia" / "raw_features.mat")
    shallow = load_dataset("wikipedia", {"features": "sift-lda"}, benchmark_data)
    assert shallow.spec.dims == {"image": 128, "text": 10}
    for part, suffix in ((shallow.train, "tr"), (shallow.all_test, "te")):
        assert np.array_equal(part.features["image"].numpy(), raw[f"I_{suffix}"].astype(np.float32))
        assert np.array_equal(part.features["text"].numpy(), raw[f"T_{suffix}"].astype(np.float32))


def test_each_modality_of_the_benchmark_predicts_its_classes(deep: Dataset):
    # the levels seen with logistic regression are far above the largest class's share, .15: rows and labels belong
    assert deep.spec.dims == {"image": 128, "text": 1000}
    assert deep.scaling == {"image": "standardise", "text": "norm"}
    image, text = deep.train.features["image"], deep.train.features["text"]
    mean, spread = image.mean(0), image.std(0)
    for train, test, least in (
        ((image - mean) / spread, (deep.all_test.features["image"] - mean) / spread, 0.45),
        (10 * torch.nn.functional.normalize(text), 10 * torch.nn.functional.normalize(deep.all_test.features["text"]),
         0.6),
    ):  # fmt: skip
        model = LogisticRegression(C=0.01, max_iter=500).fit(train.numpy(), class_of(deep.train).numpy())
        assert model.score(test.numpy(), class_of(deep.all_test).numpy()) > least


def whiten(x: Tensor) -> tuple[Tensor, Tensor]:
    """[n, d] -> orthonormal columns [n, r] that span the centred x, and the map [d, r] that makes them."""
    u, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    full = s > 1e-6 * s[0]  # topics add up to one, so a direction has no variance
    return u[:, full], v.T[:, full] / s[full]


def canonical_correlation_map(train: Items, test: Items, components: int = 7) -> tuple[float, float]:
    """mAP@all of image to text and text to image after canonical correlation analysis (Hotelling 1936)."""
    image, text = (train.features[m].double() for m in ("image", "text"))
    (image_white, image_map), (text_white, text_map) = whiten(image), whiten(text)
    left, _, right = torch.linalg.svd(image_white.T @ text_white, full_matrices=False)
    image_seen = (test.features["image"].double() - image.mean(0)) @ image_map @ left[:, :components]
    text_seen = (test.features["text"].double() - text.mean(0)) @ text_map @ right.T[:, :components]
    scores = torch.nn.functional.normalize(image_seen) @ torch.nn.functional.normalize(text_seen).T
    classes = class_of(test)
    return mean_average_precision(scores, classes, classes), mean_average_precision(scores.T, classes, classes)


def test_images_are_paired_with_their_own_texts(benchmark_data: Path):
    # canonical correlations see no labels: they find the classes only where row i of both modalities is one article
    shallow = load_dataset("wikipedia", {"features": "sift-lda"}, benchmark_data)
    # (published about .25 and .20; chance is .118)
    assert canonical_correlation_map(shallow.train, shallow.all_test) == pytest.approx((0.247, 0.201), abs=0.01)
    shuffled = torch.randperm(2173, generator=torch.Generator().manual_seed(0))
    features = dict(shallow.train.features) | {"text": shallow.train.features["text"][shuffled]}
    apart = Items.paired(features, shallow.train.labels)
    assert sum(canonical_correlation_map(apart, shallow.all_test)) / 2 < 0.15


def test_a_random_order_is_at_chance(deep: Dataset):
    classes = class_of(deep.all_test)
    shuffled = classes[torch.randperm(693, generator=torch.Generator().manual_seed(0))]
    order = torch.arange(693.0).expand(693, -1)
    assert mean_average_precision(order, classes, shuffled) == pytest.approx(0.118, abs=0.01)


def test_features_whose_labels_disagree_with_the_lists_are_refused(
    benchmark_data: Path, monkeypatch: pytest.MonkeyPatch
):
    read = wikipedia.read_mat

    def swapped(*file: object) -> dict[str, object]:
        contents = dict(read(*file))
        if "data" in contents:
            labels = contents["data"]["Y"].toarray()
            first, other = 0, int((labels.argmax(0) != labels[:, 0].argmax()).argmax())
            labels[:, [first, other]] = labels[:, [other, first]]
            contents["data"] = contents["data"] | {"Y": labels}
        return contents

    monkeypatch.setattr(wikipedia, "read_mat", swapped)
    with pytest.raises(InputError, match=r"expected the labels of the \.list files, got others in 2 of 2866 rows, "):
        load_dataset("wikipedia", data_dir=benchmark_data)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("T_te", np.zeros((693, 9)), r"expected T_te to be \[693, 10\] numbers, got \[693, 9\] float64"),
        ("I_tr", "text", r"expected I_tr to be \[2173, 128\] numbers, got str"),
        ("I_te", None, r"expected I_te to be \[693, 128\] numbers, got NoneType"),
        ("T_tr", np.full((2173, 10), np.nan), "expected finite numbers in T_tr, got NaN or infinite ones"),
    ],
)
def test_a_mat_file_with_other_contents_is_refused(
    name: str, value: object, expected: str, benchmark_data: Path, monkeypatch: pytest.MonkeyPatch
):
    read = wikipedia.read_mat
    monkeypatch.setattr(wikipedia, "read_mat", lambda *file: {**read(*file), name: value})
    with pytest.raises(InputError, match=r"raw_features\.mat: " + expected):
        load_dataset("wikipedia", {"features": "sift-lda"}, benchmark_data)


def test_images_and_texts_beside_the_lists_are_shown(benchmark_data: Path, tmp_path: Path):
    own = tmp_path / "wikipedia"
    own.mkdir()
    for file in (benchmark_data / "wikipedia").iterdir():
        (own / file.name).symlink_to(file)
    data = load_dataset("wikipedia", {"features": "sift-lda"}, tmp_path)
    lines = [line.split("\t") for line in (own / "testset_txt_img_cat.list").read_text().splitlines()]
    item = 5
    row = next(i for i, x in enumerate(data.all_test.features["image"]) if x.equal(data.test.features["image"][item]))
    text, image, category = lines[row]
    assert data.classes[int(category) - 1] == data.classes[int(data.test.labels[item].int().argmax())]
    looks = data.looks()
    assert looks.number("test", item) == row
    assert looks.show("test", item, "image") == looks.show("all_test", row, "image") == Look(f"image {image}")
    assert looks.show("test", item, "text") == Look(f"text {text}")
    picture = own / "images" / data.classes[int(category) - 1] / f"{image}.jpg"
    words = own / "texts" / f"{text}.xml"
    for path in (picture, words):
        path.parent.mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(picture)
    words.write_text("<?xml version='1.0'?>\n<document>\n<text>\nFish &amp; chips\nare </text></document>")
    assert looks.show("test", item, "image").image.startswith("data:image/webp;base64,")
    assert looks.show("test", item, "text").text.split() == ["text", f"{text}:", "Fish", "&", "chips", "are"]

"""The real files of pascal, mfeat, wikipedia-multi and iaprtc12, read here without the loaders' own code."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import loadmat
from torch import Tensor
from torch.nn.functional import normalize

from fedxmr.data import Dataset, iaprtc12, load_dataset, mfeat, pascal
from fedxmr.data.class_vectors import with_narrow_class_vectors
from fedxmr.data.dataset import drop_unseen_columns
from fedxmr.data.files import RemoteFile
from fedxmr.errors import InputError
from fedxmr.types import Items

Folder = Callable[[str], Path]


def counts(items: Items) -> list[int]:
    return items.labels.sum(0).tolist()


def joined(*parts: Items) -> tuple[dict[str, Tensor], Tensor]:
    """Features and labels of several parts, one below the other."""
    features = {m: torch.cat([part.features[m] for part in parts]) for m in parts[0].features}
    return features, torch.cat([part.labels for part in parts])


def ridge_accuracy(train: Items, test: Items, modality: str, penalty: float = 0.1) -> float:
    """How often ridge regression on the labels, of standardised features, finds the one class of a test item."""
    x, y = train.features[modality].double(), train.labels.double()
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / spread
    weights = torch.linalg.solve(
        x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=torch.float64), x.T @ (y - y.mean(0))
    )
    found = ((test.features[modality].double() - mean) / spread @ weights + y.mean(0)).argmax(1)
    return float(test.labels[torch.arange(len(found)), found].float().mean())


def numbered(items: Items, published: dict[str, np.ndarray]) -> list[int]:
    """The published row of each item; it is the only one with just these features in every modality."""
    names = sorted(published)
    table = np.concatenate([published[m].astype(np.float32) for m in names], 1)
    place = {row.tobytes(): i for i, row in reversed(list(enumerate(table)))}
    own = torch.cat([items.features[m] for m in names], 1).numpy()
    return [place[row.tobytes()] for row in own]


def mean_average_precision(query: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor) -> float:
    """mAP@all by cosine; relevant shares a label. Straight from the definition."""
    relevant = (query_labels.float() @ gallery_labels.float().T) > 0
    order = (normalize(query) @ normalize(gallery).T).argsort(1, descending=True)
    means = []
    for row, ranking in zip(relevant, order, strict=True):
        ranks = row[ranking].nonzero().flatten() + 1
        if len(ranks):
            means.append((torch.arange(1, len(ranks) + 1) / ranks).mean())
    return float(torch.stack(means).mean())


def both_ways(features: dict[str, Tensor], labels: Tensor) -> tuple[float, float]:
    """mAP of image to text and of text to image, all items being queries and gallery."""
    image, text = features["image"], features["text"]
    return mean_average_precision(image, text, labels, labels), mean_average_precision(text, image, labels, labels)


# pascal


@pytest.fixture(scope="module")
def pascal_folder(benchmark_folder: Folder) -> Path:
    return benchmark_folder("pascal")


@pytest.fixture(scope="module")
def similarities(pascal_folder: Path) -> dict[str, np.ndarray]:
    return loadmat(pascal_folder / "pascal_sentence" / "pascal1K_sim.mat")


@pytest.fixture(scope="module")
def sentences(pascal_folder: Path) -> Dataset:
    return load_dataset("pascal", data_dir=pascal_folder)


def test_pascal_has_thirty_five_and_fifteen_of_each_class(sentences: Dataset):
    for part, each in ((sentences.train, 30), (sentences.validation, 5), (sentences.test, 15)):
        assert counts(part) == [each] * 20
        assert (part.labels.sum(1) == 1).all()
    assert sentences.spec.dims == {"image": 700, "text": 700}


def test_pascal_rows_keep_their_features_and_class(
    sentences: Dataset, similarities: dict[str, np.ndarray], pascal_folder: Path
):
    cat = loadmat(pascal_folder / "pascal_sentence" / "pascal1K_cat.mat")["cat"][0, 0]
    published = {"image": similarities["SX_tr"], "text": similarities["SY_tr"]}
    for part in (sentences.train, sentences.validation):
        rows = numbered(part, published)
        assert rows == sorted(rows)
        assert (part.labels.int().argmax(1) + 1).tolist() == cat["tr"].ravel()[rows].tolist()
        # a training item's own column, where it is as similar as can be
        assert all(part.features[m][range(len(rows)), rows].eq(1).all() for m in ("image", "text"))
    assert sorted(numbered(sentences.train, published) + numbered(sentences.validation, published)) == list(range(700))
    assert numbered(sentences.test, {"image": similarities["SX_te"], "text": similarities["SY_te"]}) == list(range(300))
    assert (sentences.test.labels.int().argmax(1) + 1).tolist() == cat["te"].ravel().tolist()
    for classes in sentences.column_class.values():
        assert (classes + 1).tolist() == cat["tr"].ravel().tolist()


def test_pascal_validation_follows_its_seed(pascal_folder: Path, sentences: Dataset):
    other = load_dataset("pascal", {"split_seed": 1}, pascal_folder)
    assert not torch.equal(other.validation.features["image"], sentences.validation.features["image"])
    assert torch.equal(other.test.features["image"], sentences.test.features["image"])


def test_pascal_features_predict_its_classes(sentences: Dataset):
    # one class in 20 is .05: rows and labels belong together
    for modality in ("image", "text"):
        assert ridge_accuracy(sentences.train, sentences.test, modality) > 0.5


def test_untrained_cosine_on_pascal_is_the_known_floor(sentences: Dataset):
    whole, _ = joined(sentences.train, sentences.validation)
    scaled = {m: (x - whole[m].mean(0)) / whole[m].std(0) for m, x in sentences.test.features.items()}
    assert both_ways(scaled, sentences.test.labels) == pytest.approx((0.309, 0.308), abs=0.002)


def test_pascal_says_that_its_features_are_similarities_and_find_their_own_pair(sentences: Dataset):
    for part in (sentences.train, sentences.validation, sentences.test):
        image, text = part.features["image"], part.features["text"]
        assert torch.equal(image == 0, text == 0)
        own = (normalize(image) @ normalize(text).T).argmax(1)
        assert own.tolist() == list(range(len(part)))
    assert any("similarities to the 700 published training items" in note for note in sentences.notes)
    assert any("find their own pair without learning" in note for note in sentences.notes)


def zero_shot(data: Dataset, seen: Tensor) -> float:
    """Untrained mAP of unseen test items in the training items of unseen classes, scaled by the seen, both ways."""
    features, labels = joined(data.train, data.validation)
    known, new, asked = labels[:, seen].any(1), labels[:, ~seen].any(1), data.test.labels[:, ~seen].any(1)
    found = []
    scaled, queries = {}, {}
    for modality, x in features.items():
        mean, spread = x[known].mean(0), x[known].std(0).clamp(min=1e-6)
        scaled[modality], queries[modality] = (x - mean) / spread, (data.test.features[modality] - mean) / spread
    for query, gallery in (("image", "text"), ("text", "image")):
        got = queries[query][asked], scaled[gallery][new], data.test.labels[asked], labels[new]
        found.append(mean_average_precision(*got))
    return sum(found) / 2


def test_the_zero_shot_leak_of_pascal_goes_with_the_columns_of_unseen_items(sentences: Dataset):
    for split in range(2):
        seen = torch.zeros(20, dtype=torch.bool)
        seen[torch.randperm(20, generator=torch.Generator().manual_seed(split))[:10]] = True
        kept = drop_unseen_columns(sentences, seen)
        assert kept.spec.dims == {"image": 350, "text": 350}
        columns = seen[sentences.column_class["image"]]
        assert torch.equal(kept.test.features["image"], sentences.test.features["image"][:, columns])
        assert zero_shot(sentences, seen) > 0.28  # chance is about .115
        assert zero_shot(kept, seen) < 0.22


COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
"""MS-COCO's names in their standard order."""
SYNONYMS = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
            "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}  # fmt: skip


@pytest.mark.parametrize(("name", "file"), [("word2vec", "googlenews"), ("glove", "glove6B")])
def test_pascal_class_vectors_are_those_of_the_class_names(name: str, file: str, pascal_folder: Path):
    vectors = load_dataset("pascal", {"class_vectors": name}, pascal_folder).spec.class_vectors
    published = loadmat(pascal_folder / "class_embeddings" / f"MS-COCO-inp-{file}.mat")["inp"].astype(np.float32)
    rows = [COCO.split(",").index(SYNONYMS.get(c, c)) for c in pascal.CLASSES]
    assert vectors is not None
    assert np.array_equal(vectors.numpy(), published[rows])
    nearest = (normalize(vectors) @ normalize(vectors).T - 2 * torch.eye(20)).argmax(1).tolist()
    close = {frozenset((pascal.CLASSES[i], pascal.CLASSES[j])) for i, j in enumerate(nearest)}
    assert {frozenset(("cat", "dog")), frozenset(("bicycle", "motorbike"))} <= close


def test_pascal_class_vectors_are_reduced_along_axes_of_all_eighty_names(pascal_folder: Path):
    whole = load_dataset("pascal", data_dir=pascal_folder)
    named = loadmat(pascal_folder / "class_embeddings" / "MS-COCO-inp-googlenews.mat")["inp"].astype(np.float64)
    assert whole.named_vectors is not None
    assert np.array_equal(whole.named_vectors.numpy(), named.astype(np.float32))
    for width in (10, 20, 50, 79):  # of figure 9a's, those that can be had, and the most
        assert with_narrow_class_vectors(whole, width).spec.class_vectors.shape == (20, width)
    with pytest.raises(InputError, match="expected at most 79, the dimensions that the 80 vectors of pascal span"):
        with_narrow_class_vectors(whole, 100)


# mfeat


@pytest.fixture(scope="module")
def digits_folder(benchmark_folder: Folder) -> Path:
    return benchmark_folder("mfeat")


def test_mfeat_keeps_published_rows_in_their_parts(digits_folder: Path):
    raw = loadmat(digits_folder / "mfeat" / "handwritten_6views.mat")
    names = ["pixel", "fourier", "correlation", "zernike", "karhunen", "morphological"]
    trained = {m: raw[f"x{i}_train"] for i, m in enumerate(names, 1)}
    tested = {m: raw[f"x{i}_test"] for i, m in enumerate(names, 1)}
    data = load_dataset("mfeat", data_dir=digits_folder)
    assert data.spec.dims == dict(zip(names, (240, 76, 216, 47, 64, 6), strict=True))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1439, 160, 400]
    assert counts(data.validation) == [16] * 10
    assert counts(data.test) == [40] * 10
    assert numbered(data.test, tested) == list(range(400))
    assert data.test.labels.int().argmax(1).tolist() == (raw["gt_test"].ravel() - 1).tolist()
    validation, train = numbered(data.validation, trained), numbered(data.train, trained)
    for part, rows in ((data.validation, validation), (data.train, train)):
        assert part.labels.int().argmax(1).tolist() == (raw["gt_train"].ravel()[rows].astype(int) - 1).tolist()
    left_out = set(range(1600)) - set(validation) - set(train)
    copies = {1108, 994, 1566, 885, 600}  # of earlier training rows, and so numbered as those
    assert left_out == {1213} | copies
    assert len(train) == len(set(train)) + len(copies)
    assert numbered_in(trained, 1213) == numbered_in(tested, 303)


def numbered_in(published: dict[str, np.ndarray], row: int) -> list[float]:
    return [float(v) for m in sorted(published) for v in published[m][row]]


@pytest.mark.parametrize("seed", range(5))
def test_no_two_parts_of_mfeat_share_a_digit_whatever_the_seed(seed: int, digits_folder: Path):
    data = load_dataset("mfeat", {"split_seed": seed}, digits_folder)
    features, _ = joined(data.train, data.validation, data.test)
    together = torch.cat([features[m] for m in sorted(features)], 1)
    part = torch.tensor([0] * len(data.train) + [1] * 160 + [2] * 400)
    _, group = torch.unique(together, dim=0, return_inverse=True)
    for same in range(int(group.max()) + 1):
        assert len(part[group == same].unique()) == 1
    assert counts(data.validation) == [16] * 10


def test_a_mfeat_image_looks_like_its_class(digits_folder: Path):
    # the middle of a zero is empty and that of an eight is not
    data = load_dataset("mfeat", data_dir=digits_folder)
    mean = {c: data.train.features["pixel"][data.train.labels[:, c]].mean(0).reshape(16, 15) for c in (0, 8)}
    assert mean[0][7:9, 6:9].mean() < 1 < 3 < mean[8][7:9, 6:9].mean()


def test_each_modality_of_mfeat_predicts_its_classes(digits_folder: Path):
    data = load_dataset("mfeat", data_dir=digits_folder)
    found = {modality: ridge_accuracy(data.train, data.test, modality) for modality in data.spec.dims}
    assert found.pop("morphological") > 0.5  # 6 features
    assert min(found.values()) > 0.75


# wikipedia-multi


@pytest.fixture(scope="module")
def multi_folder(benchmark_folder: Folder) -> Path:
    return benchmark_folder("wikipedia-multi")


def test_wikipedia_multi_is_wikipedia_in_six_modalities(multi_folder: Path):
    data = load_dataset("wikipedia-multi", data_dir=multi_folder)
    deep = load_dataset("wikipedia", data_dir=multi_folder)
    shallow = load_dataset("wikipedia", {"features": "sift-lda"}, multi_folder)
    assert data.spec.dims == {"cnn": 128, "sift": 128, "tfidf": 1000, "english": 100, "german": 100, "spanish": 100}
    assert data.classes == deep.classes
    for part in ("train", "validation", "test", "all_test"):
        own = getattr(data, part)
        assert torch.equal(own.labels, getattr(deep, part).labels)
        assert torch.equal(own.features["cnn"], getattr(deep, part).features["image"])
        assert torch.equal(own.features["tfidf"], getattr(deep, part).features["text"])
        assert torch.equal(own.features["sift"], getattr(shallow, part).features["image"])
    for language, prefix in (("english", "en"), ("german", "de"), ("spanish", "es")):
        raw = loadmat(multi_folder / "wikipedia_multilingual" / f"{language.title()}-100.mat")
        for part, suffix in ((data.train, "tr"), (data.all_test, "te")):
            assert np.array_equal(part.features[language].numpy(), raw[f"{prefix}_arr_{suffix}"].astype(np.float32))
            # these files bring the SIFT features too: their rows are Wikipedia's
            assert np.array_equal(part.features["sift"].numpy(), raw[f"I_arr_{suffix}"].astype(np.float32))


def test_wikipedia_multi_reads_only_the_modalities_asked_for(multi_folder: Path, tmp_path: Path):
    (tmp_path / "wikipedia").symlink_to(multi_folder / "wikipedia")
    (tmp_path / "wikipedia_multilingual").mkdir()
    german = "wikipedia_multilingual/German-100.mat"
    (tmp_path / german).symlink_to(multi_folder / german)
    data = load_dataset("wikipedia-multi", {"modalities": ["german", "sift"]}, tmp_path)
    assert data.spec.dims == {"german": 100, "sift": 128}
    assert not any("PCA" in note for note in data.notes)


def test_each_modality_of_wikipedia_multi_predicts_its_classes(multi_folder: Path):
    data = load_dataset("wikipedia-multi", data_dir=multi_folder)
    found = {modality: ridge_accuracy(data.train, data.all_test, modality) for modality in data.spec.dims}
    assert min(found.values()) > 0.19  # the weakest are topics; the largest class's share is .15
    assert found["tfidf"] > 0.75
    assert found["cnn"] > 0.4


# iaprtc12


@pytest.fixture(scope="module")
def iapr_folder(benchmark_folder: Folder) -> Path:
    return benchmark_folder("iaprtc12")


@pytest.fixture(scope="module")
def iapr(iapr_folder: Path) -> Dataset:
    return load_dataset("iaprtc12", data_dir=iapr_folder)


def table(path: Path) -> tuple[list[list[int]], np.ndarray]:
    """Label ids and features of each line."""
    with path.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.reader(opened))
    return [sorted(map(int, row[0].split())) for row in rows], np.array([row[1:] for row in rows], dtype=np.float64)


def test_iaprtc12_rows_keep_their_features_and_labels(iapr: Dataset, iapr_folder: Path):
    labels, image = table(iapr_folder / "iaprtc12" / "TS_vis_vgg128.csv")
    text_labels, text = table(iapr_folder / "iaprtc12" / "TS_lang_biGRU.csv")
    assert labels == text_labels
    assert [len(part) for part in (iapr.train, iapr.validation, iapr.test)] == [1316, 146, 500]
    assert iapr.spec.dims == {"image": 128, "text": 64}
    rows = []
    for part in (iapr.train, iapr.validation, iapr.test):
        own = numbered(part, {"image": image, "text": text})
        assert [row.nonzero().flatten().tolist() for row in part.labels] == [labels[i] for i in own]
        rows += own
    # row 1693 is 1692 again
    assert Counter(rows) == Counter(range(1962)) - Counter([1693]) + Counter([1692])
    assert numbered(iapr.train, {"image": image, "text": text}).count(1692) == 2


def test_iaprtc12_labels_have_their_share_in_each_part(iapr: Dataset):
    total = torch.tensor(counts(iapr.train)) + torch.tensor(counts(iapr.validation)) + torch.tensor(counts(iapr.test))
    assert len(total) == 291
    assert int(total.sum()) / 1962 == pytest.approx(5.63, abs=0.01)
    for part in (iapr.train, iapr.validation, iapr.test):
        share = len(part) / 1962
        expected, variance = total * share, total * share * (1 - share)
        # chance has a mean of 1
        assert float(((torch.tensor(counts(part)) - expected).square() / variance).mean()) < 0.5
    assert min(counts(iapr.train)) >= 1


def test_iaprtc12_test_pairs_are_the_same_for_every_seed(iapr: Dataset, iapr_folder: Path):
    other = load_dataset("iaprtc12", {"split_seed": 1}, iapr_folder)
    assert torch.equal(other.test.features["image"], iapr.test.features["image"])
    assert not torch.equal(other.validation.features["image"], iapr.validation.features["image"])


def whiten(x: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised [n, d] -> orthonormal columns [n, d] that span it, and the map [d, d] that makes them."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return u, v.T / s


def test_iaprtc12_images_are_paired_with_their_own_texts(iapr: Dataset):
    # canonical correlations see no labels: levels seen with 20 components on another draw are .447 and .438
    features, _ = joined(iapr.train, iapr.validation)
    seen = {m: ((x - x.mean(0)) / x.std(0)).double() for m, x in features.items()}
    test = {m: ((iapr.test.features[m] - x.mean(0)) / x.std(0)).double() for m, x in features.items()}
    (image, image_map), (text, text_map) = whiten(seen["image"]), whiten(seen["text"])
    left, _, right = torch.linalg.svd(image.T @ text, full_matrices=False)
    common = {"image": test["image"] @ image_map @ left[:, :20], "text": test["text"] @ text_map @ right.T[:, :20]}
    assert both_ways(common, iapr.test.labels) == pytest.approx((0.447, 0.438), abs=0.02)
    shuffled = common["text"][torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    chance, _ = both_ways({"image": common["image"], "text": shuffled}, iapr.test.labels)
    assert chance == pytest.approx(0.296, abs=0.02)


# files that are not what they should be


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("pascal", ("pascal_sentence/pascal1K_sim.mat", "class_embeddings/MS-COCO-inp-googlenews.mat")),
        ("mfeat", ("mfeat/handwritten_6views.mat",)),
        ("iaprtc12", ("iaprtc12/TS_vis_vgg128.csv", "iaprtc12/TS_lang_biGRU.csv")),
        ("wikipedia-multi", ("wikipedia_multilingual/Spanish-100.mat",)),
    ],
)
def test_an_altered_file_is_refused_by_its_checksum(
    name: str, files: tuple[str, ...], benchmark_folder: Folder, tmp_path: Path
):
    folder = benchmark_folder(name)
    for file in folder.rglob("*.*"):
        copy = tmp_path / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(file)
    for file in files:
        (tmp_path / file).unlink()
        (tmp_path / file).write_bytes((folder / file).read_bytes() + b" ")
        with pytest.raises(InputError, match=re.escape(str(tmp_path / file)) + ": expected sha256"):
            load_dataset(name, data_dir=tmp_path)
        (tmp_path / file).unlink()
        (tmp_path / file).symlink_to(folder / file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x2_test": np.zeros((400, 75))}, r"expected x2_test to be \[400, 76\] numbers, got \[400, 75\] float64"),
        ({"gt_train": np.zeros(1600)}, "expected classes from 1 to 10, got 0 to 10"),
    ],
)
def test_a_mfeat_file_with_other_contents_is_refused(
    change: dict[str, Any], expected: str, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    read = mfeat.read_mat
    monkeypatch.setattr(mfeat, "read_mat", lambda *file: {**read(*file), **change})
    with pytest.raises(InputError, match=r"handwritten_6views\.mat: " + expected):
        load_dataset("mfeat", data_dir=digits_folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cat": np.zeros(3)}, "expected a struct 'cat', got ndarray"),
        ({"cat": {"tr": np.ones(700), "te": np.ones(300)}}, "expected 35 of each class from 1 to 20 in tr, got others"),
    ],
)
def test_a_pascal_file_with_other_contents_is_refused(
    change: dict[str, Any], expected: str, pascal_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    read = pascal.read_mat
    monkeypatch.setattr(pascal, "read_mat", lambda *file: {**read(*file), **change})
    with pytest.raises(InputError, match=r"pascal1K_cat\.mat: " + expected):
        load_dataset("pascal", data_dir=pascal_folder)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda lines: [*lines[:5], lines[5].replace(",", ",x", 1), *lines[6:]], "expected label ids and numbers per "),
        (lambda lines: [*lines[:5], "291" + lines[5], *lines[6:]], "expected label ids and numbers per line, got "),
        (lambda lines: [*lines[:5], lines[5] + ",1", *lines[6:]], "expected label ids and numbers per line, got "),
        (lambda lines: lines[:-1], r"expected \[1962, 64\] finite numbers, got \[1961, 64\]"),
        (lambda lines: ["1" + lines[0][2:], *lines[1:]], "expected the labels of .*TS_vis_vgg128.csv in every row, "),
    ],
)
def test_a_damaged_iaprtc12_file_gets_one_line(
    damage: Callable[[list[str]], list[str]],
    expected: str,
    iapr_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    lines = (iapr_folder / "iaprtc12" / "TS_lang_biGRU.csv").read_text().splitlines()
    (tmp_path / "TS_lang_biGRU.csv").write_text("\n".join(damage(lines)) + "\n")
    original = iaprtc12.locate

    def locate(file: RemoteFile, data_dir: Path | None) -> Path:
        return tmp_path / "TS_lang_biGRU.csv" if file is iaprtc12.TEXTS else original(file, data_dir)

    monkeypatch.setattr(iaprtc12, "locate", locate)
    with pytest.raises(InputError, match=r"TS_lang_biGRU\.csv: " + expected) as caught:
        load_dataset("iaprtc12", data_dir=iapr_folder)
    assert "\n" not in str(caught.value)

"""Wikipedia featured articles: 2866 image-text pairs of 10 classes (Rasiwasia et al., ACM Multimedia 2010).

The standard split of 2173 training and 693 test pairs. Features are published ones: images as CNN features after PCA
with TF-IDF texts, or the literature's shallow control, SIFT bags of words with LDA topics. The usual division of the
693 into 231 validation and 462 test pairs is not recorded with them, so it is drawn here from a seed, by class.

The images and texts themselves are not needed. Where those of the authors' archive lie beside the lists, as
wikipedia/images/<class>/<id>.jpg and wikipedia/texts/<id>.xml, a page of examples shows them, and else their ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from html import unescape
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.data.dataset import Dataset, Scaling, multi_hot
from fedxmr.data.files import RemoteFile, github, locate, matrix, read_mat
from fedxmr.data.looks import Look, Looks, thumbnail
from fedxmr.data.splits import stratified
from fedxmr.errors import InputError, one_line
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

TRAIN, TEST, VALIDATION = 2173, 693, 231


def _jfssl(name: str, sha256: str) -> RemoteFile:
    folder = "Supervised-cross-modal-real-valued/JFSSL/wikipedia_info"
    commit = "710256f3e0808835d30305bc878c8d74d796bfa2"
    return RemoteFile(f"wikipedia/{name}", github("BMC-SDNU/Cross-Modal-Retrieval", commit, f"{folder}/{name}"), sha256)


CATEGORIES = _jfssl("categories.list", "4929f3ee00e9de9ffe11f9ab18fc8919b0f6182cc801309409df2f2d05e2b0f5")
TRAIN_LIST = _jfssl("trainset_txt_img_cat.list", "30c1ba8afbe90da5986de9b12496b6dd2e4680d3876b79ab7aae2e437d5819a3")
TEST_LIST = _jfssl("testset_txt_img_cat.list", "ec3123ee31cc89dd95fbeb23eb73b2ecfd1d8909bba863723471aad99408c1eb")
SHALLOW = _jfssl("raw_features.mat", "ca628f765a69575e168ab29eb97f5ade12fadf47b31de1328c7ff631c7f225ae")
TFIDF = RemoteFile(
    "wikipedia/raw_features_tfidf.mat",
    github("azrealwang/sph", "d6d090f40b93fc9ffbbf4997c932709bf35ce561", "data/raw_features.mat"),
    "047ebad02c14b97d53b191fd42180ebb9b0e255dbb2f70c6fe4092110b4c9853",
)
CNN = RemoteFile(
    "wikipedia/wiki.mat",
    github("kding1225/RoPH", "6d4a062b7f28e73385458a7171499ca2a47f133b", "data/wiki.mat"),
    "e417067eb501fbb41375b4461469089c9f0332ff9cdaf3b5f6570bbf0078d97c",
)

CNN_NOTE = "wikipedia: the PCA of the published CNN image features was fitted on all pairs, test pairs included"


class Options(BaseModel):
    """Which published features, and the seed of the 231/462 division."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: Literal["cnn-tfidf", "sift-lda"] = Field(
        "cnn-tfidf", description="CNN images (128-d) with TF-IDF texts (1000-d), or SIFT (128-d) with LDA topics (10-d)"
    )
    split_seed: int = Field(0, description="seed of the division of the 693 test pairs into validation and test")


def load(options: Options, data_dir: Path | None = None) -> Dataset:
    """Wikipedia as "image" and "text". Raises InputError for files that are missing, altered or damaged."""
    labels = read_labels(data_dir)
    notes: tuple[str, ...] = ()
    if options.features == "cnn-tfidf":
        features, notes = {"image": read_cnn(labels, data_dir), "text": read_tfidf(data_dir)}, (CNN_NOTE,)
        scaling: Mapping[str, Scaling] = {"image": "standardise", "text": "norm"}
    else:
        image, text = read_sift_lda(data_dir)
        features, scaling = {"image": image, "text": text}, {"image": "standardise", "text": "standardise"}
    looks = {"image": show_image, "text": show_text}
    return divide(labels, features, scaling, looks, options.split_seed, data_dir, notes)


class Entry(NamedTuple):
    """A line of a list, and the folder where the list and perhaps the archive are."""

    folder: Path
    text: str
    image: str
    category: str


Show = Callable[[Entry], Look]


def show_image(entry: Entry) -> Look:
    """The image, where it is there, and its id."""
    path = entry.folder / "images" / entry.category / f"{entry.image}.jpg"
    return Look(f"image {entry.image}", thumbnail(path) if path.is_file() else "")


def show_text(entry: Entry) -> Look:
    """The text's id, and its words where they are there."""
    path = entry.folder / "texts" / f"{entry.text}.xml"
    found = re.search("<text>(.*)</text>", path.read_text("utf-8", "replace"), re.DOTALL) if path.is_file() else None
    return Look(f"text {entry.text}{': ' + unescape(found[1]) if found else ''}")


class Labels(NamedTuple):
    """names: of the classes. classes: [2866] int64 from 0, training rows first."""

    names: tuple[str, ...]
    classes: Tensor


def divide(
    labels: Labels,
    features: Mapping[str, Tensor],
    scaling: Mapping[str, Scaling],
    looks: Mapping[str, Show],
    seed: int,
    data_dir: Path | None,
    notes: tuple[str, ...] = (),
    name: str = "wikipedia",
) -> Dataset:
    """The standard split of features [2866, d], its 693 test rows divided by a seed, alike for every choice of them."""
    hot = multi_hot(labels.classes, len(labels.names))
    train = Items.paired({m: x[:TRAIN] for m, x in features.items()}, hot[:TRAIN])
    all_test = Items.paired({m: x[TRAIN:] for m, x in features.items()}, hot[TRAIN:])
    rng = generator(seed, "wikipedia validation")
    validation, test = stratified(labels.classes[TRAIN:], (VALIDATION, TEST - VALIDATION), rng)
    division = (
        f"{name}: the {TEST} published test pairs are divided into {VALIDATION} validation and {TEST - VALIDATION} "
        f"test pairs by seed {seed}, stratified by class; the usual division is not published"
    )
    return Dataset(
        name=name,
        spec=DataSpec({m: x.shape[1] for m, x in features.items()}, len(labels.names)),
        classes=labels.names,
        train=train,
        validation=all_test.select(validation),
        test=all_test.select(test),
        all_test=all_test,
        all_test_overlaps=True,
        scaling=scaling,
        notes=(division, *notes),
        looks=partial(_looks, labels.names, looks, {"test": test, "all_test": torch.arange(TEST)}, data_dir),
    )


def _looks(
    names: tuple[str, ...], show: Mapping[str, Show], numbers: Mapping[str, Tensor], data_dir: Path | None
) -> Looks:
    """A test item's number is its row in the published list."""
    path = locate(TEST_LIST, data_dir)
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text, image, category = line.split("\t")
        entries.append(Entry(path.parent, text, image, names[int(category) - 1]))

    def of(shown: Show) -> Callable[[int], Look]:
        return lambda number: shown(entries[number])

    return Looks({modality: of(shown) for modality, shown in show.items()}, numbers)


def read_labels(data_dir: Path | None) -> Labels:
    """The classes of all pairs, from the published lists."""
    names = tuple(locate(CATEGORIES, data_dir).read_text(encoding="utf-8").split())
    parts = [_classes(TRAIN_LIST, TRAIN, names, data_dir), _classes(TEST_LIST, TEST, names, data_dir)]
    return Labels(names, torch.cat(parts))


def read_cnn(labels: Labels, data_dir: Path | None) -> Tensor:
    """[2866, 128] CNN image features after PCA. Raises InputError where the file's own labels are not `labels`."""
    path = locate(CNN, data_dir)
    struct = read_mat(path, CNN.sha256).get("data")
    if not isinstance(struct, dict):
        raise InputError(f"{path}: expected a struct 'data', got {type(struct).__name__}")
    image = matrix(path, struct, "X1", (128, TRAIN + TEST)).T.contiguous()
    own_labels = matrix(path, struct, "Y", (len(labels.names), TRAIN + TEST)).T
    differing = (own_labels != multi_hot(labels.classes, len(labels.names))).any(1)
    if differing.any():
        row = int(differing.nonzero()[0])
        raise InputError(f"{path}: expected the labels of the .list files, got others in {int(differing.sum())} "
                         f"of {len(differing)} rows, first in row {row}")  # fmt: skip
    return image


def read_tfidf(data_dir: Path | None) -> Tensor:
    """[2866, 1000] TF-IDF texts, rows of L2 norm 1."""
    return both_parts(TFIDF, "T_tfidf_tr", "T_tfidf_te", 1000, data_dir)


def read_sift_lda(data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """[2866, 128] SIFT bags of words of the images, [2866, 10] LDA topics of the texts."""
    return both_parts(SHALLOW, "I_tr", "I_te", 128, data_dir), both_parts(SHALLOW, "T_tr", "T_te", 10, data_dir)


def both_parts(file: RemoteFile, train: str, test: str, width: int, data_dir: Path | None) -> Tensor:
    """[2866, width]: two matrices of a MATLAB file, one below the other."""
    path = locate(file, data_dir)
    contents = read_mat(path, file.sha256)
    return torch.cat([matrix(path, contents, train, (TRAIN, width)), matrix(path, contents, test, (TEST, width))])


def _classes(file: RemoteFile, rows: int, names: tuple[str, ...], data_dir: Path | None) -> Tensor:
    """The class of each pair, [rows] int64 from 0: column 3 of a list, which counts from 1."""
    path = locate(file, data_dir)
    try:
        classes = torch.tensor([int(line.split("\t")[2]) for line in path.read_text(encoding="utf-8").splitlines()])
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: expected text, image and class per line, got {one_line(error)}") from error
    if len(classes) != rows or int(classes.min()) < 1 or int(classes.max()) > len(names):
        raise InputError(
            f"{path}: expected {rows} classes from 1 to {len(names)}, "
            f"got {len(classes)} from {int(classes.min())} to {int(classes.max())}"
        )
    return classes - 1

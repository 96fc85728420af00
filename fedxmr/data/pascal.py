"""Pascal Sentences: 1000 image-text pairs of 20 classes (Rashtchian et al., NAACL Workshop 2010), as similarities.

Not features of images and texts: each pair is described by how similar its image, and its text, is to each of the 700
published training items, the same items in both modalities (files of Guo et al.'s HMGP). So a column is an item. In a
federation it is another client's item, as every report says, and in a zero-shot task the columns of unseen-class items
must go first, as in a run they do: `fedxmr.data.dataset.drop_unseen_columns`. And the files set the same similarities
of a pair to zero in both modalities, so each item's features say something of its other modality, and cosine finds its
own pair untrained.

The published parts are 35 training and 15 test pairs per class. Validation is 5 of the 35, drawn from a seed.
Class vectors are of the classes' MS-COCO names (files of LivXue/GNN4CMR).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.data.dataset import Dataset, multi_hot
from fedxmr.data.files import RemoteFile, github, locate, matrix, read_mat
from fedxmr.data.splits import stratified
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
COCO_ROWS = (4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62)
"""Where the classes are among MS-COCO's 80: aeroplane as airplane, sofa as couch, tvmonitor as tv, ..."""

TRAIN, TEST = 700, 300
TRAIN_PER_CLASS, TEST_PER_CLASS, VALIDATION_PER_CLASS = 35, 15, 5


def _hmgp(name: str, sha256: str) -> RemoteFile:
    url = github("songguoli87/HMGP", "e120e92d578f56c71c7aa8b5655fcb9da2021acd", f"data/{name}")
    return RemoteFile(f"pascal_sentence/{name}", url, sha256)


def _coco(name: str, sha256: str) -> RemoteFile:
    url = github("LivXue/GNN4CMR", "2c13673e979e2f2dbcd2adc0baa34979c1acf5cd", f"embedding/{name}")
    return RemoteFile(f"class_embeddings/{name}", url, sha256)


SIMILARITIES = _hmgp("pascal1K_sim.mat", "311e3fda63c2f633ca81f1d981a74eccbc33cc73eed81320e2e9b22f779dbec9")
CATEGORIES = _hmgp("pascal1K_cat.mat", "98cc68377734f8a90186773a28c54a5ca4491e04a1dc218615d72c4aa7999956")
VECTORS = {
    "word2vec": _coco("MS-COCO-inp-googlenews.mat", "6ae7a84ef441382c86445fec210ef3dcfd5b4bd68f0d015626de92f3318aea84"),
    "glove": _coco("MS-COCO-inp-glove6B.mat", "810b4636aa3054498d00008ec61a5241fc15abf9e7a785d9ef6eb367b0658124"),
}


class Options(BaseModel):
    """Which class vectors, and the seed of the validation part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_vectors: Literal["word2vec", "glove"] = Field(
        "word2vec", description="300-d vectors of the class names: word2vec of Google News, or GloVe 6B"
    )
    split_seed: int = Field(0, description="seed of the 5 validation pairs per class, out of the 35 for training")


def load(options: Options, data_dir: Path | None = None) -> Dataset:
    """Pascal as "image" and "text". Raises InputError for files that are missing, altered or damaged."""
    path = locate(SIMILARITIES, data_dir)
    contents = read_mat(path, SIMILARITIES.sha256)
    trained, tested = (
        {modality: matrix(path, contents, f"{name}_{part}", (rows, TRAIN)) for modality, name in
         (("image", "SX"), ("text", "SY"))} for part, rows in (("tr", TRAIN), ("te", TEST))
    )  # fmt: skip
    classes, test_classes = _classes(data_dir)
    vectors = _vectors(options.class_vectors, data_dir)
    items = Items.paired(trained, multi_hot(classes, len(CLASSES)))
    test = Items.paired(tested, multi_hot(test_classes, len(CLASSES)))
    sizes = (VALIDATION_PER_CLASS * len(CLASSES), (TRAIN_PER_CLASS - VALIDATION_PER_CLASS) * len(CLASSES))
    validation, train = stratified(classes, sizes, generator(options.split_seed, "pascal validation"))
    return Dataset(
        name="pascal",
        spec=DataSpec({"image": TRAIN, "text": TRAIN}, len(CLASSES), vectors[torch.tensor(COCO_ROWS)]),
        classes=CLASSES,
        train=items.select(train),
        validation=items.select(validation),
        test=test,
        all_test=test,
        all_test_overlaps=False,
        scaling={"image": "standardise", "text": "standardise"},
        notes=(
            "pascal: a pair's features are zero in the same places, so items find their own pair without learning",
            f"pascal: features are similarities to the {TRAIN} published training items, validation items included, "
            "not features of an item alone; in a federation most columns are other clients' items",
            f"pascal: {VALIDATION_PER_CLASS} of {TRAIN_PER_CLASS} training pairs per class are for validation, by seed "
            f"{options.split_seed}; the usual 800/100/100 division is not published with these features",
        ),
        column_class={"image": classes, "text": classes},
        named_vectors=vectors,
    )


def _classes(data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """The classes of the training and of the test pairs, [700] and [300] int64 from 0."""
    path = locate(CATEGORIES, data_dir)
    struct = read_mat(path, CATEGORIES.sha256).get("cat")
    if not isinstance(struct, dict):
        raise InputError(f"{path}: expected a struct 'cat', got {type(struct).__name__}")
    found = []
    for part, rows, per_class in (("tr", TRAIN, TRAIN_PER_CLASS), ("te", TEST, TEST_PER_CLASS)):
        classes = matrix(path, struct, part, (rows,)).long() - 1  # they count from 1
        if int(classes.min()) < 0 or classes.bincount().tolist() != [per_class] * len(CLASSES):
            raise InputError(
                f"{path}: expected {per_class} of each class from 1 to {len(CLASSES)} in {part}, got others"
            )
        found.append(classes)
    return found[0], found[1]


def _vectors(name: str, data_dir: Path | None) -> Tensor:
    """[80, 300] the vectors of MS-COCO's names, of which COCO_ROWS are the classes'."""
    path = locate(VECTORS[name], data_dir)
    return matrix(path, read_mat(path, VECTORS[name].sha256), "inp", (80, 300))

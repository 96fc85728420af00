"""Wikipedia featured articles: 2866 image-text pairs of 10 classes (Rasiwasia et al., ACM Multimedia 2010).

The standard split of 2173 training and 693 test pairs. Features are published ones: images as CNN features after PCA
with TF-IDF texts, or the literature's shallow control, SIFT bags of words with LDA topics. The usual division of the
693 into 231 validation and 462 test pairs is not recorded with them, so it is drawn here from a seed, by class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.data.dataset import Dataset, Scaling, multi_hot
from fedxmr.data.files import RemoteFile, github, locate, one_line, read_mat
from fedxmr.data.splits import stratified
from fedxmr.errors import InputError
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


class Options(BaseModel):
    """Which published features, and the seed of the 231/462 division."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: Literal["cnn-tfidf", "sift-lda"] = Field(
        "cnn-tfidf", description="CNN images (128-d) with TF-IDF texts (1000-d), or SIFT (128-d) with LDA topics (10-d)"
    )
    split_seed: int = Field(0, description="seed of the division of the 693 test pairs into validation and test")


class _Features(NamedTuple):
    image: Tensor  # [2866, d_image], training rows first
    text: Tensor  # [2866, d_text]
    scaling: dict[str, Scaling]
    notes: tuple[str, ...]


def load(options: Options, data_dir: Path | None = None) -> Dataset:
    """Wikipedia as "image" and "text". Raises InputError for files that are missing, altered or damaged."""
    names = tuple(locate(CATEGORIES, data_dir).read_text(encoding="utf-8").split())
    classes = torch.cat([_classes(TRAIN_LIST, TRAIN, names, data_dir), _classes(TEST_LIST, TEST, names, data_dir)])
    read = {"cnn-tfidf": _cnn_tfidf, "sift-lda": _sift_lda}[options.features]
    labels = multi_hot(classes, len(names))
    image, text, scaling, notes = read(labels, data_dir)

    train = Items.paired({"image": image[:TRAIN], "text": text[:TRAIN]}, labels[:TRAIN])
    all_test = Items.paired({"image": image[TRAIN:], "text": text[TRAIN:]}, labels[TRAIN:])
    rng = generator(options.split_seed, "wikipedia validation")
    validation, test = stratified(classes[TRAIN:], (VALIDATION, TEST - VALIDATION), rng)
    division = (
        f"wikipedia: the {TEST} published test pairs are divided into {VALIDATION} validation and {TEST - VALIDATION} "
        f"test pairs by seed {options.split_seed}, stratified by class; the usual division is not published"
    )
    return Dataset(
        name="wikipedia",
        spec=DataSpec({"image": image.shape[1], "text": text.shape[1]}, len(names)),
        classes=names,
        train=train,
        validation=all_test.select(validation),
        test=all_test.select(test),
        all_test=all_test,
        all_test_overlaps=True,
        scaling=scaling,
        notes=(division, *notes),
    )


def _cnn_tfidf(labels: Tensor, data_dir: Path | None) -> _Features:
    cnn, tfidf = locate(CNN, data_dir), locate(TFIDF, data_dir)
    struct, texts = read_mat(cnn).get("data"), read_mat(tfidf)
    if not isinstance(struct, dict):
        raise InputError(f"{cnn}: expected a struct 'data', got {type(struct).__name__}")
    image = _matrix(cnn, struct, "X1", (128, TRAIN + TEST)).T.contiguous()
    own_labels = _matrix(cnn, struct, "Y", (labels.shape[1], TRAIN + TEST)).T
    differing = (own_labels != labels).any(1)
    if differing.any():
        row = int(differing.nonzero()[0])
        raise InputError(f"{cnn}: expected the labels of the .list files, got others in {int(differing.sum())} "
                         f"of {len(labels)} rows, first in row {row}")  # fmt: skip
    text = torch.cat([
        _matrix(tfidf, texts, "T_tfidf_tr", (TRAIN, 1000)),
        _matrix(tfidf, texts, "T_tfidf_te", (TEST, 1000)),
    ])  # fmt: skip
    fitted = "wikipedia: the PCA of the published CNN image features was fitted on all pairs, test pairs included"
    return _Features(image, text, {"image": "standardise", "text": "norm"}, (fitted,))


def _sift_lda(labels: Tensor, data_dir: Path | None) -> _Features:  # noqa: ARG001 - this file has no labels
    path = locate(SHALLOW, data_dir)
    raw = read_mat(path)
    image = torch.cat([_matrix(path, raw, "I_tr", (TRAIN, 128)), _matrix(path, raw, "I_te", (TEST, 128))])
    text = torch.cat([_matrix(path, raw, "T_tr", (TRAIN, 10)), _matrix(path, raw, "T_te", (TEST, 10))])
    return _Features(image, text, {"image": "standardise", "text": "standardise"}, ())


def _matrix(path: Path, contents: Any, name: str, shape: tuple[int, int]) -> Tensor:
    """A named matrix of a MATLAB file as float32, in torch's own memory; sparse ones are spread out."""
    value = contents.get(name)
    if hasattr(value, "toarray"):
        value = value.toarray()
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind not in "fiub":
        got = f"{list(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{path}: expected {name} to be {list(shape)} numbers, got {got}")
    matrix = torch.tensor(value, dtype=torch.float32)
    if not matrix.isfinite().all():
        raise InputError(f"{path}: expected finite numbers in {name}, got NaN or infinite ones")
    return matrix


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

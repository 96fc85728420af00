"""IAPR TC-12: 1962 image-text pairs with several of 291 labels each (Grubinger et al., LREC OntoImage 2006).

Images as 128-d VGG features, texts as 64-d states of a bidirectional GRU: files of Collell and Moens, "Do neural
network cross-modal mappings really bridge modalities?", ACL 2018. They have no split: 500 test pairs are drawn once, by
a fixed seed, and of the other 1462 a tenth are validation pairs, both so that every label has its share in each part.
One pair is in the files twice; both are training pairs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.data.dataset import Dataset
from fedxmr.data.files import RemoteFile, github, locate
from fedxmr.data.splits import first_copies, stratified_labels
from fedxmr.errors import InputError, one_line
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items


def _mappings(name: str, sha256: str) -> RemoteFile:
    commit = "21f5b8d17e5058dd90a4ae25a734b3c5e2782c3b"
    url = github("gcollell/neural_cross_modal_maps", commit, f"training_data/iaprtc/{name}")
    return RemoteFile(f"iaprtc12/{name}", url, sha256)


IMAGES = _mappings("TS_vis_vgg128.csv", "24a512787e4180d8690dc79c12af4fbb15449813929873f9cb0befbab43d0faa")
TEXTS = _mappings("TS_lang_biGRU.csv", "7147e951f2462cc82e85a2d7fa3b137278767ec5e50d8634db0d367d6218536a")

PAIRS, TEST, VALIDATION, LABELS = 1962, 500, 146, 291
IMAGE_WIDTH, TEXT_WIDTH = 128, 64
TEST_SEED = 0
"""The test pairs are the same for everyone: a part of the data set, not of an experiment."""


class Options(BaseModel):
    """The seed of the validation part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split_seed: int = Field(0, description="seed of the 146 validation pairs, out of the 1462 not for test")


def load(options: Options, data_dir: Path | None = None) -> Dataset:
    """IAPR TC-12 as "image" and "text". Raises InputError for files that are missing, altered or damaged."""
    labels, image = _table(locate(IMAGES, data_dir), IMAGE_WIDTH)
    text_labels, text = _table(locate(TEXTS, data_dir), TEXT_WIDTH)
    if not text_labels.equal(labels):
        row = int((text_labels != labels).any(1).nonzero()[0])
        raise InputError(f"{TEXTS.path}: expected the labels of {IMAGES.path} in every row, got others in row {row}")
    items = Items.paired({"image": image, "text": text}, labels)
    train, validation, test = (items.select(index) for index in _divide(items, options.split_seed))
    return Dataset(
        name="iaprtc12",
        spec=DataSpec({"image": IMAGE_WIDTH, "text": TEXT_WIDTH}, LABELS),
        classes=tuple(str(label) for label in range(LABELS)),
        train=train,
        validation=validation,
        test=test,
        all_test=test,
        all_test_overlaps=False,
        scaling={"image": "standardise", "text": "standardise"},
        notes=(
            f"iaprtc12: no split is published with these features; {TEST} of {PAIRS} pairs are drawn for test by a "
            f"fixed seed, {VALIDATION} of the others for validation by seed {options.split_seed}, stratified by label",
        ),
    )


def _divide(items: Items, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The training, validation and test pairs, ascending; a pair that is there twice stays in training."""
    first = first_copies(items.features)
    alone = (torch.bincount(first, minlength=len(first))[first] == 1).nonzero().flatten()
    sizes = (TEST, len(alone) - TEST)
    test, rest = stratified_labels(items.labels[alone], sizes, generator(TEST_SEED, "iaprtc12 test"))
    test, rest = alone[test], alone[rest]
    sizes = (VALIDATION, len(rest) - VALIDATION)
    drawn, _ = stratified_labels(items.labels[rest], sizes, generator(seed, "iaprtc12 validation"))
    validation = rest[drawn]
    train = torch.ones(len(items), dtype=torch.bool)
    train[test] = train[validation] = False
    return train.nonzero().flatten(), validation, test


def _table(path: Path, width: int) -> tuple[Tensor, Tensor]:
    """Labels [1962, 291] bool and features [1962, width] float32: a line is label ids, then numbers, by commas."""
    lines = path.read_text(encoding="utf-8").splitlines()
    labels = torch.zeros(len(lines), LABELS, dtype=torch.bool)
    rows = []
    try:
        for row, line in enumerate(lines):
            ids, *numbers = line.split(",")
            labels[row, [int(label) for label in ids.split()]] = True
            rows.append([float(number) for number in numbers])
        features = torch.tensor(rows)
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: expected label ids and numbers per line, got {one_line(error)}") from error
    if features.shape != (PAIRS, width) or not features.isfinite().all():
        raise InputError(f"{path}: expected {[PAIRS, width]} finite numbers, got {list(features.shape)}")
    return labels, features

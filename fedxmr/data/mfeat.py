"""Multiple features: 2000 handwritten digits, each seen through six modalities (van Breukelen et al., Kybernetika 1998;
UCI), in the division into 1600 training and 400 test digits of Han et al. (TMC, ICLR 2021).

The modalities are features of one image. Six pairs of digits in the files have the same features in all of them. No
digit may be in two parts, so the one training digit that is also a test digit is left out, and of the other five pairs,
all of training digits, none is drawn for validation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.data.dataset import Dataset, multi_hot
from fedxmr.data.files import RemoteFile, github, locate, matrix, read_mat
from fedxmr.data.looks import Looks, pixels
from fedxmr.data.splits import first_copies, stratified
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

FILE = RemoteFile(
    "mfeat/handwritten_6views.mat",
    github("hanmenghan/TMC", "08d0ca4c4461b6de1cf73514d8c621598bc2b504", "TMC ICLR/datasets/handwritten_6views.mat"),
    "d731ec02aaa97cf9a5826df68b0dd1e73ba61a82ba3c8f64606ba402926c885b",
)
MODALITIES = {
    "pixel": ("x1", 240),
    "fourier": ("x2", 76),
    "correlation": ("x3", 216),
    "zernike": ("x4", 47),
    "karhunen": ("x5", 64),
    "morphological": ("x6", 6),
}
"""Modality -> its name in the file and its width."""

TRAIN, TEST, VALIDATION, CLASSES = 1600, 400, 160, 10


class Options(BaseModel):
    """The seed of the validation part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split_seed: int = Field(0, description="seed of the 160 validation digits, out of the 1600 for training")


def load(options: Options, data_dir: Path | None = None) -> Dataset:
    """The digits in six modalities. Raises InputError for a file that is missing, altered or damaged."""
    path = locate(FILE, data_dir)
    contents = read_mat(path, FILE.sha256)
    features = {}
    for modality, (name, width) in MODALITIES.items():
        parts = [matrix(path, contents, f"{name}_{part}", (rows, width)) for part, rows in
                 (("train", TRAIN), ("test", TEST))]  # fmt: skip
        features[modality] = torch.cat(parts)
    classes = torch.cat([
        matrix(path, contents, "gt_train", (TRAIN,)), matrix(path, contents, "gt_test", (TEST,))
    ]).long() - 1  # fmt: skip
    if int(classes.min()) < 0 or int(classes.max()) >= CLASSES:
        raise InputError(
            f"{path}: expected classes from 1 to {CLASSES}, got {classes.min() + 1} to {classes.max() + 1}"
        )
    items = Items.paired(features, multi_hot(classes, CLASSES))
    train, validation = _divide(classes, first_copies(features), options.split_seed)
    test = items.select(torch.arange(TRAIN, TRAIN + TEST))
    left_out = TRAIN - len(train) - len(validation)
    return Dataset(
        name="mfeat",
        spec=DataSpec({modality: width for modality, (_, width) in MODALITIES.items()}, CLASSES),
        classes=tuple(str(digit) for digit in range(CLASSES)),
        train=items.select(train),
        validation=items.select(validation),
        test=test,
        all_test=test,
        all_test_overlaps=False,
        scaling=dict.fromkeys(MODALITIES, "standardise"),
        notes=(
            f"mfeat: of the {TRAIN} published training digits {VALIDATION} are validation digits, drawn by seed "
            f"{options.split_seed}, stratified by class; {left_out} that is also a published test digit is left out",
        ),
        looks=lambda: _looks(test),
    )


def _looks(test: Items) -> Looks:
    """The pixels as images, 16 high and 15 wide; the other modalities are not for the eye."""
    return Looks.of_one_part({"pixel": pixels(test.features["pixel"].reshape(-1, 16, 15), 6)}, torch.arange(TEST))


def _divide(classes: Tensor, first: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The training and the validation digits, ascending."""
    usable = ~torch.isin(first[:TRAIN], first[TRAIN:])
    alone = (torch.bincount(first, minlength=len(first))[first] == 1)[:TRAIN]
    candidates = (usable & alone).nonzero().flatten()
    sizes = (VALIDATION, len(candidates) - VALIDATION)
    drawn, _ = stratified(classes[candidates], sizes, generator(seed, "mfeat validation"))
    validation = candidates[drawn]
    usable[validation] = False
    return usable.nonzero().flatten(), validation

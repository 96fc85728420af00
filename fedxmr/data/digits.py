"""Handwritten digits seen through two modalities: the left and the right half of scikit-learn's bundled 8 x 8 images.

1797 real images of 10 classes (Alpaydin and Kaynak, UCI 1998); nothing is downloaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from fedxmr.data.dataset import Dataset, multi_hot
from fedxmr.data.looks import Looks, pixels
from fedxmr.data.splits import stratified
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items


class Options(BaseModel):
    """The seed of the split; everything else is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split_seed: int = Field(0, description="seed of the split into 1078 train, 270 validation and 449 test images")


def load(options: Options, data_dir: Path | None = None) -> Dataset:  # noqa: ARG001 - all loaders are called alike
    """The digits as "left" and "right", 32 pixels of 0 to 16 each."""
    table = torch.tensor(np.loadtxt(_bundled(), delimiter=","))  # [1797, 65]: 8 x 8 pixels, then the digit
    images, classes = table[:, :64].float().reshape(-1, 8, 8), table[:, 64].long()
    halves = {"left": images[:, :, :4].flatten(1), "right": images[:, :, 4:].flatten(1)}
    items = Items.paired(halves, multi_hot(classes, 10))
    train, validation, test = stratified(classes, (1078, 270, 449), generator(options.split_seed, "digits split"))
    tested = items.select(test)
    return Dataset(
        name="digits",
        spec=DataSpec({"left": 32, "right": 32}, 10),
        classes=tuple(str(digit) for digit in range(10)),
        train=items.select(train),
        validation=items.select(validation),
        test=tested,
        all_test=tested,
        all_test_overlaps=False,
        scaling={"left": "standardise", "right": "standardise"},
        notes=(
            "digits: the modalities are the left and right halves of scikit-learn's 8 x 8 images, divided into "
            f"1078/270/449 train/validation/test images by seed {options.split_seed}, stratified by class",
        ),
        looks=lambda: _looks(tested),
    )


def _looks(tested: Items) -> Looks:
    """The halves as images."""
    halves = {modality: pixels(x.reshape(-1, 8, 4), 16) for modality, x in tested.features.items()}
    return Looks.of_one_part(halves, torch.arange(len(tested)))


def _bundled() -> Path:
    """The file behind sklearn.datasets.load_digits, found without importing scikit-learn, which takes a second."""
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return path
    raise InputError("digits: expected scikit-learn with its bundled digits.csv.gz, got an installation without it")

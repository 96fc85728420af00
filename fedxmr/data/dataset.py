"""What every loader returns: raw features in three disjoint parts, and how they are meant to be scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import one_hot

from fedxmr.types import DataSpec, Items

Scaling = Literal["standardise", "norm", "none"]
"""How a run scales a modality: zero mean and unit variance per column, rows scaled to L2 norm 10, or as they are."""

MODALITY_NAME = r"^[A-Za-z0-9_-]+$"
"""Modalities become parts of dotted names, file names and directions such as "image->text"."""


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test items with raw float32 features; no item is in two of these parts.

    classes: their names, "0", "1" ... where unknown.
    all_test: the published test part in its published row order, where the validation part was cut from it (then
        `all_test_overlaps`); else the test part itself.
    scaling: modality -> the scaling recommended for it.
    notes: what every report on this data set should say.
    """

    name: str
    spec: DataSpec
    classes: tuple[str, ...]
    train: Items
    validation: Items
    test: Items
    all_test: Items
    all_test_overlaps: bool
    scaling: Mapping[str, Scaling]
    notes: tuple[str, ...] = ()


def multi_hot(classes: Tensor, num_classes: int) -> Tensor:
    """Class numbers [n] int64 -> labels [n, C] bool, one per item."""
    return one_hot(classes, num_classes).bool()

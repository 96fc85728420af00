"""What every loader returns: raw features in three disjoint parts, and how they are meant to be scaled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedxmr import state
from fedxmr.data.looks import Looks
from fedxmr.types import DataSpec, Items, State

Scaling = Literal["standardise", "isotropic", "norm", "none"]
"""How a run scales a modality; see fedxmr/scaling.py."""

MODALITY_NAME = r"^[A-Za-z0-9_-]+$"
"""Modalities become parts of dotted names, file names and directions such as "image->text"."""


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test items with raw float32 features; no item is in two of these parts.

    classes: their names, "0", "1" ... where unknown.
    all_test: the published test part in its published row order, where the validation part was cut from it (then
        `all_test_overlaps`); else the test part itself.
    scaling: modality -> the scaling recommended for it. A learner may want another instead.
    notes: what every report on this data set should say.
    looks: gives what can be shown of the test items, read only when it is asked for. Raises InputError for bad files.
    column_class: modality -> [d] int64, where features are similarities to other items: the class of each column's.
    named_vectors: [v, k], where class vectors come from a file of more names: the vectors of all names in it.
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
    looks: Callable[[], Looks] = Looks
    column_class: Mapping[str, Tensor] = field(default_factory=dict)
    named_vectors: Tensor | None = None

    @property
    def sha256(self) -> str:
        """A digest of all items, by which a resumed run sees that its data are still the same."""
        tensors: State = {}
        for part in ("train", "validation", "test", "all_test"):
            items: Items = getattr(self, part)
            tensors |= state.prefixed(f"{part}/features", items.features) | state.prefixed(f"{part}/rows", items.rows)
            tensors[f"{part}/labels"] = items.labels
        return state.sha256(tensors)


def multi_hot(classes: Tensor, num_classes: int) -> Tensor:
    """Class numbers [n] int64 -> labels [n, C] bool, one per item."""
    return one_hot(classes, num_classes).bool()


def lacking(items: Items, part: str, modalities: Collection[str]) -> str | None:
    """What validation or test items lack for retrieval to be measured on them, in words; None where it can be.

    Every modality is needed, and in every direction a query that has something relevant. part: what the items are.
    """
    for query, gallery in permutations(modalities, 2):
        for modality in (query, gallery):
            if modality not in items.modalities:
                return f"{part} items with {modality}"
        there = items.labels[items.rows[gallery]].any(0)
        if not bool((items.labels[items.rows[query]] & there).any()):
            return f"a {part} {gallery} that shares a class with some {query}"
    return None


def drop_unseen_columns(data: Dataset, seen: Tensor) -> Dataset:
    """The same items without the columns that compare with items of unseen classes; for a zero-shot task, to do first.

    Such a column singles out the items of its class, in every modality alike, so that unseen classes would be retrieved
    without anything learned. A data set whose features are not similarities stays as it is.

    seen: [C] bool. Raises ValueError for another shape, and where a modality would be left without columns.
    """
    if seen.shape != (data.spec.num_classes,) or seen.dtype is not torch.bool:
        raise ValueError(f"seen: expected [{data.spec.num_classes}] bool, got {list(seen.shape)} {seen.dtype}")
    kept = {modality: seen[classes] for modality, classes in data.column_class.items()}
    for modality, columns in kept.items():
        if not columns.any():
            raise ValueError(f"seen: expected a class that {modality} columns compare with, got none")

    def narrowed(items: Items) -> Items:
        features = {m: x[:, kept[m]] if m in kept else x for m, x in items.features.items()}
        return Items(features, items.rows, items.labels)

    dims = {m: int(kept[m].sum()) if m in kept else dim for m, dim in data.spec.dims.items()}
    return replace(
        data,
        spec=replace(data.spec, dims=dims),
        train=narrowed(data.train),
        validation=narrowed(data.validation),
        test=narrowed(data.test),
        all_test=narrowed(data.all_test),
        column_class={modality: data.column_class[modality][columns] for modality, columns in kept.items()},
    )

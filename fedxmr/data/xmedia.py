"""XMedia: images, texts, videos, audio clips and 3D models of 20 classes (Zhai, Peng and Xiao, TCSVT 2014), in the
features of its authors' file XMediaFeatures.mat, which the user brings.

As SDML's code reads it (penghu-cs/SDML, data_loader.py): <x>_tr and <x>_te are [n, d] features, tr<Y>Cat and te<Y>Cat
class numbers from 1, and of each modality's test rows the first half is for test and the rest for validation. MCCN's
Table 1 has these sizes. An image and the text of its row are one item with one label; a video, an audio clip or a 3D
model is an item of its own, which has no other modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.data.authors import labelled, not_found, places, read
from fedxmr.data.dataset import Dataset
from fedxmr.errors import InputError
from fedxmr.types import DataSpec, Items

FILE, FOLDERS, CLASSES = "XMediaFeatures.mat", ("xmedia", "XMedia", "XMedia&Code"), 20
SOURCE = "PKU's institute of computer science and technology gives it: https://www.icst.pku.edu.cn/mipl/lwsjjxz/dataset"


class Sizes(NamedTuple):
    """How many rows a modality has for training and outside it, and how wide they are."""

    train: int
    held: int
    width: int


class _Modality(NamedTuple):
    features: str
    labels: str
    sizes: Sizes


MODALITIES = {
    "image": _Modality("I_{}_CNN", "{}ImgCat", Sizes(4000, 1000, 4096)),
    "text": _Modality("T_{}_BOW", "{}TxtCat", Sizes(4000, 1000, 3000)),
    "video": _Modality("V_{}_CNN", "{}VidCat", Sizes(969, 174, 4096)),
    "audio": _Modality("A_{}", "{}AudCat", Sizes(800, 200, 29)),
    "3d": _Modality("d3_{}", "{}3dCat", Sizes(400, 100, 4700)),
}
"""Modality -> its variables, with tr or te in the braces, and MCCN's sizes of it."""


class Options(BaseModel):
    """Whether the file may be of other sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    any_size: bool = Field(False, description="take a file of other sizes than the papers' too, such as a subset")


class Part(NamedTuple):
    """Modality -> its features [n_m, d_m] and its labels [n_m, C]."""

    features: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]


def load(options: Options, data_dir: Path | None = None) -> Dataset:
    """XMedia in five modalities. Raises InputError for a file that is missing, malformed or of other sizes."""
    looked_in = places(FOLDERS, data_dir)
    path = next((place / FILE for place in looked_in if (place / FILE).is_file()), None)
    if path is None:
        raise not_found("xmedia", looked_in, FILE, SOURCE)
    train, held = _read(path)
    notes = [
        "an image and its text are one item, every video, audio clip and 3D model one that has no other modality",
        "of each modality's published test rows the first half is for test, the rest for validation",
    ]
    sizes = {m: Sizes(len(x), len(held.features[m]), x.shape[1]) for m, x in train.features.items()}
    if other := [m for m, modality in MODALITIES.items() if sizes[m] != modality.sizes]:
        expected, got = _said({m: MODALITIES[m].sizes for m in other}), _said({m: sizes[m] for m in other})
        if not options.any_size:
            raise InputError(f"{path}: expected {expected}, got {got}; dataset.any_size=true takes it nevertheless")
        notes.append(f"not the papers' sizes: {got}")
    halves = {m: len(x) // 2 for m, x in held.features.items()}
    return Dataset(
        name="xmedia",
        spec=DataSpec({m: x.shape[1] for m, x in train.features.items()}, CLASSES),
        classes=tuple(str(c) for c in range(CLASSES)),
        train=_items(train),
        validation=_items(_rows(held, {m: slice(half, None) for m, half in halves.items()})),
        test=_items(_rows(held, {m: slice(half) for m, half in halves.items()})),
        all_test=_items(held),
        all_test_overlaps=True,
        scaling=dict.fromkeys(MODALITIES, "standardise"),
        notes=tuple(f"xmedia: {note}" for note in notes),
    )


def _said(sizes: Mapping[str, Sizes]) -> str:
    return ", ".join(f"{s.train} + {s.held} rows of width {s.width} of {m}" for m, s in sizes.items())


def _read(path: Path) -> tuple[Part, Part]:
    """The training rows and the held-out ones of every modality. Raises InputError where they do not fit together."""
    found = read(path, [name.format(part) for m in MODALITIES.values() for name in m[:2] for part in ("tr", "te")])
    names = [modality.labels.format(part) for modality in MODALITIES.values() for part in ("tr", "te")]
    hot = labelled({f"{path}: {name}": found[name] for name in names}, CLASSES, first=1)
    labels = dict(zip(names, hot, strict=True))
    parts = []
    for part, least in (("tr", 1), ("te", 2)):
        own = Part(
            {m: found[modality.features.format(part)] for m, modality in MODALITIES.items()},
            {m: labels[modality.labels.format(part)] for m, modality in MODALITIES.items()},
        )
        for m, x in own.features.items():
            name = MODALITIES[m].features.format(part)
            if len(x) != len(own.labels[m]) or len(x) < least:
                raise InputError(
                    f"{path}: expected as many rows in {name} as labels, {least} or more, "
                    f"got {len(x)} and {len(own.labels[m])}"
                )
            width = found[MODALITIES[m].features.format("tr")].shape[1]
            if x.shape[1] != width:
                raise InputError(f"{path}: expected {name} to be as wide as for training, {width}, got {x.shape[1]}")
        if not own.labels["image"].equal(own.labels["text"]):
            raise InputError(f"{path}: expected the same labels of images and texts in {part}, row by row, got others")
        parts.append(own)
    return parts[0], parts[1]


def _rows(part: Part, chosen: Mapping[str, slice]) -> Part:
    return Part({m: x[chosen[m]] for m, x in part.features.items()}, {m: x[chosen[m]] for m, x in part.labels.items()})


def _items(part: Part) -> Items:
    """The items of a part: first the pairs of an image and a text, then those of one modality."""
    rows: dict[str, Tensor] = {}
    labels, items = [], 0
    for m, own in part.labels.items():
        if m == "text":  # the same items as the images
            rows[m] = rows["image"]
            continue
        rows[m] = torch.arange(items, items + len(own))
        labels.append(own)
        items += len(own)
    return Items(part.features, rows, torch.cat(labels))

"""A user's own data: a folder of NumPy arrays.

    features/<modality>.npy   [n_m, d_m] numbers, one file per modality, at least two
    rows/<modality>.npy       [n_m] integers, strictly increasing: the item each feature row belongs to, counted from 0;
                              only for a modality that some of the n items lack
    labels.npy                [n] integers, the class of each item from 0; or [n, C] of 0 and 1, for several per item
    split.npz                 "train", "validation", "test": the item numbers of each part; no item in two parts
    classes.txt               optional: the name of each class, one per line
    class_vectors.npy         optional: [C, k] numbers, for learners that use the meaning of classes
    scaling.json              optional: how features are meant to be scaled, such as {"image": "standardise", "text":
                              "norm"}; or "isotropic" or "none"; "standardise" where it says nothing of a modality
    shown/<modality>.txt      optional: what a page of examples (--examples) shows of the items, a line per feature row:
                              the path of an image file in this folder, if it ends in .png, .jpg, .jpeg, .gif or .webp,
                              or else text, which may be empty

One is made like this, and used with `--dataset my-data/`:

    import numpy as np
    from pathlib import Path

    rng = np.random.default_rng(0)
    classes = rng.integers(5, size=300)
    Path("my-data/features").mkdir(parents=True)
    np.save("my-data/features/image.npy", rng.normal(size=(300, 64)) + classes[:, None])
    np.save("my-data/features/text.npy", rng.normal(size=(300, 20)) - classes[:, None])
    np.save("my-data/labels.npy", classes)
    np.savez("my-data/split.npz", train=np.arange(200), validation=np.arange(200, 240), test=np.arange(240, 300))

Features are given raw: the run scales them. Files of float32 are mapped, not read, so leave them alone while a run goes
on; where each part's items are consecutive too, nothing but what is worked on is ever in memory.

Validation and test items must be of all modalities. Training items may lack one altogether, for a client of a
deployment may have no texts to learn from; `simulate` refuses such a folder, as nobody else is there who has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Set
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.arrays import Array, read_npy, read_npz
from fedxmr.data.dataset import MODALITY_NAME, Dataset, Scaling, multi_hot
from fedxmr.data.looks import FORMATS, Look, Looks, check_image, thumbnail
from fedxmr.errors import InputError, in_one_line, one_line, unknown
from fedxmr.types import DataSpec, Items

PARTS = ("train", "validation", "test")
LARGEST = 1e18
"""Of a feature, so that float32 can hold its square."""
CHECKED = 4096
"""Rows looked at together: no copy of all is made to see that all are numbers."""


class Options(BaseModel):
    """Where the folder is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="the folder")


def load(options: Options, data_dir: Path | None = None) -> Dataset:  # noqa: ARG001 - all loaders are called alike
    """Read and check the folder. Raises InputError naming the file, what was expected of it and what came."""
    folder = options.path.expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, got {'a file' if folder.exists() else 'nothing there'}")
    names = _class_names(folder / "classes.txt")
    labels = _labels(folder / "labels.npy", names)
    items = _items(folder, labels)
    split = _split(folder / "split.npz", len(items))
    parts = {part: _taken(items, index) for part, index in split.items()}
    for part in ("validation", "test"):  # for training a client may have no such items
        for modality in sorted(set(items.features) - set(parts[part].modalities)):
            raise InputError(f"{folder / 'split.npz'}: expected {part} items that have {modality}, got none")
    dims = {modality: x.shape[1] for modality, x in items.features.items()}
    return Dataset(
        name=folder.resolve().name,
        spec=DataSpec(dims, labels.shape[1], _class_vectors(folder / "class_vectors.npy", labels.shape[1])),
        classes=names or tuple(str(c) for c in range(labels.shape[1])),
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        all_test=parts["test"],
        all_test_overlaps=False,
        scaling=_scaling(folder / "scaling.json", dims),
        looks=partial(_looks, folder, items.rows, split["test"]),
    )


def _looks(folder: Path, rows: Mapping[str, Tensor], test: Tensor) -> Looks:
    """What shown/ has of the test items, whose numbers are those of the folder. Their images are checked."""
    of = {}
    if (folder / "shown").exists():
        for modality, path in _modality_files(folder / "shown", ".txt").items():
            if modality not in rows:
                raise unknown("modality in shown/", modality, rows)
            of[modality] = _shown(folder, path, rows[modality], set(test.tolist()))
    return Looks.of_one_part(of, test)


def _shown(folder: Path, path: Path, rows: Tensor, wanted: Set[int]) -> Callable[[int], Look]:
    """The `wanted` items as the lines of a file say, of which there is one for each of `rows`."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected UTF-8 text, got {one_line(error)}") from error
    if len(lines) != len(rows):
        raise InputError(f"{path}: expected {len(rows)} lines, one per row of the features, got {len(lines)}")
    line_of = {item: at for at, item in enumerate(rows.tolist()) if item in wanted}
    images = {
        item: _image(folder, lines[at], f"{path}: line {at + 1}")
        for item, at in line_of.items()
        if Path(lines[at]).suffix.lower() in FORMATS
    }

    def show(item: int) -> Look:
        return Look(image=thumbnail(images[item])) if item in images else Look(lines[line_of[item]])

    return show


def _image(folder: Path, line: str, where: str) -> Path:
    """The image file that a line names."""
    try:
        path = (folder / line).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(f"{where}: expected an image file in {folder}, got {line!r} ({one_line(error)})") from error
    if not inside or not there:
        got = "which is not there" if inside else "which is outside"
        raise InputError(f"{where}: expected an image file in {folder}, got {line!r}, {got}")
    check_image(path)
    return path


def _items(folder: Path, labels: Tensor) -> Items:
    if not (folder / "features").is_dir():
        raise InputError(f"{folder / 'features'}: expected a folder of <modality>.npy files, got nothing there")
    files = _modality_files(folder / "features")
    if len(files) < 2:
        raise InputError(f"{folder / 'features'}: expected two modalities or more, got {sorted(files) or 'none'}")
    row_files = _modality_files(folder / "rows") if (folder / "rows").exists() else {}
    for modality in row_files:
        if modality not in files:
            raise unknown("modality in rows/", modality, files)
    features, rows = {}, {}
    for modality, path in files.items():
        features[modality] = _features(path)
        rows[modality] = _rows(row_files.get(modality), path, len(features[modality]), len(labels))
    return Items(features, rows, labels)


def _modality_files(folder: Path, suffix: str = ".npy") -> Mapping[str, Path]:
    """Modality -> its file, sorted by modality. Hidden files are passed over; anything else must be a modality."""
    files = {}
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.suffix != suffix or not re.fullmatch(MODALITY_NAME, path.stem):
            raise InputError(f"{path}: expected <modality>{suffix}, the modality in letters, digits, - and _")
        files[path.stem] = path
    return files


def _features(path: Path) -> Tensor:
    """[n_m, d_m] float32: mapped, where that is what the file holds, so that processes share it, else a copy."""
    stored = _array(path)
    if stored.ndim != 2 or stored.dtype.kind not in "fiu" or 0 in stored.shape:
        raise InputError(f"{path}: expected [n, d] numbers, got {_describe(stored)}")
    if stored.dtype == np.float32 and stored.flags.c_contiguous and stored.dtype.isnative:
        features = torch.from_numpy(stored)
    else:
        features = torch.empty(stored.shape)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            features.numpy()[...] = stored
    for start in range(0, len(features), CHECKED):
        usable = (features[start : start + CHECKED].abs() < LARGEST).all(dim=1)  # NaN is not
        if not usable.all():
            row = start + int((~usable).nonzero()[0])
            got = f"NaN or infinite ones, or such above {LARGEST:g}, first in row {row}"
            raise InputError(f"{path}: expected finite float32 numbers, got {got}")
    return features


def _taken(items: Items, index: Tensor) -> Items:
    """The items of a part: views of all, where they are consecutive."""
    start, count = (int(index[0]), len(index)) if len(index) else (0, 0)
    consecutive = torch.equal(index, torch.arange(start, start + count))
    return items.span(start, start + count) if consecutive else items.select(index)


def _rows(path: Path | None, features: Path, count: int, items: int) -> Tensor:
    """The items of `count` feature rows: as the file says, or every item where there is none."""
    if path is None:
        if count != items:
            raise InputError(
                f"{features}: expected {items} rows, one per label, got {count}; a modality that some items lack "
                f"needs rows/{features.name}"
            )
        return torch.arange(items)
    stored = _array(path)
    if stored.ndim != 1 or stored.dtype.kind not in "iu" or len(stored) != count:
        raise InputError(f"{path}: expected [{count}] integers, one per feature row, got {_describe(stored)}")
    rows = _indices(path, stored, items)
    falling = (rows[1:] <= rows[:-1]).nonzero().flatten()
    if len(falling):
        at = int(falling[0])
        raise InputError(
            f"{path}: expected strictly increasing items, got {int(rows[at])} then {int(rows[at + 1])} at row {at + 1}"
        )
    return rows


def _labels(path: Path, names: tuple[str, ...]) -> Tensor:
    """[n, C] bool, C being the number of class names where they are given."""
    stored = _array(path)
    if stored.ndim == 1 and stored.dtype.kind in "iu" and len(stored):
        return _single_labels(path, stored, names)
    if stored.ndim != 2 or stored.dtype.kind not in "biuf" or 0 in stored.shape:
        raise InputError(f"{path}: expected [n] integer classes or [n, C] of 0 and 1, got {_describe(stored)}")
    wrong = ~np.isin(stored, (0, 1))
    if wrong.any():
        item, column = np.argwhere(wrong)[0]
        raise InputError(f"{path}: expected 0 and 1 only, got {stored[item, column]} for item {item}")
    if names and len(names) != stored.shape[1]:
        raise InputError(f"{path.parent / 'classes.txt'}: expected {stored.shape[1]} names, got {len(names)}")
    return torch.tensor(stored.astype(np.bool_))


def _single_labels(path: Path, stored: Array, names: tuple[str, ...]) -> Tensor:
    lowest, highest = int(stored.min()), int(stored.max())
    if lowest < 0:
        raise InputError(f"{path}: expected classes from 0, got {lowest} for item {int(stored.argmin())}")
    if names and highest >= len(names):
        raise InputError(f"{path.parent / 'classes.txt'}: expected {highest + 1} names or more, got {len(names)}")
    if not names and highest >= len(stored):
        raise InputError(f"{path}: expected classes numbered from 0 without gaps, got {highest} of {len(stored)} items")
    return multi_hot(torch.tensor(stored.astype(np.int64)), len(names) or highest + 1)


def _class_names(path: Path) -> tuple[str, ...]:
    """The names in classes.txt; none where there is no such file."""
    if not path.exists():
        return ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected UTF-8 text, got {one_line(error)}") from error
    if not all(names) or len(set(names)) != len(names):
        odd = next(name for i, name in enumerate(names) if not name or name in names[:i])
        raise InputError(f"{path}: expected one name per line, all different, got {odd!r}")
    if not names:
        raise InputError(f"{path}: expected one name per line, got an empty file")
    return names


def _class_vectors(path: Path, num_classes: int) -> Tensor | None:
    if not path.exists():
        return None
    vectors = _features(path)
    if len(vectors) != num_classes:
        raise InputError(f"{path}: expected [{num_classes}, k], one row per class, got {list(vectors.shape)}")
    different = {tuple(vector) for vector in vectors.tolist()}
    if len(different) < num_classes or not all(map(any, different)):
        raise InputError(f"{path}: expected vectors that tell classes apart, got zeros, or the same vector twice")
    return vectors


def _scaling(path: Path, modalities: Collection[str]) -> Mapping[str, Scaling]:
    """How each modality is meant to be scaled: as the file says, and standardised where it says nothing."""
    if not path.exists():
        return dict.fromkeys(modalities, "standardise")
    expected = 'expected a JSON object, such as {"image": "norm"}'
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {expected}, got {one_line(error)}") from error
    if not isinstance(stored, dict):
        raise InputError(f"{path}: {expected}, got {in_one_line(repr(stored))}")
    known = get_args(Scaling)
    for modality, how in stored.items():
        if modality not in modalities:
            raise unknown(f"modality in {path}", in_one_line(modality), modalities)
        if how not in known:
            raise InputError(f"{path}: expected {modality} to be {', '.join(known)}, got {in_one_line(repr(how))}")
    return {modality: stored.get(modality, "standardise") for modality in modalities}


def _split(path: Path, items: int) -> Mapping[str, Tensor]:
    """Part -> its items [n_part] int64, in the order of the file."""
    if not path.is_file():
        raise InputError(f"{path}: expected an archive of {', '.join(PARTS)}, got nothing there")
    try:
        stored = read_npz(path, items * np.dtype(np.int64).itemsize)
    except Exception as error:  # whatever reading damaged bytes trips on: BadZipFile, zlib.error, TokenError ...
        raise InputError(f"{path}: expected an .npz archive without Python objects, got {one_line(error)}") from error
    if set(stored) != set(PARTS):
        raise InputError(f"{path}: expected the arrays {', '.join(PARTS)}, got {', '.join(sorted(stored)) or 'none'}")
    parts = {}
    for part in PARTS:
        array = stored[part]
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise InputError(f"{path}: expected {part} to be item numbers [n], got {_describe(array)}")
        parts[part] = _indices(path, array, items)
        values, counts = np.unique(array, return_counts=True)
        if len(values) < len(array):
            raise InputError(f"{path}: expected no item twice in {part}, got item {values[counts > 1][0]} again")
    for one, other in combinations(PARTS, 2):
        shared = parts[one][torch.isin(parts[one], parts[other])]
        if len(shared):
            raise InputError(
                f"{path}: expected disjoint parts, got {len(shared)} items in both {one} and {other}, "
                f"such as item {int(shared[0])}"
            )
    return parts


def _indices(path: Path, stored: Array, items: int) -> Tensor:
    """Item numbers as int64, all from 0 to items - 1."""
    for value in (int(stored.min()), int(stored.max())):
        if not 0 <= value < items:
            raise InputError(f"{path}: expected items from 0 to {items - 1}, got {value}")
    return torch.tensor(stored.astype(np.int64))


def _array(path: Path) -> Array:
    """The array of a .npy file, mapped rather than read. Object arrays are refused, never unpickled."""
    if not path.is_file():
        raise InputError(f"{path}: expected a .npy array, got nothing there")
    try:
        return read_npy(path)
    except Exception as error:  # whatever reading damaged bytes trips on: EOFError, TokenError, OverflowError ...
        raise InputError(f"{path}: expected a .npy array without Python objects, got {one_line(error)}") from error


def _describe(array: Array) -> str:
    return f"{list(array.shape)} {array.dtype}"

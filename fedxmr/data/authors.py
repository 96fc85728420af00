"""Feature files as papers' authors lay them out, which a user brings: where they are, and what is read out of them.

Nobody publishes checksums of them, so `fedxmr.mat` parses them in a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedxmr.arrays import Array
from fedxmr.data.dataset import multi_hot
from fedxmr.data.files import given_folders
from fedxmr.data.folder import LARGEST
from fedxmr.errors import InputError
from fedxmr.mat import parsed


def places(names: Sequence[str], data_dir: Path | None) -> list[Path]:
    """Where a user's files of a data set may be: the folders given, and in each those named after the data set."""
    return [place for given in given_folders(data_dir) for place in (given, *(given / name for name in names))]


def not_found(name: str, looked_in: Sequence[Path], files: str, source: str) -> InputError:
    """The error for a data set whose files are in none of the places."""
    where = ", ".join(map(str, looked_in)) or "no folder, for none was named by --data-dir or FEDXMR_DATA"
    return InputError(f"{name}: expected {files}; looked in {where}; {source}")


def read(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The named variables of a MATLAB file, [n, d] float32 in torch's own memory, finite. Raises InputError."""
    with parsed(path, names) as found:
        return {name: _copied(path, name, array) for name, array in found.items()}


def _copied(path: Path, name: str, array: Array) -> Tensor:
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{path}: expected {name} to be [n, d] numbers, got {list(array.shape)}")
    copy = torch.empty(array.shape)
    copy.numpy()[...] = array
    lowest, highest = copy.aminmax()  # NaN where there is one
    if not (lowest > -LARGEST and highest < LARGEST):
        raise InputError(
            f"{path}: expected finite numbers below {LARGEST:g} in {name}, got NaN, infinite or larger ones"
        )
    return copy


def labelled(found: Mapping[str, Tensor], classes: int, first: int) -> list[Tensor]:
    """What the files of one data set hold as labels -> [n, C] bool each.

    found: where it is from -> [n, C] of 0 and 1, or class numbers as a column or a row. Numbers count from 1 where C is
        among them, from 0 where 0 is, and else from `first`, as the authors' code reads them.
    Raises InputError for other shapes and values.
    """
    numbers = {where: x.flatten() for where, x in found.items() if 1 in x.shape}
    values = torch.cat(list(numbers.values())) if numbers else torch.empty(0)
    first = 1 if (values == classes).any() else 0 if (values == 0).any() else first
    labels = []
    for where, x in found.items():
        if where in numbers:
            labels.append(multi_hot(_counted(where, numbers[where], classes, first), classes))
            continue
        if x.shape[1] != classes:
            raise InputError(f"{where}: expected labels [n, {classes}], or class numbers [n, 1], got {list(x.shape)}")
        if not ((x == 0) | (x == 1)).all():
            raise InputError(f"{where}: expected 0 and 1 only in {classes} columns, got other numbers")
        labels.append(x.bool())
    return labels


def _counted(where: str, numbers: Tensor, classes: int, first: int) -> Tensor:
    """Class numbers that count from `first` -> [n] int64 from 0."""
    wrong = (numbers != numbers.round()) | (numbers < first) | (numbers >= first + classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InputError(
            f"{where}: expected class numbers from {first} to {first + classes - 1}, got {numbers[row]:g} in row {row}"
        )
    return numbers.long() - first

"""Data sets by name: one module each, and a user's own folder.

To add one, write a module with `Options` and `load`, and name it in DATASETS. Importing this package is light: what
only one data set needs is imported when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedxmr.data import digits, folder, iaprtc12, mfeat, pascal, synthetic, wikipedia, wikipedia_multi
from fedxmr.data.dataset import Dataset, Scaling
from fedxmr.errors import InputError, unknown

__all__ = ["DATASETS", "FOLDER", "Dataset", "Scaling", "Source", "dataset_options", "load_dataset", "source"]


@dataclass(frozen=True)
class Source:
    """A data set that can be loaded: the options it takes, `load(options, data_dir)`, and what it is in one line."""

    options: type[BaseModel]
    load: Callable[[Any, Path | None], Dataset]
    description: str


DATASETS: Mapping[str, Source] = {
    "digits": Source(digits.Options, digits.load, "halves of handwritten digits, bundled with scikit-learn"),
    "iaprtc12": Source(iaprtc12.Options, iaprtc12.load, "1962 image-text pairs with some of 291 labels each"),
    "mfeat": Source(mfeat.Options, mfeat.load, "2000 handwritten digits in six modalities"),
    "pascal": Source(
        pascal.Options, pascal.load, "1000 image-text pairs of 20 classes, as similarities to 700 of them"
    ),
    "synthetic": Source(synthetic.Options, synthetic.load, "made-up items of any number, width and difficulty"),
    "wikipedia": Source(wikipedia.Options, wikipedia.load, "2866 image-text pairs of 10 classes, real benchmark data"),
    "wikipedia-multi": Source(wikipedia_multi.Options, wikipedia_multi.load, "the same pairs in up to six modalities"),
}
FOLDER = Source(folder.Options, folder.load, "a folder of your own: features/, labels.npy, split.npz")


def source(name: str) -> Source:
    """What a data set's name stands for: an entry of DATASETS, or else the path of a folder.

    A registered name is that data set even beside a folder of the same name, which is then written "./name".
    Raises InputError for any other name.
    """
    if name in DATASETS:
        return DATASETS[name]
    if os.sep in name or (os.altsep and os.altsep in name) or Path(name).is_dir():
        return FOLDER
    raise unknown("dataset", name, DATASETS)


def dataset_options(name: str, options: Mapping[str, Any] | None = None) -> BaseModel:
    """The checked options of a data set, defaults filled in. Raises InputError for the first thing that is wrong."""
    chosen = source(name)
    given = {"path": name} if chosen is FOLDER else {}
    try:
        return chosen.options.model_validate({**given, **(options or {})})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            raise unknown(f"option of dataset {name}", str(first["loc"][0]), chosen.options.model_fields) from error
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"dataset {name}: {where}: {message}, got {first['input']!r}" if where
                         else f"dataset {name}: {message}") from error  # fmt: skip


def load_dataset(
    name: str, options: Mapping[str, Any] | BaseModel | None = None, data_dir: Path | None = None
) -> Dataset:
    """Load a data set by name, or a folder by path.

    options: the data set's own `Options`, or a mapping of them; what is left out has its default.
    data_dir: where published files are looked for first.
    Raises InputError for an unknown name or option, and for data that is missing, altered or malformed.
    """
    chosen = source(name)
    checked = options if isinstance(options, BaseModel) else dataset_options(name, options)
    if not isinstance(checked, chosen.options):
        raise TypeError(f"dataset {name}: expected {chosen.options.__module__}.Options, got {type(checked)}")
    return chosen.load(checked, data_dir)

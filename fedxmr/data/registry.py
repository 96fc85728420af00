"""Data sets by name: one module each, and a user's own folder.

To add one, write a module with `Options` and `load`, and name it in DATASETS. Importing this module is light: what
only one data set needs is imported when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedxmr.data import (
    digits,
    folder,
    iaprtc12,
    image_text,
    mfeat,
    own_folder,
    pascal,
    synthetic,
    wikipedia,
    wikipedia_multi,
    xmedia,
)
from fedxmr.data.dataset import Dataset, Scaling
from fedxmr.errors import InputError, unknown

__all__ = ["DATASETS", "FOLDER", "Dataset", "Scaling", "Source", "dataset_options", "load_dataset", "source"]


@dataclass(frozen=True)
class Source:
    """A data set that can be loaded: the options it takes, `load(options, data_dir)`, and what it is in one line.

    brought: whether its files must be brought by the user, because they cannot be downloaded and checked.
    """

    options: type[BaseModel]
    load: Callable[[Any, Path | None], Dataset]
    description: str
    brought: bool = False


def _image_text(benchmark: image_text.Benchmark, description: str) -> Source:
    return Source(image_text.Options, partial(image_text.load, benchmark), description, brought=True)


DATASETS: Mapping[str, Source] = {
    "coco": _image_text(image_text.COCO, "122218 image-text pairs with some of 80 labels each"),
    "cub": _image_text(image_text.CUB, "11788 birds in images and descriptions, of 200 classes"),
    "digits": Source(digits.Options, digits.load, "halves of handwritten digits, bundled with scikit-learn"),
    "iaprtc12": Source(iaprtc12.Options, iaprtc12.load, "1962 image-text pairs with some of 291 labels each"),
    "mfeat": Source(mfeat.Options, mfeat.load, "2000 handwritten digits in six modalities"),
    "mirflickr": _image_text(image_text.MIRFLICKR, "20015 image-text pairs with some of 24 labels each"),
    "nus-wide-10k": _image_text(image_text.NUS_WIDE_10K, "10000 image-text pairs of 10 classes"),
    own_folder.NAME: Source(
        own_folder.Options,
        own_folder.load,
        "in a deployment, what each client has in a folder of its own",
        brought=True,
    ),
    "pascal": Source(
        pascal.Options, pascal.load, "1000 image-text pairs of 20 classes, as similarities to 700 of them"
    ),
    "pascal-vgg": _image_text(image_text.PASCAL, "1000 image-text pairs of 20 classes, in the papers' features"),
    "synthetic": Source(synthetic.Options, synthetic.load, "made-up items of any number, width and difficulty"),
    "wikipedia": Source(wikipedia.Options, wikipedia.load, "2866 image-text pairs of 10 classes, real benchmark data"),
    "wikipedia-multi": Source(wikipedia_multi.Options, wikipedia_multi.load, "the same pairs in up to six modalities"),
    "wikipedia-vgg": _image_text(image_text.WIKIPEDIA, "2866 image-text pairs of 10 classes, in the papers' features"),
    "xmedia": Source(xmedia.Options, xmedia.load, "12000 items of 20 classes in five modalities", brought=True),
    "xmedianet": _image_text(image_text.XMEDIANET, "40000 image-text pairs of 200 classes"),
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

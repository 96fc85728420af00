"""What all programs of a benchmark do: train DSCMR on paired images and texts in a federation, and measure it.

A job is a JSON file with the fields of `Job`. A program's last line is JSON with the mean validation mAP, in both
directions and over the clients measured, of the last round's models: so one sees that all did the same work.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """folder: features/image.npy [n, d] and features/text.npy [n, d'] float32, labels.npy [n] int64, and split.npz with
    the items of train, validation and test. parts: .npz of items [N], training items client after client, and offsets
    [clients + 1].

    sample: clients per round; None: all. epochs: local ones in a round. evaluate_every: rounds between evaluations of
    all clients' models, or of the first 20 clients', on validation items; 0: never. threads: of torch in all.
    """

    folder: str
    parts: str
    clients: int
    sample: int | None
    rounds: int
    epochs: int
    batch_size: int
    hidden: int
    width: int
    lr: float
    betas: tuple[float, float]
    lambda_: float
    eta: float
    strategy: str
    evaluate_every: int
    seed: int
    threads: int

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job in a file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_command_line(cls) -> Job:
        """The job that the command's one argument names."""
        return cls.read(Path(sys.argv[1]))


@dataclass(frozen=True)
class Data:
    """Standardised features, as all training items' means and deviations have it.

    train, validation: (image [n, d], text [n, d'], classes [n] int64). parts: per client its training items, int64.
    """

    train: tuple[Tensor, Tensor, Tensor]
    validation: tuple[Tensor, Tensor, Tensor]
    parts: list[Tensor]
    classes: int


def load(job: Job) -> Data:
    """Read a job's files into memory."""
    folder = Path(job.folder)
    split = _arrays(folder / "split.npz")
    labels = torch.from_numpy(_array(folder / "labels.npy"))
    image, text = (torch.from_numpy(_array(folder / "features" / f"{name}.npy")) for name in ("image", "text"))
    train, validation = (torch.from_numpy(split[name]) for name in ("train", "validation"))
    image_train, image_validation = _standardised(image[train], image[validation])
    text_train, text_validation = _standardised(text[train], text[validation])
    divided = _arrays(Path(job.parts))
    items, offsets = torch.from_numpy(divided["items"]), divided["offsets"]
    return Data(
        train=(image_train, text_train, labels[train]),
        validation=(image_validation, text_validation, labels[validation]),
        parts=[items[start:end] for start, end in pairwise(offsets)],
        classes=int(labels.max()) + 1,
    )


def _standardised(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = train.double().mean(0).float(), train.double().std(0, correction=0).float()
    by = torch.where(deviation > 0, deviation, 1.0)
    return (train - mean) / by, (other - mean) / by


def _array(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)  # noqa: TID251 - without pickle


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as opened:  # noqa: TID251 - without pickle
        return dict(opened)


def say(value: float) -> None:
    """The last line."""
    sys.stdout.write(json.dumps({"map": value}) + "\n")

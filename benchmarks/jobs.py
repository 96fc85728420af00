"""The jobs of the benchmarks, and the files they are about: the same for fedxmr and for what it is compared with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from benchmarks.references.job import Job
from fedxmr.config import Config, resolve
from fedxmr.data import Dataset
from fedxmr.partition import save_partition
from fedxmr.sources import dataset, parts


def prepare(
    scratch: Path,
    name: str,
    *,
    dims: tuple[int, int],
    items: tuple[int, int, int],
    clients: int,
    rounds: int,
    epochs: int,
    batch_size: int,
    hidden: int,
    width: int,
    strategy: str,
    sample: int | None = None,
    evaluate_every: int = 1,
    threads: int,
) -> Path:
    """Write a job and the files it names into scratch/NAME; the job's file.

    dims: of images and texts. items: of training, validation and test.
    """
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    _write_data(folder / "data", dims, items)
    job = Job(
        folder=str(folder / "data"),
        parts=str(folder / "parts.npz"),
        clients=clients,
        sample=sample,
        rounds=rounds,
        epochs=epochs,
        batch_size=batch_size,
        hidden=hidden,
        width=width,
        lr=1e-4,
        betas=(0.5, 0.999),
        lambda_=0.1,
        eta=0.1,
        strategy=strategy,
        evaluate_every=evaluate_every,
        seed=0,
        threads=threads,
    )
    save_partition(Path(job.parts), parts(as_config(job)))
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    return path


def as_config(job: Job) -> Config:
    """The same job as fedxmr says it."""
    return resolve(
        {
            "seed": job.seed,
            "dataset": {"name": job.folder},
            "federation": {
                "clients": job.clients,
                "sample": job.sample,
                "rounds": job.rounds,
                "epochs": job.epochs,
                "checkpoint_every": 0,
            },
            "strategy": {"name": job.strategy},
            "learner": {
                "name": "dscmr",
                "hidden": job.hidden,
                "width": job.width,
                "lambda": job.lambda_,
                "eta": job.eta,
                "batch_size": job.batch_size,
                "optimizer": {"name": "adam", "lr": job.lr, "betas": list(job.betas)},
            },
            "evaluation": {"every": job.evaluate_every},
            "runtime": {"threads": job.threads},
        }
    )


def _write_data(folder: Path, dims: tuple[int, int], items: tuple[int, int, int]) -> None:
    """Made-up pairs as a folder of one's own."""
    data = _synthetic(dims, items)
    (folder / "features").mkdir(parents=True, exist_ok=True)
    parts = (data.train, data.validation, data.test)
    for modality in ("image", "text"):
        _write_array(folder / "features" / f"{modality}.npy", torch.cat([part.features[modality] for part in parts]))
    _write_array(folder / "labels.npy", torch.cat([part.labels for part in parts]).int().argmax(1))
    numbers = np.split(np.arange(sum(items)), np.cumsum(items)[:-1])
    split = dict(zip(("train", "validation", "test"), numbers, strict=True))
    np.savez(folder / "split.npz", allow_pickle=False, **split)  # noqa: TID251 - without pickle


def _synthetic(dims: tuple[int, int], items: tuple[int, int, int]) -> Dataset:
    options = dict(zip(("items", "validation_items", "test_items"), items, strict=True))
    modalities = dict(zip(("image", "text"), dims, strict=True))
    return dataset(resolve({"dataset": {"name": "synthetic", "modalities": modalities, **options}}))


def _write_array(path: Path, tensor: torch.Tensor) -> None:
    with path.open("wb") as opened:
        npy.write_array(opened, tensor.numpy(), allow_pickle=False)

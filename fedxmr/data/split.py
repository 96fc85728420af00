"""Dividing a data set into folders, one per client, to try out a deployment in which every client reads its own.

A folder is in the format of `fedxmr.data.folder`. Its features are raw, and its training items are those that the
client of a simulation has, in the same order. What items look like, and `all_test`, have no place in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Generator, Tensor

from fedxmr.data.dataset import Dataset, lacking
from fedxmr.data.folder import PARTS
from fedxmr.data.looks import Looks
from fedxmr.errors import InputError, naming
from fedxmr.partition import Part
from fedxmr.seeding import generator
from fedxmr.types import Items


def divide(data: Dataset, parts: Sequence[Part], seed: int, *, own_test: bool = False) -> list[Dataset]:
    """What each client has of a data set: its part of the training items, and all validation and test items.

    own_test: these are divided too, in equal numbers at random.
    Raises InputError where retrieval could not be measured on what a client would have.
    """
    share = _dealt if own_test else _shared
    validation, test = (share(data, part, len(parts), seed) for part in ("validation", "test"))
    whole = replace(data, all_test_overlaps=False, looks=Looks)
    return [
        replace(whole, train=part.take(data.train), validation=v, test=t, all_test=t)
        for part, v, t in zip(parts, validation, test, strict=True)
    ]


def _shared(data: Dataset, part: str, clients: int, _: int) -> list[Items]:
    items: Items = getattr(data, part)
    if (what := lacking(items, part, data.spec.dims)) is not None:
        raise InputError(f"{data.name}: expected {what}, got none")
    return [items] * clients


def _dealt(data: Dataset, part: str, clients: int, seed: int) -> list[Items]:
    shares = _deal(getattr(data, part), clients, generator(seed, f"split {part}"))
    for client, items in enumerate(shares):
        if (what := lacking(items, part, data.spec.dims)) is not None:
            remedy = "lower --clients, choose another --seed, or pass --test shared"
            raise InputError(f"client {client}: expected {what}, got none; {remedy}")
    return shares


def _deal(items: Items, clients: int, rng: Generator) -> list[Items]:
    """The items in equal numbers at random, each client's in their own order."""
    order = torch.randperm(len(items), generator=rng)
    return [items.select(order[client::clients].sort().values) for client in range(clients)]


def refuse_existing(out: Path) -> None:
    """Raises InputError where there is something at `out`, if only a link that leads nowhere."""
    if out.is_symlink() or out.exists():
        raise InputError(f"{out}: already exists; choose another --out")


def write(out: Path, clients: Sequence[Dataset]) -> list[Path]:
    """Write a folder per client, out/client-0 and so on, all or nothing; returns them.

    Raises InputError where there is something at `out` or nothing can be written there, OSError where the disk fails.
    """
    refuse_existing(out)
    place = out.resolve()
    unfinished = next(path for path in place.parents if path.exists()) / f".{place.name}.{os.getpid()}"
    try:
        unfinished.mkdir()
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error
    names = [f"client-{client}" for client in range(len(clients))]
    try:
        with naming(out):
            for name, data in zip(names, clients, strict=True):
                _write_folder(unfinished / name, data)
            place.parent.mkdir(parents=True, exist_ok=True)
            refuse_existing(out)  # again: renaming would replace an empty folder
            unfinished.rename(place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return [out / name for name in names]


def _write_folder(folder: Path, data: Dataset) -> None:
    """What `fedxmr.data.folder.load` reads as these items."""
    parts: list[Items] = [getattr(data, part) for part in PARTS]
    joined = _join(parts)
    for modality, x in joined.features.items():
        _write_array(folder / "features" / f"{modality}.npy", x)
        if len(x) < len(joined):
            _write_array(folder / "rows" / f"{modality}.npy", joined.rows[modality])
    _write_array(folder / "labels.npy", joined.labels)  # [n, C]: classes of which there is no item stay classes
    _write_split(folder / "split.npz", [len(items) for items in parts])
    _write_text(folder / "classes.txt", "".join(f"{name}\n" for name in data.classes))
    if data.spec.class_vectors is not None:
        _write_array(folder / "class_vectors.npy", data.spec.class_vectors)
    _write_text(folder / "scaling.json", json.dumps(dict(data.scaling), indent=2, sort_keys=True) + "\n")


def _join(parts: Sequence[Items]) -> Items:
    """All items, one part after the other."""
    starts = list(accumulate(map(len, parts[:-1]), initial=0))
    modalities = sorted(parts[0].features)
    return Items(
        {m: torch.cat([items.features[m] for items in parts]) for m in modalities},
        {m: torch.cat([start + items.rows[m] for start, items in zip(starts, parts, strict=True)]) for m in modalities},
        torch.cat([items.labels for items in parts]),
    )


def _write_array(path: Path, tensor: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = tensor.contiguous().numpy()
    with path.open("wb") as opened:
        npy.write_array_header_1_0(opened, npy.header_data_from_array_1_0(array))
        opened.write(array.data)  # numpy's own writing does not say that a disk is full


def _write_split(path: Path, sizes: Sequence[int]) -> None:
    numbers = torch.arange(sum(sizes)).split_with_sizes(list(sizes))
    arrays: Mapping[str, np.ndarray] = {part: index.numpy() for part, index in zip(PARTS, numbers, strict=True)}
    with path.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **arrays)  # noqa: TID251 - without pickle


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")

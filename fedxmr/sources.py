"""Where a client's items come from: a data set and its partition, or a folder; and what a zero-shot task measures.

All clients of a process share one data set in memory; what is cached is keyed by everything it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import get_args

from fedxmr.config import Config
from fedxmr.data import Dataset, Scaling, load_dataset
from fedxmr.data.class_vectors import with_narrow_class_vectors
from fedxmr.errors import InputError, unknown
from fedxmr.learners import learner_class
from fedxmr.partition import Part, PartitionConfig, partition
from fedxmr.scaling import BY_MOMENTS
from fedxmr.zero_shot import Protocol, protocol, seen_only, with_unseen_classes


def dataset(config: Config) -> Dataset:
    """The data set of a run; in a zero-shot task of seen classes alone. Raises InputError for a missing or bad file."""
    return _dataset(config.dataset.model_dump_json(), class_seed(config))


def own_folder(config: Config, folder: Path) -> Dataset:
    """The data of a deployed client, all of which are its own. Raises InputError for a missing or bad file."""
    return _narrowed(load_dataset(str(folder.absolute())), config.dataset.class_vector_width)


def class_seed(config: Config) -> int | None:
    """The seed of a zero-shot task's classes; None for the standard task."""
    if config.dataset.task == "standard":
        return None
    return config.seed if config.dataset.class_seed is None else config.dataset.class_seed


def zero_shot(config: Config) -> Protocol | None:
    """What a zero-shot task measures, unseen classes included; None for the standard task."""
    seed = class_seed(config)
    if seed is None:
        return None
    whole = _whole(config.dataset.model_dump_json(), seed)
    return protocol(whole, config.dataset.task, config.evaluation.on, seed)


@lru_cache(maxsize=1)
def _dataset(key: str, class_seed: int | None) -> Dataset:
    whole = _whole(key, class_seed)
    return whole if class_seed is None else seen_only(whole)


@lru_cache(maxsize=1)
def _whole(key: str, class_seed: int | None) -> Dataset:
    options = json.loads(key)
    name, data_dir = options.pop("name"), options.pop("data_dir")
    seen_share, width = options.pop("seen_share"), options.pop("class_vector_width")
    for of_the_run in ("scaling", "task", "class_seed"):
        options.pop(of_the_run)
    data = _narrowed(load_dataset(name, options, data_dir), width)
    return data if class_seed is None else with_unseen_classes(data, class_seed, seen_share)


def _narrowed(data: Dataset, width: int | None) -> Dataset:
    return data if width is None else with_narrow_class_vectors(data, width)


def parts(config: Config) -> Sequence[Part]:
    """Every client's part of the training items. Raises InputError where the partition cannot be had."""
    key = config.dataset.model_dump_json()
    return _parts(key, class_seed(config), config.partition, config.federation.clients, config.seed)


@lru_cache(maxsize=1)
def _parts(
    dataset_key: str, class_seed: int | None, scheme: PartitionConfig, clients: int, seed: int
) -> Sequence[Part]:
    data = _dataset(dataset_key, class_seed)
    for modality in sorted(set(data.spec.dims) - set(data.train.modalities)):
        raise InputError(
            f"{data.name}: expected training items that have {modality}, got none; it can only be learned in a "
            "deployment, from clients that have some"
        )
    return partition(data.train, clients, scheme, seed)


def scaling(config: Config, data: Dataset) -> Mapping[str, str]:
    """How a run scales each modality: as the configuration says, else as the data set recommends and the learner wants.

    Where nobody's moments scale (`federation.standardise: none`), what would take them is "none". Raises InputError for
    a modality that the data set lacks, and for a learner that wants what there is not.
    """
    for modality in config.dataset.scaling:
        if modality not in data.spec.dims:
            raise unknown("modality in dataset.scaling", modality, data.spec.dims)
    instead = getattr(learner_class(config.learner.name), "scaling", {})
    if not isinstance(instead, Mapping) or not set(instead.values()) <= set(get_args(Scaling)):
        raise InputError(
            f"learner {config.learner.name!r}: expected scaling to be a mapping to {', '.join(get_args(Scaling))}, "
            f"got {instead!r}"
        )
    found = {m: instead.get(how, how) for m, how in data.scaling.items()} | config.dataset.scaling
    if config.federation.standardise == "none":
        return {m: "none" if how in BY_MOMENTS else how for m, how in found.items()}
    return found

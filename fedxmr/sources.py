"""Where a simulated client's items come from: the data set and its partition.

All clients of a process share one data set in memory; what is cached is keyed by everything it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedxmr.config import Config
from fedxmr.data import Dataset, load_dataset
from fedxmr.errors import unknown
from fedxmr.partition import Part, PartitionConfig, partition


def dataset(config: Config) -> Dataset:
    """The data set of a run. Raises InputError for a missing or bad file."""
    return _dataset(config.dataset.model_dump_json())


@lru_cache(maxsize=1)
def _dataset(key: str) -> Dataset:
    options = json.loads(key)
    name, data_dir = options.pop("name"), options.pop("data_dir")
    options.pop("scaling")
    return load_dataset(name, options, data_dir)


def parts(config: Config) -> Sequence[Part]:
    """Every client's part of the training items. Raises InputError where the partition cannot be had."""
    return _parts(config.dataset.model_dump_json(), config.partition, config.federation.clients, config.seed)


@lru_cache(maxsize=1)
def _parts(dataset_key: str, scheme: PartitionConfig, clients: int, seed: int) -> Sequence[Part]:
    return partition(_dataset(dataset_key).train, clients, scheme, seed)


def scaling(config: Config, data: Dataset) -> Mapping[str, str]:
    """How each modality is scaled: as the data set recommends, unless the configuration says otherwise."""
    for modality in config.dataset.scaling:
        if modality not in data.spec.dims:
            raise unknown("modality in dataset.scaling", modality, data.spec.dims)
    return {**data.scaling, **config.dataset.scaling}

"""Data sets by name, one module each, and a user's own folder; `registry` has them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedxmr.data.dataset import Dataset, Scaling
    from fedxmr.data.registry import DATASETS, FOLDER, Source, dataset_options, load_dataset, source

__all__ = ["DATASETS", "FOLDER", "Dataset", "Scaling", "Source", "dataset_options", "load_dataset", "source"]


def __getattr__(name: str) -> Any:
    # on demand: `python -m fedxmr.data --help` must not wait for torch
    if name in __all__:
        from fedxmr.data import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'fedxmr.data' has no attribute {name!r}")

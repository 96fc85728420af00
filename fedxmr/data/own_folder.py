"""The data of a deployment: every client reads a folder of its own, on its own machine.

The folder is in the format of folder.py; where it is, the client's machine says (`data-path` in its node's
configuration), and nobody else knows. The folders have the same modalities, widths and classes, which is checked as a
run starts. There is nothing here to load: a simulation takes one folder for all of its clients.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fedxmr.data.dataset import Dataset
from fedxmr.errors import InputError

NAME = "own-folder"


class Options(BaseModel):
    """None."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def load(options: Options, data_dir: Path | None = None) -> Dataset:  # noqa: ARG001 - all loaders are called alike
    """Raises InputError."""
    raise InputError(
        f"dataset {NAME}: every client of a deployment reads its own, which others do not have; "
        "here, expected the path of a folder or another data set"
    )

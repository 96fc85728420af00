"""`python -m fedxmr.data`: what can be done with a data set besides training on it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedxmr import commands
from fedxmr.commands import configure, option, say
from fedxmr.errors import InputError

if TYPE_CHECKING:
    from fedxmr.config import Config
    from fedxmr.data.dataset import Dataset


class TestItems(StrEnum):
    """Who has which validation and test items."""

    shared = "shared"
    own = "own"


def split(
    dataset: Annotated[str, typer.Argument(help="a data set or the path of a folder, as simulate has them")],
    out: Annotated[Path, option("where the folders go, client-0 and so on; nothing may be there")],
    assignments: commands.Assignments = None,
    config: commands.ConfigFile = None,
    features: commands.Features = None,
    data_dir: commands.DataDir = None,
    clients: commands.Clients = None,
    partition: commands.PartitionScheme = None,
    seed: commands.Seed = None,
    test: Annotated[
        TestItems, typer.Option(help="everybody has all validation and test items, or they are divided as well")
    ] = TestItems.shared,
) -> None:
    """Divide DATASET, a name or the path of a folder, into one folder per client: to try out a deployment.

    The training items of a client are those that it has in fedxmr.simulate with the same options. Features are raw,
    with their recommended scaling beside them. Whatever says how to train is left alone.
    """
    from fedxmr import sources
    from fedxmr.data.split import divide, refuse_existing, write

    refuse_existing(out)
    options = {
        "dataset.name": dataset,
        "dataset.features": features,
        "dataset.data_dir": data_dir,
        "federation.clients": clients,
        "partition.scheme": partition,
        "seed": seed,
    }
    checked = configure(config, options, assignments)
    if checked.dataset.task != "standard":
        raise InputError(f"dataset.task: expected standard, got {checked.dataset.task}: a folder has no unseen classes")
    data = sources.dataset(checked)
    parts = divide(data, sources.parts(checked), checked.seed, own_test=test is TestItems.own)
    folders = write(out, parts)
    for note in _notes(checked, data):
        say(f"note: {note}")
    for folder, part in zip(folders, parts, strict=True):
        say(_line(folder, part))


def _notes(config: Config, data: Dataset) -> Iterator[str]:
    """What the data set says of itself, and what the folders do not say."""
    yield from data.notes
    if data.column_class:
        yield "these folders are not for zero-shot tasks: nothing in them says which class a column compares with"
    if config.dataset.scaling:
        yield "dataset.scaling is not in these folders: scaling.json has what the data set recommends"


def _line(folder: Path, data: Dataset) -> str:
    """What is in a folder."""
    held = ", ".join(f"{modality} {len(data.train.rows[modality])}" for modality in data.train.modalities)
    return f"{folder}: training {len(data.train)} ({held}), validation {len(data.validation)}, test {len(data.test)}"


if __name__ == "__main__":
    commands.main({"split": split}, about="What can be done with a data set besides training on it.")

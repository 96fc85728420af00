"""What several tests need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedxmr.commands import SWIFT

os.environ.update({**SWIFT, **os.environ})  # before torch is imported, as a command does

import torch

NEEDED = {
    "iaprtc12": ("iaprtc12/TS_vis_vgg128.csv", "iaprtc12/TS_lang_biGRU.csv"),
    "mfeat": ("mfeat/handwritten_6views.mat",),
    "pascal": (
        "pascal_sentence/pascal1K_sim.mat",
        "pascal_sentence/pascal1K_cat.mat",
        "class_embeddings/MS-COCO-inp-googlenews.mat",
        "class_embeddings/MS-COCO-inp-glove6B.mat",
    ),
    "wikipedia": ("wikipedia/wiki.mat",),
    "wikipedia-multi": ("wikipedia/wiki.mat", "wikipedia_multilingual/English-100.mat"),
}
"""Data set -> files that a folder of real benchmark files has if it has that data set."""


@pytest.fixture(scope="session")
def benchmark_folder() -> Callable[[str], Path]:
    """Data set -> the folder of its real files: what FEDXMR_DATA names, else ../shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDXMR_DATA") or beside)

    def of(name: str) -> Path:
        for file in NEEDED[name]:
            if not (folder / file).is_file():
                pytest.skip(f"no data for {name}: no {file} in {folder} (set FEDXMR_DATA to a folder that has it)")
        return folder

    return of


@pytest.fixture(scope="session")
def benchmark_data(benchmark_folder: Callable[[str], Path]) -> Path:
    """The folder of the real Wikipedia files."""
    return benchmark_folder("wikipedia")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bit-equality is promised at one thread; and small steps wait for each other's threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

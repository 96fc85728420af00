"""What several tests need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder of real benchmark files: what FEDXMR_DATA names, else ../shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDXMR_DATA") or beside)
    if not (folder / "wikipedia" / "wiki.mat").is_file():
        pytest.skip(f"no benchmark data: no wikipedia/wiki.mat in {folder} (set FEDXMR_DATA to a folder that has it)")
    return folder

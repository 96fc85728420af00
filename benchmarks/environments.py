"""Environments of programs that fedxmr is compared with and whose packages do not go together with its own."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path

from fedxmr.processes import ROOT


def pfl() -> Path:
    """The Python that runs benchmarks.references.pfl_fedavg."""
    return _python(ROOT / "build" / "pfl-venv", ROOT / "benchmarks" / "references" / "pfl-requirements.txt")


def _python(folder: Path, requirements: Path) -> Path:
    """Make the environment anew unless the copy of its requirements, left when it was complete, is still the same."""
    python, stamp = folder / "bin" / "python", folder / requirements.name
    if not stamp.exists() or stamp.read_bytes() != requirements.read_bytes():
        venv.create(folder, clear=True, symlinks=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        shutil.copyfile(requirements, stamp)
    return python

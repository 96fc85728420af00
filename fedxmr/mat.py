"""MATLAB files that strangers may have written, parsed in a process of their own: `python -m fedxmr.mat`.

scipy's parser believes what it reads. At some malformed files it ends its process, at others it takes all the memory
there is, or never returns. So the process that parses is not ours: it has a deadline and a limit of memory, and gives
back nothing but NumPy arrays of float32, in files that `fedxmr.arrays` reads. Files with a published checksum, which
`fedxmr.data.files.read_mat` compares, need none of this.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from numpy.lib import format as npy

from fedxmr.arrays import Array, read_npy
from fedxmr.errors import InputError, in_one_line, one_line, reason

PATIENCE = 60.0
"""Seconds that any file may take; a large one has one more for each megabyte."""


@contextmanager
def parsed(path: Path, names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
    """The named variables of a MATLAB file as float32 arrays, mapped from a temporary folder while the context lasts.

    Sparse matrices are spread out; NaN, and infinity for what float32 cannot hold, are left for the caller to refuse.
    Raises InputError, in one line, for a file that is missing, of version 7.3, malformed, too large for the memory
    that is free or not read in time, and for a variable that is not there or is not an array of numbers.
    """
    patience = PATIENCE + _size(path) / 1e6
    with TemporaryDirectory(prefix="fedxmr-") as folder:
        command = [sys.executable, "-m", __name__, str(path.resolve()), folder, *names]
        root = Path(__file__).resolve().parents[1]  # where -m finds this package, installed or not
        try:
            ended = subprocess.run(
                command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=patience, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise InputError(f"{path}: expected a MATLAB file, got one that is not read in {patience:.0f} s") from None
        if ended.returncode:
            raise InputError(f"{path}: {_complaint(ended.returncode, ended.stdout)}")
        yield {name: read_npy(Path(folder) / f"{number}.npy") for number, name in enumerate(names)}


def spread_out(sparse: Any) -> Array:
    """A sparse matrix as an array; one whose indices point outside it would be written beside its memory."""
    sparse.check_format(full_check=True)
    dense: Array = sparse.toarray()
    return dense


def _size(path: Path) -> int:
    """The bytes of a file. Raises InputError where it cannot be read, or is known at once to be none for scipy."""
    try:
        with path.open("rb") as opened:
            head = opened.read(520)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got {one_line(error)}") from error
    if head.startswith(b"MATLAB 7.3") or b"\x89HDF\r\n\x1a\n" in (head[:8], head[512:]):
        raise InputError(
            f"{path}: expected a MATLAB file of version 7 or before, got one of version 7.3 (HDF5); load it in MATLAB "
            "and save it with -v7, arrays of more than 2 GB as single"
        )
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: expected a MATLAB file, got Git LFS's pointer to it, which `git lfs pull` replaces")
    return size


def _complaint(code: int, said: bytes) -> str:
    """What was expected and what came, where parsing ended with this exit code and these words."""
    if code < 0:
        return f"expected a MATLAB file, got one at which scipy's parser died of {signal.Signals(-code).name}"
    words = said.decode(errors="replace")
    return in_one_line(words) or f"expected a MATLAB file, got one at which scipy's parser ended with code {code}"


def _parse(path: str, folder: Path, names: Sequence[str]) -> None:
    """Write each variable to the folder as float32, under its number. Raises ValueError saying what was expected."""
    from scipy.io import loadmat, whosmat

    try:
        contents = loadmat(path, appendmat=False, variable_names=names)
        there = [] if contents.keys() >= set(names) else [name for name, _, _ in whosmat(path, appendmat=False)]
    except MemoryError:
        raise
    except Exception as error:  # whatever scipy's parser trips on: IndexError, zlib.error, MatReadError ...
        raise ValueError(f"expected a MATLAB file, got one that cannot be read ({reason(error)})") from error
    for number, name in enumerate(names):
        if name not in contents:
            raise ValueError(f"expected a variable {name!r}, got {', '.join(map(repr, there)) or 'none'}")
        value = contents[name]
        try:
            value = spread_out(value) if hasattr(value, "toarray") else value
        except (ValueError, IndexError) as error:
            raise ValueError(f"expected {name} to be a sparse matrix, got {one_line(error)}") from error
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            got = f"{list(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"expected {name} to be an array of numbers, got {got}")
        with (folder / f"{number}.npy").open("wb") as opened, np.errstate(over="ignore"):
            npy.write_array(opened, value.astype(np.float32, copy=False), allow_pickle=False)


def _main(path: str, folder: str, *names: str) -> int:
    """The process that parses: 0, or 1 with the reason on standard output."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    free = psutil.virtual_memory().available
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (free if hard == resource.RLIM_INFINITY else min(free, hard), hard))
    try:
        _parse(path, Path(folder), names)
    except MemoryError:
        said = f"expected arrays that fit into the {free / 1e9:.1f} GB of memory that are free, got larger ones"
    except OSError as error:
        said = f"expected room for its arrays in {folder}, got {one_line(error)}"
    except ValueError as error:
        said = one_line(error)
    else:
        return 0
    sys.stdout.write(in_one_line(said))
    return 1


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))

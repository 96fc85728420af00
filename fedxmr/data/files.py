"""Finding the published files of a data set: the user's folders first, then the cache, then a checked download."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fedxmr.errors import InputError, one_line
from fedxmr.mat import spread_out

SILENCE = 20.0
"""Seconds a server may send nothing."""
DEADLINE = 300.0
"""Seconds a whole download may take."""


@dataclass(frozen=True)
class RemoteFile:
    """One file: its place below a data folder or the cache, where it comes from, and the sha256 of its bytes."""

    path: str
    url: str
    sha256: str


def github(repository: str, commit: str, path: str) -> str:
    """The address of a file's bytes in a public GitHub repository, at one commit."""
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{path}".replace(" ", "%20")


def locate(file: RemoteFile, data_dir: Path | None = None) -> Path:
    """The verified local copy of a file.

    Looked for in `data_dir`, in the folder `FEDXMR_DATA` names, and in the user's cache, in this order; the first two
    are only read. A file found nowhere is downloaded into the cache.
    Raises InputError for a folder that is not there, a wrong checksum and a download that fails.
    """
    for folder in given_folders(data_dir):
        path = folder / file.path
        if path.exists():
            _verify(path, file.sha256)
            return path
    return _download(file)


def given_folders(data_dir: Path | None) -> Iterator[Path]:
    """The folders a user's own files may be in: `data_dir`, then what `FEDXMR_DATA` names.

    Raises InputError for one that is not there, when it comes to it.
    """
    for origin, folder in (("--data-dir", data_dir), ("FEDXMR_DATA", os.environ.get("FEDXMR_DATA"))):
        if not folder:
            continue
        if not Path(folder).is_dir():
            raise InputError(f"{origin}: expected a folder, got {str(folder)!r}")
        yield Path(folder)


def read_mat(path: Path, sha256: str) -> Mapping[str, Any]:
    """The variables of a MATLAB file whose bytes have this checksum, structs as dicts.

    scipy's parser believes what it reads, and ends the process at some malformed files: here it is given no others
    than those that were published; `fedxmr.mat` is for the rest. Raises InputError where the file is another, or no
    MATLAB file.
    """
    from scipy.io import loadmat

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got {one_line(error)}") from error
    _compare(path, sha256, hashlib.sha256(content).hexdigest())
    try:
        contents: Mapping[str, Any] = loadmat(io.BytesIO(content), simplify_cells=True)
    except Exception as error:  # whatever scipy's parser trips on: IndexError, zlib.error, MatReadError ...
        raise InputError(f"{path}: expected a MATLAB file, got one that cannot be read ({one_line(error)})") from error
    return contents


def matrix(path: Path, contents: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """A named array of a MATLAB file as float32, in torch's own memory; sparse ones are spread out.

    contents: what `read_mat` found in the file at `path`. Raises InputError for another shape and for NaN.
    """
    value: Any = contents.get(name)
    if hasattr(value, "toarray") and value.shape == shape:
        value = _spread_out(path, name, value)
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind not in "fiub":
        got = f"{list(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{path}: expected {name} to be {list(shape)} numbers, got {got}")
    found = torch.tensor(value.astype(np.float32))  # some files are big-endian, which torch cannot read
    if not found.isfinite().all():
        raise InputError(f"{path}: expected finite numbers in {name}, got NaN or infinite ones")
    return found


def _spread_out(path: Path, name: str, sparse: Any) -> Any:
    """A sparse matrix as an array. Raises InputError for one that is damaged."""
    try:
        return spread_out(sparse)
    except Exception as error:  # whatever scipy trips on
        raise InputError(f"{path}: expected {name} to be a sparse matrix, got {one_line(error)}") from error


def _verify(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got {one_line(error)}") from error
    _compare(path, expected, found)


def _compare(path: Path, expected: str, found: str) -> None:
    if found != expected:
        raise InputError(f"{path}: expected sha256 {expected}, got {found}")


class _TimedFile:
    """A file that refuses to be written after a deadline, because requests' own timeout is only about silence."""

    def __init__(self, file: BinaryIO, seconds: float) -> None:
        self.file, self.seconds, self.end = file, seconds, time.monotonic() + seconds

    def write(self, chunk: bytes) -> int:
        if time.monotonic() >= self.end:
            raise TimeoutError(f"not finished after {self.seconds:.0f} s")
        return self.file.write(chunk)

    def flush(self) -> None:
        self.file.flush()


def _download(file: RemoteFile) -> Path:
    import pooch

    def fetch(url: str, output: str, registry: object) -> None:
        with Path(output).open("wb") as opened, ExitStack() as connections:

            def close_later(response: Any, **_: object) -> None:  # pooch itself closes no answer it has not read out
                connections.callback(response.close)

            get = pooch.HTTPDownloader(timeout=SILENCE, hooks={"response": close_later})
            get(url, _TimedFile(opened, DEADLINE), registry)

    place = Path(pooch.os_cache("fedxmr")) / file.path
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        pooch.retrieve(file.url, f"sha256:{file.sha256}", fname=place.name, path=place.parent, downloader=fetch)
    except (OSError, ValueError) as error:  # no network, an HTTP error, a deadline, a full disk; a wrong checksum
        raise InputError(
            f"{file.path}: not found and its download failed ({one_line(error)}); download {file.url} by hand to "
            f"{place}, or point FEDXMR_DATA or --data-dir at a folder that has {file.path}"
        ) from error
    return place

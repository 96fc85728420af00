"""Folders that outlive a process: held by one at a time, and with files that are whole or not there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedxmr.errors import InputError


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """A folder for this process alone, made if need be, for its owner's eyes.

    what: the kind of process, for the error. Raises InputError where another has the folder or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another {what} is working in this folder") from error
        yield
    finally:
        os.close(lock)


def replace(file: Path, content: bytes) -> None:
    """Write a file at once, in place of the one there is. Raises OSError."""
    beside = file.with_name(f".{file.name}.new")
    with beside.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    beside.replace(file)

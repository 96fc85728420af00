"""States on disk: safetensors files, written whole or not at all, and refused when a bit has changed.

The header holds the SHA-256 of the whole file, taken with zeros in its own place: no byte can change unnoticed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedxmr.errors import InputError
from fedxmr.types import State

_BLANK = "0" * 64
_DIGEST = re.compile(rb'(?<="sha256":")[0-9a-f]{64}(?=")')  # within `about` every quote is escaped


def sha256(state: Mapping[str, Tensor]) -> str:
    """A digest of names, dtypes, shapes and bytes, independent of the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def size(state: Mapping[str, Tensor]) -> int:
    """The bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def finite(tensor: Tensor) -> bool:
    """Whether no number in it is infinite or NaN; in one pass, for this is asked of every update."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def save(path: Path, state: State, about: Mapping[str, Any]) -> None:
    """Write a state and JSON facts `about` it, atomically and durably: a reader sees the old file or the new one.

    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary, {"about": json.dumps(dict(about)), "sha256": _BLANK})
        with temporary.open("r+b") as file, ThreadPoolExecutor(1) as beside:
            written = beside.submit(os.fsync, file.fileno())  # the disk works while this process reckons
            at, digest = _digest(file)
            written.result()
            file.seek(at.start())
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except SafetensorError as error:  # a full disk, say
        raise OSError(errno.EIO, f"cannot be written: {error}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """See that what was put into a folder, or renamed in it, survives a loss of power. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def load(path: Path) -> tuple[State, dict[str, Any]]:
    """The state and the facts in a file. Raises InputError for a missing, truncated or changed one."""
    verify(path)
    try:
        with safe_open(path, framework="pt") as opened:
            about = json.loads(opened.metadata()["about"])
            # clones: torch's own aligned memory, since alignment can change the bits of what is computed from it
            state = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    return state, about


def verify(path: Path) -> str:
    """See that no byte of a state's file has changed; its checksum. Raises InputError, also for a missing one."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            found, digest = _digest(file)
        if found[0].decode() != digest:
            raise ValueError("its checksum does not match")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return digest


def fingerprint(path: Path) -> str:
    """The checksum that a state's file says it has, which is not compared. Raises InputError where it says none."""
    try:
        with path.open("rb") as file:
            return _written(file)[1][0].decode()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a state of fedxmr's, or damaged: {error}")


def _digest(file: BinaryIO) -> tuple[re.Match[bytes], str]:
    """Where in a file its digest is written, and what it should be. Raises ValueError where none is written."""
    start, found = _written(file)
    digest = hashlib.sha256(start[: found.start()] + _BLANK.encode() + start[found.end() :])
    while block := file.read(1 << 20):
        digest.update(block)
    return found, digest.hexdigest()


def _written(file: BinaryIO) -> tuple[bytes, re.Match[bytes]]:
    """The first part of a file, and where in it the digest is written. Raises ValueError where none is."""
    file.seek(0)
    length = file.read(8)
    # the header follows its length, which may be damaged
    start = length + file.read(min(int.from_bytes(length, "little"), os.fstat(file.fileno()).st_size))
    if (found := _DIGEST.search(start)) is None:
        raise ValueError("it has no checksum")
    return start, found


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The state with `prefix/` before every name, to put several into one file."""
    return {f"{prefix}/{name}": tensor for name, tensor in state.items()}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The part of a state whose names begin with `prefix/`, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in state.items() if name.startswith(f"{prefix}/")}

"""States on disk: safetensors files, written whole or not at all, and refused when a bit has changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedxmr.errors import InputError
from fedxmr.types import State


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


def save(path: Path, state: State, about: Mapping[str, Any]) -> None:
    """Write a state and JSON facts `about` it, atomically: a reader sees the old file or the new one.

    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        text = json.dumps(dict(about))
        save_file(tensors, temporary, {"about": text, "sha256": _checksum(state, text)})
        temporary.replace(path)
    except SafetensorError as error:  # a full disk, say
        raise OSError(errno.EIO, f"cannot be written: {error}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> tuple[State, dict[str, Any]]:
    """The state and the facts in a file. Raises InputError for a missing, truncated or changed one."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # clones: torch's own aligned memory, since alignment can change the bits of what is computed from it
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about = json.loads(header["about"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a state of fedxmr's, or damaged: {error}") from error
    if _checksum(state, header["about"]) != header.get("sha256"):
        raise InputError(f"{path}: damaged: its checksum does not match")
    return state, about


def _checksum(state: State, about: str) -> str:
    return hashlib.sha256((sha256(state) + about).encode()).hexdigest()


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The state with `prefix/` before every name, to put several into one file."""
    return {f"{prefix}/{name}": tensor for name, tensor in state.items()}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The part of a state whose names begin with `prefix/`, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in state.items() if name.startswith(f"{prefix}/")}

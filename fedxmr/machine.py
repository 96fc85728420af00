"""The machine a process runs on: its cores and devices."""

from __future__ import annotations

import os

import torch

from fedxmr.errors import InputError


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str) -> torch.device:
    """The device of `runtime.device`. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"runtime.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device

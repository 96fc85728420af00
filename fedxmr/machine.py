"""The machine a process runs on: its cores and devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from fedxmr import __version__
from fedxmr.errors import InputError


@cache
def versions() -> Mapping[str, str]:
    """What must be the same on all machines of a federation; of torch not what it was built for, such as +cpu."""
    return {"fedxmr": __version__, "torch": str(torch.__version__).partition("+")[0], "flwr": version("flwr")}


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """The bytes of memory this process may use: the machine's, or less where its control group says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def choose_device(name: str) -> torch.device:
    """The device of `runtime.device`. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":  # asked without a context, which would take some of its memory
            if (device.index or 0) >= (count := torch.cuda.device_count()):
                raise InputError(f"runtime.device: {name!r} cannot be used here: this machine has {count} GPUs")
        else:
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"runtime.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device

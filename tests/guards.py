"""Guards that end this process, with a stack on standard error, at what fedxmr promises never to do.

For a process of its own: a guard cannot be taken off again. It ends the process at once, for an exception could be
caught by whoever did it.
"""

from __future__ import annotations

import ipaddress
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
BITTEN = 77
"""The exit code of a process that a guard has ended."""


def guarded(code: str, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python code under both guards, in a process of its own."""
    command = [sys.executable, "-c", f"from tests import guards\nguards.no_unpickling()\nguards.no_traffic()\n{code}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def no_unpickling() -> None:
    """Nothing is unpickled from now on, not even a list of numbers, nor by a library.

    Before anything else is imported: who has taken `pickle.loads` already keeps it. Then there is still the audit
    event, which comes with every class or function that a pickle names.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("pickle.find_class", "marshal.load") or event.startswith("shelve"):
            _bite(f"{event} {arguments}")

    def refuse(*_: object, **__: object) -> NoReturn:
        _bite("pickle.load or pickle.loads")

    class Unpickler(pickle.Unpickler):
        load = refuse

    class PythonsUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
        load = refuse

    pickle.load = pickle.loads = refuse
    pickle._load = pickle._loads = refuse  # type: ignore[attr-defined]
    pickle.Unpickler = Unpickler  # type: ignore[misc]
    pickle._Unpickler = PythonsUnpickler  # type: ignore[attr-defined]
    sys.addaudithook(hook)


def no_traffic() -> None:
    """Nothing is sent beyond this machine from now on, and no name is looked up."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        match event:
            case "socket.connect" | "socket.sendto" | "socket.sendmsg":
                address = arguments[1]
                if isinstance(address, tuple) and not _here(str(address[0])):
                    _bite(f"{event} {address}")
            case "socket.getaddrinfo" | "socket.gethostbyname" | "socket.gethostbyaddr":
                if arguments[0] is not None and not _here(arguments[0]):
                    _bite(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def _here(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return name in ("", "localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _bite(what: str) -> NoReturn:
    sys.stderr.write(f"guard: {what}\n{''.join(traceback.format_stack())}")
    sys.stderr.flush()
    os._exit(BITTEN)

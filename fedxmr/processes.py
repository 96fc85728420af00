"""Processes of our own that last: started so that they end with the one who started them, and ended with all theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from fedxmr.commands import QUIET, SWIFT

ROOT = Path(__file__).resolve().parents[1]
"""Where the packages fedxmr, server and clients lie."""

_PARENT = "FEDXMR_PARENT"
GRACE = 8.0
"""Seconds a process has to end after SIGTERM; Flower's own force themselves to after five."""


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of Flower's processes: nothing is sent or installed unasked, and its files go to `home`."""
    here = "localhost,127.0.0.1,::1"  # a proxy is for the way out
    bypass = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), here)))
    return {
        **SWIFT,
        **{name: value for name, value in os.environ.items() if name not in ("FORWARDED_ALLOW_IPS", "FLWR_LOG_LEVEL")},
        **QUIET,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
        "PATH": search_path(),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": bypass,
        "no_proxy": bypass,
        **more,
    }


def search_path() -> str:
    """PATH with the directory of this Python before all others: Flower starts its further commands by name."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def start(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], *, piped: bool = False
) -> subprocess.Popen[str]:
    """Run one of our modules, which calls `end_with_parent` first of all, in a session of its own.

    Of its own, so that Ctrl-C reaches us alone, and we end it in order. piped: its output can be read, as one stream.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,  # where "-m" finds the module, also where nothing is installed
        env={**environment, _PARENT: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if piped else None,
        stderr=subprocess.STDOUT if piped else None,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def end_with_parent(grace: float = GRACE) -> None:
    """End this process soon after the one that started it, however that one ends.

    grace: seconds it has after it has been asked to.
    """
    parent = int(os.environ.pop(_PARENT, "0") or 0)
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(1)  # it would not

    threading.Thread(target=watch, daemon=True).start()


def stop(process: subprocess.Popen[str], grace: float = GRACE) -> None:
    """End a process that `start` began, and all it has started: asked first, then made to."""
    family = _family(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    process.kill()
    process.wait()
    family = psutil.wait_procs(family, timeout=2.0)[1]  # Flower's own watch whether their parent lives
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    for member in psutil.wait_procs(family, timeout=grace)[1]:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def _family(leader: int) -> list[psutil.Process]:
    """All that the leader of a session has started, what these have, and whom it has left behind in its session."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(leader).children(recursive=True)
    for pid in psutil.pids():
        with suppress(OSError, psutil.NoSuchProcess):
            if pid != leader and os.getsid(pid) == leader:
                family.append(psutil.Process(pid))
    return list(set(family))


def lines(process: subprocess.Popen[str], to: Callable[[str], None]) -> threading.Thread:
    """Hand over what a process says, line by line, without waiting for it to end."""

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as said:
            for line in said:
                to(line.rstrip("\n"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def show(line: str) -> None:
    """Write a line of somebody else's to standard output, as it is."""
    with suppress(OSError):  # nobody reads it
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

"""Machines of a deployment in tests: network namespaces on one bridge, each with files that no other can see."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SUBNET = "10.77.0"


def missing() -> str | None:
    """Why there can be no network namespaces here, or None where there can."""
    if shutil.which("ip") is None:
        return "needs `ip` (iproute2)"
    name = f"fx-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False, timeout=30)
    if tried.returncode:
        return f"network namespaces are not permitted here: {tried.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*arguments: str) -> str:
    """Run iproute2's command; what it prints."""
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    if ran.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {ran.stderr.strip()}")
    return ran.stdout


class Machine:
    """A network namespace with an address on the bridge, and a folder of its own.

    Whatever is sent to anywhere but the bridge goes to the device `out`, which only counts it.
    """

    def __init__(self, name: str, number: int, folder: Path, bridge: str, hidden: Sequence[Path] = ()) -> None:
        """number: the last of its address. hidden: folders that are empty to its processes."""
        self.name = f"{bridge}-{name}"
        self.address = f"{SUBNET}.{number}"
        self.folder = folder
        self._hidden = hidden
        self._started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True)
        ip("netns", "add", self.name)
        ip("link", "add", f"{bridge}{number}", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", f"{bridge}{number}", "master", bridge, "up")
        subprocess.run(
            ["ip", "netns", "exec", self.name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"],
            check=False,  # a kernel may have no IPv6 at all
            timeout=30,
        )
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "add", "out", "type", "veth", "peer", "name", "nowhere")
        for device in ("out", "nowhere"):
            ip("-n", self.name, "link", "set", device, "up")
        ip("-n", self.name, "route", "add", "default", "dev", "out")

    def start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Run `python -m ARGUMENTS` here; what it says goes to NAME.log in the folder."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                self._line(arguments),
                cwd=ROOT,
                env=_environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run `python -m ARGUMENTS` here to its end."""
        return subprocess.run(
            self._line(arguments),
            cwd=ROOT,
            env=_environment(self.folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def log(self, name: str) -> Path:
        """What a started process has said."""
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        """The same as text."""
        return self.log(name).read_text(encoding="utf-8", errors="replace") if self.log(name).exists() else ""

    def cut(self) -> None:
        """Pull the plug."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Put it back."""
        ip("-n", self.name, "link", "set", "eth0", "up")

    @property
    def sent_elsewhere(self) -> int:
        """Packets sent to anywhere but the bridge."""
        (device,) = json.loads(ip("-n", self.name, "-s", "-j", "link", "show", "out"))
        return int(device["stats64"]["tx"]["packets"])

    def close(self) -> None:
        """End all that was started, and the namespace."""
        for process in self._started:
            end(process)
        with suppress(RuntimeError):
            ip("netns", "del", self.name)

    def _line(self, arguments: Sequence[object]) -> list[str]:
        """`ip netns exec` makes a mount namespace too: what is hidden in it is hidden to this process alone."""
        hide = "".join(f"mount -t tmpfs none {shlex.quote(str(path))} && " for path in self._hidden)
        python = shlex.join([sys.executable, "-m", *map(str, arguments)])
        return ["ip", "netns", "exec", self.name, "sh", "-c", f"{hide}exec {python}"]


def end(process: subprocess.Popen[bytes], *, kill: bool = False) -> None:
    """End a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill() if kill else member.terminate()
        for member in psutil.wait_procs(family, timeout=20)[1]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(timeout=30)


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "FEDXMR_", "RAY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1"}

"""The client of a deployment: Flower's SuperNode, looked after. However it ends, it is started again."""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedxmr import keys
from fedxmr.addresses import Address, free_port, obstacle
from fedxmr.commands import say
from fedxmr.errors import InputError
from fedxmr.folders import alone
from fedxmr.processes import environment, lines, show, start, stop

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before the next start, longer and longer while it ends soon."""

LONG = 60.0
"""Seconds after which a life counts as a long one, and the pauses begin anew."""

WHY = {
    "[code: 2004]": "the server does not accept this client's key: it is not registered there (send its administrator "
    "the .pub file), or a SuperNode with the same key was there within the last minute",
    "SuperNode terminated gracefully": "the SuperNode has ended: the server does not know its key any more, the clocks "
    "of the two machines differ by more than five minutes, or somebody ended it",
    "Runtime HTTP API failed to start": "its port was taken by another process meanwhile",
}
"""What the SuperNode said -> what it means."""

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONNECTED = re.compile(r"SuperNode ID: (\d+)")


@dataclass(frozen=True)
class Node:
    """Who a client is, whose client, and where its files are.

    keys: the folder of its private key and the authority's certificate; None for a server without TLS.
    threads: of torch; None: as many as there are cores.
    """

    client: int
    server: Address
    data: Path
    state: Path
    keys: Path | None
    threads: int | None = None

    @property
    def runs(self) -> Path:
        """What the client keeps of its runs: states, and in the end its models."""
        return self.state / "runs"

    @property
    def authority(self) -> Path | None:
        """The certificate of who must have signed the server's."""
        return self.keys and self.keys / keys.CA

    @property
    def key(self) -> Path | None:
        """The client's private key, the one file *.key in its folder. Raises InputError where there is not one."""
        if self.keys is None:
            return None
        found = sorted(self.keys.glob("*.key"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise InputError(f"{self.keys}: expected one private key, NAME.key, got {names}")
        return found[0]

    def check(self) -> None:
        """See that keys and data are good. Raises InputError for the first thing that is not."""
        if self.keys is None and not self.server.local:
            raise InputError(f"--insecure: expected a server on this machine such as 127.0.0.1:8443, got {self.server}")
        if self.authority is not None:
            keys.check_authority(self.authority)
        if (key := self.key) is not None:
            keys.read_client_key(key)
            if keys.exposed(key):
                raise InputError(f"{key}: expected a file that its owner alone can read (chmod 600)")
        for path in (self.data, self.state):
            if re.search(r"[\"\\\n]", str(path)):
                raise InputError(f"{str(path)!r}: expected a path without quotation marks, backslashes and line breaks")

    def arguments(self) -> list[str]:
        """Of one life of the SuperNode."""
        config = f'partition-id={self.client} data-path="{self.data}" state-dir="{self.runs}"'
        line = ["--superlink", str(self.server), "--node-config", config, "--isolation", "subprocess"]
        line += ["--host", "127.0.0.1", "--port", str(free_port())]
        if self.keys is None:
            return [*line, "--insecure"]
        return [*line, "--root-certificates", str(self.authority), "--auth-supernode-private-key", str(self.key)]

    def environment(self) -> dict[str, str]:
        """Of the SuperNode, and so of the ClientApp."""
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        return environment(self.state / "flwr", **threads)


def serve(node: Node) -> NoReturn:
    """Run a client until it is ended. Raises InputError before it starts."""
    node.check()
    about = _describe(node.data)
    with alone(node.state, "client"):
        node.runs.mkdir(mode=0o700, exist_ok=True)
        say(f"client {node.client} of {node.server}, {'without TLS' if node.keys is None else f'with {node.key}'}")
        say(f"data: {node.data}: {about}")
        say(f"state: {node.state}; runs, with this client's models, in {node.runs}")
        keep_alive(lambda: live(node))


def _describe(folder: Path) -> str:
    """What data there are in a folder. Raises InputError where they are not in the documented format."""
    from fedxmr.data import load_dataset

    data = load_dataset(str(folder))
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    counts = ", ".join(f"{len(part.labels)} {name}" for name, part in parts.items())
    widths = ", ".join(f"{modality} [{width}]" for modality, width in sorted(data.spec.dims.items()))
    return f"{counts} items of {data.spec.num_classes} classes, {widths}"


def keep_alive(
    live: Callable[[], str],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> NoReturn:
    """Live one life after another, with pauses that grow while lives are short. live: returns why it ended."""
    short = 0
    while True:
        began = clock()
        why = live()
        short = 0 if clock() - began >= LONG else short
        pause = PAUSES[min(short, len(PAUSES) - 1)]
        say(f"{why}; starting again in {pause:g} s")
        sleep(pause)
        short += 1


def live(node: Node) -> str:
    """One life of the SuperNode; returns why it ended, or could not begin.

    What it says is shown once it is connected; before, where there is no better word for why it was not.
    """
    if (why := obstacle(node.server, node.authority)) is not None:
        return why
    process = start("clients.node", node.arguments(), node.environment(), piped=True)
    voice = Voice(node.server)
    reader = lines(process, voice.hear)
    try:
        code = process.wait()
        reader.join(1.0)  # for its last words; a process of its own that hangs may hold the line
    finally:
        stop(process)
    if (why := why_ended(voice.last)) is not None:
        return why
    voice.show()
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"the SuperNode has ended {how}"


class Voice:
    """What a SuperNode says, held back until it is connected."""

    def __init__(self, server: Address) -> None:
        self.last: deque[str] = deque(maxlen=100)
        self._server = server
        self._held: list[str] = []
        self._connected = False

    def hear(self, line: str) -> None:
        """Take a line."""
        line = COLOUR.sub("", line).rstrip()
        self.last.append(line)
        self._held.append(line)
        if found := CONNECTED.search(line):
            self._connected = True
            say(f"connected to {self._server} as node {found[1]}")
        if self._connected:
            self.show()

    def show(self) -> None:
        """Show what is held back."""
        for line in self._held:
            show(line)
        self._held.clear()


def why_ended(said: Iterable[str]) -> str | None:
    """Why a SuperNode has ended, from its last lines; None where they are not known."""
    return next((meaning for words, meaning in WHY.items() if any(words in line for line in said)), None)

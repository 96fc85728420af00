"""Federations whose disk fills up or becomes read-only, or that run out of memory; test_exits.py looks at the outcome.

    unshare -m python -m tests.disk FOLDER SCENARIO ...

runs each scenario on a small disk of its own, in a fork of this process, which has imported everything already. Then
it gives the disk room, resumes the run, and prints what was seen as JSON. The disks are gone with the namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clients.app
import server.federation
from fedxmr import checkpoint, commands, events, pictures, recording, report  # noqa: F401 - imported before the forks
from fedxmr.recording import Recorder
from fedxmr.rounds import Client
from fedxmr.simulate import simulate
from fedxmr.snapshot import Snapshot, Store
from tests.federations import SMALL, same_bytes

BASE = (*SMALL, "federation.rounds=6", "federation.checkpoint_every=2", "runtime.engine=local")
PATIENCE = 120.0


@dataclass(frozen=True)
class Scenario:
    """Before call number `at` of `owner.name` the `harm` is done, given the disk's folder."""

    owner: Any
    name: str
    at: int
    harm: Callable[[Path], None]
    arguments: tuple[str, ...] = ("--no-pictures",)


def fill(disk: Path) -> None:
    """Leave no byte on the disk."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while ballast.write(bytes(size)):
                    pass


def make_read_only(disk: Path) -> None:
    """What a file system does that has met an error; here to a part of it, for the rest has open files."""
    part = str(disk / "run" / "checkpoint")
    mount("--bind", part, part)
    mount("-o", "remount,bind,ro", part)


def limit_files(_: Path) -> None:
    """No file may be larger than metrics.jsonl soon will be."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def limit_memory() -> None:
    """To what is there, and a little."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300_000_000, resource.RLIM_INFINITY))


def exhaust_torch(_: Path) -> None:
    """torch asks for more memory than there is."""
    limit_memory()
    torch.zeros(10**9)


def exhaust_python(_: Path) -> None:
    """Python does."""
    limit_memory()
    bytearray(4 * 10**9)


SCENARIOS = {
    "the first file": Scenario(recording, "save_partition", 1, fill),
    "metrics before a checkpoint": Scenario(Recorder, "write_up_to", 2, fill),
    "metrics after a checkpoint": Scenario(Recorder, "write_up_to", 4, fill),
    "timings": Scenario(Recorder, "time", 13, fill),
    "the first events": Scenario(events.Events, "__init__", 1, fill),
    "later events": Scenario(events.Events, "flush", 3, fill),
    "the folder of a checkpoint": Scenario(checkpoint, "begin", 2, fill),
    "a client's state in a checkpoint": Scenario(Snapshot, "save", 5, fill),
    "the server's state in a checkpoint": Scenario(checkpoint, "complete", 2, fill),
    "a client's state beyond the memory budget": Scenario(
        Store, "save", 10, fill, ("--no-pictures", "runtime.memory_budget=1B")
    ),
    "a client's final models": Scenario(clients.app, "save_models", 2, fill),
    "the summary": Scenario(server.federation, "write_json", 1, fill),
    "a picture": Scenario(matplotlib.figure.Figure, "savefig", 2, fill, ()),
    "a picture in TensorBoard": Scenario(events.Events, "picture", 1, fill, ()),
    "the report": Scenario(report, "write_json", 1, fill),
    "read-only checkpoints": Scenario(checkpoint, "begin", 2, make_read_only),
    "a limit on files": Scenario(Recorder, "write_up_to", 4, limit_files),
    "no memory for a client's tensors": Scenario(Client, "_train", 12, exhaust_torch),
    "no memory for a client's objects": Scenario(Client, "_train", 12, exhaust_python),
    "no memory for the server": Scenario(Recorder, "write_up_to", 4, exhaust_torch),
}


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def harm(scenario: Scenario, disk: Path) -> None:
    """Have the scenario's call do its harm first, from now on in this process."""
    original, calls = getattr(scenario.owner, scenario.name), iter(range(1, 10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == scenario.at:
            scenario.harm(disk)
        return original(*args, **kwargs)

    setattr(scenario.owner, scenario.name, wrapped)


def forked(log: Path, work: Callable[[], int]) -> dict[str, Any]:
    """Do something in a fork of this process: its exit code, and what it wrote to standard output and error."""
    if (child := os.fork()) == 0:
        code = 99
        try:
            for number, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        ended = os.waitpid(child, 0)
    written = {kind: Path(f"{log}.{kind}").read_text() for kind in ("out", "err")}
    return {"code": os.waitstatus_to_exitcode(ended[1]), **written}


def run_scenario(scenario: Scenario, folder: Path, whole: Path) -> dict[str, Any]:
    """Have it happen on a new disk, then give the disk room and go on."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk))
    out = disk / "run"
    anew = [*BASE, *scenario.arguments, "--out", str(out)]

    def harmed() -> int:
        harm(scenario, disk)
        return commands.run(simulate, anew)

    seen: dict[str, Any] = {"first": forked(folder / "first", harmed), "out": str(out)}
    subprocess.run(["umount", str(out / "checkpoint")], check=False, capture_output=True)
    seen["left"] = sorted(str(path.relative_to(disk)) for path in out.rglob("*"))
    again = anew
    if out.exists():
        again = ["--resume", str(out), *(a for a in scenario.arguments if a == "--no-pictures")]
    if out.exists() and (disk / "ballast").exists():  # with the disk still full: that must not cost anything
        seen["still full"] = forked(folder / "still", lambda: commands.run(simulate, again))
    mount("-o", "remount,size=40m", str(disk))
    seen["second"] = forked(folder / "second", lambda: commands.run(simulate, again))
    if seen["second"]["code"] == 0:
        shown = EventAccumulator(str(out))
        shown.Reload()
        seen["same"] = same_bytes(whole, out)
        seen["steps"] = [event.step for event in shown.Scalars("loss/client 0")]
        seen["hidden"] = sorted(str(path.relative_to(out)) for path in out.rglob(".*"))
        seen["pictures"] = sorted(path.name for path in out.glob("pictures/*.png") if path.stat().st_size > 1000)
    return seen


def main(folder: Path, *names: str) -> None:
    """Run scenarios."""
    whole = folder / "whole"
    ran = forked(folder / "whole-run", lambda: commands.run(simulate, [*BASE, "--no-pictures", "--out", str(whole)]))
    assert ran["code"] == 0, ran["err"]
    seen = {name: run_scenario(SCENARIOS[name], folder / str(i), whole) for i, name in enumerate(names)}
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""The run folder: what a run was, what it measured, and TensorBoard events.

metrics.jsonl holds only what two runs of one seed must agree on; whatever a clock measured goes to timings.jsonl.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch

from fedxmr import __version__
from fedxmr.checkpoint import rounds, verify
from fedxmr.config import Config, read_yaml, resolve
from fedxmr.data import Dataset
from fedxmr.errors import InputError, naming
from fedxmr.machine import cores
from fedxmr.partition import Part, load_partition, save_partition
from fedxmr.setting import own_device
from fedxmr.sources import scaling

if TYPE_CHECKING:
    from fedxmr.events import Events

log = logging.getLogger(__name__)

Line = dict[str, Any]

RECORDS = ("metrics", "timings")
"""The files of lines, <name>.jsonl."""


BEGINNINGS = ("environment.json", "partition.npz")
"""What a run folder has before it has its config.yaml."""


def prepare(out: Path, config: Config, data: Dataset | None, parts: Sequence[Part], overwrite: bool = False) -> None:
    """Make a run folder with the resolved configuration, the environment and the partition of the data.

    data: None in a deployment, where there are none, but a name for the experiment, made here once and for all.
    Raises InputError where there is something already, but for what another `prepare` began and did not end; with
    `overwrite` a run folder there is removed first.
    """
    marks = ("config.yaml", *BEGINNINGS)
    try:
        taken = out.is_symlink() or (out.exists() and not (out.is_dir() and all(map(_begun, out.iterdir()))))
        if taken:
            if out.is_symlink() or not (overwrite and all((out / mark).is_file() for mark in marks)):
                how = "it is no run folder" if overwrite else "pass --overwrite to replace it, or another --out"
                raise InputError(f"{out}: already exists; {how}")
            with claimed(out):
                shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        try:
            write_json(out / "environment.json", {**environment(config), **_beginnings(config, data)})
            if data is not None:
                save_partition(out / "partition.npz", parts)
            write_text(out / "config.yaml", config.to_yaml())
        except OSError:
            shutil.rmtree(out, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error


def _beginnings(config: Config, data: Dataset | None) -> dict[str, Any]:
    """What of the environment is settled as a run begins."""
    if data is None:
        return {"experiment": config.experiment + secrets.token_hex(8)}
    return {"data_sha256": data.sha256, "scaling": scaling(config, data)}


def experiment(out: Path, config: Config) -> str:
    """The name of the run that states belong to. Of deployments no two have the same: clients keep their states."""
    if not config.deployed:
        return config.experiment
    name = read_json(out / "environment.json").get("experiment")
    if not isinstance(name, str):
        raise InputError(f"{out / 'environment.json'}: expected the name of the experiment, got {name!r}")
    return name


def _begun(path: Path) -> bool:
    """Whether a file is one that `prepare` writes first, or half of one."""
    return path.name.lstrip(".").startswith((*BEGINNINGS, "config.yaml.")) and path.is_file()


_claims: set[Path] = set()


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """A run folder for this process alone, until it ends, however it ends. Raises InputError where another has it.

    Within it the process may claim the folder again.
    """
    if (key := out.resolve()) in _claims:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise InputError(f"{out}: another process is working in this run folder") from error
    except OSError:  # a file system without locks
        log.warning("%s: cannot be locked: take care that no other process works in it", out)
    _claims.add(key)
    try:
        yield
    finally:
        _claims.discard(key)
        os.close(folder)


def add_environment(out: Path, **facts: Any) -> None:
    """Add to environment.json what is known only once an engine runs."""
    write_json(out / "environment.json", {**read_json(out / "environment.json"), **facts})


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises InputError where it is not an object, or cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


END_PRODUCTS = (
    "clients",
    "shared-*.safetensors",
    "pictures",
    "precisions.safetensors",
    "retrieval.json",
    "summary.json",
)
"""What is there only when a run has ended."""


def reopen(out: Path, config: Config, data: Dataset | None, parts: Sequence[Part]) -> bool:
    """See that a run folder can be resumed with this configuration, and take away what only an ended run has.

    Returns whether all rounds are done and only the report is missing.
    Raises InputError naming the keys that differ, for other data, and for a run that has nothing left to do.
    """
    before = resolve(read_yaml(out / "config.yaml"))
    changed = [key for key in _differing(before.model_dump(), config.model_dump()) if key != "federation.rounds"]
    if changed:
        raise InputError(f"{out}: cannot be resumed with another configuration; changed: {', '.join(changed)}")
    _check_beginnings(out, config, data, parts)
    has = config.federation.rounds
    summary = read_json(out / "summary.json") if (out / "summary.json").is_file() else {}
    if summary.get("rounds") == has:
        if has_ended(out, config):
            raise InputError(f"{out}: this run has ended; a larger federation.rounds would continue it")
        if not config.deployed:
            _sweep(out, ())
            return True
    last = verify(out, experiment(out, config)) if rounds(out) else {}  # without one it goes on from the start
    had = max(before.federation.rounds, *(known.get("rounds", 0) for known in (summary, last)))
    if has < had:
        raise InputError(f"{out}: federation.rounds may grow, from {had}, got {has}")
    if last:
        _check_records(out, last["standing"])
    try:
        _sweep(out, END_PRODUCTS)
        if has != before.federation.rounds:
            write_text(out / "config.yaml", config.to_yaml())
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error
    return False


def has_ended(out: Path, config: Config) -> bool:
    """Whether a run has nothing left to do.

    In a deployment there is no report, for which one needs the data; but clients that were away in its last messages
    have yet to get their models.
    """
    if not config.deployed:
        return (out / "retrieval.json").is_file()
    if not (out / "summary.json").is_file():
        return False
    summary = read_json(out / "summary.json")
    return not any(entry["round"] > summary["rounds"] for entry in (*summary["failed"], *summary["rejected"]))


def _check_beginnings(out: Path, config: Config, data: Dataset | None, parts: Sequence[Part]) -> None:
    """See that a run began with this configuration and these data. Raises InputError."""
    environment = read_json(out / "environment.json")
    changed = list(_differing(environment.get("identity", {}), config.identity))
    if changed:
        raise InputError(f"{out / 'config.yaml'}: is not what the run began with; changed: {', '.join(changed)}")
    if data is None:  # the clients say what there is to say of theirs as they register
        return
    if environment.get("data_sha256") != data.sha256:
        raise InputError(f"{out}: cannot be resumed: the data of {data.name} have changed since it began")
    saved = load_partition(out / "partition.npz")
    if len(saved) != len(parts) or not all(torch.equal(a.items, b.items) for a, b in zip(saved, parts, strict=True)):
        raise InputError(f"{out}: its partition is not the one this configuration makes")


def _sweep(out: Path, patterns: Sequence[str]) -> None:
    """Take away what matches, and halves of files from a process that was killed. Raises InputError as `claimed`."""
    with claimed(out):
        for path in [path for pattern in patterns for path in out.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in out.rglob(".*"):
            if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
                path.unlink()


def _check_records(out: Path, facts: Mapping[str, Any]) -> None:
    """See that the records that a checkpoint counts on are those of its time. Raises InputError."""
    for name in RECORDS:
        path = out / f"{name}.jsonl"
        if not path.is_file() or _digest(path, facts["records"][name]["size"]) != facts["records"][name]:
            raise InputError(f"{path}: is not what it was at the checkpoint of round {facts['round']}")


def outlook(out: Path, config: Config) -> str:
    """How a run that has stopped can go on, for a user."""
    if has_ended(out, config):
        return f"this run has ended; its results are in {out}"
    last = max(rounds(out), default=0)
    after = f"from the checkpoint of round {last}" if last else "from the start, as there is no checkpoint"
    where = "with its report" if (out / "summary.json").is_file() else after
    how = f"python -m fedxmr.simulate --resume {shlex.quote(str(out))}"
    if config.deployed:
        how = "submit it again, with the same configuration and run folder"
    return f"what was measured so far is in {out}; to go on {where}: {how}"


def _digest(path: Path, size: int = -1) -> dict[str, Any]:
    """The size and SHA-256 of a file, or of its first `size` bytes."""
    with path.open("rb") as file:
        content = file.read(size)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys at which two configurations differ."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}"


def environment(config: Config) -> dict[str, Any]:
    """What could explain a difference between two runs that are otherwise equal."""
    packages = ("flwr", "ray", "torch", "numpy", "scipy", "safetensors", "pydantic", "tensorboard")
    return {
        "fedxmr": __version__,
        "identity": config.identity,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "cores": cores(),
        "threads": config.runtime.threads or cores(),
        "device": str(own_device(config)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: Path) -> list[Line]:
    """The lines of a .jsonl file."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


class Recorder:
    """An open run folder. What belongs to a round waits until it is whole: its scores arrive a round later."""

    def __init__(self, out: Path, position: Mapping[str, Any] | None = None) -> None:
        """position: what `position` gave at a checkpoint; everything recorded later is cut off.

        Raises InputError where another process records in this folder.
        """
        self.out = out
        at = position or {**{name: {"size": 0} for name in RECORDS}, "lines": [], "scalars": [], "written": None}
        with ExitStack() as opened:
            opened.enter_context(claimed(out))
            self._metrics, self._timings = (
                opened.enter_context(_open_at(out / f"{name}.jsonl", at[name]["size"])) for name in RECORDS
            )
            self._opened = opened.pop_all()
        self._lines = {(int(line["round"]), int(line["client"])): line for line in at["lines"]}
        self._scalars: list[tuple[int, str, float]] = [(round, tag, value) for round, tag, value in at["scalars"]]
        self._written: int | None = at["written"]
        self._events: Events | None = None

    def position(self) -> dict[str, Any]:
        """Where the records stand, for a checkpoint."""
        # what a checkpoint counts on is to last as long as it
        for file in (self._metrics, self._timings):
            with naming(file.name):
                os.fsync(file.fileno())
        if self._events is not None:
            self._events.flush()
        files = {name: _digest(self.out / f"{name}.jsonl") for name in RECORDS}
        return {
            **files,
            "lines": [dict(line) for line in self._lines.values()],
            "scalars": list(self._scalars),
            "written": self._written,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._opened as closing:  # all of them, also where one cannot write its last lines
            if self._events is not None:
                closing.callback(self._events.close)
            # not the events: an interruption may have come while TensorBoard was imported
            self._write_lines(sys.maxsize)

    def note(self, round: int, client: int, **facts: Any) -> None:
        """Add facts to the line of a round and client; numbers of bytes add up."""
        line = self._lines.setdefault((round, client), {"round": round, "client": client})
        for name, value in facts.items():
            line[name] = line[name] + value if name.startswith("bytes_") and name in line else value

    def write_up_to(self, round: int) -> None:
        """Write what is known of all rounds up to this one: nothing will be added to them."""
        self._write_lines(round)
        for at, tag, value in self._scalars:
            if at <= round:
                self.events.scalar(tag, value, at)
                self._written = max(at, self._written or 0)
        if self._events is not None:
            self._events.flush()
        self._scalars = [scalar for scalar in self._scalars if scalar[0] > round]

    def _write_lines(self, round: int) -> None:
        with naming(self._metrics.name):
            for key in sorted(key for key in self._lines if key[0] <= round):
                self._metrics.write(json.dumps(self._lines[key]) + "\n")
                del self._lines[key]
            self._metrics.flush()

    def time(self, round: int, client: int | None, seconds: Mapping[str, float]) -> None:
        """What a round took: a client's parts by its own clock, or (client None) the driver's."""
        line: Line = {"round": round} if client is None else {"round": round, "client": client}
        with naming(self._timings.name):
            self._timings.write(json.dumps({**line, "seconds": {k: round_to(s) for k, s in seconds.items()}}) + "\n")
            self._timings.flush()

    @property
    def events(self) -> Events:
        """TensorBoard's file; opened late, for its import would delay the first round."""
        if self._events is None:
            from fedxmr.events import Events

            # what was written after the checkpoint that a run goes on from is not shown
            self._events = Events(self.out, first=(self._written or 0) + 1)
        return self._events

    def scalars(self, round: int, values: Mapping[str, float]) -> None:
        """TensorBoard scalars of a round."""
        self._scalars += [(round, tag.replace("->", "_to_"), value) for tag, value in values.items()]


@contextmanager
def _open_at(path: Path, position: int) -> Iterator[TextIO]:
    """A file to be continued at a position, cut off there."""
    path.touch()
    with naming(path), path.open("r+", encoding="utf-8") as file:
        file.seek(position)
        file.truncate()
        yield file


def round_to(seconds: float) -> float:
    """Seconds to the tenth of a millisecond: more is noise."""
    return round(seconds, 4)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this runs from, with + where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "")

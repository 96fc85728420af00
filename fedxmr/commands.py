"""What all commands share: their options, one line for every expected error, and documented exit codes."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
import typer

from fedxmr.errors import FederationError, InputError, one_line, out_of_memory, unknown

if TYPE_CHECKING:
    from fedxmr.config import Config

OK, A_MISTAKE, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: every round stood; a mistake in fedxmr; bad input; no going on, or no disk or memory; Ctrl-C.

SIGTERM and SIGHUP end a run as Ctrl-C does, with 143 and 129. The last line says whether a run can go on.
"""

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Nothing is sent anywhere that the user did not ask for."""

SWIFT = {"GOMP_SPINCOUNT": "5000", "THP_MEM_ALLOC_ENABLE": "1"}
"""Read by torch as it is loaded, and left to a user who has set them.

Threads that wait for each other soon sleep: where they spin as long as is usual, another busy process on the machine
makes a step take ten times as long; where they do not spin at all, a quiet machine is a tenth slower. And large tensors
are of large pages: the fresh gradients of a step are ten thousand small ones.
"""


class ProtocolName(StrEnum):
    """How the reported round is chosen."""

    honest = "honest"
    paper = "paper"


class EngineName(StrEnum):
    """What carries messages between server and clients."""

    auto = "auto"
    local = "local"
    ray = "ray"


class PrecisionName(StrEnum):
    """How products are computed in training."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class EvaluateOn(StrEnum):
    """Which items the reported scores are of."""

    test = "test"
    all_test = "all-test"


class TaskName(StrEnum):
    """Which classes are seen in training."""

    standard = "standard"
    zero_shot = "zero-shot"
    generalised = "generalised-zero-shot"


def option(help: str, *names: str) -> Any:
    """An option of a command; by default its name is the parameter's."""
    return typer.Option(*names, help=help, show_default=False)


Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any configuration key, such as strategy.gamma=1.0")
]
ConfigFile = Annotated[Path | None, option("a YAML file, such as experiments/default.yaml")]
MethodName = Annotated[str | None, option("a method of the file's experiment, such as fedavg with its own optimiser")]
DatasetName = Annotated[
    str | None,
    option(
        "digits (default), wikipedia, wikipedia-multi, pascal, mfeat, iaprtc12, synthetic, the path of a folder, or "
        "with your files in --data-dir pascal-vgg, wikipedia-vgg, nus-wide-10k, mirflickr, coco, xmedia, xmedianet, cub"
    ),
]
Task = Annotated[TaskName | None, option("zero-shot: some classes are unseen in training; generalised adds its scores")]
Features = Annotated[str | None, option("which features of the data set, such as sift-lda")]
DataDir = Annotated[Path | None, option("where to look for data files first")]
Clients = Annotated[int | None, option("how many data owners")]
PartitionScheme = Annotated[str | None, option("iid, dirichlet, shards, quantity, missing-modality or unpaired")]
LearnerName = Annotated[str | None, option("dscmr (default), dlsl, drsl, jfse, mccn, or package.module:Class")]
Rounds = Annotated[int | None, option("communication rounds")]
Seed = Annotated[int | None, option("of everything that is drawn")]
Protocol = Annotated[ProtocolName | None, option("paper also reports the best round on test, a leak")]
EvaluateEvery = Annotated[int | None, option("rounds between evaluations; 0: never")]
EvaluateOnPart = Annotated[EvaluateOn | None, option("all-test is the published test part, validation rows included")]
Engine = Annotated[EngineName | None, option("what carries messages between server and clients")]
Precision = Annotated[PrecisionName | None, option("bfloat16: quicker where the hardware has it, a little less exact")]
Threads = Annotated[int | None, option("torch threads of a process; default: its cores; 1 for bit-equal runs")]
Device = Annotated[str | None, option("cpu, cuda, cuda:1, ...; default: cuda where there is one")]
Workers = Annotated[int | None, option("ray: worker processes; default: what divides cores and clients per round")]
CpusPerClient = Annotated[int | None, option("ray: cores of a worker, which trains one client at a time")]
GpusPerClient = Annotated[float | None, option("ray: GPUs of a worker; 0.25 lets four share one")]
RayAddress = Annotated[
    str | None, option("ray: host:port of a running cluster; default: a private one, on this machine")
]
MemoryBudget = Annotated[str | None, option("memory for living clients, such as 8GB; default: half; the rest in files")]
Out = Annotated[Path | None, option("the run folder; default: a new one in runs/")]
Overwrite = Annotated[bool, option("replace a run folder that exists", "--overwrite")]
Resume = Annotated[Path | None, option("a run folder: go on from its last checkpoint; rounds may grow")]
Pictures = Annotated[bool, typer.Option("--pictures/--no-pictures", help="draw t-SNE and precision curves")]

Examples = Annotated[
    int,
    typer.Option("--examples", min=0, help="a page of examples: so many of the gallery per query", show_default=False),
]


def configure(
    file: Path | None,
    options: Mapping[str, Any],
    assignments: list[str] | None,
    method: str | None = None,
    resume: Path | None = None,
) -> Config:
    """The configuration of a command line: defaults, the strategy's preset, the file, options, assignments.

    options: dotted key -> value, None where it was not given. method: one of the file's experiment, laid over the file.
    resume: a run folder whose configuration comes first of all. Raises InputError.
    """
    from fedxmr.config import merged, nested, override, read_yaml, resolve

    if resume is not None and file is not None:
        raise InputError("--resume: takes its configuration from the run folder, expected no --config")
    source = resume / "config.yaml" if resume is not None else file
    tree = read_yaml(source) if source else {}
    experiment, _ = (tree.pop(section, None) for section in ("experiment", "sweep"))  # these are for fedxmr.reproduce
    if method is not None:
        from fedxmr.experiment import read_experiment

        if file is None or experiment is None:
            raise InputError(f"--method {method}: expected --config with a file that has a section 'experiment'")
        methods = read_experiment(file)[0].methods
        if method not in methods:
            raise unknown(f"method of {file}", method, methods)
        tree = merged(tree, methods[method].set)
    for key, value in options.items():
        if value is not None:
            tree = merged(tree, nested(key, str(value) if isinstance(value, Path | StrEnum) else value))
    return resolve(override(tree, assignments or []))


def say(line: object) -> None:
    """Print a line or a table to standard output."""
    from rich.console import Console

    Console(highlight=False).print(line, soft_wrap=isinstance(line, str), markup=False)


Command = Callable[..., None]
"""A command's function: its parameters are the options, its docstring the help."""


def main(command: Command | Mapping[str, Command], about: str | None = None) -> NoReturn:
    """Run a command as a program, and end at once: Python's own shutdown, with all that was imported, takes seconds."""
    code = run(command, about=about)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it
            stream.flush()
    os._exit(code)


def run(
    command: Command | Mapping[str, Command], arguments: Sequence[str] | None = None, about: str | None = None
) -> int:
    """Run a command's function on the command line's arguments; returns the exit code.

    command: one, or several by name, of which the first argument chooses; about: what several have in common.
    """
    os.environ.update(QUIET)
    os.environ.update({name: value for name, value in SWIFT.items() if name not in os.environ})
    application = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=about)
    caught: list[BaseException] = []

    def catching(command: Command) -> Command:
        @functools.wraps(command)
        def caught_in(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
            except BaseException as error:  # typer would turn some into exit codes of its own
                caught.append(error)

        return caught_in

    if isinstance(command, Mapping):
        application.callback()(lambda: None)  # else one alone would lose its name
        for name, one in command.items():
            application.command(name)(catching(one))
    else:
        application.command()(catching(command))
    ended = Ended()
    try:
        with ended.by_signals():
            code = int(application(arguments, standalone_mode=False) or OK)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        caught = [error]
    except click.ClickException as error:
        return _complain(error.format_message(), BAD_INPUT)
    if caught:
        return account(caught[0], ended.code)
    return ended.code if code == INTERRUPTED else code


def account(error: BaseException, interrupted: int = INTERRUPTED) -> int:
    """Say in one line why a command ended, and in another, where there is one, what can be done about it.

    interrupted: the exit code where a signal has ended it.
    Returns the exit code. An error that nobody expected is raised again, to be shown whole.
    """
    match error:
        case InputError():
            return _complain(str(error), BAD_INPUT, error)
        case FederationError():
            return _complain(str(error), FAILED, error)
        case KeyboardInterrupt() | click.exceptions.Abort():
            return _complain(f"interrupted by {signal.Signals(interrupted - 128).name}", interrupted, error)
        case OSError():
            return _complain(f"{error.filename or 'a file'}: {error.strerror or error}", FAILED, error)
        case SystemExit():  # rich's, whose message is lost
            return _complain("standard output or error cannot be written: Broken pipe", FAILED, error)
        case _ if out_of_memory(error):
            return _complain(f"out of memory: {one_line(error)}", FAILED, error)
    raise error


CLOSING = 20.0
"""Seconds a command has to close what is open after a signal; further signals are not heeded meanwhile."""


class Ended:
    """Which signal ended a command. `code` is its exit code."""

    def __init__(self) -> None:
        self.code = INTERRUPTED
        self._since = -math.inf

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Within it SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that whatever is open is closed.

        A signal that was ignored before (SIGHUP under nohup, say) still is.
        """

        def end(number: int, _: object) -> None:
            if time.monotonic() < self._since + CLOSING:
                return
            self.code = 128 + number  # noted, for the exception may be replaced on its way
            self._since = time.monotonic()
            raise KeyboardInterrupt

        before = {
            number: signal.signal(number, end)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _complain(line: str, code: int, error: BaseException | None = None) -> int:
    """Write a line, and below it an error's notes; `code`."""
    with suppress(OSError):  # nobody reads it
        sys.stderr.write("\n".join([f"error: {line}", *getattr(error, "__notes__", [])]) + "\n")
        sys.stderr.flush()
    return code

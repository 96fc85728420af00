"""The Flower ServerApp: it opens the run folder and lets server.federation run, again after every loss of states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedxmr import recording, sources
from fedxmr.commands import A_MISTAKE, OK, account, say
from fedxmr.config import Config
from fedxmr.data import Dataset
from fedxmr.engines.carrier import scratch
from fedxmr.errors import InputError, StateLost
from fedxmr.progress import Progress
from fedxmr.recording import Recorder
from fedxmr.report import report, report_deployed
from fedxmr.setting import check
from server.federation import Federation
from server.nodes import FLOWER, Nodes
from server.recovery import Recovery, go_back
from server.standing import Standing

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation and fill its run folder. Raises FederationError where it cannot go on.

    The run-config's keys: `config`, as YAML text, and `out`, the run folder. Our own engines run where a command has
    prepared that folder and reports afterwards; under Flower's own runtime all of it happens here.
    """
    engine = getattr(grid, "engine", FLOWER)
    with nullcontext() if engine != FLOWER else _exit_code_said():
        config = Config.from_yaml(str(context.run_config["config"]))
        out = Path(str(context.run_config["out"]))
        if engine != FLOWER:
            federate(config, out, grid, resume=bool(context.run_config.get("resume")))
        elif not out.is_absolute():
            raise InputError(f"out: expected the absolute path of a run folder in --run-config, got {str(out)!r}")
        elif config.deployed:
            deploy(config, out, grid)
        else:
            data = prepare(config, out)
            with scratch(out):
                federate(config, out, grid)
            report(config, data, out, pictures=True)


def prepare(config: Config, out: Path) -> Dataset:
    """Check everything that can be checked and make the run folder; the data set. Raises InputError."""
    data = sources.dataset(config)
    parts = sources.parts(config)
    check(config, data)
    recording.prepare(out, config, data, parts)
    return data


def deploy(config: Config, out: Path, grid: Grid) -> None:
    """A run with clients that have data of their own; or the rest of it, where `out` has the beginning of it."""
    resume = (out / "config.yaml").is_file()
    if resume:
        recording.reopen(out, config, None, ())
    else:
        recording.prepare(out, config, None, ())
    say(f"experiment {recording.experiment(out, config)}: so the folder is called that each client keeps of it")
    with recording.claimed(out):
        try:
            federate(config, out, grid, resume=resume)
            report_deployed(config, out)
        except BaseException as error:
            error.add_note(recording.outlook(out, config))
            raise


@contextmanager
def _exit_code_said() -> Iterator[None]:
    """Within it a run's log ends as a command does, and with the exit code that a command would have.

    Of that Flower says nothing: it takes a run that has failed for a success.
    """
    try:
        yield
    except BaseException as error:
        try:
            code = account(error)
        except BaseException:
            code = A_MISTAKE
            raise
        finally:
            say(f"exit code: {code}")
        raise
    say(f"exit code: {OK}")


def federate(config: Config, out: Path, grid: Grid, *, resume: bool = False) -> None:
    """The whole run, in as many goes as it takes. resume: from the newest checkpoint."""
    experiment = recording.experiment(out, config)
    nodes = Nodes(grid, config.federation, experiment)
    standing = Standing.newest(out, experiment) if resume else Standing()
    recovery = Recovery(config.federation)
    with Progress(config, nodes.activity) as progress:
        while True:
            try:
                with Recorder(out, standing.records) as recorder:
                    Federation(config, nodes, recorder, progress, standing, recovery).run()
            except StateLost as lost:
                recovery.learn(lost)
                standing = go_back(out, experiment, lost, standing)
                progress.say(f"states lost in {_when(lost)}: {lost}; going on from {_after(standing.round)}")
            else:
                return


def _when(lost: StateLost) -> str:
    return f"round {lost.round}" if lost.round else "the start query"


def _after(round: int) -> str:
    return f"the checkpoint of round {round}" if round else "the start"

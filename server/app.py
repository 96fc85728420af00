"""The Flower ServerApp: it opens the run folder and lets server.federation run, again after every loss of states."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedxmr import recording, sources
from fedxmr.config import Config
from fedxmr.data import Dataset
from fedxmr.engines.carrier import scratch
from fedxmr.errors import InputError, StateLost
from fedxmr.progress import Progress
from fedxmr.recording import Recorder
from fedxmr.report import report
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
    config = Config.from_yaml(str(context.run_config["config"]))
    out = Path(str(context.run_config["out"]))
    nodes = Nodes(grid, config.federation)
    if nodes.engine != FLOWER:
        federate(config, out, nodes, resume=bool(context.run_config.get("resume")))
        return
    data = prepare(config, out)
    with scratch(out):
        federate(config, out, nodes)
    report(config, data, out, pictures=True)


def prepare(config: Config, out: Path) -> Dataset:
    """Check everything that can be checked and make the run folder; the data set. Raises InputError."""
    if not out.is_absolute():
        raise InputError(f"out: expected the absolute path of a new run folder in --run-config, got {str(out)!r}")
    data = sources.dataset(config)
    parts = sources.parts(config)
    check(config, data)
    recording.prepare(out, config, data, parts, overwrite=False)
    return data


def federate(config: Config, out: Path, nodes: Nodes, *, resume: bool = False) -> None:
    """The whole run, in as many goes as it takes. resume: from the newest checkpoint."""
    standing = Standing.newest(out, config.experiment) if resume else Standing()
    recovery = Recovery(config.federation)
    with Progress(config, nodes.activity) as progress:
        while True:
            try:
                with Recorder(out, standing.records) as recorder:
                    Federation(config, nodes, recorder, progress, standing, recovery).run()
            except StateLost as lost:
                recovery.learn(lost)
                standing = go_back(out, config.experiment, lost, standing)
                progress.say(f"states lost in {_when(lost)}: {lost}; going on from {_after(standing.round)}")
            else:
                return


def _when(lost: StateLost) -> str:
    return f"round {lost.round}" if lost.round else "the start query"


def _after(round: int) -> str:
    return f"the checkpoint of round {round}" if round else "the start"

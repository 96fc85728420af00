"""The Flower ServerApp: it opens the run folder and lets server.federation run, again after every loss of states."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedxmr.config import Config
from fedxmr.errors import StateLost
from fedxmr.progress import Progress
from fedxmr.recording import Recorder
from server.federation import Federation
from server.nodes import Nodes
from server.recovery import Recovery, go_back
from server.standing import Standing

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation and fill its run folder. Raises FederationError where it cannot go on."""
    config = Config.from_yaml(str(context.run_config["config"]))
    out = Path(str(context.run_config["out"]))
    standing = Standing.newest(out) if context.run_config.get("resume") else Standing()
    nodes, recovery = Nodes(grid, config.federation), Recovery(config.federation)
    with Progress(config, nodes.activity) as progress:
        while True:
            try:
                with Recorder(out, standing.records) as recorder:
                    Federation(config, nodes, recorder, progress, standing, recovery).run()
            except StateLost as lost:
                recovery.learn(lost)
                standing = go_back(out, lost, standing)
                progress.say(f"lost in round {lost.round}: {lost}; going on from round {standing.round}")
            else:
                return

"""The Flower ServerApp: it opens the run folder and lets server.federation run."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedxmr.config import Config
from fedxmr.progress import Progress
from fedxmr.recording import Recorder
from server.federation import Federation
from server.nodes import Nodes
from server.standing import Standing

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation and fill its run folder. Raises FederationError where it cannot go on."""
    config = Config.from_yaml(str(context.run_config["config"]))
    out = Path(str(context.run_config["out"]))
    standing = Standing.newest(out) if context.run_config.get("resume") else Standing()
    with Recorder(out, standing.records) as recorder, Progress(config) as progress:
        Federation(config, Nodes(grid, config.federation), recorder, progress, standing).run()

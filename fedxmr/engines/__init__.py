"""The engines: what carries messages between the ServerApp and the ClientApps of a simulation."""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flwr.serverapp import ServerApp

    from fedxmr.config import Config, RuntimeConfig

ENGINES = {"local": "fedxmr.engines.local", "ray": "fedxmr.engines.ray"}
"""Name -> module, imported when chosen. Each has `check(config)` and `run(server, client, config, run_config)`."""


@dataclass(frozen=True)
class Engine:
    """An engine and, where it was not asked for by name, why it was chosen."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name

    def check(self, config: Config) -> None:
        """See, as far as can be seen before it starts, that what is asked of it is there. Raises InputError."""
        self._module(config).check(config)

    def remarks(self, config: Config) -> tuple[str, ...]:
        """What a user should know of this engine with what is asked of it, one line each."""
        deadline = config.federation.deadline
        if self.name != "local" or deadline == type(config.federation).model_fields["deadline"].default:
            return ()
        return (
            f"deadline: the engine local cannot end a client at work: what takes it more than {deadline:g} s does not "
            "count, but is waited for",
        )

    def run(self, server: ServerApp, client: str, config: Config, run_config: Mapping[str, Any]) -> None:
        """Run both apps to the end; client: "module:attribute" of the ClientApp. What the ServerApp raises comes out.

        run_config: `config`, the configuration as YAML, `out`, the run folder, and `resume`.
        """
        self._module(config).run(server, client, config, run_config)

    def _module(self, config: Config) -> Any:
        if self.name == "ray" and config.runtime.ray_address is None:
            _guard()
        return importlib.import_module(ENGINES[self.name])


def _guard() -> None:
    """Let only who has a token talk to the private Ray: its processes listen on every address of the machine.

    And let nothing that is meant for another Ray reach it. Ray looks at this once, when it is imported; where somebody
    has imported it already, it stays as they have it.
    """
    if "ray" not in sys.modules:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def choose(runtime: RuntimeConfig) -> Engine:
    """The engine of a run; `auto` is ray where there is a GPU or an option that only ray has, else local."""
    if runtime.engine != "auto":
        return Engine(runtime.engine)
    if only := runtime.only_ray:
        return Engine("ray", f"auto: {only[0]} is given")
    if runtime.device in ("auto", "cuda") and torch.cuda.is_available():
        return Engine("ray", "auto: there is a GPU")
    return Engine("local", "auto: no GPU, no Ray address")

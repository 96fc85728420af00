"""`flwr run . local`: Flower's own simulation runtime carries the same ServerApp and ClientApp to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.federations import configured, federate, same_bytes

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> str:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


@pytest.fixture
def flower(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of Flower's commands, whose detached SuperLink is ended afterwards."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
        "FLWR_LOCAL_CONTROL_API_PORT": free_port(),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    yield environment
    mine = str(tmp_path / "flwr")
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "flower-superlink" in line and mine in line:
            family = [process, *process.children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.terminate()
            for member in psutil.wait_procs(family, timeout=20)[1]:
                member.kill()


def flwr(environment: dict[str, str], *arguments: str) -> str:
    command = [str(BIN / "flwr"), *arguments]
    ran = subprocess.run(
        command, cwd=project(environment), env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return ran.stdout + ran.stderr


def project(environment: dict[str, str]) -> Path:
    """A copy of what Flower bundles, in a folder whose name it takes."""
    folder = Path(environment["FLWR_HOME"]).parent / "fedxmr"
    if not folder.exists():
        folder.mkdir()
        shutil.copy(ROOT / "pyproject.toml", folder)
        for package in ("fedxmr", "server", "clients"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(environment: dict[str, str], tmp_path: Path, text: str, out: str) -> str:
    """Run to the end; what is shown on the way."""
    file = tmp_path / "run.toml"
    file.write_text(f"config = {json.dumps(text)}\nout = {json.dumps(out)}\n")
    return flwr(
        environment,
        *("run", ".", "local", "--stream", "--run-config", str(file)),
        *("--federation-config", "num-supernodes=3 client-resources-num-cpus=1"),
    )


def status(environment: dict[str, str]) -> str:
    listed = flwr(environment, "list", "local", "--format", "json")
    runs = json.loads(listed[listed.index("{") :])["runs"]
    return str(runs[0]["status"])


@pytest.mark.long
def test_flowers_own_runtime_gives_the_same_bytes(tmp_path, flower):
    config = configured("federation.checkpoint_every=2")
    shown = submit(flower, tmp_path, config.to_yaml(), str(tmp_path / "run"))
    assert wait_for(flower) == "finished:completed", shown
    assert "cross-client" in shown
    federate(tmp_path / "whole", "federation.checkpoint_every=2")
    assert same_bytes(tmp_path / "whole", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["engine"] == "flower"
    assert (tmp_path / "run" / "retrieval.json").is_file()
    assert not (tmp_path / "run" / "states").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "out", "says"),
    [
        (
            "strategy: {gama: 1}",
            "{tmp}/run",
            "unknown configuration key 'strategy.gama'; did you mean 'strategy.gamma'?",
        ),
        ("{}", "run", "out: expected the absolute path of a run folder in --run-config, got 'run'"),
    ],
)
def test_bad_input_fails_the_run_and_says_why(tmp_path, flower, text, out, says):
    shown = submit(flower, tmp_path, text, out.format(tmp=tmp_path))
    assert says in shown
    assert wait_for(flower).startswith("finished:failed")


def wait_for(environment: dict[str, str]) -> str:
    end = time.monotonic() + 60
    while not (found := status(environment)).startswith("finished") and time.monotonic() < end:
        time.sleep(0.5)
    return found

"""Runs whose clients read folders of their own and whose server has no data: the same apps, without Flower's processes.

test_deployment.py has the same between real machines.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message

from clients.app import app as client_app
from clients.residents import residents
from fedxmr import commands, wire
from fedxmr.config import Config, override, resolve
from fedxmr.data import split
from fedxmr.engines.carrier import SERVER_NODE, context, identify
from fedxmr.engines.local import LocalGrid
from fedxmr.errors import FederationError, InputError
from fedxmr.sources import dataset, parts
from server.app import app as server_app
from server.nodes import FLOWER
from tests.federations import SMALL, configured, federate, same_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]

OWN = (*(a for a in SMALL if not a.startswith("dataset.")), "dataset.name=own-folder")


class Killed(BaseException):
    """The server's process has died."""


class Machines(LocalGrid):
    """Clients on machines of their own: each with a data and a state folder, and a new process for every message.

    dies_at: the number of the answer after which the server's process dies; the client has answered.
    """

    engine = FLOWER

    def __init__(self, config: Config, root: Path, out: Path, dies_at: int | None = None) -> None:
        super().__init__(client_app, config.federation.clients, {"config": config.to_yaml(), "out": str(out)})
        self._place = {}
        for k in range(config.federation.clients):
            places = {"data-path": str(root / f"client-{k}"), "state-dir": str(root / f"state-{k}")}
            self._contexts[k + 2] = context(k + 2, {"partition-id": k, **places}, self._run_config)
        self._left = dies_at

    def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        replies = []
        for message in messages:
            residents.__init__()
            replies += super().exchange([message], timeout)
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    raise Killed
        return replies

    def run_server(self) -> None:
        identify(SERVER_NODE)
        server_app(self, context(SERVER_NODE, {}, self._run_config))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("server.nodes.POLL", 0.0)


@pytest.fixture
def root(tmp_path) -> Path:
    """The folders of three clients of the small data set."""
    config = configured()
    split.write(tmp_path / "split", split.divide(dataset(config), parts(config), seed=0))
    return tmp_path / "split"


def deployed(*assignments: str) -> Config:
    return resolve(override({}, [*OWN, *assignments]))


def deploy(root: Path, out: Path, *assignments: str, dies_at: int | None = None) -> None:
    Machines(deployed(*assignments), root, out, dies_at).run_server()


def test_it_has_the_bytes_of_the_simulation_and_the_server_none_of_the_data(root, tmp_path, capsys):
    deploy(root, tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "exit code: 0"
    federate(tmp_path / "simulated")
    assert same_bytes(tmp_path / "simulated", tmp_path / "run")
    there = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("events")}
    files = {"config.yaml", "environment.json", "metrics.jsonl", "timings.jsonl", "summary.json", "checkpoint"}
    assert there == files | {"shared-last.safetensors", "shared-selected.safetensors"}


@pytest.mark.parametrize("dies_at", [0, 2, 3, 4, 7, 10, 13, 15, 17])
def test_a_server_that_dies_goes_on_from_its_last_round_to_the_same_bytes(root, tmp_path, dies_at):
    """At the start, in the middle of a round, between two, in the flushing message, and in the farewell."""
    out = tmp_path / "run"
    with pytest.raises(Killed):
        deploy(root, out, dies_at=dies_at)
    began = json.loads((out / "environment.json").read_text())["experiment"]
    deploy(root, out)
    federate(tmp_path / "simulated")
    assert same_bytes(tmp_path / "simulated", out)
    assert json.loads((out / "environment.json").read_text())["experiment"] == began
    assert {path.name for path in (root / "state-0").iterdir()} == {began}


def test_two_runs_of_one_configuration_keep_their_states_apart(root, tmp_path):
    for name in ("one", "other"):
        deploy(root, tmp_path / name)
    assert same_bytes(tmp_path / "one", tmp_path / "other")
    assert len(list((root / "state-0").iterdir())) == 2


def test_a_clients_model_is_loaded_from_its_own_machine(root, tmp_path):
    import fedxmr

    deploy(root, tmp_path / "run")
    federate(tmp_path / "simulated")
    (folder,) = (root / "state-1").iterdir()
    own, simulated = (fedxmr.load(place, client=1) for place in (folder, tmp_path / "simulated"))
    x = dataset(configured()).test.features["image"]
    assert own.encode("image", x).equal(simulated.encode("image", x))


def test_a_run_that_has_ended_is_not_run_again_and_may_grow(root, tmp_path, capsys):
    deploy(root, tmp_path / "run")
    with pytest.raises(InputError, match=r"this run has ended; a larger federation.rounds would continue it"):
        deploy(root, tmp_path / "run")
    assert capsys.readouterr().out.splitlines()[-1] == f"exit code: {commands.BAD_INPUT}"
    deploy(root, tmp_path / "run", "federation.rounds=5")
    federate(tmp_path / "simulated", "federation.rounds=5")
    assert same_bytes(tmp_path / "simulated", tmp_path / "run")


def test_a_client_that_was_away_in_the_farewell_gets_its_models_when_the_run_is_submitted_again(root, tmp_path):
    class Away(Machines):
        def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
            away = bool(messages) and messages[0].metadata.message_type == wire.FINISH
            return super().exchange(messages[1:] if away else messages, 0.1 if away else timeout)

    Away(deployed("federation.deadline=0.2"), root, tmp_path / "run").run_server()
    (folder,) = (root / "state-0").iterdir()
    assert not (folder / "clients").exists()
    deploy(root, tmp_path / "run", "federation.deadline=0.2")
    assert (folder / "clients" / "0" / "selected.safetensors").is_file()
    federate(tmp_path / "simulated")
    assert same_bytes(tmp_path / "simulated", tmp_path / "run")


def test_a_deployed_client_that_hangs_ends_with_its_deadline():
    hangs = """if True:
        import time
        from types import SimpleNamespace
        from clients.app import _in_time
        context = SimpleNamespace(run_config={"config": "federation: {deadline: 0.1}"})
        with _in_time(context, SimpleNamespace(data="a folder")):
            time.sleep(600)
    """
    assert subprocess.run([sys.executable, "-c", hangs], cwd=ROOT, timeout=120, check=False).returncode == 1


def test_it_does_not_go_on_with_other_data(root, tmp_path):
    with pytest.raises(Killed):
        deploy(root, tmp_path / "run", dies_at=8)
    shutil.rmtree(root / "client-1")
    shutil.copytree(root / "client-2", root / "client-1")
    with pytest.raises(FederationError, match=r"^client 1: its data have changed since the run began"):
        deploy(root, tmp_path / "run")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: shutil.rmtree(folder / "features"), "features'?: expected a folder"),
        (lambda folder: (folder / "scaling.json").write_text('{"text": "norm"}'), "client 1: standardisation of text"),
    ],
)
def test_clients_that_do_not_fit_stop_the_run_at_the_start(root, tmp_path, spoil, says):
    spoil(root / "client-1")
    with pytest.raises(FederationError, match=says):
        deploy(root, tmp_path / "run")


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("partition.scheme=dirichlet", "nothing to divide where every client has its own folder"),
        ("dataset.task=zero-shot", "expected standard where every client has its own folder"),
    ],
)
def test_what_needs_all_data_in_one_place_is_refused(assignment, says):
    with pytest.raises(InputError, match=says):
        deployed(assignment)


def test_a_simulation_has_no_folders_of_others(tmp_path):
    with pytest.raises(InputError, match=r"^dataset own-folder: every client of a deployment reads its own"):
        federate(tmp_path / "run", base=OWN)

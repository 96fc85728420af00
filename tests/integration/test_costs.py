"""What must not grow unseen, counted: times are too noisy to be tested (`make bench` has them)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedxmr import partition, setting, state
from fedxmr.engines.carrier import CarrierGrid
from fedxmr.learners import learner_class
from fedxmr.recording import read_lines
from fedxmr.seeding import generator
from fedxmr.snapshot import Store
from fedxmr.types import DataSpec, Items
from tests.federations import configured, federate

COMMON = 4 * (8 + 1) * 4
"""The bytes of the common subspace of a small federation's DSCMR."""


@pytest.fixture
def counted(monkeypatch):
    """Counts calls of a function of a module or class while it still does its work."""
    calls: Counter[str] = Counter()

    def count(where: object, name: str) -> None:
        real = getattr(where, name)

        def counting(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, counting)

    return calls, count


@pytest.mark.parametrize(("clients", "sample", "rounds"), [(3, 3, 3), (3, 3, 6), (12, 4, 3)])
def test_messages_and_bytes_of_a_round(clients, sample, rounds, monkeypatch, tmp_path):
    """One message per client and round, one more to flush, and the shared arrays alone, once each way."""
    sent: Counter[str] = Counter()
    real = CarrierGrid._exchange

    def exchange(self, messages, timeout):
        sent.update(message.metadata.message_type for message in messages)
        return real(self, messages, timeout)

    monkeypatch.setattr(CarrierGrid, "_exchange", exchange)
    summary = federate(
        tmp_path / "run",
        f"federation.clients={clients}",
        f"federation.sample={sample}",
        f"federation.rounds={rounds}",
        "evaluation.every=0",
        "federation.checkpoint_every=0",
    )
    trained = set().union(*summary["participation"].values())
    work, flush = sample * rounds, len(trained)
    assert sent == {"query.start": clients, "train": work + flush, "query.finish": flush}
    assert summary["bytes"] == {"up": work * COMMON, "down": (work + flush) * COMMON}
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        took_part = line["client"] in summary["participation"][str(line["round"])]
        flushed = line["round"] == rounds and line["client"] in trained
        assert line["bytes_up"] == COMMON * took_part
        assert line["bytes_down"] == COMMON * (took_part + flushed)


@pytest.mark.parametrize("rounds", [5, 10])
def test_living_clients_write_no_state_but_at_checkpoints(rounds, counted, tmp_path):
    calls, count = counted
    count(state, "save_file")
    count(Store, "save")
    count(Store, "load")
    federate(tmp_path / "run", f"federation.rounds={rounds}")
    assert calls["save"] == 0
    assert calls["load"] == 3, "a new client looks once for a state it may go on from"
    checkpoints = rounds // 5
    # at each checkpoint three clients and the server; in the end selected and last of each, and the precisions
    assert calls["save_file"] == 4 * checkpoints + 4 * 2 + 1


@pytest.mark.parametrize("rounds", [2, 8])
def test_items_are_taken_and_learners_built_a_fixed_number_of_times(rounds, counted, tmp_path):
    calls, count = counted
    count(partition.Part, "take")
    count(setting, "build_learner")
    federate(tmp_path / "run", f"federation.rounds={rounds}", "federation.checkpoint_every=0")
    # for each of 3 clients to register, to count as it comes to work, to report moments, and to train
    assert calls["take"] == 3 * 4
    assert calls["build_learner"] <= 12


def test_a_client_that_is_never_sampled_builds_nothing(counted, tmp_path):
    calls, count = counted
    count(setting.Setting, "learner")
    few = ("federation.sample=2", "federation.rounds=2", "evaluation.every=0", "federation.checkpoint_every=0")
    built = []
    for clients in (5, 50):
        calls.clear()
        summary = federate(tmp_path / str(clients), f"federation.clients={clients}", *few)
        built.append(calls["learner"] - len(set().union(*summary["participation"].values())))
    assert built[0] == built[1]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers read from it or sent to it, and shapes that depend on values.

    On a CPU the same operations run, and wait for nobody.
    """

    NAMES = frozenset(("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique_dim", "_unique2"))

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple)
        if name in self.NAMES or (by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found[name] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dscmr", "drsl", "mccn", "jfse"])
def test_the_host_waits_for_a_gpu_as_often_whatever_the_number_of_steps(name):
    classes = torch.eye(3, dtype=torch.bool)[torch.arange(240) % 3]
    items = Items.paired({"image": torch.randn(240, 8), "text": torch.randn(240, 6)}, classes)
    waits = []
    for batch_size in (120, 10):
        kind = learner_class(name)
        learner = kind(
            kind.Config(batch_size=batch_size),
            DataSpec({"image": 8, "text": 6}, 3),
            torch.device("cpu"),
            generator(0, "initial"),
        )
        with Waits() as counting:
            learner.fit(items, 1, generator(0, "fit"))
        waits.append(counting.found)
    assert waits[0] == waits[1]
    assert waits[0].total() <= 10


LIGHT = """
import sys
from fedxmr import commands
from fedxmr.{command} import {function}
try:
    commands.run({function}, ["--help"])
finally:
    sys.stderr.write(",".join(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


@pytest.mark.parametrize("command", ["simulate", "centralized", "reproduce"])
def test_help_imports_nothing_heavy(command):
    text = LIGHT.format(command=command, function=command)
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=60)
    modules = set(ran.stderr.split(","))
    assert "typer" in modules
    assert not modules & {"torch", "numpy", "flwr", "ray", "pydantic", "scipy", "sklearn", "matplotlib", "tensorboard"}


LATE = """
import sys
from fedxmr import simulate
from fedxmr.learners import dscmr
real = dscmr.DSCMR.fit
def fit(self, data, epochs, rng, proximal=None):
    if epochs:
        sys.stderr.write(",".join(sorted(sys.modules)))
        sys.exit(0)
    return real(self, data, epochs, rng, proximal)
dscmr.DSCMR.fit = fit
from tests.federations import configured
simulate.run(configured(), __import__("pathlib").Path(sys.argv[1]))
"""


def test_what_only_the_report_needs_is_not_imported_before_the_first_step(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", LATE, tmp_path / "run"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    )
    modules = set(ran.stderr.splitlines()[-1].split(","))
    assert "torch" in modules
    late = {"ray", "scipy.stats", "sklearn.manifold", "matplotlib", "tensorboard", "torch._dynamo"}
    assert not modules & late


def test_the_parts_of_the_drivers_time_add_up(tmp_path):
    summary = federate(tmp_path / "run")
    seconds = dict(summary["seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=1e-3)
    assert configured().federation.rounds == summary["rounds"]
    lines = read_lines(tmp_path / "run" / "timings.jsonl")
    assert {line.get("client") for line in lines} == {None, 0, 1, 2}
    assert all(set(line["seconds"]) <= set(seconds) for line in lines)

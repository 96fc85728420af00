"""Clients that are out of reach in a round: left out as if not sampled, told of, and no failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedxmr import commands, state
from fedxmr.config import read_yaml, resolve
from fedxmr.errors import FederationError
from fedxmr.participation import dropped, sampled, short_round
from fedxmr.seeding import generator
from fedxmr.simulate import simulate
from tests.federations import SMALL, TOY, configured, federate, same_bytes
from tests.integration.test_federation import initial_w, lines, moves

SOME = ("federation.clients=5", "federation.dropout=0.4", "federation.min_clients=1", "federation.rounds=6")


def left_out(seed: int, chance: float, round: int, clients: list[int]) -> list[int]:
    """Those that a draw from (seed, round, client) leaves."""
    draws = {k: torch.rand(1, dtype=torch.float64, generator=generator(seed, "dropout", round, k)) for k in clients}
    return [k for k in clients if draws[k] >= chance]


def test_the_arithmetic_is_that_of_a_loop_over_those_in_reach(tmp_path):
    """FedCMR with uniform weights and the one-number learner: W_t, and every client's own merged with its last move."""
    assignments = ("federation.clients=5", "federation.sample=4", "federation.dropout=0.4", "federation.min_clients=1")
    assignments += ("federation.rounds=12", "strategy.weigh=uniform", "strategy.gamma=0.5")
    assignments += ("strategy.joint_fraction=1.0", "dataset.difficulty=1.0", "evaluation.clients=2")
    config = configured(*assignments, base=TOY)
    summary = federate(tmp_path / "run", *assignments, base=TOY)

    move, shared, change, trained = moves(config), initial_w(config), dict[int, float](), [0] * 5
    for t in range(1, 13):
        there = left_out(0, 0.4, t, sampled(config, t))
        assert summary["participation"][str(t)] == there
        assert summary["dropped"].get(str(t), []) == [k for k in sampled(config, t) if k not in there]
        after = [shared + 0.5 * change.get(k, 0.0) + move[k] for k in there]
        change |= {k: move[k] for k in there}
        shared = sum(after) / len(after)
        for k in there:
            trained[k] += 1
    assert len({tuple(summary["participation"][str(t)]) for t in range(1, 13)}) > 5
    assert all(trained)
    assert len(set(trained)) > 1
    assert (summary["failed"], summary["rejected"]) == ([], [])
    tensors, _ = state.load(tmp_path / "run" / "shared-last.safetensors")
    assert tensors["shared.w"].item() == pytest.approx(shared, abs=1e-5)
    for k in range(5):
        last, _ = state.load(tmp_path / "run" / "clients" / str(k) / "last.safetensors")
        assert last["weights/shared.w"].item() == pytest.approx(shared + 0.5 * change[k], abs=1e-5)
        assert last["weights/private.v"].item() == trained[k] * 12 * 2  # items, epochs
    assert summary["bytes"] == {"up": 4 * sum(trained), "down": 4 * (sum(trained) + 5)}  # the last message: to all


@pytest.mark.parametrize(
    "assignments",
    [(), ("federation.sample=3", "evaluation.clients=2"), ("strategy=fedavg", "evaluation.every=4")],
    ids=["all", "sampled, a panel", "fedavg"],
)
def test_to_drop_out_is_not_to_be_sampled(tmp_path, monkeypatch, assignments):
    config = configured(*SOME, *assignments)
    dropping = federate(tmp_path / "dropping", *SOME, *assignments)
    with monkeypatch.context() as patch:
        patch.setattr(
            "server.federation.sampled", lambda _, t: [k for k in sampled(config, t) if k not in dropped(config, t)]
        )
        fewer = federate(tmp_path / "fewer", *SOME, *assignments, "federation.dropout=0")
    assert same_bytes(tmp_path / "dropping", tmp_path / "fewer")
    assert dropping["participation"] == fewer["participation"]
    assert dropping["bytes"] == fewer["bytes"]
    assert dropping["dropped"]
    assert fewer["dropped"] == {}
    federate(tmp_path / "all", *SOME, *assignments, "federation.dropout=0")
    assert not same_bytes(tmp_path / "dropping", tmp_path / "all")


def test_one_who_drops_out_is_evaluated_and_evaluation_changes_no_training(tmp_path):
    on = federate(tmp_path / "on", *SOME)
    off = federate(tmp_path / "off", *SOME, "evaluation.every=0")
    for key in ("shared_sha256", "models_sha256", "bytes"):
        assert on[key] == off[key]
    assert all("validation" in line for line in lines(tmp_path / "on"))
    for line in lines(tmp_path / "on"):
        assert ("loss" in line) == (line["client"] in on["participation"][str(line["round"])])


def test_tensorboard_and_the_report_show_who_took_part(tmp_path, capsys):
    summary = federate(tmp_path / "run", *SOME)
    shown = capsys.readouterr().out
    assert "5 clients, dropout 0.4" in shown
    assert "who took part, in how many of 6 rounds:\n  client 0: " in shown
    away = [t for t in range(1, 7) if 0 in summary["dropped"].get(str(t), [])]
    assert f"client 0: {6 - len(away)}" in shown
    assert "dropped out in" in shown
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    took_part = {e.step: e.value for e in events.Scalars("clients/took part")}
    assert took_part == {t: len(summary["participation"][str(t)]) for t in range(1, 7)}


def test_who_took_part_is_shown_with_evaluation_off(tmp_path, capsys):
    federate(tmp_path / "run", "evaluation.every=0")
    assert "who took part: every client in every round" in capsys.readouterr().out


def seed_with(what, *assignments: str, base=SMALL) -> str:
    """An assignment of the first seed under which a configuration is as wanted."""
    return next(f"seed={s}" for s in range(1000) if what(configured(*assignments, f"seed={s}", base=base)))


def test_a_round_with_too_few_in_reach_does_not_stand_and_says_how_many_dropped_out(tmp_path):
    late = ("federation.dropout=0.4", "federation.rounds=9")
    seed = seed_with(lambda c: short_round(c) == 4 and len(dropped(c, 4)) == 2, *late)
    with pytest.raises(FederationError) as caught:
        federate(tmp_path / "run", *late, seed)
    assert str(caught.value) == "round 4: 1 good updates, expected at least 2; 2 of 3 clients dropped out"
    assert {line["round"] for line in lines(tmp_path / "run") if "validation" in line} == {1, 2, 3}
    federate(tmp_path / "one", *late, seed, "federation.min_clients=1", "federation.rounds=4")


@pytest.mark.parametrize("every", [0, 1])
def test_a_round_that_all_drop_out_of_ends_the_run_with_exit_code_3_as_was_said_before(tmp_path, capsys, every):
    some = [*SMALL, "federation.min_clients=1", "federation.dropout=0.6", f"evaluation.every={every}"]
    seed = seed_with(lambda c: short_round(c) == 3, *some)
    arguments = [*some, seed, "--no-pictures", "--out", str(tmp_path / "run")]
    assert commands.run(simulate, arguments) == commands.FAILED
    captured = capsys.readouterr()
    assert "error: round 3: 0 good updates, expected at least 1; 3 of 3 clients dropped out\n" in captured.err
    assert "warning: round 3 will end this run: with this dropout and seed 3 of 3 clients drop out" in captured.out


def test_a_dropout_counts_beside_a_tolerated_failure(tmp_path):
    """One drops out of round 2 and the two others fail in it."""
    failing = ("federation.dropout=0.4", "learner.misbehaves={'80': raise}", "federation.tolerate_failures=true")
    base = (*TOY, "strategy.joint_fraction=1.0")  # 80 items seen: the second round of any client
    seed = seed_with(lambda c: not dropped(c, 1) and len(dropped(c, 2)) == 1, *failing, base=base)
    with pytest.raises(FederationError, match="round 2: 0 good updates, expected at least 2; 1 of 3 clients dropped"):
        federate(tmp_path / "run", *failing, seed, base=base)


def test_the_options_of_the_command_line_are_configuration(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--dropout", "0.2", "--deadline", "90", "--tolerate-failures", "federation.min_clients=1"]
    assert commands.run(simulate, [*SMALL, *options, "--no-pictures", "--out", str(out)]) == commands.OK
    federation = resolve(read_yaml(out / "config.yaml")).federation
    assert (federation.dropout, federation.deadline, federation.tolerate_failures) == (0.2, 90.0, True)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: deadline: ")]
    assert len(warned) == 1
    assert "local" in warned[0]
    assert json.loads((out / "summary.json").read_text())["failed"] == []


def test_without_a_deadline_of_ones_own_nothing_is_said_of_it(tmp_path: Path, capsys):
    federate(tmp_path / "run")
    assert "warning" not in capsys.readouterr().out

"""Durable client states: the newest two rounds, and nothing newer than what a client goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedxmr.errors import InputError
from fedxmr.scaling import Scaler
from fedxmr.snapshot import Owner, Snapshot, Store

OWNER, OTHER = Owner(4, "aa"), Owner(5, "aa")


def state(round: int, waits: bool = True) -> Snapshot:
    before = {"w": torch.full((2,), -float(round))} if waits else None
    scaler = Scaler({"image": torch.ones(3)}, {"image": torch.full((3,), 2.0)})
    return Snapshot(round, {"w": torch.full((2,), float(round))}, before, scaler, {round: {"w": torch.zeros(2)}})


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_newest_two_are_kept(tmp_path):
    store = Store(tmp_path, OWNER)
    for round in (1, 3, 10):
        store.save(state(round))
    assert rounds(tmp_path) == ["round-10.safetensors", "round-3.safetensors"]
    assert store.load(1) is None


def test_a_state_comes_back_as_it_was(tmp_path):
    for waits in (True, False):
        Store(tmp_path, OWNER).save(state(3, waits))
        got, like = Store(tmp_path, OWNER).load(3), state(3, waits)
        assert got is not None
        assert (got.round, got.scaler) == (3, like.scaler)
        assert torch.equal(got.learner["w"], like.learner["w"])
        assert (got.before is None) == (not waits)
        assert list(got.kept) == [3]
        assert got.nbytes == like.nbytes == 16 + 8 * waits


def test_what_is_newer_than_the_state_gone_on_from_is_discarded(tmp_path):
    store = Store(tmp_path, OWNER)
    store.save(state(3))
    store.save(state(5))  # a reply the server did not accept
    assert store.load(3) is not None
    assert rounds(tmp_path) == ["round-3.safetensors"]


def test_after_going_back_the_older_state_is_the_newest(tmp_path):
    store = Store(tmp_path, OWNER)
    for round in (6, 7):
        store.save(state(round))
    store.save(state(5))  # restored from a checkpoint
    assert rounds(tmp_path) == ["round-5.safetensors"]


def test_clients_do_not_meet(tmp_path):
    Store(tmp_path, OWNER).save(state(3))
    assert Store(tmp_path, OTHER).load(3) is None


def test_a_damaged_state_and_that_of_another_client_are_refused(tmp_path):
    Store(tmp_path, OWNER).save(state(3))
    (tmp_path / "client-4").rename(tmp_path / "client-5")
    with pytest.raises(InputError, match="expected the state of client 5, got that of 4"):
        Store(tmp_path, OTHER).load(3)
    path = tmp_path / "client-5" / "round-3.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        Store(tmp_path, OTHER).load(3)

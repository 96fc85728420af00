"""Nodes of Flower's own runtimes: they are away, come again as another node, or claim what another is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import pytest
import torch
from flwr.app import Message

from fedxmr import wire
from fedxmr.config import FederationConfig
from fedxmr.engines.carrier import RUN_ID, identify
from fedxmr.errors import FederationError
from fedxmr.machine import versions
from fedxmr.messages import Farewell, Registration, Report
from fedxmr.types import DataSpec
from server import nodes as nodes_module
from server.nodes import Nodes

CONFIG = FederationConfig(clients=2, start_deadline=0.5, deadline=0.5)
SPEC = DataSpec({"image": 2, "text": 2}, 2)


class FlowerGrid:
    """What of Flower's Grid the server uses. there: node -> the client it says it is; lost: nodes that never answer.

    Of a node that is not there Flower takes no message: its id is None.
    """

    def __init__(self, there: dict[int, int]) -> None:
        identify(1)
        self.there = dict(there)
        self.lost: set[int] = set()
        self.asked: list[int] = []
        self._ids = itertools.count(1)
        self._sent: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.there)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str | None:
        node = message.metadata.dst_node_id
        self.asked.append(node)
        if node not in self.there:
            return None
        name = str(next(self._ids))
        message.metadata.__dict__.update(_message_id=name, _src_node_id=1, _run_id=RUN_ID)
        self._sent[name] = message
        return name

    def pull_messages(self, names: Iterable[str]) -> list[Message]:
        found = [self._sent.pop(name) for name in list(names) if name in self._sent]
        return [self._answer(message) for message in found if message.metadata.dst_node_id not in self.lost]

    def _answer(self, message: Message) -> Message:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        assert wire.experiment(message.content) == "ab"
        if kind == wire.START:
            return Message(wire.pack_registration(registration(self.there[node])), reply_to=message)
        client = wire.unpack_farewell(message.content).client
        return Message(wire.pack_report(Report(client, None, None, "0" * 64)), reply_to=message)


def registration(client: int) -> Registration:
    # a client's data are its own: that is how it is known again
    counts = torch.tensor([client + 1, 1])
    return Registration(client, client + 2, counts, SPEC, {"image": client + 2}, {}, versions(), "aa")


@pytest.fixture
def grid(monkeypatch) -> FlowerGrid:
    monkeypatch.setattr(nodes_module, "POLL", 0.01)
    return FlowerGrid({70: 0, 71: 1})


@pytest.fixture
def nodes(grid) -> Nodes:
    found = Nodes(grid, CONFIG, "ab")
    assert [r.client for r in found.register()] == [0, 1]
    return found


def finish(nodes: Nodes, wanted: int = 0) -> dict[int, str | None]:
    """Client -> why it has not answered, None where it has."""
    contents = {k: wire.pack_farewell(Farewell(k, 1, 0, 1, False)) for k in (0, 1)}
    replies = nodes.exchange(wire.FINISH, contents, 1, wanted=wanted)
    return {k: reply.failed or reply.fault for k, reply in replies.items()}


def test_a_node_that_is_away_is_not_asked_and_holds_nobody_up(grid, nodes):
    del grid.there[71]
    grid.asked.clear()
    assert finish(nodes, wanted=1) == {0: None, 1: "its node is not connected"}
    assert grid.asked == [70]


def test_a_message_that_flower_does_not_take_or_a_node_never_answers_is_no_answer_in_time(grid, nodes, monkeypatch):
    grid.lost.add(71)
    assert finish(nodes) == {0: None, 1: "no answer within 0.5 s"}
    grid.lost.clear()
    monkeypatch.setattr(grid, "get_node_ids", lambda: [70, 71])
    del grid.there[71]  # gone since it was looked
    assert finish(nodes) == {0: None, 1: "no answer within 0.5 s"}


def test_enough_nodes_are_waited_for(grid, nodes, monkeypatch):
    looks, there = itertools.count(), grid.get_node_ids
    monkeypatch.setattr(grid, "get_node_ids", lambda: there() if next(looks) > 5 else [70])
    assert finish(nodes, wanted=2) == {0: None, 1: None}


def test_a_client_that_comes_again_as_another_node_is_known_by_its_data(grid, nodes):
    del grid.there[71]
    grid.there[99] = 1
    assert finish(nodes) == {0: None, 1: None}
    grid.asked.clear()
    assert finish(nodes) == {0: None, 1: None}
    assert sorted(grid.asked) == [70, 99]


def test_two_nodes_that_claim_one_client_end_the_run(grid, nodes):
    grid.there[99] = 1
    with pytest.raises(FederationError, match=r"^client 1: claimed by 2 nodes$"):
        finish(nodes)


def test_a_stranger_is_asked_once_and_left_alone(grid, nodes, monkeypatch):
    grid.there[99] = 5
    grid.asked.clear()
    assert finish(nodes) == finish(nodes) == {0: None, 1: None}
    assert grid.asked.count(99) == 1
    # nor is one that claims to be a client that is away, but has other data
    del grid.there[71]
    grid.there[98] = 1
    answer = grid._answer

    def other_data(message: Message) -> Message:
        if message.metadata.dst_node_id != 98:
            return answer(message)
        changed = dataclasses.replace(registration(1), class_counts=torch.tensor([1, 2]))
        return Message(wire.pack_registration(changed), reply_to=message)

    monkeypatch.setattr(grid, "_answer", other_data)
    assert finish(nodes) == {0: None, 1: "its node is not connected"}


def test_all_who_fail_at_the_start_are_named(grid, monkeypatch):
    grid.lost = {70, 71}
    with pytest.raises(FederationError) as caught:
        Nodes(grid, CONFIG, "ab").register()
    assert str(caught.value).splitlines() == [
        f"a client failed at the start: no answer within 0.5 s (node {node})" for node in (70, 71)
    ]

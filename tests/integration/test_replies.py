"""Replies as they come: in any order, twice, late, or in another's name; each belongs to the message it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

import pytest
from flwr.app import Context, Error, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.app import app as honest
from fedxmr.engines.carrier import SERVER_NODE, client_of, node_of
from fedxmr.engines.local import LocalGrid
from fedxmr.errors import FederationError
from tests.federations import TOY, federate, same_bytes
from tests.liars import LIAR, ROUND

TOLERANT = "federation.tolerate_failures=true"

Change = Callable[[list[Message]], list[Message]]
"""What becomes of the replies of an exchange on their way."""


@pytest.fixture
def carry(monkeypatch):
    """Let every exchange's replies be changed on their way."""

    def begin(change: Change) -> None:
        class Changing(LocalGrid):
            def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
                return change(list(super().exchange(messages, timeout)))

        monkeypatch.setattr("fedxmr.engines.local.LocalGrid", Changing)

    return begin


def in_round(change: Callable[[Message], list[Message]]) -> Change:
    """Change the liar's reply in its round alone."""

    def all_(replies: list[Message]) -> list[Message]:
        found = []
        for reply in replies:
            about = reply.metadata
            lies = about.group_id == str(ROUND) and about.message_type == "train" and about.src_node_id == node_of(LIAR)
            found += change(reply) if lies else [reply]
        return found

    return all_


def with_metadata(**fields: object) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        reply.metadata.__dict__.update(fields)
        return [reply]

    return change


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (lambda reply: [reply, reply], "rejected", "answered 2 times"),
        (with_metadata(_src_node_id=node_of(2)), "rejected", "the answer came from node 4"),
        (with_metadata(_reply_to_message_id="1"), "rejected", "answers another message than the one it was sent"),
        (lambda reply: [], "failed", "no answer within 600 s"),
    ],
)
def test_a_reply_that_is_none_is_named(tmp_path, carry, change, kind, reason):
    carry(in_round(change))
    summary = federate(tmp_path / "run", TOLERANT, base=TOY)
    assert summary[kind] == [{"round": ROUND, "client": LIAR, "reason": reason}]
    with pytest.raises(FederationError, match=rf"^client 1 (was rejected|failed) in round 2: {reason}\n"):
        federate(tmp_path / "strict", base=TOY)


def test_an_error_of_flowers_own_is_that_of_the_client_it_is_about(tmp_path, carry):
    """Its SuperLink is the source where a reply has gone missing on the way."""

    def lost(reply: Message) -> list[Message]:
        error = Message(Error(7, "gone"), reply_to=reply)
        error.metadata.__dict__ |= {**reply.metadata.__dict__, "_src_node_id": SERVER_NODE}
        return [error]

    carry(in_round(lost))
    summary = federate(tmp_path / "run", TOLERANT, base=TOY)
    assert summary["failed"] == [{"round": ROUND, "client": LIAR, "reason": "gone"}]


def test_an_answer_of_a_node_that_was_not_asked_ends_the_run(tmp_path, carry):
    carry(in_round(with_metadata(_src_node_id=77, _reply_to_message_id="nothing")))
    with pytest.raises(FederationError, match=r"^node 77 answered train of round 2, which it was not asked\n"):
        federate(tmp_path / "run", TOLERANT, base=TOY)


@pytest.mark.parametrize("field", ["_src_node_id", "_reply_to_message_id"])
def test_a_client_cannot_answer_for_another(tmp_path, monkeypatch, field):
    """The carrier knows whom it asked, whatever the ClientApp writes on its answer; the other is unaffected."""

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if (client_of(context.node_id), message.metadata.group_id) == (LIAR, str(ROUND)):
            asked = {"_src_node_id": node_of(2), "_reply_to_message_id": str(int(message.metadata.message_id) + 1)}
            reply.metadata.__dict__[field] = asked[field]
        return reply

    monkeypatch.setattr("clients.app.app", app)
    summary = federate(tmp_path / "run", TOLERANT, "federation.checkpoint_every=0", base=TOY)
    (entry,) = summary["failed"]
    assert (entry["round"], entry["client"], summary["rejected"]) == (ROUND, LIAR, [])
    assert "expected an answer to the message that was sent, got one to another" in entry["reason"]


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    out = tmp_path_factory.mktemp("in order") / "run"
    federate(out, "federation.clients=5", base=TOY)
    return out


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0))
def test_the_order_of_replies_does_not_matter(tmp_path_factory, carry, in_order, seed):
    random = Random(seed)
    carry(lambda replies: random.sample(replies, len(replies)))
    out = tmp_path_factory.mktemp("shuffled") / "run"
    federate(out, "federation.clients=5", base=TOY)
    assert same_bytes(out, in_order)

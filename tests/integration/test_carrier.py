"""Our Grid carries Flower's own apps, and fails loudly where a new flwr moves the private parts it needs."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fedxmr.engines.carrier import SERVER_NODE, client_of, context, node_of
from fedxmr.engines.local import LocalGrid

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Add the client's id plus one to every number."""
    arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
    moved = ArrayRecord([a + int(context.node_config["partition-id"]) + 1 for a in arrays])
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)


@client.query("fail")
def fail(message: Message, context: Context) -> Message:
    raise ValueError("no")


def test_flowers_own_fedavg_runs_unchanged_on_our_grid():
    server = ServerApp()
    found = {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
        result = strategy.start(grid, ArrayRecord([np.zeros(2)]), num_rounds=2)
        found["arrays"] = result.arrays.to_numpy_ndarrays()[0]

    server(LocalGrid(client, 3, {}), context(SERVER_NODE, {}, {}))
    np.testing.assert_allclose(found["arrays"], [4.0, 4.0])  # two rounds of the mean of 1, 2 and 3


def test_the_private_parts_of_flower_that_we_set_are_there():
    grid = LocalGrid(client, 1, {})
    message = grid.create_message(RecordDict(), "query.fail", node_of(0), "1")
    for field in ("_message_id", "_src_node_id", "_run_id"):
        assert field in message.metadata.__dict__, f"flwr's Metadata has no {field} any more"
    (reply,) = grid.send_and_receive([message])
    assert isinstance(message.metadata, Metadata)
    assert message.metadata.src_node_id == SERVER_NODE
    assert reply.metadata.src_node_id == node_of(0)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id != ""
    assert TaskIdentity.node_id == SERVER_NODE


def test_a_client_that_raises_gives_an_error_reply_and_the_others_go_on():
    grid = LocalGrid(client, 2, {})
    good = RecordDict({"arrays": ArrayRecord([np.zeros(1)])})
    messages = [
        grid.create_message(RecordDict(), "query.fail", node_of(0), ""),
        grid.create_message(good, "train", node_of(1), ""),
    ]
    replies = {client_of(r.metadata.src_node_id): r for r in grid.send_and_receive(messages)}
    assert replies[0].has_error()
    assert replies[0].error.reason == "ValueError: no"
    assert replies[1].has_content()


def test_an_answer_that_came_after_the_deadline_does_not_count():
    grid = LocalGrid(client, 1, {})
    message = grid.create_message(RecordDict(), "query.fail", node_of(0), "")
    slow = grid.create_message(RecordDict({"arrays": ArrayRecord([np.zeros(1)])}), "train", node_of(0), "")
    assert list(grid.send_and_receive([slow], timeout=0.0)) == []
    (reply,) = grid.send_and_receive([message], timeout=0.0)
    assert reply.has_error()  # it failed, which is worth knowing, however late


def test_messages_pushed_can_be_pulled_once():
    grid = LocalGrid(client, 1, {})
    content = RecordDict({"arrays": ArrayRecord([np.zeros(1)])})
    (sent,) = grid.push_messages([grid.create_message(content, "train", node_of(0), "")])
    (reply,) = grid.pull_messages([sent])
    assert reply.content.array_records["arrays"].to_numpy_ndarrays()[0] == pytest.approx(1)
    assert list(grid.pull_messages([sent])) == []

"""A Flower message becomes buffers and comes back: nothing is lost, and no array is copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedxmr import wire
from fedxmr.engines import transport
from fedxmr.engines.carrier import CarrierGrid, node_of


@pytest.fixture(scope="module")
def grid():
    class Nowhere(CarrierGrid):
        engine = "nowhere"

    return Nowhere(3)


def sent(grid, content: RecordDict) -> Message:
    return grid._address(grid.create_message(content, "train", node_of(1), "7"))


def there_and_back(message: Message) -> Message:
    buffers = {name: transport.arrays(record) for name, record in transport.array_records(message).items()}
    return transport.message(transport.envelope(message), buffers)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
    facts=st.dictionaries(st.text(min_size=1, max_size=5), st.one_of(st.integers(-9, 9), st.text(max_size=5))),
)
def test_every_record_survives(grid, shape, dtype, facts):
    state = {"w": (torch.rand(shape) * 9).to(dtype), "b": torch.arange(3)}
    content = RecordDict({"shared": wire.pack_arrays(state), "facts": ConfigRecord(facts)})
    content["scores"] = MetricRecord({"loss": 0.5, "counts": [1, 2]})
    message = sent(grid, content)
    back = there_and_back(message)
    assert back.metadata.__dict__ == message.metadata.__dict__
    got = wire.unpack_arrays(back.content.array_records["shared"])
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) and got[name].dtype == state[name].dtype for name in state)
    assert dict(back.content.config_records["facts"]) == facts
    assert dict(back.content.metric_records["scores"]) == {"loss": 0.5, "counts": [1, 2]}


def test_arrays_are_views_of_the_buffers_both_ways(grid):
    record = wire.pack_arrays({"w": torch.rand(100)})
    ((_, _, _, _, buffer),) = transport.arrays(record)
    assert np.shares_memory(buffer, np.frombuffer(record["w"].data, np.uint8))
    back = there_and_back(sent(grid, RecordDict({"shared": record}))).content.array_records["shared"]
    assert np.shares_memory(buffer, np.frombuffer(back["w"].data, np.uint8))
    assert transport.size(transport.arrays(record)) == 400


def test_what_is_unpacked_is_no_view(grid):
    record = wire.pack_arrays({"w": torch.rand(100)})
    back = there_and_back(sent(grid, RecordDict({"shared": record})))
    tensor = wire.unpack_arrays(back.content.array_records["shared"])["w"]
    assert not np.shares_memory(tensor.numpy(), np.frombuffer(record["w"].data, np.uint8))


def test_flowers_own_arrays_survive(grid):
    record = ArrayRecord([np.arange(6.0).reshape(2, 3)])
    back = there_and_back(sent(grid, RecordDict({"arrays": record})))
    np.testing.assert_array_equal(
        back.content.array_records["arrays"].to_numpy_ndarrays()[0], np.arange(6.0).reshape(2, 3)
    )


def test_an_error_survives(grid):
    message = sent(grid, RecordDict())
    reply = Message(Error(2, "it broke"), reply_to=message)
    back = there_and_back(reply)
    assert back.has_error()
    assert (back.error.code, back.error.reason) == (2, "it broke")
    assert back.metadata.reply_to_message_id == message.metadata.message_id

"""Every message survives the wire bit for bit, and a foreign one is refused."""

from __future__ import annotations

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedxmr import wire
from fedxmr.messages import Checkpoint, Farewell, Registration, Report, Task, Update
from fedxmr.scaling import Moments, Scaler
from fedxmr.types import DataSpec


def same(a: object, b: object) -> bool:
    """Equality through dataclasses and mappings down to tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return a == b


SHARED = {"common.weight": torch.randn(3, 2), "step": torch.tensor(3.0), "mask": torch.tensor([True, False])}


def registration() -> Registration:
    moments = {"image": Moments.of(torch.randn(5, 4)), "text": Moments.of(torch.randn(4, 2))}
    spec = DataSpec({"image": 4, "text": 2}, 3, class_vectors=torch.randn(3, 7))
    return Registration(
        2, 5, torch.tensor([2, 3, 0]), spec, {"image": 5, "text": 4, "tags": 1}, moments, {"torch": "2.13"}, "ab12"
    )


@pytest.mark.parametrize(
    ("message", "pack", "unpack"),
    [
        (registration(), wire.pack_registration, wire.unpack_registration),
        (Task(4, 1, 3, SHARED, evaluate=True, leader=2), wire.pack_task, wire.unpack_task),
        (
            Task(1, 0, 0, {}, scaler=Scaler({"image": torch.ones(2)}, {"image": torch.ones(2)})),
            wire.pack_task,
            wire.unpack_task,
        ),
        (
            Update(4, 1, 5, torch.tensor([5]), 0.1 + 0.2, SHARED, {"a->b": 1 / 3}, None, {"fit": 0.5}),
            wire.pack_update,
            wire.unpack_update,
        ),
        (Update(4, 1, 5, torch.tensor([5]), None, {}), wire.pack_update, wire.unpack_update),
        (Farewell(1, 41, 3, 40, True), wire.pack_farewell, wire.unpack_farewell),
        (Checkpoint(1, 5, "checkpoint/.round-5/client-1.safetensors"), wire.pack_checkpoint, wire.unpack_checkpoint),
        (Report(1, {"a->b": 0.5}, None, "ff"), wire.pack_report, wire.unpack_report),
    ],
)
def test_a_message_survives(message, pack, unpack):
    assert same(unpack(pack(message)), message)


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd",
        "checkpoint/../../client-1.safetensors",
        "../checkpoint/round-1/client-1.safetensors",
        "checkpoint/round-1/client-1.safetensors/x",
        "checkpoint/round-1/server.safetensors",
        "checkpoint/round-1/client-1.safetensors\n",
    ],
)
def test_a_client_is_sent_to_no_other_file(file):
    with pytest.raises(wire.WireError, match="not a checkpoint: file"):
        wire.unpack_checkpoint(wire.pack_checkpoint(Checkpoint(1, 5, file)))


def test_arrays_arrive_in_memory_of_their_own():
    sent = {"w": torch.arange(6.0).reshape(2, 3).T}  # not contiguous
    got = wire.unpack_arrays(wire.pack_arrays(sent))["w"]
    assert torch.equal(got, sent["w"])
    got.zero_()
    assert sent["w"].sum() == 15


def facts(text: str) -> RecordDict:
    return RecordDict({"facts": ConfigRecord({"json": text})})


@pytest.mark.parametrize("unpack", [wire.unpack_registration, wire.unpack_task, wire.unpack_update, wire.unpack_report])
@pytest.mark.parametrize("content", [RecordDict(), facts("{"), facts("{}"), facts('{"round": "x"}'), facts("[]")])
def test_a_foreign_message_is_refused(unpack, content):
    with pytest.raises(wire.WireError):
        unpack(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"round": 4.0}, "not a task: round: input should be a valid integer, got 4.0"),
        ({"round": "4"}, "not a task: round: input should be a valid integer, got '4'"),
        ({"fit": 1}, "not a task: fit: input should be a valid boolean, got 1"),
        ({"leader": True}, "not a task: leader: input should be a valid integer, got True"),
        ({"base": 1 << 63}, "not a task: base: input should be less than"),
        ({"shared": {}}, "not a task: shared: extra inputs are not permitted"),
    ],
)
def test_facts_are_of_exactly_their_types(change, says):
    content = wire.pack_task(Task(4, 1, 3, SHARED))
    record = content.config_records["facts"]
    record["json"] = json.dumps(json.loads(str(record["json"])) | change)
    with pytest.raises(wire.WireError, match=says):
        wire.unpack_task(content)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (Array("float32", (2,), "numpy.ndarray", b"\0" * 8), "expected raw bytes"),
        (Array("object", (2,), "fedxmr.raw", b"\0" * 8), "expected raw bytes"),
        (Array("float32", (-2,), "fedxmr.raw", b""), "expected raw bytes"),
        (Array("float32", (3,), "fedxmr.raw", b"\0" * 8), "expected 12 bytes"),
        (Array("float32", (1 << 60,), "fedxmr.raw", b"\0" * 8), "expected"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(array, says):
    with pytest.raises(wire.WireError, match=says):
        wire.unpack_arrays(ArrayRecord({"w": array}))

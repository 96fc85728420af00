"""Flower messages as what Ray carries: small facts, and buffers that travel through the object store.

Arrays are written into shared memory once and read there: neither side copies them again before the codec of wire.py
does. Between its own processes Ray pickles the facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict

Bytes = npt.NDArray[np.uint8]
Arrays = list[tuple[str, str, tuple[int, ...], str, Bytes]]
"""An ArrayRecord: name, dtype, shape, kind of bytes, bytes."""

_RECORDS = {"config": ConfigRecord, "metric": MetricRecord}


@dataclass(frozen=True)
class Envelope:
    """A message without its arrays. records: name -> (kind, content). error: (code, reason)."""

    metadata: Mapping[str, Any]
    records: Mapping[str, tuple[str, Mapping[str, Any]]]
    error: tuple[int, str] | None


def envelope(message: Message) -> Envelope:
    """All of a message but its arrays."""
    metadata = dict(message.metadata.__dict__)
    if message.has_error():
        return Envelope(metadata, {}, (message.error.code, str(message.error.reason)))
    content = message.content
    records = {name: ("config", dict(record)) for name, record in content.config_records.items()}
    records |= {name: ("metric", dict(record)) for name, record in content.metric_records.items()}
    return Envelope(metadata, records, None)


def arrays(record: ArrayRecord) -> Arrays:
    """A record of arrays as buffers, uncopied."""
    return [(n, a.dtype, tuple(a.shape), a.stype, np.frombuffer(a.data, np.uint8)) for n, a in record.items()]


def size(buffers: Arrays) -> int:
    """The bytes of all its arrays."""
    return sum(len(data) for *_, data in buffers)


def array_records(message: Message) -> dict[str, ArrayRecord]:
    """The records of arrays in a message."""
    return dict(message.content.array_records) if message.has_content() else {}


def message(sent: Envelope, by_name: Mapping[str, Arrays]) -> Message:
    """The message again; its arrays are views of the buffers they came in."""
    content: Any
    if sent.error is not None:
        content = Error(*sent.error)
    else:
        content = RecordDict({name: _RECORDS[kind](dict(facts)) for name, (kind, facts) in sent.records.items()})
        for name, buffers in by_name.items():
            content[name] = _record(buffers)
    facts = sent.metadata
    metadata = Metadata(*(facts[f"_{field}"] for field in _FIELDS))
    metadata.__dict__.update(facts)
    return Message(content, metadata=metadata)  # type: ignore[call-overload, no-any-return]


_FIELDS = (
    "run_id",
    "message_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "created_at",
    "ttl",
    "message_type",
)


def _record(buffers: Arrays) -> ArrayRecord:
    record = ArrayRecord()
    for name, dtype, shape, kind, data in buffers:
        array = Array(dtype, shape, kind, b"")
        array.data = cast("bytes", data.data)  # a view: `Array` itself takes nothing but bytes, which would be a copy
        record[name] = array
    return record

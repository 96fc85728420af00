"""Clients that answer wrongly, as a server meets them: what the ClientApp packed is changed before it is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from clients.app import app as honest
from fedxmr import wire

Change = Callable[[RecordDict], None]
"""What is done to a reply's content."""

LIAR, ROUND = 1, 2
"""Who lies, and in which round."""


class Liar:
    """The ClientApp, but for what one client answers to one message.

    change: of the content. instead: done in place of answering.
    """

    def __init__(self, change: Change, kind: str = wire.TRAIN, round: int = ROUND) -> None:
        self._change = change
        self._at = (LIAR, kind, str(round))

    def __call__(self, message: Message, context: Context) -> Message:
        about = message.metadata
        if (context.node_config["partition-id"], about.message_type, about.group_id) != self._at:
            return honest(message, context)
        if self._change is absent:
            raise RuntimeError("not there")
        reply = honest(message, context)
        self._change(reply.content)
        return reply


def absent(content: RecordDict) -> None:
    """The client does nothing and fails."""


def facts(**changed: Any) -> Change:
    """Facts that are other than they should be, or that should not be there."""

    def change(content: RecordDict) -> None:
        record = content.config_records["facts"]
        record["json"] = json.dumps({**json.loads(str(record["json"])), **changed})

    return change


def scores(part: str, **changed: float | None) -> Change:
    """Scores that are other than they should be; None: that are missing. `image_to_text` is image->text."""

    def change(content: RecordDict) -> None:
        found = json.loads(str(content.config_records["facts"]["json"]))[part] or {}
        found |= {name.replace("_to_", "->"): value for name, value in changed.items()}
        facts(**{part: {name: value for name, value in found.items() if value is not None}})(content)

    return change


def without(fact: str) -> Change:
    """A fact that is missing."""

    def change(content: RecordDict) -> None:
        record = content.config_records["facts"]
        found = json.loads(str(record["json"]))
        del found[fact]
        record["json"] = json.dumps(found)

    return change


def text(json: Any) -> Change:
    """Something else where the facts should be."""

    def change(content: RecordDict) -> None:
        content["facts"] = ConfigRecord({"json": json})

    return change


def tensor(name: str, of: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """An array that is other than it should be, or should not be there."""

    def change(content: RecordDict) -> None:
        record = content.array_records["arrays"]
        sent = wire.unpack_arrays(record)
        changed = of(sent.get(name, torch.ones(1)).clone())
        record[name] = wire.pack_arrays({name: changed})[name]

    return change


def array(name: str, sent: Array) -> Change:
    """An array's bytes as they are given."""

    def change(content: RecordDict) -> None:
        content.array_records["arrays"][name] = sent

    return change


def lacking(*names: str) -> Change:
    """Arrays that are missing."""

    def change(content: RecordDict) -> None:
        for name in names:
            del content.array_records["arrays"][name]

    return change


def pickled(content: RecordDict) -> None:
    """Arrays as Flower itself packs them."""
    content["arrays"] = ArrayRecord([np.ones((4, 8), np.float32), np.ones(4, np.float32)])


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor with this as its first element."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return of

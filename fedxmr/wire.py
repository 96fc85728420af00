"""The one codec between what fedxmr says (messages.py) and Flower's records.

Arrays travel as their raw little-endian bytes: no pickle, no .npy header, one copy each way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedxmr.messages import Checkpoint, Farewell, Registration, Report, Task, Update
from fedxmr.scaling import Moments, Scaler
from fedxmr.state import under
from fedxmr.types import DataSpec, State

START, TRAIN, FINISH = "query.start", "train", "query.finish"
CHECKPOINT, RESTORE = "query.checkpoint", "query.restore"
"""The types of message a run is made of."""

_RAW = "fedxmr.raw"
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


class WireError(ValueError):
    """A message that is not one of fedxmr's."""


def pack_start() -> RecordDict:
    """The start query: it asks who is there and says nothing."""
    return RecordDict()


def pack_registration(r: Registration) -> RecordDict:
    """A client's answer to the start query."""
    arrays: State = {"class_counts": r.class_counts}
    for modality, moments in r.moments.items():
        arrays[f"mean/{modality}"] = moments.mean
        arrays[f"centred/{modality}"] = moments.centred
    if r.spec.class_vectors is not None:
        arrays["class_vectors"] = r.spec.class_vectors
    if r.spec.seen is not None:
        arrays["seen"] = r.spec.seen
    facts = {
        "client": r.client,
        "n": r.n,
        "dims": dict(r.spec.dims),
        "num_classes": r.spec.num_classes,
        "held": list(r.held),
        "counts": {modality: moments.count for modality, moments in r.moments.items()},
        "versions": dict(r.versions),
        "initial_sha256": r.initial_sha256,
    }
    return _pack(facts, arrays)


def unpack_registration(content: RecordDict) -> Registration:
    """The registration in a message. Raises WireError."""
    facts, arrays = _unpack(content)
    mean, centred = under("mean", arrays), under("centred", arrays)
    try:
        return Registration(
            client=int(facts["client"]),
            n=int(facts["n"]),
            class_counts=arrays["class_counts"],
            spec=DataSpec(facts["dims"], int(facts["num_classes"]), arrays.get("class_vectors"), arrays.get("seen")),
            held=tuple(facts["held"]),
            moments={m: Moments(int(count), mean[m], centred[m]) for m, count in facts["counts"].items()},
            versions=facts["versions"],
            initial_sha256=str(facts["initial_sha256"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"not a registration: {error!r}") from error


def pack_task(task: Task, shared: ArrayRecord | None = None) -> RecordDict:
    """A task; `shared` is `pack_arrays(task.shared)` where several tasks carry the same arrays."""
    facts = {
        "round": task.round,
        "client": task.client,
        "base": task.base,
        "fit": task.fit,
        "keep": task.keep,
        "evaluate": task.evaluate,
        "leader": task.leader,
        "scaled": task.scaler is not None,
    }
    content = _pack(facts, {})
    content["shared"] = shared if shared is not None else pack_arrays(task.shared)
    if task.scaler is not None:
        content["scaler"] = pack_arrays(task.scaler.to_state())
    return content


def unpack_task(content: RecordDict) -> Task:
    """The task in a message. Raises WireError."""
    facts, _ = _unpack(content)
    scaled = facts.pop("scaled", False)
    try:
        scaler = Scaler.from_state(unpack_arrays(content.array_records["scaler"])) if scaled else None
        return Task(shared=unpack_arrays(content.array_records["shared"]), scaler=scaler, **facts)
    except (KeyError, TypeError) as error:
        raise WireError(f"not a task: {error!r}") from error


def pack_update(update: Update) -> RecordDict:
    """A client's answer to a task."""
    facts = {
        "round": update.round,
        "client": update.client,
        "n": update.n,
        "class_counts": update.class_counts.tolist(),
        "loss": update.loss,
        "validation": update.validation,
        "test": update.test,
        "seconds": dict(update.seconds),
    }
    return _pack(facts, update.shared)


def unpack_update(content: RecordDict) -> Update:
    """The update in a message. Raises WireError."""
    facts, arrays = _unpack(content)
    try:
        return Update(
            round=int(facts["round"]),
            client=int(facts["client"]),
            n=int(facts["n"]),
            class_counts=torch.tensor(facts["class_counts"], dtype=torch.int64),
            loss=None if facts["loss"] is None else float(facts["loss"]),
            shared=arrays,
            validation=_scores(facts["validation"]),
            test=_scores(facts["test"]),
            seconds={part: float(seconds) for part, seconds in facts["seconds"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise WireError(f"not an update: {error!r}") from error


def pack_farewell(farewell: Farewell) -> RecordDict:
    """The end of a run."""
    return _pack(dict(vars(farewell)), {})


def unpack_farewell(content: RecordDict) -> Farewell:
    """The farewell in a message. Raises WireError."""
    facts, _ = _unpack(content)
    try:
        return Farewell(**facts)
    except TypeError as error:
        raise WireError(f"not a farewell: {error!r}") from error


def pack_report(report: Report) -> RecordDict:
    """A client's last word."""
    return _pack(dict(vars(report)), {})


def unpack_report(content: RecordDict) -> Report:
    """The report in a message. Raises WireError."""
    facts, _ = _unpack(content)
    try:
        return Report(
            int(facts["client"]), _scores(facts["selected"]), _scores(facts["last"]), str(facts["state_sha256"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(f"not a report: {error!r}") from error


def pack_checkpoint(checkpoint: Checkpoint) -> RecordDict:
    """Where a client's state goes or comes from; the answer is the same content."""
    return _pack(dict(vars(checkpoint)), {})


def unpack_checkpoint(content: RecordDict) -> Checkpoint:
    """The checkpoint in a message. Raises WireError."""
    facts, _ = _unpack(content)
    try:
        return Checkpoint(**facts)
    except TypeError as error:
        raise WireError(f"not a checkpoint: {error!r}") from error


def pack_arrays(state: State) -> ArrayRecord:
    """Named tensors as one record of raw bytes."""
    record = ArrayRecord()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise WireError(f"{name}: {tensor.dtype} does not travel")
        record[name] = Array(dtype, tuple(tensor.shape), _RAW, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return record


def unpack_arrays(record: ArrayRecord) -> State:
    """The tensors of a record, in torch's own memory. Raises WireError for anything but raw bytes of the right size."""
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    dtype = _DTYPES.get(array.dtype)
    shape = tuple(array.shape)
    if array.stype != _RAW or dtype is None or any(size < 0 for size in shape):
        raise WireError(f"{name}: expected raw bytes, got {array.stype} of {array.dtype} {list(shape)}")
    size = math.prod(shape) * dtype.itemsize
    if len(array.data) != size:
        raise WireError(f"{name}: expected {size} bytes for {list(shape)}, got {len(array.data)}")
    # torch's own memory: alignment can change the bits of what is computed from a tensor
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(array.data, np.uint8)
    return tensor


def _scores(scores: Any) -> dict[str, float] | None:
    return None if scores is None else {str(direction): float(score) for direction, score in scores.items()}


def _pack(facts: Mapping[str, Any], arrays: State) -> RecordDict:
    content = RecordDict({"facts": ConfigRecord({"json": json.dumps(facts)})})
    if arrays:
        content["arrays"] = pack_arrays(arrays)
    return content


def _unpack(content: RecordDict) -> tuple[dict[str, Any], State]:
    try:
        facts = json.loads(str(content.config_records["facts"]["json"]))
    except (KeyError, ValueError) as error:
        raise WireError(f"not a message of fedxmr's: {error!r}") from error
    if not isinstance(facts, dict):
        raise WireError(f"not a message of fedxmr's: {type(facts).__name__} for facts")
    record = content.array_records.get("arrays")
    return facts, unpack_arrays(record) if record is not None else {}

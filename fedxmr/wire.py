"""The one codec between what fedxmr says (messages.py) and Flower's records.

Arrays travel as their raw little-endian bytes: no pickle, no .npy header, one copy each way, or none within a process
that gives them away. All else is JSON of exactly the keys and types written down here: 10.0, "10" and true are not 10,
and what is not expected is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedxmr.messages import Checkpoint, Farewell, Registration, Report, Task, Update
from fedxmr.scaling import Moments, Scaler
from fedxmr.types import DataSpec, State

START, TRAIN, FINISH = "query.start", "train", "query.finish"
CHECKPOINT, RESTORE = "query.checkpoint", "query.restore"
"""The types of message a run is made of."""

_RAW = "fedxmr.raw"
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What a tensor can hold."""

_Scores = dict[str, float]
"""Any numbers, also NaN: checks.py says which of them may count."""


_EXPERIMENT = "experiment"
"""The record, in all that the server says, of which run it is of: clients' states are kept by it."""


class WireError(ValueError):
    """A message that is not one of fedxmr's."""


class _Facts(BaseModel):
    """What a message says besides its arrays."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Registration(_Facts):
    client: Integer
    n: Integer
    dims: dict[str, Integer]
    num_classes: Integer
    held: dict[str, Integer]
    moments: tuple[str, ...]
    versions: dict[str, str]
    initial_sha256: str


class _Task(_Facts):
    round: Integer
    client: Integer
    base: Integer
    fit: bool
    keep: bool
    evaluate: bool
    leader: Integer


class _Update(_Facts):
    round: Integer
    client: Integer
    n: Integer
    class_counts: list[Integer]
    loss: float | None
    validation: _Scores | None
    test: _Scores | None
    seconds: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class _Farewell(_Facts):
    client: Integer
    base: Integer
    selected: Integer
    last: Integer
    evaluate: bool


class _Report(_Facts):
    client: Integer
    selected: _Scores | None
    last: _Scores | None
    state_sha256: str


class _Checkpoint(_Facts):
    client: Integer
    base: Integer
    file: Annotated[str, Field(pattern=r"^checkpoint/\.?round-\d+/client-\d+\.safetensors$")]
    """Nowhere else: a client writes and reads what it is told to."""


def address(content: RecordDict, experiment: str) -> RecordDict:
    """The content of a message, marked as of an experiment; in place."""
    content[_EXPERIMENT] = ConfigRecord({"id": experiment})
    return content


def experiment(content: RecordDict) -> str:
    """The experiment that a message is of: letters and digits, for a client's files are named after it.

    Raises WireError.
    """
    name = content.config_records.get(_EXPERIMENT, ConfigRecord()).get("id")
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{1,64}", name):
        raise WireError(f"expected the experiment that the message is of, got {name!r:.80}")
    return name


def pack_start() -> RecordDict:
    """The start query: it asks who is there, and says nothing of its own."""
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
        "held": dict(r.held),
        "moments": list(r.moments),
        "versions": dict(r.versions),
        "initial_sha256": r.initial_sha256,
    }
    return _pack(facts, arrays)


def unpack_registration(content: RecordDict) -> Registration:
    """The registration in a message. Raises WireError."""
    facts, arrays = _unpack(content, "a registration", _Registration)
    try:
        registration = Registration(
            client=facts.client,
            n=facts.n,
            class_counts=arrays.pop("class_counts"),
            spec=DataSpec(facts.dims, facts.num_classes, arrays.pop("class_vectors", None), arrays.pop("seen", None)),
            held=facts.held,
            moments={
                m: Moments(facts.held[m], arrays.pop(f"mean/{m}"), arrays.pop(f"centred/{m}")) for m in facts.moments
            },
            versions=facts.versions,
            initial_sha256=facts.initial_sha256,
        )
    except KeyError as error:
        raise WireError(f"not a registration: lacks {error}") from error
    _expect_none(arrays, "a registration")
    return registration


def pack_task(task: Task, shared: ArrayRecord | None = None) -> RecordDict:
    """A task; `shared` is `pack_arrays(task.shared)` where several tasks carry the same arrays."""
    content = _pack({name: getattr(task, name) for name in _Task.model_fields}, {})
    content["shared"] = shared if shared is not None else pack_arrays(task.shared)
    if task.scaler is not None:
        content["scaler"] = pack_arrays(task.scaler.to_state())
    return content


def unpack_task(content: RecordDict) -> Task:
    """The task in a message. Raises WireError."""
    records = content.array_records
    if "shared" not in records:
        raise WireError("not a task: lacks shared")
    facts, arrays = _unpack(content, "a task", _Task, "shared", "scaler", _EXPERIMENT)
    _expect_none(arrays, "a task")
    scaler = Scaler.from_state(unpack_arrays(records["scaler"])) if "scaler" in records else None
    return Task(**dict(facts), shared=unpack_arrays(records["shared"]), scaler=scaler)


def pack_update(update: Update, *, give: bool = False) -> RecordDict:
    """A client's answer to a task. give: as in `pack_arrays`."""
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
    return _pack(facts, update.shared, give=give)


def unpack_update(content: RecordDict) -> Update:
    """The update in a message. Raises WireError."""
    facts, arrays = _unpack(content, "an update", _Update)
    counts = torch.tensor(facts.class_counts, dtype=torch.int64)
    return Update(**{**dict(facts), "class_counts": counts}, shared=arrays)


def pack_farewell(farewell: Farewell) -> RecordDict:
    """The end of a run."""
    return _pack(vars(farewell), {})


def unpack_farewell(content: RecordDict) -> Farewell:
    """The farewell in a message. Raises WireError."""
    return Farewell(**_unpack_facts(content, "a farewell", _Farewell, _EXPERIMENT))


def pack_report(report: Report) -> RecordDict:
    """A client's last word."""
    return _pack(vars(report), {})


def unpack_report(content: RecordDict) -> Report:
    """The report in a message. Raises WireError."""
    return Report(**_unpack_facts(content, "a report", _Report))


def pack_checkpoint(checkpoint: Checkpoint) -> RecordDict:
    """Where a client's state goes or comes from; the answer is the same content."""
    return _pack(vars(checkpoint), {})


def unpack_checkpoint(content: RecordDict) -> Checkpoint:
    """The checkpoint in a message. Raises WireError."""
    return Checkpoint(**_unpack_facts(content, "a checkpoint", _Checkpoint, _EXPERIMENT))


def pack_arrays(state: State, *, give: bool = False) -> ArrayRecord:
    """Named tensors as one record of raw bytes.

    give: their own memory, on the CPU, not a copy of it; whoever unpacks the record has it, and nobody else may use it.
    Flower's own runtimes carry copies alone.
    """
    record = ArrayRecord()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise WireError(f"{name}: {tensor.dtype} does not travel")
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        record[name] = array = Array(dtype, tuple(tensor.shape), _RAW, b"" if give else data.tobytes())
        if give:
            array.data = cast("bytes", data.data)  # `Array` itself takes nothing but bytes
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
    data = np.frombuffer(array.data, np.uint8)
    if dtype == torch.bool and bool((data > 1).any()):
        raise WireError(f"{name}: expected bytes of 0 and 1 for bool, got {data.max()}")
    if data.flags.writeable:  # given
        return torch.from_numpy(data).view(dtype).reshape(shape)
    # torch's own memory: alignment can change the bits of what is computed from a tensor
    try:
        tensor = torch.empty(shape, dtype=dtype)
    except (RuntimeError, TypeError, OverflowError) as error:  # nothing at all, of absurd sizes
        raise WireError(f"{name}: no tensor has the shape {list(shape)}") from error
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = data
    return tensor


def _pack(facts: Mapping[str, Any], arrays: State, *, give: bool = False) -> RecordDict:
    content = RecordDict({"facts": ConfigRecord({"json": json.dumps(facts)})})
    if arrays:
        content["arrays"] = pack_arrays(arrays, give=give)
    return content


F = TypeVar("F", bound=_Facts)


def _unpack(content: RecordDict, what: str, model: type[F], *others: str) -> tuple[F, State]:
    """The facts and the arrays of a message. others: the records that it may have besides."""
    if strange := sorted(set(content) - {"facts", "arrays", *others}):
        raise WireError(f"not {what}: brings {', '.join(strange)}")
    try:
        text = content.config_records["facts"]["json"]
        facts = model.model_validate_json(text if isinstance(text, str) else "")
    except KeyError as error:
        raise WireError(f"not {what}: lacks {error}") from error
    except ValidationError as error:
        raise WireError(f"not {what}: {_complaint(error)}") from error
    record = content.array_records.get("arrays")
    return facts, unpack_arrays(record) if record is not None else {}


def _unpack_facts(content: RecordDict, what: str, model: type[_Facts], *others: str) -> dict[str, Any]:
    """The facts of a message without arrays."""
    facts, arrays = _unpack(content, what, model, *others)
    _expect_none(arrays, what)
    return dict(facts)


def _expect_none(arrays: State, what: str) -> None:
    if arrays:
        raise WireError(f"not {what}: brings {', '.join(sorted(arrays))}")


def _complaint(error: ValidationError) -> str:
    """The first of pydantic's complaints in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{where}: {message}, got {first['input']!r:.60}" if where else message

"""What the server checks before anything counts: registrations first, then every update, and the final reports.

wire.py has seen to it that every number is of its type. A fault is one line that says what is wrong.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedxmr import state
from fedxmr.errors import FederationError
from fedxmr.evaluation import key
from fedxmr.machine import versions
from fedxmr.messages import Farewell, Registration, Report, Scores, Task, Update
from fedxmr.scaling import Moments, Scaler
from fedxmr.types import State


def check_registrations(registrations: Sequence[Registration], clients: int) -> None:
    """Every client there once, its facts fitting together, and all agreeing on the data's shape and the versions.

    Raises FederationError with a line for everything that does not fit.
    """
    times = Counter(r.client for r in registrations)
    wrong = [f"client {k}: claimed by {times[k]} nodes" for k in sorted(times) if times[k] > 1]
    wrong += [f"client {k}: expected an id from 0 to {clients - 1}" for k in sorted(times) if not 0 <= k < clients]
    wrong += [f"client {k}: did not register" for k in sorted(set(range(clients)) - times.keys())]
    for r in registrations:
        wrong += [f"client {r.client}: {fault}" for fault in _registration_faults(r)]
    for what, of in (
        ("feature widths", lambda r: dict(r.spec.dims)),
        ("number of classes", lambda r: r.spec.num_classes),
        ("class vectors", lambda r: _sha256(r.spec.class_vectors)),
        ("seen classes", lambda r: _sha256(r.spec.seen)),
        ("seeded initial state", lambda r: r.initial_sha256),
    ):
        wrong += _disagreements(what, {r.client: of(r) for r in registrations})
    for modality in sorted({modality for r in registrations for modality in r.held}):
        standardised = {r.client: modality in r.moments for r in registrations if modality in r.held}
        wrong += _disagreements(f"standardisation of {modality}", standardised)
    wrong += [
        f"client {r.client}: versions: expected the server's {dict(versions())}, got {dict(r.versions)}"
        for r in registrations
        if r.versions != versions()
    ]
    if wrong:
        raise FederationError("\n".join(wrong))


def fingerprint(registration: Registration) -> str:
    """A digest of what a client says of its data, by which a resumed run sees that they are still the same."""
    r = registration
    arrays: State = {"class_counts": r.class_counts}
    for modality, moments in r.moments.items():
        arrays |= {f"mean/{modality}": moments.mean, f"centred/{modality}": moments.centred}
    counts = {"": torch.tensor([r.n, *(r.held.get(modality, 0) for modality in sorted(r.spec.dims))])}
    return state.sha256(arrays | counts)


def check_unchanged(before: Mapping[int, str], now: Mapping[int, str]) -> None:
    """Every client's data are those that the run began with, by their fingerprints. Raises FederationError."""
    if changed := [client for client, fingerprint in now.items() if before.get(client) != fingerprint]:
        raise FederationError("\n".join(f"client {k}: its data have changed since the run began" for k in changed))


def check_initial_state(registrations: Sequence[Registration], sha256: str) -> None:
    """Every client starts from the state that the server starts from. Raises FederationError."""
    if wrong := [r for r in registrations if r.initial_sha256 != sha256]:
        lines = (f"client {r.client}: seeded initial state: expected {sha256}, got {r.initial_sha256}" for r in wrong)
        raise FederationError("\n".join(lines))


def find_fault(
    update: Update, task: Task, registration: Registration, expected: State, *, test: bool = False
) -> str | None:
    """Why an update must not count, or None where it may.

    task: what the client was asked to do. expected: the names it owns, with the shapes and types they have.
    test: whether an evaluation brings scores on test as well.
    """
    return next(_update_faults(update, task, registration, expected, test), None)


def find_report_fault(report: Report, farewell: Farewell, registration: Registration, scored: bool) -> str | None:
    """Why a client's last word must not count, or None where it may.

    scored: whether the client's model of the selected round has a score on validation; then it has one on test.
    """
    return next(_report_faults(report, farewell, registration, scored), None)


def _registration_faults(r: Registration) -> Iterator[str]:
    spec, counts = r.spec, r.class_counts
    if not spec.dims or min(*spec.dims.values(), spec.num_classes) < 1:
        yield f"expected modalities and classes, got widths {dict(spec.dims)} and {spec.num_classes} classes"
    if counts.dtype != torch.int64 or counts.shape != (spec.num_classes,):
        yield f"class counts: expected [{spec.num_classes}] torch.int64, got {_kind(counts)}"
    elif bool(((counts < 0) | (counts > r.n)).any()):
        yield f"class counts: expected 0 to {r.n}, its training items, got {counts.tolist()}"
    elif not 1 <= r.n <= sum(counts.tolist()) + sum(r.held.values()):
        yield f"expected training items with a class or a modality, got {r.n} with classes {counts.tolist()}"
    for modality, count in r.held.items():
        if modality not in spec.dims or not 1 <= count <= r.n:
            yield f"holds {count} of {modality}: expected 1 to {r.n} of {', '.join(spec.dims)}"
    for modality, moments in r.moments.items():
        yield from _moment_faults(modality, moments, spec.dims.get(modality, 0))
    if spec.class_vectors is not None:
        vectors = spec.class_vectors
        if vectors.ndim != 2 or len(vectors) != spec.num_classes or not vectors.is_floating_point():
            yield f"class vectors: expected [{spec.num_classes}, k] floats, got {_kind(vectors)}"
        elif not state.finite(vectors):
            yield "class vectors: not finite"
    if spec.seen is not None and (spec.seen.shape != (spec.num_classes,) or spec.seen.dtype != torch.bool):
        yield f"seen classes: expected [{spec.num_classes}] torch.bool, got {_kind(spec.seen)}"


def _moment_faults(modality: str, moments: Moments, width: int) -> Iterator[str]:
    for what, values in (("mean", moments.mean), ("centred squares", moments.centred)):
        if values.shape != (width,) or values.dtype != torch.float64:
            yield f"{what} of {modality}: expected [{width}] torch.float64, got {_kind(values)}"
            return
    if not bool((moments.centred >= 0).all()):
        yield f"centred squares of {modality}: expected >= 0"
    elif not all(state.finite(values) for values in Scaler.of({modality: moments}).to_state().values()):
        yield f"mean and centred squares of {modality}: give no finite float32 scaling"


def _disagreements(what: str, said: dict[int, Any]) -> list[str]:
    """A line for each client that says something else than most do, or, where it is even, than the first."""
    values = list(said.values())
    if all(value == values[0] for value in values):
        return []
    expected = max(values, key=values.count)
    return [f"client {k}: {what}: expected {expected}, got {value}" for k, value in said.items() if value != expected]


def _update_faults(
    update: Update, task: Task, registration: Registration, expected: State, test: bool
) -> Iterator[str]:
    if update.client != registration.client:
        yield f"answers as client {update.client}"
    if update.round != task.round:
        yield f"answers for round {update.round}, asked was round {task.round}"
    if update.n != registration.n:
        yield f"says {update.n} training items, registered were {registration.n}"
    if not torch.equal(update.class_counts, registration.class_counts):
        yield "says other class counts than it registered"
    yield from _score_faults("validation", update.validation, task.evaluate, registration)
    yield from _score_faults("test", update.test, task.evaluate and test, registration)
    if update.loss is None:
        if update.shared:
            yield f"arrays {', '.join(sorted(update.shared))} without a loss"
        return
    if not task.fit:
        yield "trained without being asked to"
    if not (math.isfinite(update.loss) and update.loss >= 0):
        yield f"loss {update.loss}, expected finite and >= 0"
    yield from _array_faults(update.shared, expected)


def _report_faults(report: Report, farewell: Farewell, registration: Registration, scored: bool) -> Iterator[str]:
    if report.client != registration.client:
        yield f"reports as client {report.client}"
    yield from _score_faults("last", report.last, farewell.evaluate, registration)
    # a client may hold the selected model though its score on validation was lost with a rejected update
    asked = farewell.evaluate and (scored or report.selected is not None)
    yield from _score_faults("selected", report.selected, asked, registration)
    if not re.fullmatch("[0-9a-f]{64}", report.state_sha256):
        yield f"expected the SHA-256 of its final state, got {report.state_sha256!r}"


def _score_faults(part: str, scores: Scores | None, asked: bool, registration: Registration) -> Iterator[str]:
    if scores is None:
        if asked:
            yield f"lacks the {part} scores it was asked for"
        return
    if not asked:
        yield f"brings {part} scores that were not asked for"
    directions = {key(direction) for direction in permutations(registration.spec.dims, 2)}
    if scores.keys() != directions | {"average"}:
        yield f"{part} scores of {', '.join(sorted(scores))}, expected {', '.join(sorted(directions | {'average'}))}"
    for direction, score in scores.items():
        if not 0 <= score <= 1:
            yield f"{part} mAP {direction} of {score}, expected 0 to 1"
    mean = fmean(scores[direction] for direction in directions)
    if not math.isclose(scores["average"], mean):
        yield f"{part} mAP average of {scores['average']}, expected the mean, {mean}"


def _array_faults(shared: State, expected: State) -> Iterator[str]:
    if missing := sorted(expected.keys() - shared.keys()):
        yield f"lacks {', '.join(missing)}"
    if extra := sorted(shared.keys() - expected.keys()):
        yield f"brings {', '.join(extra)}, which it does not share"
    for name, like in expected.items():
        got = shared[name]
        if got.shape != like.shape or got.dtype != like.dtype:
            yield f"{name}: expected {_kind(like)}, got {_kind(got)}"
        elif not state.finite(got):
            yield f"{name}: not finite"


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _sha256(tensor: Tensor | None) -> str | None:
    """What stands for a tensor in a line of text."""
    return None if tensor is None else state.sha256({"": tensor})

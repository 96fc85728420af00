"""What the server checks before anything counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations

import torch
from torch import Tensor

from fedxmr import state
from fedxmr.errors import FederationError
from fedxmr.evaluation import key
from fedxmr.messages import Registration, Task, Update
from fedxmr.types import State


def check_registrations(registrations: Sequence[Registration], clients: int, initial_sha256: str) -> None:
    """Every client there once, and all agreeing on the data's shape, the versions and the initial state.

    Raises FederationError with one line per client that does not fit.
    """
    ids = [r.client for r in registrations]
    wrong = [f"client {k}: claimed by {ids.count(k)} nodes" for k in sorted(set(ids)) if ids.count(k) > 1]
    wrong += [f"client {k}: expected an id from 0 to {clients - 1}" for k in sorted(set(ids)) if not 0 <= k < clients]
    wrong += [f"client {k}: did not register" for k in range(clients) if k not in ids]
    first = registrations[0] if registrations else None
    for r in registrations:
        assert first is not None
        for what, expected, got in (
            ("feature widths", dict(first.spec.dims), dict(r.spec.dims)),
            ("number of classes", first.spec.num_classes, r.spec.num_classes),
            ("class vectors", _sha256(first.spec.class_vectors), _sha256(r.spec.class_vectors)),
            ("seen classes", _sha256(first.spec.seen), _sha256(r.spec.seen)),
            ("versions", dict(first.versions), dict(r.versions)),
            ("seeded initial state", initial_sha256, r.initial_sha256),
        ):
            if expected != got:
                wrong.append(f"client {r.client}: {what}: expected {expected}, got {got}")
        if r.n < 1 or r.class_counts.shape != (r.spec.num_classes,) or bool((r.class_counts < 0).any()):
            wrong.append(f"client {r.client}: expected items and a count per class, got {r.n} and {r.class_counts}")
    if wrong:
        raise FederationError("\n".join(wrong))


def _sha256(tensor: Tensor | None) -> str | None:
    """What stands for a tensor in a line of text."""
    return None if tensor is None else state.sha256({"": tensor})


def find_fault(update: Update, task: Task, registration: Registration, expected: State) -> str | None:
    """Why an update must not count, or None where it may.

    task: what the client was asked to do. expected: the names it owns, with the shapes and types they have.
    """
    return next(_faults(update, task, registration, expected), None)


def _faults(update: Update, task: Task, registration: Registration, expected: State) -> Iterator[str]:
    if update.client != registration.client:
        yield f"answers as client {update.client}"
    if update.round != task.round:
        yield f"answers for round {update.round}, asked was round {task.round}"
    if update.n != registration.n:
        yield f"says {update.n} training items, registered were {registration.n}"
    if not torch.equal(update.class_counts, registration.class_counts):
        yield "says other class counts than it registered"
    yield from _score_faults(update, task, registration)
    if update.loss is None:
        if update.shared:
            yield f"arrays {', '.join(sorted(update.shared))} without a loss"
        return
    if not task.fit:
        yield "trained without being asked to"
    if not (math.isfinite(update.loss) and update.loss >= 0):
        yield f"loss {update.loss}, expected finite and >= 0"
    yield from _array_faults(update.shared, expected)


def _score_faults(update: Update, task: Task, registration: Registration) -> Iterator[str]:
    if task.evaluate != (update.validation is not None):
        yield "brings scores that were not asked for" if update.validation else "lacks the scores it was asked for"
    directions = {key(direction) for direction in permutations(registration.spec.dims, 2)} | {"average"}
    for scores in (update.validation, update.test):
        if scores is not None and scores.keys() != directions:
            yield f"scores of {', '.join(sorted(scores))}, expected {', '.join(sorted(directions))}"
        for direction, score in (scores or {}).items():
            if not 0 <= score <= 1:
                yield f"mAP {direction} of {score}, expected 0 to 1"


def _array_faults(shared: State, expected: State) -> Iterator[str]:
    if missing := sorted(expected.keys() - shared.keys()):
        yield f"lacks {', '.join(missing)}"
    if extra := sorted(shared.keys() - expected.keys()):
        yield f"brings {', '.join(extra)}, which it does not share"
    for name, like in expected.items():
        got = shared[name]
        if got.shape != like.shape or got.dtype != like.dtype:
            yield f"{name}: expected {list(like.shape)} {like.dtype}, got {list(got.shape)} {got.dtype}"
        elif not bool(torch.isfinite(got).all()):
            yield f"{name}: not finite"

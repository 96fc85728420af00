"""The learners by name: a new one is a module and a line here."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel
from torch import Tensor

from fedxmr.errors import InputError, reason, unknown
from fedxmr.types import DataSpec, Learner

FLOORS: dict[str, str] = {
    "cca": "fedxmr.learners.correlation:CCA",
    "cosine": "fedxmr.learners.untrained:Cosine",
    "logistic": "fedxmr.learners.logistic:Logistic",
    "mcca": "fedxmr.learners.correlation:MCCA",
    "mvda": "fedxmr.learners.mvda:MvDA",
    "pls": "fedxmr.learners.correlation:PLS",
}
"""Classical methods that every table is to be judged against: fitted in one round, by one client or by each alone."""

LEARNERS: dict[str, str] = {
    "dscmr": "fedxmr.learners.dscmr:DSCMR",
    "dlsl": "fedxmr.learners.dlsl:DLSL",
    "drsl": "fedxmr.learners.drsl:DRSL",
    "mccn": "fedxmr.learners.mccn:MCCN",
    "jfse": "fedxmr.learners.jfse:JFSE",
    **FLOORS,
}
"""Name -> "module:Class", imported when asked for: nobody waits for a learner they do not use."""


def learner_class(name: str) -> type[Learner]:
    """A registered learner's class, or that of an outside one given as "package.module:Class"."""
    if name not in LEARNERS and ":" not in name:
        raise unknown("learner", name, LEARNERS)
    module, _, attribute = LEARNERS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module from outside may do anything
        raise InputError(f"learner {name!r}: expected package.module:Class, got {describe(error)}") from error
    for part in ("Config", "fit", "owned", "encode", "similarity", "state", "load"):
        if not hasattr(found, part):
            raise InputError(f"learner {name!r}: expected a class with the methods of a learner, it lacks {part}")
    if not (isinstance(found.Config, type) and issubclass(found.Config, BaseModel)):
        raise InputError(f"learner {name!r}: expected Config to be a pydantic model, got {found.Config!r}")
    return cast("type[Learner]", found)


def vet(name: str, learner: Learner, spec: DataSpec) -> None:
    """See that what a learner says of its parameters goes with its state. Raises InputError."""

    def expect(fits: bool, what: str, got: object) -> None:
        if not fits:
            raise InputError(f"learner {name!r}: expected {what}, got {got}")

    state = learner.state()
    tensors = isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())
    expect(tensors, "state() to be tensors by name", type(state).__name__)
    for part in ("common", "trainable", "statistics", "by_class"):
        names: Any = getattr(learner, part, None)
        expect(isinstance(names, frozenset), f"{part} to be a frozenset of names", type(names).__name__)
        strange = sorted(map(str, names - state.keys()))
        expect(not strange, f"{part} to be names of its state", ", ".join(strange))
    weights = learner.trainable | learner.statistics
    owned = learner.owned(tuple(spec.dims))
    expect(owned <= state.keys(), "owned() to be names of its state", ", ".join(sorted(owned - state.keys())))
    expect(learner.common <= weights, "common to be trainable", ", ".join(sorted(learner.common - weights)))
    for row_wise in sorted(learner.by_class):
        shape, rows = list(state[row_wise].shape), spec.num_classes
        expect(shape[:1] == [rows], f"{row_wise}, which is by class, to have {rows} rows", shape)


def describe(error: BaseException) -> str:
    """An error of somebody else's code in one line: what it was, its words and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{reason(error)}{at}"

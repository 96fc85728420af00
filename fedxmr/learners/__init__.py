"""The learners by name: a new one is a module and a line here."""

from __future__ import annotations

import importlib
from typing import cast

from fedxmr.errors import InputError, unknown
from fedxmr.types import Learner

LEARNERS: dict[str, str] = {
    "dscmr": "fedxmr.learners.dscmr:DSCMR",
    "drsl": "fedxmr.learners.drsl:DRSL",
    "mccn": "fedxmr.learners.mccn:MCCN",
    "jfse": "fedxmr.learners.jfse:JFSE",
}
"""Name -> "module:Class", imported when asked for: nobody waits for a learner they do not use."""


def learner_class(name: str) -> type[Learner]:
    """A registered learner's class, or that of an outside one given as "package.module:Class"."""
    if name not in LEARNERS and ":" not in name:
        raise unknown("learner", name, LEARNERS)
    module, _, attribute = LEARNERS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"learner {name!r}: expected package.module:Class, got {error}") from error
    if lacking := [part for part in ("Config", "fit", "owned", "encode", "state", "load") if not hasattr(found, part)]:
        raise InputError(f"learner {name!r}: expected a class with the methods of a learner, it lacks {lacking[0]}")
    return cast("type[Learner]", found)

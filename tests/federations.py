"""Running whole federations in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedxmr.config import Config, override, resolve
from fedxmr.simulate import run

SMALL = (
    "dataset.name=synthetic",
    "dataset.items=60",
    "dataset.validation_items=20",
    "dataset.test_items=30",
    "dataset.modalities={image: 6, text: 4}",
    "dataset.classes=3",
    "learner.hidden=8",
    "learner.width=4",
    "runtime.threads=1",
    "federation.rounds=3",
)
"""A federation that takes a fraction of a second."""

TOY = (*(a for a in SMALL if not a.startswith("learner.")), "learner.name=tests.toy:Toy")


def configured(*assignments: str, base: tuple[str, ...] = SMALL) -> Config:
    """A small configuration with changes."""
    return resolve(override({}, [*base, *assignments]))


def federate(out: Path, *assignments: str, base: tuple[str, ...] = SMALL) -> dict[str, Any]:
    """Run one and return its summary."""
    return run(configured(*assignments, base=base), out, pictures=False)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two runs agree as two runs of one seed must: shared and private states, and every metric."""
    a, b = (json.loads((out / "summary.json").read_text()) for out in (one, other))
    hashes = all(a[key] == b[key] for key in ("shared_sha256", "models_sha256"))
    return hashes and (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()

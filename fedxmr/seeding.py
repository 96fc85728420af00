"""Randomness as a pure function of (seed, purpose, round, client): nothing to store, nothing to share."""

from __future__ import annotations

import hashlib

from torch import Generator


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> Generator:
    """A fresh CPU generator. Equal arguments give equal draws on every machine and in any order of calls."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

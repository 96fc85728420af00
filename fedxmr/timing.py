"""Where a process spends its time: exclusive wall-clock parts that add up to the total."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Splits the time since its creation into named parts; what no part claims is `other`.

    Parts may nest: the inner one's time does not count for the outer one.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._since = time.perf_counter()

    def _book(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time spent inside counts for `name`."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def shift(self, source: str, parts: Mapping[str, float]) -> None:
        """Count seconds that were booked on `source` for other parts, at most as many as there are."""
        self._book()
        total = sum(parts.values())
        share = min(1.0, self._seconds[source] / total) if total > 0 else 0.0
        for name, seconds in parts.items():
            self._seconds[name] += seconds * share
            self._seconds[source] -= seconds * share

    def seconds(self) -> dict[str, float]:
        """The seconds of every part so far."""
        self._book()
        return dict(self._seconds)


clock = Clock()
"""This process's clock. Measuring only: nothing that is computed depends on it."""

"""Statistics over seeds: mean and deviation, and paired differences with their t interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Of paired runs (same seed: same split, initial state and order of batches). low, high: a 95 % t interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """better or worse only where the interval excludes zero."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """values - reference, seed by seed. Raises ValueError for fewer than two pairs: one seed is never a result."""
    pairs = [a - b for a, b in zip(values, reference, strict=True)]
    if len(pairs) < 2:
        raise ValueError(f"a paired difference: expected at least 2 seeds, got {len(pairs)}")
    mean, deviation = fmean(pairs), stdev(pairs)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * deviation / len(pairs) ** 0.5
    return Difference(mean, mean - half, mean + half)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, for a table."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

"""Statistics of a comparison: over seeds the t interval of paired differences, over queries a paired bootstrap.

Seeds and queries are two sources of chance: a difference may hold for these queries whatever the seed, and not for
others. Where several methods are compared with one reference, Holm's step-down correction (Scandinavian Journal of
Statistics, 1979) bounds the chance of any false claim in the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
FEW = 30
"""Queries of a direction, some items being none: with fewer a resample may have none."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval about a mean."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:+.3f} to {self.high:+.3f}"


@dataclass(frozen=True)
class Difference:
    """Of paired runs (same seed: same split, initial state and order of batches). p: two-sided, of the t test."""

    interval: Interval
    p: float


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """values - reference, seed by seed: their mean, its t interval, and the p of the paired t test.

    Raises ValueError for fewer than two pairs: one seed is never a result.
    """
    pairs = [a - b for a, b in zip(values, reference, strict=True)]
    if len(pairs) < 2:
        raise ValueError(f"a paired difference: expected at least 2 seeds, got {len(pairs)}")
    mean = fmean(pairs)
    if stdev(pairs) == 0:  # of methods that do not depend on the seed
        return Difference(Interval(mean, mean, mean), float(mean == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are nearly the same
        found = stats.ttest_1samp(pairs, 0.0)
    low, high = found.confidence_interval(CONFIDENCE)
    return Difference(Interval(mean, float(low), float(high)), float(found.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    order = np.argsort(p, kind="stable")
    stepped = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return [float(value) for value in adjusted]


def paired_bootstrap(values: Array, reference: Array, seed: int = 0) -> Interval | None:
    """The difference in mAP, averaged over directions, under resampling of the test items.

    values, reference: [directions, n] average precision of each item as a query, NaN where it is none. An item is
    drawn with all its directions, since its image and its text are not independent.
    Returns the percentile interval; None where a direction has no query, or so few that a resample may have none.
    """
    apart = values - reference
    n = apart.shape[1]
    if n < 2 or (np.isfinite(apart).sum(1) < min(FEW, n)).any():
        return None

    def mean_difference(items: npt.NDArray[np.int64], axis: int) -> Array:
        by_direction: Array = np.nanmean(apart[:, items], axis=axis)  # scipy's axis is the last one
        mean: Array = by_direction.mean(0)
        return mean

    found = stats.bootstrap(
        (np.arange(n),),
        mean_difference,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, (1 << 22) // apart.size),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(np.nanmean(apart, axis=1).mean()), float(found.low), float(found.high))


def verdict(difference: Difference, adjusted: float, queries: Interval | None) -> str:
    """better or worse only where the seeds show it after Holm's correction, and the queries do not leave it open.

    A difference that is the same for all seeds, as of methods that do not depend on them, must be shown by the queries.
    """
    over_seeds = difference.interval
    unshown = over_seeds.low == over_seeds.high if queries is None else queries.low <= 0 <= queries.high
    if adjusted >= 1 - CONFIDENCE or unshown:
        return "no difference shown"
    return "better" if over_seeds.mean > 0 else "worse"

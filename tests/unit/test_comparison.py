"""Comparisons against SciPy's paired t test, the definition of closed testing, and the limit of the bootstrap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fedxmr.comparison import Interval, holm, paired_bootstrap, paired_difference, verdict
from fedxmr.tables import spread

scores = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=10))
def test_interval_and_p_are_those_of_the_paired_t_test(pairs):
    a, b = (list(values) for values in zip(*pairs, strict=True))
    assume(np.std(np.subtract(a, b)) > 1e-6)
    expected = ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    got = paired_difference(a, b)
    assert (got.interval.low, got.interval.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    assert got.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


def test_a_difference_that_no_seed_changes_is_certain():
    assert paired_difference([0.5, 0.5], [0.25, 0.25]).p == 0
    assert paired_difference([0.5, 0.5], [0.5, 0.5]).p == 1


@settings(max_examples=50)
@given(st.lists(scores, min_size=1, max_size=5))
def test_holm_is_closed_testing_with_bonferroni(p):
    # a hypothesis is rejected when every intersection it takes part in is (Marcus, Peritz and Gabriel, 1976)
    together = [s for r in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), r)]
    expected = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in together if i in s) for i in range(len(p))]
    assert holm(p) == pytest.approx(expected)


def test_better_is_said_only_where_seeds_and_queries_agree():
    better = paired_difference([0.50, 0.52, 0.51], [0.40, 0.41, 0.42])
    worse = paired_difference([0.40, 0.41, 0.42], [0.50, 0.52, 0.51])
    open_ = paired_difference([0.40, 0.60, 0.50], [0.41, 0.50, 0.55])
    sure, unsure = Interval(0.1, 0.05, 0.15), Interval(0.1, -0.01, 0.21)
    assert verdict(better, better.p, sure) == verdict(better, better.p, None) == "better"
    assert verdict(worse, worse.p, None) == "worse"
    assert verdict(open_, open_.p, sure) == "no difference shown"
    assert verdict(better, better.p, unsure) == "no difference shown"
    always = paired_difference([0.5, 0.5], [0.4, 0.4])  # the seeds change nothing, so they show nothing
    assert (verdict(always, 0.0, None), verdict(always, 0.0, sure)) == ("no difference shown", "better")
    assert verdict(better, 0.06, sure) == "no difference shown"  # after Holm's correction


def test_the_bootstrap_tends_to_the_normal_interval():
    rng = np.random.default_rng(0)
    apart = rng.normal(0.02, 0.1, (1, 800))
    found = paired_bootstrap(apart + 0.3, np.full_like(apart, 0.3))
    half = 1.96 * apart.std() / 800**0.5
    assert found.mean == pytest.approx(apart.mean())
    assert (found.low, found.high) == pytest.approx((apart.mean() - half, apart.mean() + half), abs=3e-4)


def test_the_bootstrap_draws_an_item_with_all_its_directions():
    # two directions that agree item by item tell no more than one; drawn apart, the interval would be narrower
    apart = np.random.default_rng(0).normal(0.02, 0.1, (1, 400))
    one = paired_bootstrap(apart, np.zeros_like(apart))
    two = paired_bootstrap(apart.repeat(2, 0), np.zeros((2, 400)))
    assert (two.low, two.high) == pytest.approx((one.low, one.high))


def test_items_that_are_no_query_of_a_direction_are_left_out_of_it():
    apart = np.full((2, 100), np.nan)
    apart[0, :50], apart[1, 30:] = 0.2, 0.4
    found = paired_bootstrap(apart, np.zeros_like(apart))
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3))
    apart[0, 5:] = np.nan
    assert paired_bootstrap(apart, np.zeros_like(apart)) is None  # a resample might have none of five


def test_one_seed_is_no_comparison():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        paired_difference([0.5], [0.4])


def test_spread_is_mean_and_sample_deviation():
    assert spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert spread([0.1]) == "0.100"

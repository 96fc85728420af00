"""Paired differences against SciPy's paired t test, which computes the same interval another way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fedxmr.comparison import paired_difference, spread

scores = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=10))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    a, b = (list(values) for values in zip(*pairs, strict=True))
    assume(np.std(np.subtract(a, b)) > 1e-6)
    expected = ttest_rel(a, b).confidence_interval(0.95)
    got = paired_difference(a, b)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


def test_better_is_said_only_where_the_interval_excludes_zero():
    assert paired_difference([0.50, 0.52, 0.51], [0.40, 0.41, 0.42]).verdict == "better"
    assert paired_difference([0.40, 0.41, 0.42], [0.50, 0.52, 0.51]).verdict == "worse"
    assert paired_difference([0.40, 0.60, 0.50], [0.41, 0.50, 0.55]).verdict == "no difference shown"


def test_one_seed_is_no_comparison():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        paired_difference([0.5], [0.4])


def test_spread_is_mean_and_sample_deviation():
    assert spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert spread([0.1]) == "0.100"

import math

import numpy as np
import pytest
from scipy import stats

from experiments.statistics import estimate, holm, paired


def test_an_estimate_is_students_t():
    sample = np.random.default_rng(0).normal(0.1, 1.0, 12)
    found, peer = estimate(sample), stats.ttest_1samp(sample, 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(peer.confidence_interval(0.95)))
    assert found.p == pytest.approx(peer.pvalue)
    assert found.mean == pytest.approx(sample.mean())
    assert found.standard_error == pytest.approx(stats.sem(sample))


def test_an_interval_by_hand():
    found = estimate(np.array([1.0, 2.0, 3.0]))
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert found.high - found.mean == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2)


def test_the_interval_contains_the_mean_as_often_as_it_says():
    rng, trials = np.random.default_rng(1), 2000
    found = [estimate(rng.normal(5.0, 2.0, 8)) for _ in range(trials)]
    inside = np.mean([each.low < 5.0 < each.high for each in found])
    assert abs(inside - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_one_number_says_nothing_of_its_uncertainty():
    found = estimate(np.array([2.0]))
    assert (found.n, found.mean) == (1, 2.0)
    assert all(map(math.isnan, found[2:]))
    with pytest.raises(ValueError, match="sample is empty"):
        estimate(np.array([]))


def test_repetitions_that_agree_leave_no_doubt():
    assert estimate(np.array([0.5, 0.5])) == (2, 0.5, 0.0, 0.5, 0.5, 0.0)
    assert estimate(np.array([0.0, 0.0])).p == 1.0


def test_a_difference_is_paired():
    rng = np.random.default_rng(2)
    shared = rng.normal(0.0, 10.0, 9)
    first, second = shared + rng.normal(0.3, 0.1, 9), shared
    found, peer = paired(first, second), stats.ttest_rel(first, second)
    assert found.p == pytest.approx(peer.pvalue) and found.p < 1e-3
    assert stats.ttest_ind(first, second).pvalue > 0.5  # what pairing is for
    with pytest.raises(ValueError, match="first has 9 numbers and second 2"):
        paired(first, second[:2])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_what_tested_nothing():
    first, none, second = holm([0.02, math.nan, 0.03])
    assert (first, second) == pytest.approx((0.04, 0.04)) and math.isnan(none)

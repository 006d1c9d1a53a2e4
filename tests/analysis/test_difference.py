import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from analysis import difference


def noise(n, sd=0.2, seed=0):
    return 90 + sd * np.random.default_rng(seed).standard_normal((n, 10))


def test_paired_matches_scipy():
    ours, theirs = noise(5), noise(5, seed=1)
    found = difference.paired(ours, theirs)
    lower, upper = difference.bounds(found.mean, found.variance, found.df, 0.95)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.9)
    assert np.allclose(lower, expected.low) and np.allclose(upper, expected.high)


def test_welch_matches_scipy_from_replicates_and_from_summaries():
    ours, theirs = noise(3, sd=0.5), noise(6, seed=1)
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.9)
    means, sds = [part.mean(0) for part in (ours, theirs)], [part.std(0, ddof=1) for part in (ours, theirs)]
    for found in (difference.welch(ours, theirs), difference.from_summaries(means, sds, (3, 6))):
        lower, upper = difference.bounds(found.mean, found.variance, found.df, 0.95)
        assert np.allclose(lower, expected.low) and np.allclose(upper, expected.high)


def test_summaries_assume_perfectly_correlated_levels_for_the_mean():
    levels = np.linspace(0, 1, 10)
    ours, theirs = (90 + np.random.default_rng(s).standard_normal((4, 1)) * (1 + levels) for s in (0, 1))
    known = difference.welch(ours, theirs).average
    means, sds = [part.mean(0) for part in (ours, theirs)], [part.std(0, ddof=1) for part in (ours, theirs)]
    assert np.allclose(known, difference.from_summaries(means, sds, (4, 4)).average)


def test_pooling_shrinks_variances_and_gains_degrees_of_freedom():
    generator = np.random.default_rng(0)
    found = difference.paired(generator.standard_normal((500, 4, 10)), generator.standard_normal((500, 4, 10)))
    variance, df = difference.pooled(found)
    assert np.log(variance).var() < 0.5 * np.log(found.variance).var()
    assert np.median(df) > 3


def test_pooling_gains_nothing_from_perfectly_correlated_levels():
    generator = np.random.default_rng(0)
    found = difference.paired(np.repeat(generator.standard_normal((500, 4, 1)), 10, axis=-1), np.zeros((500, 4, 10)))
    variance, df = difference.pooled(found)
    assert (variance > found.variance).all() and (df < 3.01).all()


def test_welch_has_one_degree_of_freedom_with_two_replicates():
    assert (difference.welch(noise(4), noise(2)).df == 1).all()


def planned(sd, paired):
    zero = np.zeros(10)
    return difference.Difference(
        zero, np.full(10, sd**2 / 4), zero + 3, np.ones(()), (zero, zero, zero), (4, 4), paired
    )


def test_replicates_needed_reach_the_power():
    for paired in (True, False):
        n = difference.replicates_needed(planned(0.5, paired), np.full(10, 0.3), 0.95)
        generator = np.random.default_rng(0)
        shape = (4000, n, 10)
        if paired:
            found = difference.paired(0.3 + 0.5 * generator.standard_normal(shape), np.zeros(shape))
        else:
            arms = (0.5 / 2**0.5 * generator.standard_normal(shape) for _ in range(2))
            found = difference.welch(next(arms) + 0.3, next(arms))
        lower, upper = difference.bounds(found.mean, found.variance, found.df, 0.95)
        assert 0.79 < (difference.verdict(lower, upper, 0) == "dominates").mean() < 0.85


def test_replicates_needed_is_none_for_a_negative_or_tiny_gap():
    assert difference.replicates_needed(planned(0.5, True), np.full(10, -0.1), 0.95) is None
    assert difference.replicates_needed(planned(5, True), np.full(10, 0.001), 0.95) is None


@given(st.floats(1e-6, 100))
def test_trigamma_inverse(y):
    assert special.polygamma(1, difference._trigamma_inverse(np.array(y))) == pytest.approx(y, rel=1e-6)


def test_moderated_variance_is_better_than_the_raw_one_and_worse_than_with_a_known_prior():
    """Simulates Smyth's model with d0 = 6, prior variance 0.04 and no trend."""
    generator = np.random.default_rng(0)
    true = 0.04 * 6 / generator.chisquare(6, (300, 60))
    found = difference.paired(
        np.sqrt(true)[:, None, :] * generator.standard_normal((300, 4, 60)), np.zeros((300, 4, 60))
    )
    best = (6 * 0.04 + 3 * found.variance * 4) / 9 / 4
    variance, _ = difference.pooled(found)
    error = lambda estimate: np.log(estimate / (true / 4)).std()
    assert error(best) < error(variance) < 0.7 * error(found.variance)

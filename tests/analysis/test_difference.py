import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from analysis import difference


def noise(n, sd=0.2, seed=0):
    return 90 + sd * np.random.default_rng(seed).standard_normal((n, 10))


def test_the_paired_test_is_that_of_scipy():
    ours, theirs = noise(5), noise(5, seed=1)
    found = difference.paired(ours, theirs)
    lower, upper = difference.bounds(found.mean, found.variance, found.df, 0.95)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.9)
    assert np.allclose(lower, expected.low) and np.allclose(upper, expected.high)


def test_the_unpaired_test_is_welchs_from_replicates_and_from_summaries():
    ours, theirs = noise(3, sd=0.5), noise(6, seed=1)
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.9)
    means, sds = [part.mean(0) for part in (ours, theirs)], [part.std(0, ddof=1) for part in (ours, theirs)]
    for found in (difference.welch(ours, theirs), difference.from_summaries(means, sds, (3, 6))):
        lower, upper = difference.bounds(found.mean, found.variance, found.df, 0.95)
        assert np.allclose(lower, expected.low) and np.allclose(upper, expected.high)


def test_of_summaries_the_mean_is_as_wide_as_perfectly_correlated_levels_make_it():
    levels = np.linspace(0, 1, 10)
    ours, theirs = (90 + np.random.default_rng(s).standard_normal((4, 1)) * (1 + levels) for s in (0, 1))
    known = difference.welch(ours, theirs).average
    means, sds = [part.mean(0) for part in (ours, theirs)], [part.std(0, ddof=1) for part in (ours, theirs)]
    assert np.allclose(known, difference.from_summaries(means, sds, (4, 4)).average)


def test_pooling_draws_a_level_towards_the_others_and_earns_degrees_of_freedom():
    generator = np.random.default_rng(0)
    found = difference.paired(generator.standard_normal((500, 4, 10)), generator.standard_normal((500, 4, 10)))
    variance, df = difference.pooled(found)
    assert np.log(variance).var() < 0.5 * np.log(found.variance).var()
    assert np.median(df) > 3


def test_pooling_earns_nothing_where_a_replicates_levels_are_one():
    generator = np.random.default_rng(0)
    found = difference.paired(np.repeat(generator.standard_normal((500, 4, 1)), 10, axis=-1), np.zeros((500, 4, 10)))
    variance, df = difference.pooled(found)
    assert (variance > found.variance).all() and (df < 3.01).all()


def test_an_arm_of_two_replicates_has_one_degree_of_freedom():
    assert (difference.welch(noise(4), noise(2)).df == 1).all()


def planned(sd, paired):
    zero = np.zeros(10)
    return difference.Difference(
        zero, np.full(10, sd**2 / 4), zero + 3, np.ones(()), (zero, zero, zero), (4, 4), paired
    )


def test_the_replicates_needed_reach_their_power():
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


def test_no_replicates_help_a_difference_on_the_wrong_side():
    assert difference.replicates_needed(planned(0.5, True), np.full(10, -0.1), 0.95) is None
    assert difference.replicates_needed(planned(5, True), np.full(10, 0.001), 0.95) is None


@given(st.floats(1e-6, 100))
def test_the_inverse_of_trigamma_is_one(y):
    assert special.polygamma(1, difference._trigamma_inverse(np.array(y))) == pytest.approx(y, rel=1e-6)


def test_a_moderated_variance_is_nearer_to_the_truth_than_its_own_and_not_so_near_as_if_the_prior_were_known():
    """Draws from Smyth's model: d0 = 6, prior variance 0.04, no trend."""
    generator = np.random.default_rng(0)
    true = 0.04 * 6 / generator.chisquare(6, (300, 60))
    found = difference.paired(
        np.sqrt(true)[:, None, :] * generator.standard_normal((300, 4, 60)), np.zeros((300, 4, 60))
    )
    best = (6 * 0.04 + 3 * found.variance * 4) / 9 / 4
    variance, _ = difference.pooled(found)
    error = lambda estimate: np.log(estimate / (true / 4)).std()
    assert error(best) < error(variance) < 0.7 * error(found.variance)

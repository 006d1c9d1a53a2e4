import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from analysis import difference

SHAPES = st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(2, 12), st.integers(0, 999))


def noise(n, sd=0.2, seed=0):
    return 90 + sd * np.random.default_rng(seed).standard_normal((n, 10))


def draw(shape):
    """Accuracies of n and m replicates at L levels, and a random generator."""
    n, m, levels, seed = shape
    random = np.random.default_rng(seed)
    ours, theirs = random.normal(90, 1, (n, levels)), random.normal(90, 1, (m, levels))
    theirs[0, 1] = theirs[0, 0] + 1e-6  # the resolution of the accuracies
    return ours, theirs, random


def compare(ours, theirs):
    """The paired comparison of the replicates that both arms have, and the unpaired comparison of all."""
    n = min(len(ours), len(theirs))
    return difference.paired(ours[:n], theirs[:n]), difference.welch(ours, theirs)


def means(found):
    return np.append(found.mean, found.average[0])


def spreads(found):
    """All results except for the means."""
    parts = found.variance, found.df, found.squared_correlation, *found.average[1:], *difference.pooled(found)
    return np.concatenate([np.ravel(part) for part in parts])


@given(SHAPES)
def test_a_shift_of_all_differences_changes_the_means_only(shape):
    ours, theirs, random = draw(shape)
    shift = random.uniform(-5, 5, ours.shape[-1])
    for found, shifted in zip(compare(ours, theirs), compare(ours + shift, theirs), strict=True):
        assert means(shifted) == pytest.approx(means(found) + np.append(shift, shift.mean()), abs=1e-9)
        assert spreads(shifted) == pytest.approx(spreads(found), rel=1e-6)


@given(SHAPES)
def test_permuted_replicates_change_nothing(shape):
    ours, theirs, random = draw(shape)
    n = min(len(ours), len(theirs))
    order = random.permutation(n)
    for found, permuted in [
        (difference.paired(ours[:n], theirs[:n]), difference.paired(ours[order], theirs[order])),
        (difference.welch(ours, theirs), difference.welch(random.permutation(ours), random.permutation(theirs))),
    ]:
        assert means(permuted) == pytest.approx(means(found), abs=1e-9)
        assert spreads(permuted) == pytest.approx(spreads(found), rel=1e-6)


@given(SHAPES)
def test_swapped_arms_change_the_sign_of_the_means_only(shape):
    ours, theirs, _ = draw(shape)
    for found, swapped in zip(compare(ours, theirs), compare(theirs, ours), strict=True):
        assert means(swapped) == pytest.approx(-means(found), abs=1e-9)
        assert spreads(swapped) == pytest.approx(spreads(found), rel=1e-6)


@given(SHAPES)
def test_variances_scale_with_the_square_of_the_unit_and_degrees_of_freedom_do_not(shape):
    ours, theirs, _ = draw(shape)
    for found, scaled in zip(compare(ours, theirs), compare(100 * ours, 100 * theirs), strict=True):
        assert scaled.variance == pytest.approx(1e4 * found.variance)
        assert scaled.average[1] == pytest.approx(1e4 * found.average[1])
        (variance, df), (scaled_variance, scaled_df) = difference.pooled(found), difference.pooled(scaled)
        assert scaled_variance == pytest.approx(1e4 * variance) and scaled_df == pytest.approx(df)


@given(SHAPES)
def test_levels_in_reverse_order_reverse_the_results(shape):
    ours, theirs, _ = draw(shape)
    for found, reverse in zip(compare(ours, theirs), compare(ours[:, ::-1], theirs[:, ::-1]), strict=True):
        for expected, values in zip(difference.pooled(found), difference.pooled(reverse), strict=True):
            assert values[::-1] == pytest.approx(expected)


@given(SHAPES)
def test_leading_axes_are_independent_simulations(shape):
    ours, theirs, random = draw(shape)
    several = np.stack([ours, random.normal(90, 3, ours.shape)])
    found = difference.welch(several, np.stack([theirs, theirs]))
    for index, expected in enumerate(difference.welch(each, theirs) for each in several):
        assert found.squared_correlation[index] == pytest.approx(expected.squared_correlation)
        assert np.stack(difference.pooled(found))[:, index] == pytest.approx(np.stack(difference.pooled(expected)))


@given(SHAPES)
def test_squared_correlation_is_that_of_the_mean_differences_averaged_over_pairs_of_levels(shape):
    ours, theirs, _ = draw(shape)
    n = min(len(ours), len(theirs))
    covariances = np.cov((ours[:n] - theirs[:n]).T), np.cov(ours.T) / len(ours) + np.cov(theirs.T) / len(theirs)
    for found, covariance in zip(compare(ours, theirs), covariances, strict=True):
        sd = np.sqrt(np.diag(covariance))
        squared = (covariance / np.outer(sd, sd)) ** 2
        assert found.squared_correlation == pytest.approx(squared[~np.eye(len(sd), dtype=bool)].mean())


def test_a_level_without_spread_counts_as_perfectly_correlated():
    ours = noise(4)[:, :2]
    ours[:, 1] = 90
    assert difference.paired(ours, np.full((4, 2), 90.0)).squared_correlation == 1


@pytest.mark.parametrize("step", [100 / 355, 0.5, 3.0])
def test_variance_is_at_least_that_of_rounding(step):
    """A rounded number has the variance of a uniform distribution; a step above one point is no rounding."""
    ours, theirs = np.full((4, 3), 90.0), np.full((3, 3), 90 + step)
    theirs[:, 2] += 1e-12  # inexact arithmetic is no step
    rounding = stats.uniform(scale=min(step, 1)).var()
    paired, unpaired = compare(ours, theirs)
    assert paired.variance == pytest.approx(np.full(3, 2 * rounding / 3))
    assert unpaired.variance == pytest.approx(np.full(3, rounding / 4 + rounding / 3))
    assert paired.average[1] == unpaired.average[1] == pytest.approx(0)


def test_spread_is_unknown_with_a_single_replicate():
    mean, sd = np.full(3, 90.0), np.ones(3)
    for found in (
        difference.paired(noise(1), noise(1)),
        difference.welch(noise(4), noise(1)),
        difference.from_summaries((mean, mean), (sd, sd), (4, 1)),
    ):
        assert np.isnan(found.variance).all() and np.isnan(found.average[1]).all()
        assert np.isnan(difference.pooled(found)[0]).all()
        assert difference.verdict(*difference.bounds(*found.average, 0.95), 0.3) == "undecided"


def test_equal_arms_without_spread_have_all_degrees_of_freedom():
    mean, zero = np.full(3, 90.0), np.zeros(3)
    found = difference.from_summaries((mean, mean), (zero, zero), (4, 6))
    assert (found.variance == 0).all() and (found.df == 3 + 5).all()


@pytest.mark.parametrize(
    ("lower", "upper", "margin", "expected"),
    [
        (0, 1, 0, "undecided"),
        (1e-9, 1, 0, "dominates"),
        (-0.3, 1, 0.3, "undecided"),
        (-0.29, 1, 0.3, "weakly dominates"),
        (-1, 0, 0.3, "undecided"),
        (-1, -1e-9, 0.3, "dominated"),
        (-0.1, -1e-9, 0.3, "weakly dominates"),
    ],
)
def test_verdict_needs_bounds_beyond_the_margin_at_every_level(lower, upper, margin, expected):
    lower, upper = np.full(3, lower), np.full(3, upper)
    assert difference.verdict(lower, upper, margin) == expected
    lower[1], upper[1] = -9, 9
    assert difference.verdict(lower, upper, margin) == "undecided"


def test_paired_matches_scipy():
    ours, theirs = noise(5), noise(5, seed=1)
    found = difference.paired(ours, theirs)
    lower, upper = difference.bounds(found.mean, found.variance, found.df, 0.95)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.9)
    assert (found.n, found.paired) == ((5, 5), True)
    assert np.allclose(lower, expected.low) and np.allclose(upper, expected.high)


def test_welch_matches_scipy_from_replicates_and_from_summaries():
    ours, theirs = noise(3, sd=0.5), noise(6, seed=1)
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.9)
    means, sds = [part.mean(0) for part in (ours, theirs)], [part.std(0, ddof=1) for part in (ours, theirs)]
    for found in (difference.welch(ours, theirs), difference.from_summaries(means, sds, (3, 6))):
        assert (found.n, found.paired) == ((3, 6), False)
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


@pytest.mark.parametrize(
    ("paired", "effect", "confidence", "expected"),
    [(True, 0.5, 0.95, 27), (True, 0.2, 0.95, 156), (True, 9, 0.9, 2), (False, 0.5, 0.95, 51), (False, 0.2, 0.99, 504)],
)
def test_replicates_needed_at_one_level_are_those_of_the_noncentral_t(paired, effect, confidence, expected):
    """As in tables of sample sizes for a power of 80 %, from effects in standard deviations of one difference or arm."""
    for n, m in [(4, 4)] if paired else [(4, 4), (3, 12)]:
        variance = np.array([1 / n if paired else 1 / n + 1 / m])
        found = dataclasses.replace(observed(variance, 3), n=(n, m), paired=paired)
        assert difference.replicates_needed(found, np.array([effect]), confidence) == expected


def test_replicates_needed_is_none_beyond_1000():
    assert difference.replicates_needed(observed([0.25], 3), np.array([0.0787]), 0.95) == 1000
    assert difference.replicates_needed(observed([0.25], 3), np.array([0.07866]), 0.95) is None


def test_replicates_needed_is_none_for_a_negative_or_tiny_gap():
    assert difference.replicates_needed(planned(0.5, True), np.full(10, -0.1), 0.95) is None
    assert difference.replicates_needed(planned(5, True), np.full(10, 0.001), 0.95) is None


LIMMA = [
    # variances, df, d0, moderated variances
    ((0.04, 0.09, 0.01, 0.02), 3, 3.124346164, (0.0346934634, 0.0591858739, 0.0199980171, 0.0248964992)),
    (
        (0.02, 0.01, 0.05, 0.03, 0.12), 3, 5.436365889,
        (0.0168675818, 0.0191369344, 0.0426650127, 0.0504126261, 0.1061498845),
    ),
    (
        (0.02, 0, 0.05, 0.03, 0.12), 7, 0.3689663321,
        (1.89987963e-02, 1.19991216e-06, 4.75006253e-02, 2.85166259e-02, 1.14076342e-01),
    ),
    (
        (0.025758147843, 0.030990354013, 0.008043381466, 0.188655384372, 0.055971711990, 0.015320572895,
         0.064293881146, 0.081060937422, 0.089522707620, 0.080876495138), 3, 3.159622999,
        (0.0247084728, 0.0292251957, 0.0203360095, 0.1109588659, 0.0494233279, 0.0332111687,
         0.0612303993, 0.0742381918, 0.0839844782, 0.0863087692),
    ),
]  # fmt: skip
"""Figures of limma 3.54.1 (R 4.2.2). With 10^9 df, `fitFDist` subtracts no sampling scatter, as `pooled` does not. limma's
trend is a natural spline: none for four levels here (no covariate), and linear for five. The ten variances have a linear
trend and residuals orthogonal to both the spline and the quadratic polynomial, which therefore fit the same trend.

    moderated <- function(variance, df, covariate = NULL) {
      variance <- pmax(variance, 1e-5 * median(variance))
      prior <- limma::fitFDist(variance * exp(log(df / 2) - digamma(df / 2)), 1e9, covariate)
      list(prior$df2, limma:::.squeezeVar(variance, df, prior$scale, prior$df2))
    }
    moderated(c(0.04, 0.09, 0.01, 0.02), 3)
    moderated(c(0.02, 0.01, 0.05, 0.03, 0.12), 3, 1:5)
"""


def observed(variance, df, squared_correlation=1.0):
    variance = np.array(variance, float)
    zero = np.zeros_like(variance)
    average = (zero[..., :1],) * 3
    return difference.Difference(zero, variance, zero + df, np.array(squared_correlation), average, (df + 1,) * 2, True)


@pytest.mark.parametrize("squared_correlation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("variance", "df", "d0", "expected"), LIMMA)
def test_moderated_variance_equals_that_of_limma(variance, df, d0, expected, squared_correlation):
    found, found_df = difference.pooled(observed(variance, df, squared_correlation))
    assert found == pytest.approx(np.array(expected), rel=1e-7)
    # the weight of the trend and the leverages as in textbooks
    weight, levels = d0 / (d0 + df), np.arange(len(variance)) - (len(variance) - 1) / 2
    trend = np.linalg.qr(np.stack([levels**power for power in range({4: 1, 5: 2, 10: 3}[len(variance)])], -1))[0]
    trend_df = df / (squared_correlation + (1 - squared_correlation) * (trend**2).sum(-1))
    assert 1 / found_df == pytest.approx(1 / (d0 + df) + (1 - (1 - weight) ** 2) / trend_df, rel=1e-7)


@pytest.mark.parametrize(
    ("levels", "coefficients"), [(2, 1), (4, 1), (5, 2), (7, 2), (8, 3), (10, 3), (11, 3), (30, 3)]
)
@pytest.mark.parametrize("df", [1, 3, 15])
def test_independent_levels_without_scatter_share_their_degrees_of_freedom_among_the_coefficients_of_the_trend(
    levels, coefficients, df
):
    trend = np.exp(0.1 * np.arange(levels) * (coefficients > 1))
    variance, moderated_df = difference.pooled(observed(0.04 * trend, df, 0.0))
    assert (df / moderated_df).sum() == pytest.approx(coefficients, rel=1e-4)
    bias = np.exp(special.digamma(df / 2) - np.log(df / 2))  # of the mean log variance
    assert variance == pytest.approx(0.04 * trend / bias, rel=1e-4)


def test_a_single_level_keeps_its_variance_and_degrees_of_freedom():
    assert difference.pooled(observed([0.04], 3)) == (0.04, 3)


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


def test_probability_of_improvement_counts_pairs_or_all_combinations_and_ties_half():
    ours, theirs = np.array([[2.0], [4.0]]), np.array([[1.0], [4.0]])
    assert difference.probability_of_improvement(ours, theirs, True)[0] == 0.75
    assert difference.probability_of_improvement(ours, theirs, False)[0] == (1 + 0 + 1 + 0.5) / 4
    assert np.isnan(difference.probability_of_improvement(ours[:1], theirs[:1], True)[1:]).all()
    for pairs in (True, False):
        found, low, high = difference.probability_of_improvement(np.ones((8, 3)), np.zeros((8, 3)), pairs)
        assert (found, high) == (1, 1) and low == pytest.approx(8 / (8 + stats.norm.ppf(0.975) ** 2))


def test_the_interval_of_the_probability_of_improvement_contains_it_in_at_least_95_of_100_experiments():
    random = np.random.default_rng(0)
    noise = np.sqrt(0.5) * (random.standard_normal((1000, 8, 1)) + random.standard_normal((1000, 8, 5)))
    for probability in (0.5, 0.92, 0.97):
        shift = stats.norm.ppf(probability)
        found = [difference.probability_of_improvement(each, np.zeros((8, 5)), True) for each in noise + shift]
        assert np.mean([low <= probability <= high for _, low, high in found]) >= 0.95

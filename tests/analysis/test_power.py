"""Error rates of the verdicts in seeded simulations."""

import dataclasses

import numpy as np
import pytest

from analysis import paper, power

SIMULATIONS = 2000
ALPHA = 0.05
SLACK = 3 * (ALPHA * (1 - ALPHA) / SIMULATIONS) ** 0.5  # three standard errors: 1.5 points
FAMILIES = (paper.CIFAR10, paper.CINIC10, paper.NOISE_10)
DESIGNS = [(4, 4, None), (4, 4, 0.5), (8, 8, None), (8, 8, 0.5), (4, 2, None)]


def smooth(sds):
    """Quadratic trend of the log standard deviations, without the sampling noise of four replicates."""
    levels = np.arange(len(sds))
    return np.exp(np.polyval(np.polyfit(levels, np.log(sds), 2), levels))


def simulate(family, n, m, pairs, deficit, smoothed=True, levels_correlation=0.5):
    sds = [smooth(sd) if smoothed else sd for sd in power.published_sds(family)]
    generator = np.random.default_rng(0)
    return power.simulate(generator, SIMULATIONS, (n, m), sds, deficit, levels_correlation, pairs)


@pytest.mark.parametrize(("n", "m", "pairs"), DESIGNS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_equal_arms_dominate_less_often_than_alpha(family, n, m, pairs):
    for smoothed in (True, False):
        found = power.verdict_rates(simulate(family, n, m, pairs, 0.0, smoothed), "dominates", 0.3)
        assert found["per_level"] < ALPHA and found["pooled"] < ALPHA  # all levels must pass
        assert found["mean"] < ALPHA + SLACK


@pytest.mark.parametrize(("n", "m", "pairs"), DESIGNS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_deficit_of_the_margin_at_all_levels_rarely_weakly_dominates(family, n, m, pairs):
    found = power.verdict_rates(simulate(family, n, m, pairs, 1.0), "weakly dominates", 1.0)
    assert found["per_level"] < ALPHA and found["pooled"] < ALPHA
    assert found["mean"] < ALPHA + SLACK


@pytest.mark.parametrize(("n", "m", "pairs"), DESIGNS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_deficit_of_the_margin_at_one_level_rarely_weakly_dominates(family, n, m, pairs):
    """The worst case is a large advantage at all other levels, which leaves the test of the single level."""
    for levels_correlation in (0.0, 0.5, 1.0):
        found = power.bounds(simulate(family, n, m, pairs, 0.0, levels_correlation=levels_correlation))
        for name in ("per_level", "pooled"):
            assert (found[name][0] > 0).mean(0).max() < ALPHA + 1.5 * SLACK, (name, levels_correlation)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_error_rates_with_the_published_spreads_as_truth(family):
    """Uses the published standard deviations with their sampling noise, which violates the smooth trend."""
    for n, m, pairs in DESIGNS:
        found = power.bounds(simulate(family, n, m, pairs, 0.0, smoothed=False))
        rates = (found["pooled"][0] > 0).mean(0)
        assert rates.mean() < ALPHA + SLACK and rates.max() < 0.1


def test_pooling_of_summaries_is_conservative_for_any_correlation():
    for correlation in (0.0, 0.5, 1.0):
        found = simulate(paper.CIFAR10, 4, 4, None, 0.0, levels_correlation=correlation)
        unknown = dataclasses.replace(found, squared_correlation=np.ones(SIMULATIONS))
        lower, _ = power.bounds(unknown)["pooled"]
        assert (lower > 0).mean(0).max() < ALPHA


@pytest.mark.parametrize("pairs", [None, 0.5])
def test_power_increases_from_per_level_to_pooled_to_mean(pairs):
    found = power.verdict_rates(simulate(paper.CIFAR10, 4, 4, pairs, 0.0), "weakly dominates", 0.6)
    assert found["per_level"] + 0.05 < found["pooled"] < found["mean"]


def test_pairing_increases_power():
    unpaired, paired = (
        power.verdict_rates(simulate(paper.CIFAR10, 8, 8, correlation, 0.0), "weakly dominates", 0.3)["pooled"]
        for correlation in (None, 0.5)
    )
    assert paired > unpaired + 0.1


def test_simultaneous_interval_covers_the_worst_level():
    found = simulate(paper.CIFAR10, 4, 4, 0.5, 0.0)
    for name, half_level in (("per_level", 1 - 0.05 / 20), ("pooled", 1 - 0.05 / 20)):
        lower, upper = power.bounds(found, half_level)[name]
        worst = found.mean.argmin(-1)
        rows = np.arange(SIMULATIONS)
        covered = (lower[rows, worst] <= 0) & (upper[rows, worst] >= 0)
        assert covered.mean() > 1 - ALPHA - SLACK


def test_command_prints_a_table(capsys):
    assert power.main(["--simulations", "20"]) == 0
    assert capsys.readouterr().out.count("| CINIC-10, t* = 800 |") == 4

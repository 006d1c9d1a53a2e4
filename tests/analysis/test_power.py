"""How often the verdicts are wrong, by simulation (seeded, so that a test either passes or not)."""

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
    """Without the noise that a standard deviation over four replicates has."""
    levels = np.arange(len(sds))
    return np.exp(np.polyval(np.polyfit(levels, np.log(sds), 2), levels))


def simulate(family, n, m, pairs, deficit, smoothed=True, levels_correlation=0.5):
    sds = [smooth(sd) if smoothed else sd for sd in power.published_sds(family)]
    generator = np.random.default_rng(0)
    return power.simulate(generator, SIMULATIONS, (n, m), sds, deficit, levels_correlation, pairs)


@pytest.mark.parametrize(("n", "m", "pairs"), DESIGNS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_of_equal_arms_none_dominates_more_often_than_the_level(family, n, m, pairs):
    for smoothed in (True, False):
        found = power.shares(simulate(family, n, m, pairs, 0.0, smoothed), "dominates", 0.3)
        assert found["per_level"] < ALPHA and found["pooled"] < ALPHA  # all levels have to agree
        assert found["mean"] < ALPHA + SLACK


@pytest.mark.parametrize(("n", "m", "pairs"), DESIGNS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_an_arm_that_falls_short_by_the_margin_everywhere_does_not_weakly_dominate(family, n, m, pairs):
    found = power.shares(simulate(family, n, m, pairs, 1.0), "weakly dominates", 1.0)
    assert found["per_level"] < ALPHA and found["pooled"] < ALPHA
    assert found["mean"] < ALPHA + SLACK


@pytest.mark.parametrize(("n", "m", "pairs"), DESIGNS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_an_arm_that_falls_short_by_the_margin_at_one_level_does_not_weakly_dominate(family, n, m, pairs):
    """Whichever level it is, and however well it does elsewhere: a single level's test is the least favourable."""
    for levels_correlation in (0.0, 0.5, 1.0):
        found = power.bounds(simulate(family, n, m, pairs, 0.0, levels_correlation=levels_correlation))
        for name in ("per_level", "pooled"):
            assert (found[name][0] > 0).mean(0).max() < ALPHA + 1.5 * SLACK, (name, levels_correlation)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_spread_that_is_as_rough_as_published_costs_little(family):
    """The published standard deviations taken as the truth, their noise included: rougher than the assumption."""
    for n, m, pairs in DESIGNS:
        found = power.bounds(simulate(family, n, m, pairs, 0.0, smoothed=False))
        rates = (found["pooled"][0] > 0).mean(0)
        assert rates.mean() < ALPHA + SLACK and rates.max() < 0.1


def test_of_summaries_pooling_stays_below_the_level_however_the_levels_go_together():
    for correlation in (0.0, 0.5, 1.0):
        found = simulate(paper.CIFAR10, 4, 4, None, 0.0, levels_correlation=correlation)
        unknown = dataclasses.replace(found, shared=np.ones(SIMULATIONS))
        lower, _ = power.bounds(unknown)["pooled"]
        assert (lower > 0).mean(0).max() < ALPHA


@pytest.mark.parametrize("pairs", [None, 0.5])
def test_pooling_finds_more_than_each_level_alone_and_the_mean_more_than_either(pairs):
    found = power.shares(simulate(paper.CIFAR10, 4, 4, pairs, 0.0), "weakly dominates", 0.6)
    assert found["per_level"] + 0.05 < found["pooled"] < found["mean"]


def test_pairs_that_go_together_find_more():
    alone, pairs = (
        power.shares(simulate(paper.CIFAR10, 8, 8, correlation, 0.0), "weakly dominates", 0.3)["pooled"]
        for correlation in (None, 0.5)
    )
    assert pairs > alone + 0.1


def test_the_worst_of_all_levels_lies_in_its_simultaneous_interval():
    found = simulate(paper.CIFAR10, 4, 4, 0.5, 0.0)
    for name, half_level in (("per_level", 1 - 0.05 / 20), ("pooled", 1 - 0.05 / 20)):
        lower, upper = power.bounds(found, half_level)[name]
        worst = found.mean.argmin(-1)
        rows = np.arange(SIMULATIONS)
        covered = (lower[rows, worst] <= 0) & (upper[rows, worst] >= 0)
        assert covered.mean() > 1 - ALPHA - SLACK


def test_the_command_prints_a_table(capsys):
    assert power.main(["--simulations", "20"]) == 0
    assert capsys.readouterr().out.count("| CINIC-10, t* = 800 |") == 4

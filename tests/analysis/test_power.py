"""Error rates of the verdicts in seeded simulations."""

import dataclasses
from pathlib import Path

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


@pytest.mark.parametrize("pairs", [None, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("levels", [0.0, 0.5, 1.0])
def test_simulated_differences_have_the_given_means_spreads_and_correlations(pairs, levels):
    n, sds, deficit = (2, 2) if pairs is not None else (2, 4), np.array([[0.5, 2.0], [1.0, 0.2]]), np.array([0.3, 1.0])
    found = power.simulate(np.random.default_rng(0), 40_000, n, tuple(sds), deficit, levels, pairs)
    assert (found.paired, found.n) == (pairs is not None, n)
    ours, theirs = sds / np.sqrt(n)[:, None]
    common = (pairs or 0) * ours * theirs
    sd = np.sqrt(ours**2 + theirs**2 - 2 * common)
    assert found.mean.mean(0) == pytest.approx(-deficit, abs=4 * sd.max() / 200)
    assert found.mean.std(0) == pytest.approx(sd, rel=0.02)
    between = ours.prod() + theirs.prod() - (pairs or 0) * (ours[0] * theirs[1] + ours[1] * theirs[0])
    assert np.corrcoef(found.mean.T)[0, 1] == pytest.approx(levels * between / sd.prod(), abs=0.02)


def test_a_verdict_includes_the_stronger_ones():
    found = simulate(paper.CIFAR10, 4, 4, None, -9.0)
    for verdict, rate in (("dominates", 1), ("weakly dominates", 1), ("dominated", 0), ("undecided", 0)):
        assert set(power.verdict_rates(found, verdict, 0.3).values()) == {rate}


def test_bounds_have_a_confidence_of_95_percent():
    found = simulate(paper.CIFAR10, 4, 4, 0.5, 0.0)
    for name, (lower, upper) in power.bounds(found).items():
        for same, expected in zip(power.bounds(found, 0.95)[name], (lower, upper), strict=True):
            assert np.array_equal(same, expected)


def test_command_prints_the_power_tables_of_the_documentation(capsys):
    """With fewer simulations than the documentation's 4,000, within four standard errors."""
    assert power.main(["--simulations", "400"]) == 0
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| C")]
    documented = (Path(__file__).parents[2] / "docs/statistics.md").read_text()
    for index, test in enumerate(("Per-level test", "Pooled test", "Mean test")):
        table = documented.split(f"**{test}")[1].split("\n\n")[1]
        expected = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| C")]
        assert len(expected) == len(rows) == 12
        for row, known in zip(rows, expected, strict=True):
            assert [cell.strip() for cell in row[:3]] == [cell.strip() for cell in known[:3]]
            for cell, rate in zip(row[3:], map(float, known[3:]), strict=True):
                error = 400 * np.sqrt(max(rate, 1) * max(100 - rate, 1) / 1e4 * (1 / 400 + 1 / 4000))
                assert abs(float(cell.split("/")[index]) - rate) <= error + 1, (test, known)


@pytest.mark.parametrize("simulations", ["0", "100001"])
def test_invalid_number_of_simulations_is_reported(capsys, simulations):
    assert power.main(["--simulations", simulations]) == 2
    assert f"--simulations = {simulations}: must be between 1 and 100,000" in capsys.readouterr().err

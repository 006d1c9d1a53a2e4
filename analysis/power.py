"""Simulates power and error rates of the verdicts at the published spreads.

python -m analysis.power      prints power at 4, 8 and 16 replicates as a Markdown table

Replicates are drawn from a normal distribution with the published standard deviation at each level. Two correlations
are not published and are assumed: between the levels of a replicate and between the arms of a pair. The scatter of the
published log variances around a smooth trend (mean 0.67 over 67 CIFAR curves) is below that of independent levels,
trigamma(3/2) = 0.93, and agrees with a squared correlation of about 0.3 or more.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from lth_diet.errors import Parser, UserError
from lth_diet.program import run_program

from . import arms, collect, difference, dominance, paper
from .difference import Difference

LEVELS_CORRELATION = 0.5
PAIRS_CORRELATION = 0.5
MAX_SIMULATIONS = 100_000  # 130 MB per arm


def simulate(
    generator: np.random.Generator,
    simulations: int,
    n: tuple[int, int],
    sds: tuple[np.ndarray, np.ndarray],
    deficit: np.ndarray | float = 0.0,
    levels_correlation: float = LEVELS_CORRELATION,
    pairs_correlation: float | None = None,
) -> Difference:
    """Simulates differences between two arms with known means and spreads.

    Args:
        generator: Random generator.
        simulations: Number of simulated experiments.
        n: Number of replicates of challenger and reference.
        sds: Standard deviations of challenger and reference in percentage points, shape (L,) each.
        deficit: True deficit of the challenger in percentage points, shape (L,) or a scalar.
        levels_correlation: Correlation between any two levels of a replicate, 0 to 1.
        pairs_correlation: Correlation between the two arms of a pair, 0 to 1; None for unpaired replicates.
    """

    def normal(count: int) -> np.ndarray:
        common = generator.standard_normal((simulations, count, 1))
        own = generator.standard_normal((simulations, count, len(sds[0])))
        return np.sqrt(levels_correlation) * common + np.sqrt(1 - levels_correlation) * own

    challenger, reference = normal(n[0]), normal(n[1])
    if pairs_correlation is not None:
        both = normal(n[0])
        challenger, reference = (
            np.sqrt(pairs_correlation) * both + np.sqrt(1 - pairs_correlation) * own for own in (challenger, reference)
        )
    compare = difference.welch if pairs_correlation is None else difference.paired
    return compare(challenger * sds[0] - deficit, reference * sds[1])


def bounds(found: Difference, confidence: float = 0.95) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lower and upper bounds of each test, shape (simulations, L) or, for the mean, (simulations, 1)."""
    return {
        "per_level": difference.bounds(found.mean, found.variance, found.df, confidence),
        "pooled": difference.bounds(found.mean, *difference.pooled(found), confidence),
        "mean": difference.bounds(*found.average, confidence),
    }


def verdict_rates(found: Difference, verdict: str, margin: float) -> dict[str, float]:
    """Fraction of simulations in which each test gives a verdict; "dominates" counts as "weakly dominates" too."""
    accepted = ("dominates", "weakly dominates") if verdict == "weakly dominates" else (verdict,)
    return {
        name: float(np.isin(difference.verdict(lower, upper, margin), accepted).mean())
        for name, (lower, upper) in bounds(found).items()
    }


def published_sds(family: paper.Family, levels: tuple[int, int] = dominance.LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """Published standard deviations of the easy arm of Figure 2 and of all examples at t*, shape (L,) each."""
    frame = collect.published()
    curves = arms.curves_by_arm(frame[frame.dataset == family.dataset])
    pair = family.arm("easy"), family.arm("all", family.t_star)
    return tuple(curves[arm].summary.loc[levels[0] : levels[1], "sd"].to_numpy() for arm in pair)


@collect.catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.power", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=4000, help="simulations per cell, default %(default)s")
    simulations = parser.parse_args(argv).simulations
    if not 1 <= simulations <= MAX_SIMULATIONS:
        raise UserError(f"--simulations = {simulations}: must be between 1 and {MAX_SIMULATIONS:,}")
    print("Power in % to show that equal arms weakly dominate each other (per level / pooled / mean).\n")
    print("| data | margin | pairs | n = 4 | n = 8 | n = 16 |\n|---|---|---|---|---|---|")
    for family in paper.CLEAN:
        sds = published_sds(family)
        for margin in (0.3, 1.0):
            for pairs in (None, PAIRS_CORRELATION):
                generator = np.random.default_rng(0)
                cells = [
                    verdict_rates(
                        simulate(generator, simulations, (n, n), sds, 0, pairs_correlation=pairs),
                        "weakly dominates",
                        margin,
                    )
                    for n in (4, 8, 16)
                ]
                text = [" / ".join(f"{100 * rate:.0f}" for rate in cell.values()) for cell in cells]
                print(f"| {family} | {margin} | {'no' if pairs is None else 'yes'} | {' | '.join(text)} |")
    return 0


if __name__ == "__main__":
    run_program(main)

"""Numbers of weights that pruning removes and keeps; imports no torch."""

import fractions
import math


def count_pruned(remaining: int, fraction: float) -> int:
    """Number of weights that one pruning removes: ceil(fraction x remaining).

    Args:
        remaining: Number of remaining weights.
        fraction: Fraction to prune, taken as the decimal number that it is written as: 0.07 of 100 is 7, although
            0.07 * 100 > 7 in binary floating point.
    """
    return math.ceil(fractions.Fraction(str(fraction)) * remaining)


def count_remaining(weights: int, fraction: float, levels: int) -> list[int]:
    """Number of remaining weights at levels 0 to `levels`, or to the first level that has none.

    Args:
        weights: Number of prunable weights.
        fraction: Fraction of the remaining weights that each pruning removes.
        levels: Number of prunings.
    """
    remaining = [weights]
    while len(remaining) <= levels and remaining[-1]:
        remaining.append(remaining[-1] - count_pruned(remaining[-1], fraction))
    return remaining

"""Labels drawn anew at random, for pre-training only (paper, section 3, "Randomized labels during pre-training")."""

import fractions
import math

import numpy as np

from lth_diet.data.seeds import derive_seed, generator


def randomize_labels(labels: np.ndarray, fraction: float, classes: int, seed: int) -> np.ndarray:
    """Draw the labels of some examples anew, uniformly over all classes.

    The class that was right may be drawn again, so that of 10 classes and a fraction of 10 %, 9 % are wrong. With the
    same seed a greater fraction draws the same examples anew, to the same labels, and more.

    Args:
        labels: Class of each example, 0 to classes - 1, shape (N,).
        fraction: Of the examples to draw anew, 0 to 1; ceil(fraction x N) are, with fraction read as a decimal.
        classes: Number of classes.
        seed: Of the stream "noise".

    Returns:
        Labels of the same shape and type.

    Raises:
        ValueError: If fraction is out of range.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction}; allowed: 0 to 1")
    random = generator(seed)
    drawn = random.permutation(len(labels))[: math.ceil(fractions.Fraction(str(fraction)) * len(labels))]
    noisy = labels.copy()
    noisy[drawn] = random.integers(0, classes, len(labels))[: len(drawn)]
    return noisy


def noisy_labels(labels: np.ndarray, fraction: float, classes: int, seed: int) -> np.ndarray:
    """Labels as pre-training and scoring see them: the same for all arms, subset sizes, replicates and scores.

    Args:
        labels, fraction, classes: See `randomize_labels`.
        seed: The configuration's seed.
    """
    return randomize_labels(labels, fraction, classes, derive_seed(seed, "all", "noise"))

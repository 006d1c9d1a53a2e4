"""Label noise for pre-training (paper, section 3, "Randomized labels during pre-training")."""

import fractions
import math

import numpy as np

from lth_diet.data.seeds import derive_seed, generator


def randomize_labels(labels: np.ndarray, fraction: float, classes: int, seed: int) -> np.ndarray:
    """Resample a fraction of the labels uniformly over all classes.

    A resampled label may equal the true one: with 10 classes and a fraction of 10 %, 9 % of the labels end up wrong.
    With the same seed, a larger fraction resamples the same examples to the same labels, and more examples.

    Args:
        labels: Class of each example, 0 to classes - 1, shape (N,).
        fraction: Fraction of the labels to resample, 0 to 1. Exactly ceil(fraction x N) labels are resampled, where
            fraction is taken as the decimal number that it is written as.
        classes: Number of classes.
        seed: Seed of the "noise" stream.

    Returns:
        New labels of the same shape and type.

    Raises:
        ValueError: If fraction is out of range.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction}; expected 0 to 1")
    random = generator(seed)
    resampled = random.permutation(len(labels))[: math.ceil(fractions.Fraction(str(fraction)) * len(labels))]
    noisy = labels.copy()
    noisy[resampled] = random.integers(0, classes, len(labels))[: len(resampled)]
    return noisy


def noisy_labels(labels: np.ndarray, fraction: float, classes: int, seed: int) -> np.ndarray:
    """Return the labels that pre-training and scoring use, the same in all arms, replicates and scoring networks.

    Args:
        labels, fraction, classes: See `randomize_labels`.
        seed: Seed of the configuration.
    """
    return randomize_labels(labels, fraction, classes, derive_seed(seed, "all", "noise"))

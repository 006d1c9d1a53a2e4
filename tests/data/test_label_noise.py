import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from lth_diet.data.label_noise import randomize_labels

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)
FRACTIONS = st.integers(0, 100).map(lambda percent: percent / 100)


@given(LABELS, FRACTIONS, st.integers(0, 99))
def test_at_most_the_given_fraction_of_labels_changes_and_labels_stay_in_range(labels, fraction, seed):
    before = labels.copy()
    noisy = randomize_labels(labels, fraction, 5, seed)
    assert np.array_equal(labels, before), "the input is not modified"
    assert noisy.dtype == labels.dtype and noisy.shape == labels.shape
    assert (noisy != labels).sum() <= math.ceil(round(100 * fraction) * len(labels) / 100)
    assert noisy.min() >= 0 and noisy.max() < 5


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 0), (0.001, 1), (0.07, 7), (0.101, 11), (0.999, 100), (1.0, 100)]
)
def test_fraction_of_labels_is_resampled_rounded_up(fraction, expected):
    noisy = randomize_labels(np.full(100, -1), fraction, 10, seed=1)  # -1 is no class: every resampled label differs
    assert (noisy >= 0).sum() == expected


@pytest.mark.parametrize(("fraction", "classes"), [(0.1, 10), (0.5, 10), (0.1, 100), (1.0, 2)])
def test_fraction_of_wrong_labels_excludes_those_resampled_to_the_true_label(fraction, classes):
    labels = np.arange(50_000) % classes
    wrong = int((randomize_labels(labels, fraction, classes, seed=1) != labels).sum())
    resampled = math.ceil(fraction * len(labels))
    low, high = binom.interval(0.9999, resampled, 1 - 1 / classes)
    assert low <= wrong <= high


def test_resampled_labels_are_uniform_over_all_classes():
    noisy = randomize_labels(np.zeros(50_000, int), 1.0, 10, seed=3)
    low, high = binom.interval(0.9999, 50_000, 0.1)
    counts = np.bincount(noisy, minlength=10)
    assert low <= counts.min() and counts.max() <= high


@given(LABELS, FRACTIONS, FRACTIONS)
def test_larger_fraction_keeps_the_changes_of_a_smaller_one(labels, one, other):
    less, more = (randomize_labels(labels, fraction, 5, seed=7) for fraction in sorted((one, other)))
    changed = less != labels
    assert np.array_equal(more[changed], less[changed])


def test_noise_depends_on_the_seed_only():
    labels = np.arange(100) % 10
    assert np.array_equal(randomize_labels(labels, 0.5, 10, 1), randomize_labels(labels, 0.5, 10, 1))
    assert not np.array_equal(randomize_labels(labels, 0.5, 10, 1), randomize_labels(labels, 0.5, 10, 2))


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_fraction_out_of_range_raises(fraction):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        randomize_labels(np.zeros(10, int), fraction, 10, 0)

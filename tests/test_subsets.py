import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lth_diet.subsets import random_subset

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)


@given(LABELS, st.data())
def test_a_random_subset_has_the_size_asked_for_and_no_example_twice(labels, data):
    size = data.draw(st.integers(1, len(labels)))
    subset = random_subset(labels, size, seed=1)
    assert len(subset) == len(set(subset.tolist())) == size
    assert np.array_equal(subset, np.sort(subset))
    assert subset.min() >= 0 and subset.max() < len(labels)


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 9))
def test_a_random_subset_of_equal_classes_has_at_least_size_by_classes_of_each(classes, size, seed):
    labels = np.repeat(np.arange(classes), 30)
    size = min(size, len(labels))
    counts = np.bincount(labels[random_subset(labels, size, seed)], minlength=classes)
    assert counts.min() >= size // classes
    if size % classes == 0:
        assert counts.min() == counts.max()


def test_the_subset_is_a_function_of_the_seed():
    labels = np.arange(100) % 10
    assert np.array_equal(random_subset(labels, 30, 5), random_subset(labels, 30, 5))
    assert not np.array_equal(random_subset(labels, 30, 5), random_subset(labels, 30, 6))


@pytest.mark.parametrize("size", [0, 11])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match="allowed: 1 to 10"):
        random_subset(np.zeros(10, int), size, 0)

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lth_diet.scores.el2n import el2n

LOGITS = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 20), st.integers(2, 8)), elements=st.floats(-60, 60, allow_nan=False)
)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@given(LOGITS, st.data())
def test_el2n_is_the_norm_of_the_error_vector_and_within_bounds(logits, data):
    probabilities, (count, classes) = softmax(logits), logits.shape
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    original = probabilities.copy()
    scores = el2n(probabilities, labels)
    assert np.array_equal(probabilities, original)
    for row, label, score in zip(probabilities, labels, scores, strict=True):
        expected = math.sqrt(sum((p - (c == label)) ** 2 for c, p in enumerate(row)))
        assert score == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert 0 <= score <= math.sqrt(2) * (1 + 1e-12)


def test_el2n_reaches_its_bounds():
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert el2n(probabilities, np.array([0, 1])).tolist() == [0, math.sqrt(2)]

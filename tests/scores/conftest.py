import numpy as np
import pytest

from lth_diet.data import catalog, subsets
from lth_diet.scores.artifact import Scores
from lth_diet.scores.summary import ScoredExamples


@pytest.fixture
def noisy():
    """The digits with a third of the examples mislabeled, and scores of four networks, most of those the highest."""
    data = catalog.load("digits", "unused")
    labels = data.train.labels.copy()
    labels[::3] = (labels[::3] + 1) % 10
    random = np.random.default_rng(0)
    values = random.random((4, len(labels))) + 0.5 * (labels != data.train.labels)
    return ScoredExamples(data, labels, Scores(values.astype(np.float32), {}))


@pytest.fixture
def hardest(noisy):
    """The rule that selects the 200 examples with the highest scores."""
    return lambda scores: subsets.hard(scores, noisy.labels, 200)

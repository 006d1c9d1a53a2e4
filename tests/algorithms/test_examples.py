import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["apply_mask", "rewind", "subset_sampling"])
def test_the_example_of_each_algorithm_runs(name):
    outcome = doctest.testmod(importlib.import_module(f"lth_diet.algorithms.{name}"))
    assert outcome.attempted > 3
    assert outcome.failed == 0

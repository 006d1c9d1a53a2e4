import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["apply_mask", "rewind", "subset_sampling"])
def test_docstring_example_runs(name):
    results = doctest.testmod(importlib.import_module(f"lth_diet.algorithms.{name}"))
    assert results.attempted > 3
    assert results.failed == 0

import numpy as np

from lth_diet.data import seeds


def test_streams_differ_by_seed_scope_and_purpose():
    streams = {
        seeds.derive_seed(s, r, n) for s in (1, 2) for r in (0, 1) for n in ("init", "order", "augmentation", "subset")
    }
    assert len(streams) == 16


def test_generator_depends_on_seed_and_position_only():
    seed = seeds.derive_seed(42, 0, "order")
    first, again, other = (seeds.generator(seed, step).random(5) for step in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_derived_seed_never_changes():
    assert seeds.derive_seed(42, 0, "init") == 5822181521800149438

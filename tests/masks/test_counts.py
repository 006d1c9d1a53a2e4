import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lth_diet.masks.counts import count_remaining
from lth_diet.masks.mask import Mask
from lth_diet.masks.pruning import prune_by_magnitude


@given(st.integers(1, 300), st.integers(1, 999).map(lambda n: n / 1000), st.integers(0, 8))
def test_the_remaining_weights_are_those_that_pruning_keeps(weights, fraction, levels):
    mask, values = Mask({"w": torch.ones(weights, dtype=torch.bool)}), {"w": torch.arange(weights) + 1.0}
    counts = count_remaining(weights, fraction, levels)
    for following in [*counts[1:], None]:
        if following:
            mask = prune_by_magnitude(values, mask, fraction)
            assert mask.remaining == following
        elif following == 0:
            with pytest.raises(ValueError, match="leaves none"):
                prune_by_magnitude(values, mask, fraction)
    assert len(counts) == levels + 1 or counts[-1] == 0
    assert 0 not in counts[:-1]

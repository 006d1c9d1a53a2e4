import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lth_diet.data.crops import Crops


def naive_crop(images, padding, top, left, flipped):
    """Crop and flip pixel by pixel."""
    count, height, width, channels = images.shape
    out = np.zeros_like(images)
    for b, y, x, c in itertools.product(range(count), range(height), range(width), range(channels)):
        column_in_window = width - 1 - x if flipped[b] else x
        row, column = y + top[b] - padding, column_in_window + left[b] - padding
        if 0 <= row < height and 0 <= column < width:
            out[b, y, x, c] = images[b, row, column, c]
    return out


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 99))
def test_crops_equal_a_naive_reference(count, height, width, padding, seed):
    random = np.random.default_rng(seed)
    images = random.integers(1, 256, (4, height, width, 2), dtype=np.uint8)
    chosen = random.integers(0, 4, count)
    top, left = random.integers(0, 2 * padding + 1, (2, count))
    flipped = random.integers(0, 2, count).astype(bool)
    crops = Crops(height, width, padding)
    plan = torch.from_numpy(crops.plan(chosen, top, left, flipped))
    taken, indices = crops.take(torch.from_numpy(images), plan)
    assert np.array_equal(taken.numpy(), naive_crop(images[chosen], padding, top, left, flipped))
    assert indices.tolist() == chosen.tolist()

import itertools

import pytest

from lth_diet.masks.mask import Mask
from lth_diet.networks.counts import count_weights
from lth_diet.networks.resnet import ResNet


@pytest.mark.parametrize(("depth", "width"), itertools.product((8, 14, 20), (1, 2, 4, 16)))
def test_the_count_is_that_of_the_network(depth, width):
    for classes, channels in itertools.product((2, 10, 100), (1, 3)):
        assert (
            count_weights(depth, classes, width, channels) == Mask.dense(ResNet(depth, classes, width, channels)).total
        )

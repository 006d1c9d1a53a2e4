import numpy as np
import pytest
import torch

from lth_diet.config import loading
from lth_diet.data.dataset import Dataset, Split
from lth_diet.training import builders, devices


@pytest.mark.parametrize(
    ("device", "size", "ranks", "batch_size"),
    [
        *(("cpu", (8, 8), 1, 500), ("cpu", (32, 32), 4, 500), ("cpu", (64, 64), 1, 500), ("cpu", (224, 224), 1, 40)),
        *(("meta", (8, 8), 1, 2000), ("meta", (32, 32), 4, 2000), ("meta", (32, 64), 1, 1000)),
        *(("meta", (224, 224), 1, 40), ("meta", (224, 224), 4, 160), ("meta", (1500, 1500), 4, 4)),
    ],
)
def test_evaluation_batches_have_a_limited_number_of_pixels_per_rank(
    tiny, monkeypatch, device, size, ranks, batch_size
):
    monkeypatch.setattr(devices, "torch_device", lambda: torch.device(device))
    monkeypatch.setattr(builders.dist, "get_world_size", lambda: ranks)
    split = Split(np.zeros((5, *size, 3), np.uint8), np.zeros(5, np.int64))
    builder = builders.Builder(loading.load_config(tiny()), 0)
    builder.data = Dataset("digits", split, split, (0.5,) * 3, (0.5,) * 3, ("a", "b"))
    assert builder.build_evaluation_loader(split).batch_size == batch_size

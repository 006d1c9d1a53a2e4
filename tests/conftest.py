import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).parents[1]
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
warnings.filterwarnings("ignore")

settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")

TINY = """
arm: {arm}
dataset: {{name: digits}}
model: {{depth: 8, width: 2}}
train: {{steps: 12ba, batch_size: 64, milestones: [6ba, 9ba]}}
pretrain: {{steps: 4ba, lr: 0.1, subset: {{size: 128}}}}
prune: {{levels: 2}}
intervals: {{log: 2ba, checkpoint: 3ba}}
replicates: 1
experiment: tiny
"""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The data cache, shared by the tests of a session; subprocesses inherit it."""
    os.environ["LTH_DIET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test works in an empty folder, with an MLflow store of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(place):
    """Writes a small configuration (three levels of eight steps on the digits); returns its path."""

    def write(arm="random", name="tiny.yaml"):
        path = place / name
        path.write_text(TINY.format(arm=arm))
        return path

    return write


def write_image_folder(root, sizes=None, shape=(8, 8), suffix=".png", seed=0):
    """Images of noise in the true layout: `root/<part>/<class>/NNNN<suffix>`."""
    random = np.random.default_rng(seed)
    for part, count in (sizes or {"train": 6, "test": 2}).items():
        for label in ("ant", "bee"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:04d}{suffix}")
    return root

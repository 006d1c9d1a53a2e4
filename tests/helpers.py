"""What several test modules use."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from composer import Callback
from PIL import Image

ROOT = Path(__file__).parents[1]
COMPOSER = Path(sys.executable).with_name("composer")

TINY = """
arm: {arm}
dataset: {{name: digits}}
model: {{depth: 8, width: 2}}
train: {{steps: 12ba, batch_size: 64, milestones: [6ba, 9ba]}}
pretrain: {{steps: 4ba, lr: 0.1, subset: {{size: 128}}}}
prune: {{levels: 2}}
scores: {{networks: 2, steps: 6ba}}
intervals: {{log: 2ba, checkpoint: 3ba}}
replicates: 1
experiment: tiny
"""

SWEEP = """
base: base.yaml
arms:
  - {arm: init}
  - {arm: [random, easy]}
prune: {levels: 1}
replicates: 2
gpus_per_run: 0
"""

MEASURED = {
    "level": 0,
    "network": 0,
    "steps": 4,
    "weights_remaining_percent": 100.0,
    "test_accuracy_percent": 90.0,
    "timestamp": 1,
}
"""What a finished phase of any kind has to tell."""


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


class Spy(Callback):
    """Notes what it is told to look at, at an event."""

    def __init__(self, **looks):
        self.looks = looks
        self.seen = {event: [] for event in looks}

    def run_event(self, event, state, logger):
        if event.value in self.looks:
            self.seen[event.value].append(self.looks[event.value](state))


def start(*arguments, ranks=None, recipe="imp"):
    """Starts a recipe in the test's folder: with python, or with composer on some ranks."""
    launcher = [str(COMPOSER), "-n", str(ranks)] if ranks else [sys.executable]
    return subprocess.Popen(
        [*launcher, str(ROOT / f"recipes/{recipe}.py"), "-f", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, ranks=None, recipe="imp"):
    process = start(*arguments, ranks=ranks, recipe=recipe)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

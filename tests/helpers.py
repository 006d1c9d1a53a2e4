"""Helpers that several test modules share."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
from composer import Callback
from PIL import Image

ROOT = Path(__file__).parents[1]
COMPOSER = Path(sys.executable).with_name("composer")

LAUNCHER_LINE = re.compile(
    r"ERROR:composer\.cli\.launcher:Rank 0 crashed with exit code 2\."
    r"|Waiting up to \d+ seconds for all training processes to terminate\. Press Ctrl-C to exit immediately\."
    r"|Global rank 0 \(PID \d+\) exited with code 2"
    r"|ERROR:composer\.cli\.launcher:Global rank 0 \(PID \d+\) exited with code 2"
)
"""What `composer` prints when rank 0 exits with 2 and nothing else is wrong."""

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
"""Measurements of a finished phase of any kind."""


YAMLS = [path for path in sorted((ROOT / "yamls").glob("*.yaml")) if not path.stem.startswith("image_folder")]
"""The files of yamls/ that need no images of the user."""


def write_image_folder(root, sizes=None, shape=(8, 8), suffix=".png", seed=0):
    """Write an image folder of noise: `root/<part>/<class>/NNNN<suffix>`."""
    random = np.random.default_rng(seed)
    for part, count in (sizes or {"train": 6, "test": 2}).items():
        for label in ("ant", "bee"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:04d}{suffix}")
    return root


def warnings_of(fit, name, **options):
    """Trains, and returns the warnings that have `name` in them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(**options)
    return [str(warning.message) for warning in caught if name in str(warning.message)]


class Spy(Callback):
    """Records the value of a function of the state at each of the given events."""

    def __init__(self, **functions):
        self.functions = functions
        self.seen = {event: [] for event in functions}

    def run_event(self, event, state, logger):
        if event.value in self.functions:
            self.seen[event.value].append(self.functions[event.value](state))


def start(*arguments, ranks=None, recipe="imp", fork=True):
    """Starts a recipe in the test's folder: with python, or with composer on some ranks.

    Args:
        fork: In a fork of a process that has imported everything; False for a new interpreter.
    """
    from forks.client import Process

    command = [ROOT / f"recipes/{recipe}.py", "-f", *map(str, arguments)]
    if fork:
        return Process(["composer", "-n", ranks, *command] if ranks else command)
    launcher = [COMPOSER, "-n", str(ranks)] if ranks else [sys.executable]
    return subprocess.Popen([*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def check_launcher_output(output, sentence):
    """Check that `composer` printed one error, which matches `sentence`, and then only its own status lines."""
    error, *status = output.splitlines()
    assert re.search(f"^error: .*{sentence}", error), output
    assert all(LAUNCHER_LINE.fullmatch(line) for line in status), output

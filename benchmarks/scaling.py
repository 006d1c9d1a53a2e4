"""Measures how time and memory scale with levels, replicates and images.

python benchmarks/scaling.py

levels      one run of recipes/imp.py on the digits with 21 levels of a few steps, with MLflow: time from the end of one
            level to the end of the next, and resident memory at that point
replicates  the same run with 1, 2 and 4 replicates in one process
data        a batch of 128 images of 32 x 32 from data sets of 10,000 to 180,000, and the memory of the process
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import torch
from workload import MEAN, STD, now, select_device, table, write

from lth_diet.data import dataset
from lth_diet.data.loader import Loader
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.training import devices

RECIPE = Path(__file__).parents[1] / "recipes/imp.py"
CONFIG = """
arm: all
dataset: {name: digits}
model: {depth: 8, width: 4}
train: {steps: 10ba, batch_size: 64, milestones: [6ba]}
pretrain: {steps: 2ba}
"""


def run(replicates: int, levels: int) -> tuple[float, list[float], list[float]]:
    """Returns seconds of the run, seconds of each level of replicate 0 after the first, and MiB after each level."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.yaml").write_text(CONFIG)
        command = [sys.executable, RECIPE, "-f", "tiny.yaml", f"replicates={replicates}", f"prune.levels={levels}"]
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        memory, finished = [], 0
        while process.poll() is None:
            time.sleep(0.02)
            count = len(list(Path(folder).glob("runs/*/replicate_0/level_*/result.json")))
            if count > finished:
                finished = count
                memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        seconds = time.monotonic() - began
        if process.returncode:
            sys.exit(f"the run exited with status {process.returncode}")
        (replicate,) = Path(folder).glob("runs/*/replicate_0")
        ends = [phase.result()["timestamp"] / 1000 for _, phase in ReplicateDirectory(replicate).levels()]
    return seconds, [later - earlier for earlier, later in itertools.pairwise(ends)], memory


def batch(examples: int) -> tuple[float, float]:
    """Returns the median milliseconds per batch from a data set of `examples` images, and MiB of this process."""
    images = np.zeros((examples, 32, 32, 3), np.uint8)
    split = dataset.Split(images, np.zeros(examples, np.int64))
    loader = Loader(
        dataset.Dataset("cifar10", split, split, MEAN, STD, tuple("0123456789")), 128, 1, 2, devices.torch_device()
    )
    times = []
    for step in range(60):
        began = now()
        loader.batch(step)
        times.append(1000 * (now() - began))
    return statistics.median(times[10:]), psutil.Process().memory_info().rss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    select_device(arguments.device)
    torch.set_num_threads(1)
    seconds, levels, memory = run(1, 20)
    thirds = [("levels 2 to 7", levels[1:7]), ("levels 8 to 14", levels[7:14]), ("levels 15 to 20", levels[14:])]
    print(devices.describe().name)
    print(table([(name, statistics.mean(values)) for name, values in thirds], ("seconds per level", "mean")))
    print(f"memory after level 1 {memory[1]:.0f} MiB, after the last {memory[-1]:.0f} MiB")
    replicates = {count: run(count, 3)[0] for count in (1, 2, 4)}
    print(table(list(replicates.items()), ("replicates of 4 levels", "seconds")))
    data = {examples: batch(examples) for examples in (10_000, 50_000, 180_000)}
    print(table([(examples, *values) for examples, values in data.items()], ("images", "ms per batch", "MiB")))
    figures = {"seconds_a_level": levels, "mebibytes": memory, "replicates": replicates, "batch": data}
    write(arguments, {"seconds": seconds, **figures})


if __name__ == "__main__":
    main()

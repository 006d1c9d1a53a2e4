"""Training workload of the benchmarks, on random images, and their output."""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import composer
import numpy as np
import torch
from composer import Algorithm, Event

from lth_diet.algorithms import ApplyMask, Rewind
from lth_diet.config.schema import Config
from lth_diet.data import dataset
from lth_diet.data.loader import Loader
from lth_diet.errors import UserError
from lth_diet.masks.mask import Mask
from lth_diet.runs.block import BlockPhase
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.training import devices, trainer
from lth_diet.training.builders import Builder
from lth_diet.training.progress import Progress

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Workload:
    """One IMP level on random images, built as `recipes/imp.py` builds it, on the device of this process.

    Args:
        depth: Depth of the ResNet.
        width: Channels of its first stage.
        batch_size: Images per step.
        size: Height and width of the images.
        examples: Number of training images.
        tested: Number of test images.
        channels: Channels of the images.
        stack: Number of replicates that train as one network.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        batch_size: int = 128,
        size: int = 32,
        examples: int = 5120,
        tested: int = 128,
        channels: int = 3,
        stack: int = 1,
    ):
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (max(examples, tested), size, size, channels), dtype=np.uint8)
        labels = random.integers(0, 10, len(images))
        train, test = (dataset.Split(images[:count], labels[:count]) for count in (examples, tested))
        self.data = dataset.Dataset("cifar10", train, test, MEAN[:channels], STD[:channels], tuple("0123456789"))
        self.depth, self.width, self.batch_size, self.stack = depth, width, batch_size, stack

    def builder(self, steps: int = 1, compiled: bool = False, precision: str = "auto") -> Builder:
        config = Config.model_validate(
            {
                "arm": "init",
                "dataset": {"name": "cifar10"},
                "model": {"depth": self.depth, "width": self.width},
                "train": {"steps": steps, "batch_size": self.batch_size},
                "compile": compiled,
                "precision": precision,
            }
        )
        builder = Builder(config, *range(self.stack))
        builder.data = self.data
        return builder

    def loader(self) -> Loader:
        return self.builder().build_loader(self.data)

    def train(
        self, steps: int, algorithms: Sequence[Algorithm] = (), compiled: bool = False, precision: str = "auto"
    ) -> None:
        """Trains a level with an all-true mask, calling `lth_diet.training.trainer.train` as IMP does."""
        build = self.builder(steps, compiled, precision)
        model = build.build_network()
        algorithms = [Rewind(0, model.module.state_dict()), ApplyMask(Mask.dense(model.module)), *algorithms]
        loader, evaluation = build.build_loader(self.data), build.build_evaluation_loader(self.data.test)
        with tempfile.TemporaryDirectory() as folder:
            phases = [PhaseDirectory(Path(folder) / f"replicate_{index}") for index in range(self.stack)]
            block, schedule = BlockPhase(phases), trainer.Schedule(0, steps, 0.1)
            progress = Progress([], 0)
            trainer.train(model, loader, evaluation, schedule, algorithms, block, build.config, progress, lambda: None)


class Clock(Algorithm):
    """Measures the time from step `first` to step `last`."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.times: dict[int, float] = {}

    def match(self, event: Event, state: object) -> bool:
        return event == Event.BATCH_END and int(state.timestamp.batch) in (self.first, self.last)

    def apply(self, event: Event, state: object, logger: object) -> None:
        self.times[int(state.timestamp.batch)] = now()

    @property
    def seconds(self) -> float:
        """Mean seconds per step."""
        return (self.times[self.last] - self.times[self.first]) / (self.last - self.first)


def select_device(name: str) -> None:
    """Selects the device of this process and its children: "gpu", or "cpu" even if there is a GPU."""
    if name == "cpu":
        os.environ[devices.VISIBLE] = ""
    try:
        devices.select(0)
    except UserError as error:
        sys.exit(f"error: {error}")
    if name == "gpu" and not devices.is_gpu():
        sys.exit("error: --device gpu: PyTorch finds no GPU; use --device cpu")


def now() -> float:
    """Returns the time in seconds after all work on the device has finished."""
    if devices.is_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """Formats a table with the first column aligned left and the others right."""
    cells = [list(head), *([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )


def write(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes figures, hardware, versions and arguments as JSON to `arguments.output`, if given."""
    if not arguments.output:
        return
    environment = {
        "command": {key: value for key, value in vars(arguments).items() if key != "output"},
        "hardware": devices.describe().name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "composer": composer.__version__,
    }
    arguments.output.write_text(json.dumps(environment | figures, indent=2) + "\n")

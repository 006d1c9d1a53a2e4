"""Runs recipes/imp.py on this rank and counts collectives and reads of values by the step of the batch made last."""

import json
import os
import runpy
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lth_diet.data.loader import Loader


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.step, self.counts = None, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" or torch.Tag.data_dependent_output in func.tags:
            self.counts.setdefault(self.step, Counter())[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    rank, count, make = os.environ["RANK"], Count(), Loader.batch

    def batch(loader, step):
        count.step = step
        return make(loader, step)

    Loader.batch = batch
    try:
        with count:
            runpy.run_path(str(Path(__file__).parents[2] / "recipes/imp.py"), run_name="__main__")
    finally:
        Path(f"rank_{rank}.json").write_text(json.dumps(count.counts))

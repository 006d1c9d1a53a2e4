"""Breaks a training step into data, forward, backward, optimizer, Algorithms, callbacks, events, logging and the rest.

python benchmarks/breakdown.py                          # a small network, which exposes the overhead
python benchmarks/breakdown.py --depth 20 --width 16 --size 32 --threads 2 --steps 20
python benchmarks/breakdown.py --device gpu --depth 20 --width 16 --size 32 --steps 2000

The time of a part excludes the parts nested inside it. "The rest" is Composer's own loop. On a GPU these are host
times: waiting for the device is attributed to the part that waits. Also measures an evaluation of --tested images, and
its share of a level of 62,400 steps.
"""

import argparse
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Event
from composer.core import Engine
from composer.loggers import Logger
from composer.models import ComposerClassifier
from torch.optim.lr_scheduler import MultiStepLR
from workload import Clock, Workload, now, select_device, table, write

from lth_diet.algorithms import ApplyMask, Rewind
from lth_diet.data.loader import Loader
from lth_diet.training import callbacks

ARITHMETIC = ("forward", "backward", "optimizer")
PARTS = {
    "data": [(Loader, "batch")],
    "forward": [(ComposerClassifier, "forward"), (ComposerClassifier, "loss")],
    "backward": [(torch.Tensor, "backward")],
    "optimizer": [(torch.optim.SGD, "step"), (torch.optim.SGD, "zero_grad")],
    "Algorithms": [(ApplyMask, "apply"), (ApplyMask, "match"), (Rewind, "apply"), (Rewind, "match")],
    "callbacks": [(callbacks._Recorder, "run_event"), (callbacks._Checkpointer, "run_event")],
    "Composer's events": [(Engine, "run_event")],
    "logging": [(Logger, "log_metrics")],
    "schedule": [(MultiStepLR, "step")],
}


class Stopwatch:
    """Accumulates seconds by part; time in nested parts counts for the innermost."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running = ["the rest"]
        self._since = time.perf_counter()

    def wrap(self, owner: type, name: str, part: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(part)
            try:
                return original(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        setattr(owner, name, timed)

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def read(self) -> Counter[str]:
        self._switch()
        return Counter(self.seconds)


class Laps(Clock):
    """Reads the stopwatch at the first and last step."""

    def __init__(self, first: int, last: int, watch: Stopwatch):
        super().__init__(first, last)
        self.watch, self.laps = watch, {}

    def apply(self, event: object, state: object, logger: object) -> None:
        super().apply(event, state, logger)
        self.laps[int(state.timestamp.batch)] = self.watch.read()

    def milliseconds(self) -> dict[str, float]:
        spent = self.laps[self.last] - self.laps[self.first]
        return {part: 1000 * seconds / (self.last - self.first) for part, seconds in spent.items()}


class EvaluationClock(Algorithm):
    """Times evaluations."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, 0.0

    def match(self, event: Event, state: object) -> bool:
        return event in (Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: object, logger: object) -> None:
        if event == Event.EVAL_START:
            self.began = now()
        else:
            self.seconds = now() - self.began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--size", type=int, default=8, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tested", type=int, default=10_000, help="images of an evaluation")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    select_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    watch = Stopwatch()
    for part, places in PARTS.items():
        for owner, name in places:
            watch.wrap(owner, name, part)
    last = arguments.warmup + arguments.steps
    laps, evaluation = Laps(arguments.warmup, last, watch), EvaluationClock()
    size, depth, width = arguments.size, arguments.depth, arguments.width
    work = Workload(depth, width, arguments.batch_size, size=size, tested=arguments.tested)
    work.train(last, [laps])
    work.train(1, [evaluation])
    parts = laps.milliseconds()
    overhead = sum(value for part, value in parts.items() if part not in ARITHMETIC)
    share = 100 * evaluation.seconds / (62_400 * laps.seconds)
    rows = [(part, value) for part, value in sorted(parts.items(), key=lambda item: -item[1])]
    print(
        table(
            [*rows, ("all", 1000 * laps.seconds), ("all but forward, backward, optimizer", overhead)],
            ("ms per step", "mean"),
        )
    )
    images = len(work.data.test.labels)
    print(f"evaluation of {images:,} images: {evaluation.seconds:.2f} s, {share:.2f} % of 62,400 steps")
    figures = {"step": 1000 * laps.seconds, "overhead": overhead, "evaluation_seconds": evaluation.seconds}
    figures["evaluated_images"] = images
    write(arguments, {"milliseconds": parts, **figures})


if __name__ == "__main__":
    main()

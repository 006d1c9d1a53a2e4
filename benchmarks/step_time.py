"""Seconds a training step: ours, plain Composer, and a bare PyTorch loop, in turn in one run.

python benchmarks/step_time.py                        # ResNet-20, batch 128, 2 threads, fp32 on the CPU
python benchmarks/step_time.py --device gpu --steps 500

ours      training.train with an all-true mask, Rewind and the device-resident loader, channels last
composer  Trainer, torchvision transforms on PIL images, DataLoader (the better of 0 and 2 workers), no training metrics
bare      forward, backward and SGD on one batch that is ready, channels last: the floor

Images are random: time does not depend on what they show. The figures are medians over the repeats of the mean over
the steps of one, after a warm-up; ratios compare what ran in the same minute.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import composer
import numpy as np
import torch
from composer import Algorithm, Event, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from torchvision import transforms

from lth_diet import datasets, training
from lth_diet.algorithms import ApplyMask, Rewind
from lth_diet.config import Config
from lth_diet.display import Progress
from lth_diet.loader import EvaluationLoader, Loader
from lth_diet.masks import Mask
from lth_diet.models import ResNet, classifier, initialise
from lth_diet.phases import Phase

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Clock(Algorithm):
    """Times the steps after the warm-up."""

    def __init__(self, first: int, last: int, device: str):
        self.first, self.last, self.device = first, last, device
        self.times: dict[int, float] = {}

    def match(self, event: Event, state: object) -> bool:
        return event == Event.BATCH_END and int(state.timestamp.batch) in (self.first, self.last)

    def apply(self, event: Event, state: object, logger: object) -> None:
        self.times[int(state.timestamp.batch)] = now(self.device)

    @property
    def seconds(self) -> float:
        return (self.times[self.last] - self.times[self.first]) / (self.last - self.first)


def now(device: str) -> float:
    if device == "gpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Images(Dataset):
    """What torchvision's CIFAR10 is: an array, a PIL image an item, a transform."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Benchmark:
    def __init__(self, depth: int, batch_size: int, warmup: int, steps: int, device: str):
        self.depth, self.batch_size, self.device = depth, batch_size, device
        self.warmup, self.last = warmup, warmup + steps
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (batch_size * (self.last + 3), 32, 32, 3), dtype=np.uint8)
        self.split = datasets.Split(images, random.integers(0, 10, len(images)))
        test = datasets.Split(images[:batch_size], self.split.labels[:batch_size])
        self.data = datasets.Dataset("cifar10", self.split, test, MEAN, STD, tuple("0123456789"))

    def clock(self) -> Clock:
        return Clock(self.warmup, self.last, self.device)

    def ours(self) -> float:
        clock, where = self.clock(), "cuda" if self.device == "gpu" else "cpu"
        config = Config.model_validate(
            {
                "arm": "init",
                "dataset": {"name": "cifar10"},
                "model": {"depth": self.depth},
                "train": {"steps": self.last, "batch_size": self.batch_size},
            }
        )
        model = classifier(self.depth, 10, seed=1)
        algorithms = [Rewind(0, model.module.state_dict()), ApplyMask(Mask.dense(model.module)), clock]
        loader = Loader(self.data, self.batch_size, 1, 2, where)
        evaluation = EvaluationLoader(self.data, self.data.test, device=where)
        with tempfile.TemporaryDirectory() as folder:
            phase = Phase(Path(folder))
            schedule = training.Schedule(0, self.last, 0.1)
            training.train(
                model, loader, evaluation, schedule, algorithms, phase, config, Progress([], 0), lambda: None
            )
        return clock.seconds

    def composer(self, workers: int) -> float:
        clock = self.clock()
        network = ResNet(self.depth, 10)
        initialise(network, 1)
        model = composer.models.ComposerClassifier(network, num_classes=10, train_metrics=MetricCollection([]))
        data = Images(self.split.images, self.split.labels)
        loader = DataLoader(data, self.batch_size, shuffle=True, drop_last=True, num_workers=workers)
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            max_duration=f"{self.last}ba",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
            algorithms=[clock],
            device=self.device,
            precision="amp_bf16" if self.device == "gpu" else "fp32",
            progress_bar=False,
            seed=1,
        )
        trainer.fit()
        trainer.close()
        return clock.seconds

    def bare(self) -> float:
        where = "cuda" if self.device == "gpu" else "cpu"
        network = ResNet(self.depth, 10)
        initialise(network, 1)
        network.to(where, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        images, labels = Loader(self.data, self.batch_size, 1, 2, where).batch(0)
        for step in range(self.last):
            if step == self.warmup:
                began = now(self.device)
            optimizer.zero_grad()
            with torch.autocast(where, torch.bfloat16, enabled=self.device == "gpu"):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
        return (now(self.device) - began) / (self.last - self.warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON with every measurement")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    bench = Benchmark(arguments.depth, arguments.batch_size, arguments.warmup, arguments.steps, arguments.device)
    contenders = {
        "ours": bench.ours,
        "composer, 0 workers": lambda: bench.composer(0),
        "composer, 2 workers": lambda: bench.composer(2),
        "bare": bench.bare,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            times[name].append(1000 * run())
    median = {name: statistics.median(values) for name, values in times.items()}
    plain = min(median["composer, 0 workers"], median["composer, 2 workers"])
    ours = median["ours"]
    print(f"{'ms a step':<22} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in times.items():
        print(f"{name:<22} {median[name]:>8.2f} {min(values):>8.2f} {max(values):>8.2f}")
    print(f"ours is {ours / median['bare']:.3f} x the bare loop, plain Composer {plain / ours:.3f} x ours")
    if arguments.output:
        about = {
            "command": vars(arguments) | {"output": str(arguments.output)},
            "hardware": torch.cuda.get_device_name() if arguments.device == "gpu" else _processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "composer": composer.__version__,
        }
        arguments.output.write_text(json.dumps(about | {"milliseconds": times, "median": median}, indent=2))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

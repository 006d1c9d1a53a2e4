"""Compares the time per training step of this project, plain Composer and a bare PyTorch loop.

python benchmarks/step_time.py --compile              # ResNet-20, batch 128, 2 threads, fp32 on the CPU
python benchmarks/step_time.py --device gpu --steps 500

ours      lth_diet.training.trainer.train with an all-true mask, Rewind and the device-resident loader, channels last
composer  Trainer, torchvision transforms on PIL images, DataLoader, no training metrics: the better of 0 and 2 workers
          on the CPU, of 2 and 8 workers with pinned memory on a GPU
bare      forward, backward and SGD on one ready batch, channels last: a lower bound

Images are random, which does not affect the time. After a warm-up, each repeat gives the mean over its steps; the table
shows medians over the repeats. The contenders alternate, so that ratios compare measurements of the same minute.
"""

import argparse
import functools
import statistics
import warnings
from pathlib import Path

import composer
import numpy as np
import torch
from composer import Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from torchvision import transforms
from workload import MEAN, STD, Clock, Workload, now, select_device, table, write

from lth_diet.networks.classifier import initialize
from lth_diet.networks.resnet import ResNet
from lth_diet.training import devices


class Images(Dataset):
    """Same work per item as torchvision's CIFAR10: converts an array to a PIL image and transforms it."""

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
    def __init__(self, depth: int, batch_size: int, warmup: int, steps: int):
        self.depth, self.batch_size = depth, batch_size
        self.warmup, self.last = warmup, warmup + steps
        self.work = Workload(depth, batch_size=batch_size, examples=batch_size * min(self.last + 3, 390))
        self.bf16 = devices.describe().has_bf16

    def ours(self, compiled: bool = False) -> float:
        clock = Clock(self.warmup, self.last)
        self.work.train(self.last, [clock], compiled)
        return clock.seconds

    def composer(self, workers: int) -> float:
        clock = Clock(self.warmup, self.last)
        network = ResNet(self.depth, 10)
        initialize(network, 1)
        model = composer.models.ComposerClassifier(network, num_classes=10, train_metrics=MetricCollection([]))
        loader = DataLoader(
            Images(self.work.data.train.images, self.work.data.train.labels),
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=devices.is_gpu(),
            persistent_workers=workers > 0,
        )
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            max_duration=f"{self.last}ba",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
            algorithms=[clock],
            device="gpu" if devices.is_gpu() else "cpu",
            precision="amp_bf16" if self.bf16 else "fp32",
            progress_bar=False,
            seed=1,
        )
        trainer.fit()
        trainer.close()
        return clock.seconds

    def bare(self) -> float:
        device = devices.torch_device()
        network = ResNet(self.depth, 10)
        initialize(network, 1)
        network.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        images, labels = self.work.loader().batch(0)
        for step in range(self.last):
            if step == self.warmup:
                began = now()
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
        return (now() - began) / (self.last - self.warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also measure ours with torch.compile")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    select_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    bench = Benchmark(arguments.depth, arguments.batch_size, arguments.warmup, arguments.steps)
    peers = {f"composer, {workers} workers": workers for workers in ((2, 8) if devices.is_gpu() else (0, 2))}
    contenders = {
        "ours": bench.ours,
        **{name: functools.partial(bench.composer, workers) for name, workers in peers.items()},
        "bare": bench.bare,
    }
    if arguments.compile:
        contenders["ours, compiled"] = lambda: bench.ours(compiled=True)
        bench.ours(compiled=True)  # compiles once, before timing
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            times[name].append(1000 * run())
    median = {name: statistics.median(values) for name, values in times.items()}
    plain = min(median[name] for name in peers)
    ours = median["ours"]
    rows = [(name, median[name], min(values), max(values)) for name, values in times.items()]
    print(table(rows, ("ms per step", "median", "min", "max")))
    print(f"ours: {ours / median['bare']:.3f} x the bare loop; plain Composer: {plain / ours:.3f} x ours")
    if arguments.compile:
        print(f"plain Composer: {plain / median['ours, compiled']:.3f} x ours, compiled")
    write(arguments, {"milliseconds": times, "median": median})


if __name__ == "__main__":
    main()

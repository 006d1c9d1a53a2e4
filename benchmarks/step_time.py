"""Compares the time per training step of this project, plain Composer and a bare PyTorch loop.

python benchmarks/step_time.py --compile              # ResNet-20, batch 128, 2 threads, on the CPU
python benchmarks/step_time.py --device gpu --steps 500

ours      lth_diet.training.trainer.train with an all-true mask, Rewind and the device-resident loader, channels last
composer  Trainer, torchvision transforms on PIL images, DataLoader, no training metrics: with 0 and 2 workers on the
          CPU, with 2 and 8 workers and pinned memory on a GPU
open_lth  a PyTorch loop with the same transforms and DataLoader, and masks multiplied into the weights in each forward
bare      forward, backward and the SGD kernel of ours on one ready batch, channels last: a lower bound

On a GPU all compute in the precision that `auto` means; on a CPU in fp32 and, if it has bf16 arithmetic, in bf16 too.
Plain Composer has no bf16 on CPUs: there its network runs under PyTorch's autocast.

Images are random, which does not affect the time. After a warm-up, each repeat gives the mean over its steps; the table
shows medians over the repeats. The contenders alternate, so that ratios compare measurements of the same minute.
"""

import argparse
import functools
import itertools
import statistics
import warnings
from collections.abc import Iterable
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

    def ours(self, precision: str, compiled: bool = False) -> float:
        clock = Clock(self.warmup, self.last)
        self.work.train(self.last, [clock], compiled, precision)
        return clock.seconds

    def images(self, workers: int) -> DataLoader:
        return DataLoader(
            Images(self.work.data.train.images, self.work.data.train.labels),
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=devices.is_gpu(),
            persistent_workers=workers > 0,
        )

    def composer(self, precision: str, workers: int) -> float:
        clock = Clock(self.warmup, self.last)
        network = ResNet(self.depth, 10)
        initialize(network, 1)
        model = composer.models.ComposerClassifier(network, num_classes=10, train_metrics=MetricCollection([]))
        on_gpu = devices.is_gpu()
        if precision == "bf16" and not on_gpu:
            forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
            model.forward = lambda batch: forward(batch).float()
        trainer = Trainer(
            model=model,
            train_dataloader=self.images(workers),
            max_duration=f"{self.last}ba",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
            algorithms=[clock],
            device="gpu" if on_gpu else "cpu",
            precision="amp_bf16" if precision == "bf16" and on_gpu else "fp32",
            progress_bar=False,
            seed=1,
        )
        trainer.fit()
        trainer.close()
        return clock.seconds

    def bare(self, precision: str) -> float:
        batch = self.work.loader().batch(0)
        return self.loop(precision, [batch], fused=devices.is_gpu(), memory_format=torch.channels_last)

    def open_lth(self, precision: str, workers: int) -> float:
        return self.loop(precision, self.images(workers), masked=True)

    def loop(
        self, precision: str, epoch: Iterable, masked: bool = False, fused: bool = False, **layout: torch.memory_format
    ) -> float:
        """Trains in a PyTorch loop; returns seconds per step."""
        device = devices.torch_device()
        network = ResNet(self.depth, 10)
        initialize(network, 1)
        network.to(device, **layout)
        weights = [weight for weight in network.parameters() if weight.dim() > 1] if masked else []
        masks = [torch.ones_like(weight) for weight in weights]
        kernel = {"fused": True} if fused else {}
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, **kernel)
        batches = itertools.chain.from_iterable(itertools.repeat(epoch))
        for step, (images, labels) in zip(range(self.last), batches, strict=False):
            if step == self.warmup:
                began = now()
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            for weight, mask in zip(weights, masks, strict=True):
                weight.data *= mask
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
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
    precisions = [devices.precision("auto")]
    if not devices.is_gpu() and devices.describe().has_bf16:
        precisions.append("bf16")
    contenders = {}
    for precision in precisions:
        run = functools.partial
        contenders[f"ours, {precision}"] = run(bench.ours, precision)
        for workers in (2, 8) if devices.is_gpu() else (0, 2):
            contenders[f"composer, {precision}, {workers} workers"] = run(bench.composer, precision, workers)
            contenders[f"open_lth, {precision}, {workers} workers"] = run(bench.open_lth, precision, workers)
        contenders[f"bare, {precision}"] = run(bench.bare, precision)
        if arguments.compile:
            contenders[f"ours, {precision}, compiled"] = run(bench.ours, precision, compiled=True)
            bench.ours(precision, compiled=True)  # compiles once, before timing
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            times[name].append(1000 * run())
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = [(name, median[name], min(values), max(values)) for name, values in times.items()]
    print(table(rows, ("ms per step", "median", "min", "max")))
    ratios = {
        f"{name} / {own}": median[name] / median[own]
        for own in (name for name in median if name.startswith("ours"))
        for name in median
        if not name.startswith("ours")
    }
    print(table(list(ratios.items()), ("ratio of medians", "")))
    write(arguments, {"milliseconds": times, "median": median, "ratio": ratios})


if __name__ == "__main__":
    main()

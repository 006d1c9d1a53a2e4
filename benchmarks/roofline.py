"""Measures how far a training step on the CPU is from the limits of this machine.

python benchmarks/roofline.py                         # ResNet-20, batch 128, 2 threads

step        forward, backward and SGD on one ready batch, channels last, in fp32 and, if the CPU has it, in bf16
arithmetic  the operations of convolutions and matrix products, at the speed of the fastest of a large matrix product
            and two wide convolutions
bytes       what the step moves at least, at the speed of adding two arrays that fit no cache: with one kernel per
            operator, each reads its inputs and writes its outputs once; fused at best, only what backward needs of
            forward is written and read once

A step takes at least the larger of both limits. Data in caches move faster than this bandwidth. The second table
divides the step and its bytes among operators. All contenders alternate; the tables show medians over the repeats.
"""

import argparse
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from workload import Workload, now, select_device, table, write

from lth_diet.training import devices

KINDS = {
    "convolution": "convolution",
    "BatchNorm": "batch_norm",
    "ReLU": "relu|clamp_min|threshold",
    "addition": r"::add_?(\.|$)",
}
"""Patterns of the operators' names, by what they compute."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def kind(operator: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operator)), "other")


class ByteCounter(TorchDispatchMode):
    """Counts bytes of the inputs and outputs of each operator but views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        read, written = (
            [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        owners = {each.untyped_storage().data_ptr() for each in read}
        is_view = all(each.untyped_storage().data_ptr() in owners for each in written)
        if not is_view or operator._schema.is_mutable:
            self.bytes[kind(operator.name())] += sum(each.numel() * each.element_size() for each in [*read, *written])
        return result


class Step:
    """Forward, backward and SGD of this project's network on one batch."""

    def __init__(self, work: Workload, precision: str):
        self.model = work.builder().build_network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.images, self.labels = work.loader().batch(0)
        self.in_bf16 = precision == "bf16"

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bf16):
            loss = F.cross_entropy(self.model.module(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()

    def count(self) -> tuple[int, Counter[str], int]:
        """Floating-point operations, bytes by kind of operator, and bytes if all that can be fused were."""
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as operations, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            self()
        with ByteCounter() as moved:
            self()
        return operations.get_total_flops(), moved.bytes, 2 * sum(saved.values())

    def profile(self, steps: int) -> dict[str, float]:
        """Milliseconds per step by kind of operator."""
        spent: Counter[str] = Counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                self()
        for row in profiler.key_averages():
            spent[kind(row.key)] += row.self_cpu_time_total / 1000 / steps
        return dict(spent)


def arithmetic(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], int]]:
    """Functions that multiply and add, with their numbers of operations."""
    matrix, size = torch.randn(2048, 2048).to(dtype), 2048
    found = {"matrix product of 2048 x 2048": (lambda: matrix @ matrix, 2 * size**3)}
    for channels, side in ((64, 32), (256, 16)):
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(
            dtype, memory_format=torch.channels_last
        )
        images = torch.randn(32, channels, side, side).to(dtype, memory_format=torch.channels_last)
        run = torch.no_grad()(lambda layer=layer, images=images: layer(images))
        found[f"convolution of {channels} channels"] = (run, 2 * images.numel() * channels * 9)
    return found


def bandwidth() -> tuple[Callable[[], Any], int]:
    """A function that moves memory, and how many bytes."""
    first, second, total = (torch.ones(2**26) for _ in range(3))
    return lambda: torch.add(first, second, out=total), 3 * 4 * 2**26


def seconds(function: Callable[[], Any], steps: int = 1) -> float:
    began = now()
    for _ in range(steps):
        function()
    return (now() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_args()
    select_device("cpu")
    torch.set_num_threads(arguments.threads)
    work = Workload(arguments.depth, batch_size=arguments.batch_size, examples=arguments.batch_size)
    precisions = ["fp32", *(["bf16"] if devices.describe().has_bf16 else [])]
    steps = {precision: Step(work, precision) for precision in precisions}
    peaks = {f"{name}, {each}": pair for each in precisions for name, pair in arithmetic(PRECISIONS[each]).items()}
    move, moved = bandwidth()
    contenders = {"addition of 256 MiB arrays": move} | {name: function for name, (function, _) in peaks.items()}
    times: dict[str, list[float]] = {name: [] for name in [*contenders, *precisions]}
    for function in [*contenders.values(), *steps.values()]:
        function()
    for _ in range(arguments.repeats):
        for name, function in contenders.items():
            times[name].append(seconds(function))
        for precision, step in steps.items():
            times[precision].append(seconds(step, arguments.steps))
    median = {name: statistics.median(values) for name, values in times.items()}
    memory = moved / median["addition of 256 MiB arrays"]
    print(f"{devices.describe().name}, {arguments.threads} threads; memory: {memory / 1e9:.1f} GB/s")
    limits, rows, parts = {}, [], []
    for precision, step in steps.items():
        speed = max(work / median[name] for name, (_, work) in peaks.items() if name.endswith(f", {precision}"))
        operations, by_kind, fused = step.count()
        least = {
            "arithmetic": operations / speed,
            "bytes, one kernel per operator": sum(by_kind.values()) / memory,
            "bytes, fused at best": fused / memory,
        }
        spent = step.profile(arguments.steps)
        took = median[precision]
        print(
            f"{precision}: {speed / 1e9:.0f} GFLOP/s; a step has {operations / 1e9:.1f} GFLOP, moves at least "
            f"{sum(by_kind.values()) / 1e6:.0f} MB with one kernel per operator and {fused / 1e6:.0f} MB fused"
        )
        rows.append((f"step, {precision}", 1000 * took, 1.0))
        rows += [(f"{name}, {precision}", 1000 * limit, limit / took) for name, limit in least.items()]
        total = math.fsum(spent.values())
        for each in [*KINDS, "other"]:
            share = spent.get(each, 0) / total
            parts.append((f"{each}, {precision}", 1000 * took * share, 1000 * by_kind[each] / memory))
        limits[precision] = {
            "operations": operations,
            "bytes": dict(by_kind),
            "fused_bytes": fused,
            "operations_a_second": speed,
            "least_seconds": least,
            "share_of_step": {name: limit / took for name, limit in least.items()},
            "profile": {each: value / total for each, value in spent.items()},
        }
    print(table(rows, ("median", "ms", "of the step")))
    print(table(parts, ("operators", "ms", "ms for their bytes")))
    write(arguments, {"seconds": times, "median": median, "bytes_a_second": memory, "limits": limits})


if __name__ == "__main__":
    main()

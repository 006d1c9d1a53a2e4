"""Measures steps per second of k replicates that share a device, one process each, as with `composer -n k`.

python benchmarks/throughput.py                                             # k = 1, 2, 4 on the CPU
python benchmarks/throughput.py --device gpu --steps 2000 --most 16         # k = 1, 2, 4, 8, 16 on one GPU

All processes start the measured steps at the same time. Each process uses --threads CPU threads.
"""

import argparse
import multiprocessing
import time
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
import torch
from workload import Clock, Workload, table, write


class SynchronizedClock(Clock):
    """Waits for the other processes at the first measured step."""

    def __init__(self, first: int, last: int, device: str, barrier: Barrier):
        super().__init__(first, last, device)
        self.barrier = barrier

    def apply(self, event: object, state: object, logger: object) -> None:
        if int(state.timestamp.batch) == self.first:
            self.barrier.wait()
        super().apply(event, state, logger)


def replicate(arguments: argparse.Namespace, barrier: Barrier, results: multiprocessing.Queue) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    clock = SynchronizedClock(arguments.warmup, arguments.warmup + arguments.steps, arguments.device, barrier)
    Workload(arguments.depth, device=arguments.device, examples=50_000).train(clock.last, [clock])
    results.put((*clock.times.values(), psutil.Process().memory_info().rss / 2**20))


def steps_per_second(arguments: argparse.Namespace, count: int) -> tuple[float, float]:
    """Returns total steps per second of `count` processes, and the largest memory of one of them in MiB."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=replicate, args=(arguments, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    measurements = [results.get() for _ in processes]
    for process in processes:
        process.join()
    began, ended, memory = zip(*measurements, strict=True)
    return count * arguments.steps / (max(ended) - min(began)), max(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--most", type=int, default=4, help="maximum number of replicates, up to 16")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_args()
    rows, began = [], time.monotonic()
    for count in (1, 2, 4, 8, 16):
        if count <= arguments.most:
            rate, memory = steps_per_second(arguments, count)
            rows.append((count, rate, 1000 / rate, rate / rows[0][1] if rows else 1.0, memory))
    print(
        table(rows, ("replicates", "total steps/s", "ms per step and replicate", "relative to one", "MiB per process"))
    )
    print(f"{time.monotonic() - began:.0f} s")
    names = ("replicates", "steps_a_second", "milliseconds", "of_one", "mebibytes")
    write(arguments, {"rows": [dict(zip(names, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    main()

"""Steps a second of k replicates that share a device, each a process of its own, as `composer -n k` starts them.

python benchmarks/throughput.py                                             # k = 1, 2, 4 on the CPU
python benchmarks/throughput.py --device gpu --steps 2000 --most 16         # k = 1, 2, 4, 8, 16 on one card

All processes begin the steps that count at once. A process uses --threads CPU threads.
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


class Together(Clock):
    """Waits for the other processes at the first step."""

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
    clock = Together(arguments.warmup, arguments.warmup + arguments.steps, arguments.device, barrier)
    Workload(arguments.depth, device=arguments.device, examples=50_000).train(clock.last, [clock])
    results.put((*clock.times.values(), psutil.Process().memory_info().rss / 2**20))


def steps_a_second(arguments: argparse.Namespace, count: int) -> tuple[float, float]:
    """Of `count` processes together; and the most MiB that one of them had."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=replicate, args=(arguments, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    told = [results.get() for _ in processes]
    for process in processes:
        process.join()
    began, ended, memory = zip(*told, strict=True)
    return count * arguments.steps / (max(ended) - min(began)), max(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--most", type=int, default=4, help="replicates")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON with every measurement")
    arguments = parser.parse_args()
    rows, began = [], time.monotonic()
    for count in (1, 2, 4, 8, 16):
        if count <= arguments.most:
            rate, memory = steps_a_second(arguments, count)
            rows.append((count, rate, 1000 / rate, rate / rows[0][1] if rows else 1.0, memory))
    print(table(rows, ("replicates", "steps/s, all", "ms a step and replicate", "of one", "MiB a process")))
    print(f"{time.monotonic() - began:.0f} s")
    names = ("replicates", "steps_a_second", "milliseconds", "of_one", "mebibytes")
    write(arguments, {"rows": [dict(zip(names, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    main()

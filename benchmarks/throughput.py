"""Measures steps per second of k replicates that share a device, one process each, as with `composer -n k`.

python benchmarks/throughput.py                                             # k = 1, 2, 4 on the CPU
python benchmarks/throughput.py --device gpu --steps 2000 --most 16         # k = 1, 2, 4, 8, 16 on one GPU

All processes start the measured steps at the same time. Each process uses --threads CPU threads. If a process fails, or
takes more than --timeout seconds, the others are stopped and the numbers so far are reported, with exit status 1.

On a GPU, the processes take turns unless NVIDIA's Multi-Process Service runs (nvidia-cuda-mps-control -d). The JSON
file records whether it does; measure both.
"""

import argparse
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
import torch
from workload import Clock, Workload, select_device, table, write


class SynchronizedClock(Clock):
    """Waits for the other processes at the first measured step."""

    def __init__(self, first: int, last: int, barrier: Barrier):
        super().__init__(first, last)
        self.barrier = barrier

    def apply(self, event: object, state: object, logger: object) -> None:
        if int(state.timestamp.batch) == self.first:
            self.barrier.wait()
        super().apply(event, state, logger)


class ReplicateError(Exception):
    """A process failed, with the reason."""


def replicate(arguments: argparse.Namespace, barrier: Barrier, results: Connection) -> None:
    warnings.filterwarnings("ignore")
    select_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    clock = SynchronizedClock(arguments.warmup, arguments.warmup + arguments.steps, barrier)
    try:
        Workload(arguments.depth, examples=50_000).train(clock.last, [clock], arguments.compile)
    except Exception as error:
        traceback.print_exc()
        return results.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
    results.send((*clock.times.values(), psutil.Process().memory_info().rss / 2**20))


def steps_per_second(arguments: argparse.Namespace, count: int) -> tuple[float, float]:
    """Returns total steps per second of `count` processes, and the largest memory of one of them in MiB.

    Raises:
        ReplicateError: If one of them fails or takes too long.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    processes = {}
    try:
        for _ in range(count):
            results, end = context.Pipe(duplex=False)
            processes[results] = context.Process(target=replicate, args=(arguments, barrier, end))
            processes[results].start()
            end.close()  # the process has the only one, so that its death ends the pipe
        measurements = _receive(processes, arguments.timeout)
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    began, ended, memory = zip(*measurements, strict=True)
    return count * arguments.steps / (max(ended) - min(began)), max(memory)


def _receive(processes: dict[Connection, multiprocessing.Process], timeout: float) -> list[tuple[float, float, float]]:
    measurements, waiting, deadline = [], [*processes], time.monotonic() + timeout
    while waiting:
        ready = wait(waiting, deadline - time.monotonic())
        if not ready:
            raise ReplicateError(f"no result after {timeout:g} s")
        for results in ready:
            try:
                measurement = results.recv()
            except EOFError:
                processes[results].join()
                measurement = f"exit status {processes[results].exitcode}, without a message"
            if isinstance(measurement, str):
                raise ReplicateError(measurement)
            measurements.append(measurement)
            waiting.remove(results)
    return measurements


def mps_runs() -> bool:
    """Whether NVIDIA's Multi-Process Service runs, as far as its control pipe shows."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--most", type=int, default=4, help="maximum number of replicates, up to 16")
    parser.add_argument("--compile", action="store_true", help="compile the networks, during the warm-up")
    parser.add_argument("--timeout", type=float, default=1800, help="maximum seconds of one number of replicates")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_args()
    select_device(arguments.device)
    rows, began, failure = [], time.monotonic(), None
    for count in (1, 2, 4, 8, 16):
        if count <= arguments.most:
            try:
                rate, memory = steps_per_second(arguments, count)
            except ReplicateError as error:
                failure = f"one of {count} replicates failed: {error}"
                break
            rows.append((count, rate, 1000 / rate, rate / rows[0][1] if rows else 1.0, memory))
    print(
        table(rows, ("replicates", "total steps/s", "ms per step and replicate", "relative to one", "MiB per process"))
    )
    print(f"{time.monotonic() - began:.0f} s")
    names = ("replicates", "steps_a_second", "milliseconds", "of_one", "mebibytes")
    figures = {"rows": [dict(zip(names, row, strict=True)) for row in rows], "failure": failure}
    write(arguments, figures | ({"mps": mps_runs()} if arguments.device == "gpu" else {}))
    if failure:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()

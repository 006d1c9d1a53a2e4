"""Measures the time per step and replicate of R replicates that train as one stack (`stack: R`).

python benchmarks/stacking.py                                       # fp32 and, if the CPU has it, bf16
python benchmarks/stacking.py --device gpu --warmup 30 --steps 200  # eager and compiled

Each measurement is one IMP level in Composer's Trainer with mask, rewinding, training curve and checkpoints. The
numbers of replicates alternate within each repeat; the table has medians over the repeats. Memory is the maximum of a
process (on the CPU, where each measurement has its own), or what the process reserves on the GPU.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import resource
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from workload import Clock, Workload, select_device, table, write

from lth_diet.training import devices

SETTINGS = {
    "digits": {"depth": 8, "width": 4, "batch_size": 64, "size": 8, "channels": 1, "examples": 1442},
    "width 8, 16 x 16": {"depth": 20, "width": 8, "batch_size": 64, "size": 16},
    "width 16, 16 x 16": {"depth": 20, "width": 16, "batch_size": 64, "size": 16},
    "width 16, 32 x 32": {"depth": 20, "width": 16, "batch_size": 128, "size": 32},
}
"""ResNet-8 on images like the digits, and ResNet-20 on larger ones."""


def measure(arguments: argparse.Namespace, setting: str, stack: int, precision: str, compiled: bool) -> dict[str, Any]:
    """Trains one level and returns milliseconds per step and replicate, and MiB."""
    warnings.filterwarnings("ignore")
    select_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    clock = Clock(arguments.warmup, arguments.warmup + arguments.steps)
    Workload(**SETTINGS[setting], stack=stack).train(clock.last, [clock], compiled, precision)
    if devices.is_gpu():
        memory = torch.cuda.max_memory_reserved() / 2**20
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"ms": 1000 * clock.seconds / stack, "mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="SETTING")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="R")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help="default: all that the device has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), help="default: both on a GPU, else eager")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements, written after each")
    arguments = parser.parse_args()
    select_device(arguments.device)
    precisions = arguments.precisions or (["fp32", "bf16"] if devices.describe().has_bf16 else ["fp32"])
    chosen = arguments.modes or (["eager", "compiled"] if devices.is_gpu() else ["eager"])
    modes = [(precision, mode == "compiled") for mode in chosen for precision in precisions]
    context, rows = multiprocessing.get_context("spawn"), []
    for setting, (precision, compiled) in itertools.product(arguments.only, modes):
        found: dict[int, list[dict[str, Any]]] = {stack: [] for stack in arguments.stacks}
        for _, stack in itertools.product(range(arguments.repeats), arguments.stacks):
            row = (arguments, setting, stack, precision, compiled)
            if devices.is_gpu():
                found[stack].append(measure(*row))
                continue
            with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                found[stack].append(pool.submit(measure, *row).result())
        for stack, measurements in found.items():
            milliseconds = [each["ms"] for each in measurements]
            row = {"setting": setting, "precision": precision, "compiled": compiled, "stack": stack}
            row |= {"ms_per_replicate": statistics.median(milliseconds), "all": milliseconds}
            rows.append(row | {"mib": max(each["mib"] for each in measurements)})
            print(row, file=sys.stderr, flush=True)
        write(arguments, {"rows": rows})
    cells = [
        (r["setting"], r["precision"] + " compiled" * r["compiled"], r["stack"], r["ms_per_replicate"], round(r["mib"]))
        for r in rows
    ]
    print(table(cells, ("network", "precision", "R", "ms per step and replicate", "MiB")))


if __name__ == "__main__":
    main()

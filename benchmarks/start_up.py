"""Measures the time from a command to the first training step on the digits, beside the time of `import composer`.

python benchmarks/start_up.py

import composer   a Python program that does nothing else
python            python recipes/imp.py, until step 1 of its replicate is done
composer -n 2     composer -n 2 recipes/imp.py, until step 1 of both replicates is done

They alternate. Each launch has a new folder of runs and a new MLflow store. A launch that is not measured decodes the
data set and compiles the bytecode of all packages. CPU seconds vary less than seconds on a busy machine. Those of a
launch are the launcher's and the busiest rank's, which work one after the other.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from workload import table, write

from lth_diet.training import devices

ROOT = Path(__file__).parents[1]
LAUNCHERS = {"python": [sys.executable], "composer -n 2": [Path(sys.executable).with_name("composer"), "-n", "2"]}
"""How each contender starts the recipe."""
TARGETS = {"python": 1, "composer -n 2": 2}
"""How often a launch imports Composer, one after the other: the launcher does before it starts the ranks."""
_TIMEOUT = 300


def environment(folder: Path) -> dict[str, str]:
    """Environment of the measured programs, whose bytecode is kept in `folder`, whatever the state of the packages'."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONPATH": str(ROOT)}


def import_composer(programs: dict[str, str]) -> tuple[float, float]:
    """Returns the seconds and CPU seconds from starting a program until it has imported Composer."""
    began = time.time()
    program = "import composer, time; print(time.time(), time.process_time())"
    done = subprocess.run([sys.executable, "-c", program], env=programs, check=True, capture_output=True, text=True)
    ended, busy = map(float, done.stdout.split())
    return ended - began, busy


def first_step(launcher: Sequence[str | Path], replicates: int, programs: dict[str, str]) -> tuple[float, float]:
    """Returns the seconds and CPU seconds from starting the recipe until the first step of its last replicate."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"replicates={replicates}", "stack=1", "prune.levels=0", "intervals.log=1ba", f"runs={folder}/runs"]
        command = [*launcher, ROOT / "recipes/imp.py", "-f", ROOT / "yamls/digits_all.yaml", *options]
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        log = Path(folder) / "log"
        began = time.time()
        with log.open("w") as output:
            process = psutil.Popen(
                command, cwd=folder, env=programs | store, stdout=output, stderr=output, start_new_session=True
            )
        steps: dict[int, tuple[float, float]] = {}  # of each replicate: time of its first step, CPU seconds of its rank
        try:
            while len(steps) < replicates:
                if process.poll() is not None or time.time() - began > _TIMEOUT:
                    sys.exit(f"error: no first step: {log.read_text()}")
                time.sleep(0.02)
                for index in set(range(replicates)) - steps.keys():
                    if ended := _first_time(Path(folder), index):
                        steps[index] = ended - began, _cpu_seconds(_rank(process, index) if replicates > 1 else process)
            seconds, busy = (max(each) for each in zip(*steps.values(), strict=True))
            return seconds, busy + (_cpu_seconds(process) if replicates > 1 else 0)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _rank(launcher: psutil.Process, index: int) -> psutil.Process:
    return next(child for child in launcher.children() if child.environ()["RANK"] == str(index))


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _first_time(folder: Path, replicate: int) -> float | None:
    """When a replicate had trained its first step, in seconds since 1970; None if it has not."""
    for path in folder.glob(f"runs/*/replicate_{replicate}/pretrain/curve.jsonl"):
        if "\n" in (curve := path.read_text()):
            return json.loads(curve.partition("\n")[0])["timestamp"] / 1000
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {"import composer": [], **{name: [] for name in LAUNCHERS}}
    with tempfile.TemporaryDirectory() as folder:
        programs = environment(Path(folder))
        for replicates, launcher in enumerate(LAUNCHERS.values(), 1):
            first_step(launcher, replicates, programs)
        for _ in range(arguments.repeats):
            measured["import composer"].append(import_composer(programs))
            for replicates, (name, launcher) in enumerate(LAUNCHERS.items(), 1):
                measured[name].append(first_step(launcher, replicates, programs))
    medians = {name: [statistics.median(each) for each in zip(*pairs, strict=True)] for name, pairs in measured.items()}
    imports = medians["import composer"]
    beyond = {
        name: [all - count * alone for all, alone in zip(medians[name], imports, strict=True)]
        for name, count in TARGETS.items()
    }
    print(devices.describe().name)
    print(table([(name, *pair) for name, pair in medians.items()], ("median of", "seconds", "CPU seconds")))
    for name, count in TARGETS.items():
        seconds, busy = beyond[name]
        print(f"{name}: {seconds:.2f} s and {busy:.2f} CPU s beyond {count} x import composer (target: at most 1 s)")
    repeats = {
        unit: {name: [pair[index] for pair in pairs] for name, pairs in measured.items()}
        for index, unit in enumerate(("seconds", "cpu_seconds"))
    }
    write(arguments, {**repeats, "medians": medians, "beyond_import": beyond})


if __name__ == "__main__":
    main()

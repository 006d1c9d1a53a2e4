"""Measures the scheduling overhead of a sweep on Ray, and the cost of a killed node.

python benchmarks/scheduling.py                     # six arms with two replicates, three times: 15 minutes
python benchmarks/scheduling.py -f my_sweep.yaml prune.levels=0

The sweep is trained three times, on the CPU: sequentially without Ray; on a local Ray cluster of two nodes with one CPU
each; and on another such cluster, where one node is killed with kill -9 once a third of the replicates have finished.
The results must be bit-identical. The overhead is the wall time minus the total run time divided by the number of
slots.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from safetensors.numpy import load_file
from workload import select_device, table, write

from lth_diet.sweep.grid import Sweep

ROOT = Path(__file__).parents[1]
SLOTS = 2


class Folder:
    """Folder in which a sweep is trained.

    Args:
        path: An empty folder.
        file: The sweep file.
        overrides: Overrides as key=value.
    """

    def __init__(self, path: Path, file: Path, overrides: Sequence[str]):
        self.path = path
        self.overrides = [*overrides, f"runs={path}/runs"]
        self.sweep = Sweep(file.resolve(), self.overrides)

    def serial(self) -> dict[str, Any]:
        """Trains the runs sequentially; returns the total seconds."""
        began = time.monotonic()
        for point in self.sweep.points:
            _end(self._start("imp", *point.arguments))
        return {"seconds": time.monotonic() - began}

    def on_ray(self, kill: bool) -> dict[str, Any]:
        """Trains the sweep on a new cluster; returns its seconds, those of each finished attempt, and lost attempts."""
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            node = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            began = time.monotonic()
            process = self._start("sweep", "-f", str(self.sweep.path), *self.overrides, "--address", cluster.address)
            if kill:
                third = len(self.sweep.work()) / 3
                while sum(work.done for work in self.sweep.work()) < third and process.poll() is None:
                    time.sleep(1)
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                for process_of_node in [raylet, *raylet.children()]:
                    process_of_node.kill()
            output = _end(process)
            seconds = time.monotonic() - began
        finally:
            cluster.shutdown()
        logs = [path.read_text() for path in (self.path / "runs/sweep-logs").rglob("attempt_*.log")]
        ends = [re.search(r"^status 0 after (\S+) s$", log, re.MULTILINE) for log in logs]
        attempts = [float(end[1]) for end in ends if end]
        return {"seconds": seconds, "attempts": attempts, "lost": output.count("restarts from its last checkpoint")}

    def _start(self, recipe: str, *arguments: str) -> subprocess.Popen:
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{self.path}/mlflow.db"}
        command = [sys.executable, ROOT / f"recipes/{recipe}.py", *arguments]
        return subprocess.Popen(command, cwd=self.path, env=environment, stdout=subprocess.PIPE, text=True)

    def bits(self) -> dict[str, dict[str, bytes]]:
        """Returns the bytes of all masks and weights, by file and tensor."""
        return {
            str(path.relative_to(self.path)): {name: array.tobytes() for name, array in load_file(path).items()}
            for path in self.path.glob("runs/**/*.safetensors")
        }


def _end(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args} exited with status {process.returncode}: {output}")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", type=Path, default=Path(__file__).with_name("sweep.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for all measurements")
    arguments = parser.parse_intermixed_args()
    select_device("cpu")

    def measured(train: Callable[[Folder], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, bytes]]]:
        with tempfile.TemporaryDirectory() as path:
            folder = Folder(Path(path), arguments.file, arguments.overrides)
            return train(folder), folder.bits()

    serial, expected = measured(Folder.serial)
    cluster, of_cluster = measured(lambda folder: folder.on_ray(kill=False))
    killed, of_killed = measured(lambda folder: folder.on_ray(kill=True))
    if not expected == of_cluster == of_killed:
        sys.exit("the masks or weights of the three sweeps differ")
    runs = sum(cluster["attempts"]) / SLOTS
    rows = [
        ("sequential, without Ray", serial["seconds"], ""),
        ("two nodes", cluster["seconds"], f"{len(cluster['attempts'])} attempts, {runs:.1f} s of training per slot"),
        ("two nodes, one killed", killed["seconds"], f"{killed['lost']} attempts lost"),
    ]
    print(table(rows, ("", "seconds", "")))
    overhead = cluster["seconds"] - runs
    print(f"scheduling overhead: {overhead:.1f} s, {100 * overhead / runs:.1f} % of the training time")
    print(f"{len(expected)} mask and weight files, bit-identical in all three sweeps")
    arguments.file = arguments.file.name
    write(arguments, {"serial": serial, "cluster": cluster, "killed": killed, "files": len(expected)})


if __name__ == "__main__":
    main()

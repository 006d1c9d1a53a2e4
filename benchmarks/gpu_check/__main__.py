"""The first hour on a GPU machine, in minutes: checks the project on the device and measures its speed.

make gpu-check                         # in .venv
make gpu-check PYTHON=python3          # with the PyTorch of the machine, without .venv and network
python benchmarks/gpu_check --only devices deterministic --out results

Each check is a process with a time limit, so that a crash or a hang of one does not stop the others. After each check,
gpu_check.json and gpu_check.txt are written to the folder --out. Checks that this machine cannot run are skipped, and
listed with the reason. Without a GPU the checks run on the CPU as far as they can, with small networks.

Exit status: 0; 1 if a check failed. A target that is missed is reported, but is no failure.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checks
from checks import FAILED, PASSED, ROOT, SKIPPED, Check, write_atomically

NOT_RUN = "not run"
_LEAST_SECONDS = 5.0
"""A check does not start with less time than this."""
_PATIENCE_ON_CPU = 4.0
"""The time limits are for a GPU machine; without a GPU they are this many times longer."""


class Runner:
    """Runs checks, each in a process, and writes their results after each.

    Args:
        all_checks: Checks by name. The first describes the machine and runs before the others.
        script: The script that runs a check: `script NAME FOLDER RESULT GPUS SIZES`.
        out: Folder of the results.
        budget: Seconds for all checks.
        jobs: Maximum number of checks at the same time; those that are `alone` run one by one.
        device: "auto": a GPU if there is one; "gpu"; or "cpu".
        patience: Factor of the time limits of the checks.
        small: Whether networks are small also on a GPU.
    """

    def __init__(
        self,
        all_checks: dict[str, Check],
        script: Path,
        out: Path,
        budget: float,
        jobs: int,
        device: str = "auto",
        patience: float = 1.0,
        small: bool = False,
    ):
        self.checks, self.script, self.out, self.jobs, self.device = all_checks, script, out, jobs, device
        self.budget, self.patience, self.small = budget, patience, small
        self.began, self.started = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
        self.end = self.began + budget
        self.gpus = 0
        self.results = {name: {"status": NOT_RUN, "seconds": 0.0, "note": ""} for name in all_checks}
        self._stopped = False
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="work-", dir=out.resolve()))

    def run(self) -> int:
        """Run all checks and return the exit status."""
        print(f"results: {self.out / 'gpu_check.json'}, updated after each check", flush=True)
        first, *others = self.checks.values()
        try:
            self.run_check(first)
            reason = self._why_not_go_on(first)
            together = [check for check in others if not check.alone]
            with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(lambda check: self.run_check(check, reason), together))
                except BaseException:  # an interrupt
                    self.stop()
                    raise
            for check in others:
                if check.alone:
                    self.run_check(check, reason)
        finally:
            self.stop()
            self.write()
            failed = [name for name in self.checks if (self.work / name).exists()]  # only these leave files
            shutil.rmtree(self.work / "cache" if failed else self.work, ignore_errors=True)
        print(f"\n{self.table()}", flush=True)
        return int(bool(reason) or any(result["status"] in (FAILED, NOT_RUN) for result in self.results.values()))

    def _why_not_go_on(self, first: Check) -> str:
        """Find out what the machine has; returns why the other checks cannot run."""
        self.gpus = self.results[first.name].get("findings", {}).get("gpus", -1)
        if self.results[first.name]["status"] != PASSED or self.gpus < 0:
            return f"{first.name} did not pass"
        if self.device == "gpu" and not self.gpus:
            return "there is no GPU"
        if not self.gpus:
            print("no GPU: the checks run on the CPU, and those that need a GPU are skipped", flush=True)
        return ""

    def run_check(self, check: Check, reason: str = "") -> None:
        """Run one check, or skip it, and write the results."""
        began = time.monotonic()
        patience = self.patience * (1 if self.gpus else _PATIENCE_ON_CPU)
        limit = min(check.limit * patience, self.end - began)
        reason = reason or self._why_skip(check)
        if limit < _LEAST_SECONDS:
            reason = reason or f"no time is left of the {self.budget:g} s of --budget"
        result = {"status": SKIPPED, "note": reason} if reason else self._run(check, limit)
        if self._stopped:
            return
        with self._lock:
            self.results[check.name] = {**result, "seconds": round(time.monotonic() - began, 1)}
            self._write()
            print(f"{check.name}: {result['status']}{': ' if result['note'] else ''}{result['note']}", flush=True)

    def _why_skip(self, check: Check) -> str:
        if check.needs_gpus > self.gpus:
            return "needs a GPU" if check.needs_gpus == 1 else f"needs {check.needs_gpus} GPUs, here: {self.gpus}"
        missing = [name for name in check.packages if importlib.util.find_spec(name) is None]
        return f"the package {missing[0]} is not installed" if missing else ""

    def _run(self, check: Check, limit: float) -> dict[str, Any]:
        folder, log = self.work / check.name, self.out / f"{check.name}.log"
        folder.mkdir()
        path = folder / "check.json"
        sizes = "small" if self.small or not self.gpus else "large"
        command = [sys.executable, str(self.script), check.name, str(folder), str(path), str(self.gpus), sizes]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env=self._env()
            )
        self._processes.add(process)
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        self._kill(process)
        result = {"status": FAILED, "note": "", "findings": {}}
        with contextlib.suppress(OSError, ValueError):
            result |= json.loads(path.read_text())
        if timed_out:
            result |= {"status": FAILED, "note": f"not finished within {limit:.0f} s; see {log}"}
        elif process.returncode:
            end = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
            result |= {"status": FAILED, "note": f"its process ended with {end}; see {log}"}
        elif result["status"] == FAILED:
            result["note"] += f"; see {log}"
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _env(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "LTH_DIET_CACHE": str(self.work / "cache"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": "",  # the store of each check, not that of the user
        }
        return environment | ({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})

    def stop(self) -> None:
        """Start no more checks, and kill those that run."""
        self._stopped = True
        for process in list(self._processes):
            self._kill(process)

    def _kill(self, process: subprocess.Popen) -> None:
        """Kill a check and all processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._processes.discard(process)

    def write(self) -> None:
        """Write the JSON file and the table."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        content = {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.began, 1),
            "summary": self._summary(),
            "checks": self.results,
        }
        write_atomically(self.out / "gpu_check.json", json.dumps(content, indent=2) + "\n")
        write_atomically(self.out / "gpu_check.txt", self.table() + "\n")

    def _summary(self) -> dict[str, int]:
        """Number of checks by result."""
        return dict(collections.Counter(result["status"] for result in self.results.values()))

    def table(self) -> str:
        """One row per check, and below what was skipped."""
        width = max(map(len, self.checks))
        rows = [f"{'check':{width}}  {'result':13} {'seconds':>7}  note"]
        for name, result in self.results.items():
            start = f"{name:{width}}  {result['status']:13} {result['seconds']:7.1f}  "
            note = "" if result["status"] == SKIPPED else result["note"] or self.checks[name].title
            rows.append(textwrap.fill(note, 120, initial_indent=start, subsequent_indent=" " * len(start)) or start)
        skipped = [f"  {name}: {r['note']}" for name, r in self.results.items() if r["status"] == SKIPPED]
        counts = ", ".join(f"{count} {status}" for status, count in self._summary().items())
        end = f"{counts}; {time.monotonic() - self.began:.0f} s"
        return "\n".join([*rows, *(["skipped:", *skipped] if skipped else []), end])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="time for all checks together")
    parser.add_argument("--patience", type=float, default=1, metavar="FACTOR", help="of the time limits of the checks")
    parser.add_argument("--small", action="store_true", help="small networks, as on the CPU")
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)) // 4)))
    parser.add_argument("--only", nargs="+", choices=checks.CHECKS, metavar="CHECK", help=", ".join(checks.CHECKS))
    options = parser.parse_args(arguments)
    first, *_ = checks.CHECKS
    chosen = {name: check for name, check in checks.CHECKS.items() if name in (first, *(options.only or checks.CHECKS))}
    script, jobs = Path(checks.__file__), max(1, options.jobs)
    runner = Runner(chosen, script, options.out, options.budget, jobs, options.device, options.patience, options.small)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return runner.run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

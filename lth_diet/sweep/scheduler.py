"""Trains a sweep on Ray: starts jobs as slots become free, and restarts those that crash.

A Ray task is one attempt of a job: it runs `composer -n 1 recipes/...` in a separate process. Results, checkpoints and
logs are written to the folder of runs, which all nodes share at the same path, or to an object store. A lost task
loses only the steps since its last checkpoint.

<runs>/sweep-logs/<run>/replicate_<r>/attempt_<n>.log      the output of an attempt; of a block, replicate_<r>-<last>
"""

import contextlib
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lth_diet.errors import HOW_TO_RESUME, UserError
from lth_diet.launch import checks
from lth_diet.launch.processes import LAUNCHER_VARIABLES, exit_with_parent
from lth_diet.program import DEVICE_FAULT
from lth_diet.runs.run_store import RunStore, open_run_store
from lth_diet.sweep.grid import Settings, Sweep, Work
from lth_diet.sweep.screen import Job, Screen
from lth_diet.training import devices

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL = 0.5  # seconds
_STOP_TIMEOUT = 15.0  # seconds for canceled tasks to end
_OBJECT_STORE_BYTES = 80 << 20  # bytes of shared memory for Ray, which stores almost nothing here


def run_sweep(sweep: Sweep, address: str | None, recipes: Path) -> int:
    """Train what is left of a sweep.

    Args:
        sweep: The sweep.
        address: Address of a running cluster; None: start one on this machine.
        recipes: Folder of the recipes.

    Returns:
        The exit status: 0; 1 if a job failed; 130 if interrupted.

    Raises:
        UserError: If there is no cluster, no node is large enough for a run, or the object store cannot be used.
    """
    left = [work for work in sweep.work() if not work.done]
    if not left:
        print(f"{sweep.path}: everything is finished")
        return 0
    for runs in {work.config.runs for work in left}:
        open_run_store(runs).check()
    try:
        with _connected(sweep.settings, address) as dashboard, _interruptible():
            scheduler = Scheduler(sweep.settings, left, recipes)
            print(scheduler.describe(), flush=True)
            with Screen(scheduler.jobs, f"{sweep.path}  {dashboard}") as screen:
                scheduler.run(screen)
        return screen.conclude()
    except KeyboardInterrupt:
        done = [part.done for work in left for part in work.parts]
        print(f"interrupted: {sum(done)} of {len(done)} are done; rerun the same command to resume", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _connected(settings: Settings, address: str | None) -> Iterator[str]:
    """Connect to a Ray cluster, or start one; yields the URL of its dashboard."""
    if address not in (None, "auto"):
        _check_address(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    cpus = checks.available_cpus()  # Ray ignores `taskset`, but knows the limits of a container
    own = {
        "num_cpus": settings.cpus or (cpus if cpus < (os.cpu_count() or 1) else None),
        "num_gpus": _local_gpus(settings) if address is None else None,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    own |= {"include_dashboard": True, "_node_ip_address": "127.0.0.1"}
    try:
        context = ray.init(
            address or "local", log_to_driver=False, logging_level="ERROR", **(own if address is None else {})
        )
    except (OSError, SystemExit) as error:
        if address is not None:
            raise _no_cluster(address) from None
        if "AF_UNIX" in str(error):
            raise UserError(
                f"TMPDIR = {os.environ.get('TMPDIR')!r}: too long for the sockets of Ray; set it to a shorter path, "
                "such as /tmp"
            ) from None
        raise
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def _local_gpus(settings: Settings) -> int:
    """GPUs of this machine that runs may use.

    Raises:
        UserError: If a GPU cannot be used, or there are fewer than the sweep asks for.
    """
    if 0 in (settings.gpus, settings.gpus_per_run):
        return 0
    available = devices.count_gpus()
    if settings.gpus is not None and settings.gpus > available:
        raise UserError(f"gpus = {settings.gpus}: must be at most {available}, the GPUs of this machine")
    return available if settings.gpus is None else settings.gpus


def _check_address(address: str) -> None:
    """Check that something listens at the address. Ray itself would take minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError):
        raise _no_cluster(address) from None


def _no_cluster(address: str) -> UserError:
    return UserError(f"--address: {address!r} is not the address of a running Ray cluster; expected host:port or auto")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM too, in place of Ray's handlers."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def jobs_from(work: list[Work], slots: int) -> list[Job]:
    """Return the jobs of some work, in the order in which they start: scores first, then the longest.

    Args:
        work: The work.
        slots: Number of jobs that run at a time. Scores get up to this many jobs, which share their networks.
    """
    jobs = []
    for each in sorted(work, key=lambda each: (each.recipe != "score", -each.steps_left)):
        several = min(slots, max(each.networks_left, 1)) if each.recipe == "score" else 1
        names = [f"{each.name}/process_{number}" for number in range(several)] if several > 1 else [each.name]
        jobs += [Job(each, name) for name in names]
    return jobs


class Scheduler:
    """Starts jobs in order as slots become free. Each attempt of a job is a Ray task.

    Args:
        settings: Settings of the sweep.
        work: The work that is left.
        recipes: Folder of the recipes.

    Raises:
        UserError: If no node is large enough for a run.
    """

    def __init__(self, settings: Settings, work: list[Work], recipes: Path):
        import ray

        self.settings = settings
        self.recipes = recipes
        self.cpus = settings.cpus_per_run or max(each.config.threads for each in work)
        resources = ray.cluster_resources()
        self.gpus = settings.gpus_per_run
        if self.gpus is None:
            self.gpus = 1.0 if resources.get("GPU") else 0.0
        slots = self._slots()
        if not slots:
            raise UserError(
                f"gpus_per_run: {self.gpus:g} and cpus_per_run: {self.cpus} are more than any node has; use at most "
                f"what one node has (all nodes: {resources.get('GPU', 0):g} GPUs, {resources.get('CPU', 0):g} CPUs)"
            )
        self.jobs = jobs_from(work, slots)
        self._scores = {each.name: each for each in work if each.recipe == "score"}
        self._running: dict[ray.ObjectRef, Job] = {}
        self._attempt = ray.remote(max_retries=0)(_run_attempt)

    def run(self, screen: Screen) -> None:
        """Run until every job is done or has failed. An interrupt stops the running jobs."""
        import ray

        try:
            while any(job.state in ("waiting", "running") for job in self.jobs):
                self._start_ready_jobs(screen)
                screen.refresh()  # here, while all slots are in use, for the ETA
                if not self._running:
                    time.sleep(_POLL)
                for task in ray.wait([*self._running], timeout=_POLL)[0] if self._running else ():
                    self._conclude(self._running.pop(task), task, screen)
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # what follows is bounded in time
            for task in self._running:
                ray.cancel(task, force=False)  # raises KeyboardInterrupt in the task, which kills its process
            if self._running:
                ray.wait([*self._running], num_returns=len(self._running), timeout=_STOP_TIMEOUT)

    def describe(self) -> str:
        """Describe what each job gets, such as `up to 8 jobs at a time, each with 0.5 GPUs and 1 CPU`."""
        gpus = "no GPU: they train on CPUs"
        if self.gpus:
            gpus = f"{self.gpus:g} GPU{'s' * (self.gpus != 1)}"
        cpus = f"{self.cpus} CPU{'s' * (self.cpus != 1)}"
        return f"up to {self._slots()} jobs at a time, each with {cpus} and {gpus}"

    def _slots(self) -> int:
        """Number of jobs that the live nodes can run at a time."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        slots = functools.partial(self.settings.slots, cpus_each=self.cpus, gpus_each=self.gpus)
        return sum(slots(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)

    def _start_ready_jobs(self, screen: Screen) -> None:
        free = self._slots() - len(self._running)
        for job in (job for job in self.jobs if job.state == "waiting"):
            scores = self._scores.get(job.work.needs or "")
            if scores is not None and not scores.done:
                failed = [other for other in self.jobs if other.work is scores and other.state == "failed"]
                if not any(other.work is scores and other.state in ("waiting", "running") for other in self.jobs):
                    self._end(job, "failed", f"{scores.name}: {failed[0].reason}", screen)
                continue
            if free <= 0:
                return
            self._start(job)
            free -= 1

    def _start(self, job: Job) -> None:
        logs = _logs(job)
        logs.path.mkdir(parents=True, exist_ok=True)
        job.logs.append(logs.path / f"attempt_{len([*logs.path.glob('attempt_*.log')]) + 1}.log")
        job.logs[-1].touch()
        job.state = "running"
        environment = {key: value for key, value in os.environ.items() if key.startswith(("LTH_DIET_", "MLFLOW_"))}
        environment |= {"OMP_NUM_THREADS": str(job.work.config.threads)}
        environment |= {} if self.gpus else {devices.VISIBLE: ""}
        task = self._attempt.options(num_cpus=self.cpus, num_gpus=self.gpus, name=job.name).remote(
            ["-n", "1", str((self.recipes / f"{job.work.recipe}.py").resolve()), *job.work.arguments],
            str(Path.cwd()),
            environment,
            logs.resolve(),
            job.logs[-1].name,
        )
        self._running[task] = job

    def _conclude(self, job: Job, task: "ray.ObjectRef", screen: Screen) -> None:  # noqa: F821
        """Handle the end of an attempt: the job is done, has failed, or waits for another attempt."""
        import ray

        try:
            status = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            crash = f"the task failed ({type(error.cause).__name__}: {error.cause})"
        except ray.exceptions.RayError as error:
            crash = f"lost with its worker or node ({type(error).__name__})"
        else:
            with contextlib.suppress(OSError):
                job.work.refresh_index()
            crash = _crash(job, status)
            if not crash:
                done = job.work.done
                self._end(job, "done" if done else "failed", "" if done else _reason(job, status), screen)
                return
        if len(job.logs) <= self.settings.retries:
            job.state = "waiting"
            screen.say(f"{job.name}: {crash}; restarts from its last checkpoint; log: {job.logs[-1]}")
        else:
            self._end(job, "failed", f"{crash}, {len(job.logs)} times", screen)

    def _end(self, job: Job, state: str, reason: str, screen: Screen) -> None:
        job.state, job.reason = state, reason
        screen.say(f"{job.name}: {state}" + (f": {reason}" if reason else ""))


def _logs(job: Job) -> RunStore:
    return open_run_store(job.work.config.runs) / "sweep-logs" / job.name


def _run_attempt(arguments: list[str], folder: str, environment: dict[str, str], logs: RunStore, log: str) -> int:
    """Run `composer` in a process that ends with this Ray task; returns its exit status, negative for a signal."""
    command = [str(Path(sys.executable).with_name("composer")), *arguments]
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    raylet, began = os.getppid(), time.monotonic()
    logs.path.mkdir(parents=True, exist_ok=True)
    with open(logs.path / log, "w") as file:
        gpus = (os.environ | environment).get(devices.VISIBLE)
        print(f"{socket.gethostname()}, GPU {gpus or 'none'}: {shlex.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=inherited | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=functools.partial(exit_with_parent, os.getpid()),
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)  # a long wait would not notice that the task is canceled
                if os.getppid() != raylet:  # Ray considers the node lost and will resume the run elsewhere
                    raise RuntimeError("the node's raylet has ended")
            print(f"status {process.returncode} after {time.monotonic() - began:.1f} s", file=file, flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the launcher and its rank; a run can be killed at any time
            process.wait()
    with contextlib.suppress(OSError):
        logs.upload_file(log)
    status = process.returncode
    if status > 192:  # the launcher turns its rank's -9 into 247
        return status - 256
    return 128 - status if status > 128 else status  # Composer's handler of SIGTERM exits with 143


def _crash(job: Job, status: int) -> str:
    """Reason for another attempt; empty if the job succeeded or would fail again."""
    if status < 0:
        return f"killed by signal {-status}"
    if status == DEVICE_FAULT:
        return _reason(job, status).removesuffix(HOW_TO_RESUME)
    unrecorded = job.work.recipe == "imp" and not job.work.failed
    return _reason(job, status) if status == 1 and unrecorded else ""


def _reason(job: Job, status: int) -> str:
    """The last error in the log of a job."""
    log = job.logs[-1]
    with contextlib.suppress(OSError):
        _logs(job).download_file(log.name)
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    return str(UserError(errors[-1])) if errors else f"exit status {status}"

"""The screen of a sweep: its jobs, their progress and the time that is left."""

import collections
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lth_diet.launch.text import duration, humanize, progress_table
from lth_diet.sweep.grid import Work

_REFRESH_INTERVAL = 1.0  # seconds between two live tables
_STORE_INTERVAL = 10.0  # seconds between two listings of an object store
_WINDOW = 60.0  # seconds over which a rate is measured
_RECENT = 64  # rates, the last ones measured, from which the rate of a process is estimated


@dataclasses.dataclass
class Job:
    """One process at a time that trains a `Work`.

    Args:
        work: What to train. Several jobs can share the networks of a scores artifact.
        name: Name of the folder of its logs.
        state: waiting, running, done or failed.
        reason: Why it failed.
        logs: One log per attempt.
    """

    work: Work
    name: str
    state: str = "waiting"
    reason: str = ""
    logs: list[Path] = dataclasses.field(default_factory=list)

    def states(self) -> list[str]:
        """The state of each replicate; some of a block may be done although the job failed."""
        some_done = self.state == "failed" and len(self.work.parts) > 1
        return ["done" if some_done and part.done else self.state for part in self.work.parts]


class Screen:
    """Shows a sweep: a live table on a terminal, plain lines where the output is piped.

    Args:
        jobs: All jobs of the sweep. The scheduler updates their states.
        title: Title of the table.
        console: Where to print; standard output by default.
        every: Seconds between two plain lines.
    """

    def __init__(self, jobs: Sequence[Job], title: str, console: Console | None = None, every: float = 30.0):
        self.jobs, self.title, self.every = jobs, title, every
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._rates = _Rates()
        self._refreshed = self._listed = 0.0

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        else:
            self.console.print(self.title)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above the table."""
        self.console.print(line)

    def refresh(self) -> None:
        """Show the current progress, unless it was shown a moment ago."""
        now = time.monotonic()
        if now - self._refreshed < (_REFRESH_INTERVAL if self._live else self.every):
            return
        self._refreshed = now
        running = {job.work.name: job for job in self.jobs if job.state == "running"}
        if now - self._listed > _STORE_INTERVAL:
            self._listed = now
            with contextlib.suppress(OSError):
                for job in running.values():
                    job.work.refresh_index()
        progress = {name: _progress_of(job.work) for name, job in running.items()}
        processes = collections.Counter(job.work.name for job in self.jobs if job.state == "running")
        left = {name: steps for name, (*_, steps) in progress.items()}
        self._rates.update(left, processes, now)
        summary = self._summary(left, processes)
        if self._live:
            self._live.update(Group(self._table(running, progress, processes), Text(summary)), refresh=True)
        else:
            self.console.print(summary)

    def _summary(self, left: dict[str, int], processes: dict[str, int]) -> str:
        """Counts of replicates and, once a rate is known, the ETA."""
        rate = self._rates.per_process()
        if not rate or not left:
            return self._counts()
        waiting = {job.work.name: job.work.steps_left for job in self.jobs if job.state == "waiting"}
        everything = waiting | left
        slots = sum(processes.values())
        longest = max(steps / processes.get(name, 1) for name, steps in everything.items())
        steps = max(sum(everything.values()) / slots, longest)
        return f"{self._counts()}; {rate:.1f} steps/s per process, ETA {duration(steps, rate)}"

    def _table(
        self, running: dict[str, Job], progress: dict[str, tuple[str, int, int, int]], processes: dict[str, int]
    ) -> Table:
        table = progress_table(self.title, ["", "arm", "phase"], ["step", "steps/s", "ETA", "attempt"])
        for name, job in running.items():
            phase, step, last, steps = progress[name]
            rate = self._rates.of(name)
            table.add_row(
                name, job.work.config.arm_description, humanize(phase), f"{step:,}/{last:,}",
                f"{processes[name] * rate:.1f}" if rate else "", duration(steps, rate and processes[name] * rate),
                str(len(job.logs)),
            )  # fmt: skip
        return table

    def _counts(self) -> str:
        states = collections.Counter(state for job in self.jobs for state in job.states())
        return ", ".join(f"{states[state]} {state}" for state in ("running", "done", "failed", "waiting"))

    def conclude(self) -> int:
        """Print the result of every failed job.

        Returns:
            The exit status: 0, or 1 if a job failed.
        """
        failed = [job for job in self.jobs if job.state == "failed"]
        self.console.print(self._counts())
        for job in failed:
            self.console.print(f"failed: {job.name} ({job.work.config.arm_description}): {job.reason}")
            for log in job.logs:
                self.console.print(f"  log: {log}")
        return 1 if failed else 0


class _Rates:
    """Steps per second of the processes of a sweep, measured from the steps that each work has left.

    A process writes its training curve at intervals, so a rate is measured from one change to another. The time before
    the first change is the start of the process and does not count.
    """

    def __init__(self):
        self._left: dict[str, int] = {}
        self._changes: dict[str, collections.deque[tuple[float, int]]] = {}
        self._rates: dict[str, float] = {}

    def update(self, left: dict[str, int], processes: dict[str, int], now: float) -> None:
        """Measure the rates of running works.

        Args:
            left: Name of a work to the steps that it has left.
            processes: Name of a work to the number of processes that train it.
            now: Seconds.
        """
        for name in self._left.keys() - left.keys():  # stopped; another attempt is measured from its start
            del self._left[name], self._changes[name]
        for name, steps in left.items():
            before, self._left[name] = self._left.get(name), steps
            changes = self._changes.setdefault(name, collections.deque())
            if before is None or steps > before:  # starts, or resumes from a checkpoint
                changes.clear()
            elif steps < before:
                changes.append((now, steps))
                while now - changes[0][0] > _WINDOW and len(changes) > 2:
                    changes.popleft()
            if len(changes) > 1:
                (began, first), (ended, last) = changes[0], changes[-1]
                self._rates.pop(name, None)  # the last ones measured are last
                self._rates[name] = (first - last) / (ended - began) / processes[name]

    def of(self, name: str) -> float | None:
        """Rate of each process of a running work; None while it is unknown."""
        return self._rates[name] if len(self._changes.get(name, ())) > 1 else None

    def per_process(self) -> float | None:
        """Median over the processes measured last, including finished ones; None before any rate is known."""
        return statistics.median([*self._rates.values()][-_RECENT:]) if self._rates else None


def _progress_of(work: Work) -> tuple[str, int, int, int]:
    """The phase that is training, its step and last step, and the steps left in all phases, from the curves."""
    at = []
    for phase, first, last in (phase for part in work.parts if part.can_train for phase in part.phases):
        if first < last and not phase.done:
            curve = phase.curve()
            at.append((phase, int(curve[-1]["step"]) if curve else first, last))
    if not at:
        return "", 0, 0, 0
    phase, step, last = next((each for each in reversed(at) if (each[0].path / "curve.jsonl").exists()), at[0])
    return phase.name, step, last, sum(last - step for _, step, last in at)

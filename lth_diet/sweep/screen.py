"""What a person sees of a sweep while its jobs run."""

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lth_diet.launch.text import duration, humanize
from lth_diet.sweep.grid import Work

_LIVE = 1.0  # seconds between two tables
_LOOK = 10.0  # seconds between two looks at an object store
_WINDOW = 60.0  # seconds over which a rate is measured


@dataclasses.dataclass
class Job:
    """One process at a time that trains something.

    Args:
        work: What; several jobs may share the networks of a scores artifact.
        name: Of its logs.
    """

    work: Work
    name: str
    state: str = "waiting"
    reason: str = ""
    logs: list[Path] = dataclasses.field(default_factory=list)


class Screen:
    """A live table on a terminal, plain lines where output is piped.

    Args:
        jobs: What is shown.
        title: Of the table.
        console: Where to; standard output if none is given.
        every: Seconds between two plain lines.
    """

    def __init__(self, jobs: Sequence[Job], title: str, console: Console | None = None, every: float = 30.0):
        self.jobs, self.title, self.every = jobs, title, every
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._measured: dict[str, collections.deque[tuple[float, int]]] = {}
        self._refreshed = self._looked = 0.0

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
        """A line that stays."""
        self.console.print(line)

    def refresh(self) -> None:
        """Show how far everything is."""
        now = time.monotonic()
        if now - self._refreshed < (_LIVE if self._live else self.every):
            return
        self._refreshed = now
        running = {job.work.name: job for job in self.jobs if job.state == "running"}
        if now - self._looked > _LOOK:
            self._looked = now
            with contextlib.suppress(OSError):
                for job in running.values():
                    job.work.folder.store.refresh_index()
        rows = [(job, *_progress_of(job.work)) for job in running.values()]
        rates = [self._rate(job.work.name, left, now) for job, *_, left in rows]
        waiting = {job.work.name: job.work for job in self.jobs if job.state == "waiting"}
        left = sum(work.steps_left for name, work in waiting.items() if name not in running)
        left += sum(steps for *_, steps in rows)
        summary = f"{self._counts()}; {sum(rates):.1f} steps/s, ETA {duration(left, sum(rates))}"
        if not self._live:
            self.console.print(summary)
            return
        table = Table(title=self.title, title_justify="left")
        for name, side in (
            ("", "left"), ("arm", "left"), ("phase", "left"), ("step", "right"), ("steps/s", "right"), ("ETA", "right"),
            ("attempt", "right"),
        ):  # fmt: skip
            table.add_column(name, justify=side, no_wrap=True)
        for (job, phase, step, last, steps), rate in zip(rows, rates, strict=True):
            table.add_row(
                job.work.name, job.work.config.arm_description, humanize(phase), f"{step:,}/{last:,}", f"{rate:.1f}",
                duration(steps, rate), str(len(job.logs)),
            )  # fmt: skip
        self._live.update(Group(table, Text(summary)), refresh=True)

    def _rate(self, name: str, left: int, now: float) -> float:
        """Steps a second, over the last while."""
        window = self._measured.setdefault(name, collections.deque())
        if window and left > window[-1][1]:  # goes on at a checkpoint
            window.clear()
        window.append((now, left))
        while now - window[0][0] > _WINDOW and len(window) > 2:
            window.popleft()
        (begin, before), (end, after) = window[0], window[-1]
        return (before - after) / (end - begin) if end > begin else 0.0

    def _counts(self) -> str:
        states = collections.Counter(job.state for job in self.jobs)
        return ", ".join(f"{states[state]} {state}" for state in ("running", "done", "failed", "waiting"))

    def conclude(self) -> int:
        """Tell how it ended; returns the exit status."""
        failed = [job for job in self.jobs if job.state == "failed"]
        self.console.print(self._counts())
        for job in failed:
            self.console.print(f"failed: {job.name} ({job.work.config.arm_description}): {job.reason}")
            for log in job.logs:
                self.console.print(f"  log: {log}")
        return 1 if failed else 0


def _progress_of(work: Work) -> tuple[str, int, int, int]:
    """The phase that is trained, its step and last step, and the steps left over all phases, by their curves."""
    at = [
        (phase, _step(phase.curve(), first), last)
        for phase, first, last in work.phases
        if first < last and not phase.done
    ]
    if not at:
        return "", 0, 0, 0
    phase, step, last = next((each for each in reversed(at) if (each[0].path / "curve.jsonl").exists()), at[0])
    return phase.name, step, last, sum(last - step for _, step, last in at)


def _step(curve: Sequence[dict[str, float]], first: int) -> int:
    return int(curve[-1]["step"]) if curve else first

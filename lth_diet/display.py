"""What a person sees while a launch trains, and at its end: one screen for the replicates of all ranks."""

import datetime
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lth_diet.runs import Phase, Replicate, Run

Notice = dict[str, Any]


class Progress:
    """One rank's account of its replicates, posted for the screen.

    Args:
        replicates: The rank's share.
        steps: Steps that it has yet to train, over all of them.
        post: Takes the account, at most every `every` seconds and whenever a phase ends.
    """

    def __init__(
        self,
        replicates: list[int],
        steps: int,
        post: Callable[[Notice], None] = lambda notice: None,
        every: float = 0.5,
    ):
        self.rows: dict[int, Notice] = {index: {"replicate": index, "state": "waiting"} for index in replicates}
        self.messages: list[str] = []
        self.left = steps
        self._post, self._every = post, every
        self._posted = self._counted = 0.0
        self._row: Notice = {}
        self.post()

    def begin(self, replicate: int, phase: str, weights_remaining_percent: float) -> None:
        """The steps that follow are of this phase."""
        self._row = self.rows[replicate]
        weights = round(weights_remaining_percent, 1)
        self._row |= {"state": "training", "phase": phase.replace("_", " "), "weights": weights, "rate": None}

    def step_from(self, step: int, last: int) -> None:
        """Training begins, or goes on, at `step`; it ends at `last`."""
        self._row |= {"step": step, "last": last}
        self._counted = time.monotonic()
        self.post()

    def step(self, step: int) -> None:
        """`step` batches of this phase have been trained."""
        now = time.monotonic()
        if now - self._posted >= self._every or step >= self._row["last"]:
            done = step - self._row["step"]
            self.left = max(self.left - done, 0)
            if done and now > self._counted:
                self._row["rate"] = done / (now - self._counted)
            self._row["step"], self._counted = step, now
            self.post()

    def measured(
        self, replicate: int, level: int, test_accuracy_percent: float, weights_remaining_percent: float
    ) -> None:
        """A level is done, now or in an earlier launch."""
        levels = self.rows[replicate].setdefault("levels", {})
        levels[str(level)] = [round(weights_remaining_percent, 1), test_accuracy_percent]
        self.post()

    def end(self, replicate: int, state: str) -> None:
        """A replicate is "done" or has "failed"."""
        self.rows[replicate]["state"] = state
        self.post()

    def say(self, message: str) -> None:
        """A line for the person who started the launch, whichever rank has it."""
        self.messages.append(message)
        self.post()

    def post(self) -> None:
        self._posted = time.monotonic()
        self._post({"rows": list(self.rows.values()), "messages": self.messages, "left": self.left})


class Screen:
    """Shows what the ranks post: a live table on a terminal, plain lines where output is piped.

    Args:
        read: The ranks' accounts.
        title: Of the table.
        console: Where to; standard output if none is given.
        every: Seconds between two plain lines of a replicate.
    """

    def __init__(
        self, read: Callable[[], dict[int, Notice]], title: str, console: Console | None = None, every: float = 10.0
    ):
        self.read, self.title, self.every = read, title, every
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._said: set[str] = set()
        self._levels: dict[int, int] = {}
        self._lines: dict[int, float] = {}

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.refresh()
        if self._live:
            self._live.stop()

    def _loop(self) -> None:
        while not self._stop.wait(0.5):
            self.refresh()

    def refresh(self) -> None:
        """Show what is new."""
        notices = self.read()
        for message in (message for notice in notices.values() for message in notice["messages"]):
            if message not in self._said:  # what several ranks have to say is said once
                print(message, file=sys.stderr, flush=True)  # above the table, where there is one
                self._said.add(message)
        rows = [(row, notice["left"]) for notice in notices.values() for row in notice["rows"]]
        if self._live:
            self._live.update(self._table(rows), refresh=True)
        else:
            for row, left in rows:
                self._print(row, left)

    def _print(self, row: Notice, left: int) -> None:
        index, levels = row["replicate"], row.get("levels", {})
        for level, (weights, accuracy) in list(levels.items())[self._levels.get(index, 0) :]:
            name = f"replicate {index}  level {level:<2}  {weights:5.1f} % of weights"
            self.console.print(f"{name}  test accuracy {accuracy:.2f} %")
        self._levels[index] = len(levels)
        now = time.monotonic()
        if row["state"] == "training" and row.get("rate") and now - self._lines.get(index, 0) >= self.every:
            self._lines[index] = now
            name = f"replicate {index}  {row['phase']:<8}  {row['weights']:5.1f} % of weights"
            pace = f"step {row['step']}/{row['last']}  {row['rate']:.1f} steps/s"
            level_left = _duration(row["last"] - row["step"], row["rate"])
            self.console.print(f"{name}  {pace}  ETA level {level_left}, run {_duration(left, row['rate'])}")

    def _table(self, rows: list[tuple[Notice, int]]) -> Group:
        table = Table(title=self.title, title_justify="left", expand=False)
        for name, side in (
            ("replicate", "right"), ("phase", "left"), ("weights", "right"), ("step", "right"), ("steps/s", "right"),
            ("ETA level", "right"), ("test accuracy of levels done, %", "left"),
        ):  # fmt: skip
            table.add_column(name, justify=side, no_wrap=name != "test accuracy of levels done, %")
        for row, _ in sorted(rows, key=lambda pair: pair[0]["replicate"]):
            accuracies = " ".join(f"{accuracy:.1f}" for _, accuracy in row.get("levels", {}).values())
            if row["state"] != "training":
                table.add_row(str(row["replicate"]), row["state"], "", "", "", "", accuracies)
                continue
            rate, step, last = row["rate"], row.get("step", 0), row.get("last", 0)
            table.add_row(
                str(row["replicate"]), row["phase"], f"{row['weights']:.1f} %", f"{step:,}/{last:,}",
                f"{rate:.1f}" if rate else "", _duration(last - step, rate), accuracies,
            )  # fmt: skip
        rates = [(left, row["rate"]) for row, left in rows if row["state"] == "training" and row.get("rate")]
        if all(row["state"] in ("done", "failed") for row, _ in rows):
            return Group(table)
        slowest = max((left / rate for left, rate in rates), default=None)
        return Group(table, Text(f"ETA of the run {'?' if slowest is None else _duration(slowest, 1)}"))


def _duration(steps: float, rate: float | None) -> str:
    return str(datetime.timedelta(seconds=round(steps / rate))) if rate else "?"


def steps_left(run: Run, replicate: Replicate) -> int:
    """Steps that a replicate has yet to train, counted from its checkpoints."""
    return sum(last - _start(phase, first) for phase, first, last in _phases(run, replicate) if not phase.done)


def _phases(run: Run, replicate: Replicate) -> list[tuple[Phase, int, int]]:
    """Every phase of a replicate with its first and last step."""
    first, last = run.config.rewind_steps, run.config.train.steps
    levels = range(run.config.prune.levels + 1)
    return [(replicate.pretrain, 0, first), *((replicate.level(level), first, last) for level in levels)]


def _start(phase: Phase, first: int) -> int:
    checkpoint = phase.checkpoint()
    return checkpoint[1] if checkpoint else first


def plan(run: Run) -> str:
    """What would run: phases, steps, what exists already."""
    lines = [f"{run.path}: {run.config.model_name}, arm {run.config.arm}, run id {run.config.run_id()}"]
    for replicate in run.replicates():
        lines.append(f"replicate {replicate.index}: {steps_left(run, replicate):,} steps to train")
        for number, (phase, first, last) in enumerate(_phases(run, replicate)):
            weights = 100 * (1 - run.config.prune.fraction) ** max(number - 1, 0)
            start = _start(phase, first)
            state = "done" if phase.done else f"goes on at step {start}" if start > first else "to do"
            name = phase.name.replace("_", " ")
            lines.append(f"  {name:<9} {weights:>5.1f} % of weights  steps {first} to {last}  {state}")
    total = sum(steps_left(run, replicate) for replicate in run.replicates())
    return "\n".join([*lines, f"total: {total:,} steps to train"])


def table(run: Run) -> str:
    """Level, weights remaining and test accuracy (mean ± sd over the replicates so far) of a run."""
    rows = [
        (level, phase.result()["weights_remaining_percent"], phase.result()["test_accuracy_percent"])
        for replicate in run.replicates()
        for level, phase in replicate.levels()
        if phase.done
    ]
    if not rows:
        return "no level is done yet"
    frame = pd.DataFrame(rows, columns=["level", "weights", "accuracy"])
    lines = ["level  weights remaining  test accuracy (mean ± sd)    n"]
    for level, group in frame.groupby("level"):
        sd = f"± {group.accuracy.std():.2f}" if len(group) > 1 else "      "
        accuracy = f"{group.accuracy.mean():.2f} {sd} %"
        lines.append(f"{level:>5}  {group.weights.iloc[0]:>15.1f} %  {accuracy:>25}  {len(group):>3}")
    return "\n".join(lines)

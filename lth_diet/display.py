"""What a person sees while a launch trains, and at its end: one screen for what all ranks train."""

import contextlib
import datetime
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lth_diet.errors import UserError
from lth_diet.phases import Phase, read_json
from lth_diet.runs import Replicate, Run, ScoreFolder

Notice = dict[str, Any]


class Progress:
    """One rank's account of what it trains, posted for the screen.

    Args:
        names: Of the replicates that it will train; what else it trains is told by `begin`.
        steps: Steps that it has yet to train, over all of them.
        post: Takes the account, at most every `every` seconds and whenever a phase ends.
    """

    def __init__(
        self,
        names: list[str],
        steps: int,
        post: Callable[[Notice], None] = lambda notice: None,
        every: float = 0.5,
    ):
        self.rows: dict[str, Notice] = {name: {"name": name, "state": "waiting"} for name in names}
        self.messages: list[str] = []
        self.left = steps
        self._post, self._every = post, every
        self._posted = self._counted = 0.0
        self._row: Notice = {}
        self.post()

    def begin(self, name: str, phase: str, weights_remaining_percent: float = 100.0) -> None:
        """The steps that follow are of this phase of a replicate or network, `replicate_<r>` or `network_<k>`."""
        self._row = self.rows.setdefault(name, {"name": name})
        weights = round(weights_remaining_percent, 1)
        self._row |= {"state": "training", "phase": phase, "weights": weights, "rate": None}

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
        self, name: str, phase: str, test_accuracy_percent: float, weights_remaining_percent: float = 100.0
    ) -> None:
        """A phase is done, now or in an earlier launch."""
        results = self.rows[name].setdefault("results", {})
        results[phase] = [round(weights_remaining_percent, 1), test_accuracy_percent]
        self.post()

    def end(self, name: str, state: str) -> None:
        """A replicate or network is "done" or has "failed"."""
        self.rows[name]["state"] = state
        self.post()

    def say(self, message: str) -> None:
        """A line for the person who started the launch, whichever rank has it."""
        self.messages.append(message)
        self.post()

    @contextlib.contextmanager
    def warning(self, words: str) -> Iterator[None]:
        """What fails inside is told in a line, and does not stop training; but a disk that cannot be written does."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            self.say(f"warning: {words} ({type(error).__name__}: {error})")

    def post(self) -> None:
        self._posted = time.monotonic()
        self._post({"rows": list(self.rows.values()), "messages": self.messages, "left": self.left})


class Screen:
    """Shows what the ranks post: a live table on a terminal, plain lines where output is piped.

    Args:
        read: The ranks' accounts.
        title: Of the table.
        console: Where to; standard output if none is given.
        every: Seconds between two plain lines of the same replicate or network.
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
        self._results: dict[str, int] = {}
        self._lines: dict[str, float] = {}

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
        name, results = row["name"], row.get("results", {})
        for phase, (weights, accuracy) in list(results.items())[self._results.get(name, 0) :]:
            self.console.print(f"{_line(name, phase, weights)}  test accuracy {accuracy:.2f} %")
        self._results[name] = len(results)
        now = time.monotonic()
        if row["state"] == "training" and row.get("rate") and now - self._lines.get(name, 0) >= self.every:
            self._lines[name] = now
            pace = f"step {row['step']}/{row['last']}  {row['rate']:.1f} steps/s"
            level_left = duration(row["last"] - row["step"], row["rate"])
            line = _line(name, row["phase"], row["weights"])
            self.console.print(f"{line}  {pace}  ETA phase {level_left}, run {duration(left, row['rate'])}")

    def _table(self, rows: list[tuple[Notice, int]]) -> Group:
        table = Table(title=self.title, title_justify="left", expand=False)
        for name, side in (
            ("", "left"), ("phase", "left"), ("weights", "right"), ("step", "right"), ("steps/s", "right"),
            ("ETA phase", "right"), ("test accuracy of what is done, %", "left"),
        ):  # fmt: skip
            table.add_column(name, justify=side, no_wrap=name != "test accuracy of what is done, %")
        for row, _ in sorted(rows, key=lambda pair: _place(pair[0]["name"])):
            name = words(row["name"])
            accuracies = " ".join(f"{accuracy:.1f}" for _, accuracy in row.get("results", {}).values())
            if row["state"] != "training":
                table.add_row(name, row["state"], "", "", "", "", accuracies)
                continue
            rate, step, last = row["rate"], row.get("step", 0), row.get("last", 0)
            table.add_row(
                name, words(row["phase"]), f"{row['weights']:.1f} %", f"{step:,}/{last:,}",
                f"{rate:.1f}" if rate else "", duration(last - step, rate), accuracies,
            )  # fmt: skip
        rates = [(left, row["rate"]) for row, left in rows if row["state"] == "training" and row.get("rate")]
        if all(row["state"] in ("done", "failed") for row, _ in rows):
            return Group(table)
        slowest = max((left / rate for left, rate in rates), default=None)
        return Group(table, Text(f"ETA of the run {'?' if slowest is None else duration(slowest, 1)}"))


def words(name: str) -> str:
    """`level_1` as `level 1`."""
    return name.replace("_", " ")


def _place(name: str) -> tuple[str, int]:
    """`network_10` after `network_9`, and replicates after networks."""
    kind, _, number = name.partition("_")
    return kind, int(number)


def _line(name: str, phase: str, weights_remaining_percent: float) -> str:
    return f"{words(name)}  {words(phase):<8}  {weights_remaining_percent:5.1f} % of weights"


def duration(steps: float, rate: float | None) -> str:
    """Of some steps at so many a second."""
    return str(datetime.timedelta(seconds=round(steps / rate))) if rate else "?"


def steps_left(run: Run, replicate: Replicate) -> int:
    """Steps that a replicate has yet to train, counted from its checkpoints."""
    return sum(last - start(phase, first) for phase, first, last in phases(run, replicate) if not phase.done)


def phases(run: Run, replicate: Replicate) -> list[tuple[Phase, int, int]]:
    """Every phase of a replicate, with its first and last step."""
    first, last = run.config.rewind_steps, run.config.train.steps
    levels = range(run.config.prune.levels + 1)
    return [(replicate.pretrain, 0, first), *((replicate.level(level), first, last) for level in levels)]


def start(phase: Phase, first: int) -> int:
    """The step that a phase that is not done goes on at."""
    checkpoint = phase.checkpoint()
    return checkpoint[1] if checkpoint else first


def scoring_steps_left(folder: ScoreFolder) -> int:
    """Steps that the networks of a scores artifact have yet to train, counted from their checkpoints."""
    last = folder.config.scores.steps
    return sum(last - start(network, 0) for network in folder.networks() if not network.done)


def plan_scores(folder: ScoreFolder) -> str:
    """What scoring would run: networks, steps, what exists already."""
    last = folder.config.scores.steps
    noise = f", {100 * folder.config.pretrain.label_noise:g} % label noise" * (folder.config.pretrain.label_noise > 0)
    lines = [f"{folder.path}: EL2N scores by {len(folder.networks())} {folder.config.model_name}{noise}"]
    if folder.done:
        return f"{lines[0]}  done"
    for network in folder.networks():
        lines.append(f"  {words(network.name):<10} steps 0 to {last}  {_state(network, 0)}")
    return "\n".join([*lines, f"scores: {scoring_steps_left(folder):,} steps to train"])


def _state(phase: Phase, first: int) -> str:
    step = start(phase, first)
    return "done" if phase.done else f"goes on at step {step}" if step > first else "to do"


def plan(run: Run, scores: ScoreFolder | None = None) -> str:
    """What would run: phases, steps, what exists already; `scores` come first, where the arm needs them."""
    lines = [plan_scores(scores)] if scores else []
    lines += [f"{run.path}: {run.config.model_name}, arm {run.config.arm}, run id {run.config.run_id()}"]
    for replicate in run.replicates():
        lines.append(f"replicate {replicate.index}: {steps_left(run, replicate):,} steps to train")
        for number, (phase, first, last) in enumerate(phases(run, replicate)):
            weights = 100 * (1 - run.config.prune.fraction) ** max(number - 1, 0)
            state = _state(phase, first)
            lines.append(f"  {words(phase.name):<9} {weights:>5.1f} % of weights  steps {first} to {last}  {state}")
    total = sum(steps_left(run, replicate) for replicate in run.replicates())
    total += scoring_steps_left(scores) if scores else 0
    return "\n".join([*lines, f"total: {total:,} steps to train"])


def summary(folder: ScoreFolder) -> str:
    """What is known of finished scores; nothing, if it could not be drawn."""
    path = folder.path / "examples/summary.json"
    return json.dumps(read_json(path), indent=2) if path.exists() else ""


def table(run: Run) -> str:
    """Level, weights remaining and test accuracy (mean ± sd over the replicates so far) of a run."""
    rows = []
    for level, phase in (pair for replicate in run.replicates() for pair in replicate.levels() if pair[1].done):
        with contextlib.suppress(UserError):  # a damaged result, which has been told
            result = phase.result()
            rows.append((level, result["weights_remaining_percent"], result["test_accuracy_percent"]))
    if not rows:
        return "no level is done yet"
    frame = pd.DataFrame(rows, columns=["level", "weights", "accuracy"])
    lines = ["level  weights remaining  test accuracy (mean ± sd)    n"]
    for level, group in frame.groupby("level"):
        sd = f"± {group.accuracy.std():.2f}" if len(group) > 1 else "      "
        accuracy = f"{group.accuracy.mean():.2f} {sd} %"
        lines.append(f"{level:>5}  {group.weights.iloc[0]:>15.1f} %  {accuracy:>25}  {len(group):>3}")
    return "\n".join(lines)

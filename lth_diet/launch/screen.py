"""The screen of a launch: the progress of all ranks."""

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from lth_diet.launch.text import duration, humanize, progress_table
from lth_diet.training.progress import Status

_FRAME = 7  # lines of the screen beside the rows of the table
_LINE_INTERVAL = 10.0  # seconds between two plain lines of the same replicate or network


class Screen:
    """Shows the progress of all ranks: a live table on a terminal, plain lines where the output is piped.

    Args:
        read: Returns the status of each rank.
        title: Title of the table.
        console: Where to print; standard output by default.
        arms: Names of the arms, in the order in which the table shows them.
    """

    def __init__(
        self,
        read: Callable[[], dict[int, Status]],
        title: str,
        console: Console | None = None,
        arms: Sequence[str] = (),
    ):
        self.read, self.title = read, title
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
        self._order = {arm: number for number, arm in enumerate(arms)}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._printed: set[str] = set()
        self._results: dict[str, int] = {}
        self._lines: dict[str, float] = {}

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.refresh()
        if self._live:
            self._live.stop()

    def _loop(self) -> None:
        while not self._stop.wait(0.5):
            self.refresh()

    def refresh(self) -> None:
        """Print new messages and show the current progress."""
        statuses = self.read()
        for message in (message for status in statuses.values() for message in status["messages"]):
            if message not in self._printed:  # several ranks may have the same message
                print(message, file=sys.stderr, flush=True)  # above the table, where there is one
                self._printed.add(message)
        if self._live:
            self._live.update(self._table(list(statuses.values())), refresh=True)
        else:
            for status in statuses.values():
                for _, rows in itertools.groupby(status["finished"] + status["rows"], self._progress_of):
                    self._print(list(rows), duration(status["left"], status["rate"]))

    def _progress_of(self, row: Status) -> tuple:
        """What the rows of replicates that train as one network share."""
        now = row["arm"], row["state"], row.get("phase"), row.get("step")
        return (*now, *row.get("results", {}), self._results.get(_name(row), 0))

    def _print(self, rows: list[Status], run_left: str) -> None:
        row, name = rows[0], _name(*rows)
        results = [list(each.get("results", {}).items())[self._results.get(_name(each), 0) :] for each in rows]
        for level in zip(*results, strict=True):
            (phase, (weights, _)), accuracies = level[0], " ".join(f"{accuracy:.2f}" for _, (_, accuracy) in level)
            self.console.print(f"{_line(name, phase, weights)}  test accuracy {accuracies} %")
        self._results |= {_name(each): len(each.get("results", {})) for each in rows}
        now = time.monotonic()
        if row["state"] == "training" and row.get("rate") and now - self._lines.get(name, 0) >= _LINE_INTERVAL:
            self._lines[name] = now
            pace = f"step {row['step']}/{row['last']}  {row['rate']:.1f} steps/s"
            level_left = duration(row["last"] - row["step"], row["rate"])
            line = _line(name, row["phase"], row["weights"])
            self.console.print(f"{line}  {pace}  ETA phase {level_left}, run {run_left}")

    def _table(self, statuses: list[Status]) -> Group:
        rows = [row for status in statuses for row in status["rows"]]
        table = progress_table(self.title, ["", "phase"], ["weights", "step", "steps/s", "ETA phase"])
        table.add_column("test accuracy so far, %")
        shown, hidden = self._fitting(sorted(rows, key=self._sort_key))
        for row in shown:
            name = _name(row)
            accuracies = " ".join(f"{accuracy:.1f}" for _, accuracy in row.get("results", {}).values())
            if row["state"] != "training":
                table.add_row(name, row["state"], "", "", "", "", accuracies)
                continue
            rate, step, last = row["rate"], row.get("step", 0), row.get("last", 0)
            table.add_row(
                name, humanize(row["phase"]), f"{row['weights']:.1f} %", f"{step:,}/{last:,}",
                f"{rate:.1f}" if rate else "", duration(last - step, rate), accuracies,
            )  # fmt: skip
        lines = [Text(hidden)] if hidden else []
        if not all(row["state"] in ("done", "failed") for row in rows):
            lines.append(Text(f"ETA of the run {_eta(statuses)}"))
        return Group(table, *lines)

    def _fitting(self, rows: list[Status]) -> tuple[list[Status], str]:
        """The rows of several arms that the terminal shows: without those done or waiting, which are counted."""
        if len(self._order) < 2 or len(rows) + _FRAME <= self.console.height:
            return rows, ""
        hidden = Counter(row["state"] for row in rows if row["state"] in ("done", "waiting"))
        text = ", ".join(f"{number} {state}" for state, number in sorted(hidden.items()))
        return [row for row in rows if row["state"] not in hidden], f"not shown: {text}"

    def _sort_key(self, row: Status) -> tuple[int, str, str, int]:
        """Key that sorts networks before replicates, these by arm, and `network_10` after `network_9`."""
        kind, _, number = row["name"].partition("_")
        return self._order.get(row["arm"], -1), row["arm"], kind, int(number)


def _eta(statuses: list[Status]) -> str:
    """Time until the slowest rank finishes. A rank without a rate yet counts as slow as the slowest other rank."""
    training = [status for status in statuses if any(row["state"] == "training" for row in status["rows"])]
    rates = [(status["left"], status["rate"]) for status in training]
    known = [rate for _, rate in rates if rate]
    return duration(max(left / (rate or min(known)) for left, rate in rates), 1) if known else "?"


def _name(row: Status, *others: Status) -> str:
    """Such as `replicate 0`, `replicates 0 to 3`, or `digits_all  replicate 0` if the launch has several arms."""
    name = humanize(row["name"])
    if others:
        kind, _, first = name.partition(" ")
        name = f"{kind}s {first} to {humanize(others[-1]['name']).split()[-1]}"
    return f"{row['arm']}  {name}" if row["arm"] else name


def _line(name: str, phase: str, weights_remaining_percent: float) -> str:
    return f"{name}  {humanize(phase):<8}  {weights_remaining_percent:5.1f} % of weights"

"""Progress of one process, for the screen of the launch."""

import collections
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

Status = dict[str, Any]
"""Status of one rank, `{"rows", "finished", "messages", "left", "rate"}`, or one of its rows: a replicate or network.

The rate of a row counts its own steps. The rate of the rank is the sum over its rows in training. `left` counts all.
`finished` has the rows of earlier parts of the work.
"""
_INTERVAL = 0.5  # seconds between two publications during a phase, at least
_WARM_UP = 5  # steps at the start of a phase without rate: they include CUDA initialization and compilation
_WINDOW = 30.0  # seconds over which the rate is measured


class Progress:
    """Tracks the phases, steps, results and messages of one rank and publishes them as its status.

    Args:
        names: Names of the replicates to train. `start_phase` adds others.
        steps: Number of steps left, over all replicates and phases.
        publish: Called with the status: every half second during a phase, at its end, and after each other report.

    Attributes:
        arm: Name of the arm of the replicates that the following reports name; empty if the launch has one arm.
    """

    def __init__(self, names: Sequence[str], steps: int, publish: Callable[[Status], None] = lambda status: None):
        self.arm = ""
        self.rows: dict[str, Status] = {}
        self.finished: list[Status] = []
        self.messages: list[str] = []
        self._publish = publish
        self._published = 0.0
        self._samples: collections.deque[tuple[float, int]] = collections.deque()
        self._measured_from = 0
        self._training: list[Status] = []
        self._step = self._last = 0
        self.begin([("", name) for name in names], steps)

    def begin(self, replicates: Iterable[tuple[str, str]], steps: int) -> None:
        """Start a part of the work. Messages, results and what has failed are kept.

        Args:
            replicates: Names of arm and replicate of all that is to be trained.
            steps: Number of steps left in this part.
        """
        failed = {key: row for key, row in self.rows.items() if row["state"] == "failed"}
        self.finished += [row for key, row in self.rows.items() if key not in failed and row.get("results")]
        rows = {_key(arm, name): {"arm": arm, "name": name, "state": "waiting"} for arm, name in replicates}
        self.rows, self.left = rows | failed, steps
        self._rate: float | None = None
        self.publish()

    def start_phase(
        self, names: Sequence[str], phase: str, weights_remaining_percent: float | Sequence[float] = 100.0
    ) -> None:
        """Assign the following steps to a phase of one or several `replicate_<r>` or `network_<k>`.

        A step of several counts once for each of them.

        Args:
            names: Names of the replicates or networks that train together.
            phase: Name of the phase.
            weights_remaining_percent: Remaining weights, of all or of each.
        """
        weights = weights_remaining_percent
        weights = [weights] * len(names) if isinstance(weights, int | float) else weights
        for row in self._training:  # of the phase before
            row["rate"] = None
        self._training = []
        for name, remaining in zip(names, weights, strict=True):
            row = self.rows.setdefault(_key(self.arm, name), {"arm": self.arm, "name": name})
            row |= {"state": "training", "phase": phase, "weights": round(remaining, 1), "rate": None}
            self._training.append(row)

    def start_training(self, step: int, last: int) -> None:
        """Report that training starts or resumes at `step` and ends at `last`."""
        for row in self._training:
            row |= {"step": step, "last": last, "rate": self._rate}
        self._step, self._last = step, last
        self._samples.clear()
        self._measured_from = step + _WARM_UP
        self.publish()

    def step(self, step: int) -> None:
        """Report the number of finished steps of this phase. Replicates that failed during it train no more."""
        now = time.monotonic()
        if not self._samples and step >= self._measured_from:
            self._samples.append((now, step))
        if now - self._published >= _INTERVAL or step >= self._last:
            self._training = [row for row in self._training if row["state"] == "training"]
            self.left = max(self.left - (step - self._step) * len(self._training), 0)
            self._step = step
            self._update_rate(now, step)
            for row in self._training:
                row |= {"step": step, "rate": self._rate}
            self.publish()

    def _update_rate(self, now: float, step: int) -> None:
        """Measure the rate over the last `_WINDOW` seconds after the warm-up; until then, keep the previous one."""
        if self._samples and now - self._samples[0][0] >= _INTERVAL:
            self._samples.append((now, step))
            while now - self._samples[1][0] > _WINDOW:
                self._samples.popleft()
            (began, first), (ended, last) = self._samples[0], self._samples[-1]
            self._rate = (last - first) / (ended - began)

    def report_accuracy(
        self, name: str, phase: str, test_accuracy_percent: float, weights_remaining_percent: float = 100.0
    ) -> None:
        """Report the result of a finished phase, of this launch or an earlier one."""
        results = self.rows[_key(self.arm, name)].setdefault("results", {})
        results[phase] = [round(weights_remaining_percent, 1), test_accuracy_percent]
        self.publish()

    def set_state(self, name: str, state: str) -> None:
        """Set the state of a replicate or network: "done" or "failed"."""
        self.rows[_key(self.arm, name)]["state"] = state
        self.publish()

    def fail_unfinished(self, spare: Collection[tuple[str, str]] = ()) -> None:
        """Set the state of what is not done to "failed", except for some replicates, named as for `begin`."""
        for row in self.rows.values():
            if row["state"] != "done" and (row["arm"], row["name"]) not in spare:
                row["state"] = "failed"
        self.publish()

    def log(self, message: str) -> None:
        """Show a message on the screen of the launch, from any rank."""
        self.messages.append(message)
        self.publish()

    @contextlib.contextmanager
    def warn_on_error(self, message: str) -> Iterator[None]:
        """Log an error raised inside as a warning, except for an OSError: a disk that cannot be written is fatal."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            self.log(f"warning: {message} ({type(error).__name__}: {error})")

    def publish(self) -> None:
        """Publish the current status."""
        self._published = time.monotonic()
        rates = [row["rate"] for row in self.rows.values() if row["state"] == "training" and row["rate"]]
        status = {"rows": list(self.rows.values()), "finished": self.finished, "messages": self.messages}
        self._publish(status | {"left": self.left, "rate": sum(rates) or None})


def _key(arm: str, name: str) -> str:
    return f"{arm}/{name}" if arm else name

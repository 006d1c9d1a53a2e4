"""What a process trains at the moment, for the screen of the launch."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

Status = dict[str, Any]


class Progress:
    """One rank's account of what it trains, posted for the screen.

    Args:
        names: Of the replicates that it will train; what else it trains is told by `begin`.
        steps: Steps that it has yet to train, over all of them.
        publish: Takes the account, at most every `every` seconds and whenever a phase ends.
    """

    def __init__(
        self,
        names: list[str],
        steps: int,
        publish: Callable[[Status], None] = lambda status: None,
        every: float = 0.5,
    ):
        self.rows: dict[str, Status] = {name: {"name": name, "state": "waiting"} for name in names}
        self.messages: list[str] = []
        self.left = steps
        self._publish, self._every = publish, every
        self._published = self._counted = 0.0
        self._row: Status = {}
        self.publish()

    def start_phase(self, name: str, phase: str, weights_remaining_percent: float = 100.0) -> None:
        """The steps that follow are of this phase of a replicate or network, `replicate_<r>` or `network_<k>`."""
        self._row = self.rows.setdefault(name, {"name": name})
        weights = round(weights_remaining_percent, 1)
        self._row |= {"state": "training", "phase": phase, "weights": weights, "rate": None}

    def start_training(self, step: int, last: int) -> None:
        """Training begins, or goes on, at `step`; it ends at `last`."""
        self._row |= {"step": step, "last": last}
        self._counted = time.monotonic()
        self.publish()

    def step(self, step: int) -> None:
        """`step` batches of this phase have been trained."""
        now = time.monotonic()
        if now - self._published >= self._every or step >= self._row["last"]:
            done = step - self._row["step"]
            self.left = max(self.left - done, 0)
            if done and now > self._counted:
                self._row["rate"] = done / (now - self._counted)
            self._row["step"], self._counted = step, now
            self.publish()

    def report_accuracy(
        self, name: str, phase: str, test_accuracy_percent: float, weights_remaining_percent: float = 100.0
    ) -> None:
        """A phase is done, now or in an earlier launch."""
        results = self.rows[name].setdefault("results", {})
        results[phase] = [round(weights_remaining_percent, 1), test_accuracy_percent]
        self.publish()

    def set_state(self, name: str, state: str) -> None:
        """A replicate or network is "done" or has "failed"."""
        self.rows[name]["state"] = state
        self.publish()

    def log(self, message: str) -> None:
        """A line for the person who started the launch, whichever rank has it."""
        self.messages.append(message)
        self.publish()

    @contextlib.contextmanager
    def warn_on_error(self, words: str) -> Iterator[None]:
        """What fails inside is told in a line, and does not stop training; but a disk that cannot be written does."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            self.log(f"warning: {words} ({type(error).__name__}: {error})")

    def publish(self) -> None:
        self._published = time.monotonic()
        self._publish({"rows": list(self.rows.values()), "messages": self.messages, "left": self.left})

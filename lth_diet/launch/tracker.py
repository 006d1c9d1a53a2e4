"""Calls to MLflow that never stop training."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from lth_diet.training import progress

BACKOFF_FACTOR = 20
"""How many times as long as a failed attempt to reach MLflow took, there is no other."""


class Tracker:
    """Brings MLflow up to date when called; a store that cannot be reached is one warning, not a failure.

    After a failure, calls do nothing for `RESPITE` times as long as it took, so that a server that does not answer
    takes little time from training. `finish` makes up for the last of them.
    """

    def __init__(self, sync: Callable[[], None], runs: Path, progress: progress.Progress):
        self.sync = sync
        self.runs = runs
        self.progress = progress
        self.warned = False
        self.owed = False
        self.not_before = 0.0

    def __call__(self) -> None:
        self.owed = time.monotonic() < self.not_before
        if not self.owed:
            self._sync()

    def finish(self) -> None:
        """At the end: what was put off is put off no more."""
        if self.owed:
            self._sync()

    def _sync(self) -> None:
        self.owed, began = False, time.monotonic()
        try:
            self.sync()
        except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each have their own
            now = time.monotonic()
            self.not_before = now + BACKOFF_FACTOR * (now - began)
            if not self.warned:
                self.progress.log(
                    f"warning: MLflow is not up to date ({type(error).__name__}); training goes on, and "
                    f"`python -m lth_diet sync {shlex.quote(str(self.runs))}` catches up later"
                )
            self.warned = True

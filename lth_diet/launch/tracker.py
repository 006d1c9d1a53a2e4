"""Updates of MLflow that never stop training."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from lth_diet.training.progress import Progress

BACKOFF_FACTOR = 20
"""After a failed update, the next one waits this many times the duration of the failed one."""


class Tracker:
    """Brings MLflow up to date when called. If that fails, it prints one warning with the reason.

    After a failure, calls do nothing for `BACKOFF_FACTOR` times the duration of the failed update, so a server that
    does not respond delays training little. `finish` makes up for calls that were skipped.

    Args:
        sync: Updates MLflow.
        runs: Folder of runs, for the warning.
        progress: Where the warning is logged.
    """

    def __init__(self, sync: Callable[[], None], runs: Path, progress: Progress):
        self.sync = sync
        self.runs = runs
        self.progress = progress
        self._warned = False
        self._skipped = False
        self._not_before = 0.0

    def __call__(self) -> None:
        self._skipped = time.monotonic() < self._not_before
        if not self._skipped:
            self._sync()

    def finish(self) -> None:
        """Update MLflow if the last call was skipped."""
        if self._skipped:
            self._sync()

    def _sync(self) -> None:
        from lth_diet.tracking import mlflow_store  # slow (MLflow): not before the first step, nor part of a failure

        self._skipped, began = False, time.monotonic()
        try:
            self.sync()
        except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each raise their own
            now = time.monotonic()
            self._not_before = now + BACKOFF_FACTOR * (now - began)
            if not self._warned:
                reason = mlflow_store.failure_reason(error)
                self.progress.log(
                    f"warning: MLflow is not up to date: {reason}; training continues; once this is fixed, "
                    f"`python -m lth_diet sync {shlex.quote(str(self.runs))}` sends what is missing"
                )
            self._warned = True

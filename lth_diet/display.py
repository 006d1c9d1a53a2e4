"""What a person sees while a run trains, and at its end."""

import datetime
import time

import pandas as pd

from lth_diet.runs import Replicate, Run


class Progress:
    """Plain lines: replicate, phase, weights remaining, step, steps/s, time left.

    Args:
        steps: Steps that this process has yet to train, over all its replicates and levels.
        every: Seconds between lines.
    """

    def __init__(self, steps: int, every: float = 5.0):
        self.left = steps
        self.every = every
        self.phase = ""
        self._printed = self._counted = time.monotonic()
        self._step = self._last = 0
        self._rate: float | None = None

    def begin(self, replicate: int, phase: str, weights_remaining_percent: float) -> None:
        """The lines that follow are about this phase."""
        weights = f"{weights_remaining_percent:5.1f} % of weights"
        self.phase = f"replicate {replicate}  {phase.replace('_', ' '):<8}  {weights}"

    def step_from(self, step: int, last: int) -> None:
        """Training begins, or goes on, at `step`; it ends at `last`."""
        self._step, self._last = step, last
        self._counted = time.monotonic()

    def step(self, step: int) -> None:
        """`step` batches of this phase have been trained."""
        now = time.monotonic()
        if now - self._printed < self.every and step < self._last:
            return
        if step > self._step and now > self._counted:
            self._rate = (step - self._step) / (now - self._counted)
            self.left -= step - self._step
        self._step, self._counted, self._printed = step, now, now
        left = datetime.timedelta(seconds=round(self.left / self._rate)) if self._rate else "?"
        rate = f"{self._rate:6.1f} steps/s" if self._rate else ""
        say(f"{self.phase}  step {step}/{self._last}  {rate}  ETA {left}")

    def end(self, test_accuracy_percent: float) -> None:
        """The phase is done."""
        say(f"{self.phase}  test accuracy {test_accuracy_percent:.2f} %")


def say(line: str) -> None:
    """One line for the person who started the run, at once."""
    print(line, flush=True)


def steps_left(run: Run, replicate: Replicate) -> int:
    """Steps that a replicate has yet to train, counted from its checkpoints."""
    config = run.config
    plan = [(replicate.pretrain, 0, config.rewind_steps)]
    levels = range(config.prune.levels + 1)
    plan += [(replicate.level(level), config.rewind_steps, config.train.steps) for level in levels]
    left = 0
    for phase, first, last in plan:
        if not phase.done:
            checkpoint = phase.checkpoint()
            left += last - (checkpoint[1] if checkpoint else first)
    return left


def plan(run: Run) -> str:
    """What would run: phases, steps, what exists already."""
    lines = [f"{run.path}: {run.config.model_name}, arm {run.config.arm}, run id {run.config.run_id()}"]
    total = 0
    for replicate in run.replicates():
        left = steps_left(run, replicate)
        total += left
        lines.append(f"replicate {replicate.index}: {left:,} steps to train")
        first, last = run.config.rewind_steps, run.config.train.steps
        lines.append(_planned(replicate.pretrain, 0, first, "100.0"))
        for level in range(run.config.prune.levels + 1):
            weights = f"{100 * (1 - run.config.prune.fraction) ** level:.1f}"
            lines.append(_planned(replicate.level(level), first, last, weights))
    return "\n".join([*lines, f"total: {total:,} steps to train"])


def _planned(phase, first: int, last: int, weights: str) -> str:
    checkpoint = phase.checkpoint()
    state = "done" if phase.done else f"goes on at step {checkpoint[1]}" if checkpoint else "to do"
    return f"  {phase.name.replace('_', ' '):<9} {weights:>5} % of weights  steps {first} to {last}  {state}"


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

"""The plan of an instability analysis, and its table of results."""

import contextlib
import dataclasses
import statistics
from collections.abc import Sequence

from lth_diet.config.instability import LoadedInstability
from lth_diet.errors import UserError
from lth_diet.launch.checks import describe_unused
from lth_diet.runs.instability_directory import InstabilityDirectory, mask_path
from lth_diet.runs.work_left import describe_state, replicate_steps_left


def check_instability(files: Sequence[LoadedInstability]) -> None:
    """Check that no two files are one analysis, and that the masks exist.

    Raises:
        UserError: If two are, or IMP has not found a mask.
    """
    found: dict[str, LoadedInstability] = {}
    for loaded in files:
        run = InstabilityDirectory(loaded)
        if str(run.path) in found:
            steps = sorted({*found[str(run.path)].keys.steps, *loaded.keys.steps})
            raise UserError(
                f"command line: -f {found[str(run.path)].path} and -f {loaded.path} are one analysis, which does not "
                f"depend on pretrain.steps; give one of them and steps=[{','.join(map(str, steps))}]"
            )
        found[str(run.path)] = loaded
        if loaded.keys.level:
            for index in loaded.config.replicates:
                for step in loaded.keys.steps:
                    mask_path(loaded.arm_config, index, step, loaded.keys.level)


def instability_warnings(loaded: LoadedInstability) -> list[str]:
    """Warn of settings on the command line that change nothing in an instability analysis."""
    unused = ["prune.levels"] + ["prune.fraction"] * (loaded.keys.level == 0)
    unused += ["pretrain.steps"] * (loaded.keys.steps != (loaded.arm_config.rewind_step,))
    where = "on the command line"
    keys = [key for key in unused if loaded.where.get(key) == where]
    return [describe_unused([key], where, "on instability analysis") for key in keys]


def plan_instability(run: InstabilityDirectory) -> str:
    """Describe what an analysis would train and measure, and what is done."""
    config, keys = run.config, run.keys
    mask = f"with the masks of level {keys.level}" if keys.level else "dense"
    lines = [
        f"{run.path}: instability analysis, {config.model_name}, arm {config.arm}, {mask}",
        f"{keys.copies} copies from each step, which train as one network",
    ]
    for replicate in run.replicates():
        lines.append(f"replicate {replicate.index}: {replicate_steps_left(run, replicate):,} steps to train")
        if replicate.given_up:
            lines[-1] += f" ({replicate.describe_failure()})"
        for phase, first, last in run.phases_of(replicate):
            name = "copies" if phase.name.startswith("copy_") else "pretrain"
            state = describe_state(phase, first)
            if name == "copies" and phase.done and not replicate.barrier(first).done:
                state = "done, barrier to do"
            lines.append(f"  {name:<9} steps {first} to {last}  {state}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Barriers:
    """Error barriers of all finished replicates at a step, in percentage points.

    Attributes:
        step: Step k.
        test, train: Barrier of the test error and of the training error of each replicate, the mean over its pairs of
            copies.
        error: Mean test error (%) of the copies, with statistics of BatchNorm as at all points of the line.
    """

    step: int
    test: list[float]
    train: list[float]
    error: float


def barriers(run: InstabilityDirectory) -> list[Barriers]:
    """The measured barriers of an analysis, by step; steps without any are left out."""
    found = []
    for step in run.keys.steps:
        results = []
        for replicate in run.replicates():
            with contextlib.suppress(UserError):  # a damaged result, which has been reported
                if replicate.barrier(step).done:
                    results.append(replicate.barrier(step).result())
        if results:
            test, train = ([result[f"{name}_barrier"] for result in results] for name in ("test", "train"))
            ends = [line[end] for result in results for line in result["test_error_percent"] for end in (0, -1)]
            found.append(Barriers(step, test, train, statistics.fmean(ends)))
    return found


def table(run: InstabilityDirectory) -> str:
    """Return a table of an analysis: barriers (mean ± sd over the finished replicates) at each step."""
    measured = barriers(run)
    if not measured:
        return "no barrier is measured yet"
    lines = ["step k  barrier of test error  of training error (points, mean ± sd)  test error    n"]
    for row in measured:
        test, train = _mean_and_sd(row.test), _mean_and_sd(row.train)
        lines.append(f"{row.step:>6}  {test:>21}  {train:>38}  {row.error:>8.2f} %  {len(row.test):>3}")
    return "\n".join(lines)


def _mean_and_sd(values: Sequence[float]) -> str:
    sd = f" ± {statistics.stdev(values):5.2f}" if len(values) > 1 else " " * 8
    return f"{statistics.fmean(values):.2f}{sd}"

"""What each rank does: computes its share of the scores and trains its share of the replicates."""

import contextlib
import errno
import functools
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lth_diet.config.instability import LoadedInstability
from lth_diet.config.schema import Config
from lth_diet.errors import HOW_TO_RESUME, DeviceError, TrainingError, UserError
from lth_diet.files import LockedError
from lth_diet.launch.arms import Task
from lth_diet.launch.processes import ProcessInfo
from lth_diet.launch.tracker import Tracker
from lth_diet.program import DEVICE_FAULT
from lth_diet.runs import work_left
from lth_diet.runs.block import lock_replicates
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.training.progress import Progress

if TYPE_CHECKING:
    from lth_diet.imp import IMP


def compute_scores(
    folder: ScoresDirectory, process: ProcessInfo, progress: Progress, tasks: Sequence[Task] = (), name: str = ""
) -> int:
    """Train this rank's share of the scoring networks and wait for the other ranks' networks.

    Args:
        folder: Where the scores are stored.
        process: This rank.
        progress: Progress of this rank.
        tasks: Replicates of this rank. Those that need the scores fail if the scores fail.
        name: Name of the scores in the output; empty if the launch has no others.

    Returns:
        The exit status: 0; 1 if it failed; DEVICE_FAULT.
    """
    from lth_diet.scoring import Scoring
    from lth_diet.training import device_faults

    blocks = range(len(folder.config.scoring_blocks))
    mine = process.shard(blocks)
    others = [number for number in blocks if number not in mine]
    phases = work_left.scoring_phases(folder)
    steps = work_left.steps_left([phases[k] for block in mine for k in folder.config.scoring_blocks[block]])
    progress.begin([row for task in tasks for row in task.rows], steps)
    progress.arm = name
    track = Tracker(functools.partial(_sync_scores, folder.path), folder.path.parents[1], progress)
    try:
        if name:
            _forget_compiled_networks(folder.config)
        Scoring(folder.config, progress, track, [*mine, *others]).run()
        track.finish()
    except Exception as error:
        error = device_faults.explain(error)
        reason, is_fault = _reason(error), isinstance(error, DeviceError)
        stopped = [task for task in tasks if is_fault or task.needs(folder)]
        progress.fail_unfinished(spare=[row for task in tasks if task not in stopped for row in task.rows])
        for replicate in (each for task in stopped if not is_fault for each in task.replicates):
            replicate.record_failure(f"scores: {reason.splitlines()[0]}")
        _report_failure(progress, name or "scores", process, reason)
        return DEVICE_FAULT if is_fault else 1
    return 0


def train_replicates(tasks: Sequence[Task], process: ProcessInfo, progress: Progress) -> int:
    """Train replicates, or blocks of them, one after another. A failure stops no others, unless ranks train together.

    After a fault of the GPU this process can train no other replicate. Nothing is recorded as failed.

    Args:
        tasks: Replicates of this rank.
        process: This rank.
        progress: Progress of this rank. Of ranks that train together, only rank 0 publishes it.

    Returns:
        The exit status: 0; 1 if a replicate failed; DEVICE_FAULT.
    """
    from lth_diet.training import device_faults

    together = any(task.arm.config.parallelism == "data" for task in tasks)
    is_writer = process.rank == 0 or not together
    progress = progress if is_writer else Progress([], 0)
    left = [task.steps_left() for task in tasks]
    progress.begin([row for task in tasks for row in task.rows], sum(left))
    status, arm = 0, None
    for number, task in enumerate(tasks):
        config = task.arm.config
        progress.left = sum(left[number:])  # without what has failed
        if task.arm is not arm:
            arm = task.arm
            if arm.name:
                _forget_compiled_networks(config)
        progress.arm = arm.name
        track = Tracker(functools.partial(_sync_replicates, task.replicates), arm.run.path.parent, progress)
        for replicate in task.replicates:
            if replicate.given_up:
                progress.log(f"error: {replicate.name}: {replicate.describe_failure()}")
        try:
            with lock_replicates(task.replicates) if is_writer else contextlib.nullcontext():
                experiment(task, progress, track).run()
                track.finish()
            for replicate in task.replicates:
                progress.set_state(replicate.name, "failed" if replicate.given_up else "done")
            status = status or int(any(replicate.given_up for replicate in task.replicates))
            continue
        except LockedError as error:
            reason = str(error)
        except Exception as error:
            error = device_faults.explain(error)
            reason = _reason(error)
            if isinstance(error, DeviceError):
                status = DEVICE_FAULT
            elif is_writer:
                for replicate in task.replicates:
                    replicate.record_failure(reason.splitlines()[0])
                track()
                track.finish()
        status = status or 1
        for replicate in task.replicates:
            progress.set_state(replicate.name, "failed")
        _report_failure(progress, f"{arm.name} {task.name}".lstrip(), process, reason)
        if status == DEVICE_FAULT or together:
            break
    return status


def _sync_scores(folder: Path) -> None:
    from lth_diet.tracking import sync  # slow (MLflow): imported after the first phase

    sync.sync_scores(folder)


def experiment(task: Task, progress: Progress, track: Tracker) -> "IMP":
    """What trains the replicates of a task: `IMP` or `Instability`."""
    if isinstance(task.arm.loaded, LoadedInstability):
        from lth_diet.instability import Instability

        return Instability(task.arm.loaded, task.replicates, progress, track)
    from lth_diet.imp import IMP

    return IMP(task.arm.config, task.replicates, progress, track)


def _sync_replicates(replicates: Sequence[ReplicateDirectory]) -> None:
    from lth_diet.tracking import sync  # slow (MLflow): imported after the first phase

    for replicate in replicates:
        sync.sync_replicate(replicate)


def _forget_compiled_networks(config: Config) -> None:
    """Reset `torch.compile`, which otherwise compiles networks of different shapes for variable shapes."""
    if config.compile:
        import torch

        torch.compiler.reset()


def _reason(error: Exception) -> str:
    """One sentence for an expected error; for any other, its name and message, with the traceback below."""
    if isinstance(error, UserError | TrainingError):
        return str(error)
    if isinstance(error, DeviceError):
        return f"{error}{HOW_TO_RESUME}"
    if isinstance(error, OSError) and error.filename:
        remedy = "there is room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "this is fixed"
        return (
            f"{type(error).__name__}: {error.strerror}: {error.filename}; "
            f"rerun the same command to resume once {remedy}"
        )
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"


def _report_failure(progress: Progress, what: str, process: ProcessInfo, reason: str) -> None:
    progress.log(f"error: {what}: {reason}")
    if process.rank:  # the launcher prints what other ranks wrote if it has to terminate them
        print(f"error: {what}: {reason}", file=sys.stderr, flush=True)

"""What each rank does: computes its share of the scores and trains its share of the replicates."""

import contextlib
import errno
import functools
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lth_diet.errors import HOW_TO_RESUME, DeviceError, TrainingError, UserError
from lth_diet.files import LockedError
from lth_diet.launch.processes import ProcessInfo
from lth_diet.launch.status_board import StatusBoard
from lth_diet.launch.tracker import Tracker
from lth_diet.program import DEVICE_FAULT
from lth_diet.runs import work_left
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.training.progress import Progress


def compute_scores(
    folder: ScoresDirectory, process: ProcessInfo, board: StatusBoard, replicates: Sequence[ReplicateDirectory] = ()
) -> int:
    """Train this rank's share of the scoring networks and wait for the other ranks' networks.

    Args:
        folder: Where the scores are stored.
        process: This rank.
        board: Where progress is published.
        replicates: Replicates of this rank that need the scores. They fail if the scores fail.

    Returns:
        The exit status: 0; 1 if it failed; DEVICE_FAULT.
    """
    from lth_diet.scoring import Scoring
    from lth_diet.training import device_faults

    networks = range(folder.config.scores.networks)
    mine = process.shard(networks)
    others = [number for number in networks if number not in mine]
    steps = work_left.steps_left(work_left.scoring_phases(folder)) * len(mine) // len(networks)
    progress = Progress([replicate.name for replicate in replicates], steps, board.publish)
    track = Tracker(functools.partial(_sync_scores, folder.path), folder.path.parents[1], progress)
    try:
        Scoring(folder.config, progress, track, [*mine, *others]).run()
        track.finish()
    except Exception as error:
        error = device_faults.explain(error)
        reason, is_fault = _reason(error), isinstance(error, DeviceError)
        for name in [name for name, row in progress.rows.items() if row["state"] != "done"]:
            progress.set_state(name, "failed")
        for replicate in replicates if not is_fault else ():
            replicate.record_failure(f"scores: {reason.splitlines()[0]}")
        _report_failure(progress, "scores", process, reason)
        return DEVICE_FAULT if is_fault else 1
    return 0


def train_replicates(
    run: RunDirectory, replicates: list[ReplicateDirectory], process: ProcessInfo, board: StatusBoard
) -> int:
    """Train replicates one after another. A failure does not stop the others, unless ranks train together.

    After a fault of the GPU this process can train no other replicate. Nothing is recorded as failed.

    Args:
        run: The run.
        replicates: Replicates of this rank.
        process: This rank.
        board: Where progress is published.

    Returns:
        The exit status: 0; 1 if a replicate failed; DEVICE_FAULT.
    """
    from lth_diet.imp import IMP
    from lth_diet.training import device_faults

    steps = sum(work_left.steps_left(work_left.phases_of(run, replicate)) for replicate in replicates)
    is_writer = process.rank == 0 or run.config.parallelism == "replicates"
    names = [replicate.name for replicate in replicates]
    progress = Progress(names, steps, board.publish if is_writer else lambda status: None)
    status = 0
    for replicate in replicates:
        track = Tracker(functools.partial(_sync_replicate, replicate), run.path.parent, progress)
        try:
            with replicate.lock() if is_writer else contextlib.nullcontext():
                IMP(run.config, replicate, progress, track).run()
                track.finish()
            progress.set_state(replicate.name, "done")
            continue
        except LockedError as error:
            reason = str(error)
        except Exception as error:
            error = device_faults.explain(error)
            reason = _reason(error)
            if isinstance(error, DeviceError):
                status = DEVICE_FAULT
            elif is_writer:
                replicate.record_failure(reason.splitlines()[0])
                track()
                track.finish()
        status = status or 1
        progress.set_state(replicate.name, "failed")
        _report_failure(progress, f"replicate {replicate.index}", process, reason)
        if status == DEVICE_FAULT or run.config.parallelism == "data":
            break
    return status


def _sync_scores(folder: Path) -> None:
    from lth_diet.tracking import sync  # slow (MLflow): imported after the first phase

    sync.sync_scores(folder)


def _sync_replicate(replicate: ReplicateDirectory) -> None:
    from lth_diet.tracking import sync  # slow (MLflow): imported after the first phase

    sync.sync_replicate(replicate)


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

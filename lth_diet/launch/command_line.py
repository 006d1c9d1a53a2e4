"""From a command line to replicates that train: validates, shards replicates over ranks, shows what happens.

Neither torch nor Composer is imported before the input has been checked, and Composer not before the environment
says what this process is.
"""

import argparse
import contextlib
import errno
import functools
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from lth_diet.config import loading
from lth_diet.config.schema import Config
from lth_diet.data import catalog
from lth_diet.data.label_noise import noisy_labels
from lth_diet.errors import Parser, UserError, print_error
from lth_diet.files import LockedError
from lth_diet.launch import plan, screen
from lth_diet.launch.processes import ProcessInfo
from lth_diet.launch.status_board import StatusBoard
from lth_diet.launch.tracker import Tracker
from lth_diet.runs import remaining
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.run_store import open_run_store
from lth_diet.runs.scores_directory import ScoresDirectory, load_arm_scores, missing_scores
from lth_diet.training.progress import Progress


def recipe_parser(description: str) -> Parser:
    """Of the command line of a recipe: file, overrides, plan."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", required=True, help="configuration, such as yamls/cifar10_all.yaml")
    parser.add_argument("--plan", action="store_true", help="print what would run and what exists already, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as prune.levels=3 replicates=[0,1]")
    return parser


def launch_imp(argv: Sequence[str] | None, description: str, report: Callable[[RunDirectory], None]) -> int:
    """Run IMP for this rank's replicates, after making the scores that the arm needs.

    Args:
        argv: The command line.
        description: Of the recipe, for --help.
        report: Called at the end, on rank 0.

    Returns:
        0; 2 after a sentence if the input is bad; 1 if a replicate failed.
    """
    try:
        process = ProcessInfo.from_environment()
        config, only_plan = _read(argv, description)
        _check_ranks(config, process)
        run = RunDirectory(config, process.world_size)
        scores = missing_scores(run)
        if only_plan:
            print(plan.plan(run, scores))
            return 0
        process.exit_with_launcher()
        _prepare(config)
        run.create()
        if scores:
            scores.create()
    except (UserError, OSError) as error:
        return print_error(error)
    board = _start(config, process)
    replicates = run.replicates() if config.parallelism == "data" else process.shard(run.replicates())
    with _screen(board, run.path.name):
        together, failed = config.parallelism == "data", False
        if not together:
            process.detach()
        if scores:
            with process.as_single_process() if together else contextlib.nullcontext():
                failed = _score(scores, process, board, replicates)
        if together and not failed:
            board.init_process_group()
        failed = failed or _train(run, replicates, process, board)
        if together and failed:
            return 1  # the others wait for this rank in a collective; the launcher ends them
        board.barrier()
    if process.rank == 0:
        _print_results(run)
        report(run)
    return 1 if failed else 0


def launch_scoring(argv: Sequence[str] | None, description: str) -> int:
    """Make the scores of a configuration's data.

    Returns:
        0; 2 after a sentence if the input is bad; 1 if a network failed.
    """
    try:
        process = ProcessInfo.from_environment()
        config, only_plan = _read(argv, description)
        if config.scores.file is not None:
            raise UserError(f"scores.file: {config.scores.file!r} leaves nothing to score; allowed: none")
        if process.world_size > config.scores.networks:
            raise UserError(
                f"command line: {process.world_size} ranks for {config.scores.networks} networks; allowed: composer -n "
                f"{config.scores.networks} or fewer, or more scores.networks"
            )
        folder = ScoresDirectory(config)
        if only_plan:
            print(plan.plan_scores(folder))
            return 0
        process.exit_with_launcher()
        _prepare(config)
        folder.create()
    except (UserError, OSError) as error:
        return print_error(error)
    board = _start(config, process)
    process.detach()
    with _screen(board, f"scores/{folder.path.name}"):
        failed = _score(folder, process, board)
        board.barrier()
    if process.rank == 0 and not failed:
        print(f"\n{folder.path}\n{plan.summary(folder)}", flush=True)
    return 1 if failed else 0


def _read(argv: Sequence[str] | None, description: str) -> tuple[Config, bool]:
    """The configuration, and whether only its plan is asked for."""
    arguments = recipe_parser(description).parse_intermixed_args(argv)
    return loading.load_config(arguments.file, arguments.overrides), arguments.plan


def _check_ranks(config: Config, process: ProcessInfo) -> None:
    if config.parallelism == "data":
        if config.train.batch_size % process.world_size:
            raise UserError(
                f"train.batch_size: {config.train.batch_size} is not allowed with parallelism: data; "
                f"allowed: a multiple of the {process.world_size} ranks"
            )
    elif process.world_size > len(config.replicates):
        raise UserError(
            f"command line: {process.world_size} ranks for {len(config.replicates)} replicates; allowed: composer -n "
            f"{len(config.replicates)} or fewer, more replicates, or parallelism=data"
        )


def _prepare(config: Config) -> None:
    """Decode the data now, if there is no cache yet, and refuse what only data and machine can tell."""
    open_run_store(config.runs).check()
    data = catalog.load(config.dataset.name, config.dataset.root)
    if config.needs_scores and (config.scores.file is not None or ScoresDirectory(config).done):
        labels = noisy_labels(data.train.labels, config.pretrain.label_noise, len(data.class_names), config.seed)
        load_arm_scores(config, labels)
    _check_machine(config)


def _start(config: Config, process: ProcessInfo) -> StatusBoard:
    """What every launch does once its input is known to be good."""
    _silence_libraries()
    os.environ.update({key: str(config.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    board = StatusBoard(process)
    import torch

    torch.set_num_threads(config.threads)
    return board


def _screen(board: StatusBoard, title: str) -> contextlib.AbstractContextManager:
    return screen.Screen(board.read, title) if board.process.rank == 0 else contextlib.nullcontext()


def _check_machine(config: Config) -> None:
    if config.precision == "bf16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("precision: 'bf16' is not allowed without a GPU; allowed: auto, fp32")
    if config.compile and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise UserError(
            "compile: True is not allowed without a C++ compiler; allowed: False, or one in CXX or the PATH"
        )


def _score(
    folder: ScoresDirectory, process: ProcessInfo, board: StatusBoard, replicates: Sequence[ReplicateDirectory] = ()
) -> bool:
    """Train some of the networks and wait for the others; whether it failed, and with it the replicates that wait."""
    from lth_diet.scoring import Scoring
    from lth_diet.tracking import sync

    networks = range(folder.config.scores.networks)
    mine = process.shard(networks)
    share = remaining.scoring_steps_left(folder) * len(mine) // len(networks)
    progress = Progress([replicate.name for replicate in replicates], share, board.publish)
    track = Tracker(lambda: sync.sync_scores(folder.path), folder.path.parents[1], progress)
    others = [number for number in networks if number not in mine]
    try:
        Scoring(folder.config, progress, track, [*mine, *others]).run()
        track.finish()
    except Exception as error:
        reason = _reason(error)
        for name in [name for name, row in progress.rows.items() if row["state"] != "done"]:
            progress.set_state(name, "failed")
        for replicate in replicates:
            replicate.record_failure(f"scores: {reason.splitlines()[0]}")
        _report_failure(progress, "scores", process, reason)
        return True
    return False


def _train(run: RunDirectory, replicates: list[ReplicateDirectory], process: ProcessInfo, board: StatusBoard) -> bool:
    """Train some replicates, one after another; whether any failed."""
    from lth_diet.imp import IMP
    from lth_diet.tracking import sync

    steps = sum(remaining.steps_left(run, replicate) for replicate in replicates)
    reports = process.rank == 0 or run.config.parallelism == "replicates"
    names = [replicate.name for replicate in replicates]
    progress = Progress(names, steps, board.publish if reports else lambda status: None)
    failed = False
    for replicate in replicates:
        track = Tracker(functools.partial(sync.sync_replicate, replicate), run.path.parent, progress)
        try:
            with replicate.lock() if reports else contextlib.nullcontext():
                IMP(run.config, replicate, progress, track).run()
                track.finish()
            progress.set_state(replicate.name, "done")
            continue
        except LockedError as error:
            told = str(error)
        except Exception as error:
            told = _reason(error)
            if reports:
                replicate.record_failure(told.splitlines()[0])
                track()
                track.finish()
        failed = True
        progress.set_state(replicate.name, "failed")
        _report_failure(progress, f"replicate {replicate.index}", process, told)
        if run.config.parallelism == "data":
            break
    return failed


def _reason(error: Exception) -> str:
    """A sentence for what can be expected; else the error's name, and on the lines that follow its traceback."""
    from lth_diet.errors import TrainingError

    if isinstance(error, UserError | TrainingError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        remedy = "there is room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "it is mended"
        return f"{type(error).__name__}: {error.strerror}: {error.filename}; the same command goes on once {remedy}"
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"


def _report_failure(progress: Progress, what: str, process: ProcessInfo, reason: str) -> None:
    progress.log(f"error: {what}: {reason}")
    if process.rank:  # the launcher shows what other ranks print if it has to end them
        print(f"error: {what}: {reason}", file=sys.stderr, flush=True)


def _print_results(run: RunDirectory) -> None:
    print(f"\n{run.path}\n{plan.table(run)}")
    for replicate in run.replicates():
        if replicate.failed:
            print(f"replicate {replicate.index} failed: see {replicate.path / 'failed.json'}")
    from lth_diet.tracking import store

    print(f"compare in MLflow: {store.describe_store()}", flush=True)


def _silence_libraries() -> None:
    """Silence what Composer, PyTorch and MLflow tell their developers; let no request to MLflow hold up training."""
    warnings.filterwarnings("ignore")
    for name in ("composer", "torch", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update({"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"})
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

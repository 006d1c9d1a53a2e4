"""Runs a recipe from its command line: validates the input, starts the ranks' work, shows their progress.

Nothing imports torch or Composer before the input has been validated. Composer reads the environment variables of the
launcher when it is imported, so it is imported only once they are set for this process.
"""

import argparse
import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lth_diet.config import loading
from lth_diet.config.loading import Loaded
from lth_diet.config.schema import Config
from lth_diet.errors import Parser, UserError, print_warnings
from lth_diet.launch import checks, plan, screen
from lth_diet.launch.processes import ProcessInfo, report_invalid_input
from lth_diet.launch.status_board import StatusBoard
from lth_diet.launch.text import describe_devices
from lth_diet.launch.worker import compute_scores, train_replicates
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory, missing_scores
from lth_diet.training import devices


class _Once(argparse.Action):
    """Stores the value of an option that must not be given twice."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: Any = None):
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice; a file can name another one as its base")
        setattr(namespace, self.dest, value)


def recipe_parser(description: str) -> Parser:
    """Return the command-line parser of a recipe: configuration file, --plan and overrides."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-f", "--file", type=Path, action=_Once, required=True, help="configuration, such as yamls/cifar10_all.yaml"
    )
    parser.add_argument("--plan", action="store_true", help="print what would run and what exists already, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as prune.levels=3 replicates=[0,1]")
    return parser


def launch_imp(argv: Sequence[str] | None, description: str, report: Callable[[RunDirectory], None]) -> int:
    """Run IMP for this rank's replicates, after computing the scores that the arm needs.

    Args:
        argv: The command line; None: that of this process.
        description: Description of the recipe, for --help.
        report: Called on rank 0 at the end.

    Returns:
        The exit status: 0; 1 if a replicate failed; 2 if the input is invalid; DEVICE_FAULT.
    """
    try:
        process = ProcessInfo.from_environment()
        loaded, only_plan = _read(argv, description)
        config = loaded.config
        checks.check_imp(config, process)
        run = RunDirectory(config, process.world_size)
        scores = missing_scores(run)
        if only_plan:
            print_warnings(_warnings(loaded, process))
            print(plan.plan(run, scores))
            return 0
        process.exit_with_launcher()
        read_only = run.done and not run.is_writable  # such as an archive: its results are only shown
        if not read_only:
            checks.check_environment(config, process)
        scores = None if read_only else scores
        sentences = _warnings(loaded, process)  # before the new run directory hides that images have changed
        if not read_only and not run.done:
            sentences += _environment_warnings(config, process, run.path, checks.run_phases(run))
        if scores:
            sentences += _environment_warnings(config, process, scores.path, scores.named_networks())
        if not read_only:
            run.create()
        if scores:
            scores.create()
        print_warnings(sentences)
        board = _start(config, process)
    except (UserError, OSError) as error:
        return report_invalid_input(error)
    together, status = config.parallelism == "data", 0
    replicates = run.replicates() if together else process.shard(run.replicates())
    with _screen(board, run.path.name):
        if not together:
            process.detach()
        if scores:
            with process.as_single_process() if together else contextlib.nullcontext():
                status = compute_scores(scores, process, board, replicates)
        if together and not status:
            board.init_process_group()
        if not (status or read_only):
            status = train_replicates(run, replicates, process, board)
        if together and status:
            return status  # the other ranks wait for this one in a collective; the launcher terminates them
        if together:
            board.destroy_process_group()
        board.wait_for_others()
    if process.rank == 0:
        _print_results(run)
        report(run)
    board.barrier()
    return status


def launch_scoring(argv: Sequence[str] | None, description: str) -> int:
    """Compute the EL2N scores of a configuration's data.

    Args:
        argv: The command line; None: that of this process.
        description: Description of the recipe, for --help.

    Returns:
        The exit status: 0; 1 if a network failed; 2 if the input is invalid; DEVICE_FAULT.
    """
    try:
        process = ProcessInfo.from_environment()
        loaded, only_plan = _read(argv, description)
        config = loaded.config
        checks.check_scoring(config, process)
        folder = ScoresDirectory(config)
        if only_plan:
            print_warnings(_warnings(loaded, process, scoring=True))
            print(plan.plan_scores(folder))
            return 0
        process.exit_with_launcher()
        read_only = folder.done and not folder.is_writable
        if not read_only:
            checks.check_environment(config, process)
        sentences = _warnings(loaded, process, scoring=True)
        if not read_only and not folder.done:
            sentences += _environment_warnings(config, process, folder.path, folder.named_networks())
        if not read_only:
            folder.create()
        print_warnings(sentences)
        board = _start(config, process)
    except (UserError, OSError) as error:
        return report_invalid_input(error)
    process.detach()
    with _screen(board, f"scores/{folder.path.name}"):
        status = 0 if read_only else compute_scores(folder, process, board)
        board.wait_for_others()
    if process.rank == 0 and not status:
        print(f"\n{folder.path}\n{plan.summary(folder)}", flush=True)
    board.barrier()
    return status


def _read(argv: Sequence[str] | None, description: str) -> tuple[Loaded, bool]:
    """The configuration, and whether only the plan is requested."""
    arguments = recipe_parser(description).parse_intermixed_args(argv)
    return loading.load(arguments.file, arguments.overrides), arguments.plan


def _warnings(loaded: Loaded, process: ProcessInfo, scoring: bool = False) -> list[str]:
    """Return the warnings of this launch, which rank 0 prints."""
    if process.rank:
        return []
    sentences = checks.warnings(loaded, process.local_world_size, scoring)
    if loaded.config.parallelism == "data" and process.world_size == 1 and not scoring:
        sentences.append("parallelism = data: has no effect with one rank; use composer -n <ranks>")
    return sentences


def _environment_warnings(
    config: Config, process: ProcessInfo, path: Path, phases: Sequence[tuple[str, PhaseDirectory]]
) -> list[str]:
    environment = devices.environment(config)  # also on other ranks: the code as it is now, even if it changes later
    return [] if process.rank else checks.environment_warnings(path, phases, environment)


def _start(config: Config, process: ProcessInfo) -> StatusBoard:
    """Prepare this process for training and connect it to the other ranks; rank 0 prints the devices of all."""
    _silence_libraries()
    os.environ.update({key: str(config.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    board = StatusBoard(process)
    import torch

    torch.set_num_threads(config.threads)
    ranks = [json.loads(text) for text in board.gather(json.dumps(devices.summary(config)))]
    if ranks:
        print(describe_devices(ranks, config.threads), flush=True)
    return board


def _screen(board: StatusBoard, title: str) -> contextlib.AbstractContextManager:
    return screen.Screen(board.read, title) if board.process.rank == 0 else contextlib.nullcontext()


def _print_results(run: RunDirectory) -> None:
    print(f"\n{run.path}\n{plan.table(run)}")
    for replicate in run.replicates():
        if replicate.failed:
            print(f"replicate {replicate.index} failed: see {replicate.path / 'failed.json'}")
    from lth_diet.tracking import mlflow_store

    print(f"compare in MLflow: {mlflow_store.describe_store()}", flush=True)


def _silence_libraries() -> None:
    """Silence messages of libraries, and limit how long a request to MLflow can delay training."""
    warnings.filterwarnings("ignore")
    for name in ("composer", "torch", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update({"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"})
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

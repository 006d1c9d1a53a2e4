"""Runs a recipe from its command line: validates the input, starts the ranks' work, shows their progress.

Nothing imports torch or Composer before the input has been validated. Composer reads the environment variables of the
launcher when it is imported, so it is imported only once they are set for this process.
"""

import argparse
import contextlib
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lth_diet.config import loading
from lth_diet.config.instability import LoadedInstability
from lth_diet.config.loading import Loaded
from lth_diet.config.schema import Config
from lth_diet.config.yaml_files import quote
from lth_diet.errors import HOW_TO_RESUME, DeviceError, Parser, UserError, print_warnings
from lth_diet.launch import checks, instability, plan, results, screen
from lth_diet.launch.arms import Arm, open_arms, scores_of, share_of
from lth_diet.launch.processes import ProcessInfo, report_invalid_input
from lth_diet.launch.status_board import StatusBoard
from lth_diet.launch.text import describe_devices
from lth_diet.launch.worker import compute_scores, train_replicates
from lth_diet.program import DEVICE_FAULT
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.training import devices
from lth_diet.training.progress import Progress


class _Once(argparse.Action):
    """Stores the value of an option that must not be given twice."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: Any = None):
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice; only recipes/imp.py takes several files")
        setattr(namespace, self.dest, value)


def recipe_parser(description: str, several: bool = False) -> Parser:
    """Return the command-line parser of a recipe: configuration file, or several, --plan and overrides."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    action, each = ("append", "; one -f for each arm") if several else (_Once, "")
    parser.add_argument(
        "-f",
        "--file",
        type=Path,
        action=action,
        required=True,
        help=f"configuration, such as yamls/cifar10_all.yaml{each}",
    )
    parser.add_argument("--plan", action="store_true", help="print what would run and what exists already, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as prune.levels=3 replicates=[0,1]")
    return parser


def launch_imp(
    argv: Sequence[str] | None,
    description: str,
    report: Callable[[Sequence[Any], str, int], None],
    load: Callable[[Path, Sequence[str]], Loaded] = loading.load,
) -> int:
    """Run IMP, or instability analysis, for this rank's replicates of all arms, after the scores that the arms need.

    Args:
        argv: The command line; None: that of this process.
        description: Description of the recipe, for --help.
        report: Called on rank 0 at the end, with the runs of all arms, the command without a number of replicates, and
            the number of ranks.
        load: Reads a file with overrides; `load_instability` for instability analysis.

    Returns:
        The exit status: 0; 1 if a replicate failed; 2 if the input is invalid; DEVICE_FAULT.
    """
    try:
        process = ProcessInfo.from_environment()
        files, only_plan = _read(argv, description, several=True, load=load)
        checks.check_imp(files, process)
        instability.check_instability([loaded for loaded in files if isinstance(loaded, LoadedInstability)])
        arms = open_arms(files, process)
        if only_plan:
            print_warnings(_warnings(files, process))
            print(plan.plan_arms(arms, process.world_size))
            return 0
        process.exit_with_launcher()
        to_train = [arm for arm in arms if not arm.read_only]
        scores = scores_of(to_train)
        checks.check_environment([arm.loaded for arm in to_train], process)
        sentences = _warnings(files, process)  # before the new run directories hide that images have changed
        for run in (arm.run for arm in to_train if not arm.run.done):
            sentences += _environment_warnings(run.config, process, run.path, checks.run_phases(run))
        for folder in (folder for folder in scores if not folder.done):
            sentences += _environment_warnings(folder.config, process, folder.path, folder.named_networks())
        for directory in [*(arm.run for arm in to_train), *scores]:
            directory.create()
        print_warnings(sentences)
        board = _start([loaded.config for loaded in files], process)
    except Exception as error:
        return _report_error(error)
    together = files[0].config.parallelism == "data"
    tasks = [task for task in share_of(arms, process) if not task.arm.read_only]
    with _screen(board, arms):
        if not together:
            process.detach()
        progress, status = Progress([], 0, board.publish), 0
        for folder in scores:
            name = f"scores/{folder.path.name}" if len(scores) > 1 else ""
            with process.as_single_process() if together else contextlib.nullcontext():
                failed = compute_scores(folder, process, progress, tasks, name)
            status = max(status, failed)
            if status == DEVICE_FAULT:
                break
            tasks = [task for task in tasks if not (failed and task.needs(folder))]
        if together and tasks and not status:
            board.init_process_group()
        if tasks and status != DEVICE_FAULT:
            status = max(status, train_replicates(tasks, process, progress))
        if together and status:
            return status  # the other ranks wait for this one in a collective; the launcher terminates them
        if together:
            board.destroy_process_group()
        board.wait_for_others()
    if process.rank == 0:
        _print_results(arms)
        report([arm.run for arm in arms], _command(argv, process), process.world_size)
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
        (loaded,), only_plan = _read(argv, description)
        config = loaded.config
        checks.check_scoring(config, process)
        folder = ScoresDirectory(config)
        if only_plan:
            print_warnings(_scoring_warnings(loaded, process))
            print(plan.plan_scores(folder))
            return 0
        process.exit_with_launcher()
        read_only = folder.done and not folder.is_writable
        if not read_only:
            checks.check_environment([loaded], process)
        sentences = _scoring_warnings(loaded, process)
        if not read_only and not folder.done:
            sentences += _environment_warnings(config, process, folder.path, folder.named_networks())
        if not read_only:
            folder.create()
        print_warnings(sentences)
        board = _start([config], process)
    except Exception as error:
        return _report_error(error)
    process.detach()
    with _screen(board, title=f"scores/{folder.path.name}"):
        status = 0 if read_only else compute_scores(folder, process, Progress([], 0, board.publish))
        board.wait_for_others()
    if process.rank == 0 and not status:
        print(f"\n{folder.path}\n{plan.summary(folder)}", flush=True)
    board.barrier()
    return status


def _read(
    argv: Sequence[str] | None,
    description: str,
    several: bool = False,
    load: Callable[[Path, Sequence[str]], Loaded] = loading.load,
) -> tuple[list[Loaded], bool]:
    """The configurations, and whether only the plan is requested."""
    arguments = recipe_parser(description, several).parse_intermixed_args(argv)
    for text in arguments.overrides if several else ():
        if text.endswith((".yaml", ".yml")) and "=" not in text:
            raise UserError(f"command line: {quote(text)} is not an override; write -f before each file")
    paths = arguments.file if several else [arguments.file]
    return _load(paths, arguments.overrides, load), arguments.plan


def _load(
    paths: Sequence[Path], overrides: Sequence[str], load: Callable[[Path, Sequence[str]], Loaded]
) -> list[Loaded]:
    """Load configurations. An error that is not the same for all of them names its file."""
    files, errors = [], {}
    for path in paths:
        try:
            files.append(load(path, overrides))
        except UserError as error:
            errors[path] = error
    if errors:
        path, error = next(iter(errors.items()))
        is_common = len(errors) == len(set(paths)) and len({str(each) for each in errors.values()}) == 1
        raise error if is_common or str(path) in str(error) else UserError(f"{path}: {error}")
    return files


def _report_error(error: Exception) -> int:
    """Report an error raised before training; returns the exit status. Raises an error of this program again."""
    if isinstance(error, UserError | OSError):
        return report_invalid_input(error)
    from lth_diet.training import device_faults  # slow (torch)

    error = device_faults.explain(error)
    if not isinstance(error, DeviceError):
        raise error
    print(f"error: {error}{HOW_TO_RESUME}", file=sys.stderr, flush=True)
    return DEVICE_FAULT


def _scoring_warnings(loaded: Loaded, process: ProcessInfo) -> list[str]:
    """Return the warnings of a launch that computes scores, which rank 0 prints."""
    return [] if process.rank else checks.warnings(loaded, process.local_world_size, scoring=True)


def _warnings(files: Sequence[Loaded], process: ProcessInfo) -> list[str]:
    """Return the warnings of this launch, which rank 0 prints."""
    if process.rank:
        return []
    sentences = checks.launch_warnings(files, process.local_world_size)
    analyses = [loaded for loaded in files if isinstance(loaded, LoadedInstability)]
    sentences += dict.fromkeys(each for loaded in analyses for each in instability.instability_warnings(loaded))
    if files[0].config.parallelism == "data" and process.world_size == 1:
        sentences.append("parallelism = data: has no effect with one rank; use composer -n <ranks>")
    return sentences


def _environment_warnings(
    config: Config, process: ProcessInfo, path: Path, phases: Sequence[tuple[str, PhaseDirectory]]
) -> list[str]:
    environment = devices.environment(config)  # also on other ranks: the code as it is now, even if it changes later
    return [] if process.rank else checks.environment_warnings(path, phases, environment)


def _start(configs: Sequence[Config], process: ProcessInfo) -> StatusBoard:
    """Prepare this process for training and connect it to the other ranks; rank 0 prints the devices of all."""
    _silence_libraries()
    threads = configs[0].threads
    os.environ.update({key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    board = StatusBoard(process)
    import torch

    torch.set_num_threads(threads)
    precision = " and ".join(dict.fromkeys(devices.precision(config.precision) for config in configs))
    mine = devices.summary() | {"precision": precision}
    ranks = [json.loads(text) for text in board.gather(json.dumps(mine))]
    if ranks:
        print(describe_devices(ranks, threads), flush=True)
    return board


def _screen(board: StatusBoard, arms: Sequence[Arm] = (), title: str = "") -> contextlib.AbstractContextManager:
    if board.process.rank:
        return contextlib.nullcontext()
    title = title or (arms[0].run.path.name if len(arms) == 1 else f"{len(arms)} arms")
    return screen.Screen(board.read, title, arms=[arm.name for arm in arms])


def _print_results(arms: Sequence[Arm]) -> None:
    print(f"\n{results.tables(arms)}")
    for arm in arms:
        for replicate in arm.run.replicates():
            if replicate.failed:
                remedy = ", and delete it to train this replicate again" if replicate.given_up else ""
                print(f"replicate {replicate.index} failed: see {replicate.store}/failed.json{remedy}")
    from lth_diet.tracking import mlflow_store

    print(f"compare in MLflow: {mlflow_store.describe_store()}")
    for experiment in dict.fromkeys(read_config(arm.run.path)["experiment"] for arm in arms):
        if link := mlflow_store.comparison_link(experiment):
            print(f"  {experiment}: {link}")
    sys.stdout.flush()


def _command(argv: Sequence[str] | None, process: ProcessInfo) -> str:
    launcher = ["composer", "-n", str(process.world_size)] if process.world_size > 1 else ["python"]
    arguments = sys.argv[1:] if argv is None else argv
    kept = [argument for argument in arguments if not argument.startswith("replicates=")]
    return shlex.join([*launcher, sys.argv[0], *kept])


def _silence_libraries() -> None:
    """Silence messages of libraries, and limit how long a request to MLflow can delay training."""
    warnings.filterwarnings("ignore")
    for name in ("composer", "torch", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update({"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"})
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

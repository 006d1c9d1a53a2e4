"""From a command line to replicates that train: validates, deals replicates to ranks, shows what happens.

Neither torch nor Composer is imported before the input has been checked, and Composer not before the environment
says what this process is.
"""

import argparse
import contextlib
import errno
import functools
import logging
import os
import shlex
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from lth_diet import config as configuration
from lth_diet import datasets, display
from lth_diet.config import Config
from lth_diet.errors import Parser, UserError, tell
from lth_diet.label_noise import noisy_labels
from lth_diet.phases import AnotherProcessError
from lth_diet.ranks import Board, Ranks
from lth_diet.remote import place
from lth_diet.runs import Replicate, Run, ScoreFolder, load_scores, scores_to_make

RESPITE = 20
"""How many times as long as a failed attempt to reach MLflow took, there is no other."""


def parser(description: str) -> Parser:
    """Of the command line of a recipe: file, overrides, plan."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", required=True, help="configuration, such as yamls/cifar10_all.yaml")
    parser.add_argument("--plan", action="store_true", help="print what would run and what exists already, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as prune.levels=3 replicates=[0,1]")
    return parser


def imp(argv: Sequence[str] | None, description: str, report: Callable[[Run], None]) -> int:
    """Run IMP for this rank's replicates, after making the scores that the arm needs.

    Args:
        argv: The command line.
        description: Of the recipe, for --help.
        report: Called at the end, on rank 0.

    Returns:
        0; 2 after a sentence if the input is bad; 1 if a replicate failed.
    """
    try:
        ranks = Ranks.from_environment()
        config, only_plan = _read(argv, description)
        _refuse_what_these_ranks_cannot(config, ranks)
        run = Run(config, ranks.size)
        scores = scores_to_make(run)
        if only_plan:
            print(display.plan(run, scores))
            return 0
        ranks.end_with_launcher()
        _prepare(config)
        run.create()
        if scores:
            scores.create()
    except (UserError, OSError) as error:
        return tell(error)
    board = _begin(config, ranks)
    replicates = run.replicates() if config.parallelism == "data" else ranks.deal(run.replicates())
    with _screen(board, run.path.name):
        together, failed = config.parallelism == "data", False
        if not together:
            ranks.leave()
        if scores:
            with ranks.alone() if together else contextlib.nullcontext():
                failed = _score(scores, ranks, board, replicates)
        if together and not failed:
            board.join()
        failed = failed or _train(run, replicates, ranks, board)
        if together and failed:
            return 1  # the others wait for this rank in a collective; the launcher ends them
        board.wait()
    if ranks.rank == 0:
        _conclude(run)
        report(run)
    return 1 if failed else 0


def score(argv: Sequence[str] | None, description: str) -> int:
    """Make the scores of a configuration's data.

    Returns:
        0; 2 after a sentence if the input is bad; 1 if a network failed.
    """
    try:
        ranks = Ranks.from_environment()
        config, only_plan = _read(argv, description)
        if config.scores.file is not None:
            raise UserError(f"scores.file: {config.scores.file!r} leaves nothing to score; allowed: none")
        if ranks.size > config.scores.networks:
            raise UserError(
                f"command line: {ranks.size} ranks for {config.scores.networks} networks; allowed: composer -n "
                f"{config.scores.networks} or fewer, or more scores.networks"
            )
        folder = ScoreFolder(config)
        if only_plan:
            print(display.plan_scores(folder))
            return 0
        ranks.end_with_launcher()
        _prepare(config)
        folder.create()
    except (UserError, OSError) as error:
        return tell(error)
    board = _begin(config, ranks)
    ranks.leave()
    with _screen(board, f"scores/{folder.path.name}"):
        failed = _score(folder, ranks, board)
        board.wait()
    if ranks.rank == 0 and not failed:
        print(f"\n{folder.path}\n{display.summary(folder)}", flush=True)
    return 1 if failed else 0


def _read(argv: Sequence[str] | None, description: str) -> tuple[Config, bool]:
    """The configuration, and whether only its plan is asked for."""
    arguments = parser(description).parse_intermixed_args(argv)
    return configuration.load(arguments.file, arguments.overrides), arguments.plan


def _refuse_what_these_ranks_cannot(config: Config, ranks: Ranks) -> None:
    if config.parallelism == "data":
        if config.train.batch_size % ranks.size:
            raise UserError(
                f"train.batch_size: {config.train.batch_size} is not allowed with parallelism: data; "
                f"allowed: a multiple of the {ranks.size} ranks"
            )
    elif ranks.size > len(config.replicates):
        raise UserError(
            f"command line: {ranks.size} ranks for {len(config.replicates)} replicates; allowed: composer -n "
            f"{len(config.replicates)} or fewer, more replicates, or parallelism=data"
        )


def _prepare(config: Config) -> None:
    """Decode the data now, if there is no cache yet, and refuse what only data and machine can tell."""
    place(config.runs).check()
    data = datasets.load(config.dataset.name, config.dataset.root)
    if config.needs_scores and (config.scores.file is not None or ScoreFolder(config).done):
        load_scores(config, noisy_labels(config, data.train.labels, len(data.class_names)))
    _refuse_what_this_machine_cannot(config)


def _begin(config: Config, ranks: Ranks) -> Board:
    """What every launch does once its input is known to be good."""
    _be_quiet()
    os.environ.update({key: str(config.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    board = ranks.board()
    import torch

    torch.set_num_threads(config.threads)
    return board


def _screen(board: Board, title: str) -> contextlib.AbstractContextManager:
    return display.Screen(board.read, title) if board.ranks.rank == 0 else contextlib.nullcontext()


def _refuse_what_this_machine_cannot(config: Config) -> None:
    if config.precision == "bf16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("precision: 'bf16' is not allowed without a GPU; allowed: auto, fp32")
    if config.compile and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise UserError(
            "compile: True is not allowed without a C++ compiler; allowed: False, or one in CXX or the PATH"
        )


def _score(folder: ScoreFolder, ranks: Ranks, board: Board, replicates: Sequence[Replicate] = ()) -> bool:
    """Train some of the networks and wait for the others; whether it failed, and with it the replicates that wait."""
    from lth_diet import tracking
    from lth_diet.scoring import Scoring

    networks = range(folder.config.scores.networks)
    mine = ranks.deal(networks)
    share = display.scoring_steps_left(folder) * len(mine) // len(networks)
    progress = display.Progress([replicate.name for replicate in replicates], share, board.post)
    track = Tracker(lambda: tracking.sync_scores(folder.path), folder.path.parents[1], progress)
    others = [number for number in networks if number not in mine]
    try:
        Scoring(folder.config, progress, track, [*mine, *others]).run()
        track.finish()
    except Exception as error:
        reason = _reason(error)
        for name in [name for name, row in progress.rows.items() if row["state"] != "done"]:
            progress.end(name, "failed")
        for replicate in replicates:
            replicate.fail(f"scores: {reason.splitlines()[0]}")
        _tell(progress, "scores", ranks, reason)
        return True
    return False


def _train(run: Run, replicates: list[Replicate], ranks: Ranks, board: Board) -> bool:
    """Train some replicates, one after another; whether any failed."""
    from lth_diet import tracking
    from lth_diet.imp import IMP

    steps = sum(display.steps_left(run, replicate) for replicate in replicates)
    reports = ranks.rank == 0 or run.config.parallelism == "replicates"
    names = [replicate.name for replicate in replicates]
    progress = display.Progress(names, steps, board.post if reports else lambda notice: None)
    failed = False
    for replicate in replicates:
        track = Tracker(functools.partial(tracking.sync, replicate), run.path.parent, progress)
        try:
            with replicate.held() if reports else contextlib.nullcontext():
                IMP(run.config, replicate, progress, track).run()
                track.finish()
            progress.end(replicate.name, "done")
            continue
        except AnotherProcessError as error:
            told = str(error)
        except Exception as error:
            told = _reason(error)
            if reports:
                replicate.fail(told.splitlines()[0])
                track()
                track.finish()
        failed = True
        progress.end(replicate.name, "failed")
        _tell(progress, f"replicate {replicate.index}", ranks, told)
        if run.config.parallelism == "data":
            break
    return failed


def _reason(error: Exception) -> str:
    """A sentence for what can be expected; else the error's name, and on the lines that follow its traceback."""
    from lth_diet.training import TrainingError

    if isinstance(error, UserError | TrainingError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        remedy = "there is room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "it is mended"
        return f"{type(error).__name__}: {error.strerror}: {error.filename}; the same command goes on once {remedy}"
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"


def _tell(progress: display.Progress, what: str, ranks: Ranks, reason: str) -> None:
    progress.say(f"error: {what}: {reason}")
    if ranks.rank:  # the launcher shows what other ranks print if it has to end them
        print(f"error: {what}: {reason}", file=sys.stderr, flush=True)


class Tracker:
    """Brings MLflow up to date when called; a store that cannot be reached is one warning, not a failure.

    After a failure, calls do nothing for `RESPITE` times as long as it took, so that a server that does not answer
    takes little time from training. `finish` makes up for the last of them.
    """

    def __init__(self, sync: Callable[[], None], runs: Path, progress: display.Progress):
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
            self.not_before = now + RESPITE * (now - began)
            if not self.warned:
                self.progress.say(
                    f"warning: MLflow is not up to date ({type(error).__name__}); training goes on, and "
                    f"`python -m lth_diet.tracking sync {shlex.quote(str(self.runs))}` catches up later"
                )
            self.warned = True


def _conclude(run: Run) -> None:
    print(f"\n{run.path}\n{display.table(run)}")
    for replicate in run.replicates():
        if replicate.failed:
            print(f"replicate {replicate.index} failed: see {replicate.path / 'failed.json'}")
    from lth_diet import tracking

    print(f"compare in MLflow: {tracking.how_to_look()}", flush=True)


def _be_quiet() -> None:
    """Silence what Composer, PyTorch and MLflow tell their developers; let no request to MLflow hold up training."""
    warnings.filterwarnings("ignore")
    for name in ("composer", "torch", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update({"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"})
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

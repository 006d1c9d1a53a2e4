"""From a command line to replicates that train: validates, deals replicates to ranks, shows what happens.

Neither torch nor Composer is imported before the input has been checked, and Composer not before the environment
says what this process is.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from lth_diet import config as configuration
from lth_diet import datasets, display
from lth_diet.config import Config
from lth_diet.errors import UserError
from lth_diet.ranks import Board, Ranks
from lth_diet.runs import AnotherProcessError, Replicate, Run

_PR_SET_PDEATHSIG = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see --help")


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The command line of a recipe: file, overrides, plan."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", required=True, help="configuration, such as yamls/cifar10_all.yaml")
    parser.add_argument("--plan", action="store_true", help="print what would run and what exists already, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as prune.levels=3 replicates=[0,1]")
    return parser.parse_intermixed_args(argv)


def imp(argv: Sequence[str] | None, description: str) -> int:
    """Run IMP for this rank's replicates.

    Returns:
        0; 2 after a sentence if the input is bad; 1 if a replicate failed.
    """
    ranks = Ranks.from_environment()
    try:
        arguments = parse(argv, description)
        config = configuration.load(arguments.file, arguments.overrides)
        _refuse_what_cannot_run(config, ranks)
        run = Run(config, ranks.size)
        if arguments.plan:
            print(display.plan(run))
            return 0
        datasets.load(config.dataset.name, config.dataset.root)  # decodes now, if there is no cache yet
        _refuse_what_this_machine_cannot(config)
        run.create()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _be_quiet()
    if ranks.size > 1:
        _end_with_the_launcher()
    os.environ.update({key: str(config.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    board = ranks.board()
    replicates = run.replicates()
    if config.parallelism == "data":
        board.join()
    else:
        ranks.leave()
        replicates = ranks.deal(replicates)
    is_first = ranks.rank == 0
    with display.Screen(board.read, run.path.name) if is_first else contextlib.nullcontext():
        failed = _train(run, replicates, ranks, board)
        if failed and config.parallelism == "data":
            return 1  # the others wait for this rank in a collective; the launcher ends them
        board.wait()
    if is_first:
        _conclude(run)
    return 1 if failed else 0


def _refuse_what_cannot_run(config: Config, ranks: Ranks) -> None:
    if config.arm in ("easy", "hard"):
        raise UserError(f"arm: {config.arm!r} needs EL2N scores, which are not built yet; allowed: init, all, random")
    if config.label_noise:
        raise UserError(f"pretrain.label_noise: {config.label_noise} is not built yet; allowed: 0")
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


def _refuse_what_this_machine_cannot(config: Config) -> None:
    if config.precision == "bf16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("precision: 'bf16' is not allowed without a GPU; allowed: auto, fp32")


def _end_with_the_launcher() -> None:
    """Ranks that outlive a killed launcher would hold their replicates against the next launch (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _train(run: Run, replicates: list[Replicate], ranks: Ranks, board: Board) -> bool:
    """Train some replicates, one after another; whether any failed."""
    import torch

    torch.set_num_threads(run.config.threads)
    from lth_diet.imp import IMP
    from lth_diet.training import TrainingError

    steps = sum(display.steps_left(run, replicate) for replicate in replicates)
    reports = ranks.rank == 0 or run.config.parallelism == "replicates"
    progress = display.Progress(
        [replicate.index for replicate in replicates], steps, board.post if reports else lambda notice: None
    )
    failed = False
    for replicate in replicates:
        track = Tracker(replicate, progress)
        try:
            with replicate.held() if reports else contextlib.nullcontext():
                IMP(run.config, replicate, progress, track).run()
            progress.end(replicate.index, "done")
            continue
        except AnotherProcessError as error:
            told = str(error)
        except Exception as error:
            expected = isinstance(error, UserError | TrainingError)
            reason = str(error) if expected else f"{type(error).__name__}: {error}"
            told = reason if expected else f"{reason}\n{traceback.format_exc()}"
            if reports:
                replicate.fail(reason)
                track()
        failed = True
        progress.end(replicate.index, "failed")
        progress.say(f"error: replicate {replicate.index}: {told}")
        if ranks.rank:  # the launcher shows what other ranks print if it has to end them
            print(f"error: replicate {replicate.index}: {told}", file=sys.stderr, flush=True)
        if run.config.parallelism == "data":
            break
    return failed


class Tracker:
    """Brings MLflow up to date when called; a store that cannot be reached is one warning, not a failure."""

    def __init__(self, replicate: Replicate, progress: display.Progress):
        self.replicate = replicate
        self.progress = progress
        self.warned = False

    def __call__(self) -> None:
        from lth_diet import tracking

        try:
            tracking.sync(self.replicate)
        except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each have their own
            if not self.warned:
                self.progress.say(
                    f"warning: MLflow is not up to date ({type(error).__name__}); training goes on, and "
                    f"`python -m lth_diet.tracking sync {self.replicate.path.parent.parent}` catches up later"
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
    for name in ("composer", "torch", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update({"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"})
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

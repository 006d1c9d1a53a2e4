"""From a command line to replicates that train: validates, deals them to ranks, makes each rank a world of its own.

Neither torch nor Composer is imported before the input has been checked, and Composer not before the environment
says what this process is.
"""

import argparse
import dataclasses
import datetime
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from lth_diet import config as configuration
from lth_diet import datasets, display
from lth_diet.config import Config
from lth_diet.errors import UserError
from lth_diet.runs import Replicate, Run

_FOREVER = datetime.timedelta(days=365)


@dataclasses.dataclass(frozen=True)
class World:
    """What the launcher's environment says of this process."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> "World":
        number = {key: int(os.environ.get(key, default)) for key, default in _VARIABLES.items()}
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        return cls(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], address, number["MASTER_PORT"])

    def deal(self, replicates: Sequence[Replicate]) -> list[Replicate]:
        """This rank's share."""
        return list(replicates[self.rank :: self.size])

    def leave(self) -> None:
        """Make this process a world of one, with one device, before Composer is imported."""
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[self.local_rank % len(devices)]
        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
        os.environ.update(one)
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(key, None)

    def meeting(self) -> "Meeting":
        """Where the ranks meet when they are done."""
        return Meeting(self)


_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}


class Meeting:
    """Lets ranks that share nothing else wait for each other: the launcher ends all when one fails."""

    def __init__(self, world: World):
        self.world = world
        if world.size > 1:
            from torch.distributed import TCPStore

            self.store = TCPStore(
                world.address, world.port, world.size, world.rank == 0, timeout=_FOREVER, wait_for_workers=False
            )

    def wait(self) -> None:
        """Return when every rank is here; rank 0, which holds the register, goes last."""
        if self.world.size == 1:
            return
        self.store.set(f"here_{self.world.rank}", "")
        self.store.wait([f"here_{rank}" for rank in range(self.world.size)], _FOREVER)
        if self.world.rank:
            self.store.set(f"gone_{self.world.rank}", "")
        else:
            self.store.wait([f"gone_{rank}" for rank in range(1, self.world.size)], _FOREVER)


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
    world = World.from_environment()
    try:
        arguments = parse(argv, description)
        config = configuration.load(arguments.file, arguments.overrides)
        _refuse_what_cannot_run(config, world)
        run = Run(config)
        if arguments.plan:
            print(display.plan(run))
            return 0
        datasets.load(config.dataset.name, config.dataset.root)  # decodes now, if there is no cache yet
        run.create()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _be_quiet()
    os.environ.update({key: str(config.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    meeting = world.meeting()
    world.leave()
    replicates = world.deal(run.replicates())
    failed = _train(run, replicates)
    meeting.wait()
    if world.rank == 0:
        _conclude(run)
    return 1 if failed else 0


def _refuse_what_cannot_run(config: Config, world: World) -> None:
    if config.arm in ("easy", "hard"):
        raise UserError(f"arm: {config.arm!r} needs EL2N scores, which are not built yet; allowed: init, all, random")
    if config.label_noise:
        raise UserError(f"pretrain.label_noise: {config.label_noise} is not built yet; allowed: 0")
    if world.size > len(config.replicates):
        raise UserError(
            f"command line: {world.size} ranks for {len(config.replicates)} replicates; allowed: composer -n "
            f"{len(config.replicates)} or fewer, or more replicates"
        )


def _train(run: Run, replicates: list[Replicate]) -> bool:
    """Train some replicates, one after another; whether any failed."""
    import torch

    torch.set_num_threads(run.config.threads)
    from lth_diet.imp import IMP
    from lth_diet.training import TrainingError

    progress = display.Progress(sum(display.steps_left(run, replicate) for replicate in replicates))
    failed = False
    for replicate in replicates:
        replicate.begin()
        try:
            IMP(run.config, replicate, progress, Tracker(replicate)).run()
        except (UserError, TrainingError) as error:
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        else:
            continue
        failed = True
        replicate.fail(reason)
        print(f"error: replicate {replicate.index}: {reason}", file=sys.stderr, flush=True)
    return failed


class Tracker:
    """Brings MLflow up to date when called; a store that cannot be reached is one warning, not a failure."""

    def __init__(self, replicate: Replicate):
        self.replicate = replicate
        self.warned = False

    def __call__(self) -> None:
        from lth_diet import tracking

        try:
            tracking.sync(self.replicate)
        except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each have their own
            if not self.warned:
                print(f"warning: MLflow is not up to date ({type(error).__name__}); training goes on", file=sys.stderr)
            self.warned = True


def _conclude(run: Run) -> None:
    display.say(f"\n{run.path}\n{display.table(run)}")
    for replicate in run.replicates():
        path = replicate.path / "failed.json"
        if path.exists():
            display.say(f"replicate {replicate.index} failed: see {path}")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    display.say("compare in MLflow: " + ("at MLFLOW_TRACKING_URI" if uri else "make ui"))


def _be_quiet() -> None:
    """Silence what Composer, PyTorch and MLflow tell their developers."""
    warnings.filterwarnings("ignore")
    for name in ("composer", "torch", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update({"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"})

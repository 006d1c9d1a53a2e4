"""The arms of a launch, one per configuration file, and the blocks of replicates that its ranks train."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lth_diet.config.instability import LoadedInstability
from lth_diet.config.loading import Loaded
from lth_diet.config.schema import Config
from lth_diet.errors import printable
from lth_diet.launch.processes import ProcessInfo
from lth_diet.runs import work_left
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory, missing_scores


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a launch.

    Attributes:
        name: Name in the output; empty if the launch has no other arm.
        loaded: Its configuration.
        run: Directory of its results.
        scores: Directory of the scores that it needs, if it computes or checks them.
        read_only: Whether it is finished and cannot be written, such as an archive: its results are only shown.
    """

    name: str
    loaded: Loaded
    run: RunDirectory | InstabilityDirectory
    scores: ScoresDirectory | None
    read_only: bool

    @property
    def config(self) -> Config:
        return self.loaded.config


@dataclasses.dataclass(frozen=True)
class Task:
    """One block of an arm, which one rank trains, or all ranks together with `parallelism: data`.

    Attributes:
        arm: The arm.
        replicates: The R replicates of the block, in the order of their indices; one with `stack: 1`.
    """

    arm: Arm
    replicates: tuple[ReplicateDirectory, ...]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Names of arm and replicate of each replicate, as `Progress` needs them."""
        return [(self.arm.name, replicate.name) for replicate in self.replicates]

    @property
    def name(self) -> str:
        """Such as `replicate 2` or `replicates 0 to 3`, for messages."""
        first, last = self.replicates[0].index, self.replicates[-1].index
        return f"replicate {first}" if first == last else f"replicates {first} to {last}"

    def needs(self, folder: ScoresDirectory) -> bool:
        """Whether the replicates need these scores."""
        return self.arm.scores is not None and self.arm.scores.path == folder.path

    def steps_left(self) -> int:
        """Number of steps left to train, over all replicates of the block."""
        return sum(work_left.replicate_steps_left(self.arm.run, each) for each in self.replicates)


def open_arms(files: Sequence[Loaded], process: ProcessInfo) -> list[Arm]:
    """Open the run directories of some configurations. Nothing is written.

    Raises:
        UserError: If a directory was created with a different configuration.
    """
    arms = []
    for name, loaded in zip(_names([loaded.path for loaded in files]), files, strict=True):
        if isinstance(loaded, LoadedInstability):
            run = InstabilityDirectory(loaded)
            scores = missing_scores(run) if run.config.rewind_step else None
        else:
            run = RunDirectory(loaded.config, process.world_size)
            scores = missing_scores(run)
        arms.append(Arm(name, loaded, run, scores, run.done and not run.is_writable))
    return arms


def scores_of(arms: Sequence[Arm]) -> list[ScoresDirectory]:
    """Scores that some arms need, each once."""
    return list({arm.scores.path: arm.scores for arm in reversed(arms) if arm.scores is not None}.values())[::-1]


def tasks_of(arms: Sequence[Arm]) -> list[Task]:
    """All blocks of some arms, in order."""
    return [Task(arm, tuple(map(arm.run.replicate, block))) for arm in arms for block in arm.config.blocks]


def share_of(arms: Sequence[Arm], process: ProcessInfo) -> list[Task]:
    """The blocks that a rank trains, in order: all of them if the ranks train each block together.

    Other ranks are dealt the lowest replicates of all arms first. So they share what is left where a launch is repeated
    with more replicates, and agree on it without knowing what is finished.
    """
    tasks = tasks_of(arms)
    if arms[0].config.parallelism == "data":
        return tasks
    mine = process.shard(sorted(tasks, key=lambda task: task.replicates[0].index))
    return [task for task in tasks if task in mine]


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of files in the output: without folder and suffix if they then differ; empty for a single file."""
    if len(paths) == 1:
        return [""]
    stems = collections.Counter(path.stem for path in paths)
    return [printable(path.stem if stems[path.stem] == 1 else str(path)) for path in paths]

"""A sweep file to distinct runs, and to a plan of what of them is left (neither torch nor Ray is imported here).

base: ../base/cifar10.yaml        what every run starts from, relative to this file
arms:                             each entry is a grid: a list of values is an axis
  - {arm: all, pretrain.steps: [200ba, 400ba]}
  - {arm: [easy, hard], pretrain.steps: 200ba, pretrain.subset.size: [512, 1024]}
prune: {levels: 20}               any key of a configuration: for every run
gpus_per_run: 0.5                 keys of the sweep: see `Settings`
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lth_diet.config import loading, yaml_files
from lth_diet.config.fields import Count, Index, Positive, Real, Section, Text
from lth_diet.config.identity import flatten
from lth_diet.config.loading import nested, parse_override
from lth_diet.config.schema import Config
from lth_diet.config.yaml_files import quote
from lth_diet.errors import UserError
from lth_diet.runs import remaining
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory, missing_scores

MAX_RUNS = 10_000


def _entries(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) and entry for entry in value):
        raise ValueError("allowed: a list of grids, such as [{arm: [easy, hard], pretrain.steps: 200ba}]")
    for key, values in (pair for entry in value for pair in entry.items()):
        if not isinstance(key, str) or not all(key.split(".")):
            raise ValueError(f"allowed: keys such as pretrain.steps, not {quote(key)}")
        if values == [] or isinstance(values, dict):
            raise ValueError(f"allowed: a value or a list of values for {key}, and keys with dots for sections")
    if sum(math.prod(map(len, _axes(entry).values())) for entry in value) > MAX_RUNS:
        raise ValueError(f"allowed: up to {MAX_RUNS:,} runs")
    return tuple(value)


def _axes(entry: dict[str, Any]) -> dict[str, list]:
    return {key: values if isinstance(values, list) else [values] for key, values in entry.items()}


class Settings(Section):
    """The keys of a sweep; all others are of its runs' configurations."""

    base: Text
    arms: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_entries)]
    gpus_per_run: Annotated[Real, Field(ge=0, le=1)] | None = None
    """A fraction lets several small networks share a GPU; None: 1, or 0 where there is no GPU."""
    cpus_per_run: Annotated[Count, Field(le=1024)] | None = None
    """None: `threads`."""
    gpus: Index | None = None
    """GPUs to use of this machine, and to plan for; None: all there are."""
    cpus: Count | None = None
    """As `gpus`, of CPU cores."""
    retries: Annotated[Index, Field(le=100)] = 3
    """How often a process that crashed, or whose node was lost, is started again."""
    step_ms: Positive | None = None
    """Milliseconds a step, for the plan; None: as measured in the runs."""

    def slots(self, cpus: float, gpus: float, cpus_each: float, gpus_each: float) -> int:
        """How many processes a machine has room for."""
        by_cpu = int(cpus / cpus_each)
        return min(by_cpu, int(1 / gpus_each + 1e-9) * int(gpus)) if gpus_each else by_cpu


_ON_COMMAND_LINE = Settings.model_fields.keys() - {"base", "arms"}


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One point of a grid.

    Args:
        run: Its directory and configuration.
        arguments: That tell a recipe of it.
    """

    run: RunDirectory
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained to its end by a process, or by one after another: a replicate, or the networks that score.

    Args:
        name: Its path below the folder of runs.
        recipe: That trains it: imp or score.
        arguments: Of the recipe.
        folder: Where it goes.
        phases: Each with its first and last step.
        config: Of its run.
        needs: Name of the scores that have to be there before.
    """

    name: str
    recipe: str
    arguments: tuple[str, ...]
    folder: ReplicateDirectory | ScoresDirectory
    phases: tuple[tuple[PhaseDirectory, int, int], ...]
    config: Config
    needs: str | None = None

    @property
    def done(self) -> bool:
        if isinstance(self.folder, ScoresDirectory):
            return self.folder.done
        return all(phase.done for phase, _, _ in self.phases)

    @property
    def state(self) -> str:
        """finished, half done or missing."""
        if self.done:
            return "finished"
        return "half done" if any(phase.done or phase.checkpoint() for phase, _, _ in self.phases) else "missing"

    @functools.cached_property
    def trainings_left(self) -> int:
        return 0 if self.done else sum(first < last and not phase.done for phase, first, last in self.phases)

    @functools.cached_property
    def steps_left(self) -> int:
        """Counted from checkpoints, when first asked."""
        left = (last - remaining.resume_step(phase, first) for phase, first, last in self.phases if not phase.done)
        return 0 if self.done else sum(left)


class Sweep:
    """The runs of a file; the same run is there once, however many grids have it.

    Args:
        path: Of the file.
        overrides: `key=value`, of the sweep or of every run's configuration.

    Raises:
        UserError: With a sentence naming file, key, value and what is allowed.
    """

    def __init__(self, path: Path, overrides: Iterable[str] = ()):
        self.path = path
        tree = yaml_files.read_tree(path)
        mine = {key: tree.pop(key) for key in [*tree] if key in Settings.model_fields}
        origin = dict.fromkeys(mine, str(path))
        theirs = []
        for text in overrides:
            key, value = parse_override(text)
            if key in _ON_COMMAND_LINE:
                mine[key], origin[key] = value, "command line"
            else:
                theirs.append(text)
        _check_keys(tree, path)
        self.settings = loading.validate(Settings, mine, origin, str(path))
        self.base = path.parent / self.settings.base
        yaml_files.read_tree(self.base, f", the base of {path},")
        found = {}
        for number, entry in enumerate(self.settings.arms, 1):
            axes = _axes(entry)
            for values in itertools.product(*axes.values()):
                point = self._point(tree, f"entry {number} of arms", dict(zip(axes, values, strict=True)), theirs)
                found.setdefault((point.run.path, point.run.config.replicates), point)
        self.points: tuple[SweepRun, ...] = tuple(found.values())

    def _point(self, common: dict[str, Any], entry: str, values: dict[str, Any], overrides: list[str]) -> SweepRun:
        layers = [(str(self.path), common)]
        layers += [(f"{self.path}: {entry}", nested(key, value)) for key, value in values.items()]
        config = loading.load_config(self.base, overrides, layers)
        if config.parallelism != "replicates":
            raise UserError(
                f"{self.path}: parallelism: {config.parallelism!r} is not allowed in a sweep; allowed: replicates"
            )
        told = [f"{key}={_as_override(value)}" for key, value in (flatten(common) | values).items()]
        return SweepRun(RunDirectory(config), ("-f", str(self.base), *told, *overrides))

    @property
    def runs(self) -> dict[str, RunDirectory]:
        """Name to run."""
        return {point.run.path.name: point.run for point in self.points}

    def work(self) -> list[Work]:
        """All of it, the scores first."""
        scores, replicates = {}, {}
        for point in self.points:
            run, folder = point.run, missing_scores(point.run)
            needs = f"scores/{folder.path.name}" if folder else None
            if folder:
                phases = tuple((network, 0, run.config.scores.steps) for network in folder.networks())
                scores.setdefault(needs, Work(needs, "score", point.arguments, folder, phases, run.config))
            for replicate in run.replicates():
                name = f"{run.path.name}/{replicate.name}"
                arguments = (*point.arguments, f"replicates=[{replicate.index}]")
                phases = tuple(remaining.phases_of(run, replicate))
                replicates.setdefault(name, Work(name, "imp", arguments, replicate, phases, run.config, needs))
        return [*scores.values(), *replicates.values()]


def _check_keys(tree: Mapping[str, Any], path: Path) -> None:
    known = [*Settings.model_fields, *Config.model_fields]
    for key in tree:
        if key not in known and "." not in key:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{path}: {key} is not a known key; {hint}")


def _as_override(value: Any) -> str:
    """As it stands in an override."""
    if isinstance(value, str):
        with contextlib.suppress(UserError):
            if yaml_files.parse(value, "") == value:
                return value
    return json.dumps(value)

"""Reads a sweep file: expands its grids to distinct runs, and lists the work of each. Imports neither torch nor Ray.

base: ../base/cifar10.yaml        what every run starts from, relative to this file
arms:                             each entry is a grid, each list an axis; duplicates run once
  - {arm: all, pretrain.steps: [200ba, 400ba]}
  - {arm: [easy, hard], pretrain.steps: 200ba, pretrain.subset.size: [512, 1024]}
prune: {levels: 20}               any configuration key, for every run
gpus_per_run: 0.5                 keys of the sweep: see `Settings`
"""

import collections
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

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from lth_diet.config import loading, yaml_files
from lth_diet.config.fields import Count, Index, PathText, Positive, Real, Section
from lth_diet.config.loading import Loaded, nested, parse_override
from lth_diet.config.run_ids import OUTSIDE_IDENTITY, flatten
from lth_diet.config.schema import Config
from lth_diet.config.yaml_files import quote
from lth_diet.errors import UserError
from lth_diet.launch import checks
from lth_diet.runs import work_left
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory, missing_scores

MAX_RUNS = 10_000


def _entries(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) and entry for entry in value):
        raise ValueError("must be a list of grids, such as [{arm: [easy, hard], pretrain.steps: 200ba}]")
    for key, values in (pair for entry in value for pair in entry.items()):
        if not isinstance(key, str) or not all(key.split(".")):
            raise ValueError(f"must have keys such as pretrain.steps, not {quote(key)}")
        if values == [] or isinstance(values, dict):
            raise ValueError(f"must have a value or a list of values for {key}; write sections as keys with dots")
    if sum(math.prod(map(len, _axes(entry).values())) for entry in value) > MAX_RUNS:
        raise ValueError(f"must expand to at most {MAX_RUNS:,} runs")
    return tuple(value)


def _axes(entry: dict[str, Any]) -> dict[str, list]:
    return {key: values if isinstance(values, list) else [values] for key, values in entry.items()}


class Settings(Section):
    """Keys of the sweep. All other keys of a sweep file belong to the configurations of its runs."""

    base: PathText
    """Configuration that every run starts from, relative to the sweep file."""
    arms: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_entries)]
    """List of grids. In a grid, a list of values is an axis."""
    gpus_per_run: Annotated[Real, Field(ge=0, le=1)] | None = None
    """GPUs per process; a fraction lets small networks share one. Default: 1, or 0 on a machine without GPU."""
    cpus_per_run: Annotated[Count, Field(le=1024)] | None = None
    """CPU cores per process. Default: `threads`."""
    gpus: Index | None = None
    """GPUs of this machine to use and to plan for. Default: all."""
    cpus: Count | None = None
    """CPU cores of this machine to use and to plan for. Default: all."""
    retries: Annotated[Index, Field(le=100)] = 3
    """How many times a process is restarted after it crashed or its node was lost."""
    step_ms: Positive | None = None
    """Milliseconds per step, for the plan. Default: measured in finished trainings."""

    @field_validator("cpus")
    @classmethod
    def _one_process_fits(cls, cpus: int | None, info: ValidationInfo) -> int | None:
        each = info.data.get("cpus_per_run")
        if cpus is not None and each is not None and cpus < each:
            raise ValueError(f"must be at least cpus_per_run = {each}")
        return cpus

    def slots(self, cpus: float, gpus: float, cpus_each: float, gpus_each: float) -> int:
        """Return the number of processes that fit on a machine.

        Args:
            cpus: CPU cores of the machine.
            gpus: GPUs of the machine.
            cpus_each: CPU cores per process.
            gpus_each: GPUs per process, 0 to 1.
        """
        by_cpu = int(cpus / cpus_each)
        return min(by_cpu, int(1 / gpus_each + 1e-9) * int(gpus)) if gpus_each else by_cpu


_ON_COMMAND_LINE = Settings.model_fields.keys() - {"base", "arms"}


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One point of a grid.

    Args:
        run: Its directory and configuration.
        arguments: Command-line arguments of a recipe that select it.
        loaded: Its configuration, and where the values are from.
    """

    run: RunDirectory
    arguments: tuple[str, ...]
    loaded: Loaded


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a work: a replicate, or a scores artifact.

    Args:
        folder: Where it is stored.
        phases: Each phase with its first and last step.
    """

    folder: ReplicateDirectory | ScoresDirectory
    phases: work_left.Phases

    @property
    def done(self) -> bool:
        if isinstance(self.folder, ScoresDirectory):
            return self.folder.done
        return all(phase.done for phase, _, _ in self.phases)

    @property
    def can_train(self) -> bool:
        """Whether something is left to train, and it has not given up."""
        return not self.done and not (isinstance(self.folder, ReplicateDirectory) and self.folder.given_up)

    @property
    def state(self) -> str:
        """One of finished, partial, missing."""
        if self.done:
            return "finished"
        return "partial" if any(phase.done or phase.checkpoint() for phase, _, _ in self.phases) else "missing"


@dataclasses.dataclass(frozen=True)
class Work:
    """A unit of work: one block of replicates, or the networks of one scores artifact. A process trains it to its end.

    Args:
        name: Its path below the folder of runs; that of a block has its first and last replicate.
        recipe: The recipe that trains it: imp or score.
        arguments: Command-line arguments of the recipe.
        parts: Its parts, which are counted: the replicates of the block, or the scores.
        config: Configuration of its run.
        needs: Name of the work that computes the scores that it needs.
    """

    name: str
    recipe: str
    arguments: tuple[str, ...]
    parts: tuple["Part", ...]
    config: Config
    needs: str | None = None

    @property
    def done(self) -> bool:
        return all(part.done for part in self.parts)

    @property
    def failed(self) -> bool:
        """Whether the last attempt of a replicate stopped with an error."""
        return any(part.folder.failed for part in self.parts if isinstance(part.folder, ReplicateDirectory))

    @property
    def phases(self) -> work_left.Phases:
        """The phases of all parts."""
        return [phase for part in self.parts for phase in part.phases]

    @property
    def networks_left(self) -> int:
        """Number of stacks of scoring networks that are not finished."""
        return sum(any(not self.phases[k][0].done for k in block) for block in self.config.scoring_blocks)

    def refresh_index(self) -> None:
        """Download what an object store has of the results, see `RunStore.refresh_index`."""
        for part in self.parts:
            part.folder.store.refresh_index()

    @functools.cached_property
    def trainings_left(self) -> int:
        left = [phase for part in self.parts if part.can_train for phase in part.phases]
        return sum(first < last and not phase.done for phase, first, last in left)

    @functools.cached_property
    def steps_left(self) -> int:
        """Steps left from the last checkpoints, counted on first access."""
        return sum(work_left.steps_left(part.phases) for part in self.parts if part.can_train)


class Sweep:
    """The distinct runs of a sweep file.

    Args:
        path: Path of the file.
        overrides: `key=value` strings, for the sweep or for the configuration of every run.

    Raises:
        UserError: If the file, an override or the configuration of a run is invalid.
    """

    def __init__(self, path: Path, overrides: Iterable[str] = ()):
        self.path = path
        tree = yaml_files.read_tree(path)
        mine = {key: tree.pop(key) for key in [*tree] if key in Settings.model_fields}
        origin = dict.fromkeys(mine, str(path))
        theirs, overrides = [], list(overrides)
        self._repeated = loading.repeated_keys(parse_override(text)[0] for text in overrides)
        for text in overrides:
            key, value = parse_override(text)
            if key in _ON_COMMAND_LINE:
                mine[key], origin[key] = value, "command line"
            else:
                theirs.append(text)
        if "arms" not in mine and "arm" in tree:
            raise UserError(f"{path} has arm and no arms: it is the configuration of one arm, of recipes/imp.py")
        _check_keys(tree, path)
        self.settings = loading.validate(Settings, mine, origin, str(path))
        self.base = path.parent / self.settings.base
        yaml_files.read_tree(self.base, f", the base of {path},")
        replaced = set(flatten(tree))
        self._merged: list[str] = []
        self._every_point: list[SweepRun] = []
        found: dict[str, tuple[str, SweepRun]] = {}
        for number, entry in enumerate(self.settings.arms, 1):
            where, axes = f"entry {number} of arms in {path}", _axes(entry)
            replaced &= axes.keys()
            points = {}
            for index in itertools.product(*(range(len(axis)) for axis in axes.values())):
                values = {key: axis[at] for at, (key, axis) in zip(index, axes.items(), strict=True)}
                points[index] = self._point(tree, where, values, theirs)
            _check_axes(axes, points, where)
            self._merged += _merged_points(points, where)
            self._every_point += points.values()
            for point in points.values():
                _check_same_settings(*found.setdefault(point.run.path.name, (where, point)), where, point)
        self._replaced = sorted(replaced)
        distinct: dict[Any, SweepRun] = {}
        for point in self._every_point:
            distinct.setdefault((point.run.path, point.run.config.replicates), point)
        self.points: tuple[SweepRun, ...] = tuple(distinct.values())

    def _point(self, common: dict[str, Any], where: str, values: dict[str, Any], overrides: list[str]) -> SweepRun:
        layers = [(str(self.path), common)]
        layers += [(where, nested(key, value)) for key, value in values.items()]
        loaded = loading.load(self.base, overrides, layers)
        config = loaded.config
        if config.parallelism != "replicates":
            raise UserError(
                f"parallelism = {config.parallelism!r} in a run of {self.path}: must be replicates in a sweep"
            )
        settings = flatten(common) | values
        for text in overrides:
            settings.pop(parse_override(text)[0], None)
        texts = [f"{key}={_as_override(value)}" for key, value in settings.items()]
        return SweepRun(RunDirectory(config), ("-f", str(self.base), *texts, *overrides), loaded)

    def warnings(self, cpus: int | None = None) -> list[str]:
        """List what is valid but hardly meant, one sentence each.

        Args:
            cpus: CPU cores of the machine that trains; None: unknown.
        """
        sentences = [*checks.repeated_warnings(self._repeated), *self._merged]
        used, unused = set(), set()
        for loaded in (point.loaded for point in self._every_point):
            theirs = checks.unused_settings(loaded)
            unused |= {(key, where) for key, (where, _) in theirs.items()}
            used |= {(key, loaded.where[key]) for key in loaded.written - theirs.keys()}
            sentences += checks.schedule_warnings(loaded) + checks.data_warnings(loaded.config)
        if self._replaced:
            sentences.append(checks.describe_unused(self._replaced, f"in {self.path}", "on any run: every arm sets it"))
        for key, where in sorted(unused - used):
            sentences.append(checks.describe_unused([key], where, "on any of its runs"))
        threads, each = max(point.run.config.threads for point in self.points), self.settings.cpus_per_run
        if each is not None and each < threads:
            sentences.append(f"cpus_per_run = {each} is less than threads = {threads}: processes share CPUs")
        return sentences + ([] if cpus is None else checks.thread_warnings(threads, 1, cpus))

    @property
    def runs(self) -> dict[str, RunDirectory]:
        """Runs by name."""
        return {point.run.path.name: point.run for point in self.points}

    def work(self) -> list[Work]:
        """List all work, scores first."""
        scores, blocks = {}, {}
        for point in self.points:
            run, folder = point.run, missing_scores(point.run)
            needs = f"scores/{folder.path.name}" if folder else None
            if folder:
                parts = (Part(folder, work_left.scoring_phases(folder)),)
                scores.setdefault(needs, Work(needs, "score", point.arguments, parts, run.config))
            for block in run.config.blocks:
                name = f"{run.path.name}/{run.replicate(block[0]).name}{f'-{block[-1]}' * (len(block) > 1)}"
                settings = [text for text in point.arguments if not text.startswith("replicates=")]
                arguments = (*settings, f"replicates=[{','.join(map(str, block))}]")
                replicates = map(run.replicate, block)
                parts = tuple(Part(replicate, run.phases_of(replicate)) for replicate in replicates)
                blocks.setdefault(name, Work(name, "imp", arguments, parts, run.config, needs))
        return [*scores.values(), *blocks.values()]


Points = Mapping[tuple[int, ...], SweepRun]
"""Points of a grid by the index of each value on its axis."""


def _check_axes(axes: dict[str, list], points: Points, where: str) -> None:
    """Check that the values of every axis are different runs.

    Raises:
        UserError: If the runs are the same whatever the value.
    """
    for at, (key, values) in enumerate(axes.items()):
        names: dict[tuple[int, ...], set[str]] = {}
        for index, point in points.items():
            names.setdefault((*index[:at], *index[at + 1 :]), set()).add(point.run.path.name)
        overridden = any(point.loaded.where.get(key) == "on the command line" for point in points.values())
        if len(values) > 1 and not overridden and all(len(group) == 1 for group in names.values()):
            unused = [checks.unused_settings(point.loaded).get(key) for point in points.values()]
            reason = unused[0][1] if all(unused) else ""
            reason = f"the key has no effect {reason}" if reason else "the values are equal"
            if key in OUTSIDE_IDENTITY:
                reason = "the key is not part of the run id"
            hint = ", as in replicates: [[0, 2]] for a list of indices" if key == "replicates" else ""
            raise UserError(
                f"{key} = {quote(values)} in {where}: {reason}, so all values would be one run; give one value{hint}"
            )


def _merged_points(points: Points, where: str) -> list[str]:
    """Say which points of a grid are one run."""
    groups: dict[str, int] = collections.Counter(point.run.path.name for point in points.values())
    return [f"{count} points of {where} are one run, {name}" for name, count in groups.items() if count > 1]


def _check_same_settings(there: str, first: SweepRun, where: str, point: SweepRun) -> None:
    """Check that a run of two entries has the same settings in both, but for its replicates.

    Raises:
        UserError: If one of them would be ignored.
    """
    ours, theirs = (flatten(each.run.config.model_dump()) for each in (point, first))
    for key in OUTSIDE_IDENTITY - {"replicates"}:
        if ours[key] != theirs[key]:
            other = f"{quote(theirs[key])} in {there}"
            raise UserError(
                f"{key} = {quote(ours[key])} in {where}: the same run, {point.run.path.name}, has {other}; give it once"
            )


def _check_keys(tree: Mapping[str, Any], path: Path) -> None:
    known = [*Settings.model_fields, *Config.model_fields]
    for key in tree:
        if key not in known and "." not in key:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
            raise UserError(f"{key} in {path} is not a known key; {hint}")


def _as_override(value: Any) -> str:
    """Format a value as it is written in an override."""
    if isinstance(value, str):
        with contextlib.suppress(UserError):
            if yaml_files.parse(value, "") == value:
                return value
    return json.dumps(value)

"""Integrity checks: compares every finished file with its checksum."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lth_diet.errors import UserError
from lth_diet.files import read_json
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.find import find_directories
from lth_diet.runs.instability_directory import InstabilityReplicate, open_replicate
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.scores import artifact

_DAMAGED = "damaged or missing; "


def verify(runs: Path) -> Iterator[tuple[Path, str]]:
    """Check every finished file of the runs and scores in a folder.

    Args:
        runs: A folder of runs, or a single run directory or scores directory.

    Yields:
        Each file that is damaged, missing or of another phase, and a sentence that says so and how to repair it.

    Raises:
        UserError: If there are no runs.
    """
    directories, scored = find_directories(runs)
    for folder in [*directories, *scored]:
        try:
            read_config(folder)
        except UserError:
            yield (
                folder / "config.json",
                f"{_DAMAGED}restore it, or rerun the training command with runs=<another folder>",
            )
    for folder in directories:
        for path in sorted(folder.glob("replicate_*")):
            yield from _verify_replicate(path)
    for folder in scored:
        yield from _verify_scores(folder)


def _verify_replicate(path: Path) -> Iterator[tuple[Path, str]]:
    if _is_damaged(path / "pretrain/subset.json"):
        yield path / "pretrain/subset.json", f"{_DAMAGED}recreate it with python -m analysis.examples"
    replicate = open_replicate(path)
    phases = replicate.phases()
    if not isinstance(replicate, InstabilityReplicate):
        last = max((number for number, _ in replicate.levels()), default=-1)
        phases = [replicate.pretrain, *map(replicate.level, range(last + 1))]  # also those that were deleted
    foreign: dict[Path, str] = {}
    with contextlib.suppress(UserError):  # a damaged result is reported below
        foreign = {phase.path: name for phase, name in replicate.foreign_phases()}
    for number, phase in enumerate(phases):
        if isinstance(replicate, InstabilityReplicate):
            later, is_lost = ", ".join(map(str, replicate.computed_from(phase))), False
        else:
            later = ", ".join(str(following.path) for following in phases[number:] if following.path.exists())
            is_lost = not phase.done and any(following.done for following in phases[number:])
        remedy = f"delete {later}, then rerun the training command to recompute them"
        if is_lost:
            yield phase.path / "result.json", _DAMAGED + remedy
        if phase.path in foreign:
            name = foreign[phase.path]
            yield phase.path / "result.json", f"the result of {name}; put the right one back, or {remedy}"
        yield from _verify_phase(phase, remedy)


def _verify_phase(phase: PhaseDirectory, remedy: str) -> Iterator[tuple[Path, str]]:
    for file in phase.damaged() if phase.done else ():
        repairable = file.name == "curve.jsonl" and phase.repaired_curve() is not None
        rerun = "rerun the training command to remove rows of a suspended process"
        yield file, _DAMAGED + (rerun if repairable else remedy)


def _verify_scores(path: Path) -> Iterator[tuple[Path, str]]:
    manifest = path / "manifest.json"
    rerun = f"delete {manifest}, then rerun the training command to recompute the scores from their networks"
    for phase in (PhaseDirectory(network) for network in sorted(path.glob("network_*"))):
        remedy = f"delete {phase.path} and {manifest}, then rerun the training command to recompute them"
        yield from _verify_phase(phase, remedy)
    if _is_damaged(path / "examples/summary.json"):
        yield path / "examples/summary.json", f"{_DAMAGED}rerun the training command to recreate it"
    if manifest.exists():
        try:
            artifact.read_manifest(path / "scores.safetensors")
        except UserError:
            yield manifest if _is_damaged(manifest) else path / "scores.safetensors", _DAMAGED + rerun


def _is_damaged(path: Path) -> bool:
    """Whether a JSON file exists but fails its checksum."""
    try:
        if path.exists():
            read_json(path)
    except UserError:
        return True
    return False

"""Checks every finished file against its checksum."""

from collections.abc import Iterator
from pathlib import Path

from lth_diet.errors import UserError
from lth_diet.files import read_json
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.find import find_directories
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.scores import artifact


def _damaged(path: Path) -> bool:
    """Whether a JSON file is there and not what was written."""
    try:
        if path.exists():
            read_json(path)
    except UserError:
        return True
    return False


def verify(runs: Path) -> Iterator[tuple[Path, str]]:
    """Check what is finished below a folder.

    Yields:
        Each damaged or missing file, and what has to be done about it.
    """
    directories, scored = find_directories(runs)
    for folder in [*directories, *scored]:
        try:
            read_config(folder)
        except UserError:
            yield folder / "config.json", "run the same command with runs=<another folder>, or restore it"
    for folder in directories:
        for path in sorted(folder.glob("replicate_*")):
            if _damaged(path / "pretrain/subset.json"):
                yield path / "pretrain/subset.json", "python -m analysis.examples writes its like"
            phases = ReplicateDirectory(path).phases()
            for number, phase in enumerate(phases):
                for file in phase.damaged() if phase.done else ():
                    later = ", ".join(str(following.path) for following in phases[number:])
                    yield file, f"delete {later}, and the same command computes them again"
    for folder in scored:
        for phase in (PhaseDirectory(path) for path in sorted(folder.glob("network_*"))):
            for file in phase.damaged() if phase.done else ():
                yield (
                    file,
                    f"delete {phase.path} and {folder / 'manifest.json'}, and the same command computes it again",
                )
        if _damaged(folder / "examples/summary.json"):
            yield folder / "examples/summary.json", "the same command writes it again"
        if (folder / "manifest.json").exists():
            try:
                artifact.read_manifest(folder / "scores.safetensors")
            except UserError:
                name = "manifest.json" if _damaged(folder / "manifest.json") else "scores.safetensors"
                yield folder / name, f"delete {folder / 'manifest.json'}, and the same command makes it of its networks"

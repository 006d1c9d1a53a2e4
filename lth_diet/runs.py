"""The run directory, which is the truth: where results lie, how they are written, what is done.

runs/<dataset>_<arm>-<run id>/
    config.json                     what the run is
    replicate_<r>/
        pretrain/                   weights.safetensors: the rewind point, unmasked
        level_<L>/                  mask.safetensors: the mask that level L trains with (level 0: all true)
            weights.safetensors     parameters and buffers at the end of the level
            curve.jsonl             step, timestamp (ms), metrics
            result.json             written last, with the sha256 of the files above: the done marker
            checkpoint.json         while the phase runs: which Composer checkpoint to resume from
        failed.json                 why the last attempt stopped
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lth_diet import __version__
from lth_diet.config import DEFAULTS, Config
from lth_diet.errors import UserError


class AnotherProcessError(UserError):
    """Another process trains this replicate."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that it has its old content or the new one, whenever the process is killed."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    with open(part, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    """Of what trains: packages, and the commit of this repository where it is one."""
    found = {"python": platform.python_version(), "lth_diet": __version__}
    found |= {name: metadata.version(package) for name, package in (("torch", "torch"), ("composer", "mosaicml"))}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = os.environ.get("LTH_DIET_COMMIT", "")  # an image has no repository
    with contextlib.suppress(OSError):
        commit = commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return found | ({"git_commit": commit} if commit else {})


class Phase:
    """The directory of one Composer training: `pretrain` or `level_<L>`.

    Args:
        path: May not exist yet.
    """

    FILES = ("mask.safetensors", "weights.safetensors", "curve.jsonl")

    def __init__(self, path: Path):
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def done(self) -> bool:
        return (self.path / "result.json").exists()

    def result(self) -> dict[str, Any]:
        """The measurements of a finished phase."""
        return json.loads((self.path / "result.json").read_text())

    def write(self, name: str, content: bytes) -> None:
        """Write one of the phase's files, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the phase as done and forget its checkpoint."""
        files = {name: _sha256(self.path / name) for name in self.FILES if (self.path / name).exists()}
        result = {**result, "versions": _versions(), "sha256": files}
        write_atomically(self.path / "result.json", json.dumps(result, indent=2))
        self._keep_only_checkpoint(None)

    def verified(self, name: str) -> Path:
        """Path of a file of a finished phase.

        Raises:
            UserError: If it is missing or its content is not what was written.
        """
        path = self.path / name
        if not path.exists() or _sha256(path) != self.result()["sha256"][name]:
            raise UserError(f"{path}: missing or damaged; delete {self.path} and what follows it to compute it again")
        return path

    def checkpoint(self) -> tuple[Path, int] | None:
        """Composer's newest whole checkpoint and its step, or None."""
        try:
            about = json.loads((self.path / "checkpoint.json").read_text())
            path = self.path / about["file"]
            return (path, about["step"]) if _sha256(path) == about["sha256"] else None
        except (OSError, ValueError, KeyError):
            return None

    def checkpoint_path(self, step: int) -> Path:
        """Where to write the checkpoint of a step, before `commit_checkpoint`."""
        return self.path / f"checkpoint-{step}.pt"

    def commit_checkpoint(self, step: int) -> None:
        """Resume from this step from now on."""
        path = self.checkpoint_path(step)
        about = {"file": path.name, "step": step, "sha256": _sha256(path)}
        write_atomically(self.path / "checkpoint.json", json.dumps(about))
        self._keep_only_checkpoint(path)

    def _keep_only_checkpoint(self, keep: Path | None) -> None:
        if keep is None:
            (self.path / "checkpoint.json").unlink(missing_ok=True)
        for path in self.path.glob("checkpoint-*.pt"):
            if path != keep:
                path.unlink()

    def curve(self, until: int | None = None) -> list[dict[str, float]]:
        """Rows of the training curve, up to and with step `until`."""
        path = self.path / "curve.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                break
            if until is None or row["step"] <= until:
                rows.append(row)
        return rows

    def cut_curve(self, until: int) -> None:
        """Drop the rows after step `until`: they will be measured again."""
        rows = self.curve(until)
        self.write("curve.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


class Replicate:
    """The directory of one replicate: one seed of one arm, all its levels."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def index(self) -> int:
        return int(self.path.name.removeprefix("replicate_"))

    @property
    def pretrain(self) -> Phase:
        return Phase(self.path / "pretrain")

    def level(self, number: int) -> Phase:
        return Phase(self.path / f"level_{number}")

    def levels(self) -> Iterator[tuple[int, Phase]]:
        """The levels that have been begun, in order."""
        numbers = sorted(int(path.name.removeprefix("level_")) for path in self.path.glob("level_*"))
        return ((number, self.level(number)) for number in numbers)

    @property
    def about(self) -> dict[str, Any]:
        """The run's config.json."""
        return json.loads((self.path.parent / "config.json").read_text())

    def finished(self, levels: int) -> bool:
        """Whether levels 0 to `levels` are done."""
        return all(self.level(number).done for number in range(levels + 1))

    def fail(self, reason: str) -> None:
        """Leave word of why this attempt stopped."""
        write_atomically(self.path / "failed.json", json.dumps({"reason": reason}))

    @property
    def failed(self) -> bool:
        """Whether the last attempt stopped before its end."""
        return (self.path / "failed.json").exists()

    @contextlib.contextmanager
    def held(self, patience: float = 10.0) -> Iterator[None]:
        """Keep other processes out; the system lets go when this one dies, however it dies.

        Args:
            patience: Seconds to wait for one that is about to end.

        Raises:
            AnotherProcessError: If another process trains this replicate.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=patience):
                (self.path / "failed.json").unlink(missing_ok=True)
                yield
        except Timeout:
            raise AnotherProcessError(
                f"{self.path} is being trained by another process; wait for it, or end it"
            ) from None


class Run:
    """The directory of one arm: `runs/<dataset>_<arm>-<run id>`; nothing is written until `create`.

    Args:
        config: The arm.
        ranks: How many train a replicate together, with `parallelism: data`.

    Raises:
        UserError: If the directory is there but another configuration made it.
    """

    def __init__(self, config: Config, ranks: int = 1):
        self.config = config
        self.path = Path(config.runs) / config.run_name
        self._about = {
            "run_id": config.run_id(),
            "identity": config.identity(),
            "dataset": config.dataset.name,
            "model": config.model_name,
            "arm": config.arm,
            "subset_size": config.subset_size,
            "rewind_steps": config.rewind_steps,
            "label_noise": config.label_noise,
            "seed": config.seed,
            "train_steps": config.train.steps,
            "experiment": config.experiment or config.dataset.name,
            "ranks": ranks if config.parallelism == "data" else 1,
        }
        self._check()

    def _check(self) -> None:
        path = self.path / "config.json"
        # listed first: another rank may be creating the directory, and writes config.json before anything else
        names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if not path.exists():
            if any(not name.startswith(".") for name in names):
                raise UserError(f"{self.path}: not a run directory (it has no config.json); allowed: an empty place")
            return
        try:
            about = json.loads(path.read_text())
            there, ranks = about["identity"], about.get("ranks", 1)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not the config.json of a run; move it away or choose other runs=...") from None
        # a field that did not exist when the run was made had its default
        there, mine = (json.loads(json.dumps(DEFAULTS | identity)) for identity in (there, self._about["identity"]))
        for key in sorted({*there, *mine}):
            if there.get(key) != mine.get(key):
                raise UserError(
                    f"{self.path} was made by another configuration: {key}: {there.get(key)!r} there, "
                    f"{mine.get(key)!r} here; move it away or choose other runs=..."
                )
        if ranks != self._about["ranks"]:  # BatchNorm saw other batches
            raise UserError(
                f"{self.path} was made by {ranks} ranks with parallelism: data, and these are {self._about['ranks']}; "
                f"allowed: composer -n {ranks}, or other runs=..."
            )

    def create(self) -> None:
        """Make the directory and say in it what it is."""
        path = self.path / "config.json"
        planned = json.loads(path.read_text())["planned_levels"] if path.exists() else 0
        about = {**self._about, "planned_levels": max(planned, self.config.prune.levels)}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(about, indent=2))
        except OSError as error:
            raise UserError(
                f"runs: {self.config.runs!r} cannot be written ({error.strerror}); allowed: a folder that can"
            ) from None

    def replicate(self, index: int) -> Replicate:
        return Replicate(self.path / f"replicate_{index}")

    def replicates(self) -> list[Replicate]:
        """Those that the configuration asks for."""
        return [self.replicate(index) for index in self.config.replicates]

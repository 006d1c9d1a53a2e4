"""The directory of a phase, which is one Composer training: `pretrain`, `level_<L>` or `network_<k>`.

<phase>/
    curve.jsonl             training curve: step, timestamp (ms), metrics
    <results>               weights.safetensors, mask.safetensors, el2n.safetensors, subset.safetensors
    result.json             written last, with the sha256 of the files above: marks the phase as finished
    checkpoint.json         while the phase trains: which Composer checkpoint to resume from
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lth_diet import __version__
from lth_diet.errors import UserError
from lth_diet.files import read_json, sha256, write_atomically, write_json

_REAL = float | int
_MEASURED = {"test_accuracy_percent": _REAL, "timestamp": int}
_RESULTS = {
    "level": {"level": int, "weights_remaining_percent": _REAL, **_MEASURED},
    "network": {"network": int, **_MEASURED},
}
"""Types of what result.json has to hold, by kind of phase; pre-training measures nothing where it has no steps."""


@functools.cache
def versions() -> dict[str, str]:
    """Of what trains: packages, and the commit of this repository where it is one."""
    found = {"python": platform.python_version(), "lth_diet": __version__}
    found |= {name: metadata.version(package) for name, package in (("torch", "torch"), ("composer", "mosaicml"))}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = os.environ.get("LTH_DIET_COMMIT", "")  # an image has no repository
    with contextlib.suppress(OSError):
        commit = commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return found | ({"git_commit": commit} if commit else {})


class PhaseDirectory:
    """The directory of one Composer training: `pretrain`, `level_<L>` or `network_<k>`.

    Args:
        path: May not exist yet.
        upload: Called when something is there that lasts, for other nodes.
    """

    def __init__(self, path: Path, upload: Callable[[], None] = lambda: None):
        self.path = path
        self.upload = upload

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def done(self) -> bool:
        return (self.path / "result.json").exists()

    def result(self) -> dict[str, Any]:
        """The measurements of a finished phase.

        Raises:
            UserError: If the file is damaged, or a measurement is missing or of a wrong type.
        """
        types = {"sha256": dict, "versions": dict | None, **_RESULTS.get(self.name.partition("_")[0], {})}
        try:
            return read_json(self.path / "result.json", types)
        except UserError as error:
            raise UserError(f"{error}; {self._how_to_recompute()}") from None

    def write(self, name: str, content: bytes) -> None:
        """Write one of the phase's files, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the phase as done and forget its checkpoint."""
        made = [path for path in self.path.iterdir() if path.suffix in (".safetensors", ".jsonl")]
        files = {path.name: sha256(path) for path in sorted(made)}
        result = {**result, "versions": versions(), "sha256": files}
        write_json(self.path / "result.json", result)
        self._keep_only_checkpoint(None)
        self.upload()

    def verified(self, name: str) -> Path:
        """Path of a file of a finished phase.

        Raises:
            UserError: If it is missing or its content is not what was written.
        """
        path = self.path / name
        if not path.is_file() or sha256(path) != self.result()["sha256"].get(name):
            raise UserError(f"{path}: missing or damaged; {self._how_to_recompute()}")
        return path

    def damaged(self) -> list[Path]:
        """The files of a finished phase that are missing or not what was written."""
        try:
            files = self.result()["sha256"]
        except UserError:
            return [self.path / "result.json"]
        paths = {self.path / name: expected for name, expected in files.items()}
        return [path for path, expected in paths.items() if not path.is_file() or sha256(path) != expected]

    def _how_to_recompute(self) -> str:
        return f"delete {self.path} and what follows it to compute it again"

    def checkpoint(self) -> tuple[Path, int] | None:
        """Composer's newest whole checkpoint, with the curve that leads to it, and its step; or None."""
        try:
            types = {"file": str, "step": int, "sha256": str, "curve_sha256": str | None}
            about = read_json(self.path / "checkpoint.json", types)
            path, step = self.checkpoint_path(about["step"]), about["step"]
            whole = (path.name, sha256(path)) == (about["file"], about["sha256"])
            return (path, step) if whole and about.get("curve_sha256") in (None, self._curve_sha256(step)) else None
        except (OSError, UserError):
            return None

    def checkpoint_path(self, step: int) -> Path:
        """Where to write the checkpoint of a step, before `commit_checkpoint`."""
        return self.path / f"checkpoint-{step}.pt"

    def commit_checkpoint(self, step: int) -> None:
        """Resume from this step from now on."""
        path = self.checkpoint_path(step)
        about = {"file": path.name, "step": step, "sha256": sha256(path), "curve_sha256": self._curve_sha256(step)}
        write_json(self.path / "checkpoint.json", about)
        self._keep_only_checkpoint(path)

    def remove_stale_checkpoints(self) -> None:
        """Remove the checkpoint of a phase that is done: a process killed as it finished leaves one."""
        if self.done:
            self._keep_only_checkpoint(None)

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
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
                if until is None or row["step"] <= until:
                    rows.append(row)
            except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
                break
        return rows

    def _curve_sha256(self, until: int) -> str:
        return hashlib.sha256(json.dumps(self.curve(until)).encode()).hexdigest()

    def truncate_curve(self, until: int) -> None:
        """Drop the rows after step `until`: they will be measured again."""
        rows = self.curve(until)
        self.write("curve.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

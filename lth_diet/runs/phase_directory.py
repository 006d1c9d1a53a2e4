"""The directory of a phase, which is one training with Composer, such as `pretrain`, `level_<L>` or `network_<k>`.

<phase>/
    curve.jsonl             training curve: step, timestamp (ms), metrics
    <results>               weights.safetensors, mask.safetensors, el2n.safetensors, subset.safetensors
    result.json             measurements; written last, with the sha256 of the files above: marks the phase as done
    checkpoint.json         during training: the Composer checkpoint to resume from, or a pointer to the directory of
                            another replicate that trains in the same stack and stores the checkpoint of all
    checkpoint-<step>.pt    during training: that checkpoint
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lth_diet.errors import UserError
from lth_diet.files import open_atomically, read_json, remove, sha256, write_atomically, write_json
from lth_diet.runs.environment import Environment, environment_of, versions

_MEASUREMENT_TYPES = {"test_accuracy_percent": float | int, "timestamp": int}
_RESULT_TYPES = {
    "level": {"level": int, "weights_remaining_percent": float | int, **_MEASUREMENT_TYPES},
    "network": {"network": int, **_MEASUREMENT_TYPES},
    "copy": _MEASUREMENT_TYPES,
    "barrier": {"step": int, "test_barrier": float | int, "train_barrier": float | int, "timestamp": int},
}
"""Required types in result.json, by kind of phase; pre-training of zero steps has no measurements."""


class PhaseDirectory:
    """The directory of one phase.

    Args:
        path: The directory, which may not exist yet.
        upload: Called after a phase is finished and by callers after a checkpoint, to share them with other nodes.
    """

    def __init__(self, path: Path, upload: Callable[[], None] = lambda: None):
        self.path = path
        self.upload = upload

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def done(self) -> bool:
        return (self.path / "result.json").exists()

    def result(self) -> dict[str, Any]:
        """Read the measurements of a finished phase.

        Raises:
            UserError: If the file is damaged, or a measurement is missing or has the wrong type.
        """
        types = {"sha256": dict, "versions": dict | None, **_RESULT_TYPES.get(self.name.partition("_")[0], {})}
        try:
            return read_json(self.path / "result.json", types)
        except UserError as error:
            raise UserError(f"{error}; {self._how_to_recompute()}") from None

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the phase, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the phase as done and remove its checkpoint."""
        unique = _without_repeats(self._curve())
        if unique not in (None, self._curve()):  # a checkpoint of an earlier version may have been of such a curve
            self.write("curve.jsonl", unique)
        outputs = [path for path in self.path.iterdir() if path.suffix in (".safetensors", ".jsonl")]
        files = {path.name: sha256(path) for path in sorted(outputs)}
        result = {**result, "versions": versions(), "sha256": files}
        write_json(self.path / "result.json", result)
        self._keep_only_checkpoint(None)
        self.upload()

    def verified(self, name: str) -> Path:
        """Path of a file of a finished phase, after a check of its checksum.

        Raises:
            UserError: If the file is missing or damaged.
        """
        path = self.path / name
        if not path.is_file() or sha256(path) != self.result()["sha256"].get(name):
            raise UserError(f"{path}: missing or damaged; {self._how_to_recompute()}")
        return path

    def damaged(self) -> list[Path]:
        """Files of a finished phase that are missing or damaged, and a curve that `repair_curve` would change."""
        try:
            files = self.result()["sha256"]
        except UserError:
            return [self.path / "result.json"]
        paths = {self.path / name: expected for name, expected in files.items()}
        damaged = [path for path, expected in paths.items() if not path.is_file() or sha256(path) != expected]
        curve = self.path / "curve.jsonl"
        repeats = curve in paths and curve not in damaged and self.repaired_curve() != self._curve()
        return [*damaged, curve] if repeats else damaged

    def check(self) -> None:
        """Check all files of the phase, if it is finished.

        Raises:
            UserError: If a file is missing or damaged.
        """
        if self.done and self.result() and (damaged := self.damaged()):
            raise UserError(f"{damaged[0]}: missing or damaged; {self._how_to_recompute()}")

    def repaired_curve(self) -> bytes | None:
        """The curve of a finished phase without rows written by a process that had lost its lock.

        Such rows follow those whose checksum is in result.json, or repeat them. Versions before fences wrote them.

        Returns:
            The content that curve.jsonl should have; None if it is damaged otherwise.
        """
        content, expected = self._curve(), self.result()["sha256"].get("curve.jsonl")
        finished = _beginning(content, expected)
        unique = _without_repeats(content if finished is None else finished)
        return None if unique is None or (finished is None and _sha256(unique) != expected) else unique

    def repair_curve(self) -> bool:
        """Replace the curve of a finished phase by `repaired_curve`; returns whether they differed."""
        try:
            content = self.repaired_curve() if self.done else None
        except UserError:
            return False
        if content in (None, self._curve()):
            return False
        result = self.result()
        result["sha256"]["curve.jsonl"] = _sha256(content)
        write_json(self.path / "result.json", result)  # first: if killed here, the curve without repeats matches it
        self.write("curve.jsonl", content)
        return True

    def checkpoint(self) -> tuple[Path, int] | None:
        """Path and step of the committed checkpoint; None if it, or the curve up to its step, is missing or damaged."""
        try:
            leader = self._leader()
            types = {"file": str, "step": int, "sha256": str, "curve_sha256": str | None}
            entry = read_json(leader.path / "checkpoint.json", types)
            path, step = leader.checkpoint_path(entry["step"]), entry["step"]
            curve = entry.get("curve_sha256") if leader is self else entry["curves"][leader._name_of(self)]
            intact = (path.name, sha256(path)) == (entry["file"], entry["sha256"])
            intact &= curve in (None, self._curve_sha256(step))
            return (path, step) if intact and _without_repeats(_encode(self._rows(step))) is not None else None
        except (OSError, UserError, KeyError):
            return None

    def _leader(self) -> "PhaseDirectory":
        """The phase that stores the checkpoint: this one, or that of another replicate to which pointers lead."""
        leader, seen = self, set()
        while (pointer := read_json(leader.path / "checkpoint.json").get("leader")) and leader.path not in seen:
            seen.add(leader.path)
            leader = PhaseDirectory(Path(os.path.normpath(leader.path / pointer)))
        return leader

    def _name_of(self, other: "PhaseDirectory") -> str:
        return os.path.relpath(other.path, self.path)

    def environment(self) -> Environment:
        """What the phase was trained with, up to its end or its checkpoint, as far as that was recorded."""
        if self.done:
            return environment_of(self.result())
        if not (self.path / "checkpoint.json").exists():
            return {}
        path = self._leader().path / "checkpoint.json"
        return environment_of(read_json(path)) if path.exists() else {}

    def checkpoint_path(self, step: int) -> Path:
        """Path of the checkpoint of a step, which is written before `commit_checkpoint`."""
        return self.path / f"checkpoint-{step}.pt"

    def commit_checkpoint(
        self, step: int, environment: Environment | None = None, followers: Sequence["PhaseDirectory"] = ()
    ) -> None:
        """Make the checkpoint of a step the one to resume from, and remove older ones.

        Args:
            step: Step of the checkpoint.
            environment: What the phase was trained with up to this step.
            followers: Phases of other replicates whose training this checkpoint contains. They get a pointer to it.
        """
        for follower in followers:
            follower._point_to(self)
        path = self.checkpoint_path(step)
        entry = {"file": path.name, "step": step, "sha256": sha256(path), "curve_sha256": self._curve_sha256(step)}
        entry["environment"] = dict(environment or {})
        if followers:
            entry["curves"] = {self._name_of(follower): follower._curve_sha256(step) for follower in followers}
        write_json(self.path / "checkpoint.json", entry)
        self._keep_only_checkpoint(path)

    def _point_to(self, leader: "PhaseDirectory") -> None:
        """Write a pointer, unless it is there. An own checkpoint is kept: the leader may still point to it."""
        path, content = self.path / "checkpoint.json", {"leader": self._name_of(leader)}
        with contextlib.suppress(UserError):
            if read_json(path).get("leader") == content["leader"]:
                return
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def remove_stale_checkpoints(self) -> None:
        """Remove the checkpoint of a finished phase, which remains if the process was killed while it finished."""
        if self.done:
            self._keep_only_checkpoint(None)

    def curve(self, until: int | None = None) -> list[dict[str, float]]:
        """Rows of the training curve up to step `until`, inclusive, each once; all rows by default."""
        rows = self._rows(until)
        unique = _without_repeats(_encode(rows))
        return rows if unique is None else [json.loads(line) for line in unique.splitlines()]

    @contextlib.contextmanager
    def open_curve(self, until: int) -> Iterator[BinaryIO]:
        """Drop the rows after step `until` and open the curve to append others.

        The curve becomes another file. A process that had it open and has lost its lock appends to a deleted file.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = open_atomically(self.path / "curve.jsonl", _encode(self._rows(until)))
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):  # rows that found no room, which `flush` has reported
                file.close()

    def _curve(self) -> bytes:
        path = self.path / "curve.jsonl"
        return path.read_bytes() if path.exists() else b""

    def _rows(self, until: int | None) -> list[dict[str, float]]:
        rows = []
        for line in self._curve().splitlines():
            try:
                row = json.loads(line)
                if until is None or row["step"] <= until:
                    rows.append(row)
            except (ValueError, KeyError, TypeError):  # a killed process leaves a torn last line
                break
        return rows

    def _keep_only_checkpoint(self, keep: Path | None) -> None:
        if keep is None:
            remove(self.path / "checkpoint.json")
        for path in self.path.glob("checkpoint-*.pt"):
            if path != keep:
                remove(path)

    def _curve_sha256(self, until: int) -> str:
        return _sha256(json.dumps(self._rows(until)).encode())

    def _how_to_recompute(self) -> str:
        return f"delete {self.path} and everything computed from it, then rerun the training command"


def _encode(rows: list[dict[str, float]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _beginning(curve: bytes, sha256: str | None) -> bytes | None:
    """The first lines of a curve that have this checksum."""
    digest, size = hashlib.sha256(), 0
    for line in [b"", *curve.splitlines(keepends=True)]:
        digest.update(line)
        size += len(line)
        if digest.hexdigest() == sha256:
            return curve[:size]
    return None


def _without_repeats(curve: bytes) -> bytes | None:
    """A curve without repeated rows; None if two rows have different values of the same metrics at the same step."""
    kept: list[bytes] = []
    values: dict[tuple, dict] = {}
    for line in curve.splitlines(keepends=True):
        try:
            row = json.loads(line)
            measured = {key: row[key] for key in row if key != "timestamp"}
            before = values.setdefault((row["step"], *sorted(measured)), measured)
        except (ValueError, LookupError, TypeError):  # a torn line
            kept.append(line)
            continue
        if before is measured:
            kept.append(line)
        elif before != measured:
            return None
    return b"".join(kept)

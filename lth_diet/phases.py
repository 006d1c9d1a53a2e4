"""A phase, which is one Composer training: its files, how they are written, whether it is done.

<phase>/
    curve.jsonl             step, timestamp (ms), metrics
    <what it made>          weights.safetensors, mask.safetensors, el2n.safetensors, subset.safetensors
    result.json             written last, with the sha256 of the files above: the done marker
    checkpoint.json         while the phase runs: which Composer checkpoint to resume from
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import reprlib
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from filelock import LeaseCompromise, SoftFileLease, Timeout

from lth_diet import __version__
from lth_diet.errors import UserError, naming

LEASE_SECONDS = 60.0

_NUMBER = float | int
_MEASURED = {"test_accuracy_percent": _NUMBER, "timestamp": int}
_RESULTS = {
    "level": {"level": int, "weights_remaining_percent": _NUMBER, **_MEASURED},
    "network": {"network": int, **_MEASURED},
}
"""Types of what result.json has to hold, by kind of phase; pre-training measures nothing where it has no steps."""


class AnotherProcessError(UserError):
    """Another process works in this folder."""


@contextlib.contextmanager
def held(folder: Path, patience: float) -> Iterator[None]:
    """Keep other processes out of a folder, on this host and on others that share it.

    The hold is a lease that a thread renews. When its holder dies, another process takes it over: at once on the same
    host; on another, or if the holder has stopped, once it has seen no renewal for `LEASE_SECONDS` by its own clock. A
    holder that has lost its lease ends where it is, which loses no more than a kill would.

    Args:
        folder: Made if it is not there.
        patience: Seconds to wait for a holder that gives signs of life, as it may be about to end; -1 waits as long as
            it takes, and 0 does not wait for signs of life either.

    Raises:
        AnotherProcessError: If another process holds it for longer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / ".lease"
    lease = SoftFileLease(path, lease_duration=LEASE_SECONDS, heartbeat_interval=LEASE_SECONDS / 12, on_compromise=_end)
    began, renewed = time.monotonic(), _renewed(path)

    def is_hopeless() -> bool:
        return 0 <= patience < time.monotonic() - began and _renewed(path) != renewed

    try:
        hold = lease.acquire(timeout=0 if patience == 0 else -1, cancel_check=is_hopeless)
    except Timeout:
        holder = f" (process {lease.owner.pid} on {lease.owner.hostname})" if lease.owner else ""
        raise AnotherProcessError(
            f"{folder} is being trained by another process{holder}; wait for it, or end it"
        ) from None
    with hold:
        yield


def _renewed(lease: Path) -> int | None:
    with contextlib.suppress(OSError):
        return lease.stat().st_mtime_ns
    return None


def _end(compromise: LeaseCompromise) -> None:
    end(str(Path(compromise.lock_file).parent), compromise.reason)


def end(folder: str, reason: str) -> NoReturn:
    """End this process where it is, which has lost its hold on a folder."""
    told = f"error: {folder} may have been taken over by another process ({reason}); this one ends"
    print(told, file=sys.stderr, flush=True)
    os._exit(1)


def clear_parts(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote below a folder, which this process has to hold."""
    for part in folder.rglob(".*.part-*"):
        part.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that it has its old content or the new one, whenever the process is killed.

    Raises:
        OSError: That names the file, if it cannot be written; it is as it was then.
    """
    part = path.with_name(f".{path.name}.part-{secrets.token_hex(8)}")
    try:
        with naming(path):
            with open(part, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()  # a full disk has need of the space
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that carries its own checksum, atomically."""
    write_atomically(path, json.dumps({**content, "checksum": _checksum(content)}, indent=2))


def read_json(path: Path, types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Args:
        path: Of the file.
        types: Of the values that are needed, by key; with None in it, the key may be missing.

    Raises:
        UserError: If it cannot be read, is not what was written, or a value is of another type.
    """
    try:
        content = json.loads(path.read_text())
        if content.pop("checksum") != _checksum(content):
            raise ValueError
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged, or not written by lth_diet") from None
    for key, kind in (types or {}).items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            there = f"{key}: {reprlib.repr(value)}" if key in content else f"no {key}"
            raise UserError(f"{path}: {there}, where {getattr(kind, '__name__', kind)} has to be")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


class Phase:
    """The directory of one Composer training: `pretrain`, `level_<L>` or `network_<k>`.

    Args:
        path: May not exist yet.
        share: Called when something is there that lasts, for other nodes.
    """

    def __init__(self, path: Path, share: Callable[[], None] = lambda: None):
        self.path = path
        self.share = share

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
        self.share()

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

    def forget_checkpoint(self) -> None:
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

    def cut_curve(self, until: int) -> None:
        """Drop the rows after step `until`: they will be measured again."""
        rows = self.curve(until)
        self.write("curve.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

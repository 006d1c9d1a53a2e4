"""Files that survive a kill: atomic writes, JSON with checksums, and locks that processes and hosts share."""

import contextlib
import hashlib
import json
import os
import reprlib
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from filelock import LeaseCompromise, SoftFileLease, Timeout

from lth_diet.errors import UserError, add_path_to_errors

LEASE_SECONDS = 60.0


class LockedError(UserError):
    """Another process works in this folder."""


@contextlib.contextmanager
def lock(folder: Path, patience: float) -> Iterator[None]:
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
    lease = SoftFileLease(
        path, lease_duration=LEASE_SECONDS, heartbeat_interval=LEASE_SECONDS / 12, on_compromise=_on_compromise
    )
    began, renewed = time.monotonic(), _renewed(path)

    def is_hopeless() -> bool:
        return 0 <= patience < time.monotonic() - began and _renewed(path) != renewed

    try:
        hold = lease.acquire(timeout=0 if patience == 0 else -1, cancel_check=is_hopeless)
    except Timeout:
        holder = f" (process {lease.owner.pid} on {lease.owner.hostname})" if lease.owner else ""
        raise LockedError(f"{folder} is being trained by another process{holder}; wait for it, or end it") from None
    with hold:
        yield


def _renewed(lease: Path) -> int | None:
    with contextlib.suppress(OSError):
        return lease.stat().st_mtime_ns
    return None


def _on_compromise(compromise: LeaseCompromise) -> None:
    exit_without_lock(str(Path(compromise.lock_file).parent), compromise.reason)


def exit_without_lock(folder: str, reason: str) -> NoReturn:
    """End this process where it is, which has lost its hold on a folder."""
    told = f"error: {folder} may have been taken over by another process ({reason}); this one ends"
    print(told, file=sys.stderr, flush=True)
    os._exit(1)


def remove_partial_files(folder: Path) -> None:
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
        with add_path_to_errors(path):
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


def cache_folder() -> Path:
    """Where this node keeps what can be made or had again."""
    home = os.environ.get("LTH_DIET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lth_diet"
    return Path(home).expanduser()

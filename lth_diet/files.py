"""Crash-safe files: atomic writes, JSON with checksums, and locks between processes and hosts."""

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

from filelock import SoftFileLease, Timeout

from lth_diet.errors import UserError, add_path_to_errors

LEASE_SECONDS = 60.0
"""Seconds without a renewal after which a lock expires."""


class LockedError(UserError):
    """Another process has locked the folder."""


@contextlib.contextmanager
def lock(folder: Path, timeout: float) -> Iterator[None]:
    """Lock a folder against other processes, on this host and on hosts that share its file system.

    The lock is a lease that a background thread renews. If its holder dies, a process on the same host takes it over
    at once. A process on another host takes it over after seeing no renewal for `LEASE_SECONDS` by its own clock; so
    does any process if the holder is stopped. A holder that finds its lease lost exits at once, as if killed.

    Args:
        folder: Folder to lock; created if it does not exist.
        timeout: Seconds to wait for a holder that renews its lease; -1 waits without limit. With 0 the lock is tried
            once, without waiting to see whether the holder is alive.

    Raises:
        LockedError: If another process still holds the lock after `timeout`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / ".lease"
    lease = SoftFileLease(
        path,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=LEASE_SECONDS / 12,
        on_compromise=lambda compromise: exit_without_lock(str(path.parent), compromise.reason),
    )
    start, renewed_at = time.monotonic(), _renewed_at(path)

    def holder_is_alive_after_timeout() -> bool:
        return 0 <= timeout < time.monotonic() - start and _renewed_at(path) != renewed_at

    try:
        held = lease.acquire(timeout=0 if timeout == 0 else -1, cancel_check=holder_is_alive_after_timeout)
    except Timeout:
        holder = f" (process {lease.owner.pid} on {lease.owner.hostname})" if lease.owner else ""
        raise LockedError(f"{folder} is being trained by another process{holder}; wait for it, or stop it") from None
    with held:
        yield


def _renewed_at(lease: Path) -> int | None:
    with contextlib.suppress(OSError):
        return lease.stat().st_mtime_ns
    return None


def exit_without_lock(folder: str, reason: str) -> NoReturn:
    """Exit at once, because this process has lost the lock of a folder."""
    message = f"error: {folder} may have been taken over by another process ({reason}); this one exits"
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of killed writers below a folder; the caller must hold its lock."""
    for part in folder.rglob(".*.part-*"):
        part.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a killed process leaves either its old content or the new.

    Raises:
        OSError: If the file cannot be written, with its name; its old content is then unchanged.
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
            part.unlink()  # frees space on a full disk
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with its own checksum, atomically."""
    write_atomically(path, json.dumps({**content, "checksum": _checksum(content)}, indent=2))


def read_json(path: Path, types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Args:
        path: Path of the file.
        types: Types of the required keys. A key whose type includes None may be missing.

    Raises:
        UserError: If the file cannot be read, does not match its checksum, or a value is missing or of another type.
    """
    try:
        content = json.loads(path.read_text())
        if content.pop("checksum") != _checksum(content):
            raise ValueError
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged or was not written by lth_diet") from None
    for key, kind in (types or {}).items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = reprlib.repr(value) if key in content else "missing"
            raise UserError(f"{path}: {key} is {found}, expected {getattr(kind, '__name__', kind)}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache_folder() -> Path:
    """Folder of this host for data that can be computed or downloaded again."""
    home = os.environ.get("LTH_DIET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lth_diet"
    return Path(home).expanduser()
